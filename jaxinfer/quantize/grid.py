"""The integers a weight may become: scales and zero points of groups, and rounding to them.

All methods choose what is rounded; how it is rounded is here alone. Traced code: pure functions of
arrays, for a `Grid` that is static.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.quant.packed import PackedWeight

# (exponent bits, mantissa bits, smallest normal number) of what scales are stored in
_FLOATS = {
    "float32": (8, 23, 2.0**-126),
    "bfloat16": (8, 7, 2.0**-126),
    "float16": (5, 10, 2.0**-14),
}


@dataclass(frozen=True)
class Grid:
    """`group_size` inputs of an output share a scale, all of them where it is None.

    Integers are 0 to 2**bits - 1, less a zero point: 2**(bits-1) where `symmetric`, else one of
    `lowest_zero` to 2**bits - 1. Scales are numbers of `scale_dtype`.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: str
    lowest_zero: int = 0

    @property
    def highest(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(scales, zero points), float32, for groups whose weights lie in [low, high].

        The range is widened to hold 0. A scale is a normal number of `scale_dtype`: devices may
        take a subnormal one for 0. A group of zeros has the scale 1.
        """
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        if self.symmetric:
            high = jnp.maximum(high, -low)
            low = -high
        # as fractions: the difference may overflow
        scale = high / self.highest - low / self.highest
        exponent, mantissa, smallest = _FLOATS[self.scale_dtype]
        # A cast there and back would be optimised away.
        stored = jax.lax.reduce_precision(scale, exponent, mantissa)
        scale = jnp.where(high == low, jnp.float32(1), jnp.maximum(stored, smallest))
        if self.symmetric:
            return scale, jnp.full_like(scale, 1 << (self.bits - 1))
        zero = jnp.clip(jnp.round(-low / scale), self.lowest_zero, self.highest)
        return scale, zero

    def nearest(self, weights: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
        """The nearest integers, half to even, clipped, as float32."""
        return jnp.clip(jnp.round(weights / scale) + zero, 0, self.highest)


class Rounded(NamedTuple):
    """A matrix [N, K] on a grid: `integers` [N, K], `scales` and `zeros` [N, G], float32.

    `groups` int32 [K] is the group of each input; None: they are in order.
    """

    integers: jax.Array
    scales: jax.Array
    zeros: jax.Array
    groups: jax.Array | None = None

    def values(self) -> jax.Array:
        """What the integers stand for, float32 [N, K]; only where `groups` is None."""
        shape = (*self.scales.shape, -1)
        grouped = self.integers.reshape(shape) - self.zeros[..., None]
        return (grouped * self.scales[..., None]).reshape(self.integers.shape)


def nearest(weights: jax.Array, grid: Grid) -> Rounded:
    """weights float32 [N, K], each group spread over the grid, each weight to the nearest."""
    grouped = weights.reshape(len(weights), -1, grid.group_size or weights.shape[1])
    scales, zeros = grid.fit(grouped.min(axis=2), grouped.max(axis=2))
    integers = grid.nearest(grouped, scales[..., None], zeros[..., None])
    return Rounded(integers.reshape(weights.shape), scales, zeros)


@partial(jax.jit, static_argnums=1)
def round_to_nearest(weights: jax.Array, grid: Grid) -> Rounded:
    """`nearest`: the method RTN is no more than this."""
    return nearest(weights, grid)


@jax.jit
def output_error(change: jax.Array, weights: jax.Array, hessian: jax.Array) -> jax.Array:
    """||X dW|| / ||X W||, Frobenius, from weights and their change [N, K] and X'X [K, K].

    NaN where the outputs are all 0.
    """
    wrong = jnp.sum((change @ hessian) * change)
    return jnp.sqrt(jnp.maximum(wrong, 0) / jnp.sum((weights @ hessian) * weights))


def split(rounded: Rounded, names: list[str], sizes: list[int], grid: Grid) -> list[PackedWeight]:
    """The matrices that were rounded as one, stacked along N: `sizes` outputs each, as records."""
    middle = 1 << (grid.bits - 1)

    def signed(array: jax.Array) -> np.ndarray:
        return np.ascontiguousarray((np.asarray(array).T - middle).astype(np.int8))

    values, zeros = signed(rounded.integers), signed(rounded.zeros)
    scales = np.asarray(rounded.scales).T
    groups = None if rounded.groups is None else np.asarray(rounded.groups)
    size = grid.group_size or len(values)
    if groups is not None and np.array_equal(groups, np.arange(len(values)) // size):
        groups = None
    packed, start = [], 0
    for name, count in zip(names, sizes, strict=True):
        own = slice(start, start + count)
        start += count
        packed.append(
            PackedWeight(
                name=name,
                values=values[:, own],
                scales=np.ascontiguousarray(scales[:, own]),
                bits=grid.bits,
                group_size=size,
                zeros=None if grid.symmetric else np.ascontiguousarray(zeros[:, own]),
                g_idx=groups,
                scale_dtype=grid.scale_dtype,
            )
        )
    return packed
