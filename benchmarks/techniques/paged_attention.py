"""Paged attention: memory by pages as sequences grow, not by the longest sequence there may be."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.techniques.bench import (
    RESERVED,
    WARM_UP,
    Bench,
    Counted,
    Literature,
    Technique,
    counters,
    generate,
    make_row,
    prompts,
    seconds,
)
from benchmarks.techniques.simulate import Lengths, serve
from jaxinfer import LLM

FITS = 4
"""Requests whose reserved positions fill the pool."""
PAGE_SIZES = (16, 64, 128)
SOURCE = "vLLM, arXiv 2309.06180 and blog of 2023-06-20"


def chat_lengths(count: int) -> Lengths:
    """Uniform; the means are those of vLLM's ShareGPT runs (blog of 2024-09-05)."""
    rng = np.random.default_rng(5)
    return [(int(rng.integers(2, 403)), int(rng.integers(2, 357))) for _ in range(count)]


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    yield count_waste(bench)
    yield measure_throughput(bench)


def count_waste(bench: Bench) -> dict[str, Any]:
    """The scheduler alone, with every page size: no device has a say in it."""
    lengths = chat_lengths(bench.size(200, 20))
    pool = FITS * RESERVED
    paged = {
        size: serve(lengths, rows=256, num_pages=pool // size, page_size=size, max_len=RESERVED)
        for size in PAGE_SIZES
    }
    size = bench.page_size
    reserved = serve(lengths, rows=FITS, num_pages=pool // size, page_size=size, max_len=RESERVED)
    wasted = reserved.waste_of_reserving(RESERVED)
    ours = paged[size]
    wastes: dict[str, Any] = {f"wasted_page_{s}_percent": 100 * c.waste for s, c in paged.items()}
    return make_row(
        "Paged attention: memory",
        f"{len(lengths)} chat requests (means: 202 tokens in, 179 out), page size {size}",
        off_is=f"each request sets {RESERVED:,} positions aside",
        literature=Literature(
            "60-80 % of the memory wasted before, under 4 % with pages: 2.4-4.8x the tokens fit",
            SOURCE,
            (0.96 / 0.4, 0.96 / 0.2),
        ),
        counted=Counted(
            f"wasted: {wasted:.1%} -> {ours.waste:.1%}; requests in {pool:,} positions: "
            f"{FITS} -> {ours.mean_rows:.1f} on average, {ours.most_rows} at most",
            FITS,
            ours.mean_rows,
            more_is_better=True,
        ),
        target="wasted under 4 %",
        target_met=ours.waste < 0.04,
        wasted_off_percent=100 * wasted,
        **wastes,
    )


def measure_throughput(bench: Bench) -> dict[str, Any]:
    count, longest = bench.size((24, 96), (6, 12))
    rng = np.random.default_rng(7)
    shortest = longest // 12
    lengths = rng.integers(shortest, longest + 1, (count, 2)).tolist()
    total = sum(new for _, new in lengths)
    options = {"requests": FITS, "max_num_batched_tokens": bench.size(128, 32)}
    on = bench.engine(max_num_seqs=bench.size(24, 6), **options)
    off = bench.engine(max_num_seqs=FITS, **options)
    rows: dict[int, int] = {}

    def run(llm: LLM, repeat: int) -> float:
        some = lengths[:FITS] if repeat == WARM_UP else lengths
        asked = prompts(llm, [n for n, _ in some], repeat)
        before = llm.engine.metrics.num_steps
        took = seconds(lambda: generate(llm, asked, [n for _, n in some]))
        done = list(llm.engine.metrics.steps)[before - llm.engine.metrics.num_steps :]
        rows[id(llm)] = max(step.num_rows for step in done)
        return total / took

    measured = bench.compare(
        "paged-attention",
        "output_tok_s",
        lambda i: run(off, i),
        lambda i: run(on, i),
        more_is_better=True,
    )
    size = on.config.page_size
    return make_row(
        "Paged attention: throughput",
        f"{count} requests of {shortest} to {longest} tokens in and out, page size {size}",
        off_is=f"rows are limited to {FITS}: as many as can reserve {RESERVED:,} positions each",
        literature=Literature("2-4x throughput at the same latency", SOURCE, (2, 4)),
        counted=Counted(
            f"most requests at once in {on.memory_plan.pages / 2**20:.0f} MiB of pages: "
            f"{rows[id(off)]} -> {rows[id(on)]}",
            rows[id(off)],
            rows[id(on)],
            more_is_better=True,
        ),
        measured=measured,
        kv_pool_bytes_off=off.memory_plan.pages,
        kv_pool_bytes_on=on.memory_plan.pages,
        max_num_seqs_on=on.config.max_num_seqs,
        preemptions_on=counters(on, "num_preemptions")[0],
    )


TECHNIQUE = Technique(
    "paged-attention", "memory and throughput against 2,048 positions set aside", measure
)
