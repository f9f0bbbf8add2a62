"""Block sizes of the TPU kernels of flash attention: what they are, how they are chosen.

`tuning.lookup(device_kind, "flash_attention", stage, dtype=, head_dim=, group=)` with stage
"forward" or "backward", dtype the name of q's, group = N // K; the entry is the fields of
`ForwardConfig` or `BackwardConfig`. Where there is none, the rule below.
"""

from dataclasses import asdict, dataclass
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.common import Target, check_positive, dtype_name

DTYPES = ("float32", "bfloat16")

_LANES = 128
_MIN_BLOCK_Q = 16  # rows of a bfloat16 tile


@dataclass(frozen=True)
class Blocks:
    """`block_q` positions (a power of two) times `heads` query heads of one group (a divisor of its
    size) are the rows of a tile; `block_kv` keys are in memory at a time, and worked on in pieces
    of `compute_kv`."""

    block_q: int
    heads: int
    block_kv: int
    compute_kv: int

    def check(self, name: str, group: int) -> None:
        """ValueError unless a kernel can be built from this."""
        for field, value in asdict(self).items():
            check_positive(f"{name}.{field}", value)
        if self.block_q < _MIN_BLOCK_Q or self.block_q & (self.block_q - 1):
            raise ValueError(
                f"{name}.block_q is {self.block_q}; it must be a power of two >= {_MIN_BLOCK_Q}"
            )
        if group % self.heads:
            raise ValueError(
                f"{name}.heads is {self.heads}; it must divide the {group} query heads of a group"
            )
        if self.compute_kv % _LANES:
            raise ValueError(
                f"{name}.compute_kv is {self.compute_kv}; it must be a multiple of {_LANES}"
            )
        if self.block_kv % self.compute_kv:
            raise ValueError(
                f"{name}.block_kv is {self.block_kv}; it must be a multiple of its compute_kv, "
                f"{self.compute_kv}"
            )

    def cut(self, q_len: int, kv_len: int) -> "Blocks":
        """The same for short sequences: no larger than they are, and blocks of keys of about one
        size, so that little is padded."""
        block_q = min(self.block_q, max(_MIN_BLOCK_Q, 1 << (q_len - 1).bit_length()))
        compute_kv = min(self.compute_kv, _up(kv_len, _LANES))
        count = -(-kv_len // self.block_kv)
        block_kv = min(self.block_kv, _up(-(-kv_len // count), compute_kv))
        return Blocks(block_q, self.heads, max(block_kv, compute_kv), compute_kv)


@dataclass(frozen=True)
class ForwardConfig(Blocks):
    """Blocks of the forward kernel."""


@dataclass(frozen=True)
class BackwardConfig:
    """Blocks of the two backward kernels, see `Blocks`."""

    dq_block_q: int
    dq_heads: int
    dq_block_kv: int
    dq_compute_kv: int
    dkv_block_q: int
    dkv_heads: int
    dkv_block_kv: int
    dkv_compute_kv: int

    @property
    def dq(self) -> Blocks:
        return Blocks(self.dq_block_q, self.dq_heads, self.dq_block_kv, self.dq_compute_kv)

    @property
    def dkv(self) -> Blocks:
        return Blocks(self.dkv_block_q, self.dkv_heads, self.dkv_block_kv, self.dkv_compute_kv)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def check_dtype(dtype: Any) -> None:
    """ValueError for what the matrix unit does not take."""
    dtype_name(dtype, "q.dtype (flash attention on TPU)", DTYPES)


def _tile(rows: int, group: int) -> tuple[int, int]:
    """Positions and heads of a tile of at most `rows`: of the group as many heads as fit."""
    most = rows // _MIN_BLOCK_Q
    heads = max(n for n in range(1, group + 1) if group % n == 0 and n <= most)
    return 1 << ((rows // heads).bit_length() - 1), heads


def _small(target: Target) -> bool:
    """16 MiB of fast memory: a TPU v4, and whatever is not known."""
    return target.device_kind is None or "v4" in target.device_kind


def forward_config(target: Target, dtype: Any, head_dim: int, group: int) -> ForwardConfig:
    """The tuned blocks, else the rule.

    512 rows keep the matrix unit busy while the vector units work on the piece before; with four
    pieces in a block the ends of that overlap weigh little. Bundles of the compiler's schedule for
    an unmasked block of 512 rows, 2048 keys, bfloat16, and the cycles its products occupy the
    matrix units (v5e: 4 of 128 x 128, a row a cycle; v6e: 2 of 256 x 256, two rows a cycle):

        head_dim   v5e bundles  cycles   v6e bundles  cycles
        64              3999     4096         2518     2048
        128             4007     4096         2521     2048
        256             7755     8192         2648     2048

    Below 128 and 256 wide a head leaves part of the array idle, so the cycles do not fall with it.
    """
    check_dtype(dtype)
    name = dtype_name(dtype, "q.dtype")
    tuned = tuning.lookup(
        target.device_kind, "flash_attention", "forward", dtype=name, head_dim=head_dim, group=group
    )
    if tuned is not None:
        return ForwardConfig(**tuned)
    wide = head_dim > 128 or name == "float32"
    if _small(target):
        return ForwardConfig(*_tile(256 if wide else 512, group), 512 if wide else 1024, 256)
    if name == "float32":
        return ForwardConfig(*_tile(256, group), 512, 256)
    return ForwardConfig(*_tile(512, group), 2048, 512)


def backward_config(target: Target, dtype: Any, head_dim: int, group: int) -> BackwardConfig:
    """The tuned blocks, else the rule."""
    check_dtype(dtype)
    name = dtype_name(dtype, "q.dtype")
    tuned = tuning.lookup(
        target.device_kind,
        "flash_attention",
        "backward",
        dtype=name,
        head_dim=head_dim,
        group=group,
    )
    if tuned is not None:
        return BackwardConfig(**tuned)
    wide = head_dim > 128 or name == "float32"
    if _small(target):
        tile = _tile(256 if wide else 512, group)
        return BackwardConfig(*tile, 512, 256, *tile, 512, 256)
    if name == "float32":
        tile = _tile(256, group)
        return BackwardConfig(*tile, 512, 256, *tile, 512, 256)
    tile = _tile(512, group)
    return BackwardConfig(*tile, 2048, 512, *tile, 1024, 512)


def compiler_params(target: Target) -> pltpu.CompilerParams:
    """Fast memory to take: of 128 MiB on v5e and v6e, 64 on v5p and v7x, 16 on v4."""
    limit = 16 << 20
    if not _small(target):
        lite = target.device_kind is not None and "lite" in target.device_kind
        limit = (96 if lite else 48) << 20
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=limit,
    )
