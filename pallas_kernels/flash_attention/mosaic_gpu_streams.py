"""What the two backward kernels for Hopper share: the shape of the call, rings of blocks through
shared memory, the order of blocks, and how results leave."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import Options
from pallas_kernels.flash_attention.mosaic_gpu_blocks import (
    ROWS,
    divmod_by,
    exponent,
    logits,
    masked,
    side_by_side,
)
from pallas_kernels.mosaic_gpu import load

INPUTS = ("q", "k", "v", "do", "lse", "delta", "ranges", "q_offset", "q_segments", "kv_segments")


@dataclass(frozen=True)
class Shape:
    """What both kernels know of the call."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_len: int
    kv_len: int
    dtype: str
    segments: bool
    interpret: bool
    wgs: int
    options: Options

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def place(self, tiles: int, heads: int, length: int) -> tuple[Any, Any, Any]:
        """(row, head, tile) of this CTA, tiles in order of time: sections of heads whose streamed
        operands (`length` rows for each) fit the L2 cache run side by side."""
        side = side_by_side(self.batch * heads, 2 * length * self.head_dim)
        part, index = divmod_by(lax.axis_index("tile"), side * tiles)
        tile, lane = divmod_by(index, side)
        row, head = divmod_by(part * side + lane, heads)
        return row, head, tile

    def probabilities(
        self, s: jax.Array, lse: jax.Array, axis: int, visible: tuple[jax.Array, ...]
    ) -> Any:
        """P of a block of q . k, and P times the derivative of the soft cap. `lse` is in units of
        log2 and lies along `axis`."""
        x = logits(s, self.options)
        exponents = x * exponent(self.options) - lax.broadcast_in_dim(lse, s.shape, [axis])
        p = jnp.exp2(masked(exponents, visible))
        return p, p if self.options.soft_cap is None else p * (1.0 - x * x)

    def roles(self, compute: Any, copy: Any) -> None:
        """Runs one of them: the last warpgroup copies."""
        wg = lax.axis_index("wg")

        @pl.when(wg < self.wgs)
        def _() -> None:
            plgpu.set_max_registers(240 if self.wgs == 2 else 232, action="increase")
            compute(wg)

        @pl.when(wg == self.wgs)
        def _() -> None:
            plgpu.set_max_registers(24 if self.wgs == 2 else 40, action="decrease")
            copy()


class Ring:
    """Blocks on their way through shared memory, as one side of the ring sees them."""

    def __init__(self, full: Any, free: Any, stages: int):
        self.full = full
        self.free = free
        self.stages = stages

    def slot(self, count: Any) -> jax.Array:
        return lax.rem(count, jnp.int32(self.stages))

    def fetch(self, count: jax.Array, pairs: list[tuple[Any, Any]]) -> None:
        """Copies (source, stages) pairs into the slot of the count-th block."""
        slot = self.slot(count)

        @pl.when(count >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        for source, stages in pairs:
            plgpu.copy_gmem_to_smem(source, stages.at[slot], self.full.at[slot])

    def wait(self, count: Any) -> None:
        plgpu.barrier_wait(self.full.at[self.slot(count)])

    def release(self, count: Any) -> None:
        plgpu.barrier_arrive(self.free.at[self.slot(count)])

    def drain(self, count: jax.Array) -> None:
        """Waits for what was released last, after `count` blocks: no barrier keeps an arrival."""
        for slot in range(self.stages):

            @pl.when(count > slot)
            def _(slot: int = slot) -> None:
                plgpu.barrier_wait(self.free.at[slot])


def walk(ranges: list[jax.Array], heads: int, run: Any, *, at_end: bool = False) -> None:
    """`run(j, head, block, mask)` for the j-th block: those with a mask of every head, then the
    rest. Two flat loops: each one more, or one around them, costs registers. With `at_end`, no
    block before the free ones has a mask."""
    first, first_full, end_full, end = ranges
    before = 0 if at_end else first_full - first
    done = jnp.int32(0)
    for count, mask in ((end - end_full + before, True), (end_full - first_full, False)):

        @pl.loop(0, heads * count)
        def _(i: jax.Array, count=count, mask=mask, done=done) -> None:
            head, index = (lax.div(i, count), lax.rem(i, count)) if heads > 1 else (0, i)
            start = end_full if mask else first_full
            if mask and not at_end:
                start = jnp.where(index < before, first, end_full - before)
            run(done + i, head, start + index, mask)

        done = heads * count


def vector(ref: Any) -> jax.Array:
    """A vector along the rows of accumulators, from global memory."""
    return load(ref, layout=ROWS, optimized=False)


def operand_of(shape: Shape, smem: Any, name: str, mine: Any, x: jax.Array) -> Any:
    """`x` as the left side of wgmma: registers, or shared memory for the interpreter."""
    x = x.astype(shape.dtype)
    if not shape.interpret:
        return x
    smem[name].at[mine][...] = x
    plgpu.commit_smem()
    return smem[name].at[mine]


def share(halves: bool, wg: jax.Array, head_dim: int) -> tuple[jax.Array, Any]:
    """What is a warpgroup's: which part of the tile's rows, and which of the results' head dim."""
    if halves:
        return jnp.int32(0), pl.ds(wg * (head_dim // 2), head_dim // 2)
    return wg, pl.ds(0, head_dim)


def store(pairs: list[tuple[jax.Array, Any, Any]], smem: Any, wg: jax.Array, dims: Any) -> None:
    """Each (values, shared memory of an operand that is not needed any more, destination). Where
    warpgroups have halves, they wait for each other: the other one still reads its operands."""
    halves = "finished" in smem

    def both_finished() -> None:
        if halves:
            plgpu.barrier_arrive(smem["finished"])
            plgpu.barrier_wait(smem["finished"])

    both_finished()
    for x, staging, _ in pairs:
        staging.at[:, dims][...] = x.astype(staging.dtype)
    plgpu.commit_smem()
    both_finished()
    for i, (_, staging, destination) in enumerate(pairs):

        @pl.when(jnp.logical_or(not halves, wg == i))
        def _(staging: Any = staging, destination: Any = destination) -> None:
            plgpu.copy_smem_to_gmem(staging, destination)

    plgpu.wait_smem_to_gmem(0)
