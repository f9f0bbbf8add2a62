"""Each format against its own library's de-quantisation, bit for bit (see make_goldens.py)."""

import numpy as np
import pytest

from tests.quant.stored import goldens, read

CASES = goldens()


def test_every_format_has_goldens():
    methods = {config["quant_method"] for config, _, _ in CASES.values()}
    assert methods == {"awq", "gptq", "compressed-tensors", "fp8"}
    assert {config["bits"] for config, _, _ in CASES.values() if "bits" in config} == {2, 3, 4, 8}


@pytest.mark.parametrize("case", CASES)
def test_dequantised_weights_are_the_librarys(case: str):
    config, parts, expected = CASES[case]
    weight = read(config, parts)
    got = weight.dequantize()
    assert got.dtype == np.float32
    # the library multiplies in the dtype of the scales; ours is exact there, or rounded once alike
    assert weight.scale_dtype == expected.dtype.name
    np.testing.assert_array_equal(got.astype(expected.dtype), expected, strict=True)


@pytest.mark.parametrize("case", ["gptq-3-act-order", "gptq-4-act-order", "gptq-v2-4-act-order"])
def test_act_order_matters_in_its_goldens(case: str):
    """A reader that left g_idx out would not pass by chance."""
    config, parts, expected = CASES[case]
    assert read(config, parts).g_idx is not None
    plain = {part: array for part, array in parts.items() if part != "g_idx"}
    wrong = read({**config, "desc_act": False}, plain).dequantize()
    assert not np.array_equal(wrong.astype(expected.dtype), expected)
