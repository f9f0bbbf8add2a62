"""Writing new K and V into pages.

    kv_write(pages, k [T, K, H], v [T, K, H], slots [T] int32) -> pages

slot = page * page_size + offset. Under a jit that donates `pages` the write is in place: a scatter
of T rows, whose cost does not depend on the size of the pool. k and v, of any
float dtype, are rounded to the pages' dtype, or quantised (common.quantise). Slots outside the pool
are not written. Where two tokens have one slot, any of them may stay: only page 0, which nobody
reads, is written twice.
"""

import jax

from pallas_kernels.common import check_array, check_int32, dtype_name


def validate(
    k: jax.Array, v: jax.Array, slots: jax.Array, *, num_kv_heads: int, head_dim: int
) -> None:
    """ValueError, naming argument, value and what is allowed, unless they fit the pages."""
    check_array("slots", slots, (None,), "[T]")
    check_int32("slots", slots)
    shape = (slots.shape[0], num_kv_heads, head_dim)
    check_array("k", k, shape, "[T, K, H] of slots and pages")
    check_array("v", v, shape, "[T, K, H] of slots and pages")
    dtype_name(k.dtype, "k.dtype")
    dtype_name(v.dtype, "v.dtype")
