"""KVPages, the device's page pool, and the memory plan that sizes it before anything is
allocated."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxinfer.config import ModelConfig
from jaxinfer.errors import CapacityError
from jaxinfer.models import Model

GIB = 2**30
PAGE_SIZES = {"cpu": 16, "gpu": 64, "tpu": 128}
"""Tokens in a page by platform, where nothing is said."""
CPU_KV_BYTES = 3 * GIB // 4
"""What the pages may take on a CPU when nothing is said: room for 17,000 tokens of the default
model."""


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class KVPages:
    """All pages: one opaque pytree per layer (pallas_kernels owns its layout, and the scales of
    quantised K and V are in it), and the token ids.

    `tokens[p, i]` is the id whose K/V lie at slot i of page p, so that a row's history (for
    penalties) is read through its page table like its keys, whatever was shared, copied or
    preempted.
    """

    layers: tuple[Any, ...]
    tokens: Int32[Array, "P page_size"]


def allocate(model: Model, num_pages: int, page_size: int) -> KVPages:
    """`num_pages` empty pages, page 0 (the trash page, where padding is written) included."""
    return KVPages(
        layers=model.allocate(num_pages, page_size),
        tokens=jnp.zeros((num_pages, page_size), jnp.int32),
    )


def write_tokens(
    tokens: Int32[Array, "P page_size"], slots: Int32[Array, " T"], new: Int32[Array, " T"]
) -> Int32[Array, "P page_size"]:
    """KVPages.tokens with `new` at flat slots page * page_size + i; slots past the end dropped."""
    size = tokens.shape[1]
    return tokens.at[slots // size, slots % size].set(new, mode="drop")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose, decided before allocation. `limit` is what may be used, None if unknown."""

    weights: int
    pages: int
    activations: int
    sampler: int
    limit: int | None
    num_pages: int
    page_size: int
    page_dtype: str
    max_model_len: int
    max_num_seqs: int

    @property
    def total(self) -> int:
        return self.weights + self.pages + self.activations + self.sampler

    @property
    def num_tokens(self) -> int:
        """Tokens the pool holds; page 0 holds none."""
        return (self.num_pages - 1) * self.page_size

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights),
            (f"KV pages ({self.page_dtype})", self.pages),
            ("activations (estimate)", self.activations),
            ("sampler state", self.sampler),
            ("total", self.total),
        ]
        lines = ["memory plan:"]
        lines += [f"  {name:<24}{_size(size):>12}" for name, size in rows]
        if self.limit is not None:
            lines.append(f"  {'may be used':<24}{_size(self.limit):>12}")
        lines.append(
            f"  {self.num_pages - 1:,} pages of {self.page_size} tokens hold {self.num_tokens:,} "
            f"tokens: {self.num_tokens / self.max_model_len:.1f} requests of {self.max_model_len:,}"
        )
        return "\n".join(lines)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def device_memory(device: Any) -> int | None:
    """Bytes of memory the device lets us use, None where it does not say (CPU)."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats.get("bytes_limit") if stats else None


def _width(config: ModelConfig) -> int:
    """Numbers that a token has at once in a layer."""
    width = config.hidden_size * 4 + config.intermediate_size * 3
    return width + (config.num_heads + 2 * config.num_kv_heads) * config.head_dim * 2


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """What the user said about memory; at most one of the last two is used, num_pages first."""

    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    num_pages: int | None


def make_plan(
    model: Model,
    *,
    request: MemoryRequest,
    device_bytes: int | None,
    page_size: int,
    max_model_len: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_num_rows: int,
    draft: Model | None = None,
) -> MemoryPlan:
    """Size the page pool.

    `num_pages` counts usable pages; one more is added for page 0. Without a size the pool takes
    what `gpu_memory_utilization` of the device leaves after weights, activations and sampler
    state; on a CPU (no limit known) 768 MiB, and never more than max_num_seqs requests of
    max_model_len can use. `max_num_rows` are those of a step, drafted tokens counted. A `draft`
    model has weights, and a page for each of the model's.

    Raises:
        CapacityError: the model alone does not fit, or not one request of the given max_model_len
        does.
    """
    both = [model] if draft is None else [model, draft]
    weights = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree_util.tree_leaves([each.shapes() for each in both])
    )
    activations = _activations(both, max_num_batched_tokens, max_num_rows)
    sampler = (max_num_rows + 1) * model.config.vocab_size * 4
    page_bytes = sum(each.page_bytes(page_size) + page_size * 4 for each in both)
    limit = None if device_bytes is None else int(device_bytes * request.gpu_memory_utilization)
    fixed = weights + activations + sampler
    if limit is not None and fixed >= limit:
        raise CapacityError(
            f"the model needs {_size(fixed)} (weights {_size(weights)}, activations "
            f"{_size(activations)}) but gpu_memory_utilization={request.gpu_memory_utilization} of "
            f"this device is {_size(limit)}; use a smaller model or dtype, lower "
            f"max_num_batched_tokens ({max_num_batched_tokens}), or raise gpu_memory_utilization",
            need=fixed,
            have=limit,
        )
    most = -(-(max_model_len or model.config.max_position) // page_size) * max_num_seqs
    room = None if limit is None else limit - fixed
    usable = _usable_pages(request, room, page_size, page_bytes, most)
    return MemoryPlan(
        weights=weights,
        pages=(usable + 1) * page_bytes,
        activations=activations,
        sampler=sampler,
        limit=limit,
        num_pages=usable + 1,
        page_size=page_size,
        page_dtype=model.page_dtype,
        max_model_len=_fitting_len(model.config, max_model_len, usable, page_size),
        max_num_seqs=max_num_seqs,
    )


def _activations(models: list[Model], num_tokens: int, num_rows: int) -> int:
    """Bytes of a step's, at most: one model runs at a time, the first with the sampler."""
    width = max(_width(model.config) for model in models)
    first = models[0]
    logits = 4 * num_rows * first.config.vocab_size * 4  # logits, scaled, noise, counts
    return num_tokens * width * max(jnp.dtype(first.dtype).itemsize, 4) + logits


