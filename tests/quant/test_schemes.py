"""Which weights a scheme quantises, the group size's rule, and what is said about it."""

import dataclasses
from typing import get_args

import jax
import numpy as np
import pytest

from jaxinfer import models
from jaxinfer.config import QuantizationName
from jaxinfer.errors import ConfigError
from jaxinfer.params import assemble, flatten, unflatten
from jaxinfer.quant import schemes
from jaxinfer.quant.arrays import QuantArray
from jaxinfer.quant.config import METHODS
from jaxinfer.quant.rounding import quantise
from jaxinfer.quant.schemes import SCHEMES
from jaxinfer.weights import config_from_hf
from pallas_kernels.dispatch import resolve
from tests.helpers import TINY_CONFIG
from tests.models import tiny
from tests.quant.test_arrays import restored

GROUPED = ("int4", "int4_asymmetric")
MATRICES = {"q", "k", "v", "o", "gate", "up", "down"}


def build(case: str | dict = "llama", impl: str = "reference") -> models.Model:
    config = tiny.CONFIGS[case] if isinstance(case, str) else case
    return models.build(config_from_hf(config, None), resolve(impl), "float32")


def quantised(model: models.Model, name: str, *, head: bool) -> models.Model:
    group = 8 if name in GROUPED else None
    formats = schemes.choose(name, model.rules, model.config, group_size=group, head=head)
    return dataclasses.replace(model, formats=formats)


def test_the_configuration_names_every_scheme_and_checkpoint_format():
    assert set(get_args(QuantizationName)) == {*SCHEMES, *METHODS, "gguf"}


@pytest.mark.parametrize("case", tiny.CONFIGS)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_matrix_is_quantised_and_nothing_else(name: str, head: bool, case: str):
    model = quantised(build(case), name, head=head)
    leaves = flatten(model.shapes())
    found = {path for path, leaf in leaves.items() if isinstance(leaf, QuantArray)}
    layers = {path for path in leaves if path.rsplit("/")[-1] in MATRICES}
    tied = model.config.tie_embeddings
    assert found == layers | ({"embed" if tied else "lm_head"} if head else set())
    assert len(layers) == model.config.num_layers * (6 if case == "gpt2" else 7)
    plain = flatten(build(case).shapes())
    assert {p: leaf.shape for p, leaf in leaves.items()} == {p: s.shape for p, s in plain.items()}
    assert isinstance(hash(model), int)  # it may be a static argument


@pytest.mark.parametrize("case", ["smollm2", "gpt2"])
@pytest.mark.parametrize("name", SCHEMES)
def test_random_params_have_the_promised_shapes(name: str, case: str):
    model = quantised(build(case), name, head=True)
    params, shapes = model.init_params(jax.random.key(0)), model.shapes()
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


# How far logits may be from those of a float model of the de-quantised weights, relative to their
# largest. Float activations: float32 sums. Quantised ones: int8 is off by 0.4 % of a row's largest,
# e4m3 by 6 % of each number, and random weights of gain 1.5 carry that through their layers.
LOGITS = {"int8": 0.1, "fp8": 0.3}
CASES = [(name, case) for case in tiny.CONFIGS for name in ("int8", "int4_asymmetric")]
CASES += [(name, "llama") for name in ("int8_weight_only", "int4", "fp8")]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_are_those_of_the_dequantised_weights(name: str, case: str):
    """Every architecture, from a checkpoint, through prefill in chunks."""
    golden = tiny.load_golden(case)
    tensors = tiny.make_tensors(case, golden.shapes)
    plain = build(case, "xla")
    model = quantised(plain, name, head=True)
    shapes = flatten(model.shapes())

    def put(array: np.ndarray, path: str):
        leaf = shapes[path]
        if isinstance(leaf, QuantArray):
            return jax.device_put(quantise(array, leaf, path))
        return jax.numpy.asarray(array)

    params = assemble(
        tiny.DictReader(tensors),
        model.rules,
        model.config,
        model.shapes(),
        put,
        ignored=model.ignored,
    )
    floats = {
        path: restored(leaf) if isinstance(leaf, QuantArray) else leaf
        for path, leaf in flatten(params).items()
    }
    want = tiny.run(plain, unflatten(floats), golden.tokens, 16, 16)
    got = tiny.run(model, params, golden.tokens, 16, 16)
    error = tiny.relative_error(got, want)
    if name in LOGITS:
        assert 1e-4 < error < LOGITS[name]
    else:
        assert error < 1e-4
    assert tiny.relative_error(want, golden.logits) > 1e-3  # the weights were rounded


