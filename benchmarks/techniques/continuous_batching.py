"""Continuous batching: a row that ends makes place at once, not when its whole group has ended."""

from collections.abc import Iterator
from typing import Any

from benchmarks.techniques.bench import (
    RESERVED,
    WARM_UP,
    Bench,
    Counted,
    Literature,
    Technique,
    generate,
    make_row,
    prompts,
    seconds,
)
from benchmarks.techniques.simulate import serve
from jaxinfer import LLM

SLOTS = 4
PROMPT = 8
SHORT, LONG = 20, 200
STEP = 0.05
LITERATURE = Literature(
    "100 requests, 50 of 20 and 50 of 200 tokens, 4 slots, 50 ms a step: 250 s -> 137.5 s, 1.8x",
    "arithmetic: 25 groups x 200 steps against 11,000 tokens / 4 rows; Orca, OSDI 2022",
    (250 / 137.5, 250 / 137.5),
)


def new_tokens(requests: int, short: int, long: int) -> list[int]:
    """Short and long ones by turns: every group of static batching has a long one."""
    return [short if i % 2 == 0 else long for i in range(requests)]


def steps_of(lengths: list[int], group: int) -> int:
    """Steps of the scheduler where `group` requests are submitted at a time."""
    pages = SLOTS * RESERVED // 16
    return sum(
        serve(
            [(PROMPT, n) for n in lengths[at : at + group]],
            rows=SLOTS,
            num_pages=pages,
            page_size=16,
            max_len=RESERVED,
        ).num_steps
        for at in range(0, len(lengths), group)
    )


def run(llm: LLM, lengths: list[int], group: int, repeat: int) -> float:
    """Seconds to serve all, `group` submitted at a time, the next when all of them have ended."""
    asked = prompts(llm, [PROMPT] * len(lengths), repeat)

    def work() -> None:
        for at in range(0, len(lengths), group):
            generate(llm, asked[at : at + group], lengths[at : at + group])

    return seconds(work)


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    whole = new_tokens(100, SHORT, LONG)
    counted = {"off": steps_of(whole, SLOTS), "on": steps_of(whole, len(whole))}
    # A fifth of the requests and half of their tokens: the same proportions in a tenth of the time.
    lengths = bench.size(new_tokens(20, SHORT // 2, LONG // 2), new_tokens(8, 2, 8))
    llm = bench.engine(
        requests=SLOTS, max_num_seqs=SLOTS, max_num_batched_tokens=bench.size(128, 32)
    )
    steps: dict[str, int] = {}

    def timed(side: str, group: int, repeat: int) -> float:
        before = llm.engine.metrics.num_steps
        took = run(llm, lengths[:SLOTS] if repeat == WARM_UP else lengths, group, repeat)
        steps[side] = llm.engine.metrics.num_steps - before
        return took

    measured = bench.compare(
        "continuous-batching",
        "time_s",
        lambda i: timed("off", SLOTS, i),
        lambda i: timed("on", len(lengths), i),
    )
    yield make_row(
        "Continuous batching",
        f"{len(lengths)} requests, half of {min(lengths)} and half of {max(lengths)} tokens, "
        f"{SLOTS} slots",
        off_is=f"static batching: {SLOTS} requests are submitted, the next when all have ended",
        literature=LITERATURE,
        counted=Counted(
            f"steps of the 100 requests: {counted['off']:,} -> {counted['on']:,}; "
            f"{counted['off'] * STEP:.1f} s -> {counted['on'] * STEP:.1f} s at 50 ms; "
            f"of the {len(lengths)} measured: {steps['off']:,} -> {steps['on']:,}",
            counted["off"],
            counted["on"],
        ),
        measured=measured,
        steps_off=steps["off"],
        steps_on=steps["on"],
        step_ratio=steps["off"] / steps["on"],
    )


TECHNIQUE = Technique(
    "continuous-batching", "requests of 20 and 200 tokens in 4 slots against groups of 4", measure
)
