"""Rows with any number of new tokens on the TPU: tiles of query tokens against blocks of pages.

XLA makes two lists of tiles: whole ones, and small ones for the few tokens of a row that verifies a
draft or for the last few of a chunk. One program runs all tiles of a list: it copies a tile's
queries from token granularity, turns them to `[K, G * tile, H]` once, and walks the blocks of pages
that any of its tokens sees, pages copied ahead across tiles. Only blocks on the diagonal or at the
edge of the window pay for a mask. Results go out token by token where a tile is not full, into the
array that already holds the decoded rows.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import MASKED, Target, check_positive
from pallas_kernels.paged_attention import Ragged
from pallas_kernels.paged_attention.tpu_decode import Options
from pallas_kernels.paged_attention.tpu_layout import (
    LANES,
    SUBLANES,
    Layout,
    Stream,
    load_rows,
    score,
    spread,
    unpack,
    values_of,
    weigh,
)
from pallas_kernels.paged_attention.tpu_tiles import Words, from_words, list_tiles, to_words


@dataclass(frozen=True)
class PrefillConfig:
    """Query tokens of a tile and of a small tile (powers of two from 8 on; equal: no small ones),
    tokens of a block (rounded to whole pages, at least one), blocks in flight or in use."""

    tile: int
    small_tile: int
    block: int
    buffers: int

    def __post_init__(self) -> None:
        check_positive("block", self.block)
        for name in ("tile", "small_tile"):
            tokens = getattr(self, name)
            if tokens < SUBLANES or tokens & (tokens - 1):
                raise ValueError(f"{name} is {tokens}; it must be a power of two from 8 on")
        if self.small_tile > self.tile:
            raise ValueError(f"small_tile is {self.small_tile}; it must be at most {self.tile}")
        if self.buffers < 2:
            raise ValueError(f"buffers is {self.buffers}; it must be at least 2")


def rule(num_heads: int, layout: Layout, vmem: int) -> PrefillConfig:
    """512 query rows of one KV head (16 to 256 tokens) against blocks of 512 tokens, both halved
    until what is kept and what one head computes with take half of `vmem`."""
    group = num_heads // layout.num_kv_heads
    tile, block = 16, 512
    while tile < 256 and 2 * tile * group <= 512:
        tile *= 2

    def bytes_used() -> int:
        # acc, q and 2 copies each of the words of q and of the result; largest and total.
        kept = tile * num_heads * (layout.lanes * 20 + 2 * LANES * 4)
        copied = 2 * block * layout.token_rows * LANES * 4
        computed = 4 * tile * group * (block + layout.lanes) * 4
        return kept + copied + computed

    while bytes_used() > vmem // 2 and tile > 16 and tile * group > 128:
        tile //= 2
    while bytes_used() > vmem // 2 and block > max(layout.page_size, 128):
        block //= 2
    while bytes_used() > vmem // 2 and tile > 16:
        tile //= 2
    return PrefillConfig(tile, 16, block, 2)


@jax.named_scope("paged_prefill")
def prefill(
    q: jax.Array,  # [T, N, H]
    done: jax.Array,  # [T, N, H]; tokens [0, num_decode) are done
    data: jax.Array,
    scales: jax.Array | None,
    page_table: jax.Array,  # [S, MP], every id within the pool
    ragged: Ragged,
    layout: Layout,
    options: Options,
    config: PrefillConfig,
    vmem: int,
    target: Target,
) -> jax.Array:  # [T, N, H]
    """The rows behind num_decode, put beside the decoded ones; zeros for tokens of no row."""
    num_tokens, num_heads, head_dim = q.shape
    words = Words(num_heads, q.dtype.name, layout.pieces)
    is_decoded = jnp.arange(num_tokens, dtype=jnp.int32) < ragged.num_decode
    done = jnp.where(is_decoded[:, None, None], done, jnp.zeros_like(done))
    lanes = (0, layout.lanes - head_dim - layout.v_lane)
    out = to_words(jnp.pad(done, ((0, 0), (0, 0), (layout.v_lane, lanes[1]))), words)
    x = jnp.pad(q, ((0, config.tile), (0, 0), (0, layout.lanes - head_dim)))
    x = to_words(x, words)  # with a tile behind the end, where the last may read
    starts = ragged.cu_q_lens[:-1]
    num_rows = starts.shape[0]
    is_tiled = jnp.arange(num_rows, dtype=jnp.int32) >= ragged.num_decode
    q_lens = jnp.where(is_tiled, ragged.cu_q_lens[1:] - starts, 0)
    whole, rest = q_lens // config.tile, q_lens % config.tile
    is_small = (rest > 0) & (rest <= config.small_tile) & (config.small_tile < config.tile)
    counts = whole + ((rest > 0) & ~is_small).astype(jnp.int32)
    most = num_tokens // config.tile + min(num_rows, num_tokens)
    lists = [(config.tile, counts, jnp.zeros_like(whole), most)]
    if config.small_tile < config.tile:
        small = (config.small_tile, is_small.astype(jnp.int32), whole * config.tile, num_rows)
        lists.append(small)
    for tile, tiles, begin, limit in lists:
        listed = list_tiles(
            tile, tiles, begin, limit, q_lens, page_table.shape[1], ragged, layout, options
        )
        out = _run(
            x,
            out,
            data,
            scales,
            (page_table.reshape(-1), *listed),
            words=words,
            tile=tile,
            table_width=page_table.shape[1],
            layout=layout,
            options=options,
            config=config,
            vmem=vmem,
            target=target,
        )
    out = from_words(out, words)
    return out[:, :num_heads, layout.v_lane : layout.v_lane + head_dim]


def _run(
    x: jax.Array,  # [(T + tile) * rows, 128] words
    out: jax.Array,  # [T * rows, 128] words; comes back with the tiles in it
    data: jax.Array,
    scales: jax.Array | None,
    scalars: tuple[jax.Array, ...],
    *,
    words: Words,
    tile: int,
    table_width: int,
    layout: Layout,
    options: Options,
    config: PrefillConfig,
    vmem: int,
    target: Target,
) -> jax.Array:
    """All tiles of one list."""
    block_pages = max(1, config.block // layout.page_size)
    block_rows = block_pages * layout.page_size * layout.token_rows
    scratch: list[Any] = [
        pltpu.VMEM((config.buffers, block_rows, LANES), jnp.uint32),
        pltpu.SemaphoreType.DMA((config.buffers,)),
        pltpu.SMEM((4,), jnp.int32),
        *_tile_scratch(tile, words, layout, options),
    ]
    pools = [data]
    if scales is not None:
        pools.append(scales)
        scratch.append(pltpu.VMEM((config.buffers, block_pages, *scales.shape[1:]), jnp.float32))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    # The compiler would move a small enough pool to vector memory and back around the kernel.
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        partial(
            _kernel,
            words=words,
            tile=tile,
            block_pages=block_pages,
            table_width=table_width,
            layout=layout,
            options=options,
        ),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[anywhere, anywhere, *[in_hbm for _ in pools]],
            out_specs=anywhere,
            scratch_shapes=scratch,
        ),
        input_output_aliases={len(scalars) + 1: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=vmem,
        ),
        interpret=target.interpret,
        name=f"paged_prefill_{tile}",
    )(*scalars, x, out, *pools)


def _tile_scratch(tile: int, words: Words, layout: Layout, options: Options) -> list[Any]:
    """Two tiles of queries as words, one of results, and what `_attend` takes."""
    heads = layout.num_groups * layout.packing
    rows = tile * (words.num_heads // layout.num_kv_heads)
    return [
        pltpu.VMEM((2, tile * words.rows, LANES), jnp.uint32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((tile * words.rows, LANES), jnp.uint32),
        pltpu.SemaphoreType.DMA,
        pltpu.VMEM((heads, rows, layout.lanes), jnp.dtype(options.compute_dtype)),
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, layout.lanes), jnp.float32),
    ]


def _kernel(
    table: Any,
    tile_row: Any,
    tile_token: Any,
    tile_pos: Any,
    tile_size: Any,
    first: Any,
    last: Any,
    num_tiles: Any,
    q: Any,  # [(T + tile) * rows, 128]
    _: Any,  # out as it comes in
    data: Any,
    *refs: Any,
    words: Words,
    tile: int,
    block_pages: int,
    table_width: int,
    layout: Layout,
    options: Options,
) -> None:
    scales, *rest = refs if layout.is_quantised else (None, *refs)
    out, buffers, semaphores, cursor, q_in, q_semaphores, out_buffer, out_semaphore = rest[:8]
    queries, largest, total, acc, *scale_buffers = rest[8:]
    count = num_tiles[0]
    stream = Stream(
        layout=layout,
        block_pages=block_pages,
        table_width=table_width,
        num_items=count,
        table=table,
        row=tile_row,
        first=first,
        last=last,
        next_item=None,
        data=data,
        scales=scales,
        buffers=buffers,
        scale_buffers=scale_buffers[0] if scale_buffers else None,
        semaphores=semaphores,
        cursor=cursor,
    )
    block = block_pages * layout.page_size

    def copy_in(i: Any) -> Any:
        begin = pl.multiple_of(tile_token[i] * words.rows, SUBLANES)
        slot = lax.rem(i, 2)
        source = q.at[pl.ds(begin, tile * words.rows)]
        return pltpu.make_async_copy(source, q_in.at[slot], q_semaphores.at[slot])

    def each_copy_out(i: Any, act: Any) -> None:
        """The real tokens of a tile: some at a time, then one at a time."""
        many = min(8, out.shape[0] // words.rows)

        def step(tokens: int, begin: Any, j: Any, carry: Any) -> Any:
            local = pl.multiple_of((begin + j * tokens) * words.rows, SUBLANES)
            there = pl.multiple_of(tile_token[i] * words.rows + local, SUBLANES)
            source = out_buffer.at[pl.ds(local, tokens * words.rows)]
            act(
                pltpu.make_async_copy(
                    source, out.at[pl.ds(there, tokens * words.rows)], out_semaphore
                )
            )
            return carry

        times = lax.div(tile_size[i], many)
        lax.fori_loop(0, times, partial(step, many, 0), 0)
        lax.fori_loop(0, tile_size[i] - times * many, partial(step, 1, times * many), 0)

    @pl.when(count > 0)
    def _() -> None:
        stream.start()
        copy_in(0).start()

    def run(i: Any, carry: Any) -> Any:
        @pl.when(i + 1 < count)
        def _() -> None:
            copy_in(i + 1).start()

        copy_in(i).wait()
        _turn_in(q_in.at[lax.rem(i, 2)], queries, words, tile, layout)
        largest[...] = jnp.full(largest.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        pos = tile_pos[i]
        end = pos + tile_size[i]
        low = jnp.int32(0) if options.window is None else jnp.maximum(pos - options.window + 1, 0)

        def step(j: Any, carry: Any) -> Any:
            buffer = stream.receive(i, j)
            begin = j * block

            @pl.when((begin < low) | (begin + block > end))
            def _() -> None:
                stream.clear(buffer, low - begin, end - begin)

            attend = partial(
                _attend, stream, buffer, queries, largest, total, acc, pos - begin, tile, options
            )
            is_inside = begin + block <= pos + 1
            if options.window is not None:
                is_inside &= begin + options.window >= pos + tile
            if tile <= 16:
                attend(True)
            else:
                lax.cond(is_inside, partial(attend, False), partial(attend, True))
            return carry

        begin_block, end_block = stream.blocks(i)
        lax.fori_loop(begin_block, end_block, step, 0)

        @pl.when(i > 0)
        def _() -> None:
            each_copy_out(i - 1, lambda copy: copy.wait())

        _turn_out(acc, total, out_buffer, words, tile, layout)
        each_copy_out(i, lambda copy: copy.start())
        return carry

    lax.fori_loop(0, count, run, 0)

    @pl.when(count > 0)
    def _() -> None:
        each_copy_out(count - 1, lambda copy: copy.wait())


def _turn_in(source: Any, queries: Any, words: Words, tile: int, layout: Layout) -> None:
    """A tile's words `[tile * rows, 128]` as queries `[K, G * tile, H padded]`, g-major."""
    group = words.num_heads // layout.num_kv_heads
    for k in range(layout.num_kv_heads):
        heads = []
        for head in range(k * group, (k + 1) * group):
            half, index = divmod(head, words.heads)
            first = index * words.pieces
            pieces = [
                unpack(source[pl.ds(first + i, tile, stride=words.rows), :], half, words.dtype)
                for i in range(words.pieces)
            ]
            heads.append(jnp.concatenate(pieces, axis=1).astype(jnp.float32))
        queries[k] = jnp.concatenate(heads, axis=0).astype(queries.dtype)
    for k in range(layout.num_kv_heads, queries.shape[0]):
        queries[k] = jnp.zeros(queries.shape[1:], queries.dtype)


