"""Engines with quantised weights: tokens that no batch mate changes, no compile, memory, refusals.

Tokens are compared as tests/engine/test_invariance.py does: where XLA sums in another order a token
may differ from the one alone only if both were nearly as likely.
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinfer import LLM, CompletionOutput, SamplingParams, generate
from jaxinfer.errors import ModelFormatError
from jaxinfer.params import flatten
from jaxinfer.quant.arrays import QuantArray
from jaxinfer.quant.schemes import SCHEMES
from tests.engine.test_invariance import NUM_PROMPTS, Reference, run
from tests.helpers import TINY_CONFIG, greedy, one, tiny_llm, tiny_weights, write_tiny_model

OPTIONS = {
    name: {"quantization": name, "quantize_lm_head": True}
    | ({"quantization_group_size": 16} if scheme.has_groups else {})
    for name, scheme in SCHEMES.items()
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return write_tiny_model(tmp_path_factory.mktemp("quant") / "tiny")


# Engines for each take a minute; int8 and int4 stand for quantised activations and float ones, and
# tests/kernels/test_quant_matmul.py has every path of the matmul.
_LONG = ("int8_weight_only", "int4_asymmetric", "fp8")
_PARAMS = [pytest.param(n, marks=[pytest.mark.slow] * (n in _LONG)) for n in SCHEMES]


@pytest.fixture(scope="module", params=_PARAMS)
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(tiny, scheme: str):
    """Each prompt alone, under the scheme."""
    made = Reference(tiny, **OPTIONS[scheme])
    yield made
    made.llm.close()


def test_tokens_do_not_depend_on_batch_mates_chunks_or_cache(tiny, scheme: str, reference):
    """In batches of 1 to 32, in chunks, from the cache; nothing is compiled after the warm-up."""
    rng = np.random.default_rng(0)
    with tiny_llm(
        tiny,
        max_num_batched_tokens=16,
        num_pages=500,
        strict=True,
        **OPTIONS[scheme],
    ) as llm:
        llm.warmup()
        run(llm, [3], reference)
        run(llm, [4, 5, 9], reference)
        run(llm, rng.permutation(NUM_PROMPTS).tolist(), reference)
        run(llm, rng.permutation(NUM_PROMPTS).tolist(), reference)
        metrics = llm.get_metrics()
        assert metrics["num_prefix_hits"] > 0
        assert metrics["num_compiles_after_warmup"] == 0


def test_what_is_planned_is_what_is_loaded(tiny, scheme: str):
    """The weights' bytes in the plan are those of the arrays on the device, and far fewer."""
    with tiny_llm(tiny) as llm:
        plain = llm.memory_plan.weights
    with tiny_llm(tiny, **OPTIONS[scheme]) as llm:
        leaves = flatten(llm.params)
        found = [path for path, leaf in leaves.items() if isinstance(leaf, QuantArray)]
        assert len(found) == 2 * 7 + 1
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(llm.params))
        assert llm.memory_plan.weights == num_bytes
        floats = sum(leaf.nbytes for path, leaf in leaves.items() if path not in found)
        small = 0.3 if SCHEMES[scheme].has_groups else 0.35  # scales: 16 or 48 values share one
        assert num_bytes - floats < small * (plain - floats)


def test_the_pure_function_generates_the_same(tiny, scheme: str):
    """`jaxinfer.generate` takes the quantised params as they are."""
    ids = list(range(60, 90))
    with tiny_llm(tiny, **OPTIONS[scheme]) as llm:
        want = llm.generate(ids, greedy())[0].outputs[0].token_ids
        model = llm.model

        def call(weights, tokens, lengths):
            return generate(model, weights, tokens, lengths, max_new_tokens=8, valid_vocab=259)

        tokens, lengths = jax.numpy.asarray([ids]), jax.numpy.asarray([len(ids)])
        got = jax.jit(call)(llm.params, tokens, lengths)
        assert got.tokens[0].tolist() == want


