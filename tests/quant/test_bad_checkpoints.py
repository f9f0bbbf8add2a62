"""Checkpoints whose tensors disagree: a ModelFormatError that names the tensor and what to do."""

import numpy as np
import pytest

from jaxinfer.errors import ModelFormatError
from tests.quant.stored import DTYPES, LAYER, goldens, opened, read

CASES = goldens()
PARTS = [(case, part) for case, (_, parts, _) in CASES.items() for part in parts]


@pytest.mark.parametrize(("case", "part"), PARTS)
def test_a_part_that_is_missing(case: str, part: str):
    config, parts, expected = CASES[case]
    fewer = {name: array for name, array in parts.items() if name != part}
    if part == "g_idx" and not config["desc_act"]:
        got = read(config, fewer).dequantize()
        np.testing.assert_array_equal(got.astype(expected.dtype), expected)
        return
    with pytest.raises(
        ModelFormatError, match=rf"'{LAYER}\.{part}' is missing.*download every file"
    ):
        read(config, fewer)


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize(("case", "part"), PARTS)
def test_a_part_that_is_too_short(case: str, part: str, axis: int):
    config, parts, _ = CASES[case]
    original = read(config, parts).shape
    shorter = np.delete(parts[part], -1, axis)
    try:
        weight = read(config, {**parts, part: shorter})
    except ModelFormatError as error:
        assert LAYER in str(error)
    else:  # a whole smaller matrix: the comparison with the model's shapes finds it
        assert weight.shape != original


@pytest.mark.parametrize(("case", "part"), PARTS)
def test_a_part_of_another_dtype(case: str, part: str):
    config, parts, _ = CASES[case]
    other = np.float32 if parts[part].dtype.kind == "i" else np.int8
    with pytest.raises(
        ModelFormatError, match=rf"'{LAYER}\.(weight' is there in|{part}' has dtype)"
    ):
        read(config, {**parts, part: parts[part].astype(np.float32).astype(other)})


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("case", CASES)
def test_scales_that_are_not_finite_or_overflow(case: str, value: float):
    config, parts, _ = CASES[case]
    part = next(name for name in parts if "scale" in name)
    scales = parts[part].astype(np.float32)
    scales.flat[0] = value
    with np.errstate(over="ignore"):
        bad = scales.astype(parts[part].dtype)
    with pytest.raises(ModelFormatError, match=rf"{LAYER}\.{part}' holds (NaN|scales so large)"):
        read(config, {**parts, part: bad})


@pytest.mark.parametrize("case", [case for case in CASES if "fp8" in case])
def test_fp8_nan(case: str):
    config, parts, _ = CASES[case]
    weight = parts["weight"].copy()
    weight.view(np.uint8)[3, 5] = 0xFF
    with pytest.raises(ModelFormatError, match=rf"{LAYER}\.weight' holds NaN"):
        read(config, {**parts, "weight": weight})


@pytest.mark.parametrize("group", [-1, 2, 2**31 - 1])
def test_groups_that_do_not_exist(group: int):
    config, parts, _ = CASES["gptq-4-act-order"]
    g_idx = parts["g_idx"].copy()
    g_idx[7] = group
    with pytest.raises(ModelFormatError, match=rf"g_idx' names group {group}; .* 0 to 1"):
        read(config, {**parts, "g_idx": g_idx})


@pytest.mark.parametrize("case", ["awq", "gptq-4-act-order", "ct-pack4-group"])
@pytest.mark.parametrize("size", [8, 32, 24])
def test_a_group_size_that_disagrees(case: str, size: int):
    config, parts, _ = CASES[case]
    if "group_size" in config:
        config = {**config, "group_size": size}
    else:
        group = config["config_groups"]["group_0"]
        weights = {**group["weights"], "group_size": size}
        config = {**config, "config_groups": {"group_0": {**group, "weights": weights}}}
    message = "do not divide: group_size" if size == 24 else f"groups? of {size}|group\\(s\\)"
    with pytest.raises(ModelFormatError, match=message):
        read(config, parts)


@pytest.mark.parametrize("case", ["gptq-2", "gptq-3-act-order", "gptq-4-channel", "gptq-8"])
def test_bits_that_disagree(case: str):
    config, parts, _ = CASES[case]
    for bits in {2, 3, 4, 8} - {config["bits"]}:
        with pytest.raises(ModelFormatError, match=LAYER):
            read({**config, "bits": bits}, parts)


def test_weight_shape_that_disagrees():
    config, parts, _ = CASES["ct-pack4-channel-odd"]
    for shape in ([20, 41], [20, 32], [20, 0], [20, -1], [19, 36]):
        bad = {**parts, "weight_shape": np.array(shape)}
        with pytest.raises(ModelFormatError, match=r"weight_packed' .*num_bits of"):
            read(config, bad)


def test_zero_points_out_of_range_or_contradicted():
    config, parts, _ = CASES["ct-pack4-group-zeros"]
    zeros = np.zeros((16, 2), np.int8)
    zeros[3, 1] = 8
    with pytest.raises(ModelFormatError, match=r"weight_zero_point' .*outside -8 to 7"):
        read(config, {**parts, "weight_zero_point": zeros})
    config, parts, _ = CASES["ct-int8-channel"]
    assert read(config, {**parts, "weight_zero_point": np.zeros((16, 1), np.int8)}).zeros is None
    with pytest.raises(ModelFormatError, match=r"weight_zero_point' .*symmetric is true"):
        read(config, {**parts, "weight_zero_point": np.ones((16, 1), np.int8)})


def test_zero_points_beside_fp8_are_zero():
    config, parts, expected = CASES["ct-fp8-channel"]
    for dtype in (np.dtype(np.int8), DTYPES["F8_E4M3"]):
        zeros = np.zeros((16, 1), dtype)
        got = read(config, {**parts, "weight_zero_point": zeros}).dequantize()
        np.testing.assert_array_equal(got.astype(expected.dtype), expected)
        with pytest.raises(ModelFormatError, match=r"weight_zero_point' .*symmetric is true"):
            read(config, {**parts, "weight_zero_point": np.ones((16, 1)).astype(dtype)})


def test_a_layer_stored_twice():
    config, parts, _ = CASES["awq"]
    with pytest.raises(ModelFormatError, match=rf"{LAYER}\.weight' is there in float beside"):
        read(config, {**parts, "weight": np.ones((32, 32), np.float16)})


def test_two_scales():
    config, parts, _ = CASES["fp8-block"]
    with pytest.raises(ModelFormatError, match="which one holds"):
        read(config, {**parts, "weight_scale": parts["weight_scale_inv"]})


def test_nothing_is_packed():
    config, _, _ = CASES["awq"]
    with pytest.raises(
        ModelFormatError, match=r"awq \(gemm\), but no tensor .*remove quantization"
    ):
        opened(config, {"lm_head.weight": np.ones((2, 2), DTYPES["BF16"])})
