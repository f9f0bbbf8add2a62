"""GPTQ checkpoints: 2, 3, 4 or 8 bits, zero points, and the rows' groups (act-order).

`qweight` int32 [K*bits/32, N] is for each output a stream of bits along the inputs, so 3-bit
integers cross words. `qzeros` int32 [G, N*bits/32] is such a stream along the outputs, `scales`
[G, N], and `g_idx` int32 [K] the group of each input. Layout "gptq" stores the zero points less
one, "gptq_v2" as they are. Source: AutoGPTQ, GPTQModel; arXiv:2210.17323.
"""

import numpy as np

from jaxinfer.quant.config import CheckpointFormat
from jaxinfer.quant.packed import (
    WORD_BITS,
    PackedWeight,
    StoredModule,
    check_group_indices,
    group_indices,
    signed,
    unpack_rows,
)

PARTS = {"qweight": True, "qzeros": True, "scales": True, "g_idx": False}
"""Parts of a module; True where one must be there."""


def logical_shape(stored: StoredModule, fmt: CheckpointFormat) -> tuple[int, int]:
    """(K, N), once every part's shape and dtype agree; ModelFormatError otherwise."""
    num_words, num_columns = stored.shape("qweight", 2)
    num_rows, rest = divmod(num_words * WORD_BITS, fmt.bits)
    if rest:
        stored.fail(
            "qweight",
            f"has {num_words} rows of words, which hold no whole number of "
            f"{fmt.bits}-bit integers: bits of quantization_config is wrong",
        )
    group_size = stored.group_size("qweight", num_rows, fmt.group_size)
    num_groups = num_rows // group_size
    why = f"qweight gives [{num_rows}, {num_columns}] at {fmt.bits} bits, groups of {group_size}"
    if num_columns * fmt.bits % WORD_BITS:
        stored.fail(
            "qweight",
            f"has {num_columns} outputs, whose {fmt.bits}-bit zero points fill no whole "
            "number of words: bits of quantization_config is wrong",
        )
    stored.expect_shape("scales", (num_groups, num_columns), why)
    stored.expect_shape("qzeros", (num_groups, num_columns * fmt.bits // WORD_BITS), why)
    stored.expect_dtype("qweight", "I32")
    stored.expect_dtype("qzeros", "I32")
    stored.expect_dtype("scales", "F16", "BF16", "F32")
    check_group_indices(
        stored,
        "g_idx",
        num_rows,
        needed=fmt.act_order and num_groups > 1,
        missing="is missing, though desc_act is true: without it the groups of the rows are "
        "unknown; download every file, or set desc_act to false if it was not used",
        why=why,
    )
    return num_rows, num_columns


def read(stored: StoredModule, fmt: CheckpointFormat) -> PackedWeight:
    """Unpack one linear layer. Raises ModelFormatError naming the tensor."""
    num_rows, num_columns = logical_shape(stored, fmt)
    group_size = stored.group_size("qweight", num_rows, fmt.group_size)
    scales, scale_dtype = stored.scales("scales")
    zeros = _zeros(stored, fmt, num_columns)
    values = unpack_rows(stored.load("qweight"), fmt.bits, num_rows)
    return PackedWeight(
        name=stored.name,
        values=signed(values, fmt.bits),
        scales=scales,
        bits=fmt.bits,
        group_size=group_size,
        zeros=zeros if zeros.any() else None,
        g_idx=group_indices(stored, num_rows, group_size),
        scale_dtype=scale_dtype,
    )


def _zeros(stored: StoredModule, fmt: CheckpointFormat, num_columns: int) -> np.ndarray:
    """Zero points less 2**(bits-1), int8 [G, N]."""
    largest = (1 << fmt.bits) - 1
    words = stored.load("qzeros").view(np.uint32)
    if fmt.layout == "gptq" and WORD_BITS % fmt.bits == 0:
        # Zero points less one, as one word: 0 borrowed from the next, and so gives it back.
        words = words + np.uint32(0xFFFFFFFF // largest)
    zeros = unpack_rows(np.ascontiguousarray(words.T).view(np.int32), fmt.bits, num_columns).T
    if fmt.layout == "gptq" and WORD_BITS % fmt.bits:
        zeros = (zeros + np.uint8(1)) & np.uint8(largest)
    if fmt.symmetric:
        _expect_middle(stored, fmt, zeros)
    return signed(np.ascontiguousarray(zeros), fmt.bits)


def _expect_middle(stored: StoredModule, fmt: CheckpointFormat, zeros: np.ndarray) -> None:
    """ModelFormatError unless every zero point is 2**(bits-1), as `sym` true promises.

    Some files carry the name of one layout and zero points of the other; they would decode to
    weights that are all off by one step.
    """
    middle = 1 << (fmt.bits - 1)
    if (zeros == middle).all():
        return
    declared = f"quantization_config says sym and checkpoint_format {fmt.layout!r}"
    other, off_by_one = ("gptq_v2", 1) if fmt.layout == "gptq" else ("gptq", -1)
    if (zeros == middle + off_by_one).all():
        stored.fail(
            "qzeros",
            f"gives only zero points {middle + off_by_one}, but {declared}, so they are {middle}: "
            f"they are stored as {other!r}; correct checkpoint_format in config.json",
        )
    stored.fail(
        "qzeros",
        f"gives zero points {zeros.min()} to {zeros.max()}, but {declared}, so all are {middle}; "
        "if the weights are asymmetric, set sym to false in config.json",
    )
