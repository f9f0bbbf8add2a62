"""Decode rows on Hopper: one query token per row, split over the row's length.

The products are turned round ("swap-AB"), so that the few query heads of a KV head are the narrow
side of the wgmma: S^T [tile, M] = K [tile, H] Q^T [H, M] and O^T [H, M] = V^T [H, tile] P^T. M is G
rounded up to 8, not 64: the scores of a tile take a few registers for each thread, two blocks fit
on a multiprocessor, and the tensor cores read K and V once. One warpgroup computes, another one
fetches pages by TMA into a ring and turns 8-bit V into 16-bit.

A row's tiles are those of absolute positions and its splits follow from its own length (for the
same shapes), so its bits do not depend on its batch mates. Splits are weighed by their log-sum-exp
afterwards (Flash-Decoding).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASKED, Target
from pallas_kernels.mosaic_gpu import LOG2E, load
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

SMEM_PER_BLOCK = 232448 - 1024  # of an H200; the compiler wants some for itself
SMEM_PER_SM = 233472
MOST_SPLITS = 64  # their combination is a chain of reads
i32 = jnp.int32


@dataclass(frozen=True)
class DecodeConfig:
    """`tile`: positions per step, a multiple of 64. `stages`: tiles in the ring. `splits`: blocks
    that share a row and head; 0 chooses it by the number of rows and the longest possible row."""

    tile: int
    stages: int
    splits: int = 0


def rule(head_dim: int, itemsize: int, group: int) -> DecodeConfig:
    """Tiles of about 32 KB of K and V, and as long a ring as lets two blocks share a
    multiprocessor: about 190 KB of pages in flight there."""
    tile = 64 if head_dim * itemsize >= 128 else 128
    width = -(-group // 8) * 8
    shares = head_dim <= 128 and width <= 16  # else 128 registers for each thread are too few
    budget = SMEM_PER_SM // 2 - 2048 if shares else SMEM_PER_BLOCK
    fixed = width * (head_dim + tile) * 2 + head_dim * width * 4 + 2048
    if itemsize == 1:
        fixed += 2 * tile * head_dim * 2
    stage = 2 * tile * (head_dim * itemsize + (4 if itemsize == 1 else 0))
    return DecodeConfig(tile, max(2, min(8, (budget - fixed) // stage)))


def num_splits(num_rows: int, num_kv_heads: int, longest: int, config: DecodeConfig) -> int:
    """How many blocks share a row and head, so that two blocks for each of 132 multiprocessors have
    work and the last wave is well filled; never more than a row has tiles."""
    most = -(-longest // config.tile)
    if config.splits:
        return min(config.splits, most)
    slots, blocks = 264, num_rows * num_kv_heads
    best, best_cost = 1, math.inf
    for splits in range(1, min(most, MOST_SPLITS, max(1, slots // blocks) + 4) + 1):
        waves = -(-blocks * splits // slots)
        cost = waves / splits * (1 + 0.01 * splits if splits > 1 else 1)
        if cost < best_cost * 0.95:
            best, best_cost = splits, cost
    return best


@dataclass(frozen=True)
class _Shape:
    """The static sizes of one call."""

    num_rows: int
    num_kv_heads: int
    width: int  # query heads of a KV head, rounded up to 8
    head_dim: int
    splits: int
    quantised: bool
    mid: Any  # dtype of the wgmma operands
    out_dtype: Any


@jax.named_scope("paged_decode")
def decode(
    q: jax.Array,  # [S, N, H]
    pages: Pages,
    page_table: jax.Array,  # [S, MP]
    kv_lens: jax.Array,  # [S]; 0: the row gives zeros
    *,
    options: Options,
    config: DecodeConfig,
    target: Target,
) -> jax.Array:  # [S, N, H]
    """Attention of one token per row."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, page_size = pages.num_kv_heads, pages.data.shape[1]
    group = num_heads // num_kv_heads
    width = -(-group // 8) * 8
    mid = compute_dtype(q.dtype, pages.data.dtype)
    longest = page_table.shape[1] * page_size
    if options.window is not None:
        longest = min(longest, options.window + config.tile)
    shape = _Shape(
        num_rows=num_rows,
        num_kv_heads=num_kv_heads,
        width=width,
        head_dim=head_dim,
        splits=num_splits(num_rows, num_kv_heads, longest, config),
        quantised=pages.scales is not None,
        mid=mid,
        out_dtype=q.dtype,
    )
    packed = q.astype(mid).reshape(num_rows, num_kv_heads, group, head_dim)
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, width - group), (0, 0)))
    tiles = PageTiles(pages.data.shape, config.tile, shape.quantised)
    operands = [packed, pages.data, page_table, kv_lens]
    if pages.scales is not None:
        operands.append(pages.scales)
    out = _attend(operands, shape, tiles, options, config, target)
    if shape.splits > 1:
        parts, lse = out
        out = _combine(parts, lse, shape, target)
    else:
        (out,) = out
    return out[:, :, :group].reshape(num_rows, num_heads, head_dim)


