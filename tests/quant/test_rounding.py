"""Rounding weights on the host: error bounds, channels of zeros, outliers, what is refused."""

import math
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.errors import ModelFormatError
from jaxinfer.quant import rounding
from jaxinfer.quant.arrays import QuantArray
from jaxinfer.quant.rounding import quantise
from pallas_kernels.common import quantise as quantise_rows
from pallas_kernels.quant_matmul import Format, dequantise, unpack_int4
from tests.kernels.quant_cases import FORMATS

K, N = 192, 40


def leaf(name: str, shape=(K, N), contracted=(0,)) -> QuantArray:
    return QuantArray.of_shape(shape, contracted, FORMATS[name])


def weights(dtype: str = "float32") -> np.ndarray:
    """[K, N] with an output of zeros, one of one sign, one with an outlier, one huge, one tiny."""
    w = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    w[:, 1] = 0.0
    w[:, 2] = np.abs(w[:, 2])
    w[7, 3] = -1000.0
    w[:, 4] *= 1e30
    w[:, 5] *= 1e-30
    w[:, 6] = -3.0
    return w.astype(jnp.dtype(dtype))


def restored(w: QuantArray) -> np.ndarray:
    """The float weight [N, K] that a QuantArray stands for, float64."""
    zeros = None if w.zeros is None else jnp.asarray(w.zeros)
    float32 = dequantise(jnp.asarray(w.data), jnp.asarray(w.scales), zeros, w.format)
    return np.asarray(float32, np.float64)


