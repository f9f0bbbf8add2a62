"""Matmul of float rows with a quantised weight. Owns how quantised weights are stored.

    quant_matmul(x [T, K], data, scales, zeros, *, format) -> float32 [T, N]

The weight is the matrix w [N, K], outputs first, as checkpoints have it: on a CPU XLA's int8 dot is
up to a third faster so than with [K, N], and 8-bit tensor cores of a Hopper take nothing else. Its
`Format` is static; its arrays:

    data    int8 or float8_e4m3fn [N, K]; int4: uint8 [N, K / 2], two values q + 8 in a byte
    scales  float32 [N], one for each output; with groups [N, K / group_size]
    zeros   int8 [N, K / group_size] where the format has zero points, else None

w = (q - zero) * scale. The contract:

- activations "float": x is used as it is; result = sum over k of x * w, accumulated in float32.
- activations "int8": each row of x is quantised by `common.quantise` (symmetric, x_scale = max|x| *
  (1 / 127), q = x * (1 / x_scale) in float32, half to even), the products are summed in int32,
  exactly, and the result is (float32(sum) * x_scale) * w_scale, in this order.
- activations "int16": as int8, with 32639 for 127. q is two int8 digits, q = 256 * high + low with
  |high| <= 127, and the products of each are summed in int32, exactly: the result is
  ((256 * float32(sum of high) + float32(sum of low)) * x_scale) * w_scale. One int8 product over
  twice the rows, those of `digits`, gives both sums.
- activations "float8_e4m3fn": as int8, with 448 for 127, and a sum in float32.
- A row of zeros and a scale of 0 give 0. A row with a NaN or an infinity gives no finite number,
  and changes no bit of another row.
- Nothing wraps: values are clipped before they are cast, and sums of K <= 2**16 products fit int32.

A byte of int4 data holds two values of one group: byte j of a group has element j in its low half
and element j + group_size / 2 in its high half, so that two dots over the halves need no
interleaving. Without groups, all K elements are one group.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import QUANTISED, check_array, check_positive, dtype_name, quantise

MAX_K = 2**16
"""Products of int8 that an int32 sums without wrapping: 2**16 * 128 * 128 < 2**31."""

STORED = {"int8": "int8", "int4": "uint8", "float8_e4m3fn": "float8_e4m3fn"}
"""Weight dtype -> dtype of the array `data`."""

ACTIVATIONS = ("float", *QUANTISED, "int16")
"""What rows may be quantised to."""


@dataclass(frozen=True)
class Format:
    """How a weight is stored and multiplied. ValueError unless the fields fit each other.

    `dtype` is the weight's; `group_size` counts the neighbouring elements of K that share a scale,
    None: all of them do; `activations` is what x is quantised to, row by row, "float": nothing.
    """

    dtype: Literal["int8", "int4", "float8_e4m3fn"]
    group_size: int | None = None
    zero_points: bool = False
    activations: Literal["float", "int8", "int16", "float8_e4m3fn"] = "float"

    def __post_init__(self) -> None:
        if self.dtype not in STORED:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(STORED)}")
        if self.activations not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise ValueError(f"activations is {self.activations!r}; allowed: {allowed}")
        if self.group_size is not None:
            check_positive("group_size", self.group_size)
            if self.dtype == "int4" and self.group_size % 2:
                raise ValueError(f"group_size is {self.group_size}; int4 needs an even one")
        if self.zero_points and (self.group_size is None or self.dtype == "float8_e4m3fn"):
            raise ValueError(
                f"zero_points with dtype {self.dtype!r} and group_size {self.group_size}; they "
                f"need an integer dtype and groups"
            )
        needed = "int8" if self.activations == "int16" else self.activations
        if needed != "float" and (needed != self.dtype or self.group_size is not None):
            raise ValueError(
                f"activations is {self.activations!r} with dtype {self.dtype!r} and group_size "
                f"{self.group_size}; quantised activations need a weight of their own dtype "
                f"(int16: int8), without groups"
            )

    def shapes(self, n: int, k: int) -> dict[str, jax.ShapeDtypeStruct | None]:
        """The arrays of a weight [N, K]: data, scales, zeros. ValueError if K does not divide."""
        group = self.group_size or k
        if k > MAX_K:
            raise ValueError(f"K is {k}; at most {MAX_K} products are summed")
        if k % group:
            raise ValueError(f"group_size is {group}; it must divide K, {k}")
        if self.dtype == "int4" and group % 2:
            raise ValueError(f"K is {k}; int4 without groups needs an even one")
        stored = jnp.dtype(STORED[self.dtype])
        columns = k // 2 if self.dtype == "int4" else k
        grouped = (n, k // group)
        return {
            "data": jax.ShapeDtypeStruct((n, columns), stored),
            "scales": jax.ShapeDtypeStruct(grouped if self.group_size else (n,), jnp.float32),
            "zeros": jax.ShapeDtypeStruct(grouped, jnp.int8) if self.zero_points else None,
        }


def pack_int4(q: Any, group_size: int) -> Any:
    """Integers [N, K] in [-8, 7] as uint8 [N, K / 2]; NumPy in, NumPy out, else jax."""
    xp: Any = np if isinstance(q, np.ndarray) else jnp
    n, k = q.shape
    halves = (q + q.dtype.type(8)).astype(xp.uint8).reshape(n, k // group_size, 2, group_size // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << xp.uint8(4))).reshape(n, k // 2)


def int4_halves(data: Any) -> tuple[Any, Any]:
    """uint8 [N, K / 2] -> the low and the high values of every byte, int8 [N, K / 2] each."""
    low, high = data & np.uint8(15), data >> np.uint8(4)
    return low.astype(np.int8) - np.int8(8), high.astype(np.int8) - np.int8(8)


def unpack_int4(data: Any, group_size: int) -> Any:
    """The inverse of `pack_int4`: uint8 [N, K / 2] -> int8 [N, K]."""
    xp: Any = np if isinstance(data, np.ndarray) else jnp
    n, half = data.shape
    parts = [x.reshape(n, -1, group_size // 2) for x in int4_halves(data)]
    return xp.stack(parts, axis=2).reshape(n, 2 * half)


def digits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows x [T, K] as int16 values in two digits each: (int8 [2, T, K], the high ones first;
    float32 scales [T])."""
    values, scales = quantise(x, "int16")
    return base_256(values.astype(jnp.int32), 2), scales


