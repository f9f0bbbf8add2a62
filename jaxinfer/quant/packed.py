"""`PackedWeight`: a quantised matrix of any checkpoint format, unpacked, and what it stands for.

The formats' readers (awq.py, gptq.py, ...) take a `StoredModule`, the tensors that a checkpoint
keeps for one linear layer, and give this one record. NumPy only; nothing here knows a device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jaxinfer.errors import ModelFormatError
from jaxinfer.params import TensorInfo, is_finite

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
WORD_BITS = 32
CHUNK_ROWS = 256  # rows de-quantised at once: bounds what is kept beside the result
# no integer or fp8 value is larger in magnitude: 448 (e4m3), 255 (8 bits less a zero point)
MAX_VALUE = 512.0
# GPTQ's and compressed-tensors'; the latter writes -1 throughout where groups are in order
GROUP_PARTS = ("g_idx", "weight_g_idx")


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's matrix [K, N] (K inputs, N outputs) as integers or fp8 with scales.

    With g the group of row k, which is `g_idx[k]` or else k // group_size, and c = n // columns:

        weight[k, n] = (values[k, n] - zeros[g, n]) * scales[g, c] + offsets[g, n]

    `values` are int8 in [-2**(bits-1), 2**(bits-1)), uint8 in [0, 2**bits), or float8_e4m3fn;
    they may be a strided view. `zeros` have their dtype and range. `scales` and `offsets` are
    float32; absent zeros and offsets are None. A scale for each output has group_size K, one for
    the whole tensor also columns N. `scale_dtype` is what the scales were stored as.
    """

    name: str
    values: np.ndarray
    scales: np.ndarray
    bits: int
    group_size: int
    columns: int = 1
    zeros: np.ndarray | None = None
    offsets: np.ndarray | None = None
    g_idx: np.ndarray | None = None
    scale_dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        num_rows, num_columns = self.values.shape
        return num_rows, num_columns

    def dequantize(self) -> np.ndarray:
        """The matrix as float32 [K, N].

        Value less zero point is an integer, exact in float32. Its product with a scale stored in
        float16 or bfloat16 is exact too (at most 9 + 11 bits; GGUF's products of two scales at
        most 23), and otherwise rounded once; adding an offset rounds once more. So
        `dequantize().astype(scale_dtype)` is, bit for bit, what a library gives that multiplies in
        that dtype.
        """
        num_rows, num_columns = self.shape
        groups = self.g_idx
        if groups is None:
            groups = np.arange(num_rows) // self.group_size
        scales = self.scales
        if self.columns > 1:
            scales = np.repeat(scales, self.columns, axis=1)[:, :num_columns]
        out = np.empty((num_rows, num_columns), np.float32)
        for first in range(0, num_rows, CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            some = self.values[rows].astype(np.float32)
            if self.zeros is not None:
                some -= self.zeros[groups[rows]].astype(np.float32)
            some *= scales[groups[rows]]
            if self.offsets is not None:
                some += self.offsets[groups[rows]]
            out[rows] = some
        return out

    def check_invariants(self) -> None:
        """AssertionError if the record contradicts its own description (our fault)."""
        num_rows, num_columns = self.shape
        num_groups = -(-num_rows // self.group_size)
        assert self.scales.dtype == np.float32
        assert self.scales.shape == (num_groups, -(-num_columns // self.columns))
        for extra in (self.zeros, self.offsets):
            assert extra is None or extra.shape == (num_groups, num_columns)
        assert self.zeros is None or self.zeros.dtype == self.values.dtype
        assert self.offsets is None or self.offsets.dtype == np.float32
        if self.g_idx is not None:
            assert self.g_idx.shape == (num_rows,) and self.g_idx.dtype == np.int32
            assert self.g_idx.min() >= 0 and self.g_idx.max() < num_groups
        if self.values.dtype == FP8:
            assert self.bits == 8
            return
        assert self.values.dtype in (np.int8, np.uint8)
        low = -(1 << (self.bits - 1)) if self.values.dtype == np.int8 else 0
        for integers in (self.values, self.zeros):
            if integers is not None:
                assert low <= integers.min() and integers.max() < low + (1 << self.bits)


@dataclass(frozen=True)
class StoredModule:
    """The tensors of one linear layer: `parts` by the last word of their names ("qweight").

    `load(part)` reads one, of the shape and dtype that its TensorInfo says; `path` is the file or
    folder that messages name.
    """

    name: str
    parts: Mapping[str, TensorInfo]
    load: Callable[[str], np.ndarray] = field(repr=False)
    path: object = None

    def shape(self, part: str, num_dims: int) -> tuple[int, ...]:
        """Shape of `part`, which has `num_dims` axes."""
        if part not in self.parts:
            self.fail(part, "is missing; download every file of the checkpoint")
        shape = self.parts[part].shape
        if len(shape) != num_dims:
            self.fail(part, f"has shape {shape}; {num_dims} axes are expected")
        return shape

    def expect_shape(self, part: str, shape: tuple[int, ...], why: str) -> None:
        """ModelFormatError unless `part` has `shape`; `why` says what asks for it."""
        got = self.shape(part, len(shape))
        if got != shape:
            self.fail(part, f"has shape {got}; {shape} is expected: {why}")

    def expect_dtype(self, part: str, *dtypes: str) -> None:
        """ModelFormatError unless `part` is stored as one of `dtypes` (safetensors' names)."""
        got = self.parts[part].dtype
        if got not in dtypes:
            self.fail(part, f"has dtype {got}; expected: {', '.join(dtypes)}")

    def group_size(self, part: str, num_rows: int, group_size: int | None) -> int:
        """Rows of a group: `group_size`, or all `num_rows` (of `part`) where it is None."""
        size = num_rows if group_size is None else group_size
        if num_rows % size:
            self.fail(
                part,
                f"has {num_rows} inputs, which groups of {size} do not divide: group_size of "
                "quantization_config is wrong",
            )
        return size

    def scales(self, part: str) -> tuple[np.ndarray, str]:
        """(`part` as float32, the dtype it is stored in); NaN and infinity are refused."""
        stored = self.load(part)
        scales = stored.astype(np.float32)
        if not is_finite(scales):
            self.fail(part, "holds NaN or infinity: the file is damaged; download it again")
        if scales.size and float(np.abs(scales).max()) > np.finfo(np.float32).max / MAX_VALUE:
            self.fail(part, "holds scales so large that weights overflow float32: it is damaged")
        return scales, stored.dtype.name

    def fail(self, part: str, text: str) -> NoReturn:
        """Raise ModelFormatError about the tensor `part`."""
        where = f"{self.path}: " if self.path is not None else ""
        name = f"{self.name}.{part}"
        raise ModelFormatError(f"{where}tensor {name!r} {text}", path=self.path, field=name)


def unpack_rows(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpack a stream of `bits`-bit integers: int32 [W, M] -> uint8 [count, M].

    Each column is a stream of bits, the lowest bit of the first word first; integer i takes bits
    [i * bits, (i + 1) * bits) of it, across the border of two words where `bits` does not divide
    32. Whatever follows integer `count` is padding.
    """
    values_per_period = WORD_BITS // _common_divisor(bits)
    words_per_period = values_per_period * bits // WORD_BITS
    num_words, num_columns = words.shape
    num_periods = -(-num_words // words_per_period)
    unsigned = words.view(np.uint32)
    if num_words % words_per_period:
        padding = num_periods * words_per_period - num_words
        unsigned = np.pad(unsigned, ((0, padding), (0, 0)))
    stream = unsigned.reshape(num_periods, words_per_period, num_columns)
    out = np.empty((num_periods, values_per_period, num_columns), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for i in range(values_per_period):
        word, shift = divmod(i * bits, WORD_BITS)
        value = stream[:, word] >> np.uint32(shift)
        if shift + bits > WORD_BITS:
            value |= stream[:, word + 1] << np.uint32(WORD_BITS - shift)
        out[:, i] = value & mask
    return out.reshape(-1, num_columns)[:count]


def signed(integers: np.ndarray, bits: int) -> np.ndarray:
    """uint8 in [0, 2**bits) -> int8, less 2**(bits-1): offset binary, or a moved zero point."""
    return (integers ^ np.uint8(0x80) if bits == 8 else integers - np.uint8(1 << (bits - 1))).view(
        np.int8
    )


def check_group_indices(
    stored: StoredModule, part: str, num_rows: int, *, needed: bool, missing: str, why: str
) -> None:
    """The header of `part`, the group of each input, where it is stored; an error that says
    `missing` where it is `needed` and is not."""
    if part in stored.parts:
        stored.expect_shape(part, (num_rows,), why)
        stored.expect_dtype(part, "I32", "I64")
    elif needed:
        stored.fail(part, missing)


def group_indices(stored: StoredModule, num_rows: int, group_size: int | None) -> np.ndarray | None:
    """The group of each input row, int32 [K]; None where they are in order, or not stored.

    `group_size` None is all rows. ModelFormatError for a group that does not exist.
    """
    part = next((part for part in GROUP_PARTS if part in stored.parts), None)
    if part is None:
        return None
    size = group_size or num_rows
    g_idx: np.ndarray[Any, Any] = stored.load(part).astype(np.int32)
    if part == "weight_g_idx" and (g_idx == -1).all():
        return None
    num_groups = num_rows // size
    if g_idx.size and not 0 <= g_idx.min() <= g_idx.max() < num_groups:
        bad = g_idx[(g_idx < 0) | (g_idx >= num_groups)][0]
        stored.fail(
            part,
            f"names group {bad}; the scales have groups 0 to {num_groups - 1}: the file is "
            "damaged, or its tensors are of different checkpoints",
        )
    return None if np.array_equal(g_idx, np.arange(num_rows) // size) else g_idx


def _common_divisor(bits: int) -> int:
    """Greatest power of two that divides `bits`."""
    return bits & -bits
