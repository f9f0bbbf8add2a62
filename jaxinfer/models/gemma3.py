"""Gemma 3 (text): Gemma 2's block with norms on q and k, two rotary bases (arXiv:2503.19786).

Layers with a window rotate by `ModelConfig.rope_local`, the others by `rope`, which may be scaled.
"""

import functools
from collections.abc import Callable

import flax.linen as nn

from jaxinfer.config import ModelConfig
from jaxinfer.models import gemma2, qwen3
from jaxinfer.params import Rule, plus_one

IGNORED = gemma2.IGNORED
Block: Callable[..., nn.Module] = functools.partial(gemma2.Block, qk_norm=True)


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Gemma 2's weights and the norms of q and k, which are stored less one as well."""
    return (*gemma2.rules(config), *qwen3.qk_norm_rules(plus_one))
