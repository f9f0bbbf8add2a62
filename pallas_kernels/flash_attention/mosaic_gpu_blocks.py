"""What the Mosaic GPU flash kernels share: which blocks a tile of the score matrix visits, the mask
within a block, and the scale of the exponent. Knows no barriers and no rings."""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import MASKED, Spec, Target
from pallas_kernels.flash_attention import Mask, Options
from pallas_kernels.mosaic_gpu import LOG2E, missing, tanh

HEAD_DIMS = (64, 128, 256)
DTYPES = ("bfloat16", "float16")
SHARED_MEMORY = 232448  # bytes that a CTA of sm_90 may have
# Operands that concurrent CTAs share should stay in the L2 cache (50 MB on an H200).
_L2_BYTES = 32 << 20

WGMMA = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of an accumulator
COLUMNS = plgpu.Layout.WGMMA.reduce(0)

# The kernels say where every register lives, so the lane semantics fit; jax's default changed.
PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def unsupported(spec: Spec | None, target: Target) -> str | None:
    """Why these kernels cannot do `spec` on `target`; None when they can."""
    why_not = missing(target)
    if why_not or spec is None:
        return why_not
    if spec.dtype not in DTYPES:
        return f"dtype is {spec.dtype}; allowed on Mosaic GPU: {', '.join(DTYPES)}"
    if spec.head_dim not in HEAD_DIMS:
        allowed = ", ".join(map(str, HEAD_DIMS))
        return f"head dim is {spec.head_dim}; allowed on Mosaic GPU: {allowed}"
    return None


def check(q: jax.Array, target: Target) -> None:
    """ValueError unless the tensor cores take q."""
    num_heads, head_dim = q.shape[2:]
    why_not = unsupported(Spec(num_heads, 1, head_dim, None, q.dtype.name, None), target)
    if why_not:
        raise ValueError(f"q: {why_not}")


def tiled(*shape: int, dtype: Any) -> Any:
    """Shared memory in the layout that TMA writes and wgmma reads."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def divmod_by(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of a traced x >= 0."""
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def side_by_side(heads: int, elements: int) -> int:
    """How many of `heads` should run at a time when each streams `elements` of 2 bytes: a divisor
    of their number, and what they stream fits the L2 cache."""
    fit = max(_L2_BYTES // (2 * elements), 1)
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fit)


def rows_of(ref: Any, wg: jax.Array, rows: int) -> Any:
    """The part of `ref` that belongs to a warpgroup. Inside a loop its place is computed anew in
    each round: otherwise the compiler keeps a descriptor for each wgmma in registers."""
    return ref.at[pl.ds(lax.optimization_barrier(wg * rows), rows)]


def pad_axis(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """`x` with zeros after `axis`, up to a multiple. TMA clips tiles, but in whole groups of rows
    (8 of the swizzled tiles, 16 bytes of a vector)."""
    more = -x.shape[axis] % multiple
    if not more:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, more)
    return jnp.pad(x, widths)


def block_ranges(
    mask: Mask, options: Options, q_len: int, kv_len: int, *, block_q: int, block_kv: int
) -> tuple[jax.Array, jax.Array]:
    """For each tile of queries the kv blocks to visit, and for each kv block the tiles of queries:
    int32 `[B, tiles, 4]` and `[B, blocks, 4]` of (first, first_full, end_full, end).

    [first, end) is never empty (a block without a visible pair changes nothing); every pair of
    [first_full, end_full) is visible, so only the rest needs a mask.
    """
    q_first = jnp.arange(0, q_len, block_q, dtype=jnp.int32)
    q_last = jnp.minimum(q_first + block_q, q_len) - 1
    kv_first = jnp.arange(0, kv_len, block_kv, dtype=jnp.int32)
    kv_last = jnp.minimum(kv_first + block_kv, kv_len) - 1
    low, high = (mask.q_offset[:, None, None] + x[:, None] for x in (q_first, q_last))
    some = jnp.ones((mask.q_offset.shape[0], q_first.size, kv_first.size), bool)
    full = some & (kv_first + block_kv <= kv_len)
    if options.causal:
        some &= kv_first <= high
        full &= kv_last <= low
    if options.window is not None:
        # Differences, not sums with the window: those could pass 2**31.
        some &= low - kv_last < options.window
        full &= high - kv_first < options.window
    if mask.q_segments is not None and mask.kv_segments is not None:
        q_min, q_max = _block_extremes(mask.q_segments, block_q)
        kv_min, kv_max = _block_extremes(mask.kv_segments, block_kv)
        q_min, q_max = q_min[:, :, None], q_max[:, :, None]
        kv_min, kv_max = kv_min[:, None], kv_max[:, None]
        some &= (q_min <= kv_max) & (kv_min <= q_max)
        full &= (q_min == q_max) & (kv_min == kv_max) & (q_min == kv_min)
    return _ranges(some, full), _ranges(some.swapaxes(1, 2), full.swapaxes(1, 2))


