"""Qwen3: a Llama with an RMSNorm over the head dimension of q and k (arXiv:2505.09388)."""

import functools
from collections.abc import Callable

import flax.linen as nn

from jaxinfer.config import ModelConfig
from jaxinfer.models import llama
from jaxinfer.params import Rule

IGNORED = llama.IGNORED
Block: Callable[..., nn.Module] = functools.partial(llama.Block, qk_norm=True)


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Llama's weights and the two norms."""
    return (*llama.rules(config), *qk_norm_rules())


def qk_norm_rules(transform=llama.unchanged) -> tuple[Rule, ...]:
    """Rules of the norms of q and k."""
    attn, path = "layers.{l}.self_attn.", "layers_{l}/attn/"
    return (
        llama.norm_rule(attn + "q_norm", path + "q_norm", "head_dim", transform),
        llama.norm_rule(attn + "k_norm", path + "k_norm", "head_dim", transform),
    )
