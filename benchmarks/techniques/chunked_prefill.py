"""Chunked prefill: a long prompt is computed in parts, beside the rows that are decoding."""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.report import percentiles
from benchmarks.techniques.bench import (
    Bench,
    Counted,
    Literature,
    Technique,
    greedy,
    make_row,
    prompts,
)
from jaxinfer import LLM
from jaxinfer.sampling_params import RequestOutputKind

LITERATURE = Literature(
    "2.6x the requests within the same latency limits (Mistral 7B, one A100)",
    "Sarathi-Serve, arXiv 2403.02310 (OSDI 2024)",
    (2.6, 2.6),
)


def gaps_beside_a_prompt(
    llm: LLM, rows: int, new: int, long: int, repeat: int
) -> tuple[list[float], float]:
    """(seconds between tokens of the running rows after the long prompt came, its TTFT)."""
    short = prompts(llm, [8] * rows, repeat, 1)
    late = prompts(llm, [long], repeat, 2)[0]
    names = [f"chunked-{repeat}-{i}" for i in range(rows)]
    last: dict[str, float] = {}
    gaps: list[float] = []
    arrived = first = None
    beside = False
    warm = 8  # tokens of each row before the long prompt comes
    made = dict.fromkeys(names, 0)
    for name, prompt in zip(names, short, strict=True):
        params = greedy(warm + new, output_kind=RequestOutputKind.DELTA)
        llm.add_request(name, prompt, params)
    while llm.has_unfinished_requests():
        if arrived is None and min(made.values()) >= warm:
            params = greedy(1, output_kind=RequestOutputKind.DELTA)
            arrived = time.perf_counter()
            llm.add_request(f"chunked-{repeat}-long", late, params)
        outputs = llm.step()
        now = time.perf_counter()
        for output in outputs:
            if output.request_id not in made:
                first = now
                beside = min(made.values()) < warm + new
                continue
            tokens = len(output.outputs[0].token_ids)
            made[output.request_id] += tokens
            if tokens and arrived is not None:
                gaps.append(now - last[output.request_id])
            if tokens:
                last[output.request_id] = now
    if arrived is None or first is None or not beside:
        raise RuntimeError("the long prompt was not served beside the running rows")
    return gaps, first - arrived


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    rows, new, long = bench.size((7, 48, 1500), (3, 12, 100))  # and a row for the prompt
    chunk, whole = bench.size((128, 2048), (32, 128))
    llms = {
        side: bench.engine(**bench.usual | {"max_num_batched_tokens": budget})
        for side, budget in (("off", whole), ("on", chunk))
    }
    worst: dict[str, list[float]] = {"off": [], "on": []}
    firsts: dict[str, list[float]] = {"off": [], "on": []}
    middles: dict[str, list[float]] = {"off": [], "on": []}

    def run(side: str, repeat: int) -> float:
        gaps, first = gaps_beside_a_prompt(llms[side], rows, new, long, repeat)
        worst[side].append(max(gaps))
        firsts[side].append(first)
        of = percentiles(gaps)
        middles[side].append(of["p50"])
        return of["p99"]

    measured = bench.compare(
        "chunked-prefill", "itl_p99_s", lambda i: run("off", i), lambda i: run("on", i)
    )
    steps = -(-long // (chunk - rows))
    timed = slice(1, 1 + bench.repeats)  # neither the run that warms up nor one under the tracer
    details: dict[str, Any] = {
        f"{name}_{side}": median(values[side][timed])
        for name, values in (
            ("itl_max_s", worst),
            ("itl_p50_s", middles),
            ("ttft_of_long_s", firsts),
        )
        for side in ("off", "on")
    }
    yield make_row(
        "Chunked prefill",
        f"a prompt of {long:,} tokens arrives while {rows} rows decode {new} tokens each",
        off_is=f"max_num_batched_tokens={whole:,} takes the prompt whole; on: {chunk}",
        literature=LITERATURE,
        counted=Counted(
            f"prompt tokens in one step: {long:,} -> {chunk - rows} beside {rows} rows "
            f"({steps} steps)",
            long,
            chunk - rows,
        ),
        measured=measured,
        **details,
    )


TECHNIQUE = Technique(
    "chunked-prefill", "ITL p99 of running rows while a long prompt arrives", measure
)