def _attend(
    operands: list[jax.Array],
    shape: _Shape,
    tiles: PageTiles,
    options: Options,
    config: DecodeConfig,
    target: Target,
) -> tuple[jax.Array, ...]:
    """`out [S, K, M, H]`, or of each split `out [splits, S, K, H, M]` and `lse [splits, S, K, M]`,
    float32, in powers of two."""
    rows, heads, splits, f32 = shape.num_rows, shape.num_kv_heads, shape.splits, jnp.float32
    out_type = [jax.ShapeDtypeStruct((rows, heads, shape.width, shape.head_dim), shape.out_dtype)]
    if splits > 1:
        out_type = [
            jax.ShapeDtypeStruct((splits, rows, heads, shape.head_dim, shape.width), f32),
            jax.ShapeDtypeStruct((splits, rows, heads, shape.width), f32),
        ]
    kernel = _Kernel(shape, tiles, options, config, operands[1].dtype, interpreting(target))
    call = plgpu.kernel(
        kernel.body,
        out_type=out_type,
        scratch_types=_scratch(kernel),
        grid=(rows, splits, heads),  # the last is the fastest: heads of a page together
        grid_names=("row", "split", "head"),
        num_threads=2,
        thread_name="wg",
        kernel_name="paged_decode",
        compiler_params=compiler_params(),
        interpret=target.interpret or None,
    )
    return tuple(call(*operands))


