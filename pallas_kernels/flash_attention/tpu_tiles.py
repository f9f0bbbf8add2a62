"""What the TPU kernels of flash attention share: tiles, block ranges, masks, scores.

A tile of queries is `heads` query heads of one group times `block_q` positions: `rows = heads *
block_q` rows that share one block of K and V. Row r is position `r % block_q`. Inside the kernels
scores are in base 2 (scale * log2(e) * q . k), because the chip's exponential is 2 ** x.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import MASKED
from pallas_kernels.flash_attention import Mask, Options
from pallas_kernels.flash_attention.tpu_config import Blocks

LANES = 128
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """How [B, S, N, H] queries and [B, Sk, K, H] keys are cut."""

    batch: int
    q_len: int
    kv_len: int
    kv_heads: int
    group: int
    head_dim: int
    heads: int  # query heads in a tile; divides the group
    block_q: int
    block_kv: int
    compute_kv: int  # divides block_kv

    @property
    def parts(self) -> int:
        """Tiles that a group of query heads is split into."""
        return self.group // self.heads

    @property
    def rows(self) -> int:
        return self.heads * self.block_q

    @property
    def q_blocks(self) -> int:
        return pl.cdiv(self.q_len, self.block_q)

    @property
    def kv_blocks(self) -> int:
        return pl.cdiv(self.kv_len, self.block_kv)

    def kv_steps(self, options: Options) -> int:
        """The most blocks of keys that one block of queries sees."""
        return _most_blocks(self.block_q, self.block_kv, self.kv_blocks, options)

    def q_steps(self, options: Options) -> int:
        """The most blocks of queries that one block of keys is seen by."""
        return _most_blocks(self.block_kv, self.block_q, self.q_blocks, options)

    @staticmethod
    def of(q: jax.Array, k: jax.Array, blocks: Blocks) -> "Tiles":
        batch, q_len, num_heads, head_dim = q.shape
        kv_len, kv_heads = k.shape[1:3]
        blocks = blocks.cut(q_len, kv_len)
        return Tiles(
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
            kv_heads=kv_heads,
            group=num_heads // kv_heads,
            head_dim=head_dim,
            heads=blocks.heads,
            block_q=blocks.block_q,
            block_kv=blocks.block_kv,
            compute_kv=blocks.compute_kv,
        )

    def queries(self, x: jax.Array) -> jax.Array:
        """[B, S, N, H] as [B, K * parts, heads, S padded with zeros, H]."""
        x = jnp.transpose(x, (0, 2, 1, 3))
        x = x.reshape(self.batch, -1, self.heads, self.q_len, self.head_dim)
        return _pad(x, 3, self.q_blocks * self.block_q, 0)

    def from_queries(self, x: jax.Array) -> jax.Array:
        """The inverse of `queries`, without the padding."""
        x = x[:, :, :, : self.q_len].reshape(self.batch, -1, self.q_len, self.head_dim)
        return jnp.transpose(x, (0, 2, 1, 3))

    def keys(self, x: jax.Array) -> jax.Array:
        """[B, Sk, K, H] as [B, K, Sk padded with zeros, H]."""
        return _pad(jnp.transpose(x, (0, 2, 1, 3)), 2, self.kv_blocks * self.block_kv, 0)

    def from_keys(self, x: jax.Array) -> jax.Array:
        return jnp.transpose(x[:, :, : self.kv_len], (0, 2, 1, 3))

    def row_vectors(self, x: jax.Array, padding: float) -> jax.Array:
        """[B, N, S] (one number a query) as [B, K * parts, q_blocks, 1, rows]."""
        x = _pad(x, 2, self.q_blocks * self.block_q, padding)
        x = x.reshape(self.batch, -1, self.heads, self.q_blocks, self.block_q)
        return jnp.swapaxes(x, 2, 3).reshape(self.batch, -1, self.q_blocks, 1, self.rows)

    def from_row_vectors(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.batch, -1, self.q_blocks, self.heads, self.block_q)
        x = jnp.swapaxes(x, 2, 3).reshape(self.batch, self.group * self.kv_heads, -1)
        return x[:, :, : self.q_len]

    def q_segments(self, x: jax.Array) -> jax.Array:
        """[B, S] as [B, q_blocks, 1, rows]; padding repeats the last query's segment."""
        x = _pad_last(x, self.q_blocks * self.block_q).reshape(self.batch, -1, 1, self.block_q)
        return jnp.tile(x, (1, 1, 1, self.heads))

    def kv_segments(self, x: jax.Array) -> jax.Array:
        """[B, Sk] as [B, kv_blocks, 1, block_kv]; padding repeats the last key's segment."""
        x = _pad_last(x, self.kv_blocks * self.block_kv)
        return x.reshape(self.batch, -1, 1, self.block_kv)

    def cost(self, options: Options, *, matmuls: int, dtype: Any) -> pl.CostEstimate:
        """For XLA's scheduler: `matmuls` products over the pairs that are seen, about."""
        seen = min(self.kv_len, options.window or self.kv_len)
        if options.causal and options.window is None:
            seen = max(1, seen - min(self.q_len, self.kv_len) // 2)
        pairs = self.batch * self.kv_heads * self.group * self.q_len * seen
        heads = self.kv_heads * (2 * self.group * self.q_len + 2 * self.kv_len)
        size = jnp.dtype(dtype).itemsize
        return pl.CostEstimate(
            flops=2 * matmuls * pairs * self.head_dim,
            transcendentals=pairs,
            bytes_accessed=self.batch * heads * self.head_dim * size,
        )


def _most_blocks(block: int, other: int, count: int, options: Options) -> int:
    """How many blocks of `other` positions meet what a block of `block` positions can see."""
    if options.window is None:
        return count
    span = block + options.window - 1
    return min(count, pl.cdiv(span - 1, other) + 1)


def _pad(x: jax.Array, axis: int, length: int, value: float) -> jax.Array:
    if x.shape[axis] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _pad_last(x: jax.Array, length: int) -> jax.Array:
    return x if x.shape[1] == length else jnp.pad(x, ((0, 0), (0, length - x.shape[1])), "edge")


def segment_blocks(mask: Mask, tiles: Tiles) -> list[jax.Array]:
    """Ids of queries and of keys, as kernels read them; empty where there are none."""
    if mask.q_segments is None or mask.kv_segments is None:
        return []
    return [tiles.q_segments(mask.q_segments), tiles.kv_segments(mask.kv_segments)]


def segment_refs(refs: Sequence[Any], others: int) -> tuple[Sequence[Any], Any, Any, Any]:
    """A kernel's last refs, `others` in number, without those that are there with segment ids: ids
    of rows and of keys (inputs, so first) and a column for one of them (scratch, so last)."""
    if len(refs) == others:
        return refs, None, None, None
    q_ids, kv_ids, *rest, column = refs
    return rest, q_ids, kv_ids, column


def block_tables(mask: Mask, options: Options, tiles: Tiles, *, by_kv: bool) -> list[jax.Array]:
    """What a kernel reads as scalars: q_offset [B]; for each block of queries the first and last
    block of keys it sees (`by_kv`: the other way round), flat [B * blocks], first > last where it
    sees none; with segment ids also least and greatest id of each block of queries and of keys.
    """
    batch = tiles.batch
    q_low = mask.q_offset[:, None] + jnp.arange(tiles.q_blocks, dtype=jnp.int32) * tiles.block_q
    q_high = q_low + (tiles.block_q - 1)  # past the last query: only lets more blocks through
    kv_low = jnp.arange(tiles.kv_blocks, dtype=jnp.int32) * tiles.block_kv
    kv_high = kv_low + (tiles.block_kv - 1)
    met = jnp.ones((batch, tiles.q_blocks, tiles.kv_blocks), bool)
    if options.causal:
        met &= kv_low <= q_high[..., None]
    if options.window is not None:
        met &= kv_high > q_low[..., None] - options.window
    ranges = []
    if segments := segment_blocks(mask, tiles):
        ranges = [f(ids, (2, 3)) for ids in segments for f in (jnp.min, jnp.max)]
        q_least, q_most, kv_least, kv_most = ranges
        met &= (q_least[..., None] <= kv_most[:, None]) & (kv_least[:, None] <= q_most[..., None])
    if by_kv:
        met = jnp.swapaxes(met, 1, 2)
    count = met.shape[2]
    some = jnp.any(met, axis=2)
    first = jnp.argmax(met, axis=2).astype(jnp.int32)
    last = count - 1 - jnp.argmax(met[..., ::-1], axis=2).astype(jnp.int32)
    first, last = jnp.where(some, first, 0), jnp.where(some, last, -1)
    return [x.reshape(-1) for x in (mask.q_offset, first, last, *ranges)]


def query_specs(
    tiles: Tiles, has_segments: bool
) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec, list[pl.BlockSpec]]:
    """Blocks of queries, of keys, of numbers by row and of segment ids, for kernels whose grid is
    [B, K * parts, q_blocks, steps over the keys that a block of queries sees]."""

    def kv_block(b: Any, i: Any, step: Any, tables: Any) -> Any:
        row = b * tiles.q_blocks
        following = row + jnp.minimum(i + 1, tiles.q_blocks - 1)
        return fetched_block(tables, row + i, following, step)

    q_spec = pl.BlockSpec(
        (None, None, tiles.heads, tiles.block_q, tiles.head_dim),
        lambda b, n, i, step, *tables: (b, n, 0, i, 0),
    )
    kv_spec = pl.BlockSpec(
        (None, None, tiles.block_kv, tiles.head_dim),
        lambda b, n, i, step, *tables: (
            b,
            lax.div(n, tiles.parts),
            kv_block(b, i, step, tables),
            0,
        ),
    )
    row_spec = pl.BlockSpec(
        (None, None, None, 1, tiles.rows), lambda b, n, i, step, *tables: (b, n, i, 0, 0)
    )
    segment_specs = [
        pl.BlockSpec((None, None, 1, tiles.rows), lambda b, n, i, step, *tables: (b, i, 0, 0)),
        pl.BlockSpec(
            (None, None, 1, tiles.block_kv),
            lambda b, n, i, step, *tables: (b, kv_block(b, i, step, tables), 0, 0),
        ),
    ]
    return q_spec, kv_spec, row_spec, segment_specs if has_segments else []


