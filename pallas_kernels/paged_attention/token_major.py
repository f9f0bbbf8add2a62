"""The token-major page layout and what is done to it outside attention.

`data [P, page_size, 2 * K, H]`, K at even and V at odd indices of the third axis, so that a page is
one contiguous piece of memory and a token is one piece of a page. Quantised pages have
`scales [P, 2 * K, page_size]` float32 beside them, one for each token and head: a page's scales of
one head are contiguous too.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.common import PAGE_DTYPES, QUANTISED, dtype_name, quantise
from pallas_kernels.paged_attention import validate_layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """One layer's pool."""

    data: jax.Array  # [P, page_size, 2 * K, H]
    scales: jax.Array | None  # [P, 2 * K, page_size] float32

    @property
    def num_kv_heads(self) -> int:
        return self.data.shape[2] // 2


def allocate(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: str) -> Pages:
    """Pages of zeros for one layer."""
    validate_layout(num_pages, page_size, num_kv_heads, head_dim)
    name = dtype_name(dtype, "dtype", PAGE_DTYPES)
    heads = 2 * num_kv_heads
    return Pages(
        data=jnp.zeros((num_pages, page_size, heads, head_dim), name),
        scales=jnp.zeros((num_pages, heads, page_size), jnp.float32) if name in QUANTISED else None,
    )


def page_bytes(page_size: int, num_kv_heads: int, head_dim: int, dtype: str) -> int:
    """Bytes of one page of one layer, its scales included."""
    validate_layout(1, page_size, num_kv_heads, head_dim)
    name = dtype_name(dtype, "dtype", PAGE_DTYPES)
    vector = head_dim * jnp.dtype(name).itemsize + (4 if name in QUANTISED else 0)
    return page_size * 2 * num_kv_heads * vector


def write(pages: Pages, k: jax.Array, v: jax.Array, slots: jax.Array) -> Pages:
    """k and v `[T, K, H]` into their slots; one scatter of T rows, in place when donated."""
    num_pages, page_size, heads, head_dim = pages.data.shape
    kv = jnp.stack([k, v], axis=2).reshape(-1, heads, head_dim)
    # A negative index would count from the end; send it out of range instead.
    page = jnp.where(slots < 0, num_pages, slots // page_size)
    offset = slots % page_size
    scales = pages.scales
    if scales is not None:
        kv, new = quantise(kv, pages.data.dtype.name)
        scales = scales.at[page, :, offset].set(new, mode="drop")
    data = pages.data.at[page, offset].set(kv.astype(pages.data.dtype), mode="drop")
    return Pages(data, scales)
