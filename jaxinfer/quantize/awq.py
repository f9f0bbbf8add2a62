"""AWQ: inputs that are large on average are scaled down and their weights up, before rounding.

The scales move into what makes the inputs (a norm's gain, the rows of v_proj and up_proj), so the
float model stays the same; then the largest weights are clipped where that lessens the error.
Errors are those of a matrix's outputs, and follow from X'X: no input is kept.
Source: arXiv:2306.00978, equations 4 and 5; clipping as in its authors' code.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxinfer.quantize.grid import Grid, nearest

_STEPS = 20
"""Exponents tried: 0, 1/20, ... 19/20; and, for clipping, largest weights: 1, 19/20, ... 11/20."""
_SMALLEST = 1e-4
"""Of a scale, before scales are centred around 1."""


@partial(jax.jit, static_argnums=3)
def best_scales(
    weights: jax.Array, hessian: jax.Array, magnitudes: jax.Array, grid: Grid
) -> jax.Array:
    """The scales float32 [K] for weights [N, K], of the exponent with the least output error.

    `magnitudes` [K] are the inputs' sums of |x|; inputs that must share a scale have the same.
    The exponent 0, scales of 1, is among those tried.
    """
    largest = magnitudes.max()
    relative = magnitudes / jnp.where(largest > 0, largest, 1)

    def scales(exponent: jax.Array) -> jax.Array:
        raised = jnp.maximum(relative**exponent, _SMALLEST)
        return raised / jnp.sqrt(raised.max() * raised.min())

    def error(exponent: jax.Array) -> jax.Array:
        s = scales(exponent)
        change = nearest(weights * s, grid).values() / s - weights
        return jnp.sum((change @ hessian) * change)

    exponents = jnp.arange(_STEPS, dtype=jnp.float32) / _STEPS
    return scales(exponents[jnp.argmin(jax.lax.map(error, exponents))])


@partial(jax.jit, static_argnums=2)
def clipped(weights: jax.Array, hessian: jax.Array, grid: Grid) -> jax.Array:
    """weights [N, K], in each group those clipped that are beyond the best limit.

    A group's error is that of its own share of the output: its block of the Hessian.
    """
    size = grid.group_size or weights.shape[1]
    grouped = weights.reshape(len(weights), -1, size)
    num_groups = grouped.shape[1]
    each = jnp.arange(num_groups)
    blocks = hessian.reshape(num_groups, size, num_groups, size)[each, :, each]
    largest = jnp.abs(grouped).max(axis=2, keepdims=True)

    def limited(share: jax.Array) -> jax.Array:
        return jnp.clip(grouped, -largest * share, largest * share)

    def error(share: jax.Array) -> jax.Array:
        flat = limited(share).reshape(weights.shape)
        change = nearest(flat, grid).values().reshape(grouped.shape) - grouped
        return jnp.sum(jnp.einsum("ngi,gij->ngj", change, blocks) * change, axis=2)

    shares = 1 - jnp.arange(_STEPS // 2, dtype=jnp.float32) / _STEPS
    best = shares[jnp.argmin(jax.lax.map(error, shares), axis=0)]
    return limited(best[..., None]).reshape(weights.shape)
