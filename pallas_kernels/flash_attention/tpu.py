"""Flash attention on TPU (Mosaic): the forward kernel; the backward ones are in tpu_backward.py.

Grid [B, K * parts, q_blocks, steps over keys]. A tile of queries stays while the blocks of keys it
sees pass; blocks it does not see are neither fetched nor computed. Only a block with a hidden pair
in it is masked. The query heads of a group share one fetch of K and V.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import MASKED, Spec, Target
from pallas_kernels.flash_attention import Mask, Options
from pallas_kernels.flash_attention.tpu_backward import backward
from pallas_kernels.flash_attention.tpu_config import (
    DTYPES,
    BackwardConfig,
    ForwardConfig,
    check_dtype,
    compiler_params,
    forward_config,
)
from pallas_kernels.flash_attention.tpu_tiles import (
    LANES,
    LOG2E,
    NOTHING_SEEN,
    Pair,
    Tiles,
    as_column,
    base2_scores,
    block_tables,
    lanes,
    matmul,
    query_specs,
    segment_blocks,
    segment_refs,
)

__all__ = ["BackwardConfig", "ForwardConfig", "backward", "forward", "unsupported"]


def unsupported(spec: Spec | None, target: Target) -> str | None:
    """Why these kernels cannot do `spec`, on the chip or interpreted; None when they can."""
    if spec is not None and spec.dtype not in DTYPES:
        return f"dtype is {spec.dtype}; allowed on TPU: {', '.join(DTYPES)}"
    return None


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
    """See `pallas_kernels.flash_attention` for the contract; float32 and bfloat16. A `config`
    larger than the sequences is cut down to them."""
    check_dtype(q.dtype)
    group = q.shape[2] // k.shape[2]
    if config is None:
        config = forward_config(target, q.dtype, q.shape[3], group)
    config.check("config", group)
    tiles = Tiles.of(q, k, config)
    tables = block_tables(mask, options, tiles, by_kv=False)
    segments = segment_blocks(mask, tiles)
    q, k, v = tiles.queries(q), tiles.keys(k), tiles.keys(v)
    q_spec, kv_spec, row_spec, segment_specs = query_specs(tiles, bool(segments))
    scratch = [
        pltpu.VMEM((tiles.rows, LANES), jnp.float32),
        pltpu.VMEM((tiles.rows, LANES), jnp.float32),
        pltpu.VMEM((tiles.rows, tiles.head_dim), jnp.float32),
    ]
    if segments:
        scratch.append(pltpu.VMEM((tiles.rows, LANES), jnp.int32))
    out, lse = pl.pallas_call(
        partial(_kernel, tiles, options, len(tables)),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:2], tiles.q_blocks, 1, tiles.rows), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(*q.shape[:2], tiles.q_blocks, tiles.kv_steps(options)),
            in_specs=[q_spec, kv_spec, kv_spec, *segment_specs],
            out_specs=[q_spec, row_spec],
            scratch_shapes=scratch,
        ),
        compiler_params=compiler_params(target),
        cost_estimate=tiles.cost(options, matmuls=2, dtype=q.dtype),
        interpret=target.interpret,
        name="flash_attention_forward",
    )(*tables, q, k, v, *segments)
    return tiles.from_queries(out), tiles.from_row_vectors(lse)


def _kernel(tiles: Tiles, options: Options, num_tables: int, *refs: Any) -> None:
    tables = refs[:num_tables]
    q_ref, k_ref, v_ref, *rest = refs[num_tables:]
    rest, q_ids_ref, kv_ids_ref, q_ids_column = segment_refs(rest, 5)
    out_ref, lse_ref, most_ref, total_ref, acc_ref = rest
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first, last = tables[1:3]
    row = b * tiles.q_blocks + i
    block = first[row] + step
    pair = Pair.of(tiles, options, tables, b, i, block)
    size = tiles.compute_kv

    @pl.when(step == 0)
    def _():
        most_ref[...] = jnp.full_like(most_ref, NOTHING_SEEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        if q_ids_ref is not None:
            q_ids_column[...] = as_column(q_ids_ref[...])

    def products(start: Any) -> jax.Array:
        q = q_ref[...].reshape(tiles.rows, tiles.head_dim)
        return matmul(q, k_ref[pl.ds(start, size)], (1, 1))

    def add(start: Any, scores: jax.Array, state: Any) -> Any:
        """The state with a piece of keys in it. Every lane of `most` is the row's maximum; `total`
        has a sum for each lane."""
        most, total, acc = state
        new_most = jnp.maximum(most, jnp.max(scores, axis=1, keepdims=True))
        shrink = jnp.exp2(most - new_most)
        weights = jnp.exp2(scores - lanes(new_most, size))
        total = total * shrink
        for lane in range(0, size, LANES):
            total = total + weights[:, lane : lane + LANES]
        v = v_ref[pl.ds(start, size)]
        acc = acc * lanes(shrink, tiles.head_dim) + matmul(weights.astype(v.dtype), v, (1, 0))
        return new_most, total, acc

    crosses = pair.crosses()

    @pl.when((block <= last[row]) & ~crosses)
    def _():
        state = most_ref[...], total_ref[...], acc_ref[...]
        following = products(0)
        for start in range(0, tiles.block_kv, size):
            scores = base2_scores(following, options)
            # The matrix unit works on these while the vector units work on the scores.
            if start + size < tiles.block_kv:
                following = products(start + size)
            state = add(start, scores, state)
        most_ref[...], total_ref[...], acc_ref[...] = state

    @pl.when((block <= last[row]) & crosses)
    def _():
        @pl.loop(*pair.pieces())
        def _(n: jax.Array):
            start = pl.multiple_of(n * size, size)
            ids = None
            if q_ids_ref is not None:
                ids = lanes(q_ids_column[...], size), kv_ids_ref[:, pl.ds(start, size)]
            scores = base2_scores(products(start), options)
            scores = jnp.where(pair.seen(start, ids, kv_axis=1), scores, MASKED)
            state = add(start, scores, (most_ref[...], total_ref[...], acc_ref[...]))
            most_ref[...], total_ref[...], acc_ref[...] = state

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        total = jnp.sum(total_ref[...], axis=1, keepdims=True)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        out_ref[...] = (acc_ref[...] / total).reshape(out_ref.shape).astype(out_ref.dtype)
        lse = jnp.where(some, (most_ref[...] + jnp.log2(total)) / LOG2E, MASKED)
        lse_ref[...] = lse.T[:1]
