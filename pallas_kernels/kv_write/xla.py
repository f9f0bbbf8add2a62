"""The write into the XLA layout: one scatter for K, one for V, both in place when donated."""

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
    stored = pages.k.dtype
    return Pages(
        k=pages.k.at[page, :, :, offset].set(to_stored(k, stored), mode="drop"),
        v=pages.v.at[page, :, offset, :].set(to_stored(v, stored), mode="drop"),
    )
