"""`config_from_hf`: a Hugging Face config.json (and generation_config.json) as a ModelConfig.

Every architecture is a row of `_FAMILIES` with the defaults that the model's own configuration
class in transformers has, because a config.json may leave out what equals them. Code that a
checkpoint brings along (`auto_map`) is never imported.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.quant.config import checkpoint_format
from jaxinfer.weights.fields import Fields
from jaxinfer.weights.hf_rope import rope_of
from jaxinfer.weights.hf_windows import mistral_windows, no_windows, typed_windows

logger = logging.getLogger(__name__)

MAX_LAYERS = 10_000

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
DTYPES = {name: name for name in ("float32", "bfloat16", "float16")}
DTYPES |= {f"torch.{name}": name for name in DTYPES}


@dataclass(frozen=True)
class _Family:
    """What differs between the architectures that share Llama's field names."""

    model_type: str
    kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size // num_attention_heads
    max_position: int = 32768
    theta: float = 10000.0
    bos: int | None = None
    eos: int | None = None
    tied: bool = False
    biases: Callable[[Fields], tuple[bool, bool, bool]] = lambda fields: (False, False, False)
    windows: Callable[[Fields, int, int], tuple[int | None, ...]] = no_windows
    gemma: bool = False
    attn_soft_cap: float | None = None
    final_soft_cap: float | None = None


def _attention_bias(fields: Fields) -> tuple[bool, bool, bool]:
    bias = fields.boolean("attention_bias", False)
    return bias, bias, False


def _llama_bias(fields: Fields) -> tuple[bool, bool, bool]:
    bias = fields.boolean("attention_bias", False)
    return bias, bias, fields.boolean("mlp_bias", False)


_GEMMA3 = _Family(
    "gemma3_text", 4, 256, 131072, 1e6, 2, 1, True, _attention_bias, typed_windows(6), gemma=True
)
_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family("llama", max_position=2048, bos=1, eos=2, biases=_llama_bias),
    "MistralForCausalLM": _Family(
        "mistral", 8, max_position=131072, bos=1, eos=2, windows=mistral_windows
    ),
    "Qwen2ForCausalLM": _Family(
        "qwen2", 32, biases=lambda fields: (True, False, False), windows=typed_windows(None)
    ),
    "Qwen3ForCausalLM": _Family(
        "qwen3", 32, 128, biases=_attention_bias, windows=typed_windows(None)
    ),
    "Gemma2ForCausalLM": _Family(
        "gemma2",
        4,
        256,
        8192,
        10000.0,
        2,
        1,
        True,
        _attention_bias,
        typed_windows(2),
        True,
        50.0,
        30.0,
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3TextForCausalLM": _GEMMA3,
}
KNOWN_ARCHITECTURES = (*_FAMILIES, "GPT2LMHeadModel")
_MODEL_TYPES = {"gpt2": "GPT2LMHeadModel"}
_MODEL_TYPES |= {family.model_type: name for name, family in reversed(_FAMILIES.items())}


def config_from_hf(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    path: object = None,
    *,
    layers_in_files: int | None = None,
) -> ModelConfig:
    """Translate a parsed config.json into a ModelConfig.

    `generation_config` adds its end-of-sequence ids; `path` is the file named in messages;
    `layers_in_files` is the number of layers that the weight files hold, where known.
    Raises ConfigError for a missing, mistyped, contradictory or unsupported field.
    """
    fields = Fields(config, path)
    architecture = _architecture(fields)
    _refuse_unsupported(fields, architecture)
    if "auto_map" in config:
        logger.warning(
            "%s: auto_map is ignored; code from a model folder is never imported", path or "config"
        )
    name = "n_layer" if architecture == "GPT2LMHeadModel" else "num_hidden_layers"
    num_layers = fields.integer(name)
    if layers_in_files is not None and num_layers != layers_in_files:
        fields.fail(name, f"{layers_in_files}, the number of layers in the weight files")
    if num_layers > MAX_LAYERS:
        fields.fail(name, f"at most {MAX_LAYERS}")
    if architecture == "GPT2LMHeadModel":
        return _gpt2(fields, architecture, generation_config, num_layers)
    return _decoder(fields, architecture, generation_config, num_layers)


def _architecture(fields: Fields) -> str:
    names = fields.texts("architectures")
    if names:
        known = [name for name in names if name in KNOWN_ARCHITECTURES]
        if known:
            return known[0]
        if "Gemma3ForConditionalGeneration" in names:
            fields.fail(
                "architectures",
                "a text model; of Gemma 3 the text models (Gemma3ForCausalLM) are supported, "
                "not the ones with image input",
            )
        fields.fail("architectures", f"one of {', '.join(KNOWN_ARCHITECTURES)}")
    model_type = fields.text("model_type")
    if model_type not in _MODEL_TYPES:
        fields.fail("model_type", f"one of {', '.join(sorted(_MODEL_TYPES))}")
    return _MODEL_TYPES[model_type]


def _refuse_unsupported(fields: Fields, architecture: str) -> None:
    if checkpoint_format(fields) is not None and architecture == "GPT2LMHeadModel":
        # its matrices are stored [inputs, outputs]: a square one would be read transposed
        fields.fail("quantization_config", f"absent: quantised, {architecture} is not supported")
    for name in ("use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention"):
        if fields.boolean(name, False):
            fields.fail(name, f"false: {architecture} is run as a causal decoder")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        fields.fail("partial_rotary_factor", "1: rotary embeddings of part of a head")