def _turn_out(acc: Any, total: Any, target: Any, words: Words, tile: int, layout: Layout) -> None:
    """acc / total `[K, G * tile, H padded]` as a tile's words `[tile * rows, 128]`."""
    group = words.num_heads // layout.num_kv_heads
    dtype = jnp.dtype(words.dtype)

    def bits(head: int, piece: int) -> jax.Array:
        k, g = divmod(head, group)
        where = slice(g * tile, (g + 1) * tile)
        x = acc[k, where, piece * LANES : (piece + 1) * LANES] / total[k, where, :]
        return pltpu.bitcast(x.astype(dtype).astype(jnp.float32), jnp.uint32)

    for index in range(min(words.heads, words.num_heads)):
        for piece in range(words.pieces):
            x = bits(index, piece)
            if words.halves == 2:
                x = x >> 16
                if index + words.heads < words.num_heads:
                    x |= bits(index + words.heads, piece)
            target[pl.ds(index * words.pieces + piece, tile, stride=words.rows), :] = x


def _attend(
    stream: Stream,
    buffer: Any,
    queries: Any,  # [K, G * tile, H padded]
    largest: Any,  # [K, G * tile, 128], one value in all lanes
    total: Any,  # the same
    acc: Any,  # [K, G * tile, H padded]
    pos: Any,  # of the tile's first token, counted from the block's
    tile: int,
    options: Options,
    is_masked: bool,
) -> None:
    """One block of pages, head by head."""
    layout = stream.layout
    block = stream.block_pages * layout.page_size
    rows = queries.shape[1]
    dtype = queries.dtype
    view = stream.buffers.at[buffer]
    visible = None
    if is_masked:
        token = lax.broadcasted_iota(jnp.int32, (rows, block), 0) & (tile - 1)
        behind = lax.broadcasted_iota(jnp.int32, (rows, block), 1) - token
        visible = behind <= pos
        if options.window is not None:
            visible &= behind > pos - options.window

    def step(g: Any, carry: Any) -> Any:
        k_words = load_rows(view, g, block, layout)
        v_words = load_rows(view, layout.v_row + g, block, layout) if layout.v_row else k_words
        scales = stream.scale_rows(buffer, g) if layout.is_quantised else None
        for slot in range(min(layout.packing, layout.num_kv_heads)):
            head = g * layout.packing + slot
            k = values_of(k_words, slot, layout, dtype)
            v = k
            if layout.v_row or layout.v_slot:
                v = values_of(v_words, slot + layout.v_slot, layout, dtype)
            x = score(queries[head], k) * options.scale
            if scales is not None:
                x = x * spread(scales, slot, 1, 1, layout)
            if options.soft_cap is not None:
                x = options.soft_cap * jnp.tanh(x / options.soft_cap)
            if visible is not None:
                x = jnp.where(visible, x, MASKED)
            before = largest[head]
            new = jnp.maximum(before, jnp.max(x, axis=1, keepdims=True))
            weights = jnp.exp(x - new[:, :1])
            shrink = jnp.exp(before - new)
            largest[head] = new
            total[head] = total[head] * shrink + jnp.sum(weights, axis=1, keepdims=True)
            if scales is not None:
                v_scale = spread(scales, layout.packing + slot, 1, 1, layout)
                if visible is not None:
                    v_scale = jnp.where(visible, v_scale, 0.0)
                weights = weights * v_scale
            acc[head] = acc[head] * shrink[:, :1] + weigh(weights, v)
        return carry

    lax.fori_loop(0, layout.num_groups, step, 0)
