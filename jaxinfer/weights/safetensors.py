"""Reading safetensors files: one, or the shards that a model.safetensors.index.json names.

The header is parsed here and not by the safetensors library, because that accepts a tensor name
given twice (the last wins). Everything in a header is checked against the size of the file before
anything is allocated; tensors are then mapped one at a time, so the file is never copied whole.
Format: https://github.com/huggingface/safetensors#format
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jaxinfer.errors import ModelFormatError
from jaxinfer.params import TensorInfo
from jaxinfer.weights.files import (
    MAX_INDEX_BYTES,
    looks_like,
    parse_json_object,
    read_json,
    regular_size,
)

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 8
MAX_SHARDS = 10_000

Dtypes = Mapping[str, np.dtype[Any]]

FLOATS: Dtypes = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
QUANTISED: Dtypes = {
    **FLOATS,
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""Dtypes by the file's names: of a float checkpoint, and of one with a quantization_config."""

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "BOOL": 1, "U8": 1, "I8": 1, "F64": 8, "I64": 8}
_ITEM_BYTES |= {"I16": 2, "U16": 2, "I32": 4, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
# masks and tables that old checkpoints store beside the weights; no model reads them
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "position_ids")


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies: `start` and `num_bytes` are bytes of the file `path`."""

    info: TensorInfo
    path: Path
    start: int
    num_bytes: int


class SafetensorsReader:
    """Tensors of one or several files under the names they are stored with; nothing stays open."""

    def __init__(self, tensors: Mapping[str, _Stored], dtypes: Dtypes = FLOATS):
        self._tensors = tensors
        self._dtypes = dtypes
        self.infos: Mapping[str, TensorInfo] = {name: t.info for name, t in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Map tensor `name`: a read-only array that keeps its part of the file mapped."""
        stored = self._tensors[name]
        dtype = self._dtypes.get(stored.info.dtype)
        if dtype is None:
            known = ", ".join(self._dtypes)
            _fail(stored.path, name, f"has dtype {stored.info.dtype}; supported: {known}")
        regular_size(stored.path)
        try:
            raw = np.memmap(stored.path, np.uint8, "r", stored.start, (stored.num_bytes,))
        except (OSError, ValueError) as cause:
            raise ModelFormatError(
                f"{stored.path}: tensor {name!r} cannot be read: {cause}; did the file change?",
                path=stored.path,
                field=name,
            ) from cause
        return np.asarray(raw).view(dtype).reshape(stored.info.shape)

    def close(self) -> None:
        """Nothing to do: a tensor's mapping goes with its array."""


def open_file(path: Path, dtypes: Dtypes = FLOATS) -> SafetensorsReader:
    """Read and check the header of one file; ModelFormatError for anything malformed.

    `dtypes`, FLOATS or QUANTISED, are those that a tensor may have.
    """
    return SafetensorsReader(_read_header(path, dtypes), dtypes)


