"""Flash attention on TPU (Mosaic): the backward kernels, one for dq, one for dk and dv.

Both recompute the weights from the log-sum-exp: p = exp(score - lse), ds = p * (dout . v - delta)
with delta = sum(out * dout). The dq kernel walks the keys of a block of queries, as the forward
one does. The other walks the queries of a block of keys, all heads of the group, with keys down
and queries across, so that nothing is transposed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import MASKED, Target
from pallas_kernels.flash_attention import Mask, Options
from pallas_kernels.flash_attention.tpu_config import (
    BackwardConfig,
    backward_config,
    check_dtype,
    compiler_params,
)
from pallas_kernels.flash_attention.tpu_tiles import (
    LANES,
    LOG2E,
    Pair,
    Tiles,
    as_column,
    block_tables,
    lanes,
    matmul,
    query_specs,
    segment_blocks,
    segment_refs,
)


@jax.named_scope("flash_attention_backward")
def backward(
    q: jax.Array,  # [B, S, N, H]
    k: jax.Array,  # [B, Sk, K, H]
    v: jax.Array,
    out: jax.Array,  # [B, S, N, H]
    lse: jax.Array,  # [B, N, S]
    dout: jax.Array,
    mask: Mask,
    options: Options,
    target: Target,
    *,
    config: BackwardConfig | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.flash_attention` for the contract; float32 and bfloat16."""
    check_dtype(q.dtype)
    group = q.shape[2] // k.shape[2]
    if config is None:
        config = backward_config(target, q.dtype, q.shape[3], group)
    config.dq.check("config.dq", group)
    config.dkv.check("config.dkv", group)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)  # [B, S, N]
    delta = jnp.swapaxes(delta, 1, 2)
    # A query that sees nothing has weights of zero: exp2(anything - 1e30).
    lse = jnp.where(lse == MASKED, -MASKED, lse * LOG2E)
    dq = _queries(Tiles.of(q, k, config.dq), q, k, v, dout, lse, delta, mask, options, target)
    dk, dv = _keys(Tiles.of(q, k, config.dkv), q, k, v, dout, lse, delta, mask, options, target)
    return dq, dk, dv


def _queries(
    tiles: Tiles,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    mask: Mask,
    options: Options,
    target: Target,
) -> jax.Array:
    tables = block_tables(mask, options, tiles, by_kv=False)
    segments = segment_blocks(mask, tiles)
    q_spec, kv_spec, row_spec, segment_specs = query_specs(tiles, bool(segments))
    q, dout, k, v = tiles.queries(q), tiles.queries(dout), tiles.keys(k), tiles.keys(v)
    column = pltpu.VMEM((tiles.rows, LANES), jnp.float32)
    scratch = [column, column, pltpu.VMEM((tiles.rows, tiles.head_dim), jnp.float32)]
    if segments:
        scratch.append(pltpu.VMEM((tiles.rows, LANES), jnp.int32))
    dq = pl.pallas_call(
        partial(_queries_kernel, tiles, options, len(tables)),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(*q.shape[:2], tiles.q_blocks, tiles.kv_steps(options)),
            in_specs=[q_spec, q_spec, row_spec, row_spec, kv_spec, kv_spec, *segment_specs],
            out_specs=q_spec,
            scratch_shapes=scratch,
        ),
        compiler_params=compiler_params(target),
        cost_estimate=tiles.cost(options, matmuls=3, dtype=q.dtype),
        interpret=target.interpret,
        name="flash_attention_dq",
    )(
        *tables,
        q,
        dout,
        tiles.row_vectors(lse, -MASKED),
        tiles.row_vectors(delta, 0.0),
        k,
        v,
        *segments,
    )
    return tiles.from_queries(dq)


def _slopes(products: jax.Array, options: Options) -> tuple[jax.Array, jax.Array | None]:
    """Scores in base 2 of products q . k, and d score / d (scale * q . k) where it is not 1."""
    if options.soft_cap is None:
        return products * (options.scale * LOG2E), None
    capped = jnp.tanh(products * (options.scale / options.soft_cap))
    return capped * (options.soft_cap * LOG2E), 1.0 - capped * capped


