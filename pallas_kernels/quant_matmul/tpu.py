"""Quantised matmul on TPU chips (Pallas, Mosaic): weights become floats in registers, tile by tile.

Grid [tiles of T, tiles of N, tiles of K]; a tile of outputs stays in vector memory while those of K
pass. Columns of `data` are called lanes: for int4 a lane holds two elements of one group, and x
comes in two parts, which fit its low and its high halves.

Scales of groups are applied to the sums of each group while rows are few: then values stay exact in
bfloat16, and a scale meets rows instead of weights. Groups of fewer than 128 lanes take a copy of
the rows each, with zeros in the lanes of the others, so that one product gives all their sums.
Where rows are many, the weight is scaled before its product, and rounded to x's dtype with it.
Zero points leave the sum as scale * zero * (sum of the group's x), one small product for a tile.

fp8 becomes bfloat16, which holds it, on all chips. int8 with int8 rows is the matrix unit's own
product; TPU v4 has none, and sums bfloat16 products exactly, 2 ** 24 / 2 ** 14 of them at a time.
int16 rows are two int8 rows each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import Target, check_positive, quantise
from pallas_kernels.quant_matmul import Format, digits, validate

LANES = 128
# Rows, with those of the copies, up to which sums are scaled rather than weights.
MOST_SCALED_ROWS = 256
# Lanes of the largest block of a weight whose K has no divisor that is a multiple of 128.
MOST_LANES = 16384
# int8 products whose float32 sum is exact: 2 ** 10 * 128 * 128 = 2 ** 24.
EXACT_PRODUCTS = 1024


@dataclass(frozen=True)
class Config:
    """A tile: `block_t` rows, `block_n` outputs, and at most `block_k` lanes of `data`."""

    block_t: int
    block_n: int
    block_k: int

    def __post_init__(self) -> None:
        for name, value, multiple in (
            ("block_t", self.block_t, 32),
            ("block_n", self.block_n, LANES),
            ("block_k", self.block_k, LANES),
        ):
            check_positive(name, value)
            if value % multiple:
                raise ValueError(f"{name} is {value}; it must be a multiple of {multiple}")


# Interpreted, short arrays have several tiles too, the last of rows and outputs cut off.
_INTERPRETED = Config(32, 128, 128)


def rule(num_rows: int, dtype: Any, target: Target) -> Config:
    """Tiles for a chip. Few rows wait for the weight: its tiles are of 2 MiB (int8), large beside
    the third of a microsecond that a step of the grid costs. Many rows wait for the matrix unit:
    512 rows use each weight that was converted 512 times."""
    if target.interpret:
        return _INTERPRETED
    is_small = _has_small_memory(target)
    if num_rows <= 256:
        return Config(256, 512, 2048 if is_small else 4096)
    if is_small:
        return Config(256, 512, 512)
    return Config(256 if dtype == jnp.float32 else 512, 1024, 1024)


def _has_small_memory(target: Target) -> bool:
    """16 MiB of vector memory: a TPU v4, and whatever is not known."""
    return target.device_kind is None or "v4" in target.device_kind


def unsupported(format: Format, n: int, k: int, dtype: Any, target: Target) -> str | None:
    """Why this cannot multiply rows of `dtype` with a weight [n, k] of `format`; None if it can."""
    lanes = k // 2 if format.dtype == "int4" else k
    block = _block_k(lanes, _span(format), LANES)
    if block > MOST_LANES:
        return (
            f"K is {k} and group_size {format.group_size}; a tile on TPU would have {block} "
            f"columns, at most {MOST_LANES} fit"
        )
    return None


def _span(format: Format) -> int:
    """Lanes of one group; 1 where there are none."""
    if format.group_size is None:
        return 1
    return format.group_size // 2 if format.dtype == "int4" else format.group_size


def _block_k(lanes: int, span: int, most: int) -> int:
    """The most lanes up to `most` that divide all of them into tiles of whole groups; where that
    is none, the fewest."""
    unit = lcm(LANES, span)
    if lanes % unit:
        return lanes
    fitting = [x for x in range(unit, lanes + 1, unit) if lanes % x == 0]
    return max((x for x in fitting if x <= most), default=fitting[0])


@dataclass(frozen=True)
class _Plan:
    """The static part of one call. `names` are those of the kernel's references, in order."""

    format: Format
    block: tuple[int, int, int]  # rows, outputs, lanes
    span: int
    steps: int  # tiles of K
    dtype: Any  # of the products
    exact_int8: bool  # whether the matrix unit sums int8 in int32
    names: tuple[str, ...]

    @property
    def groups(self) -> int:
        """Groups of a tile."""
        return self.block[2] // self.span

    @property
    def pieces(self) -> list[tuple[slice, range]]:
        """The lanes of a tile, 128 at a time, and the groups that these belong to."""
        starts = range(0, self.block[2], LANES)
        slices = [slice(start, min(start + LANES, self.block[2])) for start in starts]
        return [(x, range(x.start // self.span, -(-x.stop // self.span))) for x in slices]

    @property
    def scales_sums(self) -> bool:
        return self.block[0] * max(len(groups) for _, groups in self.pieces) <= MOST_SCALED_ROWS


@jax.named_scope("quant_tpu")
def quant_matmul(
    x: jax.Array,  # [T, K]
    data: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    *,
    format: Format,
    target: Target,
    config: Config | None = None,
) -> jax.Array:  # float32 [T, N]
    """See `pallas_kernels.quant_matmul` for the contract. `config` overrides the tiles."""
    validate(x, data, scales, zeros, format)
    k, (n, lanes) = x.shape[1], data.shape
    why_not = unsupported(format, n, k, x.dtype, target)
    if why_not:
        raise ValueError(why_not)
    row_scales, has_digits = None, format.activations == "int16"
    if has_digits:
        # The kernel gives the sums of both digits alone.
        halves, row_scales = digits(x)
        x, format = halves.reshape(-1, k), replace(format, activations="int8")
    elif format.activations != "float":
        x, row_scales = quantise(x, format.activations)
    if format.activations == "float8_e4m3fn":
        x = x.astype(jnp.bfloat16)
    elif x.dtype == jnp.float16:
        x = x.astype(jnp.float32)
    num_rows = len(x)
    config = config or rule(num_rows, x.dtype, target)
    # Whole tiles of registers, so that no row of one is undefined.
    rows = -(-num_rows // 32) * 32 if x.dtype == jnp.int8 else -(-num_rows // 16) * 16
    x = jnp.pad(x, ((0, rows - num_rows), (0, 0)))
    span = _span(format)
    block_k = _block_k(lanes, span, config.block_k)
    block = (min(config.block_t, rows), min(config.block_n, -(-n // LANES) * LANES), block_k)
    arrays = {"x": _parts(x, format), "data": data}
    if format.group_size is None and not has_digits:
        arrays["scales"] = scales[None, :]
        if row_scales is not None:
            arrays["row_scales"] = jnp.pad(row_scales, (0, rows - num_rows))[:, None]
    elif format.group_size is not None:
        arrays["group_scales"] = scales
    if zeros is not None:
        # [tiles of K, T, groups of a tile]
        sums = x.astype(jnp.float32).reshape(rows, lanes // block_k, block_k // span, -1).sum(-1)
        arrays |= {"zeros": zeros, "x_sums": sums.swapaxes(0, 1)}
    dtype = jnp.bfloat16 if x.dtype == jnp.int8 else x.dtype
    exact_int8 = target.device_kind is None or "v4" not in target.device_kind
    names = (*arrays, "out", "acc", *(["turned"] if format.group_size else []))
    names += ("turned_zeros",) if zeros is not None else ()
    plan = _Plan(format, block, span, lanes // block_k, dtype, exact_int8, names)
    out = _call(plan, arrays, target)[:num_rows]
    if row_scales is None or not has_digits:
        return out
    high, low = jnp.split(out, 2)
    return (256.0 * high + low) * row_scales[:, None] * scales[None, :]


def _parts(x: jax.Array, format: Format) -> jax.Array:
    """x as [parts, T, lanes]: for int4 the elements of low and of high halves, else x itself."""
    if format.dtype != "int4":
        return x[None]
    rows, k = x.shape
    parts = x.reshape(rows, -1, 2, (format.group_size or k) // 2)
    return parts.transpose(2, 0, 1, 3).reshape(2, rows, k // 2)


def _call(plan: _Plan, arrays: Mapping[str, jax.Array], target: Target) -> jax.Array:
    block_t, block_n, block_k = plan.block
    (num_parts, rows, lanes), n = arrays["x"].shape, len(arrays["data"])
    num_groups = lanes // plan.span
    specs = {
        "x": pl.BlockSpec((num_parts, block_t, block_k), lambda t, n, k: (0, t, k)),
        "data": pl.BlockSpec((block_n, block_k), lambda t, n, k: (n, k)),
        "scales": pl.BlockSpec((1, block_n), lambda t, n, k: (0, n)),
        "row_scales": pl.BlockSpec((block_t, 1), lambda t, n, k: (t, 0)),
        "group_scales": pl.BlockSpec((block_n, num_groups), lambda t, n, k: (n, 0)),
        "zeros": pl.BlockSpec((block_n, num_groups), lambda t, n, k: (n, 0)),
        "x_sums": pl.BlockSpec((1, block_t, plan.groups), lambda t, n, k: (k, t, 0)),
    }
    is_integer = plan.format.activations == "int8"
    scratch = [pltpu.VMEM((block_t, block_n), jnp.int32 if is_integer else jnp.float32)]
    turned = pltpu.VMEM((plan.steps, plan.groups, block_n), jnp.float32)
    scratch += [turned] * sum(name.startswith("turned") for name in plan.names)
    return pl.pallas_call(
        partial(_kernel, plan),
        out_shape=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(pl.cdiv(rows, block_t), pl.cdiv(n, block_n), plan.steps),
            in_specs=[specs[name] for name in arrays],
            out_specs=pl.BlockSpec((block_t, block_n), lambda t, n, k: (t, n)),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=(15 if _has_small_memory(target) else 48) << 20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * n * lanes * num_parts,
            bytes_accessed=sum(a.nbytes for a in arrays.values()) + 4 * rows * n,
            transcendentals=0,
        ),
        interpret=target.interpret,
        name="quant_matmul",
    )(*arrays.values())


def _kernel(plan: _Plan, *refs: Any) -> None:
    ref = dict(zip(plan.names, refs, strict=True))
    step = pl.program_id(2)
    acc = ref["acc"]

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)
        if "group_scales" in ref:
            scales = ref["group_scales"][...]
            _turn(scales, ref["turned"])
            if "zeros" in ref:
                _turn(scales * ref["zeros"][...].astype(jnp.float32), ref["turned_zeros"])

    if plan.format.activations == "int8":
        acc[...] += _int8_sums(plan, ref["x"][0], ref["data"][...])
    elif plan.format.group_size is None:
        weights = _values(plan, ref["data"][...])
        acc[...] += sum(_dot(ref["x"][i], weight) for i, weight in enumerate(weights))
    elif plan.scales_sums:
        _add_scaled_sums(plan, ref, ref["turned"][step])
    else:
        _add_scaled_weights(plan, ref, ref["turned"][step].T)
    if "zeros" in ref:
        acc[...] -= _dot(ref["x_sums"][0], ref["turned_zeros"][step], axis=0)

    @pl.when(step == plan.steps - 1)
    def _() -> None:
        out = acc[...].astype(jnp.float32)
        if "row_scales" in ref:
            out = out * ref["row_scales"][...]
        ref["out"][...] = out * ref["scales"][...] if "scales" in ref else out


def _turn(values: jax.Array, to: Any) -> None:
    """Writes [N, groups] as [tiles of K, groups of a tile, N]: there a group is a row, and which
    tile's it is may be known at run time only."""
    turned = values.T
    steps, groups, _ = to.shape
    for i in range(steps):
        to[i] = turned[i * groups : (i + 1) * groups]


def _dot(x: jax.Array, w: jax.Array, axis: int = 1) -> jax.Array:
    """x [T, K] and w, whose `axis` is K -> float32 [T, N]."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def _stored(plan: _Plan, data: jax.Array) -> list[jax.Array]:
    """The weight's values as int8 or fp8, for int4 in two parts.

    Mosaic has no arithmetic on int8: four bytes at a time, without a carry between them,
    (u + 120) ^ 128 is u - 8 in two's complement for u in [0, 16)."""
    if plan.format.dtype != "int4":
        return [data]
    words = pltpu.bitcast(data, jnp.uint32)
    halves = [x & np.uint32(0x0F0F0F0F) for x in (words, words >> np.uint32(4))]
    halves = [(x + np.uint32(0x78787878)) ^ np.uint32(0x80808080) for x in halves]
    return [pltpu.bitcast(x, jnp.int8) for x in halves]


def _values(plan: _Plan, data: jax.Array) -> list[jax.Array]:
    """The same in the dtype of the products, which holds each exactly."""
    return [part.astype(plan.dtype) for part in _stored(plan, data)]


def _int8_sums(plan: _Plan, x: jax.Array, w: jax.Array) -> jax.Array:
    """int8 [T, K] and [N, K] -> int32 [T, N]."""
    if plan.exact_int8:
        dims = (((1,), (1,)), ((), ()))
        return lax.dot_general(x, w, dims, preferred_element_type=jnp.int32)
    total = jnp.zeros((len(x), len(w)), jnp.int32)
    for start in range(0, x.shape[1], EXACT_PRODUCTS):
        piece = slice(start, start + EXACT_PRODUCTS)
        sums = _dot(x[:, piece].astype(plan.dtype), w[:, piece].astype(plan.dtype))
        total = total + sums.astype(jnp.int32)
    return total


def _add_scaled_sums(plan: _Plan, ref: Mapping[str, Any], scales: jax.Array) -> None:
    """Adds the products of one tile, group by group; `scales` [groups, N]."""
    rows = plan.block[0]
    total = ref["acc"][...]
    for piece, groups in plan.pieces:
        for i, weight in enumerate(_values(plan, ref["data"][:, piece])):
            x = ref["x"][i, :, piece]
            if len(groups) > 1:
                lane = piece.start + lax.broadcasted_iota(jnp.int32, x.shape, 1)
                own = [(lane >= g * plan.span) & (lane < (g + 1) * plan.span) for g in groups]
                x = jnp.concatenate([jnp.where(mine, x, jnp.zeros_like(x)) for mine in own])
            sums = _dot(x, weight)
            for j, group in enumerate(groups):
                total = total + sums[j * rows : (j + 1) * rows] * scales[group : group + 1]
    ref["acc"][...] = total


def _add_scaled_weights(plan: _Plan, ref: Mapping[str, Any], scales: jax.Array) -> None:
    """The same with weights that are scaled first; `scales` [N, groups]."""
    total = ref["acc"][...]
    for piece, groups in plan.pieces:
        data = ref["data"][:, piece]
        lane = piece.start + lax.broadcasted_iota(jnp.int32, data.shape, 1)
        scale = jnp.broadcast_to(scales[:, groups.start : groups.start + 1], data.shape)
        for group in groups[1:]:
            scale = jnp.where(lane < group * plan.span, scale, scales[:, group : group + 1])
        for i, part in enumerate(_stored(plan, data)):
            weight = (part.astype(jnp.float32) * scale).astype(plan.dtype)
            total = total + _dot(ref["x"][i, :, piece], weight)
    ref["acc"][...] = total