def open_sharded(index: Path, dtypes: Dtypes = FLOATS) -> SafetensorsReader:
    """Read the index and the header of every shard it names, and check that they agree."""
    weight_map = _weight_map(index)
    tensors: dict[str, _Stored] = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = index.parent / shard
        if not os.path.lexists(path):
            _fail(path, None, f"named by {index.name} but missing; download every shard")
        for name, stored in _read_header(path, dtypes).items():
            if name in tensors:
                _fail(path, name, f"is also in {tensors[name].path.name}; which one holds?")
            if weight_map.get(name) != shard:
                where = weight_map.get(name, "nowhere")
                _fail(path, name, f"is here, but {index.name} places it in {where}")
            tensors[name] = stored
    for name, shard in weight_map.items():
        if name not in tensors:
            _fail(index, name, f"is not in {shard}, where the index places it")
    return SafetensorsReader(tensors, dtypes)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json(index, limit=MAX_INDEX_BYTES).get("weight_map")
    except ValueError as cause:
        raise ModelFormatError(str(cause), path=index) from cause
    if not isinstance(weight_map, dict) or not weight_map:
        _fail(index, "weight_map", "must be an object that gives a shard for every tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            _fail(index, name, f"is placed in {shard!r}; a *.safetensors file name is needed")
        if "/" in shard or "\\" in shard or "\0" in shard or shard.startswith("."):
            _fail(index, name, f"is placed in {shard!r}; a shard must lie in the index's folder")
    if len(set(weight_map.values())) > MAX_SHARDS:
        _fail(index, "weight_map", f"names more than {MAX_SHARDS} shards")
    return weight_map


def _read_header(path: Path, dtypes: Dtypes) -> dict[str, _Stored]:
    size = regular_size(path)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            header_bytes = _header_bytes(path, size, head, file.read(56))
            file.seek(8)
            text = file.read(header_bytes)
    except OSError as cause:
        raise ModelFormatError(f"{path}: cannot be opened: {cause.strerror}", path=path) from cause
    if not text.startswith(b"{"):
        _fail(path, None, "the header does not begin with '{'; this is not a safetensors file", 8)
    try:
        header = parse_json_object(text)
    except ValueError as cause:
        raise ModelFormatError(f"{path}: the header {cause}", path=path, offset=8) from cause
    _check_metadata(path, header.pop("__metadata__", None))
    data_start = 8 + header_bytes
    tensors = {
        name: _stored(path, name, entry, data_start, size, dtypes) for name, entry in header.items()
    }
    _check_cover(path, tensors, data_start, size)
    return tensors


def _header_bytes(path: Path, size: int, head: bytes, more: bytes) -> int:
    # only a file that cannot be read is named: a header of 1152 bytes begins as a pickle does
    plausible = size > 8 and more.startswith(b"{")
    if not plausible and (what := looks_like(head + more)):
        _fail(path, None, f"is not a safetensors file; it looks like {what}", 0)
    if size <= 8:
        _fail(path, None, f"header too small: the file has {size} bytes; download it again", 0)
    (length,) = struct.unpack("<Q", head)
    if length > MAX_HEADER_BYTES:
        _fail(path, None, f"header too large: {length} bytes; at most {MAX_HEADER_BYTES}", 0)
    if length > size - 8:
        _fail(
            path,
            None,
            f"file truncated: the header needs {8 + length} bytes, the file has {size}; "
            "download it again",
            0,
        )
    return length


def _check_metadata(path: Path, metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _fail(path, "__metadata__", "must map strings to strings", 8)


def _stored(
    path: Path, name: str, entry: object, data_start: int, size: int, dtypes: Dtypes
) -> _Stored:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _fail(path, name, "must have exactly dtype, shape and data_offsets", 8)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        known = ", ".join(dtypes)
        _fail(path, name, f"has unknown dtype {str(dtype)[:40]!r}; supported: {known}", 8)
    if dtype not in dtypes and not name.endswith(_BUFFERS):
        state = "is not supported for a weight"
        if dtype in QUANTISED:
            state = "needs a quantization_config in config.json that says what it stands for"
        _fail(path, name, f"has dtype {dtype}, which {state}; supported: {', '.join(dtypes)}", 8)
    if not isinstance(shape, list) or not all(_is_count(n) and n > 0 for n in shape):
        _fail(path, name, f"has shape {str(shape)[:80]}; a list of integers >= 1 is needed", 8)
    if len(shape) > MAX_DIMS:
        _fail(path, name, f"has {len(shape)} dimensions; at most {MAX_DIMS}", 8)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        _fail(path, name, f"has data_offsets {str(offsets)[:80]}; two integers >= 0 are needed", 8)
    start, end = offsets
    if end < start:
        _fail(path, name, f"has reversed data_offsets [{start}, {end}]", 8)
    if end > size - data_start:
        _fail(
            path,
            name,
            f"file truncated: need {data_start + end} bytes, have {size}; "
            "an incomplete download? Download it again",
            size,
        )
    need = math.prod(shape) * _ITEM_BYTES[dtype]
    if need != end - start:
        _fail(
            path,
            name,
            f"{dtype} of shape {shape} needs {need} bytes, but data_offsets [{start}, {end}] "
            f"give {end - start}",
            8,
        )
    return _Stored(TensorInfo(tuple(shape), dtype), path, data_start + start, need)


def _check_cover(path: Path, tensors: Mapping[str, _Stored], data_start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    if not tensors:
        _fail(path, None, "holds no tensors")
    position, previous = data_start, "the header"
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].start):
        if stored.start != position:
            fault = "overlaps" if stored.start < position else "leaves a hole after"
            _fail(path, name, f"{fault} {previous}", stored.start)
        position, previous = stored.start + stored.num_bytes, repr(name)
    if position != size:
        _fail(
            path,
            None,
            f"{size - position} extra bytes after the last tensor: need {position}, have {size}",
            position,
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _fail(path: Path, tensor: str | None, text: str, offset: int | None = None) -> NoReturn:
    where = f"tensor {tensor[:200]!r} " if tensor is not None else ""
    raise ModelFormatError(f"{path}: {where}{text}", path=path, field=tensor, offset=offset)