def _queries_kernel(tiles: Tiles, options: Options, num_tables: int, *refs: Any) -> None:
    tables = refs[:num_tables]
    q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, *rest = refs[num_tables:]
    rest, q_ids_ref, kv_ids_ref, q_ids_column = segment_refs(rest, 4)
    dq_ref, lse_column, delta_column, acc_ref = rest
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first, last = tables[1:3]
    row = b * tiles.q_blocks + i
    block = first[row] + step
    pair = Pair.of(tiles, options, tables, b, i, block)
    size = tiles.compute_kv

    @pl.when(step == 0)
    def _():
        lse_column[...] = as_column(lse_ref[...])
        delta_column[...] = as_column(delta_ref[...])
        acc_ref[...] = jnp.zeros_like(acc_ref)
        if q_ids_ref is not None:
            q_ids_column[...] = as_column(q_ids_ref[...])

    def products(start: Any) -> tuple[jax.Array, jax.Array]:
        q, dout = (ref[...].reshape(tiles.rows, tiles.head_dim) for ref in (q_ref, dout_ref))
        piece = pl.ds(start, size)
        return matmul(q, k_ref[piece], (1, 1)), matmul(dout, v_ref[piece], (1, 1))

    def part(start: Any, scores: jax.Array, slopes: jax.Array | None, dp: jax.Array) -> jax.Array:
        weights = jnp.exp2(scores - lanes(lse_column[...], size))
        ds = weights * (dp - lanes(delta_column[...], size))
        ds = ds if slopes is None else ds * slopes
        k = k_ref[pl.ds(start, size)]
        return matmul(ds.astype(k.dtype), k, (1, 0))

    crosses = pair.crosses()

    @pl.when((block <= last[row]) & ~crosses)
    def _():
        acc = acc_ref[...]
        following = products(0)
        for start in range(0, tiles.block_kv, size):
            scores, slopes = _slopes(following[0], options)
            dp = following[1]
            if start + size < tiles.block_kv:
                following = products(start + size)
            acc = acc + part(start, scores, slopes, dp)
        acc_ref[...] = acc

    @pl.when((block <= last[row]) & crosses)
    def _():
        @pl.loop(*pair.pieces())
        def _(n: jax.Array):
            start = pl.multiple_of(n * size, size)
            ids = None
            if q_ids_ref is not None:
                ids = lanes(q_ids_column[...], size), kv_ids_ref[:, pl.ds(start, size)]
            scores, dp = products(start)
            scores, slopes = _slopes(scores, options)
            scores = jnp.where(pair.seen(start, ids, kv_axis=1), scores, MASKED)
            acc_ref[...] += part(start, scores, slopes, dp)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq = acc_ref[...] * options.scale
        dq_ref[...] = dq.reshape(dq_ref.shape).astype(dq_ref.dtype)