@dataclass(frozen=True)
class _Kernel:
    """The kernel of one call: its static sizes, and what its warpgroups do."""

    shape: _Shape
    tiles: PageTiles
    options: Options
    config: DecodeConfig
    page_dtype: Any
    interprets: bool

    def span(self, kv_lens: Any) -> tuple[Any, Any, Any, Any]:
        """The block's row: its length, the first position it sees, first tile, number of tiles."""
        options, tile, splits = self.options, self.config.tile, self.shape.splits
        length = kv_lens[lax.axis_index("row")]
        low = i32(0) if options.window is None else jnp.maximum(length - options.window, 0)
        first = lax.div(low, i32(tile))
        count = lax.div(length + (tile - 1), i32(tile)) - first
        each = lax.div(count + (splits - 1), i32(splits))
        begin = lax.axis_index("split") * each
        steps = jnp.maximum(jnp.minimum(begin + each, count) - begin, 0)
        return length, low, first + begin, steps

    def compute(self, q_ref: Any, kv_lens: Any, outs: Any, smem: Any, bars: Any) -> None:
        shape, options = self.shape, self.options
        tile, stages, splits = self.config.tile, self.config.stages, shape.splits
        width, head_dim, mid, quantised = shape.width, shape.head_dim, shape.mid, shape.quantised
        row, split, head = (lax.axis_index(name) for name in ("row", "split", "head"))
        length, low, begin, steps = self.span(kv_lens)
        plgpu.copy_gmem_to_smem(q_ref.at[row, head], smem["q"], bars["q"])
        plgpu.barrier_wait(bars["q"])
        by_column = plgpu.Layout.WGMMA.reduce(0)

        def step(i: jax.Array, carry: Any) -> Any:
            acc, largest, total = carry
            slot = lax.rem(i, i32(stages))
            position = (begin + i) * tile
            plgpu.barrier_wait(bars["k"].at[slot])
            k = smem["k"].at[slot]
            if quantised:
                k = load(k, layout=plgpu.Layout.WGMMA).astype(mid)
                if self.interprets:  # the interpreter wants its operands in shared memory
                    smem["k_mid"][...] = k
                    plgpu.commit_smem()
                    k = smem["k_mid"]
            scores = matmul((tile, width), k, smem["q"].T)
            if quantised:
                k_scale = _row_vector(smem["scales"].at[slot, 0])
                scores = scores * lax.broadcast_in_dim(k_scale, scores.shape, [0])
            at = position + plgpu.broadcasted_iota(i32, (tile, width), 0, layout=plgpu.Layout.WGMMA)
            visible = (at < length) & (at >= low)
            scores = jnp.where(visible, to_log2(scores, options), MASKED)
            new = jnp.maximum(largest, jnp.max(scores, axis=0))
            shrink = jnp.exp2(largest - new)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(new, scores.shape, [1]))
            if quantised:
                v_scale = _row_vector(smem["scales"].at[slot, 1])
                v_scale = lax.broadcast_in_dim(v_scale, weights.shape, [0])
                total = total * lax.broadcast_in_dim(shrink, weights.shape, [1]) + weights
                rounded = jnp.where(visible, weights * v_scale, 0.0).astype(mid)
            else:
                rounded = weights.astype(mid)
                total = total * lax.broadcast_in_dim(shrink, weights.shape, [1])
                total = total + rounded.astype(jnp.float32)
            smem["p"].T[...] = rounded
            plgpu.commit_smem()
            if quantised:
                # K is in registers and the scales are used: the slot is free, V lives elsewhere.
                _release(i, steps, stages, bars["free"].at[slot])
                v_slot = lax.rem(i, i32(2))
            else:
                v_slot = slot
            plgpu.barrier_wait(bars["v"].at[v_slot])
            v = smem["v_mid" if quantised else "v"].at[v_slot]
            if smem["v"].dtype != jnp.int8:
                zero_unowned(v, position, low, length)
            product = matmul((head_dim, width), v.T, smem["p"].T)
            if quantised:
                _release(i, steps, 2, bars["v_free"].at[v_slot])
            else:
                _release(i, steps, stages, bars["free"].at[slot])
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [1]) + product
            return acc, new, total

        acc = plgpu.layout_cast(jnp.zeros((head_dim, width), jnp.float32), plgpu.Layout.WGMMA)
        total = plgpu.layout_cast(jnp.zeros((tile, width), jnp.float32), plgpu.Layout.WGMMA)
        largest = plgpu.layout_cast(jnp.full((width,), MASKED, jnp.float32), by_column)
        acc, largest, total = lax.fori_loop(0, steps, step, (acc, largest, total))
        sums = jnp.sum(total, axis=0)
        # A block with no tile has total 0 and gives 0; a NaN of its own row stays a NaN.
        sums = jnp.where(sums == 0, 1.0, sums)
        acc = acc / lax.broadcast_in_dim(sums, acc.shape, [1])
        if splits == 1:
            smem["out"].T[...] = acc.astype(shape.out_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["out"], outs[0].at[row, head])
        else:
            smem["out"][...] = acc
            smem["lse"][...] = largest + jnp.log(sums) * LOG2E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["out"], outs[0].at[split, row, head])
            plgpu.copy_smem_to_gmem(smem["lse"], outs[1].at[split, row, head])
        plgpu.wait_smem_to_gmem(0)

    def fetch(self, pool: Any, scales: Any, table: Any, kv_lens: Any, smem: Any, bars: Any) -> None:
        tiles, stages, quantised = self.tiles, self.config.stages, self.shape.quantised
        row, head = lax.axis_index("row"), lax.axis_index("head")
        length, _, begin, steps = self.span(kv_lens)

        def ids(i: jax.Array) -> list[Any]:
            return tiles.locate(table.at[row], begin + i, length)

        def start(i: jax.Array, places: list[Any]) -> None:
            slot = lax.rem(i, i32(stages))
            k_bar, v_bar = bars["k"].at[slot], bars["v_raw" if quantised else "v"].at[slot]
            tiles.fetch(pool, places, 2 * head, smem["k"].at[slot], k_bar)
            if quantised:
                for side in range(2):
                    to = smem["scales"].at[slot, side]
                    tiles.fetch_scales(scales, places, 2 * head + side, to, k_bar)
            tiles.fetch(pool, places, 2 * head + 1, smem["v"].at[slot], v_bar)

        def refill(i: jax.Array, places: list[Any]) -> list[Any]:
            """Tile i, once what its slot held is consumed; the ids of the next one are read before
            that wait, which hides their latency."""
            following = ids(i + 1)

            @pl.when(i >= stages)
            def _() -> None:
                plgpu.barrier_wait(bars["free"].at[lax.rem(i, i32(stages))])

            start(i, places)
            return following

        if not quantised:
            lax.fori_loop(0, steps, refill, ids(i32(0)))
            return
        ahead = jnp.minimum(steps, stages)
        places = lax.fori_loop(0, ahead, refill, ids(i32(0)))

        def widen(i: jax.Array, places: list[Any]) -> list[Any]:
            slot, v_slot = lax.rem(i, i32(stages)), lax.rem(i, i32(2))
            plgpu.barrier_wait(bars["v_raw"].at[slot])
            v = load(smem["v"].at[slot], layout=plgpu.Layout.WGMMA_UPCAST_2X).astype(self.shape.mid)

            @pl.when(i >= 2)
            def _() -> None:
                plgpu.barrier_wait(bars["v_free"].at[v_slot])

            smem["v_mid"].at[v_slot][...] = v
            plgpu.commit_smem()
            plgpu.barrier_arrive(bars["v"].at[v_slot])
            # The slot of the tile before: its V is widened, its K is soon read.
            after = i - 1 + stages
            is_due = (i >= 1) & (after < steps)
            return lax.cond(is_due, lambda: refill(after, places), lambda: places)

        lax.fori_loop(0, steps, widen, places)

    def body(self, *refs: Any, smem: Any, bars: Any) -> None:
        quantised = self.shape.quantised
        q_ref, pool, table, kv_lens, *rest = refs
        scales, outs = (rest[0], rest[1:]) if quantised else (None, rest)
        warpgroup = lax.axis_index("wg")

        @pl.when(warpgroup == 0)
        def _() -> None:
            self.compute(q_ref, kv_lens, outs, smem, bars)

        @pl.when(warpgroup == 1)
        def _() -> None:
            self.fetch(pool, scales, table, kv_lens, smem, bars)