def base_256(values: jax.Array, count: int) -> jax.Array:
    """Integers int32 [...] in balanced base 256: int8 [count, ...], the highest digit first, which
    must fit; the others are in [-128, 127]."""
    found = []
    for _ in range(count - 1):
        low = ((values + 128) & 255) - 128
        found.append(low)
        values = (values - low) >> 8
    return jnp.stack([values, *found[::-1]]).astype(jnp.int8)


def dequantise(
    data: jax.Array, scales: jax.Array, zeros: jax.Array | None, format: Format
) -> jax.Array:
    """The weight that the arrays stand for, float32 [N, K]."""
    if format.dtype == "int4":
        num_columns = data.shape[1] * 2
        group = num_columns if format.group_size is None else format.group_size
        data = unpack_int4(data, group)
    values = data.astype(jnp.float32)
    if format.group_size is None:
        return values * scales[:, None]
    values = values.reshape(*scales.shape, format.group_size)
    if zeros is not None:
        values = values - zeros.astype(jnp.float32)[..., None]
    return (values * scales[..., None]).reshape(len(data), -1)


def validate(
    x: jax.Array,  # [T, K]
    data: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    format: Format,
) -> None:
    """ValueError, naming argument, value and what is allowed, unless the arguments fit."""
    if not isinstance(format, Format):
        raise ValueError(f"format is {format!r}; it must be a Format")
    check_array("x", x, (None, None), "[T, K]")
    dtype_name(x.dtype, "x.dtype")
    check_array("data", data, (None, None), "[N, K]")
    want = format.shapes(data.shape[0], x.shape[1])
    for name, array in (("data", data), ("scales", scales), ("zeros", zeros)):
        expected = want[name]
        if expected is None:
            if array is not None:
                raise ValueError(f"{name} is given, but the format has no zero points: {format}")
            continue
        if array is None:
            raise ValueError(f"{name} is None; {format} needs it")
        check_array(name, array, expected.shape, f"what {format} gives for x {x.shape}")
        dtype_name(array.dtype, f"{name}.dtype", (expected.dtype.name,))
