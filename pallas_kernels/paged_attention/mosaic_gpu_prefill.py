"""Rows of several query tokens on Hopper: prefill chunks and rows that verify a draft.

The structure is FlashAttention-3's (Shah et al., arXiv 2407.08608): two warpgroups of 64 query rows
take turns at the tensor cores and at the softmax, a third one fetches K and V. The rows of an item
(`mosaic_gpu_items`) are those of a group of heads, which shares K and V.

Blocks are persistent: block b takes the items b, b + blocks, ... of a list made on the device, the
longest first. A small number of tokens (a verifying row) still computes 128 rows: its time is that
of reading K and V.

8-bit K and V are widened by the fetching warpgroup; their scales multiply the columns of the
scores and of the weights.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASKED, Target
from pallas_kernels.mosaic_gpu import load
from pallas_kernels.paged_attention import Ragged
from pallas_kernels.paged_attention.mosaic_gpu_items import Shape, packing, plan
from pallas_kernels.paged_attention.mosaic_gpu_tiles import (
    Options,
    PageTiles,
    compiler_params,
    compute_dtype,
    interpreting,
    matmul,
    swizzled,
    to_log2,
    zero_unowned,
)
from pallas_kernels.paged_attention.token_major import Pages

BLOCKS = 132  # multiprocessors of an H200
i32 = jnp.int32
# Registers for each thread of a computing and of the fetching warpgroup; 2 * a + b <= 512.
REGISTERS = {False: (232, 48), True: (216, 80)}
PLACES = 4  # pieces of a tile whose places fit into the fetching warpgroup's registers


@dataclass(frozen=True)
class PrefillConfig:
    """`tile`: positions per step, a multiple of 64. `stages`: tiles in the ring."""

    tile: int
    stages: int


def rule(head_dim: int, itemsize: int) -> PrefillConfig:
    """The scores of a tile, their scales and the output share the registers; the ring fills shared
    memory."""
    tile = 128 if head_dim <= 128 and itemsize > 1 else 64
    return PrefillConfig(tile, stages={64: 4, 128: 3}.get(head_dim, 2))


@jax.named_scope("paged_prefill")
def prefill(
    q: jax.Array,  # [T, N, H]
    out: jax.Array,  # [T, N, H]: what tokens of no tiled row keep
    pages: Pages,
    ragged: Ragged,
    *,
    options: Options,
    config: PrefillConfig,
    target: Target,
) -> jax.Array:  # [T, N, H]
    """`out` with the tokens of the rows behind num_decode written."""
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // pages.num_kv_heads
    heads, tokens = packing(group)
    shape = Shape(
        heads=heads,
        chunks=group // heads,
        tokens=tokens,
        group=group,
        num_kv_heads=pages.num_kv_heads,
        head_dim=head_dim,
        quantised=pages.scales is not None,
        mid=compute_dtype(q.dtype, pages.data.dtype),
        out_dtype=q.dtype,
    )
    missing = max(0, tokens - num_tokens)  # an item's copy of q must lie within it
    padding = ((0, missing), (0, 0), (0, 0))
    q, out = jnp.pad(q.astype(shape.mid), padding), jnp.pad(out, padding)
    tiles, count = plan(ragged, q.shape[0], shape)
    operands = [q, pages.data, ragged.page_table, tiles, count]
    if pages.scales is not None:
        operands.append(pages.scales)
    out = _attend(operands, out, shape, options, config, target)
    return out[:num_tokens]


def _attend(
    operands: list[jax.Array],
    out: jax.Array,
    shape: Shape,
    options: Options,
    config: PrefillConfig,
    target: Target,
) -> jax.Array:
    q, data, _, items, *_ = operands
    interprets = interpreting(target)
    columns = shape.num_kv_heads * shape.chunks
    kernel = _Kernel(
        shape=shape,
        options=options,
        config=config,
        tiles=PageTiles(data.shape, config.tile, shape.quantised),
        page_dtype=data.dtype,
        num_tokens=q.shape[0],
        columns=columns,
        blocks=min(2 if interprets else BLOCKS, items.shape[0] * columns),
        interprets=interprets,
    )
    call = plgpu.kernel(
        kernel.body,
        out_type=(),
        scratch_types=_scratch(kernel),
        grid=(kernel.blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        kernel_name="paged_prefill",
        compiler_params=compiler_params(),
        interpret=target.interpret or None,
    )
    out_ref = jax.new_ref(out)
    call(*operands, out_ref)
    return out_ref[...]


@dataclass(frozen=True)
class _Kernel:
    """The kernel of one call: its static sizes, and what its warpgroups do."""

    shape: Shape
    options: Options
    config: PrefillConfig
    tiles: PageTiles
    page_dtype: Any
    num_tokens: int
    columns: int  # items of the same tokens: KV heads x chunks of their groups
    blocks: int
    interprets: bool

    def each_item(self, count: Any, run: Any) -> None:
        """run(item, is_first, is_last) for the items of this block."""
        block = lax.axis_index("block")
        total = count[0] * self.columns
        steps = lax.div(jnp.maximum(total - block, 0) + (self.blocks - 1), i32(self.blocks))

        @pl.loop(0, steps)
        def _(step: jax.Array) -> None:
            run(block + step * self.blocks, step == 0, step == steps - 1)

    def span(self, plan: Any, item: jax.Array) -> tuple[Any, ...]:
        """An item: row, column, first token of its copy of q and that token's position, the tokens
        [begin, end) of it that are its own, positions [low, high), tiles [first, last)."""
        options, tile, columns = self.options, self.config.tile, i32(self.columns)
        tokens = self.shape.tokens
        index, column = lax.div(item, columns), lax.rem(item, columns)
        row, token, position, size = (plan[index, i] for i in range(4))
        moved = jnp.maximum(token + tokens - self.num_tokens, 0)
        low = i32(0)
        if options.window is not None:
            low = jnp.maximum(position - (options.window - 1), 0)
        high = position + size
        first, last = lax.div(low, i32(tile)), lax.div(high + (tile - 1), i32(tile))
        own = (moved, moved + size)
        return row, column, token - moved, position - moved, own, (low, high), (first, last)

    def compute(self, refs: Any, smem: Any, bars: Any, warpgroup: int) -> None:
        shape, options, interprets = self.shape, self.options, self.interprets
        tile, stages = self.config.tile, self.config.stages
        head_dim, tokens, mid, quantised = shape.head_dim, shape.tokens, shape.mid, shape.quantised
        q_ref, plan, count, out_ref = refs
        # q has been read when the output takes its place.
        q_smem, out_smem = smem[f"q_or_out{warpgroup}"]
        by_row = plgpu.Layout.WGMMA.reduce(1)
        pieces, filled = shape.pieces(warpgroup), bars[f"q{warpgroup}"]

        def head_of(column: jax.Array) -> jax.Array:
            """The first query head of a column of items."""
            chunk = lax.rem(column, i32(shape.chunks))
            return lax.div(column, i32(shape.chunks)) * shape.group + chunk * shape.heads

        def turn() -> None:
            plgpu.barrier_arrive(bars["turn"])
            plgpu.barrier_wait(bars["turn"])

        def run(item: jax.Array, is_first: jax.Array, is_last: jax.Array) -> None:
            _, column, token, position, own, (_, high), (first, last) = self.span(plan, item)
            head = head_of(column)
            for g, t, size, row in pieces:
                source = q_ref.at[pl.ds(token + t, size), head + g]
                plgpu.copy_gmem_to_smem(source, q_smem.at[pl.ds(row, size)], filled)
            plgpu.barrier_wait(filled)

            def step(j: jax.Array, carry: Any, masks: bool) -> Any:
                acc, largest, total = carry
                i = j - first
                slot = lax.rem(i, i32(stages))
                will_refill = j + stages < last
                plgpu.barrier_wait(bars["k"].at[slot])

                def multiply(ref: Any) -> jax.Array:
                    plgpu.wgmma(ref, q_smem, smem["k"].at[slot].T)
                    turn()
                    return ref[...]

                scores = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((64, tile), jnp.float32))
                if quantised:
                    scores = scores * _columns(smem["scales"].at[slot, 0], scores)
                    plgpu.commit_smem()  # orders these reads before the TMA that follows
                pl.when(will_refill)(lambda: plgpu.barrier_arrive(bars["k_free"].at[slot]))
                scores = to_log2(scores, options)
                if masks:
                    scores = jnp.where(visible(j * tile), scores, MASKED)
                new = jnp.maximum(largest, jnp.max(scores, axis=1))
                shrink = jnp.exp2(largest - new)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(new, scores.shape, [0]))
                acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
                total = total * shrink + jnp.sum(weights, axis=1)
                if quantised:
                    plgpu.barrier_wait(bars["v"].at[slot])
                    # The scales of positions that nobody owns may be NaN.
                    weights = weights * _columns(smem["scales"].at[slot, 1], weights)
                    plgpu.commit_smem()
                    if masks:
                        weights = jnp.where(visible(j * tile), weights, 0.0)
                rounded = weights.astype(mid)
                acc, new, total, rounded = lax.optimization_barrier((acc, new, total, rounded))
                if interprets:  # the interpreter wants its operands in shared memory
                    smem["p"].at[warpgroup][...] = rounded
                    plgpu.commit_smem()
                plgpu.barrier_arrive(bars["turn"])
                if not quantised:
                    plgpu.barrier_wait(bars["v"].at[slot])
                plgpu.barrier_wait(bars["turn"])
                if interprets:
                    acc = acc + matmul((64, head_dim), smem["p"].at[warpgroup], smem["v"].at[slot])
                else:

                    def accumulate(ref: Any) -> None:
                        plgpu.wgmma(ref, rounded, smem["v"].at[slot])

                    acc = pl.run_state(accumulate)(plgpu.WGMMAAccumulatorRef.init(acc))
                pl.when(will_refill)(lambda: plgpu.barrier_arrive(bars["v_free"].at[slot]))
                return acc, new, total

            def visible(at: jax.Array) -> jax.Array:
                layout = plgpu.Layout.WGMMA
                row = plgpu.broadcasted_iota(i32, (64, tile), 0, layout=layout) + warpgroup * 64
                seen_from = position + lax.rem(row, i32(tokens))
                key = plgpu.broadcasted_iota(i32, (64, tile), 1, layout=layout) + at
                seen = key <= seen_from
                if options.window is not None:
                    seen &= key > seen_from - options.window
                return seen

            acc = plgpu.layout_cast(jnp.zeros((64, head_dim), jnp.float32), plgpu.Layout.WGMMA)
            largest = plgpu.layout_cast(jnp.full((64,), MASKED, jnp.float32), by_row)
            total = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), by_row)
            # Tiles [clear, full) are seen whole by all tokens; before and behind, the mask speaks.
            query = position + own[0]
            full = jnp.clip(lax.div(query + 1, i32(tile)), first, last)
            clear = first
            if options.window is not None:
                outside = jnp.maximum(high - options.window, 0)
                clear = jnp.clip(lax.div(outside + (tile - 1), i32(tile)), first, last)
                full = jnp.maximum(full, clear)
            if warpgroup == 1:
                turn()
            carry = (acc, largest, total)
            if options.window is not None:
                carry = lax.fori_loop(first, clear, lambda j, c: step(j, c, True), carry)
            carry = lax.fori_loop(clear, full, lambda j, c: step(j, c, False), carry)
            carry = lax.fori_loop(full, last, lambda j, c: step(j, c, True), carry)
            if warpgroup == 0:
                turn()
            pl.when(jnp.logical_not(is_last))(lambda: plgpu.barrier_arrive(bars["done"]))
            acc, _, total = carry
            # Rows of other tokens may hold anything, but are not written. The item is looked up
            # again: what the loops need not keep are registers for them.
            _, column, token, _, own, _, _ = self.span(plan, item)
            head = head_of(column)
            acc = acc / lax.broadcast_in_dim(total, acc.shape, [0])
            out_smem[...] = acc.astype(shape.out_dtype)
            plgpu.commit_smem()
            is_whole = own[1] - own[0] == tokens

            @pl.when(is_whole)
            def _() -> None:
                for g, t, size, row in pieces:
                    to = out_ref.at[pl.ds(token + t, size), head + g]
                    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(row, size)], to)

            @pl.when(jnp.logical_not(is_whole))
            def _() -> None:
                for g, t, size, row in pieces:

                    @pl.loop(jnp.maximum(own[0], t), jnp.minimum(own[1], t + size))
                    def _(i: jax.Array, g: int = g, t: int = t, row: int = row) -> None:
                        to = out_ref.at[pl.ds(token + i, 1), head + g]
                        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(row + i - t, 1)], to)

            plgpu.wait_smem_to_gmem(0)

        self.each_item(count, run)

    def fetch(self, refs: Any, smem: Any, bars: Any) -> None:
        shape, tiles, tile, stages = self.shape, self.tiles, self.config.tile, self.config.stages
        quantised, head_dim = shape.quantised, shape.head_dim
        pool, table, plan, count, scales = refs

        def run(item: jax.Array, is_first: jax.Array, is_last: jax.Array) -> None:
            row, column, _, _, _, (low, high), (first, last) = self.span(plan, item)
            combined = lax.div(column, i32(shape.chunks)) * 2

            def ids(j: jax.Array) -> list[Any]:
                return tiles.locate(table.at[row], j, high) if tiles.pieces <= PLACES else []

            def copy(j: jax.Array, side: int, places: list[Any], to: Any, barrier: Any) -> None:
                for begin in range(0, tiles.pieces, PLACES):
                    some = range(begin, min(begin + PLACES, tiles.pieces))
                    part = places or tiles.locate(table.at[row], j, high, some)
                    tiles.fetch(pool, part, combined + side, to, barrier, begin)

            def start(j: jax.Array, side: int, places: list[Any]) -> None:
                """Tile j's K (side 0) or V (side 1), once its slot is free."""
                name = "kv"[side]
                slot = lax.rem(j - first, i32(stages))
                ready, ring = bars[name].at[slot], smem[name].at[slot]

                @pl.when(j - first >= stages)
                def _() -> None:
                    plgpu.barrier_wait(bars[f"{name}_free"].at[slot])

                if side == 0:
                    copy(j, side, places, ring, ready)
                    return
                is_edge = (j * tile < low) | (j * tile + tile > high)

                @pl.when(jnp.logical_not(is_edge))
                def _() -> None:
                    copy(j, side, places, ring, ready)

                @pl.when(is_edge)
                def _() -> None:
                    copy(j, side, places, ring, bars["edge"])
                    plgpu.barrier_wait(bars["edge"])
                    zero_unowned(ring, j * tile, low, high)
                    for _ in range(tiles.pieces):
                        plgpu.barrier_arrive(ready)

            def fetch_raw(side: int, places: list[Any]) -> None:
                name = "kv"[side]
                raw = smem[f"{name}_raw"]
                tiles.fetch(pool, places, combined + side, raw, bars[f"{name}_raw"])

            def widen(j: jax.Array, side: int, places: list[Any], following: list[Any]) -> None:
                """Tile j's K or V from its 8-bit copy to the ring; then the next copy begins."""
                name = "kv"[side]
                slot = lax.rem(j - first, i32(stages))
                plgpu.barrier_wait(bars[f"{name}_raw"])

                @pl.when(j - first >= stages)
                def _() -> None:
                    plgpu.barrier_wait(bars[f"{name}_free"].at[slot])

                ready = bars[name].at[slot]
                tiles.fetch_scales(
                    scales, places, combined + side, smem["scales"].at[slot, side], ready
                )
                raw, ring = smem[f"{name}_raw"], smem[name].at[slot]
                for r in range(0, tile, 64):
                    for c in range(0, head_dim, 64):  # few registers at a time
                        part = (pl.ds(r, 64), pl.ds(c, 64))
                        x = load(raw.at[part], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                        ring.at[part][...] = x.astype(shape.mid)
                if side == 1 and self.page_dtype != jnp.int8:
                    zero_unowned(ring, j * tile, low, high)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready)
                pl.when(j + 1 < last)(lambda: fetch_raw(side, following))

            # The ring is that of the item before until both warpgroups left it.
            pl.when(jnp.logical_not(is_first))(lambda: plgpu.barrier_wait(bars["done"]))
            begin = ids(first)
            if quantised:
                fetch_raw(0, begin)
                fetch_raw(1, begin)

            def step(j: jax.Array, places: list[Any]) -> list[Any]:
                following = ids(j + 1)  # read before the waits, which hide their latency
                for side in range(2):
                    if quantised:
                        widen(j, side, places, following)
                    else:
                        start(j, side, places)
                return following

            lax.fori_loop(first, last, step, begin)

        self.each_item(count, run)

    def body(self, *refs: Any, smem: Any, bars: Any) -> None:
        quantised = self.shape.quantised
        q_ref, pool, table, plan, count, *rest = refs
        scales, out_ref = (rest[0], rest[1]) if quantised else (None, rest[0])
        index = lax.axis_index("wg")
        most, fewest = REGISTERS[quantised]
        for warpgroup in range(2):

            @pl.when(index == warpgroup)
            def _(warpgroup: int = warpgroup) -> None:
                plgpu.set_max_registers(most, action="increase")
                self.compute((q_ref, plan, count, out_ref), smem, bars, warpgroup)

        @pl.when(index == 2)
        def _() -> None:
            plgpu.set_max_registers(fewest, action="decrease")
            self.fetch((pool, table, plan, count, scales), smem, bars)


