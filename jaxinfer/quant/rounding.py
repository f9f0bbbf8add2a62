"""From a float weight on the host to a QuantArray of NumPy arrays, by rounding to the nearest.

The rows of the matrix go through in blocks that stay in a core's cache: beside the float weight
itself, of which `quantise` takes a view, there is never a second float copy of it.
"""

import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import ModelFormatError
from jaxinfer.quant.arrays import QuantArray
from pallas_kernels.common import QUANTISED
from pallas_kernels.quant_matmul import Format, pack_int4

_BLOCK = 2**17
"""Elements that are float32 at a time."""
_INTEGERS = {"int8": (-128, 127), "int4": (-8, 7)}
_TINY = np.finfo(np.float32).tiny


def quantise(array: np.ndarray, leaf: QuantArray, name: str) -> QuantArray:
    """`array`, float of leaf.shape, perhaps a strided view, as NumPy arrays of `leaf`'s shapes.

    Each scale spans the largest magnitude of its output, or group: that / 127 for int8, / 448 for
    fp8, / 7.5 for int4; with zero points, the range from the smallest to the largest value, 0
    included, / 15 (int8: / 255). Values are the nearest, half to even, clipped. All zeros, and
    numbers too small for a normal scale, have the scale 0.

    Raises ModelFormatError, with `name`, for NaN, infinity, and what overflows float32.
    """
    if array.shape != leaf.shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {leaf.shape}")
    matrix = array.transpose(*leaf.kept, *leaf.contracted).reshape(*_matrix_shape(leaf))
    format = leaf.format
    data = np.empty(leaf.data.shape, leaf.data.dtype)
    scales = np.empty(leaf.scales.shape, np.float32)
    zeros = np.empty(leaf.zeros.shape, np.int8) if format.zero_points else None
    num_rows, num_columns = matrix.shape
    group = format.group_size or num_columns
    step = max(1, _BLOCK // num_columns)
    for start in range(0, num_rows, step):
        block = slice(start, start + step)
        with np.errstate(over="ignore"):  # reported below, as an error
            rows = matrix[block].astype(np.float32)
        if not np.isfinite(rows).all():
            raise ModelFormatError(
                f"{name} holds NaN, infinity, or a number beyond float32; it cannot be quantised",
                field=name,
            )
        values, scale, zero = _round(rows.reshape(len(rows), -1, group), format)
        values = values.reshape(rows.shape)
        data[block] = pack_int4(values, group) if format.dtype == "int4" else values
        scales[block] = scale if format.group_size else scale[:, 0]
        if zeros is not None and zero is not None:
            zeros[block] = zero
    return QuantArray(data, scales, zeros, format, leaf.shape, leaf.contracted)


def _matrix_shape(leaf: QuantArray) -> tuple[int, int]:
    k = int(np.prod([leaf.shape[axis] for axis in leaf.contracted]))
    return int(np.prod(leaf.shape)) // k, k


def _round(x: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """x float32 [n, groups, size] -> values alike, scales and zeros [n, groups]."""
    if format.zero_points:
        low, high = _INTEGERS[format.dtype]
        levels = np.float32(high - low)
        least, most = np.minimum(x.min(axis=2), 0), np.maximum(x.max(axis=2), 0)
        scale = _normal(most / levels - least / levels)
        divisor = np.where(scale == 0, np.float32(1), scale)
        zero = np.clip(np.rint(low - least / divisor), low, high)
        values = np.rint(x / divisor[..., None]) + zero[..., None]
        return np.clip(values, low, high).astype(np.int8), scale, zero.astype(np.int8)
    largest = np.maximum(x.max(axis=2), -x.min(axis=2))
    scale = _normal(largest / np.float32(QUANTISED.get(format.dtype, 7.5)))
    values = x / np.where(scale == 0, np.float32(1), scale)[..., None]
    if format.dtype == "float8_e4m3fn":
        # The cast gives NaN, not the largest number, for what is beyond it.
        return np.clip(values, -448, 448).astype(jnp.float8_e4m3fn), scale, None
    low, high = (-127, 127) if format.dtype == "int8" else _INTEGERS[format.dtype]
    return np.clip(np.rint(values), low, high).astype(np.int8), scale, None


def _normal(scale: np.ndarray) -> np.ndarray:
    """Scales with 0 for subnormal ones, which a device may take for 0 in one place only."""
    return np.where(scale < _TINY, np.float32(0), scale)