def _scratch(kernel: _Kernel) -> dict[str, dict[str, Any]]:
    """Shared memory and barriers of a block."""
    shape, page_dtype = kernel.shape, kernel.page_dtype
    tile, stages = kernel.config.tile, kernel.config.stages
    width, head_dim = shape.width, shape.head_dim
    smem = {
        "q": swizzled((width, head_dim), shape.mid),
        "p": swizzled((width, tile), shape.mid),
        "k": swizzled((stages, tile, head_dim), page_dtype),
        "v": swizzled((stages, tile, head_dim), page_dtype),
    }
    if shape.splits == 1:
        smem["out"] = swizzled((width, head_dim), shape.out_dtype)
    else:
        smem["out"] = plgpu.SMEM((head_dim, width), jnp.float32)
        smem["lse"] = plgpu.SMEM((width,), jnp.float32)
    copies = kernel.tiles.pieces
    bars = {
        "q": plgpu.Barrier(),
        "k": plgpu.Barrier(
            num_arrivals=copies * (3 if shape.quantised else 1), num_barriers=stages
        ),
        "free": plgpu.Barrier(num_barriers=stages),
    }
    filled = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    if shape.quantised:
        smem["scales"] = plgpu.SMEM((stages, 2, tile), jnp.float32)
        smem["v_mid"] = swizzled((2, tile, head_dim), shape.mid)
        bars["v_raw"] = filled
        bars["v"] = plgpu.Barrier(num_barriers=2)
        bars["v_free"] = plgpu.Barrier(num_barriers=2)
        if kernel.interprets:
            smem["k_mid"] = swizzled((tile, head_dim), shape.mid)
    else:
        bars["v"] = filled
    return {"smem": smem, "bars": bars}


