"""compressed-tensors checkpoints: int8, pack-quantised int4 or int8, and fp8 weights.

"int-quantized" and "float-quantized" keep `weight` [N, K] as int8 or fp8 e4m3 beside
`weight_scale`; "pack-quantized" keeps `weight_packed` int32 [N, ceil(K*bits/32)], a stream of bits
along the inputs with 2**(bits-1) added to each integer, and the true [N, K] in `weight_shape`.
`weight_zero_point` is packed along the outputs, or, in older files, int8 as it is.
Source: https://github.com/vllm-project/compressed-tensors
"""

import numpy as np

from jaxinfer.quant import fp8_blocks
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

PARTS_PLAIN = {"weight": True, "weight_scale": True, "weight_zero_point": False}
PARTS_PACKED = {
    "weight_packed": True,
    "weight_scale": True,
    "weight_shape": True,
    "weight_zero_point": False,
    "weight_g_idx": False,
}
"""Parts of a module; True where one must be there."""


def logical_shape(stored: StoredModule, fmt: CheckpointFormat) -> tuple[int, int]:
    """(K, N), once every part's shape and dtype agree; ModelFormatError otherwise.

    Reads `weight_shape`, which alone tells K where the packed words end in padding.
    """
    part = "weight_packed" if fmt.layout == "pack-quantized" else "weight"
    num_columns, width = stored.shape(part, 2)
    if part == "weight_packed":
        stored.expect_dtype(part, "I32")
        num_rows = _true_rows(stored, fmt, num_columns, width)
    else:
        stored.expect_dtype(part, "F8_E4M3" if fmt.layout == "float-quantized" else "I8")
        num_rows = width
    num_groups = num_rows // stored.group_size(part, num_rows, fmt.group_size)
    why = f"{part} gives [{num_columns}, {num_rows}] in {num_groups} group(s)"
    stored.expect_dtype("weight_scale", *fp8_blocks.SCALE_DTYPES)
    if fmt.block is not None:
        fp8_blocks.check_scales(stored, "weight_scale", fmt.block, (num_rows, num_columns))
    elif fmt.tensor:
        fp8_blocks.check_single(stored, "weight_scale", *fp8_blocks.SCALE_DTYPES)
    elif not (num_groups == 1 and stored.parts["weight_scale"].shape == (num_columns,)):
        stored.expect_shape("weight_scale", (num_columns, num_groups), why)
    _check_zeros(stored, fmt, (num_columns, num_groups), why)
    check_group_indices(
        stored,
        "weight_g_idx",
        num_rows,
        needed=fmt.act_order and num_groups > 1,
        missing="is missing, though actorder is group: without it the groups of the inputs are "
        "unknown; download every file of the checkpoint",
        why=why,
    )
    return num_rows, num_columns


def read(stored: StoredModule, fmt: CheckpointFormat) -> PackedWeight:
    """Unpack one linear layer. Raises ModelFormatError naming the tensor."""
    num_rows, num_columns = logical_shape(stored, fmt)
    group_size = stored.group_size("weight_scale", num_rows, fmt.group_size)
    zeros = _zeros(stored, fmt, (num_columns, num_rows // group_size))
    if fmt.block is not None:
        return fp8_blocks.read_blocks(stored, "weight_scale", fmt.block)
    if fmt.layout == "float-quantized":
        values = fp8_blocks.fp8_values(stored)
    elif fmt.layout == "int-quantized":
        values = stored.load("weight").T
    else:
        words = np.ascontiguousarray(stored.load("weight_packed").T)
        values = signed(unpack_rows(words, fmt.bits, num_rows), fmt.bits)
    scales, scale_dtype = stored.scales("weight_scale")
    scales = scales.reshape(1, 1) if fmt.tensor else scales.reshape(num_columns, -1).T
    return PackedWeight(
        name=stored.name,
        values=values,
        scales=np.ascontiguousarray(scales),
        bits=fmt.bits,
        group_size=group_size,
        columns=num_columns if fmt.tensor else 1,
        zeros=zeros if zeros is not None and zeros.any() else None,
        g_idx=group_indices(stored, num_rows, group_size),
        scale_dtype=scale_dtype,
    )


def _true_rows(stored: StoredModule, fmt: CheckpointFormat, num_columns: int, width: int) -> int:
    """K, from `weight_shape`, which must agree with the packed words."""
    stored.expect_shape("weight_shape", (2,), "it holds [outputs, inputs]")
    stored.expect_dtype("weight_shape", "I64", "I32")
    outputs, inputs = (int(size) for size in stored.load("weight_shape"))
    if (outputs, -(-inputs * fmt.bits // WORD_BITS)) != (num_columns, width):
        stored.fail(
            "weight_packed",
            f"has shape {(num_columns, width)}, which does not hold {fmt.bits}-bit integers of "
            f"weight_shape [{outputs}, {inputs}]: num_bits of quantization_config is wrong, or the "
            "file is damaged",
        )
    return inputs


def _check_zeros(
    stored: StoredModule, fmt: CheckpointFormat, shape: tuple[int, int], why: str
) -> None:
    """Zero points are there where they must be, of one of the two layouts."""
    part = "weight_zero_point"
    if part not in stored.parts:
        if not fmt.symmetric:
            stored.fail(part, "is missing, though symmetric is false; download every file")
        return
    if fmt.layout == "float-quantized":  # zeros, of which nothing but that is used
        stored.expect_dtype(part, "I8", "F8_E4M3")
        return
    stored.expect_dtype(part, "I8", "I32")
    num_columns, num_groups = shape
    if fmt.tensor:
        fp8_blocks.check_single(stored, part, "I8")
    elif stored.parts[part].dtype == "I32":
        num_words = -(-num_columns * fmt.bits // WORD_BITS)
        stored.expect_shape(part, (num_words, num_groups), why)
    elif not (num_groups == 1 and stored.parts[part].shape == (num_columns,)):
        stored.expect_shape(part, shape, why)


def _zeros(
    stored: StoredModule, fmt: CheckpointFormat, shape: tuple[int, int]
) -> np.ndarray | None:
    """Zero points int8 [G, N]; None where there are none."""
    part = "weight_zero_point"
    if part not in stored.parts:
        return None
    num_columns, num_groups = shape
    zeros = stored.load(part)
    if fmt.symmetric and zeros.dtype != np.int32:
        _expect_no_zeros(stored, zeros)
        return None
    if fmt.tensor:
        zeros = np.broadcast_to(zeros.reshape(1, 1), (1, num_columns))
    else:
        if zeros.dtype == np.int32:
            zeros = unpack_rows(np.ascontiguousarray(zeros), fmt.bits, num_columns)
            zeros = signed(zeros, fmt.bits)
        zeros = zeros.reshape(num_columns, num_groups).T
    low, high = -(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1
    if zeros.min() < low or zeros.max() > high:
        stored.fail(
            part,
            f"has a zero point outside {low} to {high}, the range of {fmt.bits} bits: num_bits of "
            "quantization_config is wrong, or the file is damaged",
        )
    if fmt.symmetric:
        _expect_no_zeros(stored, zeros)
    return np.ascontiguousarray(zeros, np.int8)


def _expect_no_zeros(stored: StoredModule, zeros: np.ndarray) -> None:
    """ModelFormatError where a symmetric layer has a zero point other than 0."""
    if zeros.astype(np.float32).any():
        stored.fail(
            "weight_zero_point",
            "is not 0, though symmetric is true: quantization_config and the tensors contradict "
            "each other; correct symmetric in config.json",
        )
