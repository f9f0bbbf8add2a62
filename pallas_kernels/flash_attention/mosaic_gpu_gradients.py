"""The two kernels of the backward pass for Hopper: `Dq` over tiles of queries, `Dkv` over tiles of
keys. Launched by `mosaic_gpu_backward.py`.

A CTA is compute warpgroups, each with its own rows, and one that only copies. The scores and dP of
a block are multiplied together; the softmax runs under dP. Where registers allow (`defers`), the
product that ends a step is awaited in the next.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.mosaic_gpu_blocks import (
    COLUMNS,
    rows_of,
    seen,
    tiled,
)
from pallas_kernels.flash_attention.mosaic_gpu_streams import (
    INPUTS,
    Ring,
    Shape,
    operand_of,
    share,
    store,
    vector,
    walk,
)
from pallas_kernels.mosaic_gpu import Accumulator, load


@dataclass(frozen=True)
class Dq:
    """The kernel over tiles of queries; K and V stream by, the last block first."""

    shape: Shape
    block_q: int
    block_kv: int
    stages: int
    stages_v: int

    side = 0
    num_results = 1

    @property
    def defers(self) -> bool:
        return self.shape.head_dim < 256

    @property
    def halves(self) -> bool:
        """Whether both warpgroups have the same queries, and each its half of the head dim: S and
        dP are multiplied twice, but at 256 these options need the registers."""
        options, shape = self.shape.options, self.shape
        more = options.soft_cap is not None or options.window is not None or shape.segments
        return more and shape.head_dim == 256 and shape.wgs == 2

    @property
    def q_block(self) -> int:
        return self.block_q if self.halves else self.shape.wgs * self.block_q

    @property
    def kv_block(self) -> int:
        return self.block_kv

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.shape.q_len, self.q_block)

    @property
    def num_tiles(self) -> int:
        return self.shape.batch * self.shape.num_heads * self.tiles

    def scratch(self) -> dict[str, Any]:
        shape, h, dtype = self.shape, self.shape.head_dim, self.shape.dtype
        segments = shape.segments
        scratch = {
            "q": tiled(self.q_block, h, dtype=dtype),
            "do": tiled(self.q_block, h, dtype=dtype),
            "k": tiled(self.stages, self.block_kv, h, dtype=dtype),
            "v": tiled(self.stages_v, self.block_kv, h, dtype=dtype),
            "rows_full": plgpu.Barrier(num_arrivals=2),
            "k_full": plgpu.Barrier(num_arrivals=1 + segments, num_barriers=self.stages),
            "k_free": plgpu.Barrier(num_arrivals=shape.wgs, num_barriers=self.stages),
            "v_full": plgpu.Barrier(num_barriers=self.stages_v),
            "v_free": plgpu.Barrier(num_arrivals=shape.wgs, num_barriers=self.stages_v),
        }
        if self.halves:
            scratch["finished"] = plgpu.Barrier(num_arrivals=shape.wgs)
        if segments:
            scratch["kv_segments"] = plgpu.SMEM((self.stages, self.block_kv), jnp.int32)
        if shape.interpret:  # the interpreter has no wgmma with its left side in registers
            scratch["ds"] = tiled(shape.wgs * self.block_q, self.block_kv, dtype=dtype)
        return scratch

    def flash_attention_dq(self, *refs: Any, **smem: Any) -> None:
        shape, block_kv = self.shape, self.block_kv
        *inputs, dq = refs
        gmem: dict[str, Any] = dict(zip(INPUTS, inputs, strict=False))
        row, head, early = shape.place(self.tiles, shape.num_heads, 2 * shape.kv_len)
        tile = self.tiles - 1 - early  # causal: the last rows have most to do
        ranges = [gmem["ranges"][row, tile, i] for i in range(4)]
        ring_k = Ring(smem["k_full"], smem["k_free"], self.stages)
        ring_v = Ring(smem["v_full"], smem["v_free"], self.stages_v)
        count = ranges[3] - ranges[0]
        at_end = shape.options.window is None and not shape.segments

        def copy() -> None:
            rows = pl.ds(tile * self.q_block, self.q_block)
            for name in ("q", "do"):
                source = gmem[name].at[row, rows, head]
                plgpu.copy_gmem_to_smem(source, smem[name], smem["rows_full"])
            kv_head = lax.div(head, jnp.int32(shape.group))

            def fetch(j: jax.Array, _: Any, block: jax.Array, mask: bool) -> None:
                keys = pl.ds(block * block_kv, block_kv)
                pairs = [(gmem["k"].at[row, keys, kv_head], smem["k"])]
                if shape.segments:
                    pairs.append((gmem["kv_segments"].at[row, keys], smem["kv_segments"]))
                ring_k.fetch(j, pairs)
                ring_v.fetch(j, [(gmem["v"].at[row, keys, kv_head], smem["v"])])

            walk(ranges, 1, fetch, at_end=at_end)
            ring_k.drain(count)
            ring_v.drain(count)

        def compute(wg: jax.Array) -> None:
            mine = pl.ds(wg * self.block_q, self.block_q)
            part, dims = share(self.halves, wg, shape.head_dim)
            first_row = tile * self.q_block + part * self.block_q
            rows = pl.ds(first_row, self.block_q)
            q_pos = gmem["q_offset"][row] + first_row
            lse, delta = (vector(gmem[x].at[row, head, rows]) for x in ("lse", "delta"))
            q_segments = vector(gmem["q_segments"].at[row, rows]) if shape.segments else None
            plgpu.barrier_wait(smem["rows_full"])
            acc = Accumulator((self.block_q, block_kv), jnp.float32)

            def step(dq_ref: Any, j: jax.Array, block: jax.Array, *, mask: bool) -> None:
                k = smem["k"].at[ring_k.slot(j)]
                v = smem["v"].at[ring_v.slot(j)]
                q, do = (rows_of(smem[x], part, self.block_q) for x in ("q", "do"))

                def run(s_ref: Any, dp_ref: Any) -> jax.Array:
                    ring_k.wait(j)
                    plgpu.wgmma(s_ref, q, plgpu.transpose_ref(k, (1, 0)))
                    ring_v.wait(j)
                    plgpu.wgmma(dp_ref, do, plgpu.transpose_ref(v, (1, 0)))
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

                    if self.defers:

                        @pl.when(j > 0)
                        def _() -> None:
                            ring_k.release(j - 1)  # dS K of the step before is done, too

                    visible = ()
                    if mask:
                        segments = None
                        if shape.segments:
                            ids = smem["kv_segments"].at[ring_k.slot(j)]
                            segments = q_segments, load(ids, layout=COLUMNS)
                        kv_pos = block * block_kv
                        visible = seen(
                            s.shape, shape.options, q_axis=0, q_pos=q_pos, kv_pos=kv_pos,
                            kv_len=shape.kv_len, segments=segments,
                        )  # fmt: skip
                    _, p = shape.probabilities(s, lse, 0, visible)
                    dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
                    ring_v.release(j)
                    return p * (dp - lax.broadcast_in_dim(delta, s.shape, [0]))

                ds = pl.run_scoped(run, acc, acc)
                plgpu.wgmma(dq_ref, operand_of(shape, smem, "ds", mine, ds), k.at[:, dims])
                if not self.defers:
                    plgpu.wgmma_wait(0)
                    ring_k.release(j)

            def steps(dq_ref: Any) -> jax.Array:
                def run(j: jax.Array, _: Any, block: jax.Array, mask: bool) -> None:
                    step(dq_ref, j, block, mask=mask)

                walk(ranges, 1, run, at_end=at_end)
                return dq_ref[...]

            result = pl.run_scoped(steps, Accumulator((self.block_q, dims.size), jnp.float32))
            if self.defers:
                ring_k.release(count - 1)
            staging = smem["q"].at[pl.ds(part * self.block_q, self.block_q)]
            destination = dq.at[row, rows, head]
            store([(result * shape.options.scale, staging, destination)], smem, wg, dims)

        shape.roles(compute, copy)


@dataclass(frozen=True)
class Dkv:
    """The kernel over tiles of keys; Q and dO of every head of the group stream by. Scores stand
    transposed, `[keys, queries]`: P and dS are left sides of products as they are."""

    shape: Shape
    block_kv: int
    block_q: int
    stages: int
    stages_do: int
    halves: bool  # both warpgroups have the same keys, and each its half of the head dim

    side = 1
    num_results = 2

    @property
    def defers(self) -> bool:
        return self.shape.head_dim == 64

    @property
    def q_block(self) -> int:
        return self.block_q

    @property
    def kv_block(self) -> int:
        return self.block_kv if self.halves else self.shape.wgs * self.block_kv

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.shape.kv_len, self.kv_block)

    @property
    def num_tiles(self) -> int:
        return self.shape.batch * self.shape.num_kv_heads * self.tiles

    def scratch(self) -> dict[str, Any]:
        shape, h, dtype = self.shape, self.shape.head_dim, self.shape.dtype
        stages, stages_do, block_q = self.stages, self.stages_do, self.block_q
        scratch = {
            "k": tiled(self.kv_block, h, dtype=dtype),
            "v": tiled(self.kv_block, h, dtype=dtype),
            "q": tiled(stages, block_q, h, dtype=dtype),
            "do": tiled(stages_do, block_q, h, dtype=dtype),
            "lse": plgpu.SMEM((stages, block_q), jnp.float32),
            "delta": plgpu.SMEM((stages_do, block_q), jnp.float32),
            "rows_full": plgpu.Barrier(num_arrivals=2),
            "q_full": plgpu.Barrier(num_arrivals=2 + shape.segments, num_barriers=stages),
            "q_free": plgpu.Barrier(num_arrivals=shape.wgs, num_barriers=stages),
            "do_full": plgpu.Barrier(num_arrivals=2, num_barriers=stages_do),
            "do_free": plgpu.Barrier(num_arrivals=shape.wgs, num_barriers=stages_do),
        }
        if shape.segments:
            scratch["q_segments"] = plgpu.SMEM((stages, block_q), jnp.int32)
        if self.halves:
            scratch["finished"] = plgpu.Barrier(num_arrivals=shape.wgs)
        if shape.interpret:
            for name in ("p", "ds"):
                scratch[name] = tiled(shape.wgs * self.block_kv, block_q, dtype=dtype)
        return scratch

    def flash_attention_dkv(self, *refs: Any, **smem: Any) -> None:
        shape = self.shape
        inputs, results = refs[: -self.num_results], refs[-self.num_results :]
        gmem: dict[str, Any] = dict(zip(INPUTS, inputs, strict=False))
        # Causal: the first keys have most to do.
        place = shape.place(self.tiles, shape.num_kv_heads, 2 * shape.q_len * shape.group)
        row, kv_head, tile = place
        ranges = [gmem["ranges"][row, tile, i] for i in range(4)]
        ring_q = Ring(smem["q_full"], smem["q_free"], self.stages)
        ring_do = Ring(smem["do_full"], smem["do_free"], self.stages_do)
        total = shape.group * (ranges[3] - ranges[0])

        def copy() -> None:
            keys = pl.ds(tile * self.kv_block, self.kv_block)
            for name in ("k", "v"):
                source = gmem[name].at[row, keys, kv_head]
                plgpu.copy_gmem_to_smem(source, smem[name], smem["rows_full"])

            def block(j: jax.Array, member: jax.Array, block: jax.Array, _: bool) -> None:
                head = kv_head * shape.group + member
                rows = pl.ds(block * self.block_q, self.block_q)

                def pairs(*names: str) -> list[tuple[Any, Any]]:
                    at = {
                        "q": (row, rows, head),
                        "do": (row, rows, head),
                        "q_segments": (row, rows),
                    }
                    return [(gmem[x].at[at.get(x, (row, head, rows))], smem[x]) for x in names]

                ring_q.fetch(j, pairs("q", "lse", *["q_segments"] * shape.segments))
                ring_do.fetch(j, pairs("do", "delta"))

            walk(ranges, shape.group, block)
            ring_q.drain(total)
            ring_do.drain(total)

        def compute(wg: jax.Array) -> None:
            mine = pl.ds(wg * self.block_kv, self.block_kv)
            part, dims = share(self.halves, wg, shape.head_dim)
            kv_pos = tile * self.kv_block + part * self.block_kv
            keys = pl.ds(kv_pos, self.block_kv)
            plgpu.barrier_wait(smem["rows_full"])

            def step(
                dk_ref: Any, dv_ref: Any, j: jax.Array, block: jax.Array, *, mask: bool
            ) -> None:
                slot, slot_do = ring_q.slot(j), ring_do.slot(j)
                q, do = smem["q"].at[slot], smem["do"].at[slot_do]
                k, v = (rows_of(smem[x], part, self.block_kv) for x in ("k", "v"))

                # From 128 on, a mask with a soft cap needs the registers of dP.
                beside = shape.head_dim == 64 or not (mask and shape.options.soft_cap)

                def start_dp(dp_ref: Any) -> None:
                    plgpu.wgmma(dp_ref, v, plgpu.transpose_ref(do, (1, 0)))

                def run(s_ref: Any, *dp_ref: Any) -> None:
                    ring_q.wait(j)
                    plgpu.wgmma(s_ref, k, plgpu.transpose_ref(q, (1, 0)))
                    ring_do.wait(j)
                    if beside:
                        start_dp(*dp_ref)
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=int(beside))

                    if self.defers:

                        @pl.when(j > 0)
                        def _() -> None:  # the products of the step before are done, too
                            ring_q.release(j - 1)
                            ring_do.release(j - 1)

                    visible = ()
                    if mask:
                        segments = None
                        if shape.segments:
                            ids = load(smem["q_segments"].at[slot], layout=COLUMNS)
                            # Read anew: kept over the loop they cost registers that are spilled.
                            segments = ids, vector(gmem["kv_segments"].at[row, keys])
                        q_pos = gmem["q_offset"][row] + block * self.block_q
                        # Keys past the end get rows of their own, which are not stored.
                        visible = seen(
                            s.shape, shape.options, q_axis=1, q_pos=q_pos, kv_pos=kv_pos,
                            kv_len=None, segments=segments,
                        )  # fmt: skip
                    lse = load(smem["lse"].at[slot], layout=COLUMNS)
                    p, slope = shape.probabilities(s, lse, 1, visible)

                    def finish(dp_ref: Any) -> None:
                        if not beside:
                            start_dp(dp_ref)
                        left = operand_of(shape, smem, "p", mine, p)
                        plgpu.wgmma(dv_ref, left, do.at[:, dims])
                        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)
                        delta = load(smem["delta"].at[slot_do], layout=COLUMNS)
                        ds = slope * (dp - lax.broadcast_in_dim(delta, s.shape, [1]))
                        left = operand_of(shape, smem, "ds", mine, ds)
                        plgpu.wgmma(dk_ref, left, q.at[:, dims])

                    finish(*dp_ref) if beside else pl.run_scoped(finish, acc)

                acc = Accumulator((self.block_kv, self.block_q), jnp.float32)
                pl.run_scoped(run, *[acc] * (1 + beside))
                if not self.defers:
                    plgpu.wgmma_wait(1)
                    ring_do.release(j)
                    plgpu.wgmma_wait(0)
                    ring_q.release(j)

            def steps(dk_ref: Any, dv_ref: Any) -> tuple[jax.Array, jax.Array]:
                def run(j: jax.Array, _: Any, block: jax.Array, mask: bool) -> None:
                    step(dk_ref, dv_ref, j, block, mask=mask)

                walk(ranges, shape.group, run)
                return dk_ref[...], dv_ref[...]

            acc = Accumulator((self.block_kv, dims.size), jnp.float32)
            dk, dv = pl.run_scoped(steps, acc, acc)
            if self.defers:
                ring_q.release(total - 1)
                ring_do.release(total - 1)
            staging = [smem[x].at[pl.ds(part * self.block_kv, self.block_kv)] for x in "kv"]
            targets = [x.at[row, keys, kv_head] for x in results]
            values = (dk * shape.options.scale, dv)
            store(list(zip(values, staging, targets, strict=True)), smem, wg, dims)

        shape.roles(compute, copy)
