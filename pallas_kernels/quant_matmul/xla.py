"""The quantised matmul as XLA does it best: fused on accelerators, in integers or tiles on a CPU.

On accelerators the conversion of a weight is written beside its matmul, for XLA to fuse. XLA:CPU
does not: it would write the whole float weight to memory in every step, and take 8 to 12 times as
long as with a float weight (up to 8 rows, K 576, N 1536). What it has is a fast dot of int8 into
int32 and a fast float dot, so there

- int8 with int8 activations is that dot, a single row padded to two; with int16 activations it is
  that dot over twice the rows, a digit each;
- int8 with few float rows splits each row into three int8 digits, 24 bits in all, and is that dot
  over three times the rows: the weight is read once, as int8;
- everything else takes the weight a tile of outputs at a time, which turns to float and is
  multiplied while it is in the cache.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import Target, quantise
from pallas_kernels.quant_matmul import Format, base_256, dequantise, digits, int4_halves, validate

# XLA:CPU multiplies one int8 row by a naive loop, which takes 14 to 47 times as long as two rows.
# Eight take longer than two: 3.4 against 1.8 ms at 2048 x 8192.
MIN_INT8_ROWS = 2
# Rows up to which three int8 dots beat tiles: 0.21 against 0.28 ms at 8, 0.35 against 0.39 at 16,
# 0.48 against 0.42 at 24 (K 576, N 1536); at 2048 x 8192 they are equal at 16.
MAX_SPLIT_ROWS = 16
# Weights of a tile. Its float32 form takes four times the bytes: half of a core's L2 cache.
TILE_SIZE = 2**17

# A row is written in balanced base 256: |high| <= 127, the other two digits in [-128, 127].
DIGITS = 3
_LARGEST = 127 * (256**2 + 256 + 1)


def unsupported(format: Format, n: int, k: int, dtype: Any, target: Target) -> str | None:
    """None: XLA can do all that the contract allows."""
    return None


@jax.named_scope("quant_xla")
def quant_matmul(
    x: jax.Array,  # [T, K]
    data: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    format: Format,
    target: Target,
) -> jax.Array:  # float32 [T, N]
    """See `pallas_kernels.quant_matmul` for the contract."""
    validate(x, data, scales, zeros, format)
    is_cpu = target.platform == "cpu"
    if format.activations == "int16":
        rows, row_scales = digits(x)
        sums = _int8_dot(rows.reshape(-1, x.shape[1]), data).astype(jnp.float32)
        high, low = sums[: len(x)], sums[len(x) :]
        return (high * 256.0 + low) * row_scales[:, None] * scales[None, :]
    if format.activations != "float":
        rows, row_scales = quantise(x, format.activations)
        if format.activations == "int8":
            sums = _int8_dot(rows, data).astype(jnp.float32)
        elif is_cpu:
            sums = _tiled(rows.astype(jnp.float32), data, None, None, format)
        else:
            sums = _dot(rows, data, jnp.float32)
        return sums * row_scales[:, None] * scales[None, :]
    if not is_cpu:
        return _fused(x, data, scales, zeros, format)
    if format.dtype == "int8" and format.group_size is None and len(x) <= MAX_SPLIT_ROWS:
        return _split(x, data) * scales[None, :]
    x = x.astype(jnp.float32)
    if format.group_size is None:
        return _tiled(x, data, None, None, format) * scales[None, :]
    return _tiled(x, data, scales, zeros, format)


def _dot(x: jax.Array, w: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    """x [T, K] and w [N, K] -> [T, N], accumulated in `dtype`."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.dtype(dtype))


def _int8_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """int8 [T, K] and [N, K] -> int32 [T, N]."""
    missing = max(0, MIN_INT8_ROWS - len(x))
    return _dot(jnp.pad(x, ((0, missing), (0, 0))), w, jnp.int32)[: len(x)]


def _split(x: jax.Array, data: jax.Array) -> jax.Array:
    """Float rows times int8 [N, K], as integers: each element is off by 2**-23 of its row's largest
    at most, half of what a float32 sum of the row rounds away."""
    x = x.astype(jnp.float32)
    is_finite = jnp.all(jnp.isfinite(x), axis=1, keepdims=True)
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    # Not the scale itself: it would be zero, or lose its bits, for rows of subnormal numbers.
    unit = x / jnp.where(largest > 0, largest, 1.0)
    rest = jnp.where(is_finite, jnp.round(unit * _LARGEST), 0.0).astype(jnp.int32)
    rows = base_256(rest, DIGITS).reshape(-1, x.shape[1])
    sums = _int8_dot(rows, data).astype(jnp.float32).reshape(DIGITS, len(x), -1)
    total = (sums[0] * 256.0 + sums[1]) * 256.0 + sums[2]
    return total * jnp.where(is_finite, largest / _LARGEST, jnp.nan)