@pytest.mark.parametrize(
    ("hidden", "mlp", "want"),
    [(256, 1024, 128), (576, 1536, 64), (96, 256, 32), (384, 1024, 128), (2048, 8192 + 32, 32)],
)
@pytest.mark.parametrize("name", GROUPED)
def test_the_largest_group_that_divides_everything(name, hidden, mlp, want):
    """Of 128, 64, 32; 64 for SmolLM2-135M (576 and 1536)."""
    shapes = {"hidden_size": hidden, "intermediate_size": mlp, "head_dim": 64}
    shapes |= {"num_attention_heads": hidden // 32 // 2 or 1, "num_key_value_heads": 1}
    config = TINY_CONFIG | shapes | {"num_attention_heads": 2 * (hidden // 64) or 1}
    model = build(config)
    formats = schemes.choose(name, model.rules, model.config)
    assert {format.group_size for _, format in formats} == {want}
    text = schemes.describe(name, formats, model.rules, model.config, "float32")
    assert f"int4 in groups of {want}" in text


def test_a_group_that_does_not_divide_is_refused_with_those_that_do():
    model = build(TINY_CONFIG)  # 48 and 96 inputs
    with pytest.raises(ConfigError, match=r"none of the group sizes 128, 64, 32.*48, 96.*12, 16"):
        schemes.choose("int4", model.rules, model.config)
    with pytest.raises(ConfigError, match=r"divides the inputs .*got 32.* 6, 8, 12, 16, 24, 48"):
        schemes.choose("int4", model.rules, model.config, group_size=32)
    with pytest.raises(ConfigError, match="got 3"):
        schemes.choose("int4", model.rules, model.config, group_size=3)
    formats = dict(schemes.choose("int4", model.rules, model.config, group_size=16))
    assert formats["layers_0/attn/q"].group_size == 16


def test_what_has_no_meaning_is_refused():
    model = build()
    with pytest.raises(ConfigError, match="group_size=16 has no meaning with quantization='fp8'"):
        schemes.choose("fp8", model.rules, model.config, group_size=16)
    with pytest.raises(ConfigError, match=r"one of int8, int8_weight_only.*or None; got 'int3'"):
        schemes.choose("int3", model.rules, model.config)


def test_the_summary_says_what_stays_float():
    model = build()  # not tied
    formats = schemes.choose("int8", model.rules, model.config)
    text = schemes.describe("int8", formats, model.rules, model.config, "bfloat16")
    assert "int8 x int8: layers_{l}/attn/q, layers_{l}/attn/k" in text
    assert "bfloat16: embed, lm_head, layers_{l}/attn/q_bias" in text
    assert "float32: layers_{l}/attn_norm/scale" in text
    assert "lm_head stays float; quantize_lm_head=True quantises it" in text
    formats = schemes.choose("int4", model.rules, model.config, group_size=8, head=True)
    text = schemes.describe("int4", formats, model.rules, model.config, "bfloat16")
    assert "int8: lm_head" in text and "stays float" not in text
    tied = build("smollm2")
    formats = schemes.choose("int8", tied.rules, tied.config)
    text = schemes.describe("int8", formats, tied.rules, tied.config, "float32")
    assert "embed, which is the head too, stays float; quantize_lm_head=True" in text
