"""Grouped-query attention: several query heads share the keys and values of one head."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention_cpu import layered, ragged_of
from benchmarks.techniques.bench import (
    Bench,
    Counted,
    Literature,
    Run,
    Technique,
    make_row,
    seconds,
)
from jaxinfer import models, weights
from jaxinfer.config import ModelConfig
from pallas_kernels import resolve
from pallas_kernels.common import Spec
from pallas_kernels.dispatch import Ops

SOURCE = "arithmetic; GQA, arXiv 2305.13245"
CALLS = 4
LAYERS = 4
"""In a chain, each with its own pages, so that caches help no more than inside a model."""


def model_config(bench: Bench) -> ModelConfig:
    with weights.open_model(bench.model_options.get("model"), weights=False) as source:
        return source.config


def ops_for(heads: int, kv_heads: int, width: int, page_size: int, dtype: str) -> Ops:
    """What the engine would choose for such a model."""
    spec = Spec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        page_size=page_size,
        dtype=dtype,
        page_dtype=dtype,
    )
    return resolve("auto", spec=spec)


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    config = model_config(bench)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    size = bench.page_size
    ops = ops_for(config.num_heads, config.num_kv_heads, config.head_dim, size, dtype)
    off, on = (ops.page_bytes(size, heads, 128, dtype) for heads in (64, 8))
    yield make_row(
        "Grouped queries, 64 / 8 heads",
        "cache of 64 query heads on 8 KV heads of 128 (Llama 3 70B)",
        off_is="as many KV heads as query heads",
        literature=Literature("8x less cache with 64 / 8 heads", SOURCE, (8, 8)),
        counted=Counted(
            f"bytes per token and layer: {off // size:,} -> {on // size:,}", off // size, on // size
        ),
    )
    group = config.num_heads // config.num_kv_heads
    mha = dataclasses.replace(config, num_kv_heads=config.num_heads)
    off, on = (models.build(c, ops, dtype).page_bytes(size) // size for c in (mha, config))
    rows, context = bench.size((16, 1024), (4, 64))
    decode = Decode(bench, rows, context, config.head_dim, dtype)
    measured = bench.compare(
        "grouped-queries",
        "time_s",
        decode.run_of(config.num_heads, config.num_heads),
        decode.run_of(config.num_heads, config.num_kv_heads),
        repeats=max(bench.repeats, 7),
    )
    wide = decode.run_of(config.num_heads * group, config.num_heads)
    same_bytes = median(wide(repeat) for repeat in range(4))
    yield make_row(
        f"Grouped queries, {config.num_heads} / {config.num_kv_heads} heads",
        f"this model; decode attention of {rows} rows over {context:,} tokens, one layer",
        off_is=f"{config.num_heads} KV heads instead of {config.num_kv_heads}",
        literature=Literature(
            f"{group}x less cache with {config.num_heads} / {config.num_kv_heads} heads",
            SOURCE,
            (group, group),
        ),
        counted=Counted(f"cache bytes per token: {off:,} -> {on:,}", off, on),
        measured=measured,
        remark=f'The bytes of "off" read in groups of {group} ({group} times the query heads) take '
        f'{1e3 * same_bytes:.3g} ms: what "off" takes above that is not bytes but products with '
        f"a single query per KV head.",
        implementation=ops.name,
        same_bytes_in_groups_s=same_bytes,
    )


@dataclass(frozen=True)
class Decode:
    """Paged attention of a decode step: `rows` rows of `context` tokens."""

    bench: Bench
    rows: int
    context: int
    width: int
    dtype: str

    def run_of(self, heads: int, kv_heads: int) -> Run:
        """Seconds that one layer takes with these heads."""
        page_size = self.bench.page_size
        ops = ops_for(heads, kv_heads, self.width, page_size, self.dtype)
        ragged, num_pages = ragged_of([(1, self.context)] * self.rows, page_size)
        shape = (num_pages * page_size, kv_heads, self.width)
        k, v = jax.random.normal(jax.random.key(1), (2, *shape), jnp.dtype(self.dtype))
        q_shape = (self.rows, heads, self.width)
        q = jax.random.normal(jax.random.key(0), q_shape, jnp.dtype(self.dtype))
        slots = jnp.arange(shape[0], dtype=jnp.int32)
        pools = [
            ops.kv_write(
                ops.allocate(num_pages, page_size, kv_heads, self.width, self.dtype), k, v, slots
            )
            for _ in range(LAYERS)
        ]

        def attend(q, pages, ragged):
            return ops.paged_attention(
                q, pages, ragged, scale=self.width**-0.5, window=None, soft_cap=None
            )

        chain = layered(attend, LAYERS, num_pages)
        jax.block_until_ready(chain(q, pools, ragged))

        def work() -> None:
            for _ in range(CALLS):
                jax.block_until_ready(chain(q, pools, ragged))

        return lambda repeat: seconds(work) / CALLS / LAYERS


TECHNIQUE = Technique(
    "grouped-queries",
    "cache bytes and decode attention against one KV head per query head",
    measure,
)
