"""The write into the TPU layout: one scatter of T tokens, in place when donated."""

import jax
import jax.numpy as jnp

from pallas_kernels.common import quantise
from pallas_kernels.kv_write import validate
from pallas_kernels.paged_attention.tpu import Pages
from pallas_kernels.paged_attention.tpu_layout import Layout, token_scales, token_words


def kv_write(pages: Pages, k: jax.Array, v: jax.Array, slots: jax.Array) -> Pages:
    """See `pallas_kernels.kv_write` for the contract."""
    layout = pages.layout
    validate(k, v, slots, num_kv_heads=layout.num_kv_heads, head_dim=layout.head_dim)
    num_pages = pages.data.shape[0]
    # A negative index would count from the end; send it out of range instead.
    page = jnp.where(slots < 0, num_pages, slots // layout.page_size)
    offset = slots % layout.page_size
    scales = pages.scales
    if scales is not None:
        k, k_scales = quantise(k, layout.dtype)
        v, v_scales = quantise(v, layout.dtype)
        new = token_scales(k_scales, v_scales, layout)
        scales = _write_scales(scales, new, page, offset, layout)
    dtype = jnp.dtype(layout.dtype)
    words = token_words(k.astype(dtype), v.astype(dtype), layout)
    index = jnp.stack([page, offset * layout.token_rows, jnp.zeros_like(page)], axis=1)
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, 1, 2),
    )
    data = jax.lax.scatter(
        pages.data, index, words, dimensions, mode=jax.lax.GatherScatterMode.FILL_OR_DROP
    )
    return Pages(data, scales, layout)


def _write_scales(
    scales: jax.Array,  # [P, groups, rows, 128]
    new: jax.Array,  # [T, groups, 8]
    page: jax.Array,
    offset: jax.Array,
    layout: Layout,
) -> jax.Array:
    """One scatter of 8 neighbours for each token and group."""
    num_tokens, num_groups, count = new.shape
    per_row = layout.scale_tokens
    columns = (
        page[:, None],
        jnp.arange(num_groups, dtype=jnp.int32)[None],
        (offset // per_row)[:, None],
        (offset % per_row * count)[:, None],
    )
    index = jnp.stack([jnp.broadcast_to(x, (num_tokens, num_groups)) for x in columns], axis=2)
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2,),
        inserted_window_dims=(0, 1, 2),
        scatter_dims_to_operand_dims=(0, 1, 2, 3),
    )
    mode = jax.lax.GatherScatterMode.FILL_OR_DROP
    return jax.lax.scatter(scales, index, new, dimensions, mode=mode)
