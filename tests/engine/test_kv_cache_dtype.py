"""Engines with int8 and fp8 pages: the engine's contracts hold, the memory plan counts the scales.

Tokens are compared as test_invariance.py does. The other files of this folder run with 8-bit pages
under `--kv-cache-dtype`; test_padding.py and test_platforms.py always do.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, ConfigError, generate, kv_cache, models, setup_model
from jaxinfer.config import EngineConfig
from jaxinfer.weights import config_from_hf
from pallas_kernels import Spec, dispatch
from tests.engine.test_invariance import Reference, params, prompts, run
from tests.helpers import TINY_CONFIG, assert_no_leak, greedy, one, tiny_llm, write_tiny_model
from tests.speculative import forced

HELD = {"int8": "int8", "fp8": "float8_e4m3fn"}
FEW = list(range(4, 16))
"""Prompts; 7, 11 and 15 begin as the ones before them."""


# An engine for each takes seconds: where one dtype tells what the other would, the other is slow.
mainly_int8, mainly_fp8 = (
    pytest.mark.parametrize(
        "kv", [first, pytest.param(second, marks=pytest.mark.slow)], indirect=True
    )
    for first, second in (("int8", "fp8"), ("fp8", "int8"))
)


@pytest.fixture(scope="module", params=HELD)
def kv(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(tiny, kv: str):
    """Each prompt alone, with pages of the same dtype."""
    made = Reference(tiny, kv_cache_dtype=kv)
    yield made
    made.llm.close()


# -- contracts -------------------------------------------------------------------------


def test_batches_chunks_cache_and_preemption(tiny, kv: str, reference):
    """Chunks of 16, a pool for about four requests, shared prefixes; nothing compiles late."""
    rng = np.random.default_rng(0)
    with tiny_llm(
        tiny,
        kv_cache_dtype=kv,
        max_num_batched_tokens=16,
        num_pages=30,
        max_model_len=128,
        strict=True,
    ) as llm:
        llm.warmup()
        run(llm, FEW[:1], reference)
        run(llm, FEW[1:4], reference)
        run(llm, rng.permutation(FEW).tolist(), reference)
        run(llm, rng.permutation(FEW).tolist(), reference)
        metrics = llm.get_metrics()
    assert metrics["num_prefix_hits"] > 0 and metrics["num_preemptions"] > 0
    assert metrics["num_compiles_after_warmup"] == 0


@mainly_int8
@pytest.mark.parametrize("impl", ["reference", pytest.param("interpret", marks=pytest.mark.slow)])
def test_other_kernels_no_overlap_other_pages(tiny, kv: str, reference, impl):
    with tiny_llm(
        tiny, kv_cache_dtype=kv, attention_impl=impl, page_size=16, async_scheduling=False
    ) as llm:
        run(llm, FEW[1:6], reference)


@mainly_int8
def test_speculation(tiny, kv: str, reference):
    """Drafts that are right up to a random place: rows of several tokens, rolled back."""
    texts = {(tuple(prompts()[i]), 0): reference.tokens(i) for i in FEW}
    with tiny_llm(
        tiny, kv_cache_dtype=kv, max_num_seqs=32, speculative_config=forced.CONFIG
    ) as llm:
        speculator = forced.force(forced.checked(llm), forced.flaky(texts))
        run(llm, FEW, reference)
        run(llm, FEW[:1], reference)
        assert speculator.stats.num_accepted_tokens > 20


@mainly_fp8
def test_a_draft_model_has_pages_of_the_same_dtype(tiny, kv: str, reference):
    config = {"model": str(tiny), "num_speculative_tokens": 3}
    with tiny_llm(tiny, kv_cache_dtype=kv, speculative_config=config) as llm:
        assert llm.engine.speculator is not None
        llm.engine.speculator._cost = lambda bucket, base, plain: plain * 1e-6  # always drafts
        target, draft = llm.engine.runners
        assert target.model.page_dtype == draft.model.page_dtype == HELD[kv]
        run(llm, FEW[:6], reference)
        assert llm.memory_plan.pages == num_bytes(target.pages) + num_bytes(draft.pages)
        # The target's own weights: what they draft is right but where rounding differs.
        assert llm.get_metrics()["spec_decode_acceptance_rate"] > 0.95


def test_the_pure_function_generates_the_same(tiny, kv: str, reference):
    """`jaxinfer.generate` has pages of its own, of the model's page_dtype."""
    llm = reference.llm
    some = FEW[::2]  # greedy ones
    inputs = [prompts()[i] for i in some]
    tokens = np.zeros((len(some), 90), np.int32)
    for row, ids in zip(tokens, inputs, strict=True):
        row[: len(ids)] = ids
    lengths = jnp.asarray([len(ids) for ids in inputs], jnp.int32)

    @jax.jit
    def program(weights, tokens, lengths):
        return generate(llm.model, weights, tokens, lengths, max_new_tokens=12, valid_vocab=259)

    result = program(llm.params, jnp.asarray(tokens), lengths)
    for i, got in zip(some, np.asarray(result.tokens).tolist(), strict=True):
        reference.check(i, got)


