"""QuantArray, a quantised weight as a pytree, and the two things models do with weights: `einsum`
and `take`, each over plain arrays and QuantArrays alike.

How values are stored and multiplied is `pallas_kernels.quant_matmul`'s; here a weight of any number
of axes becomes its matrix [N, K], outputs by inputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant_matmul import Format, dequantise

QuantMatmul = Callable[..., jax.Array]


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class QuantArray:
    """A weight of `shape`, quantised as `format`.

    `data`, `scales` and `zeros` are those of the matrix [N, K] (see pallas_kernels.quant_matmul): K
    are the axes `contracted` of the weight, which a matmul sums over, N the others, each in order.
    The leaves may be arrays of any kind, or shapes.
    """

    data: Any
    scales: Any
    zeros: Any
    format: Format = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})
    contracted: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of_shape(
        cls, shape: tuple[int, ...], contracted: tuple[int, ...], format: Format
    ) -> "QuantArray":
        """With a jax.ShapeDtypeStruct for each array. ValueError where `format` cannot hold it."""
        k = math.prod(shape[axis] for axis in contracted)
        leaves = format.shapes(math.prod(shape) // k, k)
        return cls(**leaves, format=format, shape=shape, contracted=contracted)

    @property
    def dtype(self) -> None:
        """None: no float dtype. What is loaded for it stays as it was stored, for `quantise`."""
        return None

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that are not contracted."""
        return tuple(a for a in range(len(self.shape)) if a not in self.contracted)

    @property
    def num_bytes(self) -> int:
        """What its arrays take."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree_util.tree_leaves(self))


def einsum(spec: str, x: jax.Array, w: Any, quant_matmul: QuantMatmul) -> jax.Array:
    """`einsum(spec, x, w)`, accumulated and returned in float32, w an array or a QuantArray.

    x's first axis is rows; its others, all that x has beside them, are summed over. The output has
    the rows, then w's other axes in w's order: "tnh,nhd->td". ValueError for another spec, or one
    that sums over other axes than w was quantised for.
    """
    inputs, kept = _axes(spec)
    if isinstance(w, QuantArray):
        if inputs != w.contracted:
            raise ValueError(
                f"einsum {spec!r} sums over axes {inputs} of a weight that was quantised along "
                f"{w.contracted}"
            )
        rows = x.reshape(len(x), -1)
        out = quant_matmul(rows, w.data, w.scales, w.zeros, format=w.format)
        return out.reshape(len(x), *(w.shape[axis] for axis in w.kept))
    if len(x) == 1 and x.dtype != jnp.float32:
        # XLA:CPU converts the whole weight to float32 for one row of bfloat16, not for two.
        return einsum(spec, jnp.concatenate([x, x]), w, quant_matmul)[:1]
    if len(inputs) > 1 and inputs == tuple(range(len(inputs))):
        # Two contracted axes would make XLA:CPU copy the weight; merged into one they are free.
        x = x.reshape(len(x), -1)
        w = w.reshape(-1, *(w.shape[axis] for axis in kept))
        letters = spec.split(",")[1].split("->")[0]
        spec = f"{spec[0]}{letters[0]},{letters[0]}{''.join(letters[a] for a in kept)}->"
        spec += spec[0] + "".join(letters[a] for a in kept)
    return jnp.einsum(spec, x, w, preferred_element_type=jnp.float32)


def _axes(spec: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of w that `spec` sums over, in x's order, and the others."""
    operands, _, result = spec.partition("->")
    x, _, w = operands.partition(",")
    inputs = tuple(w.find(letter) for letter in x[1:])
    kept = tuple(axis for axis, letter in enumerate(w) if letter not in x)
    if -1 in inputs or not inputs or result != x[:1] + "".join(w[axis] for axis in kept):
        raise ValueError(f"einsum {spec!r}: it must be rows and inputs, inputs and outputs of w")
    return inputs, kept


def take(table: Any, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows `ids` int [T] of a table [V, D], clipped into it, as `dtype` [T, D].

    ValueError for a QuantArray that is not quantised along D, row by row.
    """

    def rows(array: jax.Array | None) -> jax.Array | None:
        return None if array is None else jnp.take(array, ids, axis=0, mode="clip")

    if not isinstance(table, QuantArray):
        return jnp.take(table, ids, axis=0, mode="clip")
    if table.contracted != (1,) or len(table.shape) != 2:
        raise ValueError(f"a table [V, D] must be quantised along D; got {table.contracted}")
    data, scales = rows(table.data), rows(table.scales)
    return dequantise(data, scales, rows(table.zeros), table.format).astype(dtype)  # pyright: ignore[reportArgumentType]
