"""config.json: what transformers' configurations mean, and an error for every impossible one."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.errors import ConfigError
from jaxinfer.weights import KNOWN_ARCHITECTURES, config_from_hf
from jaxinfer.weights.files import read_json
from tests.weights.builders import HF_CONFIG

NAN = float("nan")


def _without(name: str) -> dict[str, Any]:
    return {k: v for k, v in HF_CONFIG.items() if k != name}


def _arch(name: str, **changes: Any) -> dict[str, Any]:
    return HF_CONFIG | {"architectures": [name]} | changes


def test_llama_fields():
    config = config_from_hf(HF_CONFIG)
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_position=64,
        norm_eps=1e-5,
        activation="silu",
        tie_embeddings=False,
        query_scale=0.5,
        rope=RopeConfig(10000.0),
        windows=(None, None),
        bos_token_id=1,
        eos_token_ids=(2,),
        dtype="float32",
    )


CLASSES = {
    "LlamaForCausalLM": "LlamaConfig", "MistralForCausalLM": "MistralConfig",
    "Qwen2ForCausalLM": "Qwen2Config", "Qwen3ForCausalLM": "Qwen3Config",
    "Gemma2ForCausalLM": "Gemma2Config", "Gemma3ForCausalLM": "Gemma3TextConfig",
    "GPT2LMHeadModel": "GPT2Config",
}  # fmt: skip


@pytest.mark.parametrize("architecture", CLASSES)
def test_defaults_are_those_of_transformers(architecture: str):
    """A config.json that leaves everything optional out equals the class's full one."""
    full = getattr(transformers, CLASSES[architecture])().to_dict()
    full = json.loads(json.dumps(full)) | {"architectures": [architecture]}
    required = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    required |= {"num_attention_heads", "n_embd", "n_layer", "n_head", "architectures"}
    sparse = {name: value for name, value in full.items() if name in required}
    if architecture == "Qwen3ForCausalLM":
        assert full["head_dim"] == 128
    assert config_from_hf(sparse) == config_from_hf(full)


def test_every_known_architecture_is_built():
    for name in KNOWN_ARCHITECTURES:
        gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 4}
        assert config_from_hf(_arch(name, **gpt2)).architecture == name
    assert set(CLASSES) <= set(KNOWN_ARCHITECTURES)


def test_model_type_serves_where_architectures_is_absent():
    assert config_from_hf(_without("architectures")).architecture == "LlamaForCausalLM"
    given = _without("architectures") | {"model_type": "gemma3_text", "head_dim": 4}
    assert config_from_hf(given).architecture == "Gemma3ForCausalLM"


LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
ROPES = {
    "old llama3": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
    ),
    "new llama3": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
    ),
    "old linear, old type": (
        {"rope_scaling": {"type": "linear", "factor": 4}},
        RopeConfig(10000.0, "linear", 4.0),
    ),
    "new default": ({"rope_parameters": {"rope_theta": 7.0}}, RopeConfig(7.0)),
    "null scaling": ({"rope_theta": 1000000, "rope_scaling": None}, RopeConfig(1e6)),
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_in_both_spellings(case: str):
    changes, want = ROPES[case]
    config = config_from_hf(_arch("LlamaForCausalLM", **changes))
    assert config.rope == want and config.rope_local is None


