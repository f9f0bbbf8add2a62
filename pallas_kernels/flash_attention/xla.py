"""Blocked attention in plain XLA, forward and backward: the fast path on CPU, right everywhere.

Online softmax (FlashAttention, arXiv 2205.14135; version 2, arXiv 2307.08691) over pairs of a
block of queries and a block of keys; each pair is one product per KV head, with the queries of all
its G heads as rows. Pairs in which causality, the window or q_offset leave nothing visible are
skipped: trip counts are data, which the hand-written backward allows. One row of the batch at a
time, so its bits do not depend on the others. Memory is linear in S and Sk.

More letters: I and J blocks of queries and of keys, R = G * block_q rows of a block of queries
(head-major), C = block_kv.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import MASKED, Spec, Target
from pallas_kernels.flash_attention import Mask, Options


@dataclass(frozen=True)
class Config:
    """Tokens of a block of queries, and of a block of keys."""

    block_q: int
    block_kv: int


def default_config(group: int, q_len: int, kv_len: int) -> Config:
    """Measured on two CPU cores, S 512 to 2048, 9/3 heads of 64 and 32/8 of 128: of R 128 to 1024
    and C 64 to 512, R = 256 and C = 128 is the fastest or near it, and the smallest that is."""
    return Config(min(max(16, 256 // group), q_len), min(128, kv_len))


@dataclass(frozen=True)
class _Tiling:
    """How one call is cut into blocks."""

    config: Config
    q_len: int
    kv_len: int
    num_kv_heads: int
    group: int

    @property
    def num_q(self) -> int:
        """I."""
        return -(-self.q_len // self.config.block_q)

    @property
    def num_kv(self) -> int:
        """J."""
        return -(-self.kv_len // self.config.block_kv)


def _tiling(q: jax.Array, k: jax.Array, config: Config | None) -> _Tiling:
    group = q.shape[2] // k.shape[2]
    config = config or default_config(group, q.shape[1], k.shape[1])
    return _Tiling(config, q.shape[1], k.shape[1], k.shape[2], group)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _MaskBlocks:
    """A Mask by blocks."""

    q_offset: jax.Array  # [B]
    q_segments: jax.Array | None  # [B * I, block_q]
    kv_segments: jax.Array | None  # [B * J, C]


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """`x [B, L, ...]` as `[B * blocks, size, ...]`, with zeros behind the end."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(-1, size, *x.shape[2:])


def _q_blocks(x: jax.Array, tiling: _Tiling) -> jax.Array:
    """`x [B, S, N, ...]` as `[B * I, K, R, ...]`."""
    x = _blocks(x, tiling.config.block_q)
    num_blocks, block_q, _, *rest = x.shape
    x = x.reshape(num_blocks, block_q, tiling.num_kv_heads, tiling.group, *rest)
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(num_blocks, tiling.num_kv_heads, tiling.group * block_q, *rest)


def _kv_blocks(x: jax.Array, tiling: _Tiling) -> jax.Array:
    """`x [B, Sk, K, H]` as `[B * J, K, C, H]`."""
    return jnp.swapaxes(_blocks(x, tiling.config.block_kv), 1, 2)


def _from_q_blocks(x: jax.Array, tiling: _Tiling) -> jax.Array:
    """`x [B * I, K, R, ...]` as `[B, S, N, ...]`."""
    rest = x.shape[3:]
    x = x.reshape(-1, tiling.num_q, tiling.num_kv_heads, tiling.group, tiling.config.block_q, *rest)
    x = jnp.moveaxis(x, 4, 2)  # [B, I, block_q, K, G, ...]
    heads = tiling.num_kv_heads * tiling.group
    return x.reshape(x.shape[0], -1, heads, *rest)[:, : tiling.q_len]


def _from_kv_blocks(x: jax.Array, tiling: _Tiling) -> jax.Array:
    """`x [B * J, K, C, H]` as `[B, Sk, K, H]`."""
    x = jnp.swapaxes(x, 1, 2)
    x = x.reshape(-1, tiling.num_kv * tiling.config.block_kv, *x.shape[2:])
    return x[:, : tiling.kv_len]


