"""Paged attention on Hopper GPUs (Pallas, Mosaic GPU): the two kernels put together.

Rows [0, num_decode) go to `mosaic_gpu_decode`, the tokens of all others to `mosaic_gpu_prefill`;
both read the token-major layout, a page's K or V of one head by one TMA copy.
"""

from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.common import QUANTISED, Spec, Target
from pallas_kernels.mosaic_gpu import missing
from pallas_kernels.paged_attention import Ragged, token_major, validate
from pallas_kernels.paged_attention import copy_pages as copy_pages
from pallas_kernels.paged_attention.mosaic_gpu_decode import DecodeConfig, decode
from pallas_kernels.paged_attention.mosaic_gpu_decode import rule as decode_rule
from pallas_kernels.paged_attention.mosaic_gpu_prefill import PrefillConfig, prefill
from pallas_kernels.paged_attention.mosaic_gpu_prefill import rule as prefill_rule
from pallas_kernels.paged_attention.mosaic_gpu_tiles import Options
from pallas_kernels.paged_attention.token_major import Pages
from pallas_kernels.paged_attention.token_major import page_bytes as page_bytes

HEAD_DIMS = (64, 128, 256)
# Query heads of one KV head: what a decoding warpgroup has registers for, by head_dim.
MOST_GROUPED = {64: 48, 128: 48, 256: 32}
Config = tuple[DecodeConfig, PrefillConfig]


def allocate(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: str, *, target: Target
) -> Pages:
    """Pages of zeros for one layer."""
    return token_major.allocate(num_pages, page_size, num_kv_heads, head_dim, dtype)


def unsupported(spec: Spec | None, target: Target) -> str | None:
    """Why these kernels cannot do `spec` on `target`; None when they can."""
    why_not = missing(target)
    if why_not or spec is None:
        return why_not
    if spec.dtype not in ("bfloat16", "float16"):
        return f"dtype is {spec.dtype}; allowed: bfloat16, float16"
    if spec.page_size is None or spec.page_dtype is None:
        return None
    if spec.page_dtype not in (spec.dtype, *QUANTISED):
        return f"page_dtype is {spec.page_dtype}; allowed: {spec.dtype}, {', '.join(QUANTISED)}"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim is {spec.head_dim}; allowed: {', '.join(map(str, HEAD_DIMS))}"
    if spec.head_dim > 128 and spec.page_dtype in QUANTISED:
        # A computing warpgroup of prefill has no registers left for the scales.
        return f"head_dim is {spec.head_dim}; allowed with {spec.page_dtype} pages: 64, 128"
    # A copy is the rows that page and tile share: eights for TMA, 128 bytes of float32 scales,
    # and few enough for their places to fit into the fetching warpgroup's registers.
    small = (32,) if spec.page_dtype in QUANTISED else (8, 16, 32)
    if spec.page_size not in small and spec.page_size % 64:
        return (
            f"page_size is {spec.page_size}; allowed with {spec.page_dtype} pages: "
            f"{', '.join(map(str, small))} and multiples of 64"
        )
    group, most = spec.num_heads // spec.num_kv_heads, MOST_GROUPED[spec.head_dim]
    if group > most:
        return (
            f"num_heads / num_kv_heads is {group}; "
            f"allowed with head_dim {spec.head_dim}: at most {most}"
        )
    return None


def configs(num_heads: int, pages: Pages, target: Target) -> Config:
    """The block sizes for these shapes: tuned ones, or the kernels' rules.

    The key of the tuned ones: dtype (the pages'), head_dim, num_kv_heads, group, page_size.
    """
    _, page_size, heads, head_dim = pages.data.shape
    group = num_heads // (heads // 2)
    key = {
        "dtype": pages.data.dtype.name,
        "head_dim": head_dim,
        "num_kv_heads": heads // 2,
        "group": group,
        "page_size": page_size,
    }
    itemsize = pages.data.dtype.itemsize

    def tuned(stage: str, kind: Any, default: Any) -> Any:
        found = tuning.lookup(target.device_kind, "paged_attention", stage, **key)
        return default if found is None else kind(**{f.name: found[f.name] for f in fields(kind)})

    return (
        tuned("decode", DecodeConfig, decode_rule(head_dim, itemsize, group)),
        tuned("prefill", PrefillConfig, prefill_rule(head_dim, itemsize)),
    )


def paged_attention(
    q: jax.Array,  # [T, N, H]
    pages: Pages,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    target: Target,
    config: Config | None = None,
) -> jax.Array:  # [T, N, H]
    """See `pallas_kernels.paged_attention` for the contract. `config` overrides the block sizes.

    With fp8 pages the scores are multiplied in float16: |q| must be below 65504.
    """
    page_size, head_dim = pages.data.shape[1], pages.data.shape[3]
    ragged = validate(
        q,
        ragged,
        num_pages=pages.data.shape[0],
        page_size=page_size,
        num_kv_heads=pages.num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    num_tokens, num_heads, _ = q.shape
    spec = Spec(
        num_heads, pages.num_kv_heads, head_dim, page_size, q.dtype.name, pages.data.dtype.name
    )
    why_not = unsupported(spec, target)
    if why_not:
        raise ValueError(why_not)
    decode_config, prefill_config = config or configs(num_heads, pages, target)
    options = Options(scale, window, soft_cap)
    # Decode row i is token i: no row behind the tokens decodes.
    num_rows = min(ragged.page_table.shape[0], num_tokens)
    is_decode = jnp.arange(num_rows, dtype=jnp.int32) < ragged.num_decode
    out = decode(
        q[:num_rows],
        pages,
        ragged.page_table[:num_rows],
        jnp.where(is_decode, ragged.kv_lens[:num_rows], 0),
        options=options,
        config=decode_config,
        target=target,
    )
    if ragged.decode_only:
        return out
    out = jnp.pad(out, ((0, num_tokens - num_rows), (0, 0), (0, 0)))
    return prefill(q, out, pages, ragged, options=options, config=prefill_config, target=target)