def test_the_first_program_is_compiled_before_the_weights_come(tiny, scheme: str):
    """compile_early knows the quantised shapes: a program takes no other arrays than its own."""
    options = OPTIONS[scheme]
    with tiny_llm(tiny, first_prompts=[[1, 2, 3]], **options) as llm:
        runner = llm.engine.runner
        assert runner._early  # compiled, or being compiled, before `begin` brought the weights
        first = llm.generate([1, 2, 3], greedy())[0].outputs[0].token_ids
    with tiny_llm(tiny, **options) as llm:
        assert llm.generate([1, 2, 3], greedy())[0].outputs[0].token_ids == first


def test_random_weights_can_be_quantised(tiny, scheme: str):
    with tiny_llm(tiny, load_format="dummy", **OPTIONS[scheme]) as llm:
        assert len(llm.generate([1, 2, 3], greedy())[0].outputs[0].token_ids) == 8


def test_other_kernels_give_the_same(tiny, scheme: str, reference):
    with tiny_llm(tiny, attention_impl="reference", **OPTIONS[scheme]) as llm:
        run(llm, list(range(0, NUM_PROMPTS, 5)), reference)


def chosen(output: CompletionOutput) -> list[float]:
    """The log-prob of each token."""
    assert output.logprobs
    return [entry[i].logprob for i, entry in zip(output.token_ids, output.logprobs, strict=True)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_of_activations(tiny, scheme: str, dtype: str):
    with tiny_llm(tiny, dtype=dtype, **OPTIONS[scheme]) as llm:
        ask = SamplingParams(temperature=0, max_tokens=6, logprobs=1)
        assert np.isfinite(chosen(one(llm, [5, 6, 7], ask))).all()


def test_a_tied_table_is_quantised_for_both_its_uses(tmp_path):
    config = {"tie_word_embeddings": True}
    weights = tiny_weights({**TINY_CONFIG, **config})
    del weights["lm_head.weight"]
    folder = write_tiny_model(tmp_path / "tied", weights=weights, **config)

    def logprobs(**options) -> np.ndarray:
        with tiny_llm(folder, max_logprobs=-1, **options) as llm:
            assert isinstance(llm.params["embed"], QuantArray) == ("quantize_lm_head" in options)
            ask = SamplingParams(temperature=0, max_tokens=1, logprobs=264, ignore_eos=True)
            entry = (one(llm, list(range(40)), ask).logprobs or [])[0]
            return np.array([entry[token].logprob for token in sorted(entry)])

    plain = logprobs()
    error = np.abs(logprobs(quantization="int8", quantize_lm_head=True) - plain).max()
    assert 1e-3 < error < 0.1 * np.ptp(plain)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(tiny, tmp_path, bad: float):
    weights = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][3, 5] = bad
    folder = write_tiny_model(tmp_path / "bad", weights=weights)
    with pytest.raises(ModelFormatError, match=f"{name}.*NaN or infinity"):
        tiny_llm(folder, quantization="int8")


def test_channels_of_zeros_and_outliers_run(tiny, tmp_path):
    """Both in one weight: finite log-probs, and the same tokens as the float model's."""
    weights = load_file(tiny / "model.safetensors")
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        weights[name][3] = 0.0
        weights[name][5, 7] = 40.0
    folder = write_tiny_model(tmp_path / "odd", weights=weights)
    tokens = []
    for options in ({}, {"quantization": "int8_weight_only"}, {"quantization": "int8"}):
        with tiny_llm(folder, **options) as llm:
            ask = SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True)
            output = one(llm, list(range(30)), ask)
            assert np.isfinite(chosen(output)).all()
            tokens.append(output.token_ids)
    assert tokens[0][0] == tokens[1][0]


def test_what_is_quantised_is_printed(tiny, capsys):
    with tiny_llm(tiny, verbose=True, **OPTIONS["int4"]) as llm:
        assert isinstance(llm, LLM) and llm.config.quantization == "int4"
    told = capsys.readouterr().err
    assert "quantisation: int4 (int4 weights, a scale for each group; float activations)" in told
    assert "int4 in groups of 16: layers_{l}/attn/q" in told
    assert "float32: embed" in told and "int8: lm_head" in told
