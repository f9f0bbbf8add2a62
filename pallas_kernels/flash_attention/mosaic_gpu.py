"""Flash attention forward for Hopper: wgmma, TMA and warp specialisation, as FlashAttention-3 does
it (Shah et al., arXiv 2407.08608). The backward pass is `mosaic_gpu_backward.py`.

A CTA is some compute warpgroups, each with its own rows of queries, and one that only copies: K and
V go through two rings of `stages` blocks. Within a warpgroup the scores of the next block are
multiplied while the previous P V still runs, and softmax runs under that P V (`overlap` of the
paper); between warpgroups a baton (`ping_pong`) keeps one in softmax while another multiplies.
A CTA takes tile after tile, so that the copies of the next tile run under the end of this one.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.common import MASKED, Target
from pallas_kernels.flash_attention import Mask, Options
from pallas_kernels.flash_attention.mosaic_gpu_backward import BackwardConfig, backward
from pallas_kernels.flash_attention.mosaic_gpu_blocks import (
    PARAMS,
    SHARED_MEMORY,
    block_ranges,
    check,
    divmod_by,
    exponent,
    pad_axis,
    side_by_side,
    tiled,
    unsupported,
)
from pallas_kernels.flash_attention.mosaic_gpu_tile import Tile

__all__ = [
    "BackwardConfig",
    "ForwardConfig",
    "backward",
    "default_config",
    "forward",
    "unsupported",
]

# Multiprocessors of an H200 (and of an H100 SXM). A wrong number costs time, never results.
_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class ForwardConfig:
    """Block sizes of the forward kernel, as `tuned/*.json` has them under op "flash_attention",
    stage "forward", key (dtype, head_dim, causal: 0 or 1)."""

    block_q: int = 64  # rows of queries of one compute warpgroup, a multiple of 64
    block_kv: int = 128  # a multiple of 64
    stages: int = 2  # blocks of K, and of V, in shared memory
    compute_wgs: int = 2  # compute warpgroups, 1 to 3
    ping_pong: int = 1  # 1: warpgroups take turns at the tensor cores
    ctas: int = _MULTIPROCESSORS  # CTAs, each of which takes many tiles; 0: one for each tile

    def __post_init__(self) -> None:
        for name, step in (("block_q", 64), ("block_kv", 64)):
            value = getattr(self, name)
            if value < step or value % step:
                raise ValueError(f"{name} is {value}; it must be a multiple of {step}")
        for name, low, high in (("stages", 1, 8), ("compute_wgs", 1, 3), ("ping_pong", 0, 1)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be in [{low}, {high}]")
        if self.ctas < 0:
            raise ValueError(f"ctas is {self.ctas}; it must be >= 0")


def default_config(target: Target, dtype: str, head_dim: int, causal: bool) -> ForwardConfig:
    """The tuned configuration, or the rule: what FlashAttention-3 uses on H100."""
    key = {"dtype": dtype, "head_dim": head_dim, "causal": int(causal)}
    tuned = tuning.lookup(target.device_kind, "flash_attention", "forward", **key)
    if tuned is not None:
        return ForwardConfig(**tuned)
    # At 256 the accumulators leave no time to hand over: P V is longer than softmax.
    return ForwardConfig(block_kv=64, ping_pong=0) if head_dim == 256 else ForwardConfig()


@jax.named_scope("flash_attention")
def forward(
    q: jax.Array,  # [B, S, N, H]
    k: jax.Array,  # [B, Sk, K, H]
    v: jax.Array,
    mask: Mask,
    options: Options,
    target: Target,
    *,
    config: ForwardConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.flash_attention` for the contract."""
    check(q, target)
    if config is None:
        config = default_config(target, q.dtype.name, q.shape[3], options.causal)
    plan = _Plan(
        batch=q.shape[0],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        q_len=q.shape[1],
        kv_len=k.shape[1],
        dtype=q.dtype.name,
        segments=mask.q_segments is not None,
        interpret=bool(target.interpret),
        options=options,
        config=config,
    )
    ranges, _ = block_ranges(
        mask, options, plan.q_len, plan.kv_len, block_q=plan.tile_q, block_kv=config.block_kv
    )
    operands = [ranges, mask.q_offset]
    if mask.q_segments is not None and mask.kv_segments is not None:
        operands.append(pad_axis(mask.q_segments, 1, plan.tile_q))
        operands.append(pad_axis(mask.kv_segments, 1, config.block_kv))
    q, k, v = (pad_axis(x, 1, 8) for x in (q, k, v))
    interpret = {"interpret": target.interpret} if target.interpret else {}
    out, lse = plgpu.kernel(
        plan.flash_attention_forward,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(
                (plan.batch, plan.num_heads, plan.q_tiles * plan.tile_q), jnp.float32
            ),
        ],
        scratch_types=plan.scratch(),
        grid=(plan.ctas,),
        grid_names=("cta",),
        num_threads=config.compute_wgs + 1,
        thread_name="wg",
        compiler_params=PARAMS,
        **interpret,
    )(q, k, v, *operands)
    return out[:, : plan.q_len], lse[..., : plan.q_len]


