"""Prompt caching: the pages of a prompt's beginning are found again by requests that share it."""

from collections.abc import Iterator
from statistics import median, quantiles
from typing import Any

from benchmarks import workloads
from benchmarks.techniques.bench import (
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
    ttft,
)
from jaxinfer import LLM

COUNTERS = ("num_prefix_queries", "num_prefix_hits")
MOST_COST = 2
"""Percent that prompt caching may cost where it never helps."""
OFF_IS = "the same engine with enable_prefix_caching=False"


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    off = bench.engine(**bench.usual)
    on = bench.engine(**bench.usual, enable_prefix_caching=True)
    yield shared_prefix(bench, off, on)
    yield no_hits(bench, off, on)
    yield conversations(bench, off, on)


class _Watched:
    """Runs work on an engine with caching and remembers the prefix counters of the last run.

    `empties`: each run begins with an empty cache.
    """

    def __init__(self, llm: LLM, *, empties: bool = True):
        self.llm = llm
        self.empties = empties
        self.queries = self.hits = 0.0

    def __enter__(self) -> "_Watched":
        if self.empties:
            self.llm.reset_prefix_cache()
        self._before = counters(self.llm, *COUNTERS)
        return self

    def __exit__(self, *_: object) -> None:
        after = counters(self.llm, *COUNTERS)
        self.queries, self.hits = (b - a for a, b in zip(self._before, after, strict=True))

    def counted(self) -> Counted:
        computed = self.queries - self.hits
        return Counted(
            f"prompt tokens computed: {self.queries:,.0f} -> {computed:,.0f}; hit rate "
            f"{self.hits / self.queries:.1%}, {self.hits:,.0f} tokens saved",
            self.queries,
            computed,
        )


def shared_prefix(bench: Bench, off: LLM, on: LLM) -> dict[str, Any]:
    """Requests one after another over one system prompt; the first one fills the cache."""
    shared, own, requests = bench.size((600, 32, 5), (40, 4, 3))
    watched = _Watched(on)

    def run(llm: LLM, repeat: int) -> float:
        prefix, *ends = prompts(llm, [shared, *[own] * requests], repeat)
        times = [ttft(generate(llm, [prefix + end], [1])[0]) for end in ends]
        return median(times[1:])

    def run_on(repeat: int) -> float:
        with watched:
            return run(on, repeat)

    measured = bench.compare("prompt-caching-prefix", "ttft_p50_s", lambda i: run(off, i), run_on)
    return make_row(
        "Prompt caching: shared prefix",
        f"{shared} shared and {own} own tokens, {requests} requests one after another",
        off_is=f"{OFF_IS}; TTFT of all but the first, which finds an empty cache",
        literature=Literature(
            "up to 5x throughput with shared prefixes",
            "SGLang, RadixAttention, blog of 2024-01-17",
            (5, 5),
        ),
        counted=watched.counted(),
        measured=measured,
        hit_rate=watched.hits / watched.queries,
        tokens_saved=watched.hits,
    )


def no_hits(bench: Bench, off: LLM, on: LLM) -> dict[str, Any]:
    """Random prompts: what looking up, filling and (as it fills from run to run) evicting costs
    where it never helps."""
    requests, length, new = bench.size((8, 128, 16), (4, 20, 3))
    watched = _Watched(on, empties=False)
    host: dict[int, list[float]] = {id(off): [], id(on): []}

    def run(llm: LLM, repeat: int) -> float:
        asked = prompts(llm, [length] * requests, repeat)
        before = llm.engine.metrics.num_steps
        took = seconds(lambda: generate(llm, asked, [new] * requests))
        done = list(llm.engine.metrics.steps)[before - llm.engine.metrics.num_steps :]
        host[id(llm)].append(sum(step.plan_seconds + step.collect_seconds for step in done))
        return took

    def run_on(repeat: int) -> float:
        with watched:
            return run(on, repeat)

    repeats = 2 * bench.repeats + 1
    measured = bench.compare(
        "prompt-caching-no-hits", "time_s", lambda i: run(off, i), run_on, repeats=repeats
    )
    if watched.hits:
        raise RuntimeError(f"random prompts had {watched.hits} cached tokens")
    cost = 100 * (1 / median(measured.ratios) - 1)
    low, _, high = quantiles(measured.ratios, n=4)
    host_off, host_on = (median(host[id(llm)][1 : 1 + repeats]) for llm in (off, on))
    host_cost = 100 * (host_on - host_off) / median(measured.off)
    return make_row(
        "Prompt caching: no hits",
        f"{requests} random prompts of {length} tokens, {new} out",
        off_is=OFF_IS,
        literature=Literature(
            "under 1 % loss at a hit rate of 0 %", "vLLM V1, blog of 2025-01-27", (0.99, 1)
        ),
        counted=watched.counted(),
        measured=measured,
        cost_percent=cost,
        spread_percent=100 * (high - low),
        host_s_off=host_off,
        host_s_on=host_on,
        host_cost_percent=host_cost,
        target=f"costs under {MOST_COST} %",
        target_met=cost < MOST_COST if 100 * (high - low) < MOST_COST else None,
        remark=f"Cost by time {cost:.2g} %, where the middle half of the ratios spreads over "
        f"{100 * (high - low):.2g} %. By the host's time for planning and committing, "
        f"{1e3 * host_off:.2f} ms -> {1e3 * host_on:.2f} ms a run, it costs {host_cost:.2g} %.",
    )


def conversations(bench: Bench, off: LLM, on: LLM) -> dict[str, Any]:
    """The shared-prefix chat workload: all conversations at once, turn by turn."""
    vocab = on.model.config.vocab_size
    sizes = bench.size(
        {"answer": 16}, {"conversations": 3, "turns": 2, "system": 40, "user": 4, "answer": 3}
    )
    watched = _Watched(on)
    rates: dict[int, list[float]] = {id(off): [], id(on): []}

    def run(llm: LLM, repeat: int) -> float:
        workload = workloads.chat(1 + repeat, vocab=vocab, **sizes)
        times: list[float] = []

        def work() -> None:
            for asks in workload.rounds[: 1 if repeat == WARM_UP else None]:
                outputs = generate(
                    llm, [list(a.prompt) for a in asks], [a.max_tokens for a in asks]
                )
                times.extend(ttft(output) for output in outputs)

        took = seconds(work)
        rates[id(llm)].append(workload.output_tokens / took)
        return median(times)

    def run_on(repeat: int) -> float:
        with watched:
            return run(on, repeat)

    measured = bench.compare("prompt-caching-chat", "ttft_p50_s", lambda i: run(off, i), run_on)
    ratio = median(measured.ratios)
    timed = slice(1, 1 + bench.repeats)  # neither the run that warms up nor one under the tracer
    return make_row(
        "Prompt caching: chat",
        workloads.chat(0, vocab=vocab, **sizes).description,
        off_is=OFF_IS,
        literature=Literature(
            "several times the throughput at high hit rates", "vLLM V1, blog of 2025-01-27"
        ),
        counted=watched.counted(),
        measured=measured,
        output_tok_s_off=median(rates[id(off)][timed]),
        output_tok_s_on=median(rates[id(on)][timed]),
        hit_rate=watched.hits / watched.queries,
        tokens_saved=watched.hits,
        target="TTFT falls at least 4x",
        target_met=ratio >= 4,
    )


TECHNIQUE = Technique(
    "prompt-caching", "TTFT with a shared prefix, cost without hits, the chat workload", measure
)
