"""GPT-2: LayerNorm with bias, learned positions, a plain MLP, biases everywhere.

Its checkpoints store matrices [in, out] (Conv1D) and q, k and v fused in one; three rules split it.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.models.layers import MLP, Attention, LayerNorm, Rotation
from jaxinfer.models.llama import matrix_rule
from jaxinfer.params import Rule, Transform, expect, unchanged, vocab_by_embed

# Causal masks that old checkpoints store as buffers.
IGNORED = ("*.attn.bias", "*.attn.masked_bias")


class Block(nn.Module):
    """One layer: x + attn(norm(x)), then x + mlp(norm(x)), with LayerNorm."""

    config: ModelConfig
    ops: Any
    dtype: str
    layer: int

    @nn.compact
    def __call__(self, x: jax.Array, pages: Any, table: Rotation | None, ragged: Any):
        config = self.config
        attention = Attention(config, self.ops, self.dtype, self.layer, name="attn")
        normed = LayerNorm(config.norm_eps, name="attn_norm")(x)
        attended, pages = attention(normed, pages, table, ragged)
        with jax.named_scope("residual"):
            x = x + attended
        normed = LayerNorm(config.norm_eps, name="mlp_norm")(x)
        fed = MLP(config, self.ops, self.dtype, gated=False, name="mlp")(normed)
        with jax.named_scope("residual"):
            return x + fed, pages


def split_weight(array: np.ndarray, config: ModelConfig, *, part: int) -> np.ndarray:
    """Part 0, 1, 2 (q, k, v) of the fused [D, 3*N*H], as [N, H, D]."""
    d, n, h = config.hidden_size, config.num_heads, config.head_dim
    return expect(array, (d, 3 * n * h)).T.reshape(3, n, h, d)[part]


def split_bias(array: np.ndarray, config: ModelConfig, *, part: int) -> np.ndarray:
    """Part 0, 1, 2 (q, k, v) of the fused [3*N*H], as [N, H]."""
    n, h = config.num_heads, config.head_dim
    return expect(array, (3 * n * h,)).reshape(3, n, h)[part]


def out_heads(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Output projection of attention: [N*H, D] -> [D, N, H]."""
    n, h, d = config.num_heads, config.head_dim, config.hidden_size
    return expect(array, (n * h, d)).T.reshape(d, n, h)


def outputs_first(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A matrix of the MLP, which GPT-2 stores with its inputs first."""
    del config
    return array.T


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The weights of a GPT-2."""
    layer = "transformer.h.{l}."
    table = [
        matrix_rule("transformer.wte", "embed", vocab_by_embed, ("vocab", "embed"), (1,)),
        Rule("transformer.wpe.weight", "positions", unchanged, ("position", "embed")),
        matrix_rule(
            layer + "attn.c_proj",
            "layers_{l}/attn/o",
            out_heads,
            ("embed", "heads", "head_dim"),
            (1, 2),
        ),
        Rule(layer + "attn.c_proj.bias", "layers_{l}/attn/o_bias", unchanged, ("embed",)),
        matrix_rule(layer + "mlp.c_fc", "layers_{l}/mlp/up", outputs_first, ("mlp", "embed"), (1,)),
        Rule(layer + "mlp.c_fc.bias", "layers_{l}/mlp/up_bias", unchanged, ("mlp",)),
        matrix_rule(
            layer + "mlp.c_proj", "layers_{l}/mlp/down", outputs_first, ("embed", "mlp"), (1,)
        ),
        Rule(layer + "mlp.c_proj.bias", "layers_{l}/mlp/down_bias", unchanged, ("embed",)),
    ]
    for part, (letter, heads) in enumerate((("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))):
        weight: Transform = functools.partial(split_weight, part=part)
        bias: Transform = functools.partial(split_bias, part=part)
        path = f"layers_{{l}}/attn/{letter}"
        table += [
            matrix_rule(layer + "attn.c_attn", path, weight, (heads, "head_dim", "embed"), (2,)),
            Rule(layer + "attn.c_attn.bias", f"{path}_bias", bias, (heads, "head_dim")),
        ]
    norms = ((layer + "ln_1", "layers_{l}/attn_norm"), (layer + "ln_2", "layers_{l}/mlp_norm"))
    for name, path in (*norms, ("transformer.ln_f", "norm")):
        table += [
            Rule(f"{name}.weight", f"{path}/scale", unchanged, ("norm",), "float32"),
            Rule(f"{name}.bias", f"{path}/bias", unchanged, ("norm",), "float32"),
        ]
    if not config.tie_embeddings:
        table.append(matrix_rule("lm_head", "lm_head", vocab_by_embed, ("vocab", "embed"), (1,)))
    return tuple(table)
