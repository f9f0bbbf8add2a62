"""Frozen configuration: what a model is (ModelConfig) and how an engine runs it (EngineConfig).

Everything is resolved and validated here, on the host, before a byte of device memory is taken;
what reads a configuration afterwards needs no defaults. Reading files of a given format into a
ModelConfig is `jaxinfer/weights`.
"""

import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxinfer.errors import ConfigError

DTypeName = Literal["float32", "bfloat16", "float16"]
QuantizationName = Literal[
    "int8", "int8_weight_only", "int4", "int4_asymmetric", "fp8",
    "awq", "gptq", "compressed-tensors", "gguf",
]  # fmt: skip
KVCacheDTypeName = Literal["auto", "int8", "fp8", "fp8_e4m3"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base `theta` and frequency scaling ("none", "linear" or Llama 3.1's
    "llama3")."""

    theta: float
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer, fully resolved.

    `windows[l]` is layer l's sliding window in tokens (a query sees itself and the window - 1
    before it), None for full attention. `rope` is None for learned positions; `rope_local` is used
    by layers with a window where it is not None (Gemma 3). `query_scale` multiplies q.k. `dtype` is
    the checkpoint's.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh"]
    tie_embeddings: bool
    query_scale: float
    rope: RopeConfig | None
    windows: tuple[int | None, ...]
    rope_local: RopeConfig | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attn_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embed_scale: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: DTypeName = "float32"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer >= 1; got {value!r}", field=name)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads}): each K/V head serves a group of query heads",
                field="num_kv_heads",
            )
        if self.rope is not None and self.head_dim % 2:
            raise ConfigError(
                f"head_dim must be even for rotary embeddings; got {self.head_dim}",
                field="head_dim",
            )
        for name in ("norm_eps", "query_scale", "embed_scale"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name} must be finite and >= 0; got {value!r}", field=name)
        if len(self.windows) != self.num_layers:
            raise ConfigError(
                f"windows has {len(self.windows)} entries for {self.num_layers} layers",
                field="windows",
            )
        for token in self.eos_token_ids:
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"eos_token_id {token} is outside the vocabulary (0..{self.vocab_size - 1})",
                    field="eos_token_id",
                )


_LATER = {
    "pipeline_parallel_size": "several devices",
    "data_parallel_size": "several devices",
    "enable_lora": "LoRA",
    "logits_processors": "custom logits processors",
    "structured_outputs_config": "structured outputs",
    "cpu_offload_gb": "weight offload",
}
_RENAMED = {
    "block_size": "page_size",
    "spec_method": "speculative_config={'method': ...}",
    "spec_model": "speculative_config={'model': ...}",
    "spec_tokens": "speculative_config={'num_speculative_tokens': ...}",
    "num_gpu_blocks_override": "num_pages",
    "enforce_eager": "nothing: the step is always compiled",
    "trust_remote_code": "nothing: code from a model folder is never run",
}


_SWITCHES = ("skip_tokenizer_init", "enable_prefix_caching", "async_scheduling", "strict")
_SWITCHES += ("quantize_lm_head", "dequantize")
_OPTIONAL = ("max_model_len", "num_pages", "kv_cache_memory_bytes", "max_num_seqs")
_OPTIONAL += ("max_num_batched_tokens", "quantization_group_size")
_TEXTS = ("tokenizer", "revision", "chat_template", "compilation_cache_dir", "attention_impl")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine is set up. Names are vLLM's where it has them; None means "decide for me".

    After `LLM(...)` is made, `llm.config` holds the same fields with every None decided.
    """

    model: str | None = None
    """A safetensors directory, a GGUF file, a Hugging Face hub id; None: the embedded
    SmolLM2-135M."""
    tokenizer: str | None = None
    """Directory or hub id to take the tokenizer from; None: the model's own."""
    skip_tokenizer_init: bool = False
    """Serve token ids only."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights, activations, pages; "auto": the checkpoint's on GPU and TPU, float32 on a CPU."""
    quantization: QuantizationName | None = None
    """Quantise the layers' matrices while they load: "int8" (weights and activations),
    "int8_weight_only", "int4" (symmetric), "int4_asymmetric" (with zero points), "fp8" (e4m3
    weights and activations). Norms, biases, the embedding and the output head stay float. None: as
    the checkpoint is, whose own quantised weights are kept and computed on; "awq", "gptq",
    "compressed-tensors" and "fp8" say the same of a checkpoint of that name. A GGUF file is
    de-quantised unless "gguf" keeps its blocks: they take a fifth to a third of the memory, but on
    a CPU small models are faster in float32."""
    quantization_group_size: int | None = None
    """Weights that share a scale under int4; None: the largest of 128, 64, 32 that divides the
    inputs of every matrix, which is printed."""
    quantize_lm_head: bool = False
    """Quantise the output head too, to 8 bits under int4; where it is tied to the embedding table,
    both."""
    dequantize: bool = False
    """Turn a quantised checkpoint's weights to floats while they load."""
    load_format: Literal["auto", "dummy"] = "auto"
    """"dummy": random weights for a config (no weight file is read), for benchmarks."""
    hf_overrides: dict[str, Any] | None = None
    """Entries that replace those of config.json."""
    revision: str | None = None
    """Hub branch, tag or commit."""
    chat_template: str | None = None
    """Jinja template to use instead of the model's."""
    max_model_len: int | None = None
    """Longest prompt + output in tokens; None: the model's, lowered to what the pages hold."""
    max_num_seqs: int | None = None
    """Most sequences in a step; None: 64 on a CPU, 256 elsewhere."""
    max_num_batched_tokens: int | None = None
    """Most tokens in a step; longer prompts go in chunks. None: 512 on a CPU, 2048 elsewhere."""
    max_num_waiting: int = 65_536
    """Most sequences that may wait for admission."""
    page_size: int | None = None
    """Tokens in a page; None: 16 on a CPU, 64 on a GPU, 128 on a TPU."""
    kv_cache_dtype: KVCacheDTypeName = "auto"
    """What pages hold: "auto": `dtype`; "int8" or "fp8" (e4m3; "fp8_e4m3" is the same), with a
    float32 scale for each token and head: nearly twice the tokens of bfloat16 in equal memory."""
    num_pages: int | None = None
    """Pages in the pool; None: what kv_cache_memory_bytes or the device's memory allows."""
    kv_cache_memory_bytes: int | None = None
    """Bytes for pages; None: what gpu_memory_utilization leaves; 768 MiB on a CPU."""
    gpu_memory_utilization: float = 0.9
    """Share of the device's memory (GPU or TPU) that weights, activations and pages may take."""
    enable_prefix_caching: bool = True
    """Reuse the pages of equal prompt prefixes."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """Who is admitted first: the earliest arrival, or the lowest `priority` number."""
    async_scheduling: bool = True
    """Plan the next step while one is on the device."""
    speculative_config: dict[str, Any] | None = None
    """Draft tokens and verify several in a step, which changes no output: {"method": "ngram",
    "num_speculative_tokens": 4} or {"model": a smaller one, "num_speculative_tokens": 4}; the keys
    are SpeculativeConfig's."""
    max_n: int = 16
    """Most samples per prompt."""
    max_logprobs: int = 20
    """Most log-probs per token; -1: the whole vocabulary."""
    seed: int = 0
    """Decides the draws of requests that have no seed of their own."""
    strict: bool = False
    """Raise if anything is compiled after warm-up."""
    compilation_cache_dir: str | None = "~/.cache/jaxinfer/xla"
    """Where compiled programs are kept for the next start; None: JAX's own setting."""
    attention_impl: Literal["auto", "reference", "xla", "tpu", "mosaic_gpu", "interpret"] = "auto"
    """Which implementation of paged attention; "auto": the Pallas kernel on a TPU and on a Hopper
    GPU where it can serve the model, else "xla". "interpret" is the TPU's kernel, interpreted on a
    CPU: for tests."""
    tensor_parallel_size: int = 1
    """Devices to split each layer over; only 1 for now."""
    verbose: bool | None = None
    """Print the plan, and show progress bars; None: if standard error is a terminal."""

    def __new__(cls, *args: object, **options: object) -> "EngineConfig":
        known = list(cls.__dataclass_fields__)
        for name in options:
            if name in known:
                continue
            if name in _LATER:
                raise ConfigError(
                    f"{name}: {_LATER[name]} is not available yet; leave it out", field=name
                )
            if name in _RENAMED:
                raise ConfigError(f"{name} is not an option here; use {_RENAMED[name]}", field=name)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"LLM has no option {name!r}; {hint}", field=name)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name, low in (
            ("max_model_len", 2),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("num_pages", 1),
            ("kv_cache_memory_bytes", 1),
            ("max_num_waiting", 1),
            ("max_n", 1),
            ("max_logprobs", -1),
            ("seed", -(2**63)),
            ("tensor_parallel_size", 1),
            ("quantization_group_size", 2),
        ):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} must be an integer >= {low}; got {value!r}", field=name)
        for name in _TEXTS:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"{name} must be a text or None; got {value!r}", field=name)
        size = self.page_size
        if type(size) is float or size not in (None, 8, 16, 32, 64, 128, 256):
            raise ConfigError(
                f"page_size must be a power of two in 8..256; got {self.page_size!r}",
                field="page_size",
            )
        self._check_choices()

    def _check_choices(self) -> None:
        for name, choices in (
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("quantization", (None, *get_args(QuantizationName))),
            ("kv_cache_dtype", get_args(KVCacheDTypeName)),
            ("load_format", ("auto", "dummy")),
            ("scheduling_policy", ("fcfs", "priority")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(map(str, choices))}; got "
                    f"{getattr(self, name)!r}",
                    field=name,
                )
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be in (0, 1]; got {share!r}",
                field="gpu_memory_utilization",
            )
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} must be True or False; got {getattr(self, name)!r}", field=name
                )
        if self.verbose is not None and not isinstance(self.verbose, bool):
            raise ConfigError(
                f"verbose must be True, False or None; got {self.verbose!r}", field="verbose"
            )
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size}: several devices are not "
                f"available yet; use 1",
                field="tensor_parallel_size",
            )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How requests share the steps of an engine. All counts are per engine.

    `max_num_seqs` bounds the rows of a step, `max_num_batched_tokens` its new tokens,
    `max_model_len` the tokens of a sequence. `policy` "priority" serves lower `Request.priority`
    first, "fcfs" by arrival alone. A sequence preempted `max_preemptions` times is not chosen again
    while another can be. A sequence that waited while `max_wait_steps` steps admitted others is
    admitted next, whatever its priority. Beyond `max_num_waiting` waiting sequences, `add` refuses.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: Literal["fcfs", "priority"] = "fcfs"
    enable_prefix_caching: bool = True
    max_preemptions: int = 3
    max_wait_steps: int = 1000
    max_num_waiting: int = 65_536

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "max_preemptions",
            "max_wait_steps",
            "max_num_waiting",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer >= 1; got {value!r}", field=name)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): each running sequence needs a token per step",
                field="max_num_batched_tokens",
            )
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(
                f"policy must be 'fcfs' or 'priority'; got {self.policy!r}", field="policy"
            )
