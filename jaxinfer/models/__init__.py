"""The registry of architectures, by the name a checkpoint's config.json gives them, and `build`.

To add one: a file with `Block`, `rules` and `IGNORED`, and a line here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any, get_args

import flax.linen as nn

from jaxinfer.config import DTypeName, ModelConfig
from jaxinfer.errors import ConfigError
from jaxinfer.models import gemma2, gemma3, gpt2, llama, mistral, qwen2, qwen3
from jaxinfer.models.layers import Decoder, LayerNorm, RMSNorm
from jaxinfer.models.model import Model
from jaxinfer.params import Rule

__all__ = ["ARCHITECTURES", "Architecture", "Model", "build"]


@dataclass(frozen=True)
class Architecture:
    """A kind of decoder: its block, its final norm, its table of weights."""

    block: Callable[..., nn.Module]
    rules: Callable[[ModelConfig], tuple[Rule, ...]]
    ignored: tuple[str, ...]
    norm: Callable[..., nn.Module] = RMSNorm


def _architecture(file: ModuleType, norm: Callable[..., nn.Module] = RMSNorm) -> Architecture:
    return Architecture(file.Block, file.rules, file.IGNORED, norm)


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": _architecture(llama),
        "MistralForCausalLM": _architecture(mistral),
        "Qwen2ForCausalLM": _architecture(qwen2),
        "Qwen3ForCausalLM": _architecture(qwen3),
        "Gemma2ForCausalLM": _architecture(gemma2),
        "Gemma3ForCausalLM": _architecture(gemma3),
        "Gemma3TextForCausalLM": _architecture(gemma3),
        "GPT2LMHeadModel": _architecture(gpt2, LayerNorm),
    }
)


def build(config: ModelConfig, ops: Any, dtype: str, page_dtype: str | None = None) -> Model:
    """The model of `config`, computing in `dtype` ("float32", "bfloat16", "float16") with `ops`.

    Its pages hold `page_dtype`, a name of `pallas_kernels.common.PAGE_DTYPES`; None: `dtype`.
    Raises ConfigError for an architecture or a dtype that is not known.
    """
    if config.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"architecture {config.architecture!r} is not supported; "
            f"known: {', '.join(sorted(ARCHITECTURES))}",
            field="architectures",
        )
    if dtype not in get_args(DTypeName):
        raise ConfigError(
            f"dtype {dtype!r} is not supported; use one of {', '.join(get_args(DTypeName))}",
            field="dtype",
        )
    entry = ARCHITECTURES[config.architecture]
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    return Model(
        config=config,
        ops=ops,
        dtype=dtype,
        page_dtype=page_dtype or dtype,
        rules=entry.rules(config),
        ignored=(*entry.ignored, *tied),
        module=Decoder(config, ops, dtype, entry.block, entry.norm),
    )
