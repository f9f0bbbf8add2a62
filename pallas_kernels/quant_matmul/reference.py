"""The slowest obvious quantised matmul: the contract, word for word, over the whole weight."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import Target, quantise
from pallas_kernels.quant_matmul import Format, dequantise, digits, validate


def unsupported(format: Format, n: int, k: int, dtype: Any, target: Target) -> str | None:
    """None: this can do all that the contract allows."""
    return None


@jax.named_scope("quant_reference")
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
    if format.activations == "float":
        return _dot(x.astype(jnp.float32), dequantise(data, scales, zeros, format))
    if format.activations == "int16":
        # Every digit's sum fits int32, that of the values themselves does not.
        halves, row_scales = digits(x)
        high, low = jnp.einsum("dtk,nk->dtn", halves.astype(jnp.int32), data.astype(jnp.int32))
        sums = 256.0 * high.astype(jnp.float32) + low.astype(jnp.float32)
        return sums * row_scales[:, None] * scales[None, :]
    rows, row_scales = quantise(x, format.activations)
    if format.activations == "int8":
        sums = jnp.einsum("tk,nk->tn", rows.astype(jnp.int32), data.astype(jnp.int32))
        sums = sums.astype(jnp.float32)
    else:
        sums = _dot(rows.astype(jnp.float32), data.astype(jnp.float32))
    return sums * row_scales[:, None] * scales[None, :]


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("tk,nk->tn", x, w, precision=jax.lax.Precision.HIGHEST)
