"""Paged attention in plain XLA: the fast path on CPU; nothing in it is tied to CPU.

Owns its layout: K transposed, `k [P, K, H, page_size]`, and `v [P, K, page_size, H]`. XLA:CPU does
not vectorise a float sum over the minor axis, so both products reduce over another one: q.k over H
with the positions minor, weights.v over positions with H minor.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135) over
blocks of pages. Block boundaries are absolute positions of a row, and so the sums of a row do not
depend on its batch mates. Nothing is ever of size tokens x tokens or tokens x longest row.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import (
    MASKED,
    PAGE_DTYPES,
    QUANTISED,
    Spec,
    Target,
    dtype_name,
    quantise,
)
from pallas_kernels.paged_attention import Ragged, validate, validate_layout
from pallas_kernels.paged_attention import copy_pages as copy_pages
from pallas_kernels.paged_attention.token_major import page_bytes as page_bytes

# Positions per step of the decode loop and of the tile loop; query tokens per tile. The last
# few tokens of a row, and the few of a row that verifies a draft, take the small tile.
DECODE_BLOCK = 64
TILE_BLOCK = 128
GROUP, LARGE_GROUP, MANY_ROWS = 8, 16, 64
"""Rows that a CPU decodes at a time, longest first: GROUP, from MANY_ROWS rows on LARGE_GROUP.
Each group stops at its own longest row, and its block of K and V stays in the caches."""
TILE = 64
SMALL_TILE = 8
FEW_TOKENS = 32
"""A step of so few has small tiles alone: half the program, which is what a start waits for."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """One layer's pool; bfloat16 and fp8 as their bits where the scatter would copy them."""

    k: jax.Array  # [P, K, H, page_size]
    v: jax.Array  # [P, K, page_size, H]
    k_scale: jax.Array | None = None  # [P, K, page_size] float32, of quantised pages
    v_scale: jax.Array | None = None

    @property
    def dtype(self) -> str:
        """What the pool holds."""
        name = self.k.dtype.name
        return next((held for held, bits in _BITS.items() if bits == name), name)


# XLA:CPU copies the whole pool on a scatter of these, even of a donated one (bfloat16: jax 0.10).
_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}


@dataclass(frozen=True)
class Options:
    """The static part of one call."""

    scale: float
    window: int | None
    soft_cap: float | None


def allocate(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
    *,
    target: Target,
) -> Pages:
    """Pages of zeros for one layer."""
    validate_layout(num_pages, page_size, num_kv_heads, head_dim)
    name = dtype_name(dtype, "dtype", PAGE_DTYPES)
    stored = _BITS.get(name, name) if target.platform == "cpu" else name
    pages = Pages(
        k=jnp.zeros((num_pages, num_kv_heads, head_dim, page_size), stored),
        v=jnp.zeros((num_pages, num_kv_heads, page_size, head_dim), stored),
    )
    if name not in QUANTISED:
        return pages
    # Two arrays, not one twice: a donated pool has no buffer twice.
    k_scale, v_scale = (
        jnp.zeros((num_pages, num_kv_heads, page_size), jnp.float32) for _ in range(2)
    )
    return Pages(pages.k, pages.v, k_scale, v_scale)


def unsupported(spec: Spec | None, target: Target) -> str | None:
    """Nothing is."""
    return None


def to_stored(x: jax.Array, pages: Pages) -> tuple[jax.Array, jax.Array | None]:
    """`x [..., H]` as `pages` holds it, with its scales `[...]` where they are quantised."""
    scale = None
    if pages.k_scale is not None:
        x, scale = quantise(x, pages.dtype)
    x = x.astype(pages.dtype)
    return x if x.dtype == pages.k.dtype else lax.bitcast_convert_type(x, pages.k.dtype), scale


def _from_stored(x: jax.Array, held: str) -> jax.Array:
    """Stored `x` as float32, not scaled."""
    return (x if x.dtype == held else lax.bitcast_convert_type(x, jnp.dtype(held))).astype(
        jnp.float32
    )


