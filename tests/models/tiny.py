"""Tiny models of every architecture: config.json dicts as checkpoints have them, seeded weights.

Weights come from NumPy's frozen RandomState by tensor name and shape, so that a machine without
torch makes the very weights whose logits the goldens hold. Norms and biases are random too, and
windows, soft caps and rope scalings bite within `NUM_TOKENS`, so that leaving one out shows.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models import Model
from jaxinfer.params import TensorInfo, assemble
from pallas_kernels.paged_attention import Ragged

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
NUM_TOKENS = 32
PAGE_SIZE = 4
MAX_PAGES = 12
SEED = 7

_BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
_RMS = _BASE | {"rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0}
_GEMMA = _BASE | {
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": 4,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _RMS
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 48,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "smollm2": _RMS
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "mistral": _RMS
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 12,
        "num_key_value_heads": 1,
        "sliding_window": 8,
        "tie_word_embeddings": False,
    },
    "qwen2": _RMS
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": _RMS
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 16,
        "num_key_value_heads": 2,
        "use_sliding_window": False,
        "attention_bias": False,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "gemma2": _GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 12,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3": _GEMMA
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 16,
        "num_key_value_heads": 1,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "sliding_window_pattern": 3,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 48,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    },
}


@dataclass(frozen=True)
class Golden:
    """What Hugging Face transformers gave: shapes of its tensors, tokens, logits [T, V] float32."""

    shapes: dict[str, tuple[int, ...]]
    tokens: np.ndarray
    logits: np.ndarray


def load_golden(case: str) -> Golden:
    """The stored golden of `case`; its config must be the one above, or the goldens are stale."""
    header = json.loads((GOLDENS / "models.json").read_text())
    assert header[case]["config"] == CONFIGS[case], f"run python -m scripts.make_goldens ({case})"
    assert header[case]["seed"] == SEED
    with np.load(GOLDENS / "models.npz", allow_pickle=False) as arrays:
        return Golden(
            shapes={name: tuple(shape) for name, shape in header[case]["shapes"].items()},
            tokens=arrays[f"{case}.tokens"],
            logits=arrays[f"{case}.logits"],
        )


def make_tokens(vocab_size: int) -> np.ndarray:
    """`NUM_TOKENS` token ids, int32."""
    return np.random.RandomState(SEED).randint(0, vocab_size, NUM_TOKENS).astype(np.int32)


def make_weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Tensor `name` of the tiny model: matrices of gain 1.5, norms around their neutral value."""
    random = np.random.RandomState((SEED + zlib.crc32(f"{case}/{name}".encode())) % 2**32)
    values = random.standard_normal(shape)
    if name.endswith("bias"):
        values *= 0.3
    elif len(shape) == 1:
        values = 0.3 * values + (0.0 if case.startswith("gemma") else 1.0)
    elif "embed" in name or "wte" in name or "wpe" in name:
        values *= 0.5
    else:
        fan_in = shape[0] if case == "gpt2" and not name.startswith("lm_head") else shape[1]
        values *= 1.5 / np.sqrt(fan_in)
    return values.astype(np.float32)


class DictReader:
    """A TensorReader over arrays in memory; remembers which were read."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors = tensors
        self.infos = {name: TensorInfo(a.shape, "F32") for name, a in tensors.items()}
        self.names_read: list[str] = []

    def read(self, name: str) -> np.ndarray:
        self.names_read.append(name)
        return self.tensors[name]


def make_tensors(case: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The whole checkpoint of a tiny model."""
    return {name: make_weight(case, name, shape) for name, shape in shapes.items()}


def load(model: Model, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The tensors as the model's parameters on the default device."""
    return assemble(
        DictReader(tensors),
        model.rules,
        model.config,
        model.shapes(),
        lambda array, path: jnp.asarray(array),
        ignored=model.ignored,
    )


def run(
    model: Model, params: dict[str, Any], tokens: np.ndarray, chunk: int, width: int
) -> np.ndarray:
    """Logits [T, V] of one sequence put through in steps of `chunk` tokens padded to `width`.

    Padding has absurd ids and positions and writes to page 0; the row's pages are not in order.
    """
    step = jax.jit(lambda *args: _step(model, *args))
    pages = model.allocate(MAX_PAGES + 1, PAGE_SIZE)
    table = np.random.RandomState(0).permutation(np.arange(1, MAX_PAGES + 1)).astype(np.int32)
    collected = []
    for start in range(0, len(tokens), chunk):
        new = tokens[start : start + chunk]
        positions = np.arange(start, start + len(new), dtype=np.int32)
        padding = (0, width - len(new))
        ragged = Ragged(
            page_table=jnp.asarray(table[None]),
            kv_lens=jnp.asarray([start + len(new)], jnp.int32),
            cu_q_lens=jnp.asarray([0, len(new)], jnp.int32),
            num_decode=jnp.asarray(int(width == 1), jnp.int32),
            slots=jnp.asarray(
                np.pad(table[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE, padding)
            ),
            decode_only=width == 1,
        )
        logits, pages = step(
            params,
            pages,
            jnp.asarray(np.pad(new, padding, constant_values=2**30)),
            jnp.asarray(np.pad(positions, padding, constant_values=2**30)),
            ragged,
        )
        collected.append(np.asarray(logits)[: len(new)])
    return np.concatenate(collected)


def _step(model: Model, params, pages, tokens, positions, ragged):
    hidden, pages = model.forward(params, pages, tokens, positions, ragged)
    return model.logits(params, hidden), pages


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest absolute difference, relative to the largest wanted magnitude."""
    return float(np.abs(got - want).max() / np.abs(want).max())
