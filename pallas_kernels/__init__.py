"""Flash attention, attention over paged KV caches, and quantised matmuls, for JAX: one set of
operations, several implementations of each.

    ops = pallas_kernels.resolve("auto")
    pages = ops.allocate(num_pages, page_size, num_kv_heads, head_dim, "float32")    # one layer
    pages = ops.kv_write(pages, k, v, ragged.slots)
    out = ops.paged_attention(q, pages, ragged, scale=head_dim**-0.5, window=None, soft_cap=None)
    out = ops.flash_attention(q, k, v, causal=True)    # [B, S, N, H]; differentiable
    y = ops.quant_matmul(x, data, scales, zeros, format=Format("int8", activations="int8"))

This package needs jax and numpy only and knows nothing of the engine that calls it. Letters in
shapes: T tokens (flat), S sequences (rows), N query heads, K KV heads, G = N // K, H head dim, P
pages, MP pages per row, C pairs of pages to copy.
"""

from pallas_kernels.common import Spec
from pallas_kernels.dispatch import IMPLEMENTATIONS, Ops, available, resolve
from pallas_kernels.paged_attention import Ragged
from pallas_kernels.quant_matmul import Format

__all__ = ["IMPLEMENTATIONS", "Format", "Ops", "Ragged", "Spec", "available", "resolve"]