def _tiled(
    x: jax.Array,  # float32 [T, K]
    data: jax.Array,
    scales: jax.Array | None,
    zeros: jax.Array | None,
    format: Format,
) -> jax.Array:
    """x times the weight's values, scaled if `scales` of groups are given; a loop over tiles of N.

    The last tile begins earlier where N does not divide: some outputs are computed twice, alike.
    There are two tiles at least: XLA:CPU of jax 0.10.2 inlines a loop of one, fuses its dots with
    what is done to the result, and where that is a sum over outputs gets both wrong.
    """
    if format.dtype == "float8_e4m3fn":
        # As bits, a copy of a byte per weight: of float8 itself XLA:CPU would make a whole float16
        # weight before a slice is taken.
        data = lax.bitcast_convert_type(data, jnp.uint8)
    num_out = len(data)
    tile = min(-(-num_out // 2), max(16, TILE_SIZE // x.shape[1] // 16 * 16))
    xs = _halves(x, format)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * tile, num_out - tile)

        def rows(a: jax.Array | None) -> jax.Array | None:
            return None if a is None else lax.dynamic_slice_in_dim(a, start, tile)

        ws = _values(lax.dynamic_slice_in_dim(data, start, tile), rows(scales), rows(zeros), format)
        parts = [_dot(a, b, jnp.float32) for a, b in zip(xs, ws, strict=True)]
        return lax.dynamic_update_slice_in_dim(out, sum(parts[1:], parts[0]), start, axis=1)

    out = jnp.zeros((len(x), num_out), jnp.float32)
    return lax.fori_loop(0, -(-num_out // tile), body, out)


def _halves(x: jax.Array, format: Format) -> list[jax.Array]:
    """x, or for int4 its two parts [T, K / 2] in the order of the low and the high values."""
    if format.dtype != "int4":
        return [x]
    num_rows, k = x.shape
    parts = x.reshape(num_rows, -1, 2, (format.group_size or k) // 2)
    return [parts[:, :, half].reshape(num_rows, -1) for half in (0, 1)]


def _values(
    data: jax.Array, scales: jax.Array | None, zeros: jax.Array | None, format: Format
) -> list[jax.Array]:
    """A tile as float32, in parts that fit those of `_halves`."""
    if format.dtype == "float8_e4m3fn":
        values = [_e4m3_to_float32(data)]
    else:
        parts = int4_halves(data) if format.dtype == "int4" else (data,)
        values = [part.astype(jnp.float32) for part in parts]
    if scales is None:
        return values

    def scaled(part: jax.Array) -> jax.Array:
        grouped = part.reshape(*scales.shape, -1)
        if zeros is not None:
            grouped = grouped - zeros.astype(jnp.float32)[..., None]
        return (grouped * scales[..., None]).reshape(part.shape)

    return [scaled(part) for part in values]


def _e4m3_to_float32(bits: jax.Array) -> jax.Array:
    """The bits (uint8) of finite float8_e4m3fn numbers, as float32: they are those of a float16,
    2**-8 times the value.

    1.2 to 1.4 times as fast as XLA:CPU's own conversion; subnormals are exact, because the
    hardware's conversion from float16 keeps them.
    """
    bits = bits.astype(jnp.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256.0


def _fused(
    x: jax.Array, data: jax.Array, scales: jax.Array, zeros: jax.Array | None, format: Format
) -> jax.Array:
    """The weight in x's dtype, converted where an accelerator's XLA can fuse it with the matmul.

    Values of int8, int4 and fp8 are exact in every x's dtype; scales of groups are applied before
    the sum, so that a weight is rounded to x's dtype with them.
    """
    if format.group_size is not None:
        return _dot(x, dequantise(data, scales, zeros, format).astype(x.dtype), jnp.float32)
    parts = int4_halves(data) if format.dtype == "int4" else (data,)
    xs = _halves(x, format)
    sums = [_dot(a, b.astype(x.dtype), jnp.float32) for a, b in zip(xs, parts, strict=True)]
    return sum(sums[1:], sums[0]) * scales[None, :]
