"""Writing safetensors files: one, or several merged into a model's; whole or not at all.

jaxinfer.weights reads them, as any other. Format: https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_NAMES = {
    np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int8): "I8",
    np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.int32): "I32", np.dtype(np.int64): "I64",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """The file appears whole, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], notes: Mapping[str, str] | None = None
) -> None:
    """A safetensors file, which appears whole, by rename."""
    entries = {
        name: (_NAMES[array.dtype], list(array.shape), array.nbytes)
        for name, array in tensors.items()
    }
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for name in _write_header(file, entries, notes or {}):
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
        _flush(file)
    temporary.rename(path)


def merge(paths: Iterable[Path], folder: Path, limit: int) -> None:
    """The tensors of safetensors files as model.safetensors in `folder`, or, where they take more
    than `limit` bytes, as shards of at most that (or of one file) with their index."""
    shards: list[list[Path]] = [[]]
    size = 0
    for path in paths:
        num_bytes = path.stat().st_size
        if shards[-1] and size + num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(path)
        size += num_bytes
    if len(shards) == 1:
        _merge_one(shards[0], folder / "model.safetensors")
        return
    weight_map, total = {}, 0
    for i, files in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for tensor, num_bytes in _merge_one(files, folder / name).items():
            weight_map[tensor] = name
            total += num_bytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


def _merge_one(paths: list[Path], target: Path) -> dict[str, int]:
    """One file of all tensors; their sizes in bytes."""
    entries, places = {}, {}
    for path in paths:
        header, start = read_header(path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            entries[name] = (entry["dtype"], entry["shape"], end - begin)
            places[name] = (path, start + begin, end - begin)
    with target.open("wb") as file:
        for name in _write_header(file, entries, {"format": "pt"}):
            path, begin, num_bytes = places[name]
            if num_bytes:
                file.write(np.memmap(path, np.uint8, "r", begin, (num_bytes,)).data)
        _flush(file)
    return {name: num_bytes for name, (_, _, num_bytes) in entries.items()}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file of ours, and where its data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _write_header(
    file: BinaryIO, entries: Mapping[str, tuple[str, list[int], int]], notes: Mapping[str, str]
) -> list[str]:
    """Write the header; the names in the order in which their bytes are to follow.

    Types of more bytes first, as the format's own library has them: all are aligned.
    """
    wide = {"I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
    order = sorted(entries, key=lambda name: (-wide.get(entries[name][0], 1), name))
    header: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    end = 0
    for name in order:
        dtype, shape, num_bytes = entries[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    return order


def _flush(file: BinaryIO) -> None:
    """To the disk: after a power cut a renamed file must not be empty."""
    file.flush()
    os.fsync(file.fileno())
