"""What decode and prefill on Hopper share: tiles of positions made of pages, and their products.

A tile is a range of `tile` positions of a row that begins at a multiple of `tile`. It is fetched in
pieces, each within one page: as long as the greatest common divisor of page and tile.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import Target
from pallas_kernels.mosaic_gpu import LOG2E, Accumulator, load

# Shared memory of reductions over warps: 4 warps x 16 columns x 4 bytes, twice for luck.
REDUCTION_BYTES = 1024


@dataclass(frozen=True)
class Options:
    """The static part of one call."""

    scale: float
    window: int | None
    soft_cap: float | None


@dataclass(frozen=True)
class PageTiles:
    """Tiles of a pool `[P, page_size, 2 * K, H]`."""

    pool: tuple[int, ...]
    tile: int
    quantised: bool

    @property
    def piece(self) -> int:
        """Positions of one copy."""
        return math.gcd(self.pool[1], self.tile)

    @property
    def pieces(self) -> int:
        """Copies of one tile."""
        return self.tile // self.piece

    def locate(
        self, table: Any, index: jax.Array, end: jax.Array, some: range | None = None
    ) -> list[Any]:
        """(page, offset in it) of each piece (or of `some`) of tile `index`. Pieces behind the
        row's `end` repeat its last one, which is cached."""
        page_size, piece = self.pool[1], self.piece
        last = lax.div(jnp.maximum(end - 1, 0), jnp.int32(piece))
        places = []
        for i in range(self.pieces) if some is None else some:
            at = jnp.minimum(index * self.pieces + i, last)
            per_page = jnp.int32(page_size // piece)
            page = jnp.clip(table[lax.div(at, per_page)], 0, self.pool[0] - 1)
            places.append((page, lax.rem(at, per_page) * piece if piece < page_size else 0))
        return places

    def fetch(
        self, pool: Any, places: list[Any], head: Any, to: Any, barrier: Any, first: int = 0
    ) -> None:
        """Starts the copies of one tile of combined head `head`, from its piece `first` on; each
        arrives at `barrier`."""
        for i, (page, offset) in enumerate(places, first):
            source = pool.at[page, pl.ds(offset, self.piece), head]
            plgpu.copy_gmem_to_smem(source, to.at[pl.ds(i * self.piece, self.piece)], barrier)

    def fetch_scales(self, scales: Any, places: list[Any], head: Any, to: Any, bar: Any) -> None:
        """The same for the tile's scales."""
        for i, (page, offset) in enumerate(places):
            source = scales.at[page, head, pl.ds(offset, self.piece)]
            plgpu.copy_gmem_to_smem(source, to.at[pl.ds(i * self.piece, self.piece)], bar)


def interpreting(target: Target) -> bool:
    """Whether the Mosaic GPU interpreter runs the kernel."""
    return bool(target.interpret)


def compute_dtype(q_dtype: Any, page_dtype: Any) -> Any:
    """What the tensor cores multiply: q's dtype. fp8 widens to float16 in one instruction and holds
    there exactly, so fp8 pages take q as float16."""
    return jnp.dtype(jnp.float16 if page_dtype == jnp.float8_e4m3fn else q_dtype)


def compiler_params() -> plgpu.CompilerParams:
    """Approximate exp2 and division: relative errors of 2 ** -22."""
    return plgpu.CompilerParams(
        approx_math=True,
        reduction_scratch_bytes=REDUCTION_BYTES,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )


def swizzled(shape: tuple[int, ...], dtype: Any, most: int = 128) -> Any:
    """Shared memory that wgmma and TMA read: tiles of 8 rows of at most `most` bytes."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(most, shape[-1] * itemsize)
    transforms = (
        plgpu.TilingTransform((8, swizzle // itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def matmul(shape: tuple[int, int], a: Any, b: Any) -> jax.Array:
    """a @ b in float32, waited for; `a` in shared memory or in registers."""

    def run(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, Accumulator(shape, jnp.float32))


def to_log2(scores: jax.Array, options: Options) -> jax.Array:
    """Raw q . k as scaled and capped scores times log2(e).

    tanh(x) = 1 - 2 / (e ** 2x + 1): the hardware's tanh has only 11 bits, its division takes
    registers."""
    cap = options.soft_cap
    if cap is None:
        return scores * (options.scale * LOG2E)
    root = lax.rsqrt(jnp.exp2(scores * (options.scale * 2 * LOG2E / cap)) + 1.0)
    return cap * LOG2E - (2 * cap * LOG2E) * (root * root)


def zero_unowned(ref: Any, position: jax.Array, low: jax.Array, high: jax.Array) -> None:
    """Zeros the rows of the tile at `position` that lie outside [low, high): their weights are 0,
    but 0 * NaN is NaN. Only a row's first and last tiles have such rows."""
    tile, head_dim = ref.shape

    @pl.when((position < low) | (position + tile > high))
    def _() -> None:
        # In pieces of 64 x 64: few registers, whatever the tile.
        for row in range(0, tile, 64):
            for column in range(0, head_dim, 64):
                part = ref.at[pl.ds(row, 64), pl.ds(column, 64)]
                x = load(part, layout=plgpu.Layout.WGMMA)
                at = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
                at = at + (position + row)
                part[...] = jnp.where((at >= low) & (at < high), x, jnp.zeros_like(x))
        plgpu.commit_smem()
