"""Small valid files, built byte by byte so that tests can break any part of them."""

import json
import random
import struct
from typing import Any

import numpy as np

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def raw_safetensors(header: Any, data: bytes) -> bytes:
    """A file of this header (bytes, text or something JSON can write) and data."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """A valid file of float32 tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in tensors.items():
        header[name] = entry("F32", list(array.shape), position, position + array.nbytes)
        position += array.nbytes
    return raw_safetensors(header, b"".join(a.tobytes() for a in tensors.values()))


def llama_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a tiny Llama, under Hugging Face names and shapes."""
    draw = np.random.default_rng(seed)
    d, f, v = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    h = d // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * h
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": s for name, s in block.items()}
    return {n: draw.standard_normal(s, np.float32) for n, s in shapes.items()}


def text(value: str | bytes) -> bytes:
    """A GGUF string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, code: int, value: bytes) -> bytes:
    """A metadata pair."""
    return text(key) + struct.pack("<I", code) + value


def u32(key: str | bytes, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


def f32(key: str, value: float) -> bytes:
    return pair(key, 6, struct.pack("<f", value))


def string(key: str, value: str | bytes) -> bytes:
    return pair(key, 8, text(value))


def array(key: str, code: int, count: int, items: bytes) -> bytes:
    return pair(key, 9, struct.pack("<IQ", code, count) + items)


def strings(key: str, items: list[str | bytes]) -> bytes:
    return array(key, 8, len(items), b"".join(map(text, items)))


def info(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor info; `dims` in GGUF's order, fastest first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(
    pairs: list[bytes],
    infos: list[bytes],
    data: bytes,
    *,
    head: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these parts; counts are right unless given."""
    count = len(infos) if num_tensors is None else num_tensors
    num = len(pairs) if num_pairs is None else num_pairs
    start = head + struct.pack("<IQQ", version, count, num) + b"".join(pairs) + b"".join(infos)
    return start + b"\0" * (-len(start) % alignment) + data


def llama_pairs(**changes: bytes | None) -> list[bytes]:
    """Metadata of a tiny Llama of one layer; `changes` replaces or (None) drops pairs."""
    tokens = [f"t{number}" for number in range(32)]
    pairs: dict[str, bytes | None] = {
        "architecture": string("general.architecture", "llama"),
        "block_count": u32("llama.block_count", 1),
        "context_length": u32("llama.context_length", 64),
        "embedding_length": u32("llama.embedding_length", 16),
        "feed_forward_length": u32("llama.feed_forward_length", 24),
        "head_count": u32("llama.attention.head_count", 4),
        "head_count_kv": u32("llama.attention.head_count_kv", 2),
        "eps": f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
        "theta": f32("llama.rope.freq_base", 10000.0),
        "tokens": strings("tokenizer.ggml.tokens", list(tokens)),
        "token_type": array("tokenizer.ggml.token_type", 5, 32, struct.pack("<32i", *[1] * 32)),
        "eos": u32("tokenizer.ggml.eos_token_id", 2),
    }
    return [value for value in (pairs | changes).values() if value is not None]


LLAMA_SHAPES = {
    "token_embd.weight": (16, 32),
    "output_norm.weight": (16,),
    "blk.0.attn_norm.weight": (16,),
    "blk.0.ffn_norm.weight": (16,),
    "blk.0.attn_q.weight": (16, 16),
    "blk.0.attn_k.weight": (16, 8),
    "blk.0.attn_v.weight": (16, 8),
    "blk.0.attn_output.weight": (16, 16),
    "blk.0.ffn_gate.weight": (16, 24),
    "blk.0.ffn_up.weight": (16, 24),
    "blk.0.ffn_down.weight": (24, 16),
}


def llama_gguf(seed: int = 0, extra: dict[str, np.ndarray] | None = None, **changes: Any) -> bytes:
    """A whole valid file of a tiny Llama of one layer with tied embeddings, in float32."""
    draw = np.random.default_rng(seed)
    tensors = {n: draw.standard_normal(s[::-1], np.float32) for n, s in LLAMA_SHAPES.items()}
    infos, data = [], b""
    for name, values in (tensors | (extra or {})).items():
        infos.append(info(name, values.shape[::-1], 0, len(data)))
        data += values.tobytes() + b"\0" * (-values.nbytes % 32)
    return gguf_bytes(llama_pairs(**changes), infos, data)


def mutate(data: bytes, draw: random.Random, header: int) -> bytes:
    """One to three faults: bit flips, cuts, lengths changed, pieces doubled, dropped or swapped.

    Most fall within the first `header` bytes, where structure is.
    """
    out = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        limit = min(len(out), header) if draw.random() < 0.8 else len(out)
        at = draw.randrange(max(1, limit))
        size = draw.choice((1, 4, 8, 30))
        kind = draw.randrange(6)
        if kind == 0:
            out[at : at + 1] = bytes([out[at] ^ 1 << draw.randrange(8)]) if at < len(out) else b""
        elif kind == 1:
            del out[at if draw.random() < 0.5 else len(out) - size :]
        elif kind == 2:
            number = draw.choice((0, 1, 2**8, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1))
            out[at : at + 8] = struct.pack("<Q", number)
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            del out[at : at + size]
        else:
            out[at : at + size] = bytes(reversed(out[at : at + size]))
    return bytes(out)
