"""What is stored, against what the formats' own libraries packed, and back through the readers."""

import numpy as np
import pytest

from jaxinfer.quant.packed import PackedWeight
from jaxinfer.quantize.formats import store
from tests.quant.stored import goldens, read

GOLDENS = goldens()
LAYOUTS = {
    "awq": "gemm",
    "gptq-4-act-order": "gptq",
    "gptq-4-channel": "gptq",
    "gptq-8": "gptq",
    "ct-pack4-group": "pack-quantized",
    "ct-pack4-group-zeros": "pack-quantized",
    "ct-pack4-channel-odd": "pack-quantized",
    "ct-pack8-group": "pack-quantized",
    "ct-int8-channel": "int-quantized",
    "ct-int8-channel-zeros": "int-quantized",
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_librarys_own_tensors_come_out(case: str):
    config, parts, _ = GOLDENS[case]
    stored = store(read(config, parts), LAYOUTS[case])
    # a library may keep zero points that are all none, and order of groups that is the plain one
    assert parts.keys() - stored.keys() <= {"weight_zero_point", "weight_g_idx"}
    for part, array in stored.items():
        np.testing.assert_array_equal(array, parts[part].reshape(array.shape), err_msg=part)
        assert array.dtype == parts[part].dtype, part


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("layout", "bits"),
    [
        ("gemm", 4),
        ("gptq", 4),
        ("gptq", 8),
        ("pack-quantized", 4),
        ("pack-quantized", 8),
        ("int-quantized", 8),
    ],
)
def test_random_weights_come_back(layout: str, zeros: bool, bits: int):
    rng = np.random.default_rng(bits)
    size = 48 if layout == "int-quantized" else 16
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    weight = PackedWeight(
        name="layer",
        values=rng.integers(low, high, (48, 32), np.int8, endpoint=True),
        scales=rng.uniform(0.01, 1, (48 // size, 32)).astype(np.float16).astype(np.float32),
        bits=bits,
        group_size=size,
        # AutoGPTQ's layout cannot hold the lowest
        zeros=rng.integers(low + 1, high, (48 // size, 32), np.int8, endpoint=True)
        if zeros
        else None,
        g_idx=rng.permutation(np.arange(48, dtype=np.int32) // 16) if layout == "gptq" else None,
        scale_dtype="float16",
    )
    group = {"weights": {"num_bits": bits, "symmetric": not zeros, "group_size": size}}
    if layout == "int-quantized":
        group["weights"] |= {"strategy": "channel", "group_size": None}
    config = {
        "gemm": {"quant_method": "awq", "bits": bits, "group_size": size},
        "gptq": {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": True},
    }.get(
        layout,
        {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"0": group}},
    )
    same(read(config, store(weight, layout)), weight)


def same(got: PackedWeight, want: PackedWeight) -> None:
    """The records mean the same, bit for bit."""
    np.testing.assert_array_equal(got.values, want.values)
    np.testing.assert_array_equal(got.scales, want.scales)
    for name in ("zeros", "g_idx"):
        mine, other = getattr(got, name), getattr(want, name)
        if other is None or not other.any():
            assert mine is None, name
        else:
            np.testing.assert_array_equal(mine, other)
    assert (got.bits, got.group_size, got.scale_dtype) == (
        want.bits,
        want.group_size,
        want.scale_dtype,
    )
