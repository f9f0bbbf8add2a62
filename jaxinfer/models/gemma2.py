"""Gemma 2: norms before and after each part, windows, soft-capped scores (arXiv:2408.00118).

Norm weights are stored as w and applied as 1 + w; the rules add the one while loading, in float32.
"""

from typing import Any

import flax.linen as nn
import jax

from jaxinfer.config import ModelConfig
from jaxinfer.models import llama
from jaxinfer.models.layers import MLP, Attention, RMSNorm, Rotation
from jaxinfer.params import Rule, plus_one

IGNORED = llama.IGNORED


class Block(nn.Module):
    """One layer: x + norm(attn(norm(x))), then x + norm(mlp(norm(x)))."""

    config: ModelConfig
    ops: Any
    dtype: str
    layer: int
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, pages: Any, table: Rotation | None, ragged: Any):
        config = self.config
        attention = Attention(config, self.ops, self.dtype, self.layer, self.qk_norm, name="attn")
        normed = RMSNorm(config.norm_eps, name="attn_norm")(x)
        attended, pages = attention(normed, pages, table, ragged)
        attended = RMSNorm(config.norm_eps, name="attn_post_norm")(attended)
        with jax.named_scope("residual"):
            x = x + attended
        normed = RMSNorm(config.norm_eps, name="mlp_norm")(x)
        fed = MLP(config, self.ops, self.dtype, name="mlp")(normed)
        fed = RMSNorm(config.norm_eps, name="mlp_post_norm")(fed)
        with jax.named_scope("residual"):
            return x + fed, pages


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Llama's matrices and Gemma's norms."""
    norms = (
        ("layers.{l}.input_layernorm", "layers_{l}/attn_norm"),
        ("layers.{l}.post_attention_layernorm", "layers_{l}/attn_post_norm"),
        ("layers.{l}.pre_feedforward_layernorm", "layers_{l}/mlp_norm"),
        ("layers.{l}.post_feedforward_layernorm", "layers_{l}/mlp_post_norm"),
        ("norm", "norm"),
    )
    return (
        *llama.projection_rules(config),
        *llama.bias_rules(config),
        *(llama.norm_rule(name, path, transform=plus_one) for name, path in norms),
    )
