"""Safetensors: real files read as the library reads them; every malformed one refused by name."""

import json
import os
import random
import struct
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxinfer.errors import ModelFormatError
from jaxinfer.weights.safetensors import (
    MAX_HEADER_BYTES,
    SafetensorsReader,
    open_file,
    open_sharded,
)
from tests.weights.builders import entry, mutate, raw_safetensors, safetensors_bytes

GOOD = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
PICKLE = b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}."


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_what_the_library_writes(tmp_path: Path, dtype: type):
    draw = np.random.default_rng(0)
    want = {
        name: draw.standard_normal(shape).astype(dtype)
        for name, shape in {"x": (3, 5), "y": (7,), "z": (2, 3, 4), "scalar": ()}.items()
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(want, path, {"format": "pt"})
    reader = open_file(path)
    assert set(reader.infos) == set(want)
    for name, array in want.items():
        got = reader.read(name)
        assert got.dtype == array.dtype and got.shape == array.shape == reader.infos[name].shape
        np.testing.assert_array_equal(got, array)
    reader.close()


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path: Path):
    header = json.dumps({"a": entry("F32", [1], 0, 4)}).ljust(0x0480).encode()
    path = _write(tmp_path, raw_safetensors(header, b"\0" * 4))
    assert open_file(path).read("a").tolist() == [0.0]


TENSOR = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def _one(*args, data: bytes = b"\0" * 4) -> bytes:
    return raw_safetensors({"a": entry(*args)}, data)