def _usable_pages(
    request: MemoryRequest, room: int | None, page_size: int, page_bytes: int, most: int
) -> int:
    """Pages beside page 0: what `request` says, or what fits and is of use (`most`). `room` is what
    the device has for them, None where it does not say."""
    if request.num_pages is not None:
        usable = request.num_pages
    else:
        given = request.kv_cache_memory_bytes
        if given is None:
            given = CPU_KV_BYTES if room is None else room
        usable = min(given // page_bytes - 1, most)
    taken = (usable + 1) * page_bytes
    if room is not None and taken > room:
        raise CapacityError(
            f"{usable + 1} pages need {_size(taken)} but only {_size(room)} are left beside the "
            f"weights; lower num_pages or kv_cache_memory_bytes, or leave both out",
            need=taken,
            have=room,
        )
    if usable < 1:
        raise CapacityError(
            f"no page fits: one page of {page_size} tokens takes {_size(page_bytes)}; raise "
            f"kv_cache_memory_bytes",
            need=2 * page_bytes,
        )
    return usable


def _fitting_len(config: ModelConfig, wanted: int | None, usable: int, page_size: int) -> int:
    """Tokens of the longest sequence that the model and `usable` pages hold. CapacityError where it
    is shorter than `wanted`, the user's max_model_len."""
    fits = min(wanted or config.max_position, usable * page_size)
    if wanted is not None and fits < wanted:
        need = -(-wanted // page_size)
        raise CapacityError(
            f"max_model_len={wanted} needs {need} pages of {page_size} tokens but the pool has "
            f"{usable}; lower max_model_len to {fits} or give the pages more memory",
            need=need,
            have=usable,
        )
    return fits