def _block_extremes(segments: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The least and the largest id of each block, `[B, blocks]`."""
    more = -segments.shape[1] % block
    blocks = jnp.pad(segments, ((0, 0), (0, more)), mode="edge").reshape(len(segments), -1, block)
    return blocks.min(axis=2), blocks.max(axis=2)


def _ranges(some: jax.Array, full: jax.Array) -> jax.Array:
    """(first, first_full, end_full, end) along the last axis; see `block_ranges`."""
    count = some.shape[-1]

    def extent(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = jnp.argmax(x, axis=-1)
        return first, jnp.where(x.any(-1), count - jnp.argmax(x[..., ::-1], axis=-1), first)

    first, end = extent(some)
    first_full, end_full = extent(full)
    # Segments may leave gaps: then every block is masked.
    whole = full.sum(axis=-1) == end_full - first_full
    first_full = jnp.where(whole & (end_full > first_full), first_full, first)
    end_full = jnp.where(whole & (end_full > first_full), end_full, first_full)
    ranges = (first, first_full, end_full, jnp.maximum(end, first + 1))
    return jnp.stack(ranges, axis=-1).astype(jnp.int32)


def folds(options: Options) -> bool:
    """Whether the scale can be folded into the exponent after the maximum was taken: it must keep
    the order of the scores and must not bring MASKED near 0."""
    return options.soft_cap is None and options.scale > 1e-3


def exponent(options: Options) -> float:
    """The factor c of exp2(c * x - ...) for the x of `logits`."""
    if options.soft_cap is not None:
        return options.soft_cap * LOG2E
    return options.scale * LOG2E if folds(options) else LOG2E


def logits(s: jax.Array, options: Options) -> jax.Array:
    """What stands for the scores until the exponent: tanh with a soft cap, else q . k, with the
    scale where it does not fold."""
    if options.soft_cap is not None:
        return tanh(s, options.scale / options.soft_cap)
    return s if folds(options) else s * options.scale


def seen(
    shape: tuple[int, ...],
    options: Options,
    *,
    q_axis: int,
    q_pos: jax.Array,
    kv_pos: jax.Array,
    kv_len: int | None,
    segments: tuple[Any, Any] | None,
) -> tuple[jax.Array, ...]:
    """Which pairs of a block are visible: those for which all of the results hold.

    `q_pos` and `kv_pos` are the positions of its first query and key, queries lie along `q_axis`;
    `kv_len` is None where keys past the end need no mask (with q_axis 1 it is not looked at);
    `segments` are the ids of its queries and keys, in the layouts of their axes.
    """
    # Bounds lie along the rows and columns are compared with them: two registers for each bound,
    # one comparison for each pair.
    ids = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    rows = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=ROWS)
    parts = []
    if options.causal and q_axis == 0:
        last = rows + (q_pos - kv_pos)
        if options.window is not None:
            # Rows with last < 0 see nothing anyway; the maximum keeps the difference in range.
            first = jnp.maximum(last, 0) - options.window
            parts.append(ids > lax.broadcast_in_dim(first, shape, [0]))
        if kv_len is not None:
            last = jnp.minimum(last, kv_len - 1 - kv_pos)
        parts.append(ids <= lax.broadcast_in_dim(last, shape, [0]))
    elif options.causal:
        first = rows + (kv_pos - q_pos)
        parts.append(ids >= lax.broadcast_in_dim(first, shape, [0]))
        if options.window is not None:
            end = jnp.minimum(first, 2**31 - 1 - options.window) + options.window
            parts.append(ids < lax.broadcast_in_dim(end, shape, [0]))
    elif kv_len is not None:
        parts.append(ids < kv_len - kv_pos)
    if segments is not None:
        q_segments, kv_segments = segments
        parts.append(
            lax.broadcast_in_dim(q_segments, shape, [q_axis])
            == lax.broadcast_in_dim(kv_segments, shape, [1 - q_axis])
        )
    return tuple(parts)


def masked(s: jax.Array, visible: tuple[jax.Array, ...]) -> jax.Array:
    """`s` where visible, else MASKED. One condition after the other: together they would have to
    be kept."""
    for part in visible:
        s = jnp.where(part, s, MASKED)
    return s
