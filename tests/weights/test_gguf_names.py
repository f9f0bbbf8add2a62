"""GGUF names, layouts and metadata against transformers' models and gguf's own name map."""

import struct
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import transformers
from transformers import modeling_rope_utils

from jaxinfer.config import RopeConfig
from jaxinfer.errors import ConfigError, JaxInferError, ModelFormatError
from jaxinfer.weights import config_from_hf, gguf_config, open_model
from jaxinfer.weights.gguf_names import unpermute_rows
from tests.weights.builders import array, f32, gguf_bytes, info, llama_gguf, string, strings, u32

SMALL = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 48, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = SMALL | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
CASES = {
    "llama": ("LlamaConfig", SMALL | {"tie_word_embeddings": False}),
    "llama with biases": ("LlamaConfig", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("LlamaConfig", SMALL | {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "gpt2": ("GPT2Config", GPT2),
}  # fmt: skip


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Llama's q and k: row i of a half becomes row 2i."""
    out = np.empty_like(array)
    size = array.shape[0] // heads
    for head in range(heads):
        for row in range(size):
            half, index = divmod(row, size // 2)
            out[head * size + 2 * index + half] = array[head * size + row]
    return out


@pytest.mark.parametrize("shape", [(12,), (24, 5)])
def test_unpermute_restores_the_rows(shape: tuple[int, ...]):
    rows = np.random.default_rng(0).standard_normal(shape)
    np.testing.assert_array_equal(unpermute_rows(permute(rows, 3), 3), rows)


def _as_gguf(name: str, values: np.ndarray, key: str, heads: int, kv_heads: int) -> np.ndarray:
    if key == "llama" and ".q_proj." in name:
        return permute(values, heads)
    if key == "llama" and ".k_proj." in name:
        return permute(values, kv_heads)
    if key.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    if key == "gpt2" and ".c_" in name and name.endswith(".weight"):
        return np.ascontiguousarray(values.T)
    return values


def _metadata(writer: gguf_package.GGUFWriter, key: str, hf: Any) -> None:
    writer.add_block_count(hf.num_hidden_layers)
    writer.add_context_length(hf.max_position_embeddings)
    writer.add_embedding_length(hf.hidden_size)
    writer.add_head_count(hf.num_attention_heads)
    writer.add_bos_token_id(hf.bos_token_id)
    writer.add_eos_token_id(hf.eos_token_id)
    if key == "gpt2":
        writer.add_feed_forward_length(4 * hf.hidden_size)
        writer.add_layer_norm_eps(hf.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(hf.intermediate_size)
    writer.add_head_count_kv(hf.num_key_value_heads)
    writer.add_layer_norm_rms_eps(hf.rms_norm_eps)
    writer.add_key_length(getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    if key.startswith("gemma"):
        writer.add_sliding_window(hf.sliding_window)
    if key == "gemma2":
        writer.add_attn_logit_softcapping(hf.attn_logit_softcapping)
        writer.add_final_logit_softcapping(hf.final_logit_softcapping)


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_reads_back_as_transformers_has_it(tmp_path: Path, case: str):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    class_name, settings = CASES[case]
    key = case.split()[0]
    hf = getattr(transformers, class_name)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(hf)
    state = {
        name: value.detach().numpy() + np.float32(0.25)  # no tensor all zeros or all ones
        for name, value in model.state_dict().items()
        if not (hf.tie_word_embeddings and name == "lm_head.weight")
    }
    architecture = next(a for a, n in gguf_package.MODEL_ARCH_NAMES.items() if n == key)
    names = gguf_package.get_tensor_name_map(architecture, hf.num_hidden_layers)
    path = tmp_path / "tiny.gguf"
    writer = gguf_package.GGUFWriter(path, key)
    _metadata(writer, key, hf)
    heads = hf.num_attention_heads
    for name, values in state.items():
        stored = _as_gguf(name, values, key, heads, getattr(hf, "num_key_value_heads", heads))
        stored_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored_name is not None, name
        writer.add_tensor(stored_name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with open_model(path) as source:
        assert set(source.reader.infos) == set(state)
        for name, values in state.items():
            assert source.reader.infos[name].shape == values.shape, name
            np.testing.assert_allclose(source.reader.read(name), values, rtol=0, atol=1e-6)
        want = config_from_hf({**hf.to_dict(), "architectures": [type(model).__name__]})
        got = source.config
        for field in want.__dataclass_fields__:
            ours, theirs = getattr(got, field), getattr(want, field)
            if field == "norm_eps":
                assert ours == pytest.approx(theirs)
            else:
                assert ours == theirs, field


# Metadata (table G16, G17)

KV = "llama.attention.head_count_kv"
BAD_METADATA = {
    "no architecture": ({"architecture": None}, "general.architecture None is not supported"),
    "unknown architecture": (
        {"architecture": string("general.architecture", "mamba")},
        "'mamba' is not supported; known: llama, qwen2, qwen3, gemma2, gemma3, gpt2",
    ),
    "architecture a number": ({"architecture": u32("general.architecture", 3)}, "not supported"),
    "G17 heads 0": ({"head_count": u32("llama.attention.head_count", 0)}, "head_count must be an"),
    "G17 kv heads 0": ({"head_count_kv": u32(KV, 0)}, "head_count_kv must be an integer >= 1"),
    "G17 kv heads 3": ({"head_count_kv": u32(KV, 3)}, "a divisor of attention.head_count"),
    "G17 heads float": ({"head_count": f32("llama.attention.head_count", 4.0)}, "got 4.0"),
    "G17 heads missing": ({"head_count": None}, "head_count must be .* it is missing"),
    "G17 heads differ": (
        {"head_count": array("llama.attention.head_count", 5, 2, struct.pack("<2i", 4, 2))},
        "the same for all layers",
    ),
    "G17 layers 0": ({"block_count": u32("llama.block_count", 0)}, "block_count must be an"),
    "G17 layers 10^9": ({"block_count": u32("llama.block_count", 10**9)}, "must be 1, the number"),
    "G17 theta 0": ({"theta": f32("llama.rope.freq_base", 0)}, "freq_base must be a finite"),
    "G17 theta NaN": ({"theta": f32("llama.rope.freq_base", float("nan"))}, "got nan"),
    "G17 theta -1": ({"theta": f32("llama.rope.freq_base", -1)}, "freq_base must be a finite"),
    "G17 eps NaN": (
        {"eps": f32("llama.attention.layer_norm_rms_epsilon", float("nan"))}, "epsilon must be"
    ),
    "G17 hidden 0": ({"embedding_length": u32("llama.embedding_length", 0)}, "embedding_length"),
    "G17 hidden 18": (
        {"embedding_length": u32("llama.embedding_length", 18)}, "multiple of attention.head_count"
    ),
    "G17 context 0": ({"context_length": u32("llama.context_length", 0)}, "context_length must"),
    "rotary part": ({"x": u32("llama.rope.dimension_count", 2)}, "the whole head must rotate"),
    "rope yarn": ({"x": string("llama.rope.scaling.type", "yarn")}, "type must be none or linear"),
    "value length": ({"x": u32("llama.attention.value_length", 8)}, "as long as a key"),
    "experts": ({"x": u32("llama.expert_count", 8)}, "mixtures of experts"),
    "window": ({"x": u32("llama.attention.sliding_window", 8)}, "no windowed layers"),
    "vocab_size": ({"x": u32("llama.vocab_size", 31)}, "vocab_size must be 32, the number of rows"),
    "G16 tokens short": (
        {"tokens": strings("tokenizer.ggml.tokens", ["a"])}, "length of tokens must be 32.* got 1 "
    ),
    "G16 tokens long": (
        {"tokens": strings("tokenizer.ggml.tokens", ["a"] * 33)}, "must be 32, the rows of token"
    ),
    "G16 types short": (
        {"token_type": array("tokenizer.ggml.token_type", 5, 1, struct.pack("<i", 1))},
        "length of token_type must be 32, one per token",
    ),
    "G16 scores long": (
        {"x": array("tokenizer.ggml.scores", 6, 33, b"\0" * 132)}, "length of scores must be 32"
    ),
    "eos out of range": ({"eos": u32("tokenizer.ggml.eos_token_id", 32)}, "less than the vocab"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_METADATA)
def test_metadata_that_cannot_be_are_refused(tmp_path: Path, case: str):
    changes, message = BAD_METADATA[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(llama_gguf(**changes))
    with pytest.raises(ConfigError, match=message) as caught:
        open_model(path)
    assert caught.value.path == path and str(path) in str(caught.value)


@pytest.mark.parametrize("size", [66_000, 10**6])
def test_a_giant_token_is_refused(tmp_path: Path, size: int):
    path = tmp_path / "x.gguf"
    path.write_bytes(llama_gguf(tokens=strings("tokenizer.ggml.tokens", ["a" * size] * 32)))
    with pytest.raises(ModelFormatError, match="item 0 of 32 has"):
        open_model(path)


def test_a_part_of_a_split_model_names_the_remedy(tmp_path: Path):
    path = tmp_path / "x-00001-of-00003.gguf"
    path.write_bytes(llama_gguf(x=u32("split.count", 3)))
    with pytest.raises(ModelFormatError, match="llama-gguf-split --merge"):
        open_model(path)


def test_a_tensor_the_architecture_does_not_have_is_named(tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(llama_gguf(extra={"blk.0.ssm_a.weight": np.ones(4, np.float32)}))
    with pytest.raises(ModelFormatError, match=r"'blk.0.ssm_a.weight' is unknown to Llama"):
        open_model(path)


def test_a_tensor_type_that_cannot_be_expanded_is_named(tmp_path: Path):
    path = tmp_path / "x.gguf"
    data = gguf_bytes(
        [string("general.architecture", "llama")], [info("output.weight", (4,), 26)], b"\0" * 32
    )
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match="has type I32; supported: F32, F16, BF16, Q4_0"):
        open_model(path)


def test_eos_ids_of_all_keys_are_joined(tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(
        llama_gguf(x=u32("tokenizer.ggml.eot_token_id", 7), y=u32("tokenizer.ggml.eom_token_id", 2))
    )
    assert open_model(path).config.eos_token_ids == (2, 7)


# Llama 3.1's rope factors, which GGUF keeps as a tensor


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_are_recognised(factor: float):
    infos = {"model.embed_tokens.weight": gguf_config.TensorInfo((32, 512), "F32")}
    infos["model.layers.0.mlp.up_proj.weight"] = gguf_config.TensorInfo((4, 512), "F32")
    metadata = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 131072,
        "llama.embedding_length": 512, "llama.feed_forward_length": 4,
        "llama.attention.head_count": 4, "llama.rope.freq_base": 500000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    rope = RopeConfig(500000.0, "llama3", factor, 1.0, 4.0, 8192)
    factors = gguf_config.llama3_factors(rope, 128).astype(np.float32)
    assert factors.min() == 1.0 and factors.max() == factor
    got = gguf_config.config_from_gguf(metadata, infos, rope_factors=factors)
    assert got.rope == rope
    wrong = factors.copy()
    wrong[30] *= 1.01
    with pytest.raises(ConfigError, match=r"rope_freqs.weight must be the factors of Llama 3.1"):
        gguf_config.config_from_gguf(metadata, infos, rope_factors=wrong)
    with pytest.raises(ConfigError, match="64 finite factors"):
        gguf_config.config_from_gguf(metadata, infos, rope_factors=factors[:-1])


def test_llama3_factors_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    scaled, _ = modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    want = plain / scaled.numpy()
    rope = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    np.testing.assert_allclose(gguf_config.llama3_factors(rope, 128), want, rtol=1e-5)


def test_rope_factors_in_a_file_of_another_scaling_are_refused(tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(llama_gguf(extra={"rope_freqs.weight": np.full(2, 3.0, np.float32)}))
    with pytest.raises(JaxInferError, match=r"rope_freqs.weight must be the factors"):
        open_model(path)
    path.write_bytes(llama_gguf(extra={"rope_freqs.weight": np.ones(2, np.float32)}))
    assert open_model(path).config.rope is not None
