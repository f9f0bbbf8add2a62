"""Quantised matmul on Hopper GPUs (Pallas, Mosaic GPU), for few rows; XLA's form for many.

The product is turned round ("swap-AB"): y^T [N, T] = W [N, K] x^T [K, T]. A warpgroup holds 64
outputs, which is what a wgmma is tall, and T rounded up to 8 is the narrow side. Tiles of the
weight and of x come by TMA into a ring that one warpgroup fills; float x meets weights that turn
into its dtype in registers and are the wgmma's A operand from there, int8 and fp8 x meet them in
shared memory. Columns of `data` are called lanes: for int4 a lane holds two elements of one group,
and x comes in two parts, which fit its low and its high halves.

A tile is multiplied piece by piece, each within one group, and the sum of each piece is scaled and
added in registers: so scales of groups cost no rounding of weights, and fp8 is summed in float32,
where the tensor cores alone keep about 14 bits. Zero points are taken off the weights, exactly. K
is split over blocks where outputs are too few for the chip.

Above `most_rows` XLA's form is taken.
"""

from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import Target, check_positive, quantise
from pallas_kernels.mosaic_gpu import Accumulator, load, missing
from pallas_kernels.paged_attention.mosaic_gpu_tiles import compiler_params, swizzled
from pallas_kernels.quant_matmul import Format, digits, validate, xla

ROWS = 64  # of one warpgroup's wgmma
MOST_LANES = 128  # of a step
MOST_WIDTH = 128  # rows of x in a block: a sum and a product of 64 registers each
# Rows of x in a block for which registers suffice as they are dealt out, without taking some from
# the warpgroup that copies.
FEW_ROWS = 64
MULTIPROCESSORS = 132
SHARED_BYTES = 208 << 10  # of a multiprocessor, with room for what the compiler wants
MOST_STAGES = 8
FEWEST_STAGES = 3  # for which a rule makes tiles smaller
LEAST_PIECE = 16  # lanes: what a wgmma of 16 bits takes at once
i32 = jnp.int32


@dataclass(frozen=True)
class Config:
    """`warpgroups` of 64 outputs each, `tile` lanes per step, `stages` tiles in the ring, `splits`
    blocks that share a sum."""

    warpgroups: int
    tile: int
    stages: int
    splits: int

    def __post_init__(self) -> None:
        for name in ("warpgroups", "tile", "stages", "splits"):
            check_positive(name, getattr(self, name))


def unsupported(format: Format, n: int, k: int, dtype: Any, target: Target) -> str | None:
    """Why this cannot multiply rows of `dtype` with a weight [n, k] of `format`; None if it can."""
    why_not = missing(target)
    if why_not:
        return why_not
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"x.dtype is {jnp.dtype(dtype)}; allowed with mosaic_gpu: bfloat16, float16"
    if n % ROWS:
        return f"N is {n}; mosaic_gpu needs a multiple of {ROWS}"
    least = 32 if format.activations == "float" else 64
    if _tile(format, k) < least or _piece(format, k, MOST_LANES) < LEAST_PIECE:
        per_lane = k // _lanes(format, k)
        return (
            f"K is {k} and group_size {format.group_size}; mosaic_gpu needs multiples of "
            f"{per_lane * least} and {per_lane * LEAST_PIECE} with {format.dtype}"
        )
    return None


def most_rows(format: Format) -> int:
    """Rows up to which the kernel is taken. Beyond, XLA's own product is: in programs for 2048 rows
    it converts int8 tile by tile too, of int4 it first writes a bfloat16 copy. Where it overtakes a
    kernel of blocks of 128 rows, which wait for the L2 cache, no device has told."""
    return 512 if format.activations == "float" else 256


def _lanes(format: Format, elements: int) -> int:
    return elements // 2 if format.dtype == "int4" else elements


def _piece(format: Format, k: int, tile: int) -> int:
    """Lanes of one product: those of a tile, or as many as are surely of one group."""
    return gcd(tile, _lanes(format, format.group_size or k))


def _tile(format: Format, k: int) -> int:
    """The most lanes of a step, a power of two: a product's, or of several short ones."""
    return gcd(max(64, _piece(format, k, MOST_LANES)), _lanes(format, k))


