"""A tiny model on disk, complete with tokenizer and chat template, so that tests use LLM as users
do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxinfer import LLM, SamplingParams

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 264
"""256 bytes, three specials, and five rows of the embedding that no token has."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 258,
    "torch_dtype": "float32",
}


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes in the byte-level alphabet's order, then SPECIALS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIALS])
    return tokenizer


def tiny_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, large enough that logits differ by far more than rounding."""
    rng = np.random.default_rng(seed)
    d, f, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    n, k, v = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * 1.5 / columns**0.5).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": rng.standard_normal((v, d)).astype(np.float32),
        "model.norm.weight": rng.uniform(0.5, 1.5, d).astype(np.float32),
        "lm_head.weight": matrix(v, d) * 2,
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}self_attn.q_proj.weight": matrix(n * h, d),
            f"{prefix}self_attn.k_proj.weight": matrix(k * h, d),
            f"{prefix}self_attn.v_proj.weight": matrix(k * h, d),
            f"{prefix}self_attn.o_proj.weight": matrix(d, n * h),
            f"{prefix}mlp.gate_proj.weight": matrix(f, d),
            f"{prefix}mlp.up_proj.weight": matrix(f, d),
            f"{prefix}mlp.down_proj.weight": matrix(d, f),
            f"{prefix}input_layernorm.weight": rng.uniform(0.5, 1.5, d).astype(np.float32),
            f"{prefix}post_attention_layernorm.weight": rng.uniform(0.5, 1.5, d).astype(np.float32),
        }
    return weights


def write_tiny_model(
    folder: Path, *, weights: dict[str, np.ndarray] | None = None, **changes: Any
) -> Path:
    """Write a Llama of a few thousand weights into `folder`; `changes` replace config entries."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**TINY_CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights or tiny_weights(config), folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "chat_template": CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False,
            }
        )
    )
    return folder


ENGINE_DEFAULTS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "page_size": 8,
    "num_pages": 200,
    "compilation_cache_dir": None,
    "verbose": False,
    "kv_cache_dtype": "auto",
}
"""What `tiny_llm` passes to LLM; `--attention-impl` and `--kv-cache-dtype` change it."""

TIES = {"auto": 1e-4, "int8": 2e-2, "fp8": 1e-1}
"""By kv_cache_dtype: scores so close are a tie that rounding may break either way.

Float32 sums in another order differ by about 1e-5 in the tiny model's logits, whose standard
deviation is 3. With 8-bit pages such a difference may carry a number of K or V over a rounding
boundary; that is one step of one number, which moved logits by 1e-4 where it was seen, more in a
short text. The bounds are below what rounding all of K and V does: 0.03 rms with int8, 0.18 with
fp8.
"""


def tiny_llm(folder: Path, **options: Any) -> LLM:
    """An LLM over `write_tiny_model(folder)` with small limits; `options` replace them."""
    return LLM(str(folder), **{**ENGINE_DEFAULTS, **options})


def assert_no_leak(llm: LLM) -> None:
    """Every page is free, or cached and evictable; the scheduler's books agree."""
    scheduler = llm.engine.scheduler
    scheduler.check_invariants()
    assert not llm.engine.has_work
    assert scheduler.pool.num_available + pinned(llm) == scheduler.pool.num_usable


def pinned(llm: LLM) -> int:
    cache = llm.engine.scheduler.cache
    return 0 if cache is None else cache.num_pinned


def greedy(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields})


def draws(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 1, "max_tokens": 8, "ignore_eos": True, **fields})


def one(llm: LLM, prompt, params):
    return llm.generate(prompt, params)[0].outputs[0]