def fetched_block(tables: Any, row: Any, next_row: Any, step: Any) -> Any:
    """The block to have in memory at a step: the row's own as long as it sees more; after that the
    first of the next row, so that it is fetched early, and once. The last row keeps its last."""
    first, last = tables[1:3]
    block = first[row] + step
    after = jnp.where(next_row == row, jnp.maximum(last[row], 0), first[next_row])
    return jnp.where(block <= last[row], block, after)


@dataclass(frozen=True)
class Pair:
    """One block of queries against one block of keys, inside a kernel: positions are scalars."""

    tiles: Tiles
    options: Options
    q_low: jax.Array  # position of the first query
    kv_low: jax.Array  # position of the first key
    segments: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None  # ranges of ids

    @staticmethod
    def of(
        tiles: Tiles, options: Options, tables: Any, b: jax.Array, i: jax.Array, j: jax.Array
    ) -> "Pair":
        offsets, _, _, *ranges = tables
        # A step after the last block looks past the tables' end; what it reads is not used.
        q = b * tiles.q_blocks + jnp.minimum(i, tiles.q_blocks - 1)
        kv = b * tiles.kv_blocks + jnp.minimum(j, tiles.kv_blocks - 1)
        segments = None
        if ranges:
            q_least, q_most, kv_least, kv_most = ranges
            segments = (q_least[q], q_most[q], kv_least[kv], kv_most[kv])
        q_low = offsets[b] + i * tiles.block_q
        return Pair(tiles, options, q_low, j * tiles.block_kv, segments)

    def crosses(self) -> jax.Array:
        """Whether some query of the block does not see some key of the block."""
        tiles, options = self.tiles, self.options
        q_high = self.q_low + (tiles.block_q - 1)
        kv_high = self.kv_low + (tiles.block_kv - 1)
        crosses = jnp.bool_(False)
        if tiles.kv_len % tiles.block_kv:
            crosses |= kv_high >= tiles.kv_len
        if options.causal:
            crosses |= kv_high > self.q_low
        if options.window is not None:
            crosses |= self.kv_low <= q_high - options.window
        if self.segments is not None:
            q_least, q_most, kv_least, kv_most = self.segments
            crosses |= (q_least != q_most) | (kv_least != kv_most) | (q_least != kv_least)
        return crosses

    def pieces(self) -> tuple[jax.Array, jax.Array]:
        """Of the pieces of the block of keys: the first that may be seen, and the end of them."""
        tiles, options = self.tiles, self.options
        size = tiles.compute_kv
        begin, end = jnp.int32(0), jnp.int32(tiles.block_kv // size)
        if options.causal:
            q_high = self.q_low + (tiles.block_q - 1)
            end = jnp.minimum(end, lax.div(q_high - self.kv_low, size) + 1)
        if tiles.kv_len % tiles.block_kv:
            end = jnp.minimum(end, lax.div(tiles.kv_len - 1 - self.kv_low, size) + 1)
        if options.window is not None:
            hidden = self.q_low - options.window + 1 - self.kv_low
            begin = lax.div(jnp.maximum(hidden, 0), size)
        return begin, end

    def seen(
        self,
        start: jax.Array,
        segments: tuple[jax.Array, jax.Array] | None,
        *,
        kv_axis: int,
    ) -> jax.Array:
        """Which row sees which key of the piece that starts at key `start` of the block: bool
        [rows, compute_kv], or [compute_kv, rows] with kv_axis 0. `segments`: ids of rows and of
        keys, broadcastable so."""
        tiles, options = self.tiles, self.options
        size = tiles.compute_kv
        shape = [tiles.rows, tiles.rows]
        shape[kv_axis], shape[1 - kv_axis] = 1, tiles.rows
        # block_q is a power of two.
        row = lax.broadcasted_iota(jnp.int32, shape, 1 - kv_axis) & (tiles.block_q - 1)
        shape[kv_axis], shape[1 - kv_axis] = size, 1
        key = lax.broadcasted_iota(jnp.int32, shape, kv_axis)
        # A query's position, counted from the first of these keys.
        position = row + (self.q_low - self.kv_low - start)
        parts = []
        if options.causal:
            parts.append(key <= position)
        if tiles.kv_len % tiles.block_kv:
            parts.append(key < tiles.kv_len - self.kv_low - start)
        if options.window is not None:
            parts.append(key > position - options.window)
        if segments is not None:
            parts.append(segments[0] == segments[1])
        shape[kv_axis], shape[1 - kv_axis] = size, tiles.rows
        return jnp.broadcast_to(reduce(jnp.logical_and, parts, jnp.bool_(True)), shape)


def matmul(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """The product in float32, contracting axis `contract[0]` of a with `contract[1]` of b."""
    # One pass of the matrix unit would round float32 operands to bfloat16.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def base2_scores(products: jax.Array, options: Options) -> jax.Array:
    """q . k as log2(e) * score, without the mask."""
    if options.soft_cap is None:
        return products * (options.scale * LOG2E)
    return (options.soft_cap * LOG2E) * jnp.tanh(products * (options.scale / options.soft_cap))


def as_column(row: jax.Array) -> jax.Array:
    """[1, n] as [n, LANES], the same number in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def lanes(x: jax.Array, width: int) -> jax.Array:
    """[n, LANES] of equal lanes as [n, width]."""
    if width % LANES == 0:
        return jnp.tile(x, (1, width // LANES))
    return x[:, :width] if width < LANES else jnp.broadcast_to(x[:, :1], (x.shape[0], width))


# Where a running maximum starts: above MASKED, so that exp2(MASKED - maximum) is 0 and a row that
# sees nothing keeps the sum 0; below every score.
NOTHING_SEEN = 0.5 * MASKED
