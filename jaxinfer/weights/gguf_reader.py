"""GGUFReader: the tensors of a GGUF file, one at a time, under Hugging Face names.

A quantised tensor comes as float32 (the `gguf` package expands the blocks) or, asked for so, as the
integers of its blocks; float32, float16 and bfloat16 ones come as they are stored, mapped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxinfer.config import ModelConfig
from jaxinfer.errors import ModelFormatError
from jaxinfer.params import TensorInfo
from jaxinfer.quant import gguf_blocks, kept
from jaxinfer.quant.packed import PackedWeight
from jaxinfer.weights import gguf_names
from jaxinfer.weights.files import regular_size
from jaxinfer.weights.gguf import Container, StoredTensor
from jaxinfer.weights.memory import aligned

_PLAIN: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
BLOCK_TYPES = tuple(
    GGMLQuantizationType[name]
    for name in (
        "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0",
        "TQ2_0", "MXFP4", "NVFP4", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S",
        "IQ1_M", "IQ4_NL", "IQ4_XS",
    )
    if name in GGMLQuantizationType.__members__
)  # fmt: skip
# elements expanded at once: in cache, and it bounds what the gguf package keeps beside the result
CHUNK_ITEMS = 2**18


class GGUFReader:
    """Tensors of a parsed container; nothing stays open. `bind` comes before `read`.

    It is a kept.PackedTensors: what is packed is every tensor of blocks.
    """

    def __init__(self, container: Container):
        self.path = container.path
        self._table = gguf_names.architecture(
            container.metadata.get("general.architecture"), container.path
        )
        self._stored: dict[str, StoredTensor] = {}
        self._heads: tuple[int, int] | None = None
        self._rope_factors: StoredTensor | None = None
        infos: dict[str, TensorInfo] = {}
        for stored in container.tensors.values():
            if stored.name == gguf_names.ROPE_FACTORS:
                self._rope_factors = stored
                continue
            name = gguf_names.hf_name(self._table, stored.name)
            if name is None:
                self._fail(stored, f"is unknown to {self._table.name}")
            if stored.type not in _PLAIN and stored.type not in BLOCK_TYPES:
                known = ", ".join(t.name for t in (*_PLAIN, *BLOCK_TYPES))
                self._fail(stored, f"has type {stored.type.name}; supported: {known}")
            self._stored[name] = stored
            infos[name] = TensorInfo(self._hf_shape(stored), stored.type.name)
        self.infos: Mapping[str, TensorInfo] = infos

    def rope_factors(self) -> np.ndarray | None:
        """Divisors of the rotary frequencies (Llama 3.1's scaling), None where there are none."""
        stored = self._rope_factors
        if stored is None:
            return None
        if stored.type not in _PLAIN:
            self._fail(stored, f"has type {stored.type.name}; F32 is expected")
        return read_stored(self.path, stored)

    def bind(self, config: ModelConfig) -> None:
        """Say how many heads the permuted rows belong to; ModelFormatError if they cannot."""
        self._heads = (config.num_heads, config.num_kv_heads)
        for stored in self._stored.values():
            undo = gguf_names.undo_of(self._table, stored.name)
            heads = gguf_names.permuted_heads(undo, *self._heads)
            if heads is not None and stored.shape[0] % (2 * heads):
                self._fail(stored, f"of shape {stored.shape} does not divide into {heads} heads")

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` in its Hugging Face shape and layout, de-quantised."""
        return self.arrange(name, read_stored(self.path, self._stored[name]))

    def arrange(self, name: str, array: np.ndarray) -> np.ndarray:
        """`array`, laid out as the file has tensor `name`, in Hugging Face's layout."""
        undo = gguf_names.undo_of(self._table, self._stored[name].name)
        if undo is None:
            return array
        if self._heads is None:
            raise RuntimeError("bind(config) comes before read")
        return undo(array, *self._heads)

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        """(N, K) of a matrix of blocks, None for a tensor that is not one."""
        stored = self._stored[name]
        if stored.type in _PLAIN or len(stored.shape) != 2:
            return None
        return stored.shape[0], stored.shape[1]

    def kept(self, name: str) -> kept.Kept | str:
        """How a matrix of blocks can be held, or why it cannot."""
        return kept.of_block(self._stored[name].type.name)

    def read_packed(self, name: str) -> PackedWeight:
        """A matrix of blocks as integers. ModelFormatError for scales that are not finite."""
        stored = self._stored[name]
        shape = stored.shape[0], stored.shape[1]
        return gguf_blocks.read(stored.name, _raw(self.path, stored), shape, stored.type.name)

    def close(self) -> None:
        """Nothing to do: a tensor's mapping goes with its array."""

    def _hf_shape(self, stored: StoredTensor) -> tuple[int, ...]:
        undo = gguf_names.undo_of(self._table, stored.name)
        return stored.shape[::-1] if undo is gguf_names.transposed else stored.shape

    def _fail(self, stored: StoredTensor, text: str) -> NoReturn:
        raise ModelFormatError(
            f"{self.path}: byte {stored.start}: tensor {stored.name!r} {text}",
            path=self.path,
            field=stored.name,
            offset=stored.start,
        )


def read_stored(path: Path, stored: StoredTensor) -> np.ndarray:
    """A tensor as the file lays it out (NumPy order of dimensions), de-quantised."""
    raw = _raw(path, stored)
    if stored.type in _PLAIN:
        return raw.view(_PLAIN[stored.type]).reshape(stored.shape)
    return _expand(raw, stored)


def _raw(path: Path, stored: StoredTensor) -> np.ndarray:
    """The bytes of a tensor, mapped."""
    regular_size(path)
    try:
        return np.asarray(np.memmap(path, np.uint8, "r", stored.start, (stored.num_bytes,)))
    except (OSError, ValueError) as cause:
        raise ModelFormatError(
            f"{path}: tensor {stored.name!r} cannot be read: {cause}; did the file change?",
            path=path,
            field=stored.name,
            offset=stored.start,
        ) from cause


def _expand(raw: np.ndarray, stored: StoredTensor) -> np.ndarray:
    block, block_bytes = GGML_QUANT_SIZES[stored.type]
    blocks = raw.reshape(-1, block_bytes)
    out = aligned(len(blocks) * block, np.float32)
    step = max(1, CHUNK_ITEMS // block)
    with np.errstate(all="ignore"):  # a NaN or infinite scale shows in the result, which is checked
        for first in range(0, len(blocks), step):
            some = blocks[first : first + step]
            # As one long row: the package goes through short rows a few at a time, in Python.
            values = quants.dequantize(some.reshape(1, -1), stored.type)
            out[first * block : (first + len(some)) * block] = values[0]
    return out.reshape(stored.shape)