def _mask_blocks(mask: Mask, tiling: _Tiling) -> _MaskBlocks:
    q_segments, kv_segments = mask.q_segments, mask.kv_segments
    if q_segments is not None and kv_segments is not None:
        q_segments = _blocks(q_segments, tiling.config.block_q)
        kv_segments = _blocks(kv_segments, tiling.config.block_kv)
    return _MaskBlocks(mask.q_offset, q_segments, kv_segments)


def _seen(
    mask: _MaskBlocks, options: Options, tiling: _Tiling, row: jax.Array, i: jax.Array, j: jax.Array
) -> jax.Array:
    """`[R, C]` bool: what the queries of block i see of the keys of block j, in row `row`."""
    block_q, block_kv = tiling.config.block_q, tiling.config.block_kv
    q_pos = mask.q_offset[row] + i * block_q + jnp.arange(block_q, dtype=jnp.int32)
    q_pos = jnp.tile(q_pos, tiling.group)[:, None]
    kv_pos = j * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
    seen = (kv_pos <= q_pos) if options.causal else jnp.ones((q_pos.size, block_kv), bool)
    if tiling.kv_len % block_kv:
        seen &= kv_pos < tiling.kv_len
    if options.window is not None:
        seen &= kv_pos > q_pos - options.window
    if mask.q_segments is not None and mask.kv_segments is not None:
        q_segments = jnp.tile(mask.q_segments[row * tiling.num_q + i], tiling.group)
        seen &= q_segments[:, None] == mask.kv_segments[row * tiling.num_kv + j]
    return seen