def _row_vector(ref: Any) -> jax.Array:
    return load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _release(i: jax.Array, steps: jax.Array, depth: int, barrier: Any) -> None:
    """Tells the producer that the slot of step i is free, where it will want it again."""

    @pl.when(i + depth < steps)
    def _() -> None:
        plgpu.barrier_arrive(barrier)


def _combine(partial: jax.Array, lse: jax.Array, shape: _Shape, target: Target) -> jax.Array:
    """The splits `[splits, S, K, H, M]`, weighed by 2 ** lse, as `[S, K, M, H]`: one launch, where
    XLA would make three."""
    splits, width, part = shape.splits, shape.width, 64
    by_column = plgpu.Layout.WGMMA.reduce(0)

    def body(partial_ref: Any, lse_ref: Any, out_ref: Any, out_smem: Any) -> None:
        row, head, at = (lax.axis_index(name) for name in ("row", "head", "part"))
        at = pl.ds(at * part, part)

        def weight(i: Any) -> jax.Array:
            return load(lse_ref.at[i, row, head], layout=by_column, optimized=False)

        def over_splits(step: Any, carry: Any) -> Any:
            """step(i, carry) for every split, as many at once as the registers hold."""
            at_once = max(1, 256 // width)

            def some(first: Any, count: int, carry: Any) -> Any:
                for i in range(count):
                    carry = step(first + i, carry)
                return carry

            whole = splits // at_once
            carry = lax.fori_loop(0, whole, lambda i, c: some(i * at_once, at_once, c), carry)
            return some(whole * at_once, splits % at_once, carry)

        def add(i: Any, carry: Any) -> Any:
            acc, total = carry
            share = jnp.exp2(weight(i) - largest)
            source = partial_ref.at[i, row, head, at]
            x = load(source, layout=plgpu.Layout.WGMMA, optimized=False)
            return acc + x * lax.broadcast_in_dim(share, acc.shape, [1]), total + share

        largest = plgpu.layout_cast(jnp.full((width,), MASKED, jnp.float32), by_column)
        largest = over_splits(lambda i, carry: jnp.maximum(carry, weight(i)), largest)
        acc = plgpu.layout_cast(jnp.zeros((part, width), jnp.float32), plgpu.Layout.WGMMA)
        total = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), by_column)
        acc, total = over_splits(add, (acc, total))
        acc = acc / lax.broadcast_in_dim(total, acc.shape, [1])
        out_smem.T[...] = acc.astype(shape.out_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, head, :, at])
        plgpu.wait_smem_to_gmem(0)

    rows, heads, head_dim = shape.num_rows, shape.num_kv_heads, shape.head_dim
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, heads, width, head_dim), shape.out_dtype),
        scratch_types=[swizzled((width, part), shape.out_dtype)],
        grid=(rows, heads, head_dim // part),
        grid_names=("row", "head", "part"),
        num_threads=1,
        thread_name="wg",
        kernel_name="paged_combine",
        compiler_params=compiler_params(),
        interpret=target.interpret or None,
    )
    return kernel(partial, lse)