@pytest.mark.parametrize(
    "changes",
    [
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_gemma3_rotates_its_two_kinds_of_layers_apart(changes: dict[str, Any]):
    given = _arch("Gemma3ForCausalLM", num_hidden_layers=12, sliding_window=16, **changes)
    del given["rope_theta" if "rope_parameters" in changes else "model_type"]
    config = config_from_hf(given)
    assert config.rope == RopeConfig(1e6, "linear", 8.0)
    assert config.rope_local == RopeConfig(1e4)
    assert config.windows == ((16,) * 5 + (None,)) * 2
    assert config.embed_scale == 4.0 and config.query_scale == 1 / 16
    assert config.head_dim == 256 and config.activation == "gelu_tanh"


WINDOWS = {
    "mistral": (_arch("MistralForCausalLM", sliding_window=8), (8, 8)),
    "mistral null": (_arch("MistralForCausalLM", sliding_window=None), (None, None)),
    "mistral absent": (_arch("MistralForCausalLM"), (None, None)),
    "mistral absent, long": (
        _arch("MistralForCausalLM", max_position_embeddings=8192), (4096, 4096)
    ),
    "qwen off": (_arch("Qwen2ForCausalLM", sliding_window=8), (None, None)),
    "qwen on": (
        _arch("Qwen2ForCausalLM", sliding_window=8, use_sliding_window=True, max_window_layers=1),
        (None, 8),
    ),
    "qwen layer types": (
        _arch("Qwen3ForCausalLM", sliding_window=8, use_sliding_window=True,
              layer_types=["sliding_attention", "full_attention"]),
        (8, None),
    ),
    "gemma2": (_arch("Gemma2ForCausalLM", sliding_window=8), (8, None)),
    "gemma3 pattern": (
        _arch("Gemma3ForCausalLM", sliding_window=8, sliding_window_pattern=2), (8, None)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case: str):
    given, want = WINDOWS[case]
    assert config_from_hf(given).windows == want


BIASES = {
    "LlamaForCausalLM": ({"attention_bias": True, "mlp_bias": True}, (True, True, True)),
    "Qwen2ForCausalLM": ({"attention_bias": False}, (True, False, False)),
    "Qwen3ForCausalLM": ({"attention_bias": True}, (True, True, False)),
    "MistralForCausalLM": ({}, (False, False, False)),
    "GPT2LMHeadModel": ({"n_embd": 16, "n_layer": 2, "n_head": 4}, (True, True, True)),
}


@pytest.mark.parametrize("architecture", BIASES)
def test_biases(architecture: str):
    changes, want = BIASES[architecture]
    config = config_from_hf(_arch(architecture, **changes))
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == want


def test_soft_caps_null_is_off_and_absent_is_the_default():
    config = config_from_hf(_arch("Gemma2ForCausalLM", attn_logit_softcapping=None))
    assert (config.attn_soft_cap, config.final_soft_cap) == (None, 30.0)
    assert (
        config_from_hf(_arch("LlamaForCausalLM", final_logit_softcapping=1)).final_soft_cap is None
    )


def test_c13_eos_is_the_union_of_both_files_and_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        config = config_from_hf(HF_CONFIG, {"eos_token_id": [2, 5, 7]}, "m/config.json")
    assert config.eos_token_ids == (2, 5, 7)
    assert "generation_config adds end-of-sequence ids [5, 7]" in caplog.text


def test_c16_auto_map_is_ignored_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    given = HF_CONFIG | {"auto_map": {"AutoConfig": "modeling_evil.Config"}}
    assert config_from_hf(given, path=tmp_path / "config.json").num_layers == 2
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "auto_map is ignored" in caplog.text and not canary.exists()


def test_c7_eps_zero_warns_and_an_integer_is_taken(caplog: pytest.LogCaptureFixture):
    assert config_from_hf(HF_CONFIG | {"rms_norm_eps": 1}).norm_eps == 1.0
    assert not caplog.records
    assert config_from_hf(HF_CONFIG | {"rms_norm_eps": 0}).norm_eps == 0.0
    assert "rms_norm_eps is 0" in caplog.text


def test_c11_a_huge_context_is_left_to_the_memory_plan():
    assert config_from_hf(HF_CONFIG | {"max_position_embeddings": 10**12}).max_position == 10**12


def test_c4_layers_are_compared_with_the_files_before_anything_is_expanded():
    with pytest.raises(ConfigError, match="num_hidden_layers must be 2, the number of layers"):
        config_from_hf(HF_CONFIG | {"num_hidden_layers": 10**9}, layers_in_files=2)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "C2 heads 0": ({"num_attention_heads": 0}, "num_attention_heads must be an integer >= 1"),
    "C2 heads true": ({"num_attention_heads": True}, r"got True \(bool\)"),
    "C2 kv heads 3": ({"num_key_value_heads": 3}, "a divisor of num_attention_heads"),
    "C2 kv heads 0": ({"num_key_value_heads": 0}, "num_key_value_heads must be an integer >= 1"),
    "C4 layers -1": ({"num_hidden_layers": -1}, r"integer >= 1; got -1 \(int\)"),
    "C4 layers 0": ({"num_hidden_layers": 0}, r"got 0 \(int\)"),
    "C4 layers 2.5": ({"num_hidden_layers": 2.5}, r"got 2.5 \(float\)"),
    "C4 layers text": ({"num_hidden_layers": "32"}, r"got '32' \(str\)"),
    "C4 layers 10^9": ({"num_hidden_layers": 10**9}, "at most 10000"),
    "C4 layers 10^99": ({"num_hidden_layers": 10**99}, "an integer of 329 bits"),
    "C5 hidden 0": ({"hidden_size": 0}, "hidden_size must be an integer >= 1"),
    "C5 hidden odd": ({"hidden_size": 17}, "a multiple of num_attention_heads"),
    "C5 hidden text": ({"hidden_size": "64"}, r"hidden_size .* got '64' \(str\)"),
    "C5 heads odd": ({"hidden_size": 12}, "the size of a head is even, not 3"),
    "C5 head_dim 0": ({"head_dim": 0}, "head_dim must be an integer >= 1"),
    "C5 head_dim odd": ({"head_dim": 5}, "head_dim must be such that"),
    "C5 mlp 0": ({"intermediate_size": 0}, "intermediate_size must be an integer >= 1"),
    "C7 eps -1": ({"rms_norm_eps": -1}, "rms_norm_eps must be a finite number >= 0"),
    "C7 eps NaN": ({"rms_norm_eps": NAN}, "rms_norm_eps must be a finite number >= 0; got nan"),
    "C7 eps text": ({"rms_norm_eps": "1e-5"}, r"got '1e-5' \(str\)"),
    "C8 theta 0": ({"rope_theta": 0}, "rope_theta must be a finite number > 0"),
    "C8 theta -1": ({"rope_theta": -1.0}, "rope_theta must be a finite number > 0"),
    "C8 theta NaN": ({"rope_theta": NAN}, "rope_theta must be a finite number > 0"),
    "C8 theta text": ({"rope_theta": "1e6"}, r"got '1e6' \(str\)"),
    "C8 theta huge": ({"rope_theta": 10**400}, "rope_theta must be a finite"),
    "C8 rope type": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rope_scaling.rope_type must be one of default, linear, llama3; got 'yarn'",
    ),
    "C8 rope list": ({"rope_scaling": [1]}, "rope_scaling must be an object"),
    "C8 no factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor .* it is missing"),
    "C8 factor 0.5": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1"),
    "C8 bands": (
        {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
        "high_freq_factor must be greater than low_freq_factor",
    ),
    "C8 per kind": (
        {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 5.0}}},
        "the same for all kinds of layers",
    ),
    "C8 unknown kind": (
        {"rope_parameters": {"full_attention": {}, "other": {}}},
        "keyed by full_attention",
    ),
    "C8 part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    "C10 vocab 0": ({"vocab_size": 0}, "vocab_size must be an integer >= 1"),
    "C11 context 0": ({"max_position_embeddings": 0}, "max_position_embeddings must be"),
    "C11 context -1": ({"max_position_embeddings": -1}, "max_position_embeddings must be"),
    "C14 activation": ({"hidden_act": "relu6"}, "hidden_act must be one of silu, swish, gelu"),
    "C14 activation list": ({"hidden_act": ["silu"]}, "hidden_act must be a string"),
    "C17 float64": ({"torch_dtype": "float64"}, "torch_dtype must be float32, bfloat16 or float16"),
    "C17 int8": ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16; got 'int8'"),
    "C17 zz": ({"dtype": "zz"}, "got 'zz'"),
    "C19 tied text": ({"tie_word_embeddings": "false"}, r"true or false; got 'false' \(str\)"),
    "C19 tied 1": ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    "no architectures": ({"architectures": ["MambaForCausalLM"]}, "one of LlamaForCausalLM, Mis"),
    "architectures text": ({"architectures": "LlamaForCausalLM"}, "a list of strings"),
    "empty architectures": ({"architectures": [], "model_type": "x"}, "model_type must be one of"),
    "image Gemma": ({"architectures": ["Gemma3ForConditionalGeneration"]}, "a text model"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quant_method must be a string"),
    "quantised so": (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        "one of these: awq .*got 'bits",
    ),
    "eos out of range": ({"eos_token_id": 32}, r"integers in 0..31; got 32"),
    "eos -1": ({"eos_token_id": [2, -1]}, "eos_token_id must be"),
    "eos true": ({"eos_token_id": True}, "eos_token_id must be"),
    "bos out of range": ({"bos_token_id": 99}, "bos_token_id must be less than vocab_size"),
    "missing": ({"hidden_size": None}, "hidden_size must be"),
}
BAD_WINDOWS: dict[str, tuple[dict[str, Any], str]] = {
    "C20 0": ({"sliding_window": 0}, "sliding_window must be an integer >= 1"),
    "C20 -1": ({"sliding_window": -1}, "sliding_window must be an integer >= 1"),
    "C20 > context": ({"sliding_window": 65}, r"at most the context.*\(64\); got 65"),
    "C20 too few types": ({"layer_types": ["full_attention"]}, "a list of 2 .*, not 1"),
    "C20 unknown type": (
        {"layer_types": ["full_attention", "linear_attention"]}, "not 'linear_attention'"
    ),
    "C20 types of numbers": ({"layer_types": [1, 2]}, "layer_types must be a list of strings"),
    "soft cap 0": ({"attn_logit_softcapping": 0}, "attn_logit_softcapping must be a finite"),
    "query scalar -1": ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar must be a finite"),
    "bidirectional": ({"use_bidirectional_attention": True}, "causal decoder"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BAD, *BAD_WINDOWS])
