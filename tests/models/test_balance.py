"""Balanced weights: the same float model, whatever the architecture, and smaller errors with int8
activations where a channel is large."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import models
from jaxinfer.models.balance import MAX_FACTOR, READERS, Balancer, balance, factors
from jaxinfer.params import assemble, flatten, unflatten
from jaxinfer.quant import schemes
from jaxinfer.quant.arrays import QuantArray
from jaxinfer.quant.rounding import quantise
from jaxinfer.weights import config_from_hf
from pallas_kernels.dispatch import resolve
from tests.models import tiny


def build(case: str, dtype: str = "float32") -> models.Model:
    return models.build(config_from_hf(tiny.CONFIGS[case], None), resolve("reference"), dtype)


def load(model: models.Model, tensors: dict[str, np.ndarray], *, balanced: bool) -> dict:
    shapes = flatten(model.shapes())

    def put(array: np.ndarray, path: str):
        leaf = shapes[path]
        if isinstance(leaf, QuantArray):
            return jax.device_put(quantise(array, leaf, path))
        return jnp.asarray(array, leaf.dtype)

    balancer = Balancer(model, put)
    params = assemble(
        tiny.DictReader(tensors),
        model.rules,
        model.config,
        model.shapes(),
        balancer.put if balanced else put,
        ignored=model.ignored,
    )
    return balancer.params() if balanced else params


@pytest.mark.parametrize("case", tiny.CONFIGS)
def test_float_logits_change_by_rounding_alone(case: str):
    model, golden = build(case), tiny.load_golden(case)
    tensors = tiny.make_tensors(case, golden.shapes)
    plain, balanced = (load(model, tensors, balanced=b) for b in (False, True))
    assert jax.tree.structure(plain) == jax.tree.structure(balanced)
    changed = {
        path
        for path, leaf in flatten(plain).items()
        if not np.array_equal(leaf, flatten(balanced)[path])
    }
    norms = {f"layers_{i}/{norm}/scale" for i in range(model.config.num_layers) for norm in READERS}
    assert changed >= norms
    assert not any("/o" in path or "/down" in path or path == "embed" for path in changed)
    steps = tiny.NUM_TOKENS, tiny.NUM_TOKENS
    want = tiny.run(model, plain, golden.tokens, *steps)
    got = tiny.run(model, balanced, golden.tokens, *steps)
    assert tiny.relative_error(got, want) < 1e-5  # float32 rounding


@pytest.mark.parametrize("case", ["llama", "gemma3", "gpt2"])
def test_a_large_channel_costs_less_precision(case: str):
    """Two channels of every norm are 40 times as large as before, and their readers' columns
    smaller by as much: the float model is the same, W8A8 without balancing far worse."""
    golden = tiny.load_golden(case)
    plain = build(case)
    formats = schemes.choose("int8", plain.rules, plain.config)
    model = dataclasses.replace(plain, formats=formats)
    scale = np.ones(plain.config.hidden_size, np.float32)
    scale[[3, 17]] = 40
    leaves: dict[str, np.ndarray] = {}
    shapes = flatten(model.shapes())

    def put(array: np.ndarray, path: str) -> None:
        name = path.partition("/")[2]
        if name.startswith(("attn_norm", "mlp_norm")):
            array = array * scale
        if any(name in readers for readers in READERS.values()):
            array = array / scale
        leaves[path] = array

    tensors = tiny.make_tensors(case, golden.shapes)
    reader = tiny.DictReader(tensors)
    assemble(reader, model.rules, model.config, model.shapes(), put, ignored=model.ignored)

    def error(*, balanced: bool) -> float:
        def last(array: np.ndarray, path: str):
            leaf = shapes[path]
            return quantise(array, leaf, path) if isinstance(leaf, QuantArray) else array

        balancer = Balancer(model, last)
        for path, array in leaves.items():
            balancer.put(array, path)
        params = balancer.params()
        if not balanced:
            flat = {path: last(array, path) for path, array in leaves.items()}
            params = unflatten(flat)
        got = tiny.run(model, jax.device_put(params), golden.tokens, 16, 16)
        return float(np.sqrt(np.mean((got - golden.logits) ** 2) / np.mean(golden.logits**2)))

    assert error(balanced=True) < error(balanced=False) / 3


def test_factors_are_around_one():
    rms = np.array([1, 64, 1, 1, 0, 1, 1e30], np.float32)
    matrix = np.ones((7, 3), np.float32)
    matrix[3], matrix[5] = 4, 0
    got = factors(rms, [matrix.T, matrix[:, 0]])
    np.testing.assert_allclose(got, [1, 8, 1, 0.5, 1, 1, MAX_FACTOR], rtol=1e-6)
    assert factors(np.zeros(2, np.float32), [np.ones((2, 2), np.float32)]).tolist() == [1, 1]


def test_a_norm_s_bias_follows_its_scale():
    ones = np.ones(4, np.float32)
    layer = {f"a/{norm}/{part}": ones for norm in READERS for part in ("scale", "bias")}
    layer |= {f"a/{name}": np.ones((2, 4), np.float32) for r in READERS.values() for name in r}
    rms = np.array([1, 1, 16, 1], np.float32)
    got = balance(layer, "a/", {"attn_norm": rms, "mlp_norm": ones})
    for part in ("scale", "bias"):
        np.testing.assert_allclose(got[f"a/attn_norm/{part}"], [1, 1, 0.25, 1], rtol=1e-6)
        np.testing.assert_allclose(got[f"a/mlp_norm/{part}"], [1, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(got["a/attn/q"][0], [1, 1, 4, 1], rtol=1e-6)


def test_a_leaf_that_never_came_is_our_fault():
    balancer = Balancer(build("llama"), lambda array, path: array)
    with pytest.raises(AssertionError, match=r"never put: .*'layers_0/attn/k'"):
        balancer.params()
