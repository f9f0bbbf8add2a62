"""The page layout of the TPU kernels: 32-bit words, written by XLA, copied and read by the kernels.

`data [P, page_size * R, 128]` uint32: a page is one contiguous piece, a token is R of its rows, and
every word of a row holds one value of each of C vectors, C = 4 / bytes of a value, the first in the
low bits. Seen as its own dtype, a row of words is C rows, one for each vector, and so the vectors
of one kind are read with one strided load and need no unpacking. Which C vectors share a row:

    H > 64            C heads of K, then C heads of V: rows [K of all groups, V of all groups]
    H > 64, 2K <= C   all heads of K and V together in the only row
    H <= 64           C heads, K in the lanes [0, 64) and V in the lanes [64, 128)

Heads are padded to whole groups of C and H to a multiple of 128 lanes: M pieces of 128, each its
own row. Quantised pages have `scales [P, groups, rows, 128]` float32: for each token and group 8,
of its C = 4 heads of K, then of V; 16 tokens in a row (8 where page_size is no multiple of 16).

Words, because a chip cannot copy or scatter less than 32 bits of a row without reading around it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import QUANTISED

LANES = 128
HALF = LANES // 2
SUBLANES = 8

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@dataclass(frozen=True)
class Layout:
    """Where the vectors of a token stand in its rows."""

    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @cached_property
    def packing(self) -> int:
        """C, the vectors in a row of words."""
        return 4 // jnp.dtype(self.dtype).itemsize

    @property
    def is_quantised(self) -> bool:
        return self.dtype in QUANTISED

    @property
    def in_halves(self) -> bool:
        """Whether K and V of a head share a row of lanes."""
        return self.head_dim <= HALF

    @property
    def is_single(self) -> bool:
        """Whether K and V of all heads share the only row of words."""
        return not self.in_halves and 2 * self.num_kv_heads <= self.packing

    @property
    def num_groups(self) -> int:
        return -(-self.num_kv_heads // self.packing)

    @property
    def pieces(self) -> int:
        """M, the pieces of 128 lanes of one vector."""
        return -(-self.head_dim // LANES)

    @property
    def lanes(self) -> int:
        return self.pieces * LANES

    @property
    def token_rows(self) -> int:
        """R, the rows of one token."""
        kinds = 1 if self.in_halves or self.is_single else 2
        return kinds * self.num_groups * self.pieces

    @property
    def scale_tokens(self) -> int:
        """The tokens in a row of scales."""
        return 16 if self.page_size % 16 == 0 else 8

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """Of one page."""
        return self.num_groups, self.page_size // self.scale_tokens, LANES

    @property
    def v_row(self) -> int:
        """How many vectors' rows after K of a group its V stands."""
        return 0 if self.in_halves or self.is_single else self.num_groups

    @property
    def v_slot(self) -> int:
        """How many vectors after K of a head its V stands in the same row of words."""
        return self.num_kv_heads if self.is_single else 0

    @property
    def v_lane(self) -> int:
        return HALF if self.in_halves else 0


def _bits(x: jax.Array) -> jax.Array:
    """`x` as uint32 whose low bits are those of x."""
    unsigned = _BITS[x.dtype.itemsize]
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def pack(vectors: list[jax.Array]) -> jax.Array:
    """Vectors of one dtype as words, the first in the low bits."""
    width = 32 // len(vectors)
    words = _bits(vectors[0])
    for i, x in enumerate(vectors[1:], 1):
        words |= _bits(x) << jnp.uint32(i * width)
    return words


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def token_words(k: jax.Array, v: jax.Array, layout: Layout) -> jax.Array:
    """k and v `[T, K, H]` of the pages' dtype as the tokens' rows `[T, R, 128]`."""
    packing, padded = layout.packing, layout.num_groups * layout.packing
    if layout.in_halves:
        kv = jnp.concatenate([_pad(k, 2, HALF), _pad(v, 2, HALF)], axis=2)
        kv = _pad(kv, 1, padded)
    elif layout.is_single:
        kv = _pad(_pad(jnp.concatenate([k, v], axis=1), 1, packing), 2, layout.lanes)
    else:
        kv = jnp.concatenate([_pad(k, 1, padded), _pad(v, 1, padded)], axis=1)
        kv = _pad(kv, 2, layout.lanes)
    words = pack([kv[:, i::packing] for i in range(packing)])
    return words.reshape(-1, layout.token_rows, LANES)


