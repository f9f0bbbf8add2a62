"""Unpacking streams of bits, and what a PackedWeight stands for."""

import numpy as np
import pytest

from jaxinfer.quant.packed import FP8, PackedWeight, signed, unpack_rows


def words_of(column: list[int], bits: int) -> list[int]:
    """A column of integers as the words of one long number, lowest first."""
    number = sum(value << (i * bits) for i, value in enumerate(column))
    return [number >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(column) * bits // 32))]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 64, 75])
def test_unpack_rows_is_one_long_number(bits: int, count: int):
    draw = np.random.default_rng(count)
    values = draw.integers(0, 2**bits, (count, 3), dtype=np.uint8)
    words = np.array([words_of(column, bits) for column in values.T.tolist()], np.uint32).T
    got = unpack_rows(words.view(np.int32), bits, count)
    np.testing.assert_array_equal(got, values, strict=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_signed_moves_the_middle_to_zero(bits: int):
    every = np.arange(2**bits).astype(np.uint8)
    got = signed(every, bits)
    assert got.dtype == np.int8
    assert got.tolist() == [value - 2 ** (bits - 1) for value in range(2**bits)]


def defined(weight: PackedWeight) -> np.ndarray:
    """The definition, one element at a time, in float64 and rounded where the docstring says."""
    out = np.empty(weight.shape, np.float32)
    for k, n in np.ndindex(weight.shape):
        g = weight.g_idx[k] if weight.g_idx is not None else k // weight.group_size
        value = float(weight.values[k, n])
        if weight.zeros is not None:
            value -= float(weight.zeros[g, n])
        product = np.float32(value * float(weight.scales[g, n // weight.columns]))
        if weight.offsets is not None:
            product = np.float32(float(product) + float(weight.offsets[g, n]))
        out[k, n] = product
    return out


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("extra", ["none", "zeros", "offsets"])
def test_dequantize_is_the_definition(act_order: bool, extra: str):
    draw = np.random.default_rng(1)
    rows, columns, groups = 600, 5, 6  # more rows than are de-quantised at once
    weight = PackedWeight(
        name="w",
        values=draw.integers(-8, 8, (rows, columns), dtype=np.int8),
        scales=draw.standard_normal((groups, columns), np.float32),
        bits=4,
        group_size=100,
        zeros=draw.integers(-8, 8, (groups, columns), dtype=np.int8) if extra == "zeros" else None,
        offsets=draw.standard_normal((groups, columns), np.float32) if extra == "offsets" else None,
        g_idx=draw.permutation(rows).astype(np.int32) // np.int32(100) if act_order else None,
    )
    weight.check_invariants()
    np.testing.assert_array_equal(weight.dequantize(), defined(weight), strict=True)


def test_dequantize_blocks_at_the_ragged_edge():
    draw = np.random.default_rng(2)
    weight = PackedWeight(
        name="w",
        values=draw.standard_normal((10, 7)).astype(FP8),
        scales=draw.standard_normal((3, 2), np.float32),
        bits=8,
        group_size=4,
        columns=4,
    )
    weight.check_invariants()
    np.testing.assert_array_equal(weight.dequantize(), defined(weight), strict=True)


def test_a_record_that_contradicts_itself_is_found():
    values = np.full((4, 2), 9, np.int8)
    bad = PackedWeight("w", values, np.ones((1, 2), np.float32), bits=4, group_size=4)
    with pytest.raises(AssertionError):
        bad.check_invariants()
