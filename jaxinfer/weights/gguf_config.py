"""`config_from_gguf`: the metadata of a GGUF file as a validated ModelConfig.

Keys are those of llama.cpp (`llama.block_count`, ...). What the metadata leave out but the tensors
show (biases, tied embeddings) is taken from the tensors; the two are compared where both speak.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.params import TensorInfo
from jaxinfer.weights import gguf_names
from jaxinfer.weights.fields import REQUIRED, Fields

logger = logging.getLogger(__name__)

_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TOKEN_LISTS = ("scores", "token_type")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# gemma's 27B models scale q by the model width per head, the smaller ones by the head size
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_GEMMA3_LOCAL_THETA = 10000.0
_GEMMA_PERIOD = {"gemma2": 2, "gemma3": 6}


def config_from_gguf(
    metadata: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    path: object = None,
    *,
    rope_factors: np.ndarray | None = None,
) -> ModelConfig:
    """Translate GGUF metadata into a ModelConfig.

    `infos` are the file's tensors under Hugging Face names; `rope_factors` [head_dim / 2] is its
    rope_freqs.weight, the divisors of the rotary frequencies, where it has one.
    Raises ConfigError for a missing, mistyped, contradictory or unsupported key.
    """
    table = gguf_names.architecture(metadata.get("general.architecture"), path)
    key = str(metadata["general.architecture"])
    start = f"{key}."
    own = {name.removeprefix(start): v for name, v in metadata.items() if name.startswith(start)}
    fields = Fields(own, path, start)
    tokens = Fields(
        {n.removeprefix("tokenizer.ggml."): v for n, v in metadata.items()}, path, "tokenizer.ggml."
    )
    num_layers = _num_layers(fields, infos)
    _refuse_unsupported(fields)
    hidden = fields.integer("embedding_length")
    heads = _per_layer(fields, "attention.head_count", REQUIRED)
    head_dim = _head_dim(fields, hidden, heads)
    vocab = _vocab_size(fields, tokens, infos)
    is_gpt2, is_gemma = key == "gpt2", key in _GEMMA_PERIOD
    max_position = fields.integer("context_length")
    return ModelConfig(
        architecture=table.name,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_per_layer(fields, "feed_forward_length", REQUIRED),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(fields, heads),
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=_norm_eps(fields, "layer_norm_epsilon" if is_gpt2 else "layer_norm_rms_epsilon"),
        activation="gelu_tanh" if is_gpt2 or is_gemma else "silu",
        tie_embeddings="lm_head.weight" not in infos,
        query_scale=_query_width(key, num_layers, hidden, heads, head_dim) ** -0.5,
        rope=None if is_gpt2 else _rope(fields, key, head_dim, rope_factors),
        windows=_windows(fields, key, num_layers, max_position),
        rope_local=_rope_local(fields) if key == "gemma3" else None,
        qkv_bias=_has_bias(infos, ("q_proj", "c_attn")),
        out_bias=_has_bias(infos, ("o_proj", "attn.c_proj")),
        mlp_bias=_has_bias(infos, ("up_proj", "c_fc")),
        attn_soft_cap=_soft_cap(fields, key, "attn_logit_softcapping", 50.0),
        final_soft_cap=_soft_cap(fields, key, "final_logit_softcapping", 30.0),
        embed_scale=math.sqrt(hidden) if is_gemma else 1.0,
        bos_token_id=_token_id(tokens, "bos_token_id", vocab),
        eos_token_ids=_eos(tokens, vocab),
        dtype=_dtype(infos),  # type: ignore[arg-type]
    )


def _num_layers(fields: Fields, infos: Mapping[str, TensorInfo]) -> int:
    num_layers = fields.integer("block_count")
    stored = gguf_names.num_layers(infos)
    if num_layers != stored:
        fields.fail("block_count", f"{stored}, the number of layers in the file")
    return num_layers


def _refuse_unsupported(fields: Fields) -> None:
    if fields.integer("expert_count", 0, minimum=0):
        fields.fail("expert_count", "absent or 0: mixtures of experts are not supported")


def _per_layer(fields: Fields, name: str, default: Any) -> int:
    """An integer that some files give as a list of one per layer, all equal here."""
    value = fields.values.get(name)
    if isinstance(value, list):
        if not value or any(item != value[0] for item in value):
            fields.fail(name, "the same for all layers")
        return Fields({name: value[0]}, fields.path, fields.prefix).integer(name)
    return fields.integer(name, default)


def _kv_heads(fields: Fields, heads: int) -> int:
    name = "attention.head_count_kv"
    kv_heads = _per_layer(fields, name, heads)
    if heads % kv_heads:
        fields.fail(name, f"a divisor of attention.head_count ({heads})")
    return kv_heads


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    head_dim = fields.integer("attention.key_length", None)
    if head_dim is None:
        if hidden % heads:
            fields.fail("embedding_length", f"a multiple of attention.head_count ({heads})")
        head_dim = hidden // heads
    if fields.integer("attention.value_length", head_dim) != head_dim:
        fields.fail("attention.value_length", f"{head_dim}, as long as a key")
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        fields.fail("rope.dimension_count", f"{head_dim}: the whole head must rotate")
    return head_dim


def _vocab_size(fields: Fields, tokens: Fields, infos: Mapping[str, TensorInfo]) -> int:
    embed = infos.get("model.embed_tokens.weight") or infos.get("transformer.wte.weight")
    listed = tokens.texts("tokens")
    rows = embed.shape[0] if embed else None
    vocab = (
        rows if rows is not None else fields.integer("vocab_size", len(listed or ()) or REQUIRED)
    )
    if fields.integer("vocab_size", vocab) != vocab:
        fields.fail("vocab_size", f"{vocab}, the number of rows of token_embd.weight")
    if listed is not None and len(listed) != vocab:
        _fail_length(tokens, "tokens", len(listed), f"{vocab}, the rows of token_embd.weight")
    for name in _TOKEN_LISTS:
        items = tokens.get(name, None, "a list of numbers")
        if items is None:
            continue
        if not isinstance(items, list):
            tokens.fail(name, "a list of numbers")
        if len(items) != vocab:
            _fail_length(tokens, name, len(items), f"{vocab}, one per token")
    return vocab


def _fail_length(tokens: Fields, name: str, length: int, rule: str) -> None:
    Fields({f"length of {name}": length}, tokens.path, tokens.prefix).fail(
        f"length of {name}", rule
    )


def _norm_eps(fields: Fields, name: str) -> float:
    eps = fields.number(f"attention.{name}", zero=True)
    if eps == 0:
        logger.warning("%s: %s is 0; an all-zero row would give NaN", fields.path, name)
    return eps


def _query_width(key: str, num_layers: int, hidden: int, heads: int, head_dim: int) -> float:
    if _GEMMA_27B_LAYERS.get(key) == num_layers:
        return hidden / heads
    return float(head_dim)


def _rope(fields: Fields, key: str, head_dim: int, factors: np.ndarray | None) -> RopeConfig:
    theta = fields.number("rope.freq_base", 1e6 if key == "gemma3" else 10000.0)
    kind = fields.text("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        fields.fail("rope.scaling.type", "none or linear")
    factor = 1.0
    if kind == "linear":
        factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if factor < 1:
        fields.fail("rope.scaling.factor", "at least 1")
    if factors is not None:
        if kind != "none":
            fields.fail("rope.scaling.type", "none in a file with rope_freqs.weight")
        return _llama3(fields, theta, head_dim, factors)
    return RopeConfig(theta) if factor == 1.0 else RopeConfig(theta, "linear", factor)


def _llama3(fields: Fields, theta: float, head_dim: int, factors: np.ndarray) -> RopeConfig:
    """The llama3 scaling whose divisors are `factors`; the file keeps these, not the parameters."""
    given = np.asarray(factors, np.float64).ravel()
    shown = Fields({"rope_freqs.weight": f"{given.size} factors"}, fields.path)
    if given.size != head_dim // 2 or not np.isfinite(given).all():
        shown.fail("rope_freqs.weight", f"{head_dim // 2} finite factors, half the head")
    rope = RopeConfig(theta, "llama3", max(float(given.max()), 1.0), 1.0, 4.0, 8192)
    if not np.allclose(llama3_factors(rope, head_dim), given, rtol=1e-4):
        shown.fail(
            "rope_freqs.weight",
            "the factors of Llama 3.1's scaling (low 1, high 4, original context 8192)",
        )
    return rope


def llama3_factors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """What llama3 scaling divides each rotary frequency by: float64 [head_dim / 2].

    Frequencies of short waves stay, those of long waves are divided by `factor`, those between are
    interpolated (Llama 3.1 reference implementation, `apply_scaling`).
    """
    frequency = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope.original_max_position * frequency / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / rope.factor + smooth)


def _rope_local(fields: Fields) -> RopeConfig:
    return RopeConfig(fields.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA))


def _windows(
    fields: Fields, key: str, num_layers: int, max_position: int
) -> tuple[int | None, ...]:
    # llama.cpp: Gemma 2 files without the key have Gemma 2's window
    default = min(4096, max_position) if key == "gemma2" else None
    window = fields.integer("attention.sliding_window", default)
    if key not in _GEMMA_PERIOD and window is not None and window < max_position:
        fields.fail("attention.sliding_window", f"absent: {key} files have no windowed layers")
    if key not in _GEMMA_PERIOD or window is None:
        return (None,) * num_layers
    if window > max_position:
        fields.fail("attention.sliding_window", f"at most context_length ({max_position})")
    period = fields.integer("attention.sliding_window_pattern", _GEMMA_PERIOD[key])
    return tuple(window if (layer + 1) % period else None for layer in range(num_layers))


def _soft_cap(fields: Fields, key: str, name: str, gemma2: float) -> float | None:
    return fields.number(name, gemma2 if key == "gemma2" else None)


def _has_bias(infos: Mapping[str, TensorInfo], modules: tuple[str, ...]) -> bool:
    return any(name.endswith(tuple(f".{m}.bias" for m in modules)) for name in infos)


def _token_id(tokens: Fields, name: str, vocab: int) -> int | None:
    token = tokens.integer(name, None, minimum=0)
    if token is not None and token >= vocab:
        tokens.fail(name, f"less than the vocabulary ({vocab})")
    return token


def _eos(tokens: Fields, vocab: int) -> tuple[int, ...]:
    ids = (_token_id(tokens, name, vocab) for name in _EOS_KEYS)
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _dtype(infos: Mapping[str, TensorInfo]) -> str:
    """The type of the matrices; bfloat16 where they are quantised, for its range."""
    kinds = {info.dtype for info in infos.values() if len(info.shape) > 1}
    return _DTYPES[kinds.pop()] if len(kinds) == 1 and kinds <= set(_DTYPES) else "bfloat16"
