"""The write into the XLA layout: a scatter for each array of the pool, in place when donated."""

import jax
import jax.numpy as jnp

from pallas_kernels.kv_write import validate
from pallas_kernels.paged_attention.xla import Pages, to_stored


def kv_write(pages: Pages, k: jax.Array, v: jax.Array, slots: jax.Array) -> Pages:
    """See `pallas_kernels.kv_write` for the contract."""
    num_pages, num_kv_heads, head_dim, page_size = pages.k.shape
    validate(k, v, slots, num_kv_heads=num_kv_heads, head_dim=head_dim)
    # A negative index would count from the end; send it out of range instead.
    page = jnp.where(slots < 0, num_pages, slots // page_size)
    offset = slots % page_size
    (new_k, k_scale), (new_v, v_scale) = to_stored(k, pages), to_stored(v, pages)

    def put(pool: jax.Array | None, new: jax.Array | None) -> jax.Array | None:
        if pool is None or new is None:
            return None
        return pool.at[page, :, offset].set(new, mode="drop")

    return Pages(
        k=pages.k.at[page, :, :, offset].set(new_k, mode="drop"),
        v=pages.v.at[page, :, offset, :].set(new_v, mode="drop"),
        k_scale=put(pages.k_scale, k_scale),
        v_scale=put(pages.v_scale, v_scale),
    )