def _keys(
    tiles: Tiles,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    mask: Mask,
    options: Options,
    target: Target,
) -> tuple[jax.Array, jax.Array]:
    tables = block_tables(mask, options, tiles, by_kv=True)
    segments = segment_blocks(mask, tiles)
    q, dout, k, v = tiles.queries(q), tiles.queries(dout), tiles.keys(k), tiles.keys(v)
    steps = tiles.q_steps(options)

    def tile(b: Any, j: Any, step: Any, tables: Any) -> tuple[Any, Any]:
        """The part of the group and the block of queries to have in memory at a step."""
        first, last = tables[1:3]
        row = b * tiles.kv_blocks + j
        part, block = lax.div(step, steps), first[row] + lax.rem(step, steps)
        # After the last that sees these keys comes the next part, or the next block of keys.
        # The last block of keys keeps what it has.
        over = block > last[row]
        ends = over & (part == tiles.parts - 1)
        stays = ends & (j == tiles.kv_blocks - 1)
        following = b * tiles.kv_blocks + jnp.minimum(j + 1, tiles.kv_blocks - 1)
        after = jnp.where(ends, first[following], first[row])
        after = jnp.where(stays, jnp.maximum(last[row], 0), after)
        part = jnp.where(over, jnp.where(ends, jnp.where(stays, part, 0), part + 1), part)
        return part, jnp.where(over, after, block)

    def q_index(b: Any, n: Any, j: Any, step: Any, *tables: Any) -> tuple[Any, ...]:
        part, block = tile(b, j, step, tables)
        return b, n * tiles.parts + part, 0, block, 0

    def row_index(b: Any, n: Any, j: Any, step: Any, *tables: Any) -> tuple[Any, ...]:
        part, block = tile(b, j, step, tables)
        return b, n * tiles.parts + part, block, 0, 0

    q_spec = pl.BlockSpec((None, None, tiles.heads, tiles.block_q, tiles.head_dim), q_index)
    row_spec = pl.BlockSpec((None, None, None, 1, tiles.rows), row_index)
    kv_spec = pl.BlockSpec(
        (None, None, tiles.block_kv, tiles.head_dim), lambda b, n, j, step, *tables: (b, n, j, 0)
    )
    segment_specs = []
    scratch = [pltpu.VMEM((tiles.block_kv, tiles.head_dim), jnp.float32)] * 2
    if segments:
        segment_specs = [
            pl.BlockSpec(
                (None, None, 1, tiles.rows),
                lambda b, n, j, step, *tables: (b, tile(b, j, step, tables)[1], 0, 0),
            ),
            pl.BlockSpec(
                (None, None, 1, tiles.block_kv), lambda b, n, j, step, *tables: (b, j, 0, 0)
            ),
        ]
        scratch.append(pltpu.VMEM((tiles.block_kv, LANES), jnp.int32))
    dk, dv = pl.pallas_call(
        partial(_keys_kernel, tiles, options, steps, len(tables)),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(*k.shape[:2], tiles.kv_blocks, tiles.parts * steps),
            in_specs=[q_spec, q_spec, row_spec, row_spec, kv_spec, kv_spec, *segment_specs],
            out_specs=[kv_spec, kv_spec],
            scratch_shapes=scratch,
        ),
        compiler_params=compiler_params(target),
        cost_estimate=tiles.cost(options, matmuls=4, dtype=q.dtype),
        interpret=target.interpret,
        name="flash_attention_dkv",
    )(
        *tables,
        q,
        dout,
        tiles.row_vectors(lse, -MASKED),
        tiles.row_vectors(delta, 0.0),
        k,
        v,
        *segments,
    )
    return tiles.from_keys(dk), tiles.from_keys(dv)


def _keys_kernel(tiles: Tiles, options: Options, steps: int, num_tables: int, *refs: Any) -> None:
    tables = refs[:num_tables]
    q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, *rest = refs[num_tables:]
    rest, q_ids_ref, kv_ids_ref, kv_ids_column = segment_refs(rest, 4)
    dk_ref, dv_ref, dk_acc, dv_acc = rest
    b, j, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first, last = tables[1:3]
    row = b * tiles.kv_blocks + j
    block = first[row] + lax.rem(step, steps)
    pair = Pair.of(tiles, options, tables, b, block, j)
    size = tiles.compute_kv

    @pl.when(step == 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)
        if kv_ids_ref is not None:
            kv_ids_column[...] = as_column(kv_ids_ref[...])

    def add(start: Any, seen: jax.Array | None) -> None:
        piece = pl.ds(start, size)
        q, dout = (ref[...].reshape(tiles.rows, tiles.head_dim) for ref in (q_ref, dout_ref))
        scores, slopes = _slopes(matmul(k_ref[piece], q, (1, 1)), options)  # [size, rows]
        dp = matmul(v_ref[piece], dout, (1, 1))
        scores = scores if seen is None else jnp.where(seen, scores, MASKED)
        weights = jnp.exp2(scores - lse_ref[...])
        dv_acc[piece] += matmul(weights.astype(dout.dtype), dout, (1, 0))
        ds = weights * (dp - delta_ref[...])
        ds = ds if slopes is None else ds * slopes
        dk_acc[piece] += matmul(ds.astype(q.dtype), q, (1, 0))

    crosses = pair.crosses()

    @pl.when((block <= last[row]) & ~crosses)
    def _():
        for start in range(0, tiles.block_kv, size):
            add(start, None)

    @pl.when((block <= last[row]) & crosses)
    def _():
        @pl.loop(*pair.pieces())
        def _(n: jax.Array):
            start = pl.multiple_of(n * size, size)
            ids = None
            if q_ids_ref is not None:
                column = kv_ids_column[pl.ds(start, size)]
                ids = q_ids_ref[...], lanes(column, tiles.rows)
            add(start, pair.seen(start, ids, kv_axis=0))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dk_ref[...] = (dk_acc[...] * options.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)
