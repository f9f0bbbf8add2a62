"""Tiny GGUF files whose matrices are blocks of every type that can be kept quantised."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

from tests.quant.test_gguf_blocks import random_blocks

KINDS = ("Q4_1", "Q8_0", "Q4_K", "Q4_0", "Q6_K")
D, F, V, L, HEADS, KV_HEADS = 256, 512, 264, 2, 4, 2
_HALVES = {"Q4_K": {0: 5e-4, 2: 4e-3}, "Q6_K": {208: 4e-5}}
"""Where the float16 numbers of a block begin, and what makes weights of about 0.1."""


def blocks(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """A matrix [N, K] as bytes [N, bytes]: rounded from N(0, 1 / K) where the package can."""
    draw = np.random.default_rng(seed)
    if kind not in _HALVES:
        values = draw.standard_normal(shape).astype(np.float32) / np.float32(shape[1] ** 0.5)
        return quants.quantize(values, GGMLQuantizationType[kind])
    raw = random_blocks(kind, shape, seed)
    for start, scale in _HALVES[kind].items():
        halves = (scale * draw.uniform(0.5, 1.5, raw.shape[:2])).astype("<f2")
        raw[..., start : start + 2] = halves[..., None].view(np.uint8)
    return raw.reshape(len(raw), -1)


def _writer(path: Path, name: str) -> GGUFWriter:
    writer = GGUFWriter(path, name)
    writer.add_block_count(L)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_head_count(HEADS)
    writer.add_feed_forward_length(F)
    writer.add_eos_token_id(2)
    return writer


def _finish(
    writer: GGUFWriter,
    path: Path,
    matrices: dict[str, tuple[int, int]],
    floats: dict[str, np.ndarray],
    kinds: Iterator[str],
) -> Path:
    for seed, (name, shape) in enumerate(matrices.items()):
        kind = next(kinds)
        raw = blocks(kind, shape, seed)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=GGMLQuantizationType[kind])
    for name, values in floats.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(path: Path, kinds: tuple[str, ...] = KINDS) -> Path:
    """Two layers, tied embeddings; each next matrix is of the next of `kinds`."""
    writer = _writer(path, "llama")
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    kv = D // HEADS * KV_HEADS
    matrices = {"token_embd": (V, D)}
    floats = {"output_norm.weight": np.ones(D, np.float32)}
    for layer in range(L):
        block = {"attn_q": (D, D), "attn_k": (kv, D), "attn_v": (kv, D), "attn_output": (D, D)}
        block |= {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
        matrices |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        for name in ("attn_norm", "ffn_norm"):
            floats[f"blk.{layer}.{name}.weight"] = np.linspace(0.5, 1.5, D, dtype=np.float32)
    return _finish(writer, path, matrices, floats, cycle(kinds))


def gpt2(path: Path) -> Path:
    """Matrices that Hugging Face has transposed, and q, k and v in one."""
    writer = _writer(path, "gpt2")
    writer.add_layer_norm_eps(1e-5)
    draw = np.random.default_rng(0)

    def vector(size: int) -> np.ndarray:
        return draw.standard_normal(size).astype(np.float32)

    matrices = {"token_embd": (V, D)}
    floats = {"position_embd.weight": vector(128 * D).reshape(128, D)}
    floats |= {"output_norm.weight": vector(D), "output_norm.bias": vector(D)}
    for layer in range(L):
        block = {
            "attn_qkv": (3 * D, D),
            "attn_output": (D, D),
            "ffn_up": (F, D),
            "ffn_down": (D, F),
        }
        for name, shape in block.items():
            matrices[f"blk.{layer}.{name}"] = shape
            floats[f"blk.{layer}.{name}.bias"] = vector(shape[0])
        for name in ("attn_norm", "ffn_norm"):
            floats[f"blk.{layer}.{name}.weight"] = vector(D)
            floats[f"blk.{layer}.{name}.bias"] = vector(D)
    return _finish(writer, path, matrices, floats, cycle(KINDS))
