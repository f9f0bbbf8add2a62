"""GPTQ: each column's rounding error is made up for by the columns not yet rounded.

Source: arXiv:2210.17323, algorithm 1. The columns of a group are a block: the group's scale is
found when its first column's turn comes, from weights that all errors before it have reached.
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
    weights: jax.Array | np.ndarray,
    hessian: jax.Array | np.ndarray,
    grid: Grid,
    name: str,
    *,
    act_order: bool,
) -> Rounded:
    """weights float32 [N, K] on the grid, for inputs whose X'X is `hessian` [K, K].

    With `act_order` the columns whose inputs are largest go first, and form groups in that order.
    Raises ConfigError where the Hessian is not finite, which damping cannot mend.
    """
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        rounded = _solve(weights, hessian, np.float32(damping), grid, act_order)
        if np.isfinite(rounded.scales).all() and np.isfinite(rounded.integers).all():
            return rounded
    raise ConfigError(
        f"{name}: the inputs that the calibration text gives are not finite, or too large for "
        "float32; use method rtn, or another text",
        field="calibration",
    )


@partial(jax.jit, static_argnums=(3, 4))
def _solve(
    weights: jax.Array, hessian: jax.Array, damping: jax.Array, grid: Grid, act_order: bool
) -> Rounded:
    num_inputs = weights.shape[1]
    diagonal = jnp.diagonal(hessian)
    never = diagonal == 0
    weights = jnp.where(never, 0, weights)
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(num_inputs)
    damped = diagonal + never.astype(jnp.float32) + damping * jnp.mean(diagonal)
    hessian = jnp.where(jnp.eye(num_inputs, dtype=bool), damped, hessian)
    factor = inverse_factor(hessian[order][:, order])
    integers, scales, zeros = _columns(weights[:, order].T, factor, grid)
    back = jnp.argsort(order)
    size = grid.group_size or num_inputs
    groups = (jnp.arange(num_inputs, dtype=jnp.int32) // size)[back] if act_order else None
    return Rounded(integers[back].T, scales.T, zeros.T, groups)


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
    whole = None if grid.group_size else grid.fit(weights.min(axis=0), weights.max(axis=0))

    def block(start: jax.Array, state: tuple) -> tuple:
        weights, integers, scales, zeros = state
        rows = jax.lax.dynamic_slice(factor, (start * size, 0), (size, num_inputs))
        own = jax.lax.dynamic_slice(rows, (0, start * size), (size, size))
        columns = jax.lax.dynamic_slice(weights, (start * size, 0), (size, num_outputs))
        scale, zero = whole or grid.fit(columns.min(axis=0), columns.max(axis=0))

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
