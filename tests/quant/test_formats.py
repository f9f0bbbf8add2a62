"""What the goldens do not reach: conventions by hand, older files, layers left in float."""

import numpy as np
import pytest

from jaxinfer.errors import ModelFormatError
from tests.quant.stored import DTYPES, LAYER, goldens, opened, read

BF16, FP8 = DTYPES["BF16"], DTYPES["F8_E4M3"]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False}
CASES = goldens()


def gptq_parts(word: int, zero_word: int) -> dict[str, np.ndarray]:
    """A layer [8, 8] whose words are all `word`, with scale 1."""
    return {
        "qweight": np.full((1, 8), word, np.uint32).view(np.int32),
        "qzeros": np.full((1, 1), zero_word, np.uint32).view(np.int32),
        "scales": np.ones((1, 8), np.float16),
    }


def test_gptq_counts_from_the_lowest_bits_and_adds_one_to_zero_points():
    parts = gptq_parts(0x76543210, 0x76543210)
    rows = np.arange(8.0)[:, None]
    expected = rows - (np.arange(8) + 1)
    np.testing.assert_array_equal(read(GPTQ, parts).dequantize(), expected)
    second = {**GPTQ, "checkpoint_format": "gptq_v2"}
    np.testing.assert_array_equal(read(second, parts).dequantize(), rows - np.arange(8))


def test_gptq_zero_points_of_zero_borrow():
    """Layout 1 of eight zeros in a word: 0 - 0x11111111."""
    got = read(GPTQ, gptq_parts(0, 0xEEEEEEEF)).dequantize()
    np.testing.assert_array_equal(got, np.zeros((8, 8)))


@pytest.mark.parametrize(("layout", "zero"), [("gptq", 0x88888888), ("gptq_v2", 0x77777777)])
def test_gptq_of_the_other_layout_is_found_by_its_symmetric_zero_points(layout: str, zero: int):
    config = {**GPTQ, "sym": True, "checkpoint_format": layout}
    right = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[layout]
    with pytest.raises(ModelFormatError, match=rf"qzeros' .*stored as '{right}'; correct checkp"):
        read(config, gptq_parts(0, zero))
    weight = read({**config, "checkpoint_format": right}, gptq_parts(0, zero))
    assert weight.zeros is None  # symmetric: the middle is the signed integers' own zero
    assert weight.values.min() == -8


def test_gptq_that_calls_itself_symmetric_and_is_not():
    with pytest.raises(ModelFormatError, match=r"zero points 1 to 8, .*set sym to false"):
        read({**GPTQ, "sym": True}, gptq_parts(0, 0x76543210))


def test_gptq_groups_in_order_need_no_g_idx():
    config, parts, _ = CASES["gptq-8"]
    assert read(config, parts).g_idx is None
    without = {part: array for part, array in parts.items() if part != "g_idx"}
    np.testing.assert_array_equal(
        read(config, without).dequantize(), read(config, parts).dequantize()
    )


def test_awq_interleaves_the_outputs_of_a_word():
    parts = {
        "qweight": np.full((2, 1), 0x76543210, np.int32),
        "qzeros": np.zeros((1, 1), np.int32),
        "scales": np.ones((1, 8), np.float16),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 2}
    got = read(config, parts).dequantize()
    # output 0 is nibble 0, output 1 nibble 4, output 2 nibble 1, ...
    np.testing.assert_array_equal(got, [[0, 4, 1, 5, 2, 6, 3, 7]] * 2)


def test_compressed_tensors_zero_points_that_are_not_packed():
    """Files of before version 0.10 keep one int8 for each group."""
    config, parts, expected = CASES["ct-pack4-group-zeros"]
    weight = read(config, parts)
    assert weight.zeros is not None
    plain = np.ascontiguousarray(weight.zeros.T)
    got = read(config, {**parts, "weight_zero_point": plain})
    np.testing.assert_array_equal(got.dequantize().astype(expected.dtype), expected)


def test_compressed_tensors_scales_of_one_axis():
    config, parts, expected = CASES["ct-int8-channel"]
    got = read(config, {**parts, "weight_scale": parts["weight_scale"][:, 0]})
    np.testing.assert_array_equal(got.dequantize().astype(expected.dtype), expected)


def test_compressed_tensors_act_order():
    config, parts, _ = CASES["ct-pack4-group"]
    in_order = read(config, parts)
    groups = np.random.default_rng(0).permutation(32).astype(np.int32) // np.int32(16)
    weight = read(config, {**parts, "weight_g_idx": groups})
    by_hand = in_order.values.astype(np.float32) * in_order.scales[groups]
    np.testing.assert_array_equal(weight.dequantize(), by_hand)
    half_set = np.where(np.arange(32) < 16, groups, np.int32(-1))
    with pytest.raises(ModelFormatError, match=r"weight_g_idx' names group -1"):
        read(config, {**parts, "weight_g_idx": half_set})
    unset = read(config, {**parts, "weight_g_idx": np.full(32, -1, np.int32)})
    np.testing.assert_array_equal(unset.dequantize(), in_order.dequantize())


def test_fp8_with_one_scale_every_bit_pattern():
    every = np.arange(256, dtype=np.uint8)
    finite = every[(every & 0x7F) != 0x7F].view(FP8).reshape(2, 127)
    for scale in (np.float32(0.5).reshape(()), np.full(1, 0.5, BF16)):
        parts = {"weight": finite, "weight_scale": scale}
        got = read({"quant_method": "fp8"}, parts).dequantize()
        np.testing.assert_array_equal(got, finite.T.astype(np.float32) / 2)


def test_layers_in_float_norms_and_static_scales_are_left_alone():
    config, parts, _ = CASES["gptq-8"]
    tensors = {f"{LAYER}.{part}": array for part, array in parts.items()}
    others = {
        "lm_head.weight": np.ones((4, 4), BF16),
        "model.norm.weight": np.ones(4, np.float32),
        f"{LAYER}.bias": np.ones(32, np.float16),
    }
    scale = {"model.layers.0.self_attn.k_scale": np.ones(1, np.float32)}
    checkpoint = opened(config, tensors | others | scale)
    assert set(checkpoint.packed) == {f"{LAYER}.weight"}
    assert set(checkpoint.infos) == {*others, f"{LAYER}.weight"}
    assert checkpoint.left_out == tuple(scale)
    assert checkpoint.infos[f"{LAYER}.weight"].dtype == "gptq"
