"""The registry, the parameter tree, and what XLA makes of matmuls at the default model's shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import models
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.errors import ConfigError
from jaxinfer.models.layers import inverse_frequencies
from jaxinfer.params import axis_sizes, flatten
from jaxinfer.quant import schemes
from jaxinfer.weights import config_from_hf
from pallas_kernels.dispatch import Ops, resolve
from pallas_kernels.paged_attention import Ragged
from tests.models import tiny


def build(case: str, dtype: str = "float32") -> models.Model:
    return models.build(config_from_hf(tiny.CONFIGS[case], None), resolve("reference"), dtype)


def abstract_step(
    config: ModelConfig, ops: Ops, dtype: str, num_tokens: int, quantization: str | None = None
):
    """A lowered decode step of `num_tokens` rows (forward and logits), from shapes alone."""
    model = models.build(config, ops, dtype)
    if quantization is not None:
        formats = schemes.choose(quantization, model.rules, config, head=True)
        model = dataclasses.replace(model, formats=formats)

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def empty():
        lens = jnp.zeros(num_tokens, jnp.int32)
        table, starts = jnp.zeros((num_tokens, 4), jnp.int32), jnp.arange(num_tokens + 1)
        return Ragged(table, lens, starts, lens[0], lens, decode_only=True)

    ragged = jax.eval_shape(empty)
    pages = jax.eval_shape(lambda: model.allocate(8, 16))

    def step(params, pages, tokens, positions, ragged):
        hidden, pages = model.forward(params, pages, tokens, positions, ragged)
        return model.logits(params, hidden), pages

    jitted = jax.jit(step, donate_argnums=1)
    lowered = jitted.lower(model.shapes(), pages, ints(num_tokens), ints(num_tokens), ragged)
    return model, lowered


def smollm2(**changes) -> ModelConfig:
    """One layer at SmolLM2-135M's shapes."""
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=1,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position=2048,
        norm_eps=1e-5,
        activation="silu",
        tie_embeddings=True,
        query_scale=0.125,
        rope=RopeConfig(100000.0),
        windows=(None,),
    )
    return dataclasses.replace(config, **changes)


