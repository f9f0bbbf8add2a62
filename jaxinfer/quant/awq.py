"""AWQ checkpoints, "gemm" packing: 4-bit integers with a zero point for each group.

`qweight` int32 [K, N/8] holds eight outputs in a word, and `qzeros` int32 [G, N/8] the zero
points in the same order; `scales` are [G, N]. Source: AutoAWQ (`WQLinear_GEMM`), arXiv:2306.00978.
"""

import numpy as np

from jaxinfer.quant.config import CheckpointFormat
from jaxinfer.quant.packed import PackedWeight, StoredModule, signed

PARTS = {"qweight": True, "qzeros": True, "scales": True}
"""Parts of a module; True where one must be there."""

PER_WORD = 8
# the i-th four bits of a word, from the lowest, are output ORDER[i] of its eight
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def logical_shape(stored: StoredModule, fmt: CheckpointFormat) -> tuple[int, int]:
    """(K, N), once every part's shape and dtype agree; ModelFormatError otherwise."""
    num_rows, num_words = stored.shape("qweight", 2)
    num_columns = num_words * PER_WORD
    group_size = stored.group_size("qweight", num_rows, fmt.group_size)
    num_groups = num_rows // group_size
    why = f"qweight gives [{num_rows}, {num_columns}] at 4 bits, in groups of {group_size}"
    stored.expect_shape("qzeros", (num_groups, num_words), why)
    stored.expect_shape("scales", (num_groups, num_columns), why)
    stored.expect_dtype("qweight", "I32")
    stored.expect_dtype("qzeros", "I32")
    stored.expect_dtype("scales", "F16", "BF16", "F32")
    return num_rows, num_columns


def read(stored: StoredModule, fmt: CheckpointFormat) -> PackedWeight:
    """Unpack one linear layer. Raises ModelFormatError naming the tensor."""
    num_rows, _ = logical_shape(stored, fmt)
    scales, scale_dtype = stored.scales("scales")
    zeros = signed(_unpack(stored.load("qzeros")), 4)
    return PackedWeight(
        name=stored.name,
        values=signed(_unpack(stored.load("qweight")), 4),
        scales=scales,
        bits=4,
        group_size=stored.group_size("qweight", num_rows, fmt.group_size),
        zeros=zeros if zeros.any() else None,
        scale_dtype=scale_dtype,
    )


def _unpack(words: np.ndarray) -> np.ndarray:
    """int32 [R, N/8] -> uint8 [R, N]."""
    num_rows, num_words = words.shape
    unsigned = words.view(np.uint32)
    out = np.empty((num_rows, num_words, PER_WORD), np.uint8)
    for i, column in enumerate(ORDER):
        out[:, :, column] = (unsigned >> np.uint32(4 * i)) & np.uint32(15)
    return out.reshape(num_rows, num_words * PER_WORD)