def _decoder(
    fields: Fields, architecture: str, generation_config: Mapping[str, Any] | None, num_layers: int
) -> ModelConfig:
    family = _FAMILIES[architecture]
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    head_dim = _head_dim(fields, family, hidden, heads)
    max_position = fields.integer("max_position_embeddings", family.max_position)
    vocab = fields.integer("vocab_size")
    scalar = fields.number("query_pre_attn_scalar", 256.0) if family.gemma else float(head_dim)
    kv_heads = fields.integer("num_key_value_heads", _absent_kv_heads(fields, family, heads))
    if heads % kv_heads:
        fields.fail("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    qkv_bias, out_bias, mlp_bias = family.biases(fields)
    rope, rope_local = rope_of(
        fields, family.theta, local_theta=10000.0 if family is _GEMMA3 else None
    )
    eps = fields.number("rms_norm_eps", 1e-6, zero=True)
    if eps == 0:
        logger.warning("%s: rms_norm_eps is 0; an all-zero row would give NaN", fields.path)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=eps,
        activation=_activation(fields, family),
        tie_embeddings=fields.boolean("tie_word_embeddings", family.tied),
        query_scale=scalar**-0.5,
        rope=rope,
        windows=family.windows(fields, num_layers, max_position),
        rope_local=rope_local,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        attn_soft_cap=_soft_cap(fields, "attn_logit_softcapping", family.attn_soft_cap)
        if family.gemma
        else None,
        final_soft_cap=_soft_cap(fields, "final_logit_softcapping", family.final_soft_cap)
        if family.gemma
        else None,
        embed_scale=math.sqrt(hidden) if family.gemma else 1.0,
        bos_token_id=_bos(fields, family.bos, vocab),
        eos_token_ids=_eos(fields, generation_config, family.eos, vocab),
        dtype=_dtype(fields),  # type: ignore[arg-type]
    )


def _gpt2(
    fields: Fields, architecture: str, generation_config: Mapping[str, Any] | None, num_layers: int
) -> ModelConfig:
    hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
    if hidden % heads:
        fields.fail("n_embd", f"a multiple of n_head ({heads})")
    if fields.boolean("scale_attn_by_inverse_layer_idx", False):
        fields.fail("scale_attn_by_inverse_layer_idx", "false: it is not supported")
    head_dim = hidden // heads
    vocab = fields.integer("vocab_size")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.integer("n_inner", 4 * hidden),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_position=fields.integer("n_positions", fields.integer("n_ctx", 1024)),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, zero=True),
        activation=_known_activation(fields, "activation_function", "gelu_new"),
        tie_embeddings=fields.boolean("tie_word_embeddings", True),
        query_scale=head_dim**-0.5 if fields.boolean("scale_attn_weights", True) else 1.0,
        rope=None,
        windows=(None,) * num_layers,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        bos_token_id=_bos(fields, 50256, vocab),
        eos_token_ids=_eos(fields, generation_config, 50256, vocab),
        dtype=_dtype(fields),  # type: ignore[arg-type]
    )


def _head_dim(fields: Fields, family: _Family, hidden: int, heads: int) -> int:
    given = fields.integer("head_dim", family.head_dim)
    if given is None and hidden % heads:
        fields.fail(
            "hidden_size",
            f"a multiple of num_attention_heads ({heads}) where head_dim is not given",
        )
    head_dim = hidden // heads if given is None else given
    if head_dim % 2:
        name = "hidden_size" if given is None else "head_dim"
        fields.fail(
            name, f"such that the size of a head is even, not {head_dim}, for rotary embeddings"
        )
    return head_dim


def _absent_kv_heads(fields: Fields, family: _Family, heads: int) -> int:
    # transformers: null means as many as query heads; only an absent field takes the class default
    if family.kv_heads is None or "num_key_value_heads" in fields.values:
        return heads
    return family.kv_heads


def _activation(fields: Fields, family: _Family) -> Any:
    if not family.gemma:
        return _known_activation(fields, "hidden_act", "silu")
    # transformers reads only hidden_activation for Gemma, though old files give hidden_act too
    return _known_activation(fields, "hidden_activation", "gelu_pytorch_tanh")


def _known_activation(fields: Fields, name: str, default: str) -> Any:
    given = fields.text(name, default)
    if given not in ACTIVATIONS:
        fields.fail(name, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[given]


def _soft_cap(fields: Fields, name: str, default: float | None) -> float | None:
    # null switches the cap off; only an absent field takes the class default
    return fields.number(name, None if name in fields.values else default)


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    given = fields.text(name, "float32")
    if given not in DTYPES:
        fields.fail(name, "float32, bfloat16 or float16")
    return DTYPES[given]


def _bos(fields: Fields, default: int | None, vocab: int) -> int | None:
    if "bos_token_id" not in fields.values:
        return default if default is not None and default < vocab else None
    value = fields.integer("bos_token_id", None, minimum=0)
    if value is not None and value >= vocab:
        fields.fail("bos_token_id", f"less than vocab_size ({vocab})")
    return value


def _eos(
    fields: Fields, generation_config: Mapping[str, Any] | None, default: int | None, vocab: int
) -> tuple[int, ...]:
    """Ids that end a text: those of both files, in order of mention."""
    ids = _token_ids(fields, vocab)
    if not ids and "eos_token_id" not in fields.values and default is not None and default < vocab:
        ids = [default]
    if generation_config is not None:
        where = f"generation_config.json beside {fields.path}" if fields.path else None
        more = _token_ids(Fields(generation_config, where, "generation_config."), vocab)
        added = [token for token in more if token not in ids]
        if ids and added:
            logger.info("%s: generation_config adds end-of-sequence ids %s", fields.path, added)
        ids += added
    return tuple(dict.fromkeys(ids))


def _token_ids(fields: Fields, vocab: int) -> list[int]:
    rule = f"an integer or a list of integers in 0..{vocab - 1}"
    value = fields.get("eos_token_id", [], rule)
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
            fields.fail("eos_token_id", rule)
    return list(ids)
