"""Coordinate descent on the outputs' error: what GPTQ chose, bettered number by number.

GPTQ makes up for an error only in columns to come. Here each group's zero point, scale and integers
in turn take the values that are best beside all others as they are, those after them too.
Source: arXiv:2309.01885 (QuantEase), of the integers; scales and zero points are treated alike.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxinfer.quantize.grid import Grid, Rounded

_ROUNDS = 4
"""Times that all numbers have their turn; more change little."""


@partial(jax.jit, static_argnums=3)
def refine(rounded: Rounded, weights: jax.Array, hessian: jax.Array, grid: Grid) -> Rounded:
    """`rounded` for weights [N, K] with a lower error, sum of (dW X'X dW'), X'X the `hessian`."""
    weights = weights.T
    num_inputs, num_outputs = weights.shape
    num_groups = rounded.scales.shape[1]
    size = num_inputs // num_groups

    def group(turn: jax.Array, state: tuple) -> tuple:
        integers, scales, zeros, slopes = state
        g = turn % num_groups
        start = g * size
        rows = jax.lax.dynamic_slice(hessian, (start, 0), (size, num_inputs))
        own = jax.lax.dynamic_slice(rows, (0, start), (size, size))
        mine, slope = (
            jax.lax.dynamic_slice(array, (start, 0), (size, num_outputs))
            for array in (integers, slopes)
        )
        before = (mine - zeros[g]) * scales[g]
        zero = zeros[g]
        if not grid.symmetric:
            zero = _best_zero(zero, scales[g], slope, own, grid)
            slope = slope + own.sum(axis=1)[:, None] * ((zeros[g] - zero) * scales[g])
        scale = _best_scale(mine - zero, scales[g], slope, own, grid)
        slope = slope + own @ ((mine - zero) * (scale - scales[g]))
        mine = _best_integers(mine, scale, zero, slope, own, grid)
        slopes = slopes + rows.T @ ((mine - zero) * scale - before)
        integers = jax.lax.dynamic_update_slice(integers, mine, (start, 0))
        return integers, scales.at[g].set(scale), zeros.at[g].set(zero), slopes

    # half the error's derivative by each weight, [K, N], kept up to date
    slopes = hessian @ (rounded.values().T - weights)
    state = (rounded.integers.T, rounded.scales.T, rounded.zeros.T, slopes)
    integers, scales, zeros, _ = jax.lax.fori_loop(0, _ROUNDS * num_groups, group, state)
    return Rounded(integers.T, scales.T, zeros.T)


def _best_zero(
    zero: jax.Array, scale: jax.Array, slope: jax.Array, own: jax.Array, grid: Grid
) -> jax.Array:
    """Of the zero points [N] and those next to them; a group's weights [S, N] move together."""
    steps = jnp.array([0.0, 1.0, -1.0])[:, None]
    move = -steps * scale
    errors = 2 * move * slope.sum(axis=0) + move**2 * own.sum()
    there = (zero + steps >= grid.lowest_zero) & (zero + steps <= grid.highest)
    return zero + steps[jnp.argmin(jnp.where(there, errors, jnp.inf), axis=0), 0]


def _best_scale(
    steps: jax.Array, scale: jax.Array, slope: jax.Array, own: jax.Array, grid: Grid
) -> jax.Array:
    """The scales [N] with which a group's `steps` [S, N] from zero are best, where that is better
    than what is there by more than the rounding of scales takes away."""
    curve = jnp.sum(steps * (own @ steps), axis=0)
    along = jnp.sum(steps * slope, axis=0)
    moved = scale - along / jnp.where(curve > 0, curve, 1)
    found = grid.stored(jnp.clip(moved, scale / 2, scale * 2))
    move = found - scale
    return jnp.where(2 * move * along + move**2 * curve < 0, found, scale)


def _best_integers(
    integers: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    slope: jax.Array,
    own: jax.Array,
    grid: Grid,
) -> jax.Array:
    """A group's integers [S, N], one input after the other."""

    def column(i: jax.Array, state: tuple) -> tuple:
        integers, slope = state
        target = (integers[i] - zero) * scale - slope[i] / own[i, i]
        integer = grid.nearest(target, scale, zero)
        slope = slope + own[:, i][:, None] * ((integer - integers[i]) * scale)
        return integers.at[i].set(integer), slope

    return jax.lax.fori_loop(0, len(integers), column, (integers, slope))[0]