BAD = {
    "W1 empty": (b"", "header too small"),
    "W1 7 bytes": (b"\1" * 7, "header too small"),
    "W1 8 bytes": (b"\1" * 8, "header too small"),
    "W2 length 2^64-1": (b"\xff" * 8 + b"{}" * 99, "header too large"),
    "W2 length 101 MB": (struct.pack("<Q", 101_000_000) + b"{}", "header too large"),
    "W2 past the end": (struct.pack("<Q", 1000) + b"{}", "file truncated"),
    "W4 data short": (
        _one("F32", [2], 0, 8),
        r"file truncated: need \d+ bytes, have \d+; an incomplete",
    ),
    "W4 data long": (_one("F32", [1], 0, 4, data=b"\0" * 9), "5 extra bytes"),
    "W5 overlap": (
        raw_safetensors({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, b"\0" * 8),
        "'b' overlaps 'a'",
    ),
    "W5 hole": (
        raw_safetensors({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, b"\0" * 12),
        "'b' leaves a hole after 'a'",
    ),
    "W5 hole at the start": (_one("F32", [1], 4, 8, data=b"\0" * 8), "hole after the header"),
    "W5 reversed": (_one("F32", [1], 4, 0), "reversed data_offsets"),
    "W5 negative": (_one("F32", [1], -4, 0), "two integers >= 0"),
    "W5 not a multiple": (_one("F32", [2], 0, 4), "needs 8 bytes"),
    "W5 bool offset": (_one("F32", [1], False, 4), "two integers >= 0"),
    "W5 huge offset": (_one("F32", [2**62], 0, 2**64), "file truncated"),
    "W7 unknown dtype": (_one("F99", [1], 0, 4), "unknown dtype 'F99'; supported: F32, F16, BF16"),
    "W7 dtype not text": (_one(5, [1], 0, 4), "unknown dtype"),
    "W7 F64": (_one("F64", [1], 0, 8, data=b"\0" * 8), "F64.*supported: F32, F16, BF16"),
    "W7 I64": (_one("I64", [1], 0, 8, data=b"\0" * 8), "I64.*needs a quantization_config"),
    "W7 F8": (_one("F8_E4M3", [4], 0, 4), "needs a quantization_config.*: F32, F16, BF16$"),
    "W7 I8": (_one("I8", [4], 0, 4), "needs a quantization_config.*: F32, F16, BF16$"),
    "W7 U8": (_one("U8", [4], 0, 4), "U8.*not supported for a weight"),
    "W8 name twice": (raw_safetensors(f"{{{TENSOR},{TENSOR}}}", b"\0" * 4), "'a' twice"),
    "W8 metadata key twice": (
        raw_safetensors(f'{{"__metadata__":{{"k":"1","k":"2"}},{TENSOR}}}', b"\0" * 4),
        "'k' twice",
    ),
    "metadata not text": (
        raw_safetensors(f'{{"__metadata__":{{"k":1}},{TENSOR}}}', b"\0" * 4),
        "must map strings to strings",
    ),
    "W10 LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "Git LFS pointer",
    ),
    "W11 pickle": (PICKLE * 20, "Python pickle"),
    "W11 zip": (b"PK\3\4" + b"\0" * 60, "zip archive"),
    "W11 HTML": (b"<!DOCTYPE html><html><body>Log in</body></html>", "HTML page"),
    "W11 GGUF": (b"GGUF\3\0\0\0" + b"\0" * 60, "GGUF file"),
    "header not JSON": (raw_safetensors(b'{"a":', b""), "not valid JSON"),
    "header a list": (raw_safetensors(b"[1, 2]", b""), "does not begin with"),
    "header NaN": (raw_safetensors(b'{"a": NaN}', b""), "NaN"),
    "header not UTF-8": (raw_safetensors(b'{"\xff": 1}', b""), "not UTF-8"),
    "header nested": (raw_safetensors(b'{"a":' + b"[" * 10**5, b""), "nested too deeply"),
    "huge integer": (raw_safetensors(b'{"a":' + b"9" * 5000 + b"}", b""), "header"),
    "no tensors": (raw_safetensors({}, b""), "no tensors"),
    "entry not an object": (raw_safetensors({"a": 1}, b""), "exactly dtype, shape"),
    "entry with more": (
        raw_safetensors({"a": entry("F32", [1], 0, 4) | {"x": 1}}, b"\0" * 4),
        "exactly dtype, shape",
    ),
    "zero dimension": (_one("F32", [0, 2**62], 0, 0, data=b""), "integers >= 1"),
    "float dimension": (_one("F32", [1.0], 0, 4), "integers >= 1"),
    "100 dimensions": (_one("F32", [1] * 100, 0, 4), "100 dimensions"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_refused_by_name(tmp_path: Path, case: str):
    data, message = BAD[case]
    path = _write(tmp_path, data)
    started = time.perf_counter()
    with pytest.raises(ModelFormatError, match=message) as caught:
        open_file(path)
    assert time.perf_counter() - started < 1
    assert caught.value.path == path and "model.safetensors" in str(caught.value)


def test_a_sparse_file_of_101_mb_header_is_refused_before_reading(tmp_path: Path):
    path = _write(tmp_path, struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
    os.truncate(path, 2 * MAX_HEADER_BYTES)
    with pytest.raises(ModelFormatError, match="header too large"):
        open_file(path)


def test_known_buffers_may_have_any_dtype_but_not_be_read(tmp_path: Path):
    header = {"h.0.attn.bias": entry("BOOL", [2, 2], 0, 4), "w": entry("F32", [1], 4, 8)}
    reader = open_file(_write(tmp_path, raw_safetensors(header, b"\0" * 8)))
    assert reader.infos["h.0.attn.bias"].dtype == "BOOL"
    assert reader.read("w").tolist() == [0.0]
    with pytest.raises(ModelFormatError, match="BOOL; supported"):
        reader.read("h.0.attn.bias")


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path):
    path = _write(tmp_path, safetensors_bytes(GOOD))
    reader = open_file(path)
    os.truncate(path, 40)
    with pytest.raises(ModelFormatError, match="did the file change"):
        reader.read("b")


@pytest.mark.parametrize("kind", ["folder", "fifo", "loop", "missing", "secret"])
def test_what_is_no_readable_file_is_refused_at_once(tmp_path: Path, kind: str):
    path = tmp_path / "model.safetensors"
    messages = {
        "folder": "is a folder", "fifo": "not a regular file", "loop": "cannot be opened",
        "missing": "No such file", "secret": "Permission denied",
    }  # fmt: skip
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "secret":
        path.write_bytes(safetensors_bytes(GOOD))
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read every file")
    started = time.perf_counter()
    with pytest.raises(ModelFormatError, match=messages[kind]):
        open_file(path)
    assert time.perf_counter() - started < 2


# Shards


def _sharded(folder: Path, shards: dict[str, dict[str, np.ndarray]], weight_map=None) -> Path:
    for name, tensors in shards.items():
        (folder / name).write_bytes(safetensors_bytes(tensors))
    if weight_map is None:
        weight_map = {t: name for name, tensors in shards.items() for t in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_shards_are_read_as_one(tmp_path: Path):
    index = _sharded(
        tmp_path, {"s1.safetensors": {"a": GOOD["a"]}, "s2.safetensors": {"b": GOOD["b"]}}
    )
    reader = open_sharded(index)
    assert set(reader.infos) == {"a", "b"}
    np.testing.assert_array_equal(reader.read("a"), GOOD["a"])
    np.testing.assert_array_equal(reader.read("b"), GOOD["b"])


def test_a_thousand_shards_open_in_two_seconds_and_keep_no_file_open(tmp_path: Path):
    shards = {f"s{n}.safetensors": {f"t{n}": GOOD["b"]} for n in range(1000)}
    index = _sharded(tmp_path, shards)
    started = time.perf_counter()
    reader = open_sharded(index)
    assert time.perf_counter() - started < 2
    assert len(reader.infos) == 1000
    arrays = [reader.read(name) for name in reader.infos]
    assert sum(float(a.sum()) for a in arrays) == 4000.0


S1, S2 = "s1.safetensors", "s2.safetensors"
BAD_SHARDS = {
    "missing shard": ({S1: {"a": GOOD["a"]}}, {"a": S1, "b": S2}, "s2.safetensors: named by"),
    "tensor not in its shard": ({S1: {"a": GOOD["a"]}}, {"a": S1, "c": S1}, "'c' is not in s1"),
    "tensor not in the index": ({S1: GOOD}, {"a": S1}, "'b' is here, but .* nowhere"),
    "tensor in two shards": ({S1: GOOD, S2: {"b": GOOD["b"]}}, {"a": S1, "b": S2}, "'b' .*s2"),
    "swapped": (
        {S1: {"a": GOOD["a"]}, S2: {"b": GOOD["b"]}}, {"a": S2, "b": S1}, "places it in"
    ),
    "path out of the folder": ({}, {"a": "../x.safetensors"}, "must lie in the index's folder"),
    "absolute path": ({}, {"a": "/etc/x.safetensors"}, "must lie in the index's folder"),
    "NUL in the path": ({}, {"a": "x\0.safetensors"}, "must lie in the index's folder"),
    "shard not text": ({}, {"a": 5}, "file name is needed"),
    "a pickle shard": ({}, {"a": "x.bin"}, "file name is needed"),
    "empty map": ({}, {}, "must be an object"),
    "map a list": ({}, [1], "must be an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_an_index_that_does_not_agree_is_refused(tmp_path: Path, case: str):
    shards, weight_map, message = BAD_SHARDS[case]
    with pytest.raises(ModelFormatError, match=message):
        open_sharded(_sharded(tmp_path, shards, weight_map))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {"a": "x", "a": "y"}}'])
def test_an_index_that_is_no_strict_json_is_refused(tmp_path: Path, text: str):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ModelFormatError, match=r"index\.json"):
        open_sharded(index)


def test_mutated_files_raise_only_our_error(tmp_path: Path):
    good = safetensors_bytes(GOOD)
    draw = random.Random(20240607)
    path = tmp_path / "model.safetensors"
    refused = 0
    for number in range(500):
        path.write_bytes(mutate(good, draw, header=220))
        try:
            reader: SafetensorsReader = open_file(path)
            for name, stored in reader.infos.items():
                assert reader.read(name).shape == stored.shape
        except ModelFormatError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutation {number}: {path.read_bytes()!r}") from error
    assert refused > 300


def _write(folder: Path, data: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    return path
