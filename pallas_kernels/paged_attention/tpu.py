"""Paged attention on TPU chips (Pallas, Mosaic): the pool, and the two kernels put together.

Rows [0, num_decode) go to the decode kernel, the tokens of all others, in tiles, to the prefill
kernel. `tpu_layout` owns the page layout and the copies of pages, `tpu_decode` and `tpu_prefill`
own the kernels and their block sizes. In interpret mode the same kernels run anywhere.
"""

from dataclasses import dataclass, field
from math import prod

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.common import PAGE_DTYPES, Spec, Target, dtype_name
from pallas_kernels.paged_attention import Ragged, validate, validate_layout
from pallas_kernels.paged_attention import copy_pages as copy_pages
from pallas_kernels.paged_attention.tpu_decode import DecodeConfig, Options, decode
from pallas_kernels.paged_attention.tpu_decode import rule as decode_rule
from pallas_kernels.paged_attention.tpu_layout import LANES, SUBLANES, Layout
from pallas_kernels.paged_attention.tpu_prefill import PrefillConfig, prefill
from pallas_kernels.paged_attention.tpu_prefill import rule as prefill_rule

# What a kernel may take of a chip's vector memory, in bytes: 16 MiB on the first, 64 on the rest.
_VMEM = {"TPU v4": 15 << 20}
_VMEM_OTHER = 48 << 20
# Page ids that fit the scalar memory of 1 MiB, with room for the rest that lies there.
_MOST_TABLE_ENTRIES = 240 * 1024

# Interpreted, small blocks cost less, a short row still has several, and each list of tiles is one
# more kernel to compile.
_INTERPRETED = DecodeConfig(64, 3), PrefillConfig(tile=32, small_tile=32, block=64, buffers=2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """One layer's pool; see `tpu_layout`."""

    data: jax.Array  # [P, page_size * R, 128] uint32
    scales: jax.Array | None  # [P, groups, rows, 128] float32
    layout: Layout = field(metadata={"static": True})


def allocate(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
    *,
    target: Target,
) -> Pages:
    """Pages of zeros for one layer."""
    validate_layout(num_pages, page_size, num_kv_heads, head_dim)
    name = dtype_name(dtype, "dtype", PAGE_DTYPES)
    why_not = _unsupported_pages(page_size, name, target)
    if why_not:
        raise ValueError(why_not)
    layout = Layout(page_size, num_kv_heads, head_dim, name)
    scales = None
    if layout.is_quantised:
        scales = jnp.zeros((num_pages, *layout.scales_shape), jnp.float32)
    shape = (num_pages, page_size * layout.token_rows, LANES)
    return Pages(jnp.zeros(shape, jnp.uint32), scales, layout)


def page_bytes(page_size: int, num_kv_heads: int, head_dim: int, dtype: str) -> int:
    """Bytes of one page of one layer, with its padding and its scales."""
    validate_layout(1, page_size, num_kv_heads, head_dim)
    layout = Layout(page_size, num_kv_heads, head_dim, dtype_name(dtype, "dtype", PAGE_DTYPES))
    words = page_size * layout.token_rows * LANES
    if layout.is_quantised:
        words += prod(layout.scales_shape)
    return 4 * words


def unsupported(spec: Spec | None, target: Target) -> str | None:
    """Why this cannot be done on the chip, or in interpret mode, which follows the chip."""
    if spec is None:
        return None
    if spec.dtype == "float16":
        return "dtype is float16; allowed on TPU: float32, bfloat16"
    if spec.page_size is None or spec.page_dtype is None:
        return None
    return _unsupported_pages(spec.page_size, spec.page_dtype, target)


def _unsupported_pages(page_size: int, dtype: str, target: Target) -> str | None:
    if dtype == "float16":
        allowed = ", ".join(name for name in PAGE_DTYPES if name != "float16")
        return f"page dtype is float16; allowed on TPU: {allowed}"
    if page_size % SUBLANES or page_size > 512:
        return f"page_size is {page_size}; it must be a multiple of 8 up to 512 on TPU"
    is_quantised = Layout(page_size, 1, 1, dtype).is_quantised
    if is_quantised and page_size % LANES and not target.interpret:
        return f"page_size is {page_size}; {dtype} pages on TPU need a multiple of 128"
    return None


def paged_attention(
    q: jax.Array,  # [T, N, H]
    pages: Pages,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    target: Target,
    config: tuple[DecodeConfig, PrefillConfig] | None = None,
) -> jax.Array:  # [T, N, H]
    """See `pallas_kernels.paged_attention` for the contract. `config` overrides the block sizes."""
    layout = pages.layout
    ragged = validate(
        q,
        ragged,
        num_pages=pages.data.shape[0],
        page_size=layout.page_size,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    why_not = unsupported(
        Spec(
            num_heads=q.shape[1],
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            page_size=layout.page_size,
            dtype=q.dtype.name,
            page_dtype=layout.dtype,
        ),
        target,
    )
    if why_not:
        raise ValueError(why_not)
    if ragged.page_table.size > _MOST_TABLE_ENTRIES and not target.interpret:
        raise ValueError(
            f"ragged.page_table has shape {ragged.page_table.shape}, {ragged.page_table.size} "
            f"entries; at most {_MOST_TABLE_ENTRIES} fit a TPU's scalar memory: take fewer rows, "
            f"shorter rows or larger pages"
        )
    vmem = _VMEM.get(target.device_kind or "", _VMEM_OTHER)
    decode_config, prefill_config = config or configs(q.shape[1], layout, target)
    is_exact = q.dtype == jnp.float32 or layout.dtype == "float32"
    options = Options(
        float(scale), window, soft_cap, compute_dtype="float32" if is_exact else "bfloat16"
    )
    num_tokens = q.shape[0]
    num_rows = ragged.page_table.shape[0]
    table = ragged.page_table
    is_decoded = jnp.arange(num_rows, dtype=jnp.int32) < ragged.num_decode
    lens = jnp.where(is_decoded, ragged.kv_lens, 0)
    pools = (pages.data, pages.scales)
    rows = _first(q, num_rows)
    out = decode(rows, *pools, table, lens, layout, options, decode_config, vmem, target)
    if ragged.decode_only:
        return out
    out = _first(out, num_tokens)
    return prefill(q, out, *pools, table, ragged, layout, options, prefill_config, vmem, target)


def configs(num_heads: int, layout: Layout, target: Target) -> tuple[DecodeConfig, PrefillConfig]:
    """Block sizes: what was tuned for the chip, else the rule of each kernel."""
    if target.interpret:
        return _INTERPRETED
    key = {
        "dtype": layout.dtype,
        "head_dim": layout.head_dim,
        "num_kv_heads": layout.num_kv_heads,
        "group": num_heads // layout.num_kv_heads,
        "page_size": layout.page_size,
    }
    vmem = _VMEM.get(target.device_kind or "", _VMEM_OTHER)
    for_decode = tuning.lookup(target.device_kind, "paged_attention", "decode", **key)
    for_prefill = tuning.lookup(target.device_kind, "paged_attention", "prefill", **key)
    return (
        DecodeConfig(**for_decode) if for_decode else decode_rule(layout, vmem),
        PrefillConfig(**for_prefill) if for_prefill else prefill_rule(num_heads, layout, vmem),
    )


def _first(x: jax.Array, count: int) -> jax.Array:
    """The first `count` rows of x, with zeros behind where x has fewer."""
    padding = max(0, count - x.shape[0])
    return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))[:count]
