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

WEIGHT_FIRST_ROWS = 64
"""YNNPACK, which multiplies for XLA:CPU, rearranges the second operand of a product on every call.
For up to so many float32 rows the weight is the first: with AVX2 a [1536, 576] takes 0.21 ms for 4
rows, 0.29 for 16, 0.45 for 32 and 0.81 for 64, and as the second operand 0.46, 0.61, 0.73 and 1.02;
for 128 and more rows there is nothing in it. (bfloat16 gains from 16 to 32 rows alone, int8
nowhere.)"""


@dataclass(frozen=True)
class Kept:
    """How a weight is held whose integers are the checkpoint's own: in `format`, with its inputs
    `permuted` where those of a group do not lie side by side, and with `offsets` for its groups."""

    format: Format
    permuted: bool = False
    offsets: bool = False


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class QuantArray:
    """A weight of `shape`, quantised as `format`.

    `data`, `scales` and `zeros` are those of the matrix [N, K] (see pallas_kernels.quant_matmul): K
    are the axes `contracted` of the weight, which a matmul sums over, N the others, each in order.
    Two more are not the kernels': `offsets` float32 [N, K / group_size] are added to every weight
    of a group, and with `permutation` int32 [K] column i of the matrix is input permutation[i].
    The leaves may be arrays of any kind, or shapes; those that are not used are None.
    """

    data: Any
    scales: Any
    zeros: Any
    format: Format = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})
    contracted: tuple[int, ...] = field(metadata={"static": True})
    offsets: Any = None
    permutation: Any = None

    @classmethod
    def of_shape(
        cls, shape: tuple[int, ...], contracted: tuple[int, ...], held: Format | Kept
    ) -> "QuantArray":
        """With a jax.ShapeDtypeStruct for each array. ValueError where it cannot be `held` so."""
        kept = held if isinstance(held, Kept) else Kept(held)
        k = math.prod(shape[axis] for axis in contracted)
        leaves = kept.format.shapes(math.prod(shape) // k, k)
        return cls(
            **leaves,
            format=kept.format,
            shape=shape,
            contracted=contracted,
            offsets=leaves["scales"] if kept.offsets else None,
            permutation=jax.ShapeDtypeStruct((k,), jnp.int32) if kept.permuted else None,
        )

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

    def dequantised(self) -> jax.Array:
        """The weight that it stands for, float32 of `shape`."""
        matrix = _dequantised_rows(self, jnp.asarray)
        axes = (*self.kept, *self.contracted)
        order = sorted(range(len(axes)), key=axes.__getitem__)
        return matrix.reshape([self.shape[axis] for axis in axes]).transpose(order)


def einsum(spec: str, x: jax.Array, w: Any, ops: Any) -> jax.Array:
    """`einsum(spec, x, w)`, accumulated and returned in float32, w an array or a QuantArray; `ops`
    (pallas_kernels.Ops) says where this runs, and has what multiplies QuantArrays.

    x's first axis is rows; its others, all that x has beside them, are summed over. The output has
    the rows, then w's other axes in w's order: "tnh,dnh->td". ValueError for another spec, or one
    that sums over other axes than w was quantised for.
    """
    inputs = _inputs(spec)
    rows = x.reshape(len(x), -1)
    if isinstance(w, QuantArray):
        if inputs != w.contracted:
            raise ValueError(
                f"einsum {spec!r} sums over axes {inputs} of a weight that was quantised along "
                f"{w.contracted}"
            )
        if w.permutation is not None:
            rows = jnp.take(rows, w.permutation, axis=1)
        out = ops.quant_matmul(rows, w.data, w.scales, w.zeros, format=w.format)
        if w.offsets is not None:
            out += _times_offsets(rows, w.offsets)
        return out.reshape(len(x), *(w.shape[axis] for axis in w.kept))
    if len(x) == 1 and x.dtype != jnp.float32:
        # XLA:CPU converts the whole weight to float32 for one row of bfloat16, not for two.
        return einsum(spec, jnp.concatenate([x, x]), w, ops)[:1]
    if ops.platform == "cpu" and inputs == tuple(range(w.ndim - len(inputs), w.ndim)):
        outputs = w.shape[: -len(inputs)]
        matrix = w.reshape(math.prod(outputs), -1)  # two inputs would make XLA:CPU copy the weight
        return _times_matrix(rows, matrix).reshape(len(x), *outputs)
    return jnp.einsum(spec, x, w, preferred_element_type=jnp.float32)


def _times_matrix(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [T, K] times the matrix [N, K] of outputs by inputs, float32 [T, N], as fast as XLA:CPU
    can."""
    over_inputs = (((1,), (1,)), ((), ()))
    multiply = partial(
        jax.lax.dot_general, dimension_numbers=over_inputs, preferred_element_type=jnp.float32
    )
    if x.dtype != jnp.float32 or not 1 < len(x) <= WEIGHT_FIRST_ROWS:
        return multiply(x, matrix)
    # The barrier keeps XLA from turning the product round.
    return jax.lax.optimization_barrier(multiply(matrix, x)).T


def _times_offsets(x: jax.Array, offsets: jax.Array) -> jax.Array:
    """x [T, K] times the matrix whose weights are the offsets [N, G] of their groups: each is
    multiplied once, by the sum of its group's x, in float32."""
    sums = x.astype(jnp.float32).reshape(len(x), offsets.shape[1], -1)
    # Halves added to halves, not `sum`: XLA:CPU of jax 0.10.2 takes a reduction into one fusion
    # with the matmul of the same x, and gets that wrong (16 rows or more, a weight of one tile).
    while sums.shape[2] > 1:
        half = -(-sums.shape[2] // 2)
        sums = jnp.pad(sums, ((0, 0), (0, 0), (0, 2 * half - sums.shape[2])))
        sums = sums[:, :, :half] + sums[:, :, half:]
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("tg,ng->tn", sums[:, :, 0], offsets, precision=highest)


def _inputs(spec: str) -> tuple[int, ...]:
    """The axes of w that `spec` sums over, in x's order."""
    operands, _, result = spec.partition("->")
    x, _, w = operands.partition(",")
    inputs = tuple(w.find(letter) for letter in x[1:])
    kept = tuple(axis for axis, letter in enumerate(w) if letter not in x)
    if -1 in inputs or not inputs or result != x[:1] + "".join(w[axis] for axis in kept):
        raise ValueError(f"einsum {spec!r}: it must be rows and inputs, inputs and outputs of w")
    return inputs


def take(table: Any, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows `ids` int [T] of a table [V, D], clipped into it, as `dtype` [T, D].

    ValueError for a QuantArray that is not quantised along D, row by row.
    """

    def rows(array: jax.Array) -> jax.Array:
        return jnp.take(array, ids, axis=0, mode="clip")

    if not isinstance(table, QuantArray):
        return rows(table)
    if table.contracted != (1,) or len(table.shape) != 2:
        raise ValueError(f"a table [V, D] must be quantised along D; got {table.contracted}")
    return _dequantised_rows(table, rows).astype(dtype)


def _dequantised_rows(w: QuantArray, rows: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Float32 rows of the matrix of w, those that `rows` takes of each of its arrays."""
    zeros = None if w.zeros is None else rows(w.zeros)
    matrix = dequantise(rows(w.data), rows(w.scales), zeros, w.format)
    if w.offsets is not None:
        offsets = rows(w.offsets)
        matrix = matrix.reshape(*offsets.shape, -1) + offsets[..., None]
        matrix = matrix.reshape(len(offsets), -1)
    if w.permutation is not None:
        matrix = jnp.zeros_like(matrix).at[:, w.permutation].set(matrix)
    return matrix
