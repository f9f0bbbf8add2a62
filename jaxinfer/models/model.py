"""`Model`: an architecture with its configuration, kernels and dtype, as pure functions of params.

It holds no weights and no pages; both come in with every call and pages go out again.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.models.layers import unembed
from jaxinfer.params import Rule, expand, flatten, unflatten
from jaxinfer.quant.arrays import QuantArray
from jaxinfer.quant.rounding import quantise
from jaxinfer.quant.schemes import Formats

Params = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """What to compute (`module`), which checkpoint tensors it needs (`rules`) or may leave unused
    (`ignored`, fnmatch patterns). `dtype` is that of matmul weights and activations, `page_dtype`
    what pages hold: `dtype`, or "int8" or "float8_e4m3fn" with scales;
    `formats` says which weights are QuantArrays instead, and how they are quantised.
    """

    config: ModelConfig
    ops: Any
    dtype: str
    page_dtype: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...]
    module: nn.Module
    formats: Formats = ()

    def forward(
        self, params: Params, pages: tuple, tokens: jax.Array, positions: jax.Array, ragged: Any
    ) -> tuple[jax.Array, tuple]:
        """tokens, positions int32 [T] -> (normed hidden states [T, D] in `dtype`, pages)."""
        out: Any = self.module.apply({"params": params}, tokens, positions, pages, ragged)
        return out

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """hidden [R, D] of `forward` -> logits float32 [R, V], soft-capped if the model does so."""
        return unembed(params, hidden, self.config, self.ops)

    def shapes(self) -> Params:
        """The parameter tree with a jax.ShapeDtypeStruct at every leaf, or a QuantArray of them."""
        formats = dict(self.formats)

        def leaf(rule: Rule) -> Any:
            shape = rule.shape(self.config)
            if rule.path in formats:
                return QuantArray.of_shape(shape, rule.contracted, formats[rule.path])
            return jax.ShapeDtypeStruct(shape, jnp.dtype(rule.dtype or self.dtype))

        return unflatten(
            {rule.path: leaf(rule) for rule in expand(self.rules, self.config.num_layers)}
        )

    def axes(self) -> Params:
        """The parameter tree with a tuple of logical axis names at every leaf."""
        return unflatten(
            {rule.path: rule.axes for rule in expand(self.rules, self.config.num_layers)}
        )

    def init_params(self, key: jax.Array) -> Params:
        """Random parameters: N(0, 0.02) matrices, norms one, their biases zero; leaf by leaf.

        A leaf's values depend on `key` and on its path alone. Those that are to be quantised are,
        on the host, from the float32 values.
        """
        leaves = {}
        for path, leaf in flatten(self.shapes()).items():
            if path.endswith("norm/scale"):
                leaves[path] = jnp.ones(leaf.shape, leaf.dtype)
            elif path.endswith("norm/bias"):
                leaves[path] = jnp.zeros(leaf.shape, leaf.dtype)
            else:
                leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
                values = jax.random.normal(leaf_key, leaf.shape, jnp.float32) * jnp.float32(0.02)
                if isinstance(leaf, QuantArray):
                    leaves[path] = jax.device_put(quantise(np.asarray(values), leaf, path))
                else:
                    leaves[path] = values.astype(leaf.dtype)
        return unflatten(leaves)

    def allocate(self, num_pages: int, page_size: int) -> tuple:
        """Zeroed pages of every layer, `page_size` tokens each."""
        config = self.config
        return tuple(
            self.ops.allocate(
                num_pages, page_size, config.num_kv_heads, config.head_dim, self.page_dtype
            )
            for _ in range(config.num_layers)
        )

    def page_bytes(self, page_size: int) -> int:
        """Bytes that one page takes over all layers, scales included."""
        config = self.config
        return config.num_layers * self.ops.page_bytes(
            page_size, config.num_kv_heads, config.head_dim, self.page_dtype
        )
