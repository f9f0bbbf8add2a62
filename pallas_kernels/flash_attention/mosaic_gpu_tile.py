"""The arithmetic of the forward kernel for Hopper: what one warpgroup does with its rows of a tile.
The kernel around it is `mosaic_gpu.py`."""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.mosaic_gpu_blocks import (
    COLUMNS,
    ROWS,
    WGMMA,
    logits,
    masked,
    rows_of,
    seen,
)
from pallas_kernels.mosaic_gpu import Accumulator, load

# Where maxima start, in units of log2: below every score, and so far above MASKED that the
# probabilities of a row that has seen nothing yet are 0 (fused, MASKED - MASKED is not).
_LOWEST = -1e20


class Tile:
    """The rows of one warpgroup in one tile; `done` blocks went through the rings before it."""

    def __init__(self, kernel: Any, wg: Any, row: Any, tile: Any, done: Any, end: Any):
        self.plan = plan = kernel.plan
        self.smem = kernel.smem
        self.wg = wg
        self.done = done
        self.end = end
        block_q = plan.config.block_q
        self.mine = pl.ds(wg * block_q, block_q)
        self.q_pos = kernel.inputs["q_offset"][row] + tile * plan.tile_q + wg * block_q
        self.q_segments = None
        if plan.segments:
            rows = pl.ds(tile * plan.tile_q + wg * block_q, block_q)
            ids = kernel.inputs["q_segments"].at[row, rows]
            self.q_segments = load(ids, layout=ROWS, optimized=False)

    def slot(self, j: Any) -> jax.Array:
        return lax.rem(self.done + j, jnp.int32(self.plan.config.stages))

    def scores(self, s_ref: Any, j: Any) -> None:
        """Starts Q K^T of the j-th block, which has arrived."""
        k = self.smem["k_smem"].at[self.slot(j)]
        q = rows_of(self.smem["q_smem"], self.wg, self.plan.config.block_q)
        plgpu.wgmma(s_ref, q, plgpu.transpose_ref(k, (1, 0)))

    def weigh(self, out_ref: Any, p: jax.Array, j: Any) -> None:
        """Starts P V of the j-th block, which has arrived."""
        left = self.smem["p_smem"].at[self.mine] if self.plan.interpret else p
        plgpu.wgmma(out_ref, left, self.smem["v_smem"].at[self.slot(j)])

    def release_k(self, s: jax.Array, j: Any, *, mask: bool) -> jax.Array:
        """Hands the j-th block of K back; its scores, masked if asked for."""
        plan, options, slot = self.plan, self.plan.options, self.slot(j)
        s = logits(s, options)
        segments = None
        if mask and plan.segments:
            ids = self.smem["kv_segments_smem"].at[slot]
            segments = self.q_segments, load(ids, layout=COLUMNS)
        plgpu.barrier_arrive(self.smem["k_free"].at[slot])
        if not mask:
            return s
        kv_pos = (self.end - 1 - j) * plan.config.block_kv
        visible = seen(
            s.shape, options, q_axis=0, q_pos=self.q_pos, kv_pos=kv_pos, kv_len=plan.kv_len,
            segments=segments,
        )  # fmt: skip
        return masked(s, visible)

    def softmax(self, s: jax.Array, m: jax.Array, total: jax.Array) -> tuple[jax.Array, ...]:
        """(factor for earlier sums, new maximum, new sum of P, P)."""
        factor = self.plan.factor
        m_new = jnp.maximum(m, s.max(axis=1) * factor)
        # One fused multiply-add for each score, as the scale is part of the exponent.
        p = jnp.exp2(s * factor - lax.broadcast_in_dim(m_new, s.shape, [0]))
        alpha = jnp.exp2(m - m_new)
        return alpha, m_new, total * alpha + p.sum(axis=1), p

    def round(self, p: jax.Array) -> jax.Array:
        """P as wgmma takes it."""
        p16 = p.astype(self.plan.dtype)
        if self.plan.interpret:
            self.smem["p_smem"].at[self.mine][...] = p16
            plgpu.commit_smem()
        return p16

    def masked_block(self, j: Any, out: Any, m: Any, total: Any) -> tuple[jax.Array, ...]:
        """The j-th block, masked, with nothing beside it: a mask takes registers, those of another
        P. Returns the carry (sum of P V, maximum, sum of P, P): P V is not yet begun."""
        shape = (self.plan.config.block_q, self.plan.config.block_kv)
        plgpu.barrier_wait(self.smem["k_full"].at[self.slot(j)])

        def run(s_ref: Any) -> jax.Array:
            self.scores(s_ref, j)
            return s_ref[...]

        s = pl.run_scoped(run, Accumulator(shape, jnp.float32))
        s = self.release_k(s, j, mask=True)
        alpha, m, total, p = self.softmax(s, m, total)
        return out * lax.broadcast_in_dim(alpha, out.shape, [0]), m, total, self.round(p)

    def first_block(self) -> tuple[jax.Array, ...]:
        """The carry after the last block of keys."""
        config = self.plan.config
        zeros, lowest = (jnp.full(config.block_q, x, jnp.float32) for x in (0.0, _LOWEST))
        out = jnp.zeros((config.block_q, self.plan.head_dim), jnp.float32)
        m, total = (plgpu.layout_cast(x, ROWS) for x in (lowest, zeros))
        return self.masked_block(0, plgpu.layout_cast(out, WGMMA), m, total)

    def masked_step(self, j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """P V of the block before, then the j-th block."""
        return self.masked_block(j, *self.last_block(j - 1, carry))

    def step(self, j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Q K^T of the j-th block beside P V of the one before; softmax under that P V."""
        plan, smem = self.plan, self.smem
        out, m, total, p = carry
        plgpu.barrier_wait(smem["k_full"].at[self.slot(j)])
        plgpu.barrier_wait(smem["v_full"].at[self.slot(j - 1)])

        def run(s_ref: Any, out_ref: Any) -> tuple[jax.Array, ...]:
            if not plan.interpret:  # there, an accumulator begins at zero
                out_ref[...] = out
            if plan.takes_turns:
                plgpu.barrier_wait(smem["turn"].at[self.wg])
            self.scores(s_ref, j)
            self.weigh(out_ref, p, j - 1)
            if plan.takes_turns:
                after = lax.rem(self.wg + 1, jnp.int32(plan.config.compute_wgs))
                plgpu.barrier_arrive(smem["turn"].at[after])
            s = self.release_k(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), j, mask=False)
            alpha, m_new, total_new, p_new = self.softmax(s, m, total)
            sums = out + out_ref[...] if plan.interpret else out_ref[...]
            plgpu.barrier_arrive(smem["v_free"].at[self.slot(j - 1)])
            return sums * lax.broadcast_in_dim(alpha, sums.shape, [0]), m_new, total_new, p_new

        shape = (plan.config.block_q, plan.config.block_kv)
        accumulators = (Accumulator(x, jnp.float32) for x in (shape, out.shape))
        out, m, total, p = pl.run_scoped(run, *accumulators)
        return out, m, total, self.round(p)

    def last_block(self, j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The P V that is still to do, of the j-th block: (sum of P V, maximum, sum of P)."""
        plan, slot = self.plan, self.slot(j)
        out, m, total, p = carry
        plgpu.barrier_wait(self.smem["v_full"].at[slot])

        def run(out_ref: Any) -> jax.Array:
            if not plan.interpret:
                out_ref[...] = out
            self.weigh(out_ref, p, j)
            return out + out_ref[...] if plan.interpret else out_ref[...]

        out = pl.run_scoped(run, Accumulator(out.shape, jnp.float32))
        plgpu.barrier_arrive(self.smem["v_free"].at[slot])
        return out, m, total
