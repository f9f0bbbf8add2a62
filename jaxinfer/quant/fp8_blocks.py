"""fp8 (e4m3) checkpoints: one float32 scale for each block of the matrix, or one for all of it.

`weight` fp8 [N, K]; `weight_scale_inv` [ceil(N/bn), ceil(K/bk)] multiplies the blocks, whatever its
name says. With no block size there is one `weight_scale` (some files: `weight_scale_inv`).
Source: DeepSeek-V3 README_WEIGHTS.md; transformers' FineGrainedFP8.
"""

import numpy as np

from jaxinfer.quant.config import CheckpointFormat
from jaxinfer.quant.packed import FP8, PackedWeight, StoredModule

PARTS = {"weight": True, "weight_scale_inv": False, "weight_scale": False}
"""Parts of a module; True where one must be there."""

SCALE_DTYPES = ("F32", "BF16", "F16")
NAN_BITS = 0x7F  # below the sign; e4m3 has no infinity


def logical_shape(stored: StoredModule, fmt: CheckpointFormat) -> tuple[int, int]:
    """(K, N), once every part's shape and dtype agree; ModelFormatError otherwise."""
    num_columns, num_rows = stored.shape("weight", 2)
    stored.expect_dtype("weight", "F8_E4M3")
    part = _scale_part(stored)
    if fmt.block is not None:
        check_scales(stored, part, fmt.block, (num_rows, num_columns))
    else:
        check_single(stored, part, *SCALE_DTYPES)
    return num_rows, num_columns


def read(stored: StoredModule, fmt: CheckpointFormat) -> PackedWeight:
    """Unpack one linear layer. Raises ModelFormatError naming the tensor."""
    num_rows, num_columns = logical_shape(stored, fmt)
    return read_blocks(stored, _scale_part(stored), fmt.block or (num_columns, num_rows))


def read_blocks(stored: StoredModule, part: str, block: tuple[int, int]) -> PackedWeight:
    """The record of a matrix whose scales `part` are for blocks of (outputs, inputs)."""
    values = fp8_values(stored)
    scales, scale_dtype = stored.scales(part)
    num_rows, num_columns = values.shape
    outputs, inputs = block
    grid = (-(-num_columns // outputs), -(-num_rows // inputs))
    return PackedWeight(
        name=stored.name,
        values=values,
        scales=np.ascontiguousarray(scales.reshape(grid).T),
        bits=8,
        group_size=inputs,
        columns=outputs,
        scale_dtype=scale_dtype,
    )


def fp8_values(stored: StoredModule) -> np.ndarray:
    """`weight` [N, K] as [K, N]; NaN is refused."""
    values = stored.load("weight").view(FP8)
    if ((values.view(np.uint8) & NAN_BITS) == NAN_BITS).any():
        stored.fail("weight", "holds NaN: the file is damaged; download it again")
    return values.T


def check_scales(
    stored: StoredModule, part: str, block: tuple[int, int], shape: tuple[int, int]
) -> None:
    """ModelFormatError unless `part` has a scale for each block of a matrix of (K, N)."""
    grid = (-(-shape[1] // block[0]), -(-shape[0] // block[1]))
    why = f"weight [{shape[1]}, {shape[0]}] in blocks of {list(block)}"
    stored.expect_shape(part, grid, why)
    stored.expect_dtype(part, *SCALE_DTYPES)


def check_single(stored: StoredModule, part: str, *dtypes: str) -> None:
    """ModelFormatError unless `part` is one number of one of `dtypes`."""
    if part not in stored.parts:
        stored.fail(part, "is missing; download every file of the checkpoint")
    shape = stored.parts[part].shape
    if shape not in ((), (1,), (1, 1)):
        stored.fail(part, f"has shape {shape}; one number for the whole matrix is expected")
    stored.expect_dtype(part, *dtypes)


def _scale_part(stored: StoredModule) -> str:
    names = [name for name in ("weight_scale_inv", "weight_scale") if name in stored.parts]
    if len(names) == 2:
        stored.fail("weight_scale", "is there beside weight_scale_inv; which one holds?")
    return names[0] if names else "weight_scale_inv"
