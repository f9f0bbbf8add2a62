"""Quantised matmuls to compute, and their definitions in NumPy: integers, or float64."""

from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.quant_matmul import Format, pack_int4

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

W8A8 = Format("int8", activations="int8")
FP8 = Format("float8_e4m3fn", activations="float8_e4m3fn")
W8A16 = Format("int8", activations="int16")
FORMATS = {
    "w8a8": W8A8,
    "w8a16": W8A16,
    "int8": Format("int8"),
    "int8_groups": Format("int8", group_size=32),
    "int8_zeros": Format("int8", group_size=32, zero_points=True),
    "int4": Format("int4"),
    "int4_32": Format("int4", group_size=32),
    "int4_zeros_32": Format("int4", group_size=32, zero_points=True),
    "int4_96": Format("int4", group_size=96),
    "fp8": FP8,
    "fp8_weights": Format("float8_e4m3fn"),
    "fp8_groups": Format("float8_e4m3fn", group_size=32),
}


@dataclass(frozen=True)
class Weight:
    """A quantised weight: what the op takes, and `values` (without zeros and scales) [N, K]."""

    format: Format
    values: np.ndarray
    data: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    def float64(self) -> np.ndarray:
        """The weight that it stands for, [N, K]."""
        n, k = self.values.shape
        values = self.values.astype(np.float64).reshape(n, -1, self.format.group_size or k)
        if self.zeros is not None:
            values = values - self.zeros.astype(np.float64)[..., None]
        return (values * self.scales.astype(np.float64).reshape(n, -1, 1)).reshape(n, k)


def make(format: Format, n: int, k: int, seed: int = 0) -> Weight:
    """Every value of the format; some outputs, and some groups, have the scale 0."""
    rng = np.random.default_rng(seed)
    shapes = format.shapes(n, k)
    if format.dtype == "float8_e4m3fn":
        values = rng.standard_normal((n, k)).astype(np.float32) * 20
        values[rng.random((n, k)) < 0.1] *= 2.0**-12  # subnormal
        values = np.clip(values, -448, 448).astype(E4M3)
        values[0, :4] = np.array([448, -448, 2.0**-9, -0.0]).astype(E4M3)
        data = values
    else:
        low, high = (-8, 8) if format.dtype == "int4" else (-128, 128)
        values = rng.integers(low, high, (n, k)).astype(np.int8)
        data = values
        if format.dtype == "int4":
            data = pack_int4(values, format.group_size or k)
    want = shapes["scales"]
    assert want is not None and shapes["data"] is not None
    assert (data.shape, data.dtype) == (shapes["data"].shape, shapes["data"].dtype)
    scales = rng.uniform(0.001, 0.01, want.shape).astype(np.float32)
    scales[rng.random(want.shape) < 0.05] = 0.0
    zeros = None
    if format.zero_points:
        zeros = rng.integers(-8, 8, want.shape).astype(np.int8)
    return Weight(format, values, data, scales, zeros)


def rows(t: int, k: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """N(0, 1) with an outlier in every third row, one row of zeros, one of tiny numbers."""
    x = np.random.default_rng(seed).standard_normal((t, k)).astype(np.float32)
    x[::3, seed % k] = 60.0
    if t > 4:
        x[4] = 0.0
        x[3] *= 1e-20
    return x.astype(jnp.dtype(dtype))


def quantised_rows(x: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
    """x as integers or e4m3 values, and float32 scales [T], by the contract's own words."""
    x = x.astype(np.float32)
    largest = np.float32({"int8": 127, "int16": 32639, "float8_e4m3fn": 448}[format.activations])
    scale = np.abs(x).max(axis=1) * (np.float32(1) / largest)
    y = x * (np.float32(1) / np.where(scale == 0, np.float32(1), scale))[:, None]
    if format.activations != "float8_e4m3fn":
        return np.clip(np.rint(y), -largest, largest).astype(np.int64), scale
    return np.clip(y, -448, 448).astype(E4M3), scale


def integer_definition(x: np.ndarray, weight: Weight) -> np.ndarray:
    """W8A8 and W8A16 exactly: integers summed as integers, int16 by digit, then two float32
    multiplications."""
    q, scale = quantised_rows(x, weight.format)
    w = weight.values.astype(np.int64).T
    if weight.format.activations == "int16":
        high = (q + 128) // 256
        low = q - 256 * high
        assert max(np.abs(high).max(), np.abs(low + 0.5).max()) <= 127.5
        sums = np.float32(256) * (high @ w).astype(np.float32) + (low @ w).astype(np.float32)
    else:
        sums = (q @ w).astype(np.float32)
    return sums * scale[:, None] * weight.scales[None, :]


def float64_definition(x: np.ndarray, weight: Weight) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64 on the same quantised values, and how far float32 sums may be off.

    Products and scales each round by 2**-24 of their value, a sum of K terms in any order by K / 2
    times 2**-24 of the sum of magnitudes at most, and by about its square root in fact; an element
    written in 24 bits is off by 2**-23 of its row's largest. Four times the square root is allowed.
    """
    if weight.format.activations == "float":
        values = x.astype(np.float64)
    else:
        q, scale = quantised_rows(x, weight.format)
        values = q.astype(np.float64) * scale.astype(np.float64)[:, None]
    w = weight.float64()
    largest = np.abs(values).max(axis=1, keepdims=True)
    magnitude = np.abs(values) @ np.abs(w).T + largest * np.linalg.norm(w, axis=1)[None, :]
    return values @ w.T, 2.0**-24 * 4 * x.shape[1] ** 0.5 * magnitude