@mainly_fp8
def test_samples_share_pages_and_pinned_prompts_stay(tiny, kv: str):
    """Copy-on-write copies scales too: samples of a prompt that ends within a page."""
    ask = dataclasses.replace(params(1), n=3)
    with tiny_llm(tiny, kv_cache_dtype=kv, num_pages=40) as llm:
        prompt = list(range(1, 30))
        want = [o.token_ids for o in llm.generate(prompt, ask)[0].outputs]
        llm.reset_prefix_cache()
        llm.cache_prompt(prompt, pin=True)
        again = llm.generate([prompt, [5, 6]], ask)[0]
        assert again.num_cached_tokens == 24
        assert [o.token_ids for o in again.outputs] == want
        assert len({tuple(o) for o in want}) == 3
        llm.unpin_prompt(prompt)
        assert_no_leak(llm)


# -- memory ----------------------------------------------------------------------------


def num_bytes(pages) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pages))


@pytest.mark.parametrize("impl", ["xla", "reference", "interpret"])
def test_what_is_planned_is_what_is_allocated(tiny, kv: str, impl):
    with tiny_llm(tiny, kv_cache_dtype=kv, attention_impl=impl) as llm:
        assert llm.memory_plan.pages == num_bytes(llm.engine.runner.pages)
        assert llm.memory_plan.pages == llm.config.kv_cache_memory_bytes
        assert f"KV pages ({HELD[kv]})" in str(llm.memory_plan)
        metrics = llm.get_metrics()
        assert metrics["kv_cache_bytes"] == llm.memory_plan.pages
        assert metrics["kv_cache_tokens"] == 200 * 8


def test_tokens_in_the_same_memory(tmp_path, kv: str):
    """Head dim 64: 68 bytes for each vector, scale included, where bfloat16 has 128."""
    folder = write_tiny_model(tmp_path / "wide", head_dim=64)
    plans = []
    for options in ({}, {"kv_cache_dtype": kv}):
        with LLM(
            str(folder),
            dtype="bfloat16",
            kv_cache_memory_bytes=2**20,
            compilation_cache_dir=None,
            verbose=False,
            **options,
        ) as llm:
            plans.append(llm.memory_plan)
    plain, small = plans
    assert plain.pages <= 2**20 and small.pages <= 2**20
    # Beside K and V a slot has its token's id, 4 bytes.
    vectors = 2 * TINY_CONFIG["num_hidden_layers"] * TINY_CONFIG["num_key_value_heads"]
    assert plain.pages == plain.num_pages * 16 * (vectors * 128 + 4)
    assert small.pages == small.num_pages * 16 * (vectors * 68 + 4)
    assert small.num_tokens >= 1.8 * plain.num_tokens