def token_scales(k: jax.Array, v: jax.Array, layout: Layout) -> jax.Array:
    """Scales of k and v `[T, K]` as `[T, groups, 8]`."""
    shape = (-1, layout.num_groups, layout.packing)
    padded = layout.num_groups * layout.packing
    both = [_pad(x, 1, padded).reshape(shape) for x in (k, v)]
    return jnp.concatenate(both, axis=2)


# What follows runs within kernels.


def load_rows(block: Any, row: jax.Array | int, count: int, layout: Layout) -> list[jax.Array]:
    """One vector row of every token of `block [count * R, 128]`: M pieces `[count, 128]`."""
    stride = layout.token_rows
    if stride == 1:
        return [block[...]]
    first = row * layout.pieces
    return [block[pl.ds(first + i, count, stride=stride), :] for i in range(layout.pieces)]


@dataclass(frozen=True)
class Columns:
    """The order in which `all_values` gives the vectors of a block, which is that of its scores:
    `sections` runs over the tokens, each with some of a token's C vectors: section s has the
    vectors s, s + sections, s + 2 * sections, ... of a token in turn."""

    packing: int
    sections: int
    tokens: int

    @property
    def width(self) -> int:
        """Columns of a token in one section."""
        return self.packing // self.sections

    def shift(self, vectors: int) -> int:
        """How many columns behind a vector the one `vectors` after it stands."""
        along, across = divmod(vectors, self.sections)
        return across * self.width * self.tokens + along


def columns_of(layout: Layout, dtype: Any, tokens: int) -> Columns:
    """The order of columns when a block of `tokens` is computed with in `dtype`."""
    return Columns(layout.packing, 2 if _is_shifted(layout, dtype) else 1, tokens)


def exponent(layout: Layout, dtype: Any) -> int:
    """`all_values` are what the pages hold times 2**-exponent."""
    return 120 if _is_shifted(layout, dtype) else 0


def _is_shifted(layout: Layout, dtype: Any) -> bool:
    return layout.dtype == "float8_e4m3fn" and dtype == jnp.bfloat16


def all_values(words: list[jax.Array], layout: Layout, dtype: Any) -> jax.Array:
    """Pieces of words `[count, 128]` as `[count * C, H padded]`, in the order of `Columns`.

    float8_e4m3fn becomes bfloat16 by moving its bits, two values at a time: sign, and exponent and
    mantissa 4 bits down, which is 2**120 too small, since the exponents count from 7 and from 127.
    What is subnormal, under 1 / 28000 of the largest that a vector can hold, may count as 0.
    """
    if not _is_shifted(layout, dtype):
        return _join([pltpu.bitcast(x, jnp.dtype(layout.dtype)) for x in words]).astype(dtype)
    sections = []
    for section in (0, 1):
        pieces = []
        for x in words:
            x = x if section else x << jnp.uint32(8)
            sign = x & jnp.uint32(0x80008000)
            rest = (x & jnp.uint32(0x7F007F00)) >> jnp.uint32(4)
            pieces.append(pltpu.bitcast(sign | rest, jnp.bfloat16))
        sections.append(_join(pieces))
    return jnp.concatenate(sections, axis=0)


def values_of(words: list[jax.Array], slot: int, layout: Layout, dtype: Any) -> jax.Array:
    """Pieces of words `[count, 128]` as vector `slot` of each: `[count, H padded]`."""
    return _join([unpack(x, slot, layout.dtype) for x in words]).astype(dtype)


def unpack(words: jax.Array, slot: int, dtype: str) -> jax.Array:
    """Value `slot` of each word, exact in float32 (bfloat16 stays itself)."""
    if dtype == "float32":
        return pltpu.bitcast(words, jnp.float32)
    if dtype == "bfloat16":
        high = words & jnp.uint32(0xFFFF0000) if slot else words << jnp.uint32(16)
        return pltpu.bitcast(high, jnp.float32).astype(jnp.bfloat16)
    top = pltpu.bitcast(words << jnp.uint32(24 - 8 * slot) if slot < 3 else words, jnp.int32)
    if dtype == "int8":
        return (top >> 24).astype(jnp.float32)
    return _float8(top)