def paged_attention(
    q: jax.Array,  # [T, N, H]
    pages: Pages,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    target: Target,
) -> jax.Array:  # [T, N, H]
    """See `pallas_kernels.paged_attention` for the contract."""
    num_kv_heads, head_dim = pages.k.shape[1:3]
    ragged = validate(
        q,
        ragged,
        num_pages=pages.k.shape[0],
        page_size=pages.k.shape[-1],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    options = Options(scale, window, soft_cap)
    num_tokens, num_heads, _ = q.shape
    num_rows = ragged.page_table.shape[0]
    scaled = q.astype(jnp.float32) * scale
    scaled = scaled.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    decode_lens = jnp.where(
        jnp.arange(num_rows, dtype=jnp.int32) < ragged.num_decode, ragged.kv_lens, 0
    )
    q_rows = _first(scaled, num_rows)
    group = num_rows
    if target.platform == "cpu":
        group = GROUP if num_rows < MANY_ROWS else LARGE_GROUP
    out = _decode(q_rows, pages, ragged.page_table, decode_lens, options, group)
    if not ragged.decode_only:
        out = _first(out, num_tokens)
        out = _tiles(scaled, out, pages, ragged, options)
    return out.reshape(num_tokens, num_heads, head_dim).astype(q.dtype)


def _first(x: jax.Array, count: int) -> jax.Array:
    """The first `count` rows of x, with zeros behind where x has fewer."""
    padding = max(0, count - x.shape[0])
    return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))[:count]


