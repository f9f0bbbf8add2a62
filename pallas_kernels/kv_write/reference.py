"""The write into the token-major layout, which is what the reference keeps its pages in."""

import jax

from pallas_kernels.kv_write import validate
from pallas_kernels.paged_attention import token_major
from pallas_kernels.paged_attention.token_major import Pages


def kv_write(pages: Pages, k: jax.Array, v: jax.Array, slots: jax.Array) -> Pages:
    """See `pallas_kernels.kv_write` for the contract."""
    head_dim = pages.data.shape[-1]
    validate(k, v, slots, num_kv_heads=pages.num_kv_heads, head_dim=head_dim)
    return token_major.write(pages, k, v, slots)