def _kv_range(
    q_offset: jax.Array, options: Options, tiling: _Tiling, i: jax.Array
) -> tuple[jax.Array | int, jax.Array | int]:
    """First block of keys that block i of queries sees, and the block behind the last."""
    block_q, block_kv = tiling.config.block_q, tiling.config.block_kv
    begin, end = 0, tiling.num_kv
    if options.causal:
        last = q_offset + jnp.minimum((i + 1) * block_q, tiling.q_len) - 1
        end = jnp.minimum(last // block_kv + 1, end)
    if options.window is not None:
        begin = jnp.maximum(q_offset + i * block_q - (options.window - 1), 0) // block_kv
    return begin, end


def _q_range(
    q_offset: jax.Array, options: Options, tiling: _Tiling, j: jax.Array
) -> tuple[jax.Array | int, jax.Array | int]:
    """First block of queries that sees any of block j of keys, and the block behind the last."""
    block_q, block_kv = tiling.config.block_q, tiling.config.block_kv
    begin, end = 0, tiling.num_q
    if options.causal:
        begin = jnp.maximum(j * block_kv - q_offset, 0) // block_q
    if options.window is not None:
        last = (j + 1) * block_kv - 1 - q_offset + (options.window - 1)
        end = jnp.clip(last // block_q + 1, 0, end)
    return begin, end


def _scores(q: jax.Array, k: jax.Array, options: Options) -> tuple[jax.Array, jax.Array | None]:
    """`[K, R, C]`: scores before the mask; and their derivative by q . k where that is not 1."""
    scores = _einsum("krh,kch->krc", q, k)
    if options.soft_cap is None:
        return scores, None
    tanh = jnp.tanh(scores / options.soft_cap)
    return options.soft_cap * tanh, 1.0 - tanh * tanh


@jax.named_scope("flash_attention")
def forward(
    q: jax.Array,  # [B, S, N, H]
    k: jax.Array,  # [B, Sk, K, H]
    v: jax.Array,
    mask: Mask,
    options: Options,
    target: Target,
    *,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.flash_attention` for the contract."""
    tiling = _tiling(q, k, config)
    q_all = _q_blocks(q, tiling)
    kv_all = (_kv_blocks(k, tiling), _kv_blocks(v, tiling))
    masks = _mask_blocks(mask, tiling)

    def attend(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        row, i = index // tiling.num_q, index % tiling.num_q
        q_block = q_all[index].astype(jnp.float32) * options.scale

        def step(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest, total, acc = state
            k_block, v_block = (x[row * tiling.num_kv + j].astype(jnp.float32) for x in kv_all)
            seen = _seen(masks, options, tiling, row, i, j)
            scores = jnp.where(seen, _scores(q_block, k_block, options)[0], MASKED)
            new = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = jnp.where(seen, jnp.exp(scores - new[..., None]), 0.0)
            shrink = jnp.exp(largest - new)
            total = total * shrink + jnp.sum(weights, axis=-1)
            acc = acc * shrink[..., None] + _einsum("krc,kch->krh", weights, v_block)
            return new, total, acc

        largest = jnp.full(q_block.shape[:2], MASKED, jnp.float32)
        state = (largest, jnp.zeros_like(largest), jnp.zeros_like(q_block))
        kv_range = _kv_range(mask.q_offset[row], options, tiling, i)
        largest, total, acc = lax.fori_loop(*kv_range, step, state)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, largest + jnp.log(total), MASKED)
        return (acc / total[..., None]).astype(q.dtype), lse

    out, lse = lax.map(attend, jnp.arange(q_all.shape[0], dtype=jnp.int32))
    return _from_q_blocks(out, tiling), jnp.swapaxes(_from_q_blocks(lse, tiling), 1, 2)


@jax.named_scope("flash_attention_backward")
def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    mask: Mask,
    options: Options,
    target: Target,
    *,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.flash_attention` for the contract.

    One pass, block of keys by block of keys: dk and dv of the block are sums over blocks of
    queries, dq of all queries is carried along.
    """
    tiling = _tiling(q, k, config)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    q_all = tuple(
        _q_blocks(x, tiling) for x in (q, dout, jnp.swapaxes(lse, 1, 2), delta)
    )  # [B * I, K, R, H] twice, [B * I, K, R] twice
    kv_all = (_kv_blocks(k, tiling), _kv_blocks(v, tiling))
    masks = _mask_blocks(mask, tiling)

    def gather(dq_all: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        row, j = index // tiling.num_kv, index % tiling.num_kv
        k_block, v_block = (x[index].astype(jnp.float32) for x in kv_all)

        def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq_all, dk, dv = state
            at = row * tiling.num_q + i
            q_block, dout_block, lse_block, delta_block = (x[at].astype(jnp.float32) for x in q_all)
            q_block *= options.scale
            scores, slope = _scores(q_block, k_block, options)
            seen = _seen(masks, options, tiling, row, i, j)
            weights = jnp.where(seen, jnp.exp(scores - lse_block[..., None]), 0.0)
            dweights = _einsum("krh,kch->krc", dout_block, v_block)
            dscores = weights * (dweights - delta_block[..., None])
            if slope is not None:
                dscores *= slope
            dq_all = dq_all.at[at].add(_einsum("krc,kch->krh", dscores, k_block))
            dk += _einsum("krc,krh->kch", dscores, q_block)
            dv += _einsum("krc,krh->kch", weights, dout_block)
            return dq_all, dk, dv

        q_range = _q_range(mask.q_offset[row], options, tiling, j)
        state = (dq_all, jnp.zeros_like(k_block), jnp.zeros_like(v_block))
        dq_all, dk, dv = lax.fori_loop(*q_range, step, state)
        return dq_all, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq = jnp.zeros(q_all[0].shape, jnp.float32)
    blocks = jnp.arange(kv_all[0].shape[0], dtype=jnp.int32)
    dq, (dk, dv) = lax.scan(gather, dq, blocks)
    dq = (dq * options.scale).astype(q.dtype)
    return _from_q_blocks(dq, tiling), _from_kv_blocks(dk, tiling), _from_kv_blocks(dv, tiling)


_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def unsupported(spec: Spec | None, target: Target) -> str | None:
    """Nothing is."""
    return None
