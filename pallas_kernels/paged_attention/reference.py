"""The slowest obvious paged attention: one token at a time over its row's page table, float32.

Owns the layout `[P, page_size, 2 * K, H]`, K at even and V at odd indices of the third axis. A
bfloat16 pool is copied by every write on CPU under jax 0.10 (its scatter is not in place there).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common import MASKED, dtype_name
from pallas_kernels.paged_attention import Ragged, validate, validate_copy, validate_layout


def allocate(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: str
) -> jax.Array:
    """Pages of zeros for one layer."""
    validate_layout(num_pages, page_size, num_kv_heads, head_dim)
    shape = (num_pages, page_size, 2 * num_kv_heads, head_dim)
    return jnp.zeros(shape, dtype_name(dtype, "dtype"))


def page_bytes(page_size: int, num_kv_heads: int, head_dim: int, dtype: str) -> int:
    """Bytes of one page of one layer."""
    validate_layout(1, page_size, num_kv_heads, head_dim)
    return page_size * 2 * num_kv_heads * head_dim * jnp.dtype(dtype_name(dtype, "dtype")).itemsize


def copy_pages(pages: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
    """Page dst[i] becomes what page src[i] was, for every i."""
    validate_copy(src, dst)
    return pages.at[dst].set(pages.at[src].get(mode="clip"), mode="drop")


def paged_attention(
    q: jax.Array,  # [T, N, H]
    pages: jax.Array,  # [P, page_size, 2 * K, H]
    ragged: Ragged,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:  # [T, N, H]
    """See `pallas_kernels.paged_attention` for the contract."""
    _, page_size, num_heads_2, head_dim = pages.shape
    num_kv_heads = num_heads_2 // 2
    validate(
        q,
        ragged,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    num_tokens, num_heads, _ = q.shape
    num_rows, num_pages_per_row = ragged.page_table.shape
    positions = jnp.arange(num_pages_per_row * page_size, dtype=jnp.int32)

    def one_token(token: jax.Array) -> jax.Array:
        row = jnp.sum(ragged.cu_q_lens <= token, dtype=jnp.int32) - 1
        is_real = (row >= 0) & (row < num_rows)
        row = jnp.clip(row, 0, num_rows - 1)
        q_pos = ragged.kv_lens[row] - ragged.cu_q_lens[row + 1] + token
        visible = is_real & (positions <= q_pos)
        if window is not None:
            visible &= positions > q_pos - window
        kv = pages.at[ragged.page_table[row]].get(mode="clip").astype(jnp.float32)
        kv = jnp.where(visible[:, None, None], kv.reshape(-1, 2 * num_kv_heads, head_dim), 0.0)
        group = num_heads // num_kv_heads
        k, v = jnp.repeat(kv[:, 0::2], group, axis=1), jnp.repeat(kv[:, 1::2], group, axis=1)
        scores = jnp.sum(q[token].astype(jnp.float32) * k, axis=-1) * scale  # [S, N]
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(visible[:, None], scores, MASKED)
        weights = jnp.where(visible[:, None], jnp.exp(scores - jnp.max(scores, axis=0)), 0.0)
        total = jnp.sum(weights, axis=0)
        out = jnp.sum(weights[:, :, None] * v, axis=0)
        return jnp.where(jnp.any(visible), out / total[:, None], 0.0)

    out = jax.lax.map(one_token, jnp.arange(num_tokens, dtype=jnp.int32))
    return out.astype(q.dtype)
