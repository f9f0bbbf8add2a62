"""The parts of decoders: norms, rotary embedding, attention over pages, MLPs, embedding, logits.

Modules are Flax Linen, used functionally: they hold configuration and no state. Every weight is
obtained in one place, `weight`, and multiplied in one, `quant.einsum`, quantised or not. Matmuls
take operands in the model dtype and accumulate in float32; norms, rotations and logits are computed
in float32. Pages are opaque: only `ops` looks into them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.quant.arrays import einsum, take

Rotation = tuple[jax.Array, jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def weight(module: nn.Module, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """The module's parameter `name`, declared with `shape` and `dtype` where it is not given.

    A given one, an array or a QuantArray, is returned as it is; its shape was checked when it was
    loaded.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, nn.initializers.normal(0.02), shape, jnp.dtype(dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32, cast to x's dtype (arXiv:1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = weight(self, "scale", x.shape[-1:], "float32")
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias over the last axis, in float32, returned in x's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = weight(self, "scale", x.shape[-1:], "float32")
        bias = weight(self, "bias", x.shape[-1:], "float32")
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [H/2], by Hugging Face's operations.

    "linear" divides all by `factor`; "llama3" divides long wavelengths by `factor`, keeps short
    ones and interpolates between (Llama 3.1's published rope scaling).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = (np.float32(1.0) / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.scaling == "none":
        return base
    factor = np.float32(rope.factor)
    if rope.scaling == "linear":
        return base / factor
    wavelength = np.float32(2 * np.pi) / base
    longest = np.float32(rope.original_max_position / rope.low_freq_factor)
    shortest = np.float32(rope.original_max_position / rope.high_freq_factor)
    spread = np.float32(rope.high_freq_factor - rope.low_freq_factor)
    periods = np.float32(rope.original_max_position) / wavelength
    smooth = (periods - np.float32(rope.low_freq_factor)) / spread
    middle = (np.float32(1.0) - smooth) * base / factor + smooth * base
    scaled = np.where(wavelength > longest, base / factor, middle)
    return np.where(wavelength < shortest, base, scaled).astype(np.float32)


def rotation(rope: RopeConfig, head_dim: int, positions: jax.Array) -> Rotation:
    """cos and sin of the angles at positions int32 [T], float32 [T, 1, H/2] each."""
    with jax.named_scope("rope_table"):
        angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(rope, head_dim)
        return jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]


def rotate(x: jax.Array, table: Rotation) -> jax.Array:
    """x [T, N, H] rotated by position, x[i] paired with x[i + H/2] (arXiv:2104.09864)."""
    cos, sin = table
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)  # [T, N, 2, H/2]
    # Not a concatenation of the halves: XLA:CPU does not vectorise one.
    turned = halves * cos[..., None, :] + halves[..., ::-1, :] * jnp.stack([-sin, sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention of new tokens over a layer's pages, which it writes first.

    x [T, D] -> [T, D]. Layer `layer` fixes the window; `qk_norm` puts an RMSNorm over the head
    dimension of q and k before the rotation.
    """

    config: ModelConfig
    ops: Any
    dtype: str
    layer: int
    qk_norm: bool = False

    @nn.nowrap
    def project(self, name: str, x: jax.Array, num_heads: int) -> jax.Array:
        """x [T, D] times weight `name` [N, H, D], with its bias where the model has one."""
        shape = (num_heads, self.config.head_dim)
        w = weight(self, name, (*shape, self.config.hidden_size), self.dtype)
        y = einsum("td,nhd->tnh", x, w, self.ops)
        if self.config.qkv_bias:
            y += weight(self, f"{name}_bias", shape, self.dtype).astype(jnp.float32)
        return y.astype(self.dtype)

    @nn.compact
    def __call__(self, x: jax.Array, pages: Any, table: Rotation | None, ragged: Any):
        config = self.config
        with jax.named_scope("qkv"):
            q = self.project("q", x, config.num_heads)
            k = self.project("k", x, config.num_kv_heads)
            v = self.project("v", x, config.num_kv_heads)
        if self.qk_norm:
            q = RMSNorm(config.norm_eps, name="q_norm")(q)
            k = RMSNorm(config.norm_eps, name="k_norm")(k)
        if table is not None:
            with jax.named_scope("rope"):
                q, k = rotate(q, table), rotate(k, table)
        with jax.named_scope("kv_write"):
            pages = self.ops.kv_write(pages, k, v, ragged.slots)
        with jax.named_scope("attention"):
            attended = self.ops.paged_attention(
                q,
                pages,
                ragged,
                scale=config.query_scale,
                window=config.windows[self.layer],
                soft_cap=config.attn_soft_cap,
            )
        with jax.named_scope("out"):
            shape = (config.hidden_size, config.num_heads, config.head_dim)
            o = weight(self, "o", shape, self.dtype)
            y = einsum("tnh,dnh->td", attended, o, self.ops)
            if config.out_bias:
                bias = weight(self, "o_bias", (config.hidden_size,), self.dtype)
                y += bias.astype(jnp.float32)
            return y.astype(self.dtype), pages


class MLP(nn.Module):
    """x [T, D] -> [T, D]: down(act(gate(x)) * up(x)) where `gated`, else down(act(up(x)))."""

    config: ModelConfig
    ops: Any
    dtype: str
    gated: bool = True

    @nn.nowrap
    def project(self, name: str, x: jax.Array, num_outputs: int) -> jax.Array:
        """x times weight `name` [outputs, inputs], with its bias where there is one; float32."""
        with jax.named_scope(name):
            w = weight(self, name, (num_outputs, x.shape[1]), self.dtype)
            y = einsum("ti,oi->to", x, w, self.ops)
            if self.config.mlp_bias:
                y += weight(self, f"{name}_bias", (num_outputs,), self.dtype).astype(jnp.float32)
            return y

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        activation = ACTIVATIONS[self.config.activation]
        up = self.project("up", x, f)
        gate = self.project("gate", x, f) if self.gated else None
        with jax.named_scope("activation"):
            inner = activation(up) if gate is None else activation(gate) * up
        return self.project("down", inner.astype(self.dtype), d).astype(self.dtype)


@partial(jax.jit, static_argnums=0)
def _layer(block: nn.Module, weights: Any, x: jax.Array, pages: Any, table: Any, ragged: Any):
    """One layer, traced and lowered once for all that differ in their weights alone.

    XLA inlines the calls before anything else, so what runs is the same; without this, tracing
    takes longer than loading the program from the compile cache.
    """
    return block.apply({"params": weights}, x, pages, table, ragged)


@partial(jax.jit, static_argnums=0)
def observed(
    block: nn.Module, weights: Any, x: jax.Array, pages: Any, table: Any, ragged: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer over x [T, D]: what it gives [T, D], and what each of its norms does, by name."""

    def is_norm(module: nn.Module, method: str) -> bool:
        return isinstance(module, RMSNorm | LayerNorm) and method == "__call__"

    (x, _), state = block.apply(
        {"params": weights},
        x,
        pages,
        table,
        ragged,
        capture_intermediates=is_norm,
        mutable=["intermediates"],
    )
    intermediates: Any = state["intermediates"]
    given = intermediates.items()
    return x, {name: calls["__call__"][0] for name, calls in given if "__call__" in calls}


class Decoder(nn.Module):
    """A decoder-only transformer: tokens, positions int32 [T] and pages -> hidden [T, D] and pages.

    `block(config, ops, dtype, layer)` makes a layer, `norm(eps)` the final norm. A Python loop over
    layers: a scan would slice (copy) stacked weights at every layer on CPU and GPU. Token ids and
    positions of padding may hold anything; they are clipped.
    """

    config: ModelConfig
    ops: Any
    dtype: str
    block: Callable[..., nn.Module]
    norm: Callable[..., nn.Module] = RMSNorm

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, pages: tuple, ragged: Any):
        config = self.config
        with jax.named_scope("embed"):
            x = self.embed(tokens, positions)
        ropes = [self.rope_of(layer) for layer in range(config.num_layers)]
        tables: dict[RopeConfig | None, Rotation | None] = {None: None}
        for rope in dict.fromkeys(ropes):
            if rope is not None:
                tables[rope] = rotation(rope, config.head_dim, positions)
        written = []
        for layer in range(config.num_layers):
            name = f"layers_{layer}"
            table = tables[ropes[layer]]
            if self.is_initializing():
                block = self.block(config, self.ops, self.dtype, layer, name=name)
                x, layer_pages = block(x, pages[layer], table, ragged)
            else:
                # The first layer of its kind stands for all of them: they share its trace.
                like = config.windows.index(config.windows[layer])
                block = self.block(config, self.ops, self.dtype, like, parent=None, name="layers")
                weights = self.variables["params"][name]
                x, layer_pages = _layer(block, weights, x, pages[layer], table, ragged)
            written.append(layer_pages)
        return self.norm(config.norm_eps, name="norm")(x), tuple(written)

    @nn.nowrap
    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of a layer; the local one, if any, where the layer has a window."""
        if self.config.windows[layer] is not None and self.config.rope_local is not None:
            return self.config.rope_local
        return self.config.rope

    @nn.nowrap
    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Rows of the table, scaled; with learned positions added where there is no rotation."""
        config = self.config
        table = weight(self, "embed", (config.vocab_size, config.hidden_size), self.dtype)
        x = take(table, tokens, self.dtype)
        if config.embed_scale != 1.0:
            x = x * jnp.asarray(config.embed_scale, self.dtype)
        if config.rope is None:
            shape = (config.max_position, config.hidden_size)
            learned = weight(self, "positions", shape, self.dtype)
            x = x + jnp.take(learned, positions, axis=0, mode="clip")
        return x


def unembed(params: dict[str, Any], hidden: jax.Array, config: ModelConfig, ops: Any) -> jax.Array:
    """hidden [R, D] -> logits float32 [R, V], by the tied embedding or `lm_head`, soft-capped."""
    with jax.named_scope("logits"):
        head = params["embed" if config.tie_embeddings else "lm_head"]
        logits = einsum("rd,vd->rv", hidden, head, ops)
        if config.final_soft_cap is not None:
            cap = jnp.float32(config.final_soft_cap)
            logits = cap * jnp.tanh(logits / cap)
        return logits
