"""`quantization_config` as published, and what of it is refused."""

import copy
import random
from typing import Any

import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.quant.config import METHODS, Activations, CheckpointFormat, checkpoint_format
from jaxinfer.weights.fields import Fields
from tests.quant.stored import format_of

AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None, "backend": "autoawq", "do_fuse": False, "exllama_config": None,
}  # fmt: skip
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": True,
    "sym": True, "true_sequential": True, "model_name_or_path": None, "static_groups": False,
}  # fmt: skip
FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}  # fmt: skip
INT8_TOKENS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}


def compressed(layout: str = "int-quantized", **weights: Any) -> dict[str, Any]:
    """A compressed-tensors configuration, int8 per channel where `weights` does not say more."""
    arguments = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"} | weights
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": INT8_TOKENS}
    return {
        "quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }  # fmt: skip


def test_no_quantization_config_is_no_format():
    assert checkpoint_format(Fields({"model_type": "llama"}, "config.json")) is None
    assert checkpoint_format(Fields({"quantization_config": None}, "config.json")) is None


def test_awq():
    want = CheckpointFormat("awq", "gemm", 4, 128)
    assert format_of(AWQ) == want
    assert format_of({"quant_method": "awq", "w_bit": 4, "q_group_size": 128}) == want
    left = format_of({**AWQ, "version": "GEMM", "modules_to_not_convert": ["visual"]})
    assert left.ignored == ("visual",)


def test_gptq():
    assert format_of(GPTQ) == CheckpointFormat(
        "gptq", "gptq", 4, 128, symmetric=True, act_order=True
    )
    one_scale = format_of({**GPTQ, "group_size": -1, "desc_act": False, "sym": False})
    assert one_scale == CheckpointFormat("gptq", "gptq", 4, None)
    assert format_of({**GPTQ, "checkpoint_format": "gptq_v2"}).layout == "gptq_v2"
    assert format_of({**GPTQ, "format": "gptq_v2"}).layout == "gptq_v2"
    assert format_of({**GPTQ, "checkpoint_format": "gptq", "format": "x"}).layout == "gptq"
    dynamic = {r"-:.*\.gate": {}, r"+:.*\.up": {}}
    assert format_of({**GPTQ, "dynamic": dynamic}).ignored == (r".*\.gate",)


def test_fp8():
    fmt = format_of(FP8 | {"modules_to_not_convert": ["lm_head"], "scale_fmt": "ue8m0"})
    assert fmt == CheckpointFormat(
        "fp8", "fp8", 8, block=(128, 128), symmetric=True,
        activations=Activations("float", 8, True), ignored=("lm_head",),
    )  # fmt: skip
    static = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    assert format_of(static) == CheckpointFormat(
        "fp8", "fp8", 8, tensor=True, symmetric=True, activations=Activations("float", 8, False),
        ignored=("lm_head",),
    )  # fmt: skip


def test_compressed_tensors():
    int8 = Activations("int", 8, True)
    base = CheckpointFormat(
        "compressed-tensors",
        "int-quantized",
        8,
        symmetric=True,
        activations=int8,
        ignored=("lm_head",),
    )
    assert format_of(compressed()) == base
    assert format_of(compressed("naive-quantized")) == base
    assert format_of({**compressed(), "sparsity_config": {"format": "dense"}}) == base
    grouped = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    got = format_of(compressed("pack-quantized", **grouped))
    assert (got.layout, got.bits, got.group_size, got.symmetric) == ("pack-quantized", 4, 32, False)
    assert format_of(compressed("pack-quantized", **grouped, actorder="group")).act_order
    assert not format_of(compressed("pack-quantized", **grouped, actorder="weight")).act_order
    blocks = {"type": "float", "strategy": "block", "block_structure": [128, 64]}
    assert format_of(compressed("float-quantized", **blocks)).block == (128, 64)
    assert format_of(compressed("naive-quantized", **blocks)).layout == "float-quantized"
    assert format_of(compressed(strategy="tensor")).tensor


@pytest.mark.parametrize(
    ("group_size", "want"), [(None, (True, None)), (-1, (False, None)), (64, (False, 64))]
)
def test_a_strategy_that_is_not_written_follows_from_group_size(group_size, want):
    fmt = format_of(compressed(strategy=None, group_size=group_size))
    assert (fmt.tensor, fmt.group_size) == want


def test_the_older_name_of_the_table():
    fields = Fields({"compression_config": compressed()}, "config.json")
    assert checkpoint_format(fields) == format_of(compressed())


def test_equal_groups_are_one_and_a_group_may_have_its_own_format():
    config = compressed()
    config["config_groups"]["group_1"] = copy.deepcopy(config["config_groups"]["group_0"])
    config["config_groups"]["group_1"]["targets"] = ["re:.*down_proj"]
    assert format_of(config) == format_of(compressed())
    config = compressed("mixed-precision")
    config["config_groups"]["group_0"]["format"] = "int-quantized"
    assert format_of(config) == format_of(compressed())


def _groups(**change: Any) -> dict[str, Any]:
    """Two config groups, of which the second's weights differ by `change`."""
    config = compressed()
    second = copy.deepcopy(config["config_groups"]["group_0"])
    second["weights"] |= change
    config["config_groups"]["group_1"] = second
    return config


def _group(**change: Any) -> dict[str, Any]:
    config = compressed()
    config["config_groups"]["group_0"] |= change
    return config


REFUSED = {
    "method": ({"quant_method": "bitsandbytes"}, r"quant_method .*awq .*gptq .*compressed.*fp8"),
    "no method": ({"bits": 4}, r"quant_method .*missing"),
    "awq bits": ({**AWQ, "bits": 8}, r"quantization_config\.bits must be 4"),
    "awq gemv": ({**AWQ, "version": "gemv"}, r"version must be gemm.*convert"),
    "awq group": ({**AWQ, "group_size": 0}, r"group_size must be an integer >= 1, or -1"),
    "awq no group": ({"quant_method": "awq", "bits": 4}, r"group_size .*missing"),
    "gptq bits": ({**GPTQ, "bits": 5}, r"bits must be 2, 3, 4 or 8.*got 5"),
    "gptq text": ({**GPTQ, "bits": "4"}, r"bits must be an integer"),
    "gptq planes": ({**GPTQ, "checkpoint_format": "gptq_p"}, r"checkpoint_format must be gptq or"),
    "gptq marlin": ({**GPTQ, "is_marlin_format": True}, r"is_marlin_format must be false"),
    "gptq int16": ({**GPTQ, "pack_dtype": "int16"}, r"pack_dtype must be int32"),
    "gptq rotated": ({**GPTQ, "rotation": "hadamard"}, r"rotation must be absent"),
    "gptq mixed": ({**GPTQ, "dynamic": {r".*down": {"bits": 8}}}, r"dynamic .*mixed precision"),
    "gptq more": ({**GPTQ, "dynamic": {r"+:.*down": {"group_size": 64}}}, r"dynamic .*mixed prec"),
    "fp8 e5m2": ({**FP8, "fmt": "e5m2"}, r"fmt must be e4m3"),
    "fp8 fp4": ({**FP8, "expert_dtype": "fp4"}, r"expert_dtype must be e4m3"),
    "fp8 block": ({**FP8, "weight_block_size": [128]}, r"weight_block_size must be two integers"),
    "fp8 zero": ({**FP8, "weight_block_size": [128, 0]}, r"weight_block_size must be two integers"),
    "ct format": (compressed("nvfp4-pack-quantized"), r"format must be one of pack-quantized"),
    "ct mixed": (compressed("mixed-precision"), r"format must be one of .*mixed"),
    "ct sparse": ({**compressed(), "sparsity_config": {"format": "sparse-bitmask"}}, r"sparse"),
    "ct rotated": ({**compressed(), "transform_config": {"a": 1}}, r"transform_config .*rotated"),
    "ct no groups": ({**compressed(), "config_groups": {}}, r"config_groups must be an object"),
    "ct preset": ({**compressed(), "config_groups": {"W8A8": ["Linear"]}}, r"W8A8 must be an obj"),
    "ct two bits": (_groups(symmetric=False), r"config_groups .*mixed precision"),
    "ct outputs": (_group(output_activations={"num_bits": 8}), r"output_activations .*absent"),
    "ct no weights": (_group(weights=None), r"group_0 must be an object with weights"),
    "ct bits": (compressed("pack-quantized", num_bits=3), r"num_bits must be 4 or 8"),
    "ct int4 plain": (compressed(num_bits=4), r"num_bits must be 8 in int-quantized"),
    "ct type": (compressed("float-quantized"), r"type must be float in float-quantized"),
    "ct fp8 zeros": (
        compressed("float-quantized", type="float", symmetric=False), r"symmetric must be true",
    ),
    "ct strategy": (compressed(strategy="tensor_group"), r"strategy must be group, channel"),
    "ct block": (compressed(strategy="block", block_structure=[8, 8]), r"strategy must be group"),
    "ct group": (compressed(strategy="group"), r"group_size must be an integer >= 1"),
    "ct channel": (compressed(group_size=32), r"group_size must be absent"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    config, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as error:
        format_of(config)
    assert "config.json" in str(error.value)
    assert error.value.field is not None


ODD = (None, True, False, 0, -1, 3, 4, 10**30, 0.5, "", "int", "4", [], [1], {}, {"a": None}, [[]])


def _replace_somewhere(table: dict[str, Any], draw: random.Random) -> None:
    """Put an odd value in place of one that is somewhere in `table`."""
    name = draw.choice(list(table))
    if isinstance(table[name], dict) and table[name] and draw.random() < 0.8:
        _replace_somewhere(table[name], draw)
    else:
        table[name] = draw.choice(ODD)


@pytest.mark.parametrize("seed", range(4))
def test_odd_values_are_read_or_refused(seed: int):
    draw = random.Random(seed)
    whole = [AWQ, GPTQ | {"dynamic": {"-:x": {}}}, FP8, compressed(), _groups()]
    whole.append(compressed("pack-quantized", num_bits=4, strategy="group", group_size=32))
    refused = 0
    for _ in range(1000):
        config = copy.deepcopy(draw.choice(whole))
        for _ in range(draw.randint(1, 2)):
            _replace_somewhere(config, draw)
        try:
            fmt = format_of(config)
        except ConfigError:
            refused += 1
        else:
            assert fmt.method in METHODS and hash(fmt)
            assert fmt.group_size is None or fmt.group_size >= 1
    assert 200 < refused < 1000


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (AWQ, "AWQ 4 bit, group 128"),
        (GPTQ, "GPTQ 4 bit, group 128, act-order"),
        ({**GPTQ, "group_size": -1, "desc_act": False}, "GPTQ 4 bit, one scale per output"),
        (FP8, "fp8, blocks 128x128"),
        ({"quant_method": "fp8"}, "fp8, one scale per tensor"),
        (
            compressed(strategy="tensor"),
            "compressed-tensors int8 (int-quantized), one scale per tensor",
        ),
    ],
)
def test_described_in_a_few_words(config: dict[str, Any], text: str):
    assert format_of(config).describe() == text
