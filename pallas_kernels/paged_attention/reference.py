"""The slowest obvious paged attention: one token at a time over its row's page table, float32.

A bfloat16 pool is copied by every write on CPU under jax 0.10, an fp8 pool under any jax: their
scatters are not in place there.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common import MASKED, Spec, Target
from pallas_kernels.paged_attention import Ragged, token_major, validate
from pallas_kernels.paged_attention import copy_pages as copy_pages
from pallas_kernels.paged_attention.token_major import Pages
from pallas_kernels.paged_attention.token_major import page_bytes as page_bytes


def allocate(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: str, *, target: Target
) -> Pages:
    """Pages of zeros for one layer."""
    return token_major.allocate(num_pages, page_size, num_kv_heads, head_dim, dtype)


def unsupported(spec: Spec | None, target: Target) -> str | None:
    """Nothing is."""
    return None


@jax.named_scope("paged_reference")
def paged_attention(
    q: jax.Array,  # [T, N, H]
    pages: Pages,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    target: Target,
) -> jax.Array:  # [T, N, H]
    """See `pallas_kernels.paged_attention` for the contract."""
    page_size, head_dim = pages.data.shape[1], pages.data.shape[3]
    num_kv_heads = pages.num_kv_heads
    ragged = validate(
        q,
        ragged,
        num_pages=pages.data.shape[0],
        page_size=page_size,
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
        table = ragged.page_table[row]
        kv = pages.data[table].astype(jnp.float32)  # [MP, page_size, 2 * K, H]
        if pages.scales is not None:
            scales = pages.scales[table]
            kv *= scales.transpose(0, 2, 1)[..., None]
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
