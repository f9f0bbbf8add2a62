"""Named scopes: on every part of a layer, every kernel and stage of the sampler."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import models
from jaxinfer.kv_cache import KVPages
from jaxinfer.profiling import hlo
from jaxinfer.step import copy_pages, set_bias_row, step
from jaxinfer.weights import config_from_hf
from pallas_kernels import resolve
from pallas_kernels.paged_attention import Ragged
from tests.helpers import tiny_llm
from tests.models import tiny as architectures

NOT_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "iota"}
LAYER = (
    "attn_norm", "attn/qkv", "attn/kv_write", "attn/attention", "attn/out", "mlp_norm",
    "mlp/up", "mlp/down", "mlp/activation", "residual",
)  # fmt: skip
SAMPLER = (
    "penalties", "bias", "draw", "draw/temperature", "draw/filters/top_k", "draw/filters/top_p",
    "draw/filters/min_p", "draw/noise", "draw/noise/row_keys",
)  # fmt: skip


def scopes_in(text: str) -> set[str]:
    """Scopes of an HLO text, and all that enclose them."""
    found = set()
    for op_name in re.findall(r'op_name="([^"]*)"', text):
        scope = hlo.scope_of(op_name)
        found |= {"/".join(scope[:depth]) for depth in range(1, len(scope) + 1)}
    return found


def lowered(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).as_text("hlo", debug_info=True)


@pytest.fixture(scope="module")
def compiled(tiny) -> str:
    """The step of prompts and decode rows of the tiny model, as XLA compiles it."""
    name = "jax_compilation_cache_include_metadata_in_key"
    before = jax.config.values[name]
    jax.config.update(name, True)  # the names of this code, not of that which filled the cache
    with tiny_llm(tiny) as llm:
        runner = llm.engine.runner
        layout = runner.builder.layouts[runner.buckets[-1]]
        function = jax.jit(
            partial(step, runner.model, layout, **runner._options), donate_argnames="pages"
        )
        packed = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        arguments = (runner.params, runner.pages, runner.bias_table, runner.previous, packed)
        text = function.lower(*arguments).compile().as_text()
    jax.config.update(name, before)
    return text


def test_every_part_of_the_step_has_its_scope(compiled):
    found = scopes_in(compiled)
    missing = {f"Decoder/layers/{part}" for part in (*LAYER, "attn/rope", "mlp/gate")} - found
    missing |= {f"sampler/{stage}" for stage in SAMPLER} - found
    missing |= {
        "Decoder/embed", "Decoder/rope_table", "Decoder/norm", "logits", "logprobs", "feed",
        "unpack", "Decoder/layers/attn/attention/paged_decode",
        "Decoder/layers/attn/attention/paged_prefill",
    } - found  # fmt: skip
    assert not missing


def test_nearly_every_operation_lies_in_a_scope(compiled):
    """Only what XLA adds has none: copies, and what it splits sums and shifts into."""
    in_scope: Counter[bool] = Counter()
    nameless = []
    for computation in re.split(r"\n(?=\S)", compiled):
        if (
            "%region" in computation.split("{")[0]
        ):  # the function of a reduction: no work of its own
            continue
        for line in computation.splitlines():
            matched = re.match(r"\s+(?:ROOT )?%?\S+ = \(?\S+.*? ([a-z][a-z0-9-]*)\(", line)
            if matched is None or matched[1] in NOT_WORK:
                continue
            named = re.search(r'op_name="([^"]*)"', line)
            has = named is not None and bool(hlo.scope_of(named[1]))
            in_scope[has] += 1
            if named is not None and not has and "/" in named[1]:
                nameless.append(named[1])
    assert not nameless  # written in jaxinfer, outside every scope
    assert in_scope[True] > 1000
    assert in_scope[False] < 0.1 * in_scope[True]


def ragged(num_tokens: int = 8) -> Ragged:
    lens = jnp.zeros(num_tokens, jnp.int32)
    table, starts = jnp.zeros((num_tokens, 4), jnp.int32), jnp.arange(num_tokens + 1)
    return Ragged(table, lens, starts, lens[0], lens, decode_only=False)


@pytest.mark.parametrize("case", architectures.CONFIGS)
def test_every_architecture(case):
    config = config_from_hf(architectures.CONFIGS[case], None)
    model = models.build(config, resolve("xla"), "float32")
    pages = jax.eval_shape(lambda: model.allocate(8, 16))
    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    text = lowered(model.forward, model.shapes(), pages, ids, ids, jax.eval_shape(ragged))
    found = scopes_in(text)
    # Layers are functions here, which bear the names inside them; XLA puts the caller's in front
    # when it inlines them (test_every_part_of_the_step_has_its_scope).
    assert not {f"layers/{part}" for part in LAYER} - found
    assert {"Decoder/embed", "Decoder/norm"} <= found
    assert (config.rope is None) != ("layers/attn/rope" in found)


@pytest.mark.parametrize(
    ("impl", "names"),
    [
        ("reference", {"paged_reference"}),
        ("xla", {"paged_decode", "paged_prefill"}),
        ("interpret", {"paged_decode", "paged_prefill"}),
    ],
)
def test_paged_attention(impl, names):
    ops = resolve(impl)
    pages = jax.eval_shape(lambda: ops.allocate(8, 16, 2, 32, "float32"))
    q = jax.ShapeDtypeStruct((8, 4, 32), jnp.float32)

    def attend(q, pages, ragged):
        return ops.paged_attention(q, pages, ragged, scale=0.1, window=None, soft_cap=None)

    assert names <= scopes_in(lowered(attend, q, pages, jax.eval_shape(ragged)))


@pytest.mark.parametrize("impl", ["reference", "xla", "interpret"])
def test_flash_attention(impl):
    flash = resolve(impl).flash_attention
    q = jax.ShapeDtypeStruct((1, 128, 4, 32), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, 128, 2, 32), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(flash(q, k, v))

    assert "flash_attention" in scopes_in(lowered(loss, q, kv, kv))
    assert "flash_attention_backward" in scopes_in(lowered(jax.grad(loss), q, kv, kv))


def test_the_small_programs():
    ops = resolve("xla")
    pages = jax.eval_shape(
        lambda: KVPages((ops.allocate(8, 16, 2, 32, "float32"),), jnp.zeros((8, 16), jnp.int32))
    )
    pairs, slot = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4,), ()))
    row, table = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((9,), (3, 9)))
    assert "set_bias_row" in scopes_in(lowered(set_bias_row, table, slot, row))
    assert "copy_pages" in scopes_in(lowered(partial(copy_pages, ops), pages, pairs, pairs))