@pytest.mark.parametrize("num_kv_heads", [3, 8])
@pytest.mark.parametrize("impl", ["xla", "reference", "interpret"])
def test_every_layout_holds_nearly_twice_the_tokens(kv: str, impl, num_kv_heads):
    """The TPU's, which pads heads to fours, too; nearly four times those of float32."""
    heads = {"num_attention_heads": 24, "num_key_value_heads": num_kv_heads, "head_dim": 64}
    config = config_from_hf({**TINY_CONFIG, **heads}, None)
    ops = dispatch.resolve(impl)
    bytes_of = {
        dtype: models.build(config, ops, "bfloat16", dtype).page_bytes(128)
        for dtype in (HELD[kv], "bfloat16", "float32")
    }
    assert bytes_of["bfloat16"] >= 1.8 * bytes_of[HELD[kv]]
    if num_kv_heads % 4 == 0 or impl != "interpret":
        assert bytes_of["float32"] >= 3.6 * bytes_of[HELD[kv]]


# -- the option ------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["int4", "fp8_e5m2", "bfloat16", "", None, 8, True, ["int8"]])
def test_other_values_are_refused_with_the_list(value):
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, int8, fp8, fp8_e4m"):
        EngineConfig(kv_cache_dtype=value)


def test_vllms_name_of_fp8(tiny):
    with tiny_llm(tiny, kv_cache_dtype="fp8_e4m3") as llm:
        assert llm.config.kv_cache_dtype == "fp8"
        assert llm.model.page_dtype == "float8_e4m3fn"
    with tiny_llm(tiny, kv_cache_dtype="auto") as llm:
        assert llm.config.kv_cache_dtype == "auto"
        assert llm.model.page_dtype == llm.config.dtype == "float32"


@pytest.mark.parametrize(("dtype", "kv_cache_dtype"), [("bfloat16", "int8"), ("float16", "fp8")])
def test_activations_of_other_dtypes(tiny, dtype, kv_cache_dtype):
    with tiny_llm(tiny, dtype=dtype, kv_cache_dtype=kv_cache_dtype) as llm:
        output = one(llm, list(range(40)), greedy(max_tokens=2, logprobs=0))
    assert len(output.logprobs) == 2 and np.isfinite(output.cumulative_logprob)


def resolve(platform: str, **options) -> dispatch.Ops:
    config = EngineConfig(**{"kv_cache_dtype": "int8", **options})
    head_dim = 256 if platform == "gpu" else 64
    model = config_from_hf({**TINY_CONFIG, "head_dim": head_dim}, None)
    return setup_model.resolve_ops(config, model, "bfloat16", platform)


def test_what_a_kernel_cannot_hold_is_an_error_or_said():
    """Asked for by name it is an error with the remedy; "auto" takes XLA and says why."""
    with pytest.raises(
        ConfigError, match=r"page_size is 64; int8 pages .*kv_cache_dtype, .*'int8'"
    ):
        resolve("tpu", page_size=64, attention_impl="tpu")
    ops = resolve("tpu", page_size=64)
    assert ops.name == "xla" and "not tpu: page_size is 64" in ops.reason
    assert resolve("tpu", page_size=128).name == "tpu"
    with pytest.raises(ConfigError, match="leave attention_impl out, or kv_cache_dtype"):
        resolve("gpu", page_size=64, attention_impl="mosaic_gpu")
    ops = resolve("gpu", page_size=64)
    assert ops.name == "xla" and "not mosaic_gpu: " in ops.reason
    if jax.__version_info__ >= (0, 11):
        assert "head_dim is 256; allowed with int8 pages: 64, 128" in ops.reason
        assert resolve("gpu", kv_cache_dtype="auto", page_size=64).name == "mosaic_gpu"


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_default_page_size_suits_8_bit_pages(platform, kv: str):
    spec = Spec(9, 3, 64, kv_cache.PAGE_SIZES[platform], "bfloat16", HELD[kv])
    reason = dispatch.resolve("auto", platform, spec=spec).reason
    assert "page_size" not in reason and "page_dtype" not in reason