def rule(num_rows: int, n: int, k: int, format: Format) -> Config:
    """Tiles for these shapes: a block for each place on the chip, as far as K can be shared out,
    and as long a ring as fits there. Up to 32 rows leave registers for two blocks on each
    multiprocessor."""
    warpgroups = 2 if n % (2 * ROWS) == 0 else 1
    width = _width(num_rows)
    places = 2 if width <= 32 else 1
    parts = 2 if format.dtype == "int4" else 1
    itemsize = 2 if format.activations == "float" else 1
    ring = SHARED_BYTES // places - warpgroups * ROWS * width * 4
    per_lane = warpgroups * ROWS + parts * width * itemsize
    tile = _tile(format, k)
    if width > FEW_ROWS:  # scales of more than two groups would not fit registers
        tile = gcd(tile, 2 * _piece(format, k, MOST_LANES))
    while tile > 64 and ring < FEWEST_STAGES * tile * per_lane:
        tile //= 2
    steps = _lanes(format, k) // tile
    blocks = n // (warpgroups * ROWS) * -(-num_rows // width)
    most = max(1, places * MULTIPROCESSORS // blocks)
    splits = max(x for x in range(1, min(most, steps) + 1) if steps % x == 0)
    return Config(warpgroups, tile, min(MOST_STAGES, ring // (tile * per_lane)), splits)


def _width(num_rows: int) -> int:
    """Rows of a block: as few blocks as can be, of like size."""
    blocks = -(-num_rows // MOST_WIDTH)
    return -(-num_rows // (8 * blocks)) * 8


@jax.named_scope("quant_matmul")
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
    k, n = x.shape[1], len(data)
    why_not = unsupported(format, n, k, x.dtype, target)
    if why_not:
        raise ValueError(why_not)
    has_digits = format.activations == "int16"
    num_rows = len(x) * (2 if has_digits else 1)
    if num_rows > most_rows(format):
        return xla.quant_matmul(x, data, scales, zeros, format=format, target=target)
    rows, row_scales = x, None
    if has_digits:
        rows, row_scales = digits(x)
        rows, format = rows.reshape(num_rows, k), replace(format, activations="int8")
    elif format.activations != "float":
        rows, row_scales = quantise(x, format.activations)
    config = config or rule(num_rows, n, k, format)
    width = _width(num_rows)
    rows = jnp.pad(rows, ((0, -num_rows % width), (0, 0)))
    # [parts, T, lanes]: for int4 the elements of low and of high halves.
    parts = rows[None]
    if format.dtype == "int4":
        parts = rows.reshape(len(rows), -1, 2, (format.group_size or k) // 2)
        parts = parts.transpose(2, 0, 1, 3).reshape(2, len(rows), k // 2)
        data = lax.bitcast_convert_type(data, jnp.int8)
    operands = [parts, data]
    if format.group_size is not None:
        operands += [scales] if zeros is None else [scales, zeros]
    kernel = _Kernel(
        format, config, parts.shape, data.shape, width, x.dtype, bool(target.interpret)
    )
    sums = kernel.call(operands, target).sum(axis=0, dtype=kernel.sum_dtype).T[:num_rows]
    if format.group_size is not None:
        return sums
    sums = sums.astype(jnp.float32)
    if has_digits:
        sums = 256.0 * sums[: len(x)] + sums[len(x) :]
    if row_scales is not None:
        sums = sums * row_scales[:, None]
    return sums * scales[None, :]


@dataclass(frozen=True)
class _Kernel:
    """The kernel of one call: its static sizes, and what its warpgroups do. It gives the sums
    [splits, N, T], scaled where scales are of groups."""

    format: Format
    config: Config
    x_shape: tuple[int, ...]  # parts, T, lanes
    data_shape: tuple[int, ...]
    width: int
    dtype: Any  # of x before it was quantised
    interprets: bool

    @property
    def sum_dtype(self) -> Any:
        return jnp.int32 if self.format.activations == "int8" else jnp.float32

    @property
    def steps(self) -> int:
        """Of one block."""
        return self.x_shape[2] // self.config.tile // self.config.splits

    @property
    def is_float(self) -> bool:
        return self.format.activations == "float"

    @property
    def group_lanes(self) -> int:
        return _lanes(self.format, self.format.group_size or 0)

    @property
    def piece(self) -> int:
        """Lanes of one product."""
        return gcd(self.config.tile, self.group_lanes)

    def call(self, operands: list[jax.Array], target: Target) -> jax.Array:
        config, parts = self.config, self.x_shape[0]
        outputs, tile, stages = config.warpgroups * ROWS, config.tile, config.stages
        dtype = operands[0].dtype
        x_swizzle = min(128, self.piece * dtype.itemsize)  # a product's lanes are whole tiles
        smem = {
            "x": swizzled((stages, parts, self.width, tile), dtype, x_swizzle),
            "w": swizzled((stages, outputs, tile), operands[1].dtype),
            "out": plgpu.SMEM((outputs, self.width), self.sum_dtype),
        }
        if self.interprets and self.is_float:
            smem["a"] = swizzled((config.warpgroups, parts, ROWS, self.piece), dtype)
        bars = {
            "full": plgpu.Barrier(num_arrivals=1 + parts, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=stages),
        }
        shape = (config.splits, self.data_shape[0], self.x_shape[1])
        kernel = plgpu.kernel(
            self.body,
            out_type=jax.ShapeDtypeStruct(shape, self.sum_dtype),
            scratch_types={"smem": smem, "bars": bars},
            # The first is the slowest: blocks that share weights run together.
            grid=(self.data_shape[0] // outputs, config.splits, self.x_shape[1] // self.width),
            grid_names=("n", "split", "t"),
            num_threads=config.warpgroups + 1,
            thread_name="wg",
            kernel_name="quant_matmul",
            compiler_params=compiler_params(),
            interpret=target.interpret or None,
        )
        return kernel(*operands)

    def body(self, x: Any, data: Any, *rest: Any, smem: Any, bars: Any) -> None:
        *grouped, out = rest
        warpgroup = lax.axis_index("wg")
        takes_registers = self.width > FEW_ROWS and self.config.warpgroups == 2

        @pl.when(warpgroup < self.config.warpgroups)
        def _() -> None:
            if takes_registers:
                plgpu.set_max_registers(232, action="increase")
            self.compute(warpgroup, grouped, out, smem, bars)

        @pl.when(warpgroup == self.config.warpgroups)
        def _() -> None:
            if takes_registers:
                plgpu.set_max_registers(40, action="decrease")
            self.fetch(x, data, smem, bars)

    def fetch(self, x: Any, data: Any, smem: Any, bars: Any) -> None:
        """Fills the ring."""
        outputs, tile = self.config.warpgroups * ROWS, self.config.tile
        n = pl.ds(lax.axis_index("n") * outputs, outputs)
        t = pl.ds(lax.axis_index("t") * self.width, self.width)
        first = lax.axis_index("split") * self.steps

        def step(i: jax.Array, _: None) -> None:
            slot = lax.rem(i, i32(self.config.stages))

            @pl.when(i >= self.config.stages)
            def _() -> None:
                plgpu.barrier_wait(bars["free"].at[slot])

            lanes, bar = pl.ds((first + i) * tile, tile), bars["full"].at[slot]
            plgpu.copy_gmem_to_smem(data.at[n, lanes], smem["w"].at[slot], bar)
            for part in range(self.x_shape[0]):
                plgpu.copy_gmem_to_smem(x.at[part, t, lanes], smem["x"].at[slot, part], bar)

        lax.fori_loop(0, self.steps, step, None)

    def compute(self, warpgroup: Any, grouped: list[Any], out: Any, smem: Any, bars: Any) -> None:
        """The sums of 64 outputs."""
        stages = self.config.stages
        mine = pl.ds(warpgroup * ROWS, ROWS)
        outputs = self.config.warpgroups * ROWS
        n = pl.ds(lax.axis_index("n") * outputs + warpgroup * ROWS, ROWS)
        first = lax.axis_index("split") * self.steps

        def step(i: jax.Array, acc: jax.Array) -> jax.Array:
            slot = lax.rem(i, i32(stages))
            columns = [self.columns(grouped, n, first + i, piece) for piece in self.pieces]
            plgpu.barrier_wait(bars["full"].at[slot])
            w = smem["w"].at[slot, mine]
            if self.is_float:
                w = load(w, layout=plgpu.Layout.WGMMA)
            parts = range(self.x_shape[0])
            copies = [smem["a"].at[warpgroup, part] for part in parts] if "a" in smem else []
            for piece, (scale, zero) in zip(self.pieces, columns, strict=True):
                operands = [w]
                if self.is_float:
                    operands = self.values(lax.slice(w, (0, piece[0]), (ROWS, piece[1])), zero)
                lanes = pl.ds(piece[0], self.piece)
                xs = [smem["x"].at[slot, part, :, lanes] for part in parts]
                sums = self.product(operands, xs, copies)
                if scale is not None:
                    sums = sums * lax.broadcast_in_dim(scale, sums.shape, [0])
                acc = acc + sums

            @pl.when(i + stages < self.steps)
            def _() -> None:
                plgpu.barrier_arrive(bars["free"].at[slot])

            return acc

        zeros = jnp.zeros((ROWS, self.width), self.sum_dtype)
        acc = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        smem["out"].at[mine][...] = lax.fori_loop(0, self.steps, step, acc)
        plgpu.commit_smem()
        t = pl.ds(lax.axis_index("t") * self.width, self.width)
        to = out.at[lax.axis_index("split"), n, t]
        plgpu.copy_smem_to_gmem(smem["out"].at[mine], to)
        plgpu.wait_smem_to_gmem(0)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """The first lane of a tile's pieces, and that behind the last."""
        starts = range(0, self.config.tile, self.piece)
        return [(start, start + self.piece) for start in starts]

    def columns(self, grouped: list[Any], n: Any, tile: jax.Array, piece: tuple[int, int]) -> Any:
        """Scales and zero points, None where there are none, of outputs `n` in a piece of a tile:
        those of its group, a column of arrays [N, groups]."""
        layout = plgpu.Layout.WGMMA.reduce(1)
        found = []
        for ref in grouped:
            group = lax.div(tile * self.config.tile + piece[0], i32(self.group_lanes))
            found.append(load(ref.at[n, group], layout=layout, optimized=False))
        return found + [None] * (2 - len(found))

    def values(self, w: jax.Array, zero: jax.Array | None) -> list[jax.Array]:
        """A tile of the weight without its scale, in x's dtype, for int4 in two parts: exact, since
        |q - zero| <= 256."""
        dtype = self.dtype
        if self.format.dtype == "float8_e4m3fn":
            # The hardware widens to float16 only; x stays what it is.
            w = w.astype(jnp.float16)
            return [w if dtype == jnp.float16 else w.astype(jnp.float32).astype(dtype)]
        parts = [w.astype(dtype)]
        if self.format.dtype == "int4":
            # The high half with its sign bit turned is 16 q as an int8.
            low = (w & jnp.int8(15)).astype(dtype) - dtype.type(8)
            high = ((w ^ jnp.int8(-128)) & jnp.int8(-16)).astype(dtype) * dtype.type(1 / 16)
            parts = [low, high]
        if zero is None:
            return parts
        zero = zero.astype(dtype)
        return [part - lax.broadcast_in_dim(zero, part.shape, [0]) for part in parts]

    def product(self, operands: list[Any], xs: list[Any], copies: list[Any]) -> jax.Array:
        """The sum over parts of a [64, piece] @ x [T, piece]^T, waited for; each `a` in registers
        or in shared memory, to where the interpreter `copies` those in registers."""
        for a, copy in zip(operands, copies, strict=False):
            copy[...] = a
        if copies:
            plgpu.commit_smem()

        def run(acc: Any) -> jax.Array:
            for a, x in zip(copies or operands, xs, strict=True):
                plgpu.wgmma(acc, a, x.T)
            return acc[...]

        return pl.run_scoped(run, Accumulator((ROWS, self.width), self.sum_dtype))
