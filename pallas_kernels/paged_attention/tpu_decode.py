"""Rows with one new token on the TPU: one program per row, pages copied ahead across rows.

The C vectors of a row of words are neighbours once the words are seen as the pages' dtype, so the
heads of a group are scored together, without unpacking: scores `[C * G, C * tokens]`, of which a
query keeps the columns of its own head. The others get weight 0, and so the product
with V's rows, which stand in the same order, sums each head's own. Online softmax over blocks whose
boundaries are absolute positions: the sums of a row do not depend on its batch mates.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import MASKED, Target, check_positive
from pallas_kernels.paged_attention.tpu_layout import (
    LANES,
    SUBLANES,
    Layout,
    Stream,
    all_values,
    columns_of,
    exponent,
    load_rows,
    score,
    spread,
    weigh,
)


@dataclass(frozen=True)
class DecodeConfig:
    """Tokens of a block (rounded to whole pages, at least one); blocks in flight or in use, from 2
    on."""

    block: int
    buffers: int

    def __post_init__(self) -> None:
        check_positive("block", self.block)
        if self.buffers < 2:
            raise ValueError(f"buffers is {self.buffers}; it must be at least 2")


@dataclass(frozen=True)
class Options:
    """The static part of one call."""

    scale: float
    window: int | None
    soft_cap: float | None
    compute_dtype: str  # of the operands of both products


def rule(layout: Layout, vmem: int) -> DecodeConfig:
    """Blocks of 512 tokens, and fewer where 3 of them would take half of `vmem`."""
    token_bytes = layout.token_rows * LANES * 4
    block = 512
    while block > max(layout.page_size, 128) and 3 * block * token_bytes > vmem // 2:
        block //= 2
    return DecodeConfig(block, 3)


@jax.named_scope("paged_decode")
def decode(
    q: jax.Array,  # [S, N, H]
    data: jax.Array,
    scales: jax.Array | None,
    page_table: jax.Array,  # [S, MP], every id within the pool
    kv_lens: jax.Array,  # [S]; 0: the row gives zeros
    layout: Layout,
    options: Options,
    config: DecodeConfig,
    vmem: int,
    target: Target,
) -> jax.Array:  # [S, N, H]
    """One query per row."""
    num_rows, num_heads, head_dim = q.shape
    group = num_heads // layout.num_kv_heads
    x, q_rows = _queries(q, layout, options)
    page_size, width = layout.page_size, page_table.shape[1]
    block_pages = max(1, config.block // page_size)
    scalars = _scalars(page_table, kv_lens, page_size, options.window)
    page_rows = page_size * layout.token_rows
    scratch: list[Any] = [
        pltpu.VMEM((config.buffers, block_pages * page_rows, LANES), jnp.uint32),
        pltpu.SemaphoreType.DMA((config.buffers,)),
        pltpu.SMEM((4,), jnp.int32),
    ]
    pools = [data]
    if scales is not None:
        pools.append(scales)
        scratch.append(pltpu.VMEM((config.buffers, block_pages, *scales.shape[1:]), jnp.float32))
    row_block = pl.BlockSpec((None, *x.shape[1:]), lambda row, *_: (row, 0, 0))
    out = pl.pallas_call(
        partial(
            _kernel,
            layout=layout,
            options=options,
            block_pages=block_pages,
            table_width=width,
            group=group,
        ),
        out_shape=jax.ShapeDtypeStruct(x.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_rows,),
            in_specs=[row_block, *[pl.BlockSpec(memory_space=pltpu.HBM) for _ in pools]],
            out_specs=row_block,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=vmem,
        ),
        interpret=target.interpret,
        name="paged_decode",
    )(*scalars, x, *pools)
    out = out.reshape(num_rows, layout.num_groups, q_rows, layout.lanes)
    out = out[:, :, : layout.packing * group].reshape(num_rows, -1, layout.lanes)[:, :num_heads]
    return out[:, :, layout.v_lane : layout.v_lane + head_dim]


def _queries(q: jax.Array, layout: Layout, options: Options) -> tuple[jax.Array, int]:
    """q [S, N, H] as `[S, groups * q_rows, H padded]`, and q_rows: the C * G heads of a group and
    rows of zeros up to a multiple of 8."""
    num_rows, num_heads, head_dim = q.shape
    own = layout.packing * (num_heads // layout.num_kv_heads)
    q_rows = -(-own // SUBLANES) * SUBLANES
    heads = layout.num_groups * own
    x = jnp.pad(q, ((0, 0), (0, heads - num_heads), (0, layout.lanes - head_dim)))
    x = x.reshape(num_rows, layout.num_groups, own, layout.lanes)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, q_rows - own), (0, 0)))
    x = x.reshape(num_rows, layout.num_groups * q_rows, layout.lanes).astype(options.compute_dtype)
    return x * jnp.asarray(2.0 ** (exponent(layout, x.dtype) // 2), x.dtype), q_rows


def _scalars(
    page_table: jax.Array, kv_lens: jax.Array, page_size: int, window: int | None
) -> tuple[jax.Array, ...]:
    """The table, the rows' lengths, the pages [first, last) that each row sees, the next row that
    sees any."""
    kv_lens = jnp.minimum(kv_lens, page_table.shape[1] * page_size)
    low = jnp.zeros_like(kv_lens) if window is None else jnp.maximum(kv_lens - window, 0)
    return (
        page_table.reshape(-1),
        kv_lens,
        jnp.append(low // page_size, 0),
        jnp.append((kv_lens + (page_size - 1)) // page_size, 0),
        _next_item(kv_lens > 0),
    )


def _next_item(has_pages: jax.Array) -> jax.Array:
    """For every item, and for the end, the first item from there on that has pages."""
    count = has_pages.shape[0]
    index = jnp.where(has_pages, jnp.arange(count, dtype=jnp.int32), count)
    return jnp.append(lax.cummin(index, reverse=True), jnp.int32(count))


def _kernel(
    table: Any,
    kv_lens: Any,
    first: Any,
    last: Any,
    next_item: Any,
    q: Any,  # [groups * q_rows, H padded]
    data: Any,
    *refs: Any,
    layout: Layout,
    options: Options,
    block_pages: int,
    table_width: int,
    group: int,
) -> None:
    scales, *rest = refs if layout.is_quantised else (None, *refs)
    out, buffers, semaphores, cursor, *scale_buffers = rest
    stream = Stream(
        layout=layout,
        block_pages=block_pages,
        table_width=table_width,
        num_items=pl.num_programs(0),
        table=table,
        row=None,
        first=first,
        last=last,
        next_item=next_item,
        data=data,
        scales=scales,
        buffers=buffers,
        scale_buffers=scale_buffers[0] if scale_buffers else None,
        semaphores=semaphores,
        cursor=cursor,
    )
    row = pl.program_id(0)

    @pl.when(row == 0)
    def _() -> None:
        stream.start()

    num_groups, packing = layout.num_groups, layout.packing
    q_rows = q.shape[0] // num_groups
    block = block_pages * layout.page_size
    dtype = jnp.dtype(options.compute_dtype)
    # Half of what the values lack before a product, half after: neither is too small or too large.
    half = 2.0 ** (exponent(layout, dtype) // 2)
    kv_len = kv_lens[row]
    low = jnp.int32(0) if options.window is None else jnp.maximum(kv_len - options.window, 0)
    columns = columns_of(layout, dtype, block)
    width, sections = columns.width, columns.sections
    column = lax.broadcasted_iota(jnp.int32, (q_rows, width * block), 1)
    head = lax.broadcasted_iota(jnp.int32, (q_rows, width * block), 0) // group
    slot = lax.rem(column, width) * sections

    def values(view: Any, row: int) -> jax.Array:
        return all_values(load_rows(view, row, block, layout), layout, dtype)

    def step(i: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, acc = state
        buffer = stream.receive(row, i)
        begin = i * block

        @pl.when((begin < low) | (begin + block > kv_len))
        def _() -> None:
            stream.clear(buffer, low - begin, kv_len - begin)

        view = stream.buffers.at[buffer]
        is_seen = column < (kv_len - begin) * width
        if options.window is not None:
            is_seen &= column >= (low - begin) * width
        visible = _beside([is_seen & (slot + i == head) for i in range(sections)])
        scores, v_scales = [], []
        for g in range(num_groups):
            x = score(q[g * q_rows : (g + 1) * q_rows, :], values(view, g))
            x = x * (options.scale * half)
            if scales is not None:
                rows = stream.scale_rows(buffer, g)
                k_scale, v_scale = (
                    _beside(
                        [spread(rows, first + i, sections, width, layout) for i in range(sections)]
                    )
                    for first in (0, packing)
                )
                x = x * k_scale
                v_scales.append(jnp.where(visible, v_scale * half, 0.0))
            if options.soft_cap is not None:
                x = options.soft_cap * jnp.tanh(x / options.soft_cap)
            scores.append(jnp.where(visible, x, MASKED))
        x = _stack(scores)
        new = jnp.maximum(largest, jnp.max(x, axis=1, keepdims=True))
        weights = jnp.exp(x - new)
        shrink = jnp.exp(largest - new)
        total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
        products = []
        for g in range(num_groups):
            w = weights[g * q_rows : (g + 1) * q_rows]
            if scales is not None:
                w = w * v_scales[g]
            if layout.v_slot:
                w = pltpu.roll(w, columns.shift(layout.v_slot), 1)
            products.append(weigh(w, values(view, layout.v_row + g)) * half)
        return new, total, acc * shrink + _stack(products)

    shape = (q.shape[0], 1)
    state = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    begin_block, end_block = stream.blocks(row)
    _, total, acc = lax.fori_loop(begin_block, end_block, step, state)
    out[...] = (acc / jnp.where(total > 0, total, 1.0)).astype(out.dtype)


def _beside(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _stack(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)