@jax.named_scope("paged_decode")
def _decode(
    q: jax.Array,  # [S, K, G, H] float32, scaled
    pages: Pages,
    page_table: jax.Array,  # [S, MP]
    kv_lens: jax.Array,  # [S]; 0: the row gives zeros
    options: Options,
    group: int,  # rows at a time
) -> jax.Array:  # [S, K, G, H] float32
    """One query per row. Groups of rows of like lengths, one group after another."""
    num_rows, _, queries, _ = q.shape
    # XLA:CPU makes matrix-vector products of a single query, 25 times slower than of two.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, int(queries == 1)), (0, 0)))
    table = _pad_table(page_table, max(1, DECODE_BLOCK // pages.k.shape[-1]))
    if num_rows <= group:
        return _decode_group(q, pages, table, kv_lens, options)[:, :, :queries]
    q, table, kv_lens = (_first(x, num_rows + -num_rows % group) for x in (q, table, kv_lens))
    order = jnp.argsort(kv_lens, descending=True)
    ordered = (q[order], table[order], kv_lens[order])

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        q, table, kv_lens = (lax.dynamic_slice_in_dim(x, i * group, group) for x in ordered)
        done = _decode_group(q, pages, table, kv_lens, options)
        return lax.dynamic_update_slice_in_dim(out, done, i * group, axis=0)

    out = lax.fori_loop(0, q.shape[0] // group, step, jnp.zeros_like(q))
    return jnp.zeros_like(q).at[order].set(out)[:num_rows, :, :queries]


def _decode_group(
    q: jax.Array,  # [R, K, G, H]
    pages: Pages,
    table: jax.Array,  # [R, whole blocks of pages]
    kv_lens: jax.Array,  # [R]
    options: Options,
) -> jax.Array:  # [R, K, G, H]
    """All rows of a group at once, block by block up to the longest."""
    page_size = pages.k.shape[-1]
    num_rows = q.shape[0]
    block = max(1, DECODE_BLOCK // page_size)
    width = block * page_size
    low, first = None, jnp.int32(0)
    if options.window is not None:
        low = jnp.maximum(kv_lens - options.window, 0)
        empty = jnp.int32(jnp.iinfo(jnp.int32).max)
        first = _div(jnp.min(jnp.where(kv_lens > 0, low, empty)), width)
    end = _div(jnp.max(kv_lens) + (width - 1), width)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, acc = state
        ids = lax.dynamic_slice_in_dim(table, i * block, block, axis=1)
        start = i * width
        kv = _gather(pages, ids, None if low is None else low - start, kv_lens - start)
        pos = start + jnp.arange(width, dtype=jnp.int32)
        visible = pos < kv_lens[:, None]  # [R, C]
        if low is not None:
            visible &= pos >= low[:, None]
        # Not a dot: XLA:CPU would write its result transposed.
        scores = jnp.sum(q[..., None] * kv.k[:, :, None], axis=3)  # [R, K, G, C]
        if kv.k_scale is not None:
            scores *= kv.k_scale[:, :, None]
        scores = _cap(scores, options)
        seen = visible[:, None, None, :]
        scores = jnp.where(seen, scores, MASKED)
        new = jnp.maximum(largest, jnp.max(scores, axis=-1))
        # Where a row has seen nothing yet these are ones; the next shrink is 0 and takes them away.
        weights = jnp.exp(scores - new[..., None])
        shrink = jnp.exp(largest - new)
        total = total * shrink + jnp.sum(weights, axis=-1)
        if kv.v_scale is not None:
            weights = jnp.where(seen, weights * kv.v_scale[:, :, None], 0.0)
        product = _einsum("skgc,skch->skgh", weights, kv.v)
        return new, total, acc * shrink[..., None] + product

    largest = jnp.full(q.shape[:3], MASKED, jnp.float32)
    state = (largest, jnp.zeros_like(largest), jnp.zeros_like(q))
    _, total, acc = lax.fori_loop(first, end, step, state)
    has_keys = (kv_lens > 0).reshape(num_rows, 1, 1, 1)
    return jnp.where(has_keys, acc / jnp.where(has_keys, total[..., None], 1.0), 0.0)


@jax.named_scope("paged_prefill")
def _tiles(
    q: jax.Array,  # [T, K, G, H] float32, scaled
    out: jax.Array,  # [T, K, G, H] float32; rows [0, num_decode) are done
    pages: Pages,
    ragged: Ragged,
    options: Options,
) -> jax.Array:
    """The rows behind num_decode, a tile of query tokens at a time, in the order of tokens."""
    num_tokens = q.shape[0]
    largest = TILE if num_tokens > FEW_TOKENS else SMALL_TILE
    num_rows = ragged.page_table.shape[0]
    table = _pad_table(ragged.page_table, max(1, TILE_BLOCK // pages.k.shape[-1]))
    starts = ragged.cu_q_lens[:-1]
    is_tiled = jnp.arange(num_rows, dtype=jnp.int32) >= ragged.num_decode
    q_lens = jnp.where(is_tiled, ragged.cu_q_lens[1:] - starts, 0)
    num_tiles = _div(q_lens + (largest - 1), largest)
    ends = jnp.cumsum(num_tiles, dtype=jnp.int32)
    q = _first(q, num_tokens + largest)  # a tile may begin at the last token
    out = _first(out, num_tokens + largest)

    def attend(size: int, start: jax.Array, row: jax.Array, done: jax.Array) -> jax.Array:
        tile = _tile(
            lax.dynamic_slice_in_dim(q, start, size),
            pages,
            table[row],
            ragged.kv_lens[row] - q_lens[row] + done,
            jnp.minimum(q_lens[row] - done, size),
            options,
        )
        return _first(tile, largest)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.sum(ends <= i, dtype=jnp.int32)
        done = (i - ends[row] + num_tiles[row]) * largest
        start = starts[row] + done
        small, large = partial(attend, SMALL_TILE), partial(attend, largest)
        if largest == SMALL_TILE:
            tile = small(start, row, done)
        else:
            # `out` stays outside: XLA:CPU would copy the whole of it into and out of the branches.
            is_small = q_lens[row] - done <= SMALL_TILE
            tile = lax.cond(is_small, small, large, start, row, done)
        # What a tile writes behind its row's end are zeros, and the next row's tiles come later.
        return lax.dynamic_update_slice_in_dim(out, tile, start, axis=0)

    return lax.fori_loop(0, ends[-1], step, out)[:num_tokens]


def _tile(
    q: jax.Array,  # [tile, K, G, H]: the tokens at positions q_pos, q_pos + 1, ...
    pages: Pages,
    table: jax.Array,  # [MP]: the row's pages
    q_pos: jax.Array,
    count: jax.Array,  # real tokens of the tile
    options: Options,
) -> jax.Array:  # [TILE, K, G, H]; zeros behind `count`
    """One tile of queries of one row against the blocks of pages that any of them sees."""
    size, num_kv_heads, group, head_dim = q.shape
    page_size = pages.k.shape[-1]
    block = max(1, TILE_BLOCK // page_size)
    width = block * page_size
    offsets = jnp.arange(size, dtype=jnp.int32)
    is_real = offsets < count
    q = jnp.where(is_real[:, None, None, None], q, 0.0)
    q = q.transpose(1, 2, 0, 3).reshape(num_kv_heads, group * size, head_dim)
    q_pos_all = q_pos + offsets
    high = q_pos + count
    low = jnp.int32(0)
    if options.window is not None:
        low = jnp.maximum(q_pos - (options.window - 1), 0)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, acc = state
        ids = lax.dynamic_slice_in_dim(table, i * block, block)
        start = i * width
        kv = _gather(pages, ids[None], (low - start)[None], (high - start)[None])
        kv = jax.tree.map(lambda x: x[0], kv)
        pos = start + jnp.arange(width, dtype=jnp.int32)
        visible = (pos <= q_pos_all[:, None]) & is_real[:, None]
        if options.window is not None:
            visible &= pos > q_pos_all[:, None] - options.window
        scores = _einsum("kqh,khc->kqc", q, kv.k)
        if kv.k_scale is not None:
            scores *= kv.k_scale[:, None]
        scores = _cap(scores, options).reshape(num_kv_heads, group, size, width)
        scores = jnp.where(visible, scores, MASKED)
        new = jnp.maximum(largest, jnp.max(scores, axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new[..., None]), 0.0)
        shrink = jnp.exp(largest - new)
        total = total * shrink + jnp.sum(weights, axis=-1)
        if kv.v_scale is not None:
            weights = jnp.where(visible, weights * kv.v_scale[:, None, None], 0.0)
        weights = weights.reshape(num_kv_heads, group * size, width)
        product = _einsum("kqc,kch->kqh", weights, kv.v)
        return new, total, acc * shrink[..., None] + product.reshape(acc.shape)

    largest = jnp.full((num_kv_heads, group, size), MASKED, jnp.float32)
    acc = jnp.zeros((num_kv_heads, group, size, head_dim), jnp.float32)
    state = (largest, jnp.zeros_like(largest), acc)
    _, total, acc = lax.fori_loop(_div(low, width), _div(high + (width - 1), width), step, state)
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    return out.transpose(2, 0, 1, 3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    """C positions of R rows, float32, not yet scaled; v is 0 at positions not asked for."""

    k: jax.Array  # [R, K, H, C]
    v: jax.Array  # [R, K, C, H]
    k_scale: jax.Array | None  # [R, K, C]
    v_scale: jax.Array | None


def _gather(pages: Pages, ids: jax.Array, low: jax.Array | None, high: jax.Array) -> Block:
    """The pages ids [R, B], which `validate` has put within the pool; C = B * page_size.

    Of a row's C positions [low, high) are asked for (None: from 0 on); others may hold NaN.
    Gathers (page, head) slices: each is contiguous, and v needs no transpose after.
    """
    num_pages, num_kv_heads, head_dim, page_size = pages.k.shape
    num_rows, block = ids.shape
    width = block * page_size
    slices = ids[:, None] * num_kv_heads + jnp.arange(num_kv_heads, dtype=jnp.int32)[:, None]

    def gather(pool: jax.Array) -> jax.Array:
        # Each slice as one long row: XLA:CPU copies that faster than a slice of two axes.
        flat = pool.reshape(num_pages * num_kv_heads, -1)
        return flat.at[slices].get(mode="promise_in_bounds")  # [R, K, B, ...]

    def where_asked(v: jax.Array, steps: int) -> jax.Array:
        """`v [R, K, n, ...]`, in which a position is so many steps of an index over n and more."""
        at = jnp.arange(width * steps, dtype=jnp.int32).reshape(v.shape[2], -1)
        asked = at < high[:, None, None] * steps
        if low is not None:
            asked &= at >= low[:, None, None] * steps
        return jnp.where(asked[:, None], v, 0.0)

    k = gather(pages.k).reshape(*slices.shape, head_dim, page_size).transpose(0, 1, 3, 2, 4)
    k = _from_stored(k.reshape(num_rows, num_kv_heads, head_dim, width), pages.dtype)
    by_position = (num_rows, num_kv_heads, width, head_dim)
    v = gather(pages.v)
    if pages.dtype == "float32":
        # XLA:CPU vectorises a loop over a whole slice; one over a position it writes out number
        # by number. (Of narrower types that costs more than what positions not asked for spare.)
        v = where_asked(v, head_dim).reshape(by_position)
    else:
        v = where_asked(_from_stored(v.reshape(by_position), pages.dtype), 1)
    k_scale = v_scale = None
    if pages.k_scale is not None and pages.v_scale is not None:
        flat = (num_rows, num_kv_heads, width)
        k_scale, v_scale = gather(pages.k_scale).reshape(flat), gather(pages.v_scale).reshape(flat)
    return Block(k, v, k_scale, v_scale)


def _div(x: jax.Array, by: int) -> jax.Array:
    """x // by for an x that is never negative: one instruction, where `//` takes a dozen."""
    return lax.div(x, jnp.int32(by))


def _cap(scores: jax.Array, options: Options) -> jax.Array:
    if options.soft_cap is None:
        return scores
    return options.soft_cap * jnp.tanh(scores / options.soft_cap)


def _pad_table(page_table: jax.Array, block: int) -> jax.Array:
    """`page_table` with whole blocks of columns, so that no slice of it is shifted at its end.

    At least two: of one block XLA:CPU knows that the loop over blocks runs once, and fuses the
    gather into the products (3 to 10 times slower).
    """
    columns = page_table.shape[1]
    return jnp.pad(page_table, ((0, 0), (0, max(2 * block, columns + -columns % block) - columns)))


_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
