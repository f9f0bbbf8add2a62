"""The obvious write into the reference layout `[P, page_size, 2 * K, H]`, K even and V odd."""

import jax
import jax.numpy as jnp

from pallas_kernels.kv_write import validate


def kv_write(pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> jax.Array:
    """See `pallas_kernels.kv_write` for the contract."""
    num_pages, page_size, num_heads_2, head_dim = pages.shape
    validate(k, v, slots, num_kv_heads=num_heads_2 // 2, head_dim=head_dim)
    kv = jnp.stack([k.astype(pages.dtype), v.astype(pages.dtype)], axis=2)  # [T, K, 2, H]
    flat = pages.reshape(num_pages * page_size, num_heads_2, head_dim)
    # A negative index would count from the end; send it out of range instead.
    index = jnp.where(slots < 0, flat.shape[0], slots)
    flat = flat.at[index].set(kv.reshape(-1, num_heads_2, head_dim), mode="drop")
    return flat.reshape(pages.shape)
