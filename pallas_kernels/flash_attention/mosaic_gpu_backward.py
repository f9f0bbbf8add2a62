"""Flash attention backward for Hopper: block sizes, and the launches of the two kernels of
`mosaic_gpu_gradients.py`.

One kernel goes over tiles of keys (dk and dv, summed over the query heads of the group in
registers), one over tiles of queries (dq). They multiply S and dP twice, seven products instead of
five, but add nothing to memory atomically: gradients are the same bits in every run.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.common import MASKED, Target
from pallas_kernels.flash_attention import Mask, Options
from pallas_kernels.flash_attention.mosaic_gpu_blocks import (
    LOG2E,
    PARAMS,
    block_ranges,
    check,
    pad_axis,
)
from pallas_kernels.flash_attention.mosaic_gpu_gradients import Dkv, Dq
from pallas_kernels.flash_attention.mosaic_gpu_streams import Shape


@dataclass(frozen=True)
class BackwardConfig:
    """Block sizes of the backward kernels, as `tuned/*.json` has them under op "flash_attention",
    stage "backward", key (dtype, head_dim, causal: 0 or 1)."""

    dkv_block_kv: int = 64  # keys of one compute warpgroup, a multiple of 64
    dkv_block_q: int = 64  # queries of one step, a multiple of 64
    dkv_stages: int = 2  # blocks of Q in shared memory
    dkv_stages_do: int = 2  # blocks of dO
    dkv_halves: int = 0  # 1: both warpgroups have the same keys, and each half of the head dim
    dq_block_q: int = 64  # queries of one compute warpgroup
    dq_block_kv: int = 64  # keys of one step
    dq_stages: int = 2  # blocks of K
    dq_stages_v: int = 2  # blocks of V
    compute_wgs: int = 2  # compute warpgroups of both kernels, 1 or 2

    def __post_init__(self) -> None:
        for name in ("dkv_block_kv", "dkv_block_q", "dq_block_q", "dq_block_kv"):
            value = getattr(self, name)
            if value < 64 or value % 64:
                raise ValueError(f"{name} is {value}; it must be a multiple of 64")
        limits = {
            "dkv_stages": (2, 8),
            "dkv_stages_do": (2, 8),
            "dkv_halves": (0, self.compute_wgs - 1),
            "dq_stages": (2, 8),
            "dq_stages_v": (1, 8),
            "compute_wgs": (1, 2),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be in [{low}, {high}]")


def default_config(target: Target, dtype: str, head_dim: int, causal: bool) -> BackwardConfig:
    """The tuned configuration, or the rule: the blocks that leave no register spilled."""
    key = {"dtype": dtype, "head_dim": head_dim, "causal": int(causal)}
    tuned = tuning.lookup(target.device_kind, "flash_attention", "backward", **key)
    if tuned is not None:
        return BackwardConfig(**tuned)
    if head_dim == 256:  # dk and dv of 64 keys are 256 registers: too many for one warpgroup
        return BackwardConfig(dkv_halves=1, dq_stages_v=1)
    return BackwardConfig()


@jax.named_scope("flash_attention_backward")
def backward(
    q: jax.Array,  # [B, S, N, H]
    k: jax.Array,  # [B, Sk, K, H]
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,  # [B, N, S]
    dout: jax.Array,
    mask: Mask,
    options: Options,
    target: Target,
    *,
    config: BackwardConfig | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.flash_attention` for the contract."""
    check(q, target)
    if config is None:
        config = default_config(target, q.dtype.name, q.shape[3], options.causal)
    delta = jnp.einsum("bsnh,bsnh->bns", dout, out, preferred_element_type=jnp.float32)
    # Rows that see nothing: a huge lse makes every probability 0, and with it every gradient.
    lse = jnp.where(lse <= 0.5 * MASKED, -MASKED, lse * LOG2E)
    shape = Shape(
        batch=q.shape[0],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        q_len=q.shape[1],
        kv_len=k.shape[1],
        dtype=q.dtype.name,
        segments=mask.q_segments is not None,
        interpret=bool(target.interpret),
        wgs=config.compute_wgs,
        options=options,
    )
    operands = [pad_axis(x, 1, 8) for x in (q, k, v, dout)]
    c = config
    kernels = (
        Dq(shape, c.dq_block_q, c.dq_block_kv, c.dq_stages, c.dq_stages_v),
        Dkv(
            shape, c.dkv_block_kv, c.dkv_block_q, c.dkv_stages, c.dkv_stages_do, bool(c.dkv_halves)
        ),
    )
    bodies = (kernels[0].flash_attention_dq, kernels[1].flash_attention_dkv)  # names in profiles
    results = [
        _launch(kernel, body, operands, lse, delta, mask, target)
        for kernel, body in zip(kernels, bodies, strict=True)
    ]
    dq, dk, dv = (x for part in results for x in part)
    return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : v.shape[1]]


def _launch(
    kernel: Any,
    body: Any,
    operands: list[jax.Array],
    lse: jax.Array,
    delta: jax.Array,
    mask: Mask,
    target: Target,
) -> list[jax.Array]:
    shape, q_block, kv_block = kernel.shape, kernel.q_block, kernel.kv_block
    ranges = block_ranges(
        mask, shape.options, shape.q_len, shape.kv_len, block_q=q_block, block_kv=kv_block
    )[kernel.side]
    vectors = [pad_axis(x, 2, q_block) for x in (lse, delta)]
    segments = []
    if mask.q_segments is not None and mask.kv_segments is not None:
        segments = [pad_axis(mask.q_segments, 1, q_block), pad_axis(mask.kv_segments, 1, kv_block)]
    like = operands[kernel.side]
    interpret = {"interpret": target.interpret} if target.interpret else {}
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(like.shape, like.dtype)] * kernel.num_results,
        scratch_types=kernel.scratch(),
        grid=(kernel.num_tiles,),
        grid_names=("tile",),
        num_threads=shape.wgs + 1,
        thread_name="wg",
        compiler_params=PARAMS,
        **interpret,
    )(*operands, *vectors, ranges, mask.q_offset, *segments)
