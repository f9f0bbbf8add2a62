"""Parsing the GGUF container (versions 2 and 3, little-endian): metadata and tensor infos, bounded.

The `gguf` package's reader trusts the file (it allocates by counts it was given and accepts
overlapping tensors), so only its type tables are used here. Every count and length is compared with
the bytes that are left before anything of that size is made; each fault names its byte.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxinfer.errors import ModelFormatError
from jaxinfer.weights.files import looks_like, map_file

VERSIONS = (2, 3)
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 1_024
MAX_ITEM_BYTES = 65_535  # one string of an array: a token, a merge
MAX_METADATA_BYTES = 256 * 2**20
MAX_ITEMS = 2**24  # of all arrays together; the largest vocabulary known has 2**18 tokens
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[Any]] = {
    code: np.dtype(text)
    for code, text in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
        10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, key, value type, smallest value
_MIN_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dims, one dim, type, offset
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the file: NumPy `shape` (GGUF's dims reversed) and the place of its bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Container:
    """A parsed file. Metadata arrays are lists."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def parse(path: Path) -> Container:
    """Parse and check the structure of `path`; ModelFormatError, with the byte, where malformed."""
    data = map_file(path)
    try:
        return _Parser(path, data).container()
    finally:
        data.close()


class _Parser:
    """A cursor over the file: `position` is the next byte, `end` the first that may not be read."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.size = len(data)
        self.end = min(self.size, MAX_METADATA_BYTES)
        self.position = 0
        self.items_left = MAX_ITEMS

    def container(self) -> Container:
        version, num_tensors, num_pairs = self.header()
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            start = self.position
            key = self.string("metadata key", MAX_KEY_BYTES)
            if not key or key in metadata:
                fault = f"metadata key {key[:200]!r} appears twice" if key else "empty metadata key"
                self.fail(fault, start)
            metadata[key] = self.value(key)
        alignment = self.alignment(metadata)
        declared = self.tensor_infos(num_tensors)
        data_start = -(-self.position // alignment) * alignment
        tensors = self.place(declared, data_start, alignment)
        return Container(self.path, version, metadata, tensors)

    def header(self) -> tuple[int, int, int]:
        head = self.data[:64]
        if head[:4] != b"GGUF":
            what = looks_like(head)
            self.fail(
                f"not a GGUF file: it begins with {head[:4]!r}, not b'GGUF'"
                + (f"; it looks like {what}" if what else ""),
                0,
            )
        self.position = 4
        version = self.u32("version")
        if version not in VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            kind = "a big-endian file" if big else f"version {version}"
            self.fail(f"{kind}; supported: little-endian versions 2 and 3", 4)
        num_tensors = self.count("tensor count", _MIN_INFO_BYTES)
        num_pairs = self.count("metadata count", _MIN_PAIR_BYTES)
        if num_tensors == 0:
            self.fail("holds no tensors", 8)
        return version, num_tensors, num_pairs

    def value(self, key: str) -> Any:
        start = self.position
        code = self.u32(f"type of {key}")
        if code == _STRING:
            return self.string(key, self.end)
        if code == _ARRAY:
            return self.array(key)
        if code not in _SCALARS:
            self.fail(f"{key}: unknown value type {code}; known: 0 to 12", start)
        return self.scalars(key, code, 1)[0]

    def array(self, key: str) -> list[Any]:
        start = self.position
        code = self.u32(f"item type of {key}")
        if code == _ARRAY:
            self.fail(f"{key}: an array of arrays; not supported", start)
        if code != _STRING and code not in _SCALARS:
            self.fail(f"{key}: unknown item type {code}; known: 0 to 12", start)
        item_bytes = 8 if code == _STRING else _SCALARS[code].itemsize
        count = self.count(f"length of {key}", item_bytes)
        if count > self.items_left:
            self.fail(f"{key}: {count} items; all arrays together may have {MAX_ITEMS}", start)
        self.items_left -= count
        return self.strings(key, count) if code == _STRING else self.scalars(key, code, count)

    def scalars(self, key: str, code: int, count: int) -> list[Any]:
        start = self.position
        raw = self.take(key, count * _SCALARS[code].itemsize)
        values = np.frombuffer(raw, _SCALARS[code])
        if code != _BOOL:
            return values.tolist()
        if values.size and values.max() > 1:
            self.fail(f"{key}: a bool of value {values.max()}; 0 or 1 is needed", start)
        return values.astype(bool).tolist()

    def strings(self, key: str, count: int) -> list[str]:
        # hot: 10^5 to 5 * 10^5 items in a real file, so the cursor lives in locals
        unpack, data, position, end = _U64.unpack_from, self.data, self.position, self.end
        last = end - 8
        raw: list[bytes] = []
        for _ in range(count):
            if position > last:
                self.fail(f"{key}: ends within item {len(raw)} of {count}", position)
            stop = position + 8 + unpack(data, position)[0]
            if stop > end or stop - position - 8 > MAX_ITEM_BYTES:
                self.fail(
                    f"{key}: item {len(raw)} of {count} has {stop - position - 8} bytes; "
                    f"{end - position - 8} are left, at most {MAX_ITEM_BYTES} are allowed",
                    position,
                )
            raw.append(data[position + 8 : stop])
            position = stop
        try:
            texts = [item.decode() for item in raw]
        except UnicodeDecodeError:
            number = next(i for i, item in enumerate(raw) if not _is_utf8(item))
            offset = self.position + sum(8 + len(item) for item in raw[:number])
            self.fail(f"{key}: item {number} is not UTF-8: {raw[number][:40]!r}", offset)
        self.position = position
        return texts

    def alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        valid = isinstance(alignment, int) and not isinstance(alignment, bool)
        if not valid or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.fail(
                f"general.alignment is {str(alignment)[:40]}; a power of two up to {MAX_ALIGNMENT} "
                "is needed"
            )
        return alignment

    def tensor_infos(self, count: int) -> list[tuple[str, tuple[int, ...], Any, int, int]]:
        """(name, shape, type, offset in the data, byte of the info) of each tensor, in order."""
        infos = []
        seen: set[str] = set()
        for _ in range(count):
            start = self.position
            name = self.string("tensor name", MAX_NAME_BYTES)
            if not name or name in seen:
                self.fail(f"tensor {name!r} appears twice" if name else "empty tensor name", start)
            seen.add(name)
            num_dims = self.u32(f"dimensions of {name}")
            if not 1 <= num_dims <= MAX_DIMS:
                self.fail(f"tensor {name!r} has {num_dims} dimensions; 1 to {MAX_DIMS}", start)
            dims = struct.unpack(f"<{num_dims}Q", self.take(f"shape of {name}", 8 * num_dims))
            kind = self.tensor_type(name)
            offset = self.u64(f"offset of {name}")
            infos.append((name, dims[::-1], kind, offset, start))
        return infos

    def tensor_type(self, name: str) -> GGMLQuantizationType:
        start = self.position
        code = self.u32(f"type of {name}")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            self.fail(f"tensor {name!r} has unknown type {code}", start)
        if kind not in GGML_QUANT_SIZES:
            self.fail(f"tensor {name!r} has unsupported type {kind.name}", start)
        return kind

    def place(
        self,
        declared: list[tuple[str, tuple[int, ...], Any, int, int]],
        data_start: int,
        align: int,
    ) -> dict[str, StoredTensor]:
        """Check that the tensors, in order, cover the data without overlap or hole."""
        tensors: dict[str, StoredTensor] = {}
        expected = end = data_start
        for name, shape, kind, offset, info_start in declared:
            num_bytes = self.tensor_bytes(name, shape, kind, info_start)
            start = data_start + offset
            if start != expected:
                fault = "overlaps what is before it" if start < expected else "leaves a hole"
                self.fail(
                    f"tensor {name!r} {fault}: offset {offset}, expected {expected - data_start} "
                    f"(alignment {align})",
                    info_start,
                )
            end = start + num_bytes
            if end > self.size:
                self.fail(
                    f"file truncated in tensor {name!r}: need {end} bytes, have {self.size}; "
                    "an incomplete download? Download it again",
                    self.size,
                )
            expected = -(-end // align) * align
            tensors[name] = StoredTensor(name, shape, kind, start, num_bytes)
        if self.size > expected:
            self.fail(f"{self.size - expected} extra bytes after the last tensor", expected)
        return tensors

    def tensor_bytes(self, name: str, shape: tuple[int, ...], kind: Any, start: int) -> int:
        if 0 in shape:
            self.fail(f"tensor {name!r} has an empty dimension: {list(shape)}", start)
        num_items = math.prod(shape)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            self.fail(
                f"tensor {name!r}: rows of {shape[-1]} are no multiple of {kind.name}'s block "
                f"({block})",
                start,
            )
        num_bytes = num_items // block * block_bytes
        if num_bytes > self.size:
            self.fail(
                f"tensor {name!r} of shape {list(shape)} ({kind.name}) needs {num_bytes} bytes; "
                f"the file has {self.size}",
                start,
            )
        return num_bytes

    def count(self, what: str, item_bytes: int) -> int:
        """A u64 count of items of at least `item_bytes`, which the bytes left can hold."""
        start = self.position
        count = self.u64(what)
        if count * item_bytes > self.end - self.position:
            left = self.end - self.position
            self.fail(f"{what} is {count}; the {left} bytes left cannot hold that", start)
        return count

    def string(self, what: str, limit: int) -> str:
        start = self.position
        length = self.u64(f"length of {what}")
        if length > limit or length > self.end - self.position:
            left = self.end - self.position
            self.fail(f"{what}: a string of {length} bytes; {left} left, {limit} allowed", start)
        raw = self.take(what, length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8: {raw[:40]!r}", start)

    def u32(self, what: str) -> int:
        return _U32.unpack(self.take(what, 4))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack(self.take(what, 8))[0]

    def take(self, what: str, num_bytes: int) -> bytes:
        start, stop = self.position, self.position + num_bytes
        if stop > self.end:
            if self.end < self.size:
                self.fail(f"{what}: metadata exceeds {MAX_METADATA_BYTES} bytes", start)
            self.fail(f"file truncated in {what}: need {stop} bytes, have {self.size}", start)
        self.position = stop
        return self.data[start:stop]

    def fail(self, text: str, offset: int | None = None) -> NoReturn:
        at = self.position if offset is None else offset
        raise ModelFormatError(f"{self.path}: byte {at}: {text}", path=self.path, offset=at)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
