"""The obvious attention: all scores at once, float32. What the others are compared with."""

import jax
import jax.numpy as jnp

from pallas_kernels.common import MASKED, Spec, Target
from pallas_kernels.flash_attention import Mask, Options


def visible(mask: Mask, options: Options, q_len: int, kv_len: int) -> jax.Array:
    """`[B, S, Sk]` bool: which query sees which key."""
    q_pos = mask.q_offset[:, None, None] + jnp.arange(q_len, dtype=jnp.int32)[:, None]
    kv_pos = jnp.arange(kv_len, dtype=jnp.int32)
    seen = jnp.ones((mask.q_offset.shape[0], q_len, kv_len), bool)
    if options.causal:
        seen &= kv_pos <= q_pos
    if options.window is not None:
        seen &= kv_pos > q_pos - options.window
    if mask.q_segments is not None and mask.kv_segments is not None:
        seen &= mask.q_segments[:, :, None] == mask.kv_segments[:, None, :]
    return seen


@jax.named_scope("flash_attention")
def forward(
    q: jax.Array,  # [B, S, N, H]
    k: jax.Array,  # [B, Sk, K, H]
    v: jax.Array,
    mask: Mask,
    options: Options,
    target: Target,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.flash_attention` for the contract."""
    group = q.shape[2] // k.shape[2]
    seen = visible(mask, options, q.shape[1], k.shape[1])[:, None]  # [B, 1, S, Sk]
    k_all, v_all = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))
    scores = jnp.einsum(
        "bsnh,btnh->bnst", q.astype(jnp.float32), k_all, precision=jax.lax.Precision.HIGHEST
    )
    scores *= options.scale
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    scores = jnp.where(seen, scores, MASKED)
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - largest), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = jnp.einsum("bnst,btnh->bsnh", weights / total, v_all, precision=jax.lax.Precision.HIGHEST)
    lse = jnp.where(some, largest + jnp.log(total), MASKED)[..., 0]
    return out.astype(q.dtype), lse


@jax.named_scope("flash_attention_backward")
def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    mask: Mask,
    options: Options,
    target: Target,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """jax's own derivative of `forward`."""
    _, pull = jax.vjp(lambda q, k, v: forward(q, k, v, mask, options, target)[0], q, k, v)
    return pull(dout)


def unsupported(spec: Spec | None, target: Target) -> str | None:
    """Nothing is."""
    return None
