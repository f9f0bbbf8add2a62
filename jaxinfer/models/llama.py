"""Llama: pre-norm blocks of grouped-query attention and a gated MLP (Llama 2, 3, 3.1, SmolLM2).

Also the base of Mistral (windows), Qwen2 (biases) and Qwen3 (q and k norms), which differ in
configuration, in rules and in `qk_norm` alone.
"""

from typing import Any

import flax.linen as nn
import jax

from jaxinfer.config import ModelConfig
from jaxinfer.models.layers import MLP, Attention, RMSNorm, Rotation
from jaxinfer.params import (
    Rule,
    Transform,
    kv_bias,
    kv_heads,
    mlp_in,
    mlp_out,
    out_heads,
    query_bias,
    query_heads,
    unchanged,
    vocab_by_embed,
)

IGNORED = ("*.rotary_emb.inv_freq",)


class Block(nn.Module):
    """One layer: x + attn(norm(x)), then x + mlp(norm(x))."""

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
        with jax.named_scope("residual"):
            x = x + attended
        normed = RMSNorm(config.norm_eps, name="mlp_norm")(x)
        fed = MLP(config, self.ops, self.dtype, name="mlp")(normed)
        with jax.named_scope("residual"):
            return x + fed, pages


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The weights of a Llama, with the biases and the head that its configuration asks for."""
    norms = (
        norm_rule("layers.{l}.input_layernorm", "layers_{l}/attn_norm"),
        norm_rule("layers.{l}.post_attention_layernorm", "layers_{l}/mlp_norm"),
        norm_rule("norm", "norm"),
    )
    return (*projection_rules(config), *bias_rules(config), *norms)


def norm_rule(name: str, path: str, axis: str = "norm", transform=unchanged) -> Rule:
    """Rule of an RMSNorm's weight."""
    return Rule(f"model.{name}.weight", f"{path}/scale", transform, (axis,), "float32")


def matrix_rule(
    name: str, path: str, transform: Transform, axes: tuple[str, ...], contracted: tuple[int, ...]
) -> Rule:
    """Rule of a matrix that a matmul sums over the axes `contracted` of."""
    return Rule(f"{name}.weight", path, transform, axes, contracted=contracted)


def projection_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Rules of the matrices that Llama and all that follow its names have."""
    attn, mlp = "model.layers.{l}.self_attn.", "model.layers.{l}.mlp."
    table = (
        matrix_rule("model.embed_tokens", "embed", vocab_by_embed, ("vocab", "embed"), (1,)),
        matrix_rule(
            attn + "q_proj", "layers_{l}/attn/q", query_heads, ("heads", "head_dim", "embed"), (2,)
        ),
        matrix_rule(
            attn + "k_proj", "layers_{l}/attn/k", kv_heads, ("kv_heads", "head_dim", "embed"), (2,)
        ),
        matrix_rule(
            attn + "v_proj", "layers_{l}/attn/v", kv_heads, ("kv_heads", "head_dim", "embed"), (2,)
        ),
        matrix_rule(
            attn + "o_proj", "layers_{l}/attn/o", out_heads, ("embed", "heads", "head_dim"), (1, 2)
        ),
        matrix_rule(mlp + "gate_proj", "layers_{l}/mlp/gate", mlp_in, ("mlp", "embed"), (1,)),
        matrix_rule(mlp + "up_proj", "layers_{l}/mlp/up", mlp_in, ("mlp", "embed"), (1,)),
        matrix_rule(mlp + "down_proj", "layers_{l}/mlp/down", mlp_out, ("embed", "mlp"), (1,)),
    )
    if config.tie_embeddings:
        return table
    head = matrix_rule("lm_head", "lm_head", vocab_by_embed, ("vocab", "embed"), (1,))
    return (*table, head)


def bias_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Rules of the biases that the configuration switches on."""
    attn, mlp = "model.layers.{l}.self_attn.", "model.layers.{l}.mlp."
    table: list[Rule] = []
    if config.qkv_bias:
        table += [
            Rule(attn + "q_proj.bias", "layers_{l}/attn/q_bias", query_bias, ("heads", "head_dim")),
            Rule(attn + "k_proj.bias", "layers_{l}/attn/k_bias", kv_bias, ("kv_heads", "head_dim")),
            Rule(attn + "v_proj.bias", "layers_{l}/attn/v_bias", kv_bias, ("kv_heads", "head_dim")),
        ]
    if config.out_bias:
        table.append(Rule(attn + "o_proj.bias", "layers_{l}/attn/o_bias", unchanged, ("embed",)))
    if config.mlp_bias:
        table += [
            Rule(mlp + "gate_proj.bias", "layers_{l}/mlp/gate_bias", unchanged, ("mlp",)),
            Rule(mlp + "up_proj.bias", "layers_{l}/mlp/up_bias", unchanged, ("mlp",)),
            Rule(mlp + "down_proj.bias", "layers_{l}/mlp/down_bias", unchanged, ("embed",)),
        ]
    return tuple(table)