@dataclass(frozen=True)
class _Plan:
    """One kernel: everything static, and its body."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_len: int
    kv_len: int
    dtype: str
    segments: bool
    interpret: bool
    options: Options
    config: ForwardConfig

    @property
    def tile_q(self) -> int:
        return self.config.compute_wgs * self.config.block_q

    @property
    def q_tiles(self) -> int:
        return pl.cdiv(self.q_len, self.tile_q)

    @property
    def num_tiles(self) -> int:
        return self.batch * self.num_heads * self.q_tiles

    @property
    def ctas(self) -> int:
        return min(self.config.ctas or self.num_tiles, self.num_tiles)

    @property
    def own_out(self) -> bool:
        """Whether the output has shared memory of its own, or that of the queries."""
        config = self.config
        rows = 2 * self.tile_q + 2 * config.stages * config.block_kv
        return rows * self.head_dim * 2 + 4096 <= SHARED_MEMORY

    @property
    def section(self) -> int:
        """KV heads (of all rows) that run side by side: a divisor of their number."""
        return side_by_side(self.batch * self.num_kv_heads, 2 * self.kv_len * self.head_dim)

    def scratch(self) -> dict[str, Any]:
        c = self.config
        wgs, stages, h, dtype = c.compute_wgs, c.stages, self.head_dim, self.dtype
        scratch = {
            "q_smem": tiled(self.tile_q, h, dtype=dtype),
            "k_smem": tiled(stages, c.block_kv, h, dtype=dtype),
            "v_smem": tiled(stages, c.block_kv, h, dtype=dtype),
            "lse_smem": plgpu.SMEM((wgs, c.block_q), jnp.float32),
            "q_full": plgpu.Barrier(),
            "q_free": plgpu.Barrier(num_arrivals=wgs),
            "k_full": plgpu.Barrier(num_arrivals=1 + self.segments, num_barriers=stages),
            "v_full": plgpu.Barrier(num_barriers=stages),
            "k_free": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
            "v_free": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        }
        if self.own_out:
            scratch["out_smem"] = tiled(self.tile_q, h, dtype=dtype)
        if self.segments:
            scratch["kv_segments_smem"] = plgpu.SMEM((stages, c.block_kv), jnp.int32)
        if self.takes_turns:
            scratch["turn"] = plgpu.Barrier(num_barriers=wgs)
        if self.interpret:  # the interpreter has no wgmma with its left side in registers
            scratch["p_smem"] = tiled(self.tile_q, c.block_kv, dtype=dtype)
        return scratch

    @property
    def factor(self) -> float:
        """What scores are multiplied with to become exponents of 2; see `logits`."""
        return exponent(self.options)

    @property
    def takes_turns(self) -> bool:
        return bool(self.config.ping_pong) and self.config.compute_wgs > 1

    def flash_attention_forward(self, *refs: Any, **scratch: Any) -> None:
        num_inputs = 7 if self.segments else 5
        names = ("q", "k", "v", "ranges", "q_offset", "q_segments", "kv_segments")
        inputs: dict[str, Any] = dict(zip(names, refs[:num_inputs], strict=False))
        out, lse = refs[num_inputs:]
        kernel = _Kernel(self, inputs, out, lse, scratch)
        wg = lax.axis_index("wg")
        wgs = self.config.compute_wgs

        @pl.when(wg < wgs)
        def _() -> None:
            # 65536 registers: 128 threads keep 40, the rest share.
            plgpu.set_max_registers(152 if wgs == 3 else 232, action="increase")
            kernel.compute(wg)

        @pl.when(wg == wgs)
        def _() -> None:
            plgpu.set_max_registers(40, action="decrease")
            kernel.copy()


class _Kernel:
    """The traced part: one instance for each trace of `_Plan.flash_attention_forward`."""

    def __init__(self, plan: _Plan, inputs: dict[str, Any], out: Any, lse: Any, scratch: Any):
        self.plan = plan
        self.inputs = inputs
        self.out = out
        self.lse = lse
        self.smem = scratch

    def each_tile(self, run: Any, carry: Any) -> Any:
        """`run(i, row, head, tile, carry)` for the i-th tile of this CTA: heavy ones first, and
        query heads that share K and V beside each other. Rounds alternate in direction, which
        evens out the sums of causal tiles."""
        plan = self.plan
        cta = lax.axis_index("cta")
        rounds, rest = divmod(plan.num_tiles, plan.ctas)
        side = plan.section * plan.num_heads // plan.num_kv_heads

        def step(i: jax.Array, carry: Any) -> Any:
            place = jnp.where(lax.rem(i, 2) == 0, cta, plan.ctas - 1 - cta)
            part, index = divmod_by(i * plan.ctas + place, side * plan.q_tiles)
            tile, lane = divmod_by(index, side)
            row, head = divmod_by(part * side + lane, plan.num_heads)
            return run(i, row, head, plan.q_tiles - 1 - tile, carry)

        if rounds == 1 and not rest:
            return step(jnp.int32(0), carry)
        last = jnp.where(jnp.int32(rounds % 2) == 0, cta, plan.ctas - 1 - cta)
        count = jnp.int32(rounds) + (last < rest).astype(jnp.int32)
        return lax.fori_loop(0, count, step, carry)

    def copy(self) -> None:
        """The copying warpgroup: Q of each tile, and its blocks of K and V from the last to the
        first. K runs one block ahead of V, as the computing side wants them."""
        plan, smem, inputs = self.plan, self.smem, self.inputs
        stages, block_kv = plan.config.stages, plan.config.block_kv
        group = plan.num_heads // plan.num_kv_heads

        def tile(i: jax.Array, row: Any, head: Any, tile: Any, done: jax.Array) -> jax.Array:
            kv_head = lax.div(head, jnp.int32(group))
            first, end = inputs["ranges"][row, tile, 0], inputs["ranges"][row, tile, 3]

            @pl.when(i > 0)
            def _() -> None:
                plgpu.barrier_wait(smem["q_free"])

            rows = pl.ds(tile * plan.tile_q, plan.tile_q)
            plgpu.copy_gmem_to_smem(inputs["q"].at[row, rows, head], smem["q_smem"], smem["q_full"])

            def fetch(name: str, block: jax.Array, count: jax.Array) -> None:
                slot = lax.rem(count, jnp.int32(stages))
                full, free = smem[f"{name}_full"].at[slot], smem[f"{name}_free"].at[slot]

                @pl.when(count >= stages)
                def _() -> None:
                    plgpu.barrier_wait(free)

                keys = pl.ds(block * block_kv, block_kv)
                plgpu.copy_gmem_to_smem(
                    inputs[name].at[row, keys, kv_head], smem[f"{name}_smem"].at[slot], full
                )
                if name == "k" and plan.segments:
                    plgpu.copy_gmem_to_smem(
                        inputs["kv_segments"].at[row, keys], smem["kv_segments_smem"].at[slot], full
                    )

            count = end - first
            fetch("k", end - 1, done)

            @pl.loop(1, count)
            def _(step: jax.Array) -> None:
                fetch("k", end - 1 - step, done + step)
                fetch("v", end - step, done + step - 1)

            fetch("v", first, done + count - 1)
            return done + count

        done = self.each_tile(tile, jnp.int32(0))
        # What the computing side released last; no barrier is left with an arrival.
        plgpu.barrier_wait(smem["q_free"])
        for slot in range(stages):

            @pl.when(done > slot)
            def _(slot: int = slot) -> None:
                plgpu.barrier_wait(smem["k_free"].at[slot])
                plgpu.barrier_wait(smem["v_free"].at[slot])

    def compute(self, wg: jax.Array) -> None:
        """A computing warpgroup: its rows of every tile."""
        plan, smem = self.plan, self.smem
        if plan.takes_turns:

            @pl.when(wg == plan.config.compute_wgs - 1)
            def _() -> None:
                plgpu.barrier_arrive(smem["turn"].at[0])

        def tile(i: Any, row: Any, head: Any, tile: Any, done: jax.Array) -> jax.Array:
            first, first_full, end_full, end = (
                self.inputs["ranges"][row, tile, x] for x in range(4)
            )
            part = Tile(self, wg, row, tile, done, end)
            plgpu.barrier_wait(smem["q_full"])
            carry = part.first_block()
            # Steps count from the last block: a mask, none, a mask again at the window's far end.
            a = jnp.maximum(end - end_full, 1)
            b = jnp.maximum(end - first_full, a)
            carry = lax.fori_loop(1, a, part.masked_step, carry)
            carry = lax.fori_loop(a, b, part.step, carry)
            if plan.options.window is not None or plan.segments:
                carry = lax.fori_loop(b, end - first, part.masked_step, carry)
            if plan.own_out:
                plgpu.barrier_arrive(smem["q_free"])
            out, m, total = part.last_block(end - first - 1, carry)
            self.store(wg, row, head, tile, out, m, total)
            if not plan.own_out:
                plgpu.barrier_arrive(smem["q_free"])
            return done + end - first

        self.each_tile(tile, jnp.int32(0))
        if plan.takes_turns:

            @pl.when(wg == 0)
            def _() -> None:
                plgpu.barrier_wait(smem["turn"].at[0])

        plgpu.wait_smem_to_gmem(0)

    def store(self, wg: Any, row: Any, head: Any, tile: Any, out: Any, m: Any, total: Any) -> None:
        """Output and lse of this warpgroup's rows; `m` is in units of log2."""
        plan, smem, block_q = self.plan, self.smem, self.plan.config.block_q
        some = total > 0
        inverse = jnp.where(some, 1.0 / total, 0.0)
        lse = jnp.where(some, (m + jnp.log2(total)) * math.log(2.0), MASKED)
        mine = pl.ds(wg * block_q, block_q)
        out_smem = smem["out_smem" if plan.own_out else "q_smem"].at[mine]
        lse_smem = smem["lse_smem"].at[wg]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[...] = (out * lax.broadcast_in_dim(inverse, out.shape, [0])).astype(plan.dtype)
        lse_smem[...] = lse
        plgpu.commit_smem()
        rows = pl.ds(tile * plan.tile_q + wg * block_q, block_q)
        plgpu.copy_smem_to_gmem(out_smem, self.out.at[row, rows, head], commit_group=False)
        plgpu.copy_smem_to_gmem(lse_smem, self.lse.at[row, head, rows], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        if not plan.own_out:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