def _float8(top: jax.Array) -> jax.Array:
    """float8_e4m3fn in the top bits of an int32, as float32: its 7 bits become the top of exponent
    and mantissa of a number 2**120 too small, which is subnormal where they are: so it is made
    through a number that is not, 1 + mantissa, there. NaN becomes 480."""
    magnitude = (top >> 4) & 0x07F00000
    is_small = magnitude < 0x00800000
    bits = magnitude + jnp.where(is_small, 121 << 23, 120 << 23)
    value = pltpu.bitcast(bits, jnp.float32) - jnp.where(is_small, 2.0**-6, 0.0)
    return jnp.where(top < 0, -value, value)


def score(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [R, H] . k [C, H] in float32 `[R, C]`."""
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(q, k, dims, precision=precision, preferred_element_type=jnp.float32)


def weigh(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights [R, C] float32 times v [C, H], in float32 `[R, H]`.

    The matrix unit takes bfloat16: the weights go through it as two, what bfloat16 holds of them
    and the rest, one under the other, so that v is loaded into the unit once.
    """
    dims = (((1,), (0,)), ((), ()))
    if v.dtype == jnp.float32:
        precision = lax.Precision.HIGHEST
        return lax.dot_general(weights, v, dims, precision=precision)
    high = weights.astype(v.dtype)
    low = (weights - high.astype(jnp.float32)).astype(v.dtype)
    both = jnp.concatenate([high, low], axis=0)
    out = lax.dot_general(both, v, dims, preferred_element_type=jnp.float32)
    return out[: weights.shape[0]] + out[weights.shape[0] :]


def _join(pieces: list[jax.Array]) -> jax.Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


@dataclass(frozen=True)
class Stream:
    """Blocks of pages on their way from the pool into `buffers`, several ahead of the reader.

    Items (rows or tiles) come in order; item i needs the pages [first[i], last[i]) of its row's
    table, and next_item[i] is the first item from i on that needs any; without it all do. All three
    have an entry for `num_items`, the end. cursor: the item and the block to copy next, how many
    blocks were copied, how many read.
    """

    layout: Layout
    block_pages: int
    table_width: int
    num_items: Any
    table: Any  # [S * MP]
    row: Any  # [items], or None where an item is its row
    first: Any
    last: Any
    next_item: Any
    data: Any  # [P, page_size * R, 128]
    scales: Any  # [P, groups, rows, 128] or None
    buffers: Any  # [buffers, block_pages * page_size * R, 128]
    scale_buffers: Any  # [buffers, block_pages, groups, rows, 128] or None
    semaphores: Any  # [buffers]
    cursor: Any  # [4]

    def blocks(self, item: Any) -> tuple[Any, Any]:
        """The blocks [first, last) of an item."""
        return (
            lax.div(self.first[item], self.block_pages),
            lax.div(self.last[item] + (self.block_pages - 1), self.block_pages),
        )

    def start(self) -> None:
        """Before the first item: every buffer but one is on its way."""
        item = 0 if self.next_item is None else self.next_item[0]
        self.cursor[0] = item
        self.cursor[1] = lax.div(self.first[item], self.block_pages)
        self.cursor[2] = 0
        self.cursor[3] = 0
        lax.fori_loop(0, self.buffers.shape[0] - 1, lambda _, x: self._copy_next() or x, 0)

    def receive(self, item: Any, block: Any) -> Any:
        """The buffer in which `block` of `item`, the next in order, stands; copies one more."""
        self._copy_next()
        buffer = lax.rem(self.cursor[3], self.buffers.shape[0])
        self.cursor[3] = self.cursor[3] + 1
        self._each_page(item, block, buffer, lambda copy: copy.wait())
        return buffer

    def _copy_next(self) -> None:
        item, block = self.cursor[0], self.cursor[1]

        @pl.when(item < self.num_items)
        def _() -> None:
            buffer = lax.rem(self.cursor[2], self.buffers.shape[0])
            self._each_page(item, block, buffer, lambda copy: copy.start())
            _, end = self.blocks(item)
            is_last = block + 1 >= end
            following = item + 1 if self.next_item is None else self.next_item[item + 1]
            following = jnp.where(is_last, following, item)
            first, _ = self.blocks(following)
            self.cursor[0] = following
            self.cursor[1] = jnp.where(is_last, first, block + 1)
            self.cursor[2] = self.cursor[2] + 1

    def _each_page(self, item: Any, block: Any, buffer: Any, act: Any) -> None:
        """`act` on every copy of a block."""
        page_rows = self.layout.page_size * self.layout.token_rows
        row = item if self.row is None else self.row[item]
        begin = block * self.block_pages
        low = jnp.maximum(self.first[item] - begin, 0)
        high = jnp.minimum(self.last[item] - begin, self.block_pages)

        def step(i: Any, carry: Any) -> Any:
            page = self.table[row * self.table_width + begin + i]
            where = pl.ds(pl.multiple_of(i * page_rows, SUBLANES), page_rows)
            semaphore = self.semaphores.at[buffer]
            here = self.buffers.at[buffer, where]
            act(pltpu.make_async_copy(self.data.at[page], here, semaphore))
            if self.scales is not None:
                here = self.scale_buffers.at[buffer, i]
                act(pltpu.make_async_copy(self.scales.at[page], here, semaphore))
            return carry

        lax.fori_loop(low, high, step, 0)

    def clear(self, buffer: Any, low: Any, high: Any) -> None:
        """Zero the tokens of a block before `low` and from `high` on: 0 * NaN would be NaN."""
        token_rows = self.layout.token_rows
        page_rows = self.layout.page_size * token_rows
        index = lax.broadcasted_iota(jnp.int32, (page_rows, LANES), 0)

        def step(i: Any, carry: Any) -> Any:
            begin = i * page_rows
            where = pl.ds(pl.multiple_of(begin, SUBLANES), page_rows)
            row = index + begin
            is_kept = (row >= low * token_rows) & (row < high * token_rows)
            view = self.buffers.at[buffer]
            view[where, :] = jnp.where(is_kept, view[where, :], jnp.uint32(0))
            return carry

        page_size = self.layout.page_size
        low_pages = jnp.clip(lax.div(low + (page_size - 1), page_size), 0, self.block_pages)
        high_page = jnp.clip(lax.div(high, page_size), low_pages, self.block_pages)
        lax.fori_loop(0, low_pages, step, 0)
        lax.fori_loop(high_page, self.block_pages, step, 0)

    def scale_rows(self, buffer: Any, group: Any) -> jax.Array:
        """The rows of scales of one group of a block."""
        pages = [self.scale_buffers[buffer, i, group] for i in range(self.block_pages)]
        return pages[0] if len(pages) == 1 else jnp.concatenate(pages, axis=0)


def spread(rows: jax.Array, first: int, step: int, width: int, layout: Layout) -> jax.Array:
    """Of each token of a block the scales first, first + step, ... (`width` of them) in turn:
    `[1, tokens * width]` from the block's rows of scales."""
    per_row = layout.scale_tokens
    tokens = rows.shape[0] * per_row
    lane = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
    index = lax.rem(lax.div(lane, width), per_row) * SUBLANES + first + step * lax.rem(lane, width)
    rows = jnp.take_along_axis(rows, index, axis=1, mode="promise_in_bounds")
    # Now lane l of every row has what lane l of the result needs, where it comes from that row.
    needed = LANES // (width * per_row)
    size = max(SUBLANES, needed)
    pieces = []
    for begin in range(0, max(1, tokens * width // LANES) * needed, needed):
        tile = begin // size * size
        part = rows[tile : tile + size]
        lane = lax.broadcasted_iota(jnp.int32, part.shape, 1)
        source = begin - tile + lax.div(lane, width * per_row)
        own = lax.broadcasted_iota(jnp.int32, part.shape, 0) == source
        pieces.append(jnp.sum(jnp.where(own, part, 0.0), axis=0, keepdims=True))
    return _join(pieces)[:, : tokens * width]
