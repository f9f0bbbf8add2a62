"""Paged attention: queries of a ragged batch against K and V kept in pages. Owns the page layouts.

    allocate(num_pages, page_size, num_kv_heads, head_dim, dtype) -> pages      one layer, zeros
    page_bytes(page_size, num_kv_heads, head_dim, dtype) -> int                 one page, one layer
    copy_pages(pages, src [C], dst [C]) -> pages                               padding pairs: (0, 0)
    paged_attention(q [T, N, H], pages, ragged, *, scale, window, soft_cap) -> [T, N, H]

`pages` is a pytree that only the implementation which allocated it can read. The contract:

- A query at position p of its row sees the positions j <= p and, with a window w, only j > p - w.
- score = scale * q . k; with a soft cap c, c * tanh(score / c); then the mask; softmax in float32.
- Query head n reads KV head n // G. The output has q's dtype. Tokens of no row give zeros.
- Quantised pages hold int8 or fp8 with a float32 scale for each token and head, applied exactly:
  K's to the scores, V's to the weights. The result is that of attention over data * scale.
- What is not visible is selected away: NaN in page 0, in unused pages (data and scales), behind
  the end of a row and in the queries of padding tokens changes no bit of any other output.
- Page ids outside the pool are clipped into it, never read outside; slots outside are not written.
  kv_lens beyond a row's table, MP * page_size, count as that.
- `copy_pages` reads every source before it writes: a page may be both source and destination.
- Cost follows the real lengths: nothing is computed for pages behind the longest row of a batch.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common import (
    check_array,
    check_int32,
    check_options,
    check_positive,
    dtype_name,
)

# Positions and windows are int32, and their sums must be.
MAX_WINDOW = 2**30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ragged:
    """How the flat tokens of a step map to rows and pages. Arrays are int32.

    page_table [S, MP]: page ids; entries behind a row's pages are 0, the page that nobody owns.
    kv_lens [S]: tokens visible to the row after this step's writes, its new ones among them; 0 for
        padding rows.
    cu_q_lens [S + 1]: row i's new tokens are the flat tokens [cu[i], cu[i + 1]), and they are the
        last positions of [0, kv_lens[i]); a row may have none.
    num_decode []: rows [0, num_decode) have exactly one new token, so flat token i is row i's.
    slots [T]: page * page_size + offset at which each new token's K and V go; padding: in page 0.
    decode_only (static): no row has more than one new token, T == S, num_decode is the number of
        real rows.
    """

    page_table: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array
    num_decode: jax.Array
    slots: jax.Array
    decode_only: bool = field(default=False, metadata={"static": True})


def validate_layout(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int) -> None:
    """ValueError unless all are ints >= 1 and int32 numbers every slot."""
    check_positive("num_pages", num_pages)
    check_positive("page_size", page_size)
    if num_pages * page_size > 2**31 - 1:
        raise ValueError(
            f"num_pages is {num_pages} with pages of {page_size}; slots are int32, so at most "
            f"{(2**31 - 1) // page_size} pages"
        )
    check_positive("num_kv_heads", num_kv_heads)
    check_positive("head_dim", head_dim)


def copy_pages(pages: Any, src: jax.Array, dst: jax.Array) -> Any:
    """`pages`, a tree of arrays `[P, ...]`, with page dst[i] as page src[i] was, for every i.

    Sources outside the pool are clipped into it, destinations outside are dropped. ValueError
    unless `src` and `dst` are int32 [C].
    """
    check_array("src", src, (None,), "[C]")
    check_array("dst", dst, (src.shape[0],), "[C]")
    check_int32("src", src)
    check_int32("dst", dst)

    def copy(pool: jax.Array) -> jax.Array:
        # A negative index would count from the end.
        to = jnp.where(dst < 0, pool.shape[0], dst)
        return pool.at[to].set(pool[jnp.clip(src, 0, pool.shape[0] - 1)], mode="drop")

    return jax.tree.map(copy, pages)


def validate(
    q: jax.Array,  # [T, N, H]
    ragged: Ragged,
    *,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Ragged:
    """`ragged` with page ids within the pool and lengths within the rows' tables.

    ValueError, naming argument, value and what is allowed, unless the arguments fit each other.
    """
    check_array("q", q, (None, None, head_dim), "[T, N, H] with the pages' H")
    dtype_name(q.dtype, "q.dtype")
    if q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q has {q.shape[1]} heads; it must be a multiple of the pages' {num_kv_heads} KV heads"
        )
    check_array("ragged.page_table", ragged.page_table, (None, None), "[S, MP]")
    num_rows = ragged.page_table.shape[0]
    check_array("ragged.kv_lens", ragged.kv_lens, (num_rows,), "[S]")
    check_array("ragged.cu_q_lens", ragged.cu_q_lens, (num_rows + 1,), "[S + 1]")
    check_array("ragged.num_decode", ragged.num_decode, (), "[]")
    check_array("ragged.slots", ragged.slots, (q.shape[0],), "[T]")
    for name in ("page_table", "kv_lens", "cu_q_lens", "num_decode", "slots"):
        check_int32(f"ragged.{name}", getattr(ragged, name))
    if ragged.decode_only and q.shape[0] != num_rows:
        raise ValueError(
            f"ragged.decode_only with {q.shape[0]} tokens and {num_rows} rows; they must be equal"
        )
    check_options(scale, window, soft_cap)
    if window is not None and window > MAX_WINDOW:
        raise ValueError(f"window is {window}; it must be None or in [1, 2**30]")
    return replace(
        ragged,
        page_table=jnp.clip(ragged.page_table, 0, num_pages - 1),
        kv_lens=jnp.clip(ragged.kv_lens, 0, ragged.page_table.shape[1] * page_size),
    )
