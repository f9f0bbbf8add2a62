"""Every technique, in the order of the table. A new one is a file here and a name in this list."""

from benchmarks.techniques import (
    chunked_prefill,
    continuous_batching,
    flash_attention,
    grouped_queries,
    kv_cache,
    overlap,
    paged_attention,
    prompt_caching,
    speculation,
)
from benchmarks.techniques.bench import Technique

TECHNIQUES: tuple[Technique, ...] = (
    kv_cache.TECHNIQUE,
    paged_attention.TECHNIQUE,
    flash_attention.TECHNIQUE,
    grouped_queries.TECHNIQUE,
    continuous_batching.TECHNIQUE,
    prompt_caching.TECHNIQUE,
    overlap.TECHNIQUE,
    chunked_prefill.TECHNIQUE,
    speculation.TECHNIQUE,
)