def _columns(ref: Any, like: jax.Array) -> jax.Array:
    """A vector over positions, as columns of `like`."""
    x = load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(x, like.shape, [1])


def _scratch(kernel: _Kernel) -> dict[str, dict[str, Any]]:
    """Shared memory and barriers of a block."""
    shape, head_dim = kernel.shape, kernel.shape.head_dim
    tile, stages = kernel.config.tile, kernel.config.stages
    ring = swizzled((stages, tile, head_dim), shape.mid)
    q_or_out = plgpu.RefUnion(
        swizzled((64, head_dim), shape.mid), plgpu.SMEM((64, head_dim), shape.out_dtype)
    )
    smem = {
        **{f"q_or_out{i}": q_or_out for i in range(2)},
        "k": ring,
        "v": ring,
    }
    if kernel.interprets:
        smem["p"] = swizzled((2, 64, tile), shape.mid)
    copies = kernel.tiles.pieces
    widened = plgpu.Barrier(num_arrivals=copies + 1, num_barriers=stages)
    filled = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    bars = {
        "q0": plgpu.Barrier(num_arrivals=len(shape.pieces(0))),
        "q1": plgpu.Barrier(num_arrivals=len(shape.pieces(1))),
        "k": widened if shape.quantised else filled,
        "v": widened if shape.quantised else filled,
        "k_free": free,
        "v_free": free,
        "turn": plgpu.Barrier(num_arrivals=2),
        "done": plgpu.Barrier(num_arrivals=2),
    }
    if shape.quantised:
        raw = swizzled((tile, head_dim), kernel.page_dtype, 64)
        smem |= {
            "k_raw": raw,
            "v_raw": raw,
            "scales": plgpu.SMEM((stages, 2, tile), jnp.float32),
        }
        bars["k_raw"] = bars["v_raw"] = plgpu.Barrier(num_arrivals=copies)
    else:
        bars["edge"] = plgpu.Barrier(num_arrivals=copies)
    return {"smem": smem, "bars": bars}