def allowed(w: QuantArray, exact: np.ndarray) -> np.ndarray:
    """Half a step of each value, and what float32 rounds of 255 steps, twice; with zero points the
    zero is rounded too, another half; e4m3 keeps 4 bits of a normal number."""
    n, k = exact.shape
    scale = np.asarray(w.scales, np.float64).reshape(n, -1, 1)
    scale = np.broadcast_to(scale, (n, scale.shape[1], k // scale.shape[1])).reshape(n, k)
    if w.format.dtype == "float8_e4m3fn":
        return np.maximum(np.abs(exact) * 2.0**-4, scale * 2.0**-10) * (1 + 1e-6)
    return scale * ((1.0 if w.format.zero_points else 0.5) + 2 * 255 * 2.0**-24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FORMATS)
def test_no_value_is_off_by_more_than_half_a_step(name: str, dtype: str):
    w = weights(dtype) if dtype != "float16" else weights()[:, :4].astype(np.float16)
    got = quantise(w, leaf(name, w.shape), "w")
    exact = w.astype(np.float64).T
    error = np.abs(restored(got) - exact)
    assert (error <= allowed(got, exact)).all(), error / np.maximum(allowed(got, exact), 1e-300)
    assert not restored(got)[1].any() and not got.scales[1].any()
    for array, want in zip(jax.tree.leaves(got), jax.tree.leaves(leaf(name, w.shape)), strict=True):
        assert (array.shape, array.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_each_scale_spans_its_values(name: str):
    """The whole range is used, and no more: half the scale could not hold the largest value."""
    got = quantise(weights(), leaf(name), "w")
    values = got.data
    if got.format.dtype == "int4":
        values = unpack_int4(got.data, got.format.group_size or K)
    size = got.format.group_size or K
    largest = np.abs(values.astype(np.float32)).reshape(N, -1, size).max(axis=2)
    full = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}[got.format.dtype]
    live = got.scales.reshape(N, -1) > 0
    if got.format.zero_points:
        shown = values.astype(np.int32).reshape(N, -1, size)
        levels = 2 * full + 1
        spread = np.maximum(shown.max(axis=2), got.zeros) - np.minimum(shown.min(axis=2), got.zeros)
        assert (spread[live] >= levels - 1).all()
    else:
        assert (largest[live] >= full).all()


def test_an_int8_channel_is_rounded_as_a_row_of_activations_is():
    """One rule for weights and activations, but for the division that a compiler may replace."""
    w = np.random.default_rng(1).standard_normal((K, N)).astype(np.float32)
    for name in ("int8", "fp8"):
        data, scales = quantise_rows(jnp.asarray(w.T), FORMATS[name].dtype)
        got = quantise(w, leaf(name), "w")
        np.testing.assert_allclose(got.scales, scales, rtol=2**-22)
        differ = got.data.astype(np.float32) != np.asarray(data.astype(jnp.float32))
        assert differ.mean() < 1e-3


def test_outliers_cost_their_own_output_or_group_alone():
    w = np.random.default_rng(2).standard_normal((K, N)).astype(np.float32)
    clean = {name: quantise(w, leaf(name), "w") for name in ("int8", "int4_32")}
    w[40, 3] = 1e4
    for name, before in clean.items():
        after = quantise(w, leaf(name), "w")
        same = restored(after) == restored(before)
        size = after.format.group_size or K
        changed = np.argwhere(~same.reshape(N, -1, size).all(axis=2))
        assert changed.tolist() == [[3, 40 // size]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["w8a8", "int4_zeros_32", "fp8"])
def test_what_is_not_finite_is_refused_by_name(name: str, dtype: str, bad: float):
    w = weights(dtype)
    w[100, 30] = bad
    with pytest.raises(ModelFormatError, match=r"layers_3/mlp/up holds NaN, infinity") as caught:
        quantise(w, leaf(name), "layers_3/mlp/up")
    assert caught.value.field == "layers_3/mlp/up"


def test_a_double_beyond_float32_is_refused():
    w = weights().astype(np.float64)
    w[0, 0] = 1e39
    with pytest.raises(ModelFormatError, match="beyond float32"):
        quantise(w, leaf("int8"), "w")


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"w has shape \(40, 192\); expected \(192, 40\)"):
        quantise(weights().T, leaf("int8"), "w")


def test_nothing_overflows_e4m3_or_wraps_int4():
    """Near the largest float32 in both signs, where a quotient may round up to beyond the range; an
    int4 -8 stands for 7 % more than the largest value."""
    rng = np.random.default_rng(3)
    w = rng.uniform(0.5, 1, (K, 4000)).astype(np.float32) * rng.choice([-1.0, 1.0], (K, 4000))
    w = (w * np.float32(3e38)).astype(np.float32)
    for name in FORMATS:
        got = quantise(w, leaf(name, w.shape), "w")
        exact = w.astype(np.float64).T
        values = restored(got)
        assert np.isfinite(values).all()
        assert (np.sign(values) * np.sign(exact) >= 0).all()
        assert (np.abs(values - exact) <= allowed(got, exact)).all()


@pytest.mark.parametrize("block", [1, 500, 2**17])
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_and_views_change_nothing(monkeypatch, name: str, block: int):
    """Any block, a strided view, and several axes on either side: the same matrix."""
    w = weights()
    want = quantise(w, leaf(name), "w")
    monkeypatch.setattr(rounding, "_BLOCK", block)
    for array, contracted in (
        (np.asfortranarray(w), (0,)),
        (w.T, (1,)),
        (w.reshape(2, K // 2, 5, 8), (0, 1)),
        (w.T.reshape(5, 8, K).transpose(2, 0, 1), (0,)),
    ):
        got = quantise(array, leaf(name, array.shape, contracted), "w")
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_there_is_never_a_second_float_copy():
    w = np.asfortranarray(np.ones((2048, 2048), ml_dtypes.bfloat16))
    tracemalloc.start()
    try:
        got = quantise(w, leaf("int8", w.shape), "w")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Beside the result: a few blocks of float32.
    assert peak - got.num_bytes < 8 * 4 * rounding._BLOCK < math.prod(w.shape) * 2


def test_formats_say_what_they_take():
    assert leaf("w8a8").num_bytes == N * K + 4 * N
    assert leaf("int4_32").num_bytes == N * K // 2 + 4 * N * K // 32
    assert leaf("int4_zeros_32").num_bytes == N * K // 2 + 5 * N * K // 32
    assert leaf("fp8").num_bytes == N * K + 4 * N
    with pytest.raises(ValueError, match="group_size is 32; it must divide K, 40"):
        QuantArray.of_shape((40, 3), (0,), Format("int4", group_size=32))
