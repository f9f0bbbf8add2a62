"""The model folder beside its weights: config.json, the tokenizer's files, what else belongs.

From a folder they are copied, config.json with its new quantization_config; from a GGUF file they
are made of its metadata.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.errors import ConfigError
from jaxinfer.quantize.files import write_text
from jaxinfer.quantize.settings import Settings
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.weights import ModelSource, config_from_hf
from jaxinfer.weights.files import read_json

COPIED = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "chat_template*", "generation_config.json", "LICENSE*",
    "NOTICE*",
)  # fmt: skip
_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3TextForCausalLM": "gemma3_text",
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def model_config(source: ModelSource, settings: Settings) -> dict[str, Any]:
    """What the new config.json holds. ConfigError for what it cannot say."""
    if source.kind == "gguf":
        raw, before = described(source.config), None
        raw["torch_dtype"] = settings.dtype
    else:
        raw = read_json(source.path / "config.json")
        name = "quantization_config" if "quantization_config" in raw else "compression_config"
        before = raw.pop(name, None)
    return raw | {"quantization_config": settings.quantization_config(before)}


def write(
    folder: Path, source: ModelSource, config: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
    """Everything but the weights; `tokenizer` is that of a GGUF file, None for one that is not
    known."""
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if source.kind == "safetensors":
        found = {path for pattern in COPIED for path in source.path.glob(pattern)}
        for path in sorted(found):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    elif tokenizer is not None:
        _write_tokenizer(folder, tokenizer, source.config)


def described(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields for a model that has none; they are read back and compared.

    Raises ConfigError where they do not give the same model.
    """
    gemma = config.architecture.startswith("Gemma")
    fields: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": _ACTIVATIONS[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "torch_dtype": config.dtype,
    }
    fields |= _rope(config) | _windows(config)
    if gemma:
        fields |= {
            "hidden_activation": _ACTIVATIONS[config.activation],
            "query_pre_attn_scalar": round(config.query_scale**-2, 6),
            "attn_logit_softcapping": config.attn_soft_cap,
            "final_logit_softcapping": config.final_soft_cap,
        }
    read_back = config_from_hf(fields)
    # a number that went through a square root and back
    if math.isclose(read_back.query_scale, config.query_scale, rel_tol=1e-6):
        read_back = replace(read_back, query_scale=config.query_scale)
    if read_back != config:
        names = [n for n in config.__slots__ if getattr(config, n) != getattr(read_back, n)]
        raise ConfigError(
            f"config.json cannot say what this {config.architecture} has as {', '.join(names)}",
            field=names[0],
        )
    return fields


def _rope(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope or RopeConfig(10000.0)
    fields: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.scaling != "none":
        scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
        if rope.scaling == "llama3":
            scaling |= {
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_position,
            }
        fields["rope_scaling"] = scaling
    if config.rope_local is not None:
        fields["rope_local_base_freq"] = config.rope_local.theta
    return fields


def _windows(config: ModelConfig) -> dict[str, Any]:
    windows = [window for window in config.windows if window is not None]
    if not windows:
        return {"sliding_window": None}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    return {"sliding_window": windows[0], "layer_types": kinds, "use_sliding_window": True}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """tokenizer.json and its settings. The entry that stands for bytes without a token goes: its
    id is past the embedding, and other readers drop such bytes without one."""
    content = json.loads(tokenizer.backend.to_str())
    model = content["model"]
    dropped = [t for t, i in model["vocab"].items() if i >= tokenizer.vocab_size]
    for token in dropped:
        del model["vocab"][token]
        if model.get("unk_token") == token:
            model["unk_token"] = None
    write_text(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))
    ids = {
        "bos_token": tokenizer.bos_token_id,
        "eos_token": tokenizer.eos_token_id,
        "pad_token": tokenizer.pad_token_id,
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position,
        "clean_up_tokenization_spaces": False,
    }
    settings |= {n: tokenizer.backend.id_to_token(i) for n, i in ids.items() if i is not None}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    write_text(
        folder / "tokenizer_config.json",
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    )
