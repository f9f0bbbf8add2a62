"""What is measured and at which size: the model's shape, the engine's options, batches, lengths."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import toy
from benchmarks.roofline import Decoder

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests that keep `rows` of the engine busy: tokens in and out of each, and the seconds of
    the window that is measured once all rows decode."""

    rows: int
    inputs: int
    outputs: int
    seconds: float
    least_seconds: float


@dataclass(frozen=True, slots=True)
class Scale:
    """One size of everything.

    `needs` are the new tokens and rows of the steps that the sections run (equal: a decode step),
    most important first; the engine's buckets for them are compiled. `num_pages` is fixed so that
    every process runs the same programs. A decode measurement is `windows` of `steps`.
    """

    name: str
    dtype: str
    engine: dict[str, Any]
    needs: tuple[tuple[int, int], ...]
    context: int
    batches: tuple[int, ...]
    steps: int
    windows: int
    prefills: tuple[tuple[int, int], ...]
    repeats: int
    stream: Stream
    peer_tokens: int
    default_tokens: int
    default_rows: int
    copy_bytes: int
    matmul_size: int
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def decoder(self) -> Decoder:
        return Decoder.of(self.config, self.dtype)

    def memory_bytes(self) -> int:
        """Least that weights and pages take, with a tenth for all else."""
        decoder = self.decoder
        embedding = 0 if self.config["tie_word_embeddings"] else decoder.head_weights
        weights = decoder.block_weights + decoder.head_weights + embedding
        tokens = self.engine["num_pages"] * self.engine["page_size"]
        taken = weights * decoder.weight_bytes + tokens * decoder.bytes_per_token
        return int(taken * 1.1)


FULL = Scale(
    name="Llama-3.1-8B",
    dtype="bfloat16",
    engine={
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "max_model_len": 8448,
        "page_size": 64,
        "num_pages": 8800,  # 256 rows of 1000 in, 1000 out need 8192
    },
    needs=(
        (1024, 1),
        (1, 1),
        (64, 64),
        (8192, 64),
        (256, 256),
        (8192, 8),
        (8192, 256),
        (1255, 256),
        (300, 256),
    ),
    context=1024,
    batches=(1, 64, 256),
    steps=20,
    windows=5,
    prefills=((1, 1024), (1, 8192), (8, 1024)),
    repeats=5,
    stream=Stream(rows=256, inputs=1000, outputs=1000, seconds=30, least_seconds=5),
    peer_tokens=64,
    default_tokens=128,
    default_rows=64,
    copy_bytes=4 << 30,
    matmul_size=8192,
    config=LLAMA_3_1_8B,
)
TOY = Scale(
    name="toy",
    dtype="float32",
    engine={
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "page_size": 16,
        "num_pages": 72,
    },
    needs=((32, 1), (1, 1), (8, 8), (64, 8)),
    context=32,
    batches=(1, 8),
    steps=4,
    windows=2,
    prefills=((1, 32), (2, 32)),
    repeats=2,
    stream=Stream(rows=8, inputs=24, outputs=24, seconds=1, least_seconds=0.2),
    peer_tokens=4,
    default_tokens=8,
    default_rows=8,
    copy_bytes=16 << 20,
    matmul_size=256,
    config=toy.CONFIG,
)


def write_model(scale: Scale, folder: Path) -> Path:
    """A folder with the shape's config.json and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(scale.config))
    return folder


def prompts(scale: Scale, count: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids, the same for every engine; none is special (the vocabulary's end is)."""
    rng = np.random.default_rng([seed, length])
    high = min(scale.config["vocab_size"], 128000)
    return rng.integers(3, high, (count, length)).tolist()
