"""GGUF's quantised blocks read as integers with scales, never through float.

A tensor [N, K] is rows of blocks: 32 inputs with a float16 scale (Q8_0, Q4_0, Q4_1), or 256 in
groups of 32 (Q4_K) or 16 (Q6_K), whose scales are small integers times the block's float16 one.
That product is exact in float32, and so is each value times its scale; only adding an offset
(Q4_1, Q4_K) rounds, once. `PackedWeight.dequantize` is therefore bit for bit the `gguf` package's.
Layout: https://github.com/ggml-org/llama.cpp, ggml-quants.c (`dequantize_row_*`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from jaxinfer.errors import ModelFormatError
from jaxinfer.params import is_finite
from jaxinfer.quant.packed import PackedWeight

_Blocks = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""values [N, blocks, items], scales [N, blocks, groups], offsets alike or None."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A block's number of items and bytes, how many items share a scale, how it is taken apart, and
    whether its groups have offsets."""

    items: int
    num_bytes: int
    bits: int
    group_size: int
    split: Callable[[np.ndarray], _Blocks]
    has_offsets: bool = False


def read(name: str, raw: np.ndarray, shape: tuple[int, int], kind: str) -> PackedWeight:
    """The tensor `name` of GGUF type `kind` from its bytes, uint8 of any shape.

    `shape` is (N, K), outputs first, as the file's reversed dims say. Raises ModelFormatError that
    names the tensor for another type, bytes that do not make up the shape, and scales that are NaN
    or infinite.
    """
    if kind not in KINDS:
        _fail(name, f"has type {kind}; kept quantised are {', '.join(KINDS)}")
    block = KINDS[kind]
    num_columns, num_rows = shape
    num_blocks, rest = divmod(num_rows, block.items)
    if rest:
        _fail(name, f"has rows of {num_rows}, no multiple of {kind}'s block ({block.items})")
    if raw.size != num_columns * num_blocks * block.num_bytes:
        _fail(
            name,
            f"has {raw.size} bytes; {kind} of shape {list(shape)} needs "
            f"{num_columns * num_blocks * block.num_bytes}: the file is damaged",
        )
    blocks = raw.reshape(num_columns, num_blocks, block.num_bytes)
    values, scales, offsets = block.split(blocks)
    for floats in (scales, offsets):
        if floats is not None and not is_finite(floats):
            _fail(name, "has NaN or infinite scales: the file is damaged; download it again")
    return PackedWeight(
        name=name,
        values=values.reshape(num_columns, num_rows).T,
        scales=_by_group(scales),
        bits=block.bits,
        group_size=block.group_size,
        offsets=None if offsets is None else _by_group(offsets),
    )


def _by_group(floats: np.ndarray) -> np.ndarray:
    """[N, blocks, groups] -> [G, N]."""
    return np.ascontiguousarray(floats.reshape(len(floats), -1).T)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block, as float32 [N, blocks, 1]."""
    raw = np.ascontiguousarray(blocks[..., start : start + 2])
    return raw.view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[..., bytes] -> [..., 2, bytes]: all low halves, then all high ones."""
    return np.stack((packed & np.uint8(15), packed >> np.uint8(4)), axis=-2)


def _q8_0(blocks: np.ndarray) -> _Blocks:
    return blocks[..., 2:].view(np.int8), _half(blocks, 0), None


def _q4_0(blocks: np.ndarray) -> _Blocks:
    return _nibbles(blocks[..., 2:]).view(np.int8) - np.int8(8), _half(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> _Blocks:
    return _nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2)


def _q4_k(blocks: np.ndarray) -> _Blocks:
    """Float16 scale and minimum, 12 bytes with eight 6-bit factors of each, 128 of nibbles."""
    packed = blocks[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    # groups 0 to 3: the low six bits; 4 to 7: four bits of the third quad, the top two of these
    factors = (first & 63, (third & 15) | (first >> 6 << 4))
    minimums = (second & 63, (third >> 4) | (second >> 6 << 4))
    scales = _half(blocks, 0) * np.concatenate(factors, axis=-1).astype(np.float32)
    offsets = _half(blocks, 2) * np.concatenate(minimums, axis=-1).astype(np.float32)
    # each 32 bytes hold two groups: one in the low halves, the next in the high ones
    return _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)), scales, -offsets


def _q6_k(blocks: np.ndarray) -> _Blocks:
    """128 bytes of low nibbles, 64 of high pairs, 16 int8 factors, a float16 scale."""
    shape = blocks.shape[:2]
    # of each half block (128 items), 64 bytes give the items 0-63 low and 64-127 high
    low = _nibbles(blocks[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 2, 4, 32)
    pairs = blocks[..., 128:192].reshape(*shape, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    high = (pairs >> shifts) & np.uint8(3)
    values = (low | high << np.uint8(4)).view(np.int8) - np.int8(32)
    factors = blocks[..., 192:208].view(np.int8).astype(np.float32)
    return values, _half(blocks, 208) * factors, None


KINDS = {
    "Q8_0": _Kind(32, 34, 8, 32, _q8_0),
    "Q4_0": _Kind(32, 18, 4, 32, _q4_0),
    "Q4_1": _Kind(32, 20, 4, 32, _q4_1, has_offsets=True),
    "Q4_K": _Kind(256, 144, 4, 32, _q4_k, has_offsets=True),
    "Q6_K": _Kind(256, 210, 6, 16, _q6_k),
}
"""GGUF's types that can be kept quantised."""


def _fail(name: str, text: str) -> NoReturn:
    raise ModelFormatError(f"tensor {name!r} {text}", field=name)
