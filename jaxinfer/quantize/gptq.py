"""GPTQ: each column's rounding error is made up for by the columns not yet rounded.

Source: arXiv:2210.17323, algorithm 1. The columns of a group are a block: the group's scale is
found when its first column's turn comes, from weights that all errors before it have reached. The
groups whose inputs are largest go first, and in a group the largest inputs: so the errors that
count most can be made up for, and groups still are inputs side by side.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.quantize.grid import Grid, Rounded

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to it; ten and a hundred times as much where
it then still has no Cholesky factor."""
_BLOCK = 128
"""Most columns of a block where there are no groups."""


def quantise(
    weights: jax.Array | np.ndarray, hessian: jax.Array | np.ndarray, grid: Grid, name: str
) -> Rounded:
    """weights float32 [N, K] on the grid, for inputs whose X'X is `hessian` [K, K].

    Raises ConfigError where the Hessian is not finite, which damping cannot mend.
    """
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        rounded = _solve(weights, hessian, np.float32(damping), grid)
        if np.isfinite(rounded.scales).all() and np.isfinite(rounded.integers).all():
            return rounded
    raise ConfigError(
        f"{name}: the inputs that the calibration text gives are not finite, or too large for "
        "float32; use method rtn, or another text",
        field="calibration",
    )


@partial(jax.jit, static_argnums=3)
def _solve(weights: jax.Array, hessian: jax.Array, damping: jax.Array, grid: Grid) -> Rounded:
    diagonal = jnp.diagonal(hessian)
    weights = jnp.where(diagonal == 0, 0, weights)
    groups, columns = _order(diagonal, grid)
    factor = inverse_factor(damped(hessian, damping)[columns][:, columns])
    integers, scales, zeros = _columns(weights[:, columns].T, factor, grid)
    integers = integers[jnp.argsort(columns)]
    back = jnp.argsort(groups)
    return Rounded(integers.T, scales[back].T, zeros[back].T)


def damped(hessian: jax.Array, damping: float | jax.Array) -> jax.Array:
    """`hessian` [K, K] and this share of its mean diagonal; 1 for inputs that are always 0."""
    diagonal = jnp.diagonal(hessian)
    never = (diagonal == 0).astype(jnp.float32)
    return hessian + jnp.diag(never + damping * jnp.mean(diagonal))


def _order(diagonal: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Groups [G] and columns [K] in the order of treatment."""
    size = grid.group_size or len(diagonal)
    grouped = diagonal.reshape(-1, size)
    groups = jnp.argsort(-grouped.sum(axis=1), stable=True)
    within = jnp.argsort(-grouped, axis=1, stable=True)
    return groups, (groups[:, None] * size + within[groups]).reshape(-1)


def inverse_factor(hessian: jax.Array) -> jax.Array:
    """The upper triangular U with U'U the inverse of `hessian` [K, K]; NaN if there is none.

    From the Cholesky factor of the matrix turned end for end: no inverse is factored.
    """
    flipped = jnp.linalg.cholesky(hessian[::-1, ::-1])
    upper = flipped[::-1, ::-1]  # hessian = upper upper'
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(upper), dtype=upper.dtype))


def _columns(
    weights: jax.Array, factor: jax.Array, grid: Grid
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """weights [K, N] in the order of treatment -> integers [K, N], scales and zeros [G, N]."""
    num_inputs, num_outputs = weights.shape
    size = grid.group_size or int(np.gcd(num_inputs, _BLOCK))

    def fit(columns: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        # a column's error counts by what is left of it when the columns after it have made up
        counts = 1 / jnp.square(jnp.diagonal(own))[:, None]
        return grid.search(columns, 0, lambda change: jnp.sum(counts * change**2, axis=0))

    whole = None if grid.group_size else fit(weights, factor)

    def block(start: jax.Array, state: tuple) -> tuple:
        weights, integers, scales, zeros = state
        rows = jax.lax.dynamic_slice(factor, (start * size, 0), (size, num_inputs))
        own = jax.lax.dynamic_slice(rows, (0, start * size), (size, size))
        columns = jax.lax.dynamic_slice(weights, (start * size, 0), (size, num_outputs))
        scale, zero = whole or fit(columns, own)

        def column(i: jax.Array, state: tuple) -> tuple:
            columns, chosen, errors = state
            integer = grid.nearest(columns[i], scale, zero)
            error = (columns[i] - (integer - zero) * scale) / own[i, i]
            columns = columns - own[i][:, None] * error
            return columns, chosen.at[i].set(integer), errors.at[i].set(error)

        blank = jnp.zeros_like(columns)
        _, chosen, errors = jax.lax.fori_loop(0, size, column, (columns, blank, blank))
        # `rows` is 0 before the block: only columns to come change, and the block's, now done with
        weights = weights - rows.T @ errors
        integers = jax.lax.dynamic_update_slice(integers, chosen, (start * size, 0))
        if whole is None:
            scales, zeros = scales.at[start].set(scale), zeros.at[start].set(zero)
        return weights, integers, scales, zeros

    num_groups = num_inputs // grid.group_size if grid.group_size else 1
    found = jnp.zeros((num_groups, num_outputs), jnp.float32) if whole is None else whole[0][None]
    zeros = jnp.zeros_like(found) if whole is None else whole[1][None]
    state = (weights, jnp.zeros_like(weights), found, zeros)
    _, integers, scales, zeros = jax.lax.fori_loop(0, num_inputs // size, block, state)
    return integers, scales, zeros