def test_impossible_values_are_refused_with_file_field_value_and_rule(case: str):
    base = HF_CONFIG if case in BAD else _arch("Gemma2ForCausalLM", sliding_window=8)
    changes, message = BAD[case] if case in BAD else BAD_WINDOWS[case]
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_hf(base | changes, path="some/config.json")
    assert caught.value.path == "some/config.json" and caught.value.field
    assert str(caught.value).startswith("some/config.json: ")


@pytest.mark.parametrize("eos", [99, "2", -1, [1.5]])
def test_generation_config_is_checked_too(eos: Any):
    with pytest.raises(ConfigError, match=r"generation_config.eos_token_id must be"):
        config_from_hf(HF_CONFIG, {"eos_token_id": eos}, "some/config.json")


ODD = (
    None, True, False, 0, -1, 1, 3, 10**9, 10**30, 0.5, -0.0, NAN, float("inf"), "", "64", "llama3",
    [], [0], ["full_attention"] * 2, {}, {"factor": 2}, {"full_attention": {"rope_theta": 1e6}},
)  # fmt: skip


def test_random_odd_values_raise_only_our_error():
    names = [*HF_CONFIG, "head_dim", "sliding_window", "use_sliding_window", "layer_types", "dtype"]
    names += [
        "rope_scaling",
        "rope_parameters",
        "query_pre_attn_scalar",
        "attention_bias",
        "n_head",
    ]
    names += ["attn_logit_softcapping", "quantization_config", "max_window_layers", "n_embd"]
    draw = random.Random(20240609)
    refused = 0
    for _ in range(500):
        given = _arch(draw.choice(KNOWN_ARCHITECTURES), n_embd=16, n_layer=2, n_head=4, head_dim=4)
        given |= {draw.choice(names): draw.choice(ODD) for _ in range(draw.randint(1, 3))}
        try:
            assert config_from_hf(given).num_layers in (1, 2, 3)
        except ConfigError:
            refused += 1
        except Exception as error:
            raise AssertionError(given) from error
    assert 200 < refused < 500


BAD_JSON = {
    "empty": (b"", "the file is empty"),
    "blank": (b" \n", "the file is empty"),
    "not JSON": (b"{'a': 1}", "not valid JSON"),
    "list": (b"[1]", "holds a JSON list; an object"),
    "number": (b"3", "holds a JSON int"),
    "BOM": (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "NaN": (b'{"a": NaN}', "holds NaN"),
    "Infinity": (b'{"a": -Infinity}', "holds -Infinity"),
    "twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the name 'c' twice"),
    "deep": (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "HTML": (b"<!DOCTYPE html><html>", "HTML page"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_c1_json_is_read_strictly(tmp_path: Path, case: str):
    data, message = BAD_JSON[case]
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        read_json(path)
    assert caught.value.path == path and "config.json" in str(caught.value)


def test_c1_files_too_large_or_absent(tmp_path: Path):
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="No such file"):
        read_json(path)
    with path.open("wb") as file:
        file.truncate(50_000_000)
    with pytest.raises(ConfigError, match="50000000 bytes"):
        read_json(path)
