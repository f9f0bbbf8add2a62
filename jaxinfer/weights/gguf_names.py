"""GGUF tensor names and layouts as Hugging Face's, one table per architecture.

llama.cpp's converter renames tensors and changes some: it permutes the rows of Llama's q and k
projections (its rotary embedding pairs neighbours, Hugging Face's pairs halves), adds one to
Gemma's norm weights and transposes GPT-2's matrices. Each change is undone here, so a model's one
rules table serves both formats.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxinfer.errors import ConfigError

Undo = Callable[[np.ndarray, int, int], np.ndarray]  # (array, num_heads, num_kv_heads) -> array
ROPE_FACTORS = "rope_freqs.weight"


def unpermute_rows(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from pairs (0, H/2, 1, H/2 + 1, ...) back to halves; [N*H, ...]."""
    half = array.shape[0] // num_heads // 2
    pairs = array.reshape(num_heads, half, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _query(array: np.ndarray, num_heads: int, num_kv_heads: int) -> np.ndarray:
    del num_kv_heads
    return unpermute_rows(array, num_heads)


def _key(array: np.ndarray, num_heads: int, num_kv_heads: int) -> np.ndarray:
    del num_heads
    return unpermute_rows(array, num_kv_heads)


def permuted_heads(undo: Undo | None, num_heads: int, num_kv_heads: int) -> int | None:
    """Number of heads whose rows `undo` permutes, None where it permutes none."""
    if undo is _query:
        return num_heads
    return num_kv_heads if undo is _key else None


def _minus_one(array: np.ndarray, num_heads: int, num_kv_heads: int) -> np.ndarray:
    del num_heads, num_kv_heads
    return array.astype(np.float32) - np.float32(1.0)


def transposed(array: np.ndarray, num_heads: int, num_kv_heads: int) -> np.ndarray:
    """A matrix stored [out, in] as Conv1D has it, [in, out]."""
    del num_heads, num_kv_heads
    return array.T


@dataclass(frozen=True)
class Architecture:
    """`name` is Hugging Face's; `modules` maps a GGUF module ("blk.{l}.attn_q") to the HF module.

    `undo` gives, per GGUF tensor of a layer ("attn_q.weight"), what restores the HF values.
    """

    name: str
    modules: Mapping[str, str]
    undo: Mapping[str, Undo]


_ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_PRE_NORM = {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_UNDO = {
    f"{name}.weight": _minus_one for name in ("output_norm", "attn_norm", *_GEMMA_NORMS, *_QK_NORM)
}
_LLAMA_UNDO = {
    f"{name}.{part}": undo
    for name, undo in (("attn_q", _query), ("attn_k", _key))
    for part in ("weight", "bias")
}
_GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_ENDS = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}


def _modules(*layer: Mapping[str, str]) -> dict[str, str]:
    blocks = {
        f"blk.{{l}}.{name}": f"model.layers.{{l}}.{module}"
        for table in layer
        for name, module in table.items()
    }
    return _ENDS | blocks


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", _modules(_LAYER, _PRE_NORM), _LLAMA_UNDO),
    "qwen2": Architecture("Qwen2ForCausalLM", _modules(_LAYER, _PRE_NORM), {}),
    "qwen3": Architecture("Qwen3ForCausalLM", _modules(_LAYER, _PRE_NORM, _QK_NORM), {}),
    "gemma2": Architecture("Gemma2ForCausalLM", _modules(_LAYER, _GEMMA_NORMS), _GEMMA_UNDO),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", _modules(_LAYER, _GEMMA_NORMS, _QK_NORM), _GEMMA_UNDO
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        _GPT2_ENDS
        | {f"blk.{{l}}.{name}": f"transformer.h.{{l}}.{m}" for name, m in _GPT2_LAYER.items()},
        {
            f"{name}.weight": transposed
            for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        },
    ),
}


def architecture(key: object, path: object = None) -> Architecture:
    """The table of `general.architecture` = `key`; ConfigError lists the known."""
    if not isinstance(key, str) or key not in ARCHITECTURES:
        where = f"{path}: " if path is not None else ""
        raise ConfigError(
            f"{where}general.architecture {key!r:.120} is not supported; "
            f"known: {', '.join(ARCHITECTURES)}",
            path=path,
            field="general.architecture",
        )
    return ARCHITECTURES[key]


def hf_name(table: Architecture, name: str) -> str | None:
    """Hugging Face name of the GGUF tensor `name`, None where the architecture has none such."""
    module, _, part = name.rpartition(".")
    layer = re.match(r"blk\.(0|[1-9][0-9]{0,5})\.", module)
    if layer:
        module = "blk.{l}." + module[layer.end() :]
    target = table.modules.get(module)
    if target is None or part not in ("weight", "bias"):
        return None
    return f"{target.replace('{l}', layer[1]) if layer else target}.{part}"


def undo_of(table: Architecture, name: str) -> Undo | None:
    """What restores the Hugging Face values of GGUF tensor `name`, None where nothing has to."""
    return table.undo.get(re.sub(r"^blk\.[0-9]+\.", "", name))


def num_layers(names: Iterable[str]) -> int:
    """Number of layers that tensors of these Hugging Face names belong to."""
    layers = (re.search(r"(?:^|\.)(?:layers|h)\.([0-9]{1,6})\.", name) for name in names)
    return max((int(match[1]) + 1 for match in layers if match), default=0)