# Of 8 float32 tokens the head's product alone, turned round after, is larger than the weight.
@pytest.mark.parametrize(
    ("dtype", "num_tokens"), [("float32", 1), ("float32", 4), ("bfloat16", 1), ("bfloat16", 8)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_no_weight_is_copied_in_the_step(tied, dtype, num_tokens):
    """XLA:CPU may transpose or convert an operand: no temporary may be as large as a weight."""
    ops = dataclasses.replace(
        resolve("xla"),
        kv_write=lambda pages, k, v, slots: pages,
        paged_attention=lambda q, *args, **options: q,  # has temporaries of its own
    )
    model, lowered = abstract_step(smollm2(tie_embeddings=tied), ops, dtype, num_tokens)
    sizes = {
        path: leaf.size * leaf.dtype.itemsize for path, leaf in flatten(model.shapes()).items()
    }
    smallest = sizes["layers_0/attn/o"]  # k and v are smaller, but projected as q is
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < smallest


@pytest.mark.parametrize("num_tokens", [1, 8, 32])
@pytest.mark.parametrize("quantization", ["int8", "int8_weight_only", "int4"])
def test_no_quantised_weight_is_expanded_in_the_step(quantization, num_tokens):
    """All temporaries of a step together are smaller than the int8 head, which is computed last,
    and than a float32 MLP matrix, beside what the rows themselves take."""
    ops = dataclasses.replace(
        resolve("xla"),
        kv_write=lambda pages, k, v, slots: pages,
        paged_attention=lambda q, *args, **options: q,  # has temporaries of its own
    )
    config = smollm2()
    _, lowered = abstract_step(config, ops, "float32", num_tokens, quantization)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    rows = max(8, 3 * num_tokens)  # three int8 digits of each
    logits = rows * config.vocab_size * 4
    matrix = config.hidden_size * config.intermediate_size * 4
    assert memory.temp_size_in_bytes < matrix + 2 * logits


@pytest.mark.parametrize("case", tiny.CONFIGS)
def test_shapes_are_those_the_modules_declare(case):
    """The rules' axes and the modules' own declarations give one and the same tree."""
    model = build(case)
    ints = jnp.zeros(1, jnp.int32)
    ragged = Ragged(jnp.ones((1, 1), jnp.int32), ints + 1, jnp.arange(2), ints[0], ints)
    declared = jax.eval_shape(
        lambda key: model.module.init(key, ints, ints, model.allocate(2, 4), ragged),
        jax.random.key(0),
    )["params"]
    expected = flatten(model.shapes())
    head = expected.pop("lm_head", None)
    assert {p: (s.shape, s.dtype) for p, s in flatten(declared).items()} == {
        p: (s.shape, s.dtype) for p, s in expected.items()
    }
    assert (head is None) == model.config.tie_embeddings


@pytest.mark.parametrize("case", tiny.CONFIGS)
def test_axes_name_the_shapes(case):
    model = build(case)
    sizes, shapes = axis_sizes(model.config), flatten(model.shapes())
    assert flatten(model.axes()).keys() == shapes.keys()
    for path, axes in flatten(model.axes()).items():
        assert tuple(sizes[a] for a in axes) == shapes[path].shape


def test_random_params_fit_and_run():
    model = build("gpt2", "bfloat16")
    params = model.init_params(jax.random.key(3))
    other = flatten(model.init_params(jax.random.key(4)))
    shapes = flatten(model.shapes())
    assert flatten(params).keys() == shapes.keys()
    for path, leaf in flatten(params).items():
        assert (leaf.shape, leaf.dtype) == (shapes[path].shape, shapes[path].dtype), path
        if path.endswith("norm/scale"):
            assert bool((leaf == 1).all()), path
        elif not path.endswith("norm/bias"):
            assert not jnp.array_equal(leaf, other[path]), path
    assert 0.015 < float(params["embed"].astype(jnp.float32).std()) < 0.025
    tokens = tiny.make_tokens(model.config.vocab_size)
    logits = tiny.run(model, params, tokens, tiny.NUM_TOKENS, tiny.NUM_TOKENS)
    assert np.isfinite(logits).all()
    assert logits.std() > 0


def test_pages_are_counted_over_all_layers():
    model = build("llama")
    ops, config = model.ops, model.config
    assert len(model.allocate(3, 4)) == config.num_layers
    one = ops.page_bytes(4, config.num_kv_heads, config.head_dim, "float32")
    assert model.page_bytes(4) == config.num_layers * one


def test_unknown_architecture_lists_the_known():
    config = dataclasses.replace(smollm2(), architecture="MambaForCausalLM")
    with pytest.raises(ConfigError, match=r"MambaForCausalLM.*GPT2LMHeadModel.*LlamaForCausalLM"):
        models.build(config, resolve("reference"), "float32")


def test_unknown_dtype_lists_the_known():
    with pytest.raises(ConfigError, match=r"'int4'.*float32, bfloat16, float16"):
        models.build(smollm2(), resolve("reference"), "int4")


def test_gemma3_answers_to_both_names():
    first, second = (models.ARCHITECTURES[f"Gemma3{x}ForCausalLM"] for x in ("", "Text"))
    assert first == second


def test_llama3_frequencies_keep_short_and_divide_long_wavelengths():
    rope = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    plain = inverse_frequencies(RopeConfig(500000.0), 128).astype(np.float64)
    scaled = inverse_frequencies(rope, 128).astype(np.float64)
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert short.any() and long.any() and (~short & ~long).any()
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    ratio = (scaled / plain)[~short & ~long]
    assert (np.diff(ratio) < 0).all() and ratio.max() < 1 and ratio.min() > 1 / 8


def test_layers_are_named_for_the_profiler():
    _, lowered = abstract_step(smollm2(), resolve("xla"), "float32", 2)
    text = lowered.as_text(debug_info=True)
    attn = ("qkv", "rope", "kv_write", "attention", "out")
    scopes = ["embed", "rope_table", "norm", "logits", "layers/mlp", "layers/attn_norm"]
    for scope in scopes + [f"layers/attn/{part}" for part in attn]:
        assert f"{scope}/" in text, scope
