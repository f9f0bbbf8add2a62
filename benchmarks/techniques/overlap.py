"""Overlap: the host plans the next step while the device computes one."""

from collections.abc import Iterator
from typing import Any

from benchmarks.techniques.bench import (
    Bench,
    Literature,
    Technique,
    counters,
    generate,
    make_row,
    prompts,
    seconds,
)
from jaxinfer import LLM


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    rows, length, new = bench.size((8, 16, 64), (4, 4, 6))
    on = bench.engine(**bench.usual)
    off = bench.engine(**bench.usual, async_scheduling=False)

    def run(llm: LLM, repeat: int) -> float:
        asked = prompts(llm, [length] * rows, repeat)
        return rows * new / seconds(lambda: generate(llm, asked, [new] * rows))

    measured = bench.compare(
        "overlap",
        "output_tok_s",
        lambda i: run(off, i),
        lambda i: run(on, i),
        more_is_better=True,
        repeats=2 * bench.repeats + 1,
    )
    yield make_row(
        "Overlap of host and device",
        f"{rows} rows, {length} tokens in and {new} out",
        off_is="async_scheduling=False: the next step is planned when the last one's tokens are "
        "known. On a CPU host and device share the cores, so there is little to hide",
        literature=Literature(
            "1.1x (SGLang 0.4); 5-10 % more throughput (vLLM)",
            "SGLang v0.4 blog; vLLM PR 23569",
            (1.05, 1.1),
        ),
        measured=measured,
        host_s_per_step_on=counters(on, "host_seconds_per_step")[0],
    )


TECHNIQUE = Technique("overlap", "async_scheduling on and off", measure)
