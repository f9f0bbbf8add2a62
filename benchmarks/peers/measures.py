"""From the tokens and times that workers sent to the figures of the report."""

import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.report import percentiles, spread
from benchmarks.workloads import Workload


@dataclass(frozen=True, slots=True)
class Run:
    """One repeat of a workload by one engine. Tokens and times are of its asks, in order; times are
    seconds after their round was submitted."""

    wall: float
    tokens: list[list[int]]
    times: list[list[float]]
    cached_tokens: int | None

    @classmethod
    def of(cls, reply: dict[str, Any]) -> "Run":
        rounds = reply["rounds"]
        return cls(
            wall=sum(round_["wall"] for round_ in rounds),
            tokens=[tokens for round_ in rounds for tokens in round_["tokens"]],
            times=[times for round_ in rounds for times in round_["times"]],
            cached_tokens=reply["cached_tokens"],
        )


def wrong_count(run: Run, workload: Workload) -> str | None:
    """What is wrong with the number of tokens; None where each request has what it asked for."""
    asks = [ask for round_ in workload.rounds for ask in round_]
    if len(run.tokens) != len(asks):
        return f"answered {len(run.tokens)} requests of {len(asks)}"
    for i, (ask, tokens, times) in enumerate(zip(asks, run.tokens, run.times, strict=True)):
        if len(tokens) != ask.max_tokens or len(times) != ask.max_tokens:
            return f"made {len(tokens)} tokens for request {i}, which asked for {ask.max_tokens}"
    return None


def output_rate(run: Run) -> float:
    return sum(map(len, run.tokens)) / run.wall


def is_prefill(workload: Workload) -> bool:
    """Whether it measures prompts alone: one token each."""
    return all(ask.max_tokens == 1 for round_ in workload.rounds for ask in round_)


def rate(run: Run, workload: Workload) -> float:
    """Tokens a second that the workload is about: prompt tokens if it is prefill, else output."""
    return workload.prompt_tokens / run.wall if is_prefill(workload) else output_rate(run)


def latencies(runs: list[Run]) -> dict[str, float]:
    """Percentiles over the requests of all repeats: time to the first token; gaps between tokens,
    pooled; and the mean gap of each request."""
    times = [t for run in runs for t in run.times]
    found = {
        "ttft": [t[0] for t in times],
        "itl": [b - a for t in times for a, b in pairwise(t)],
        "tpot": [(t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1],
    }
    return {
        f"{name}_{percent}_s": value
        for name, values in found.items()
        for percent, value in percentiles(values).items()
    }


def rates(runs: list[Run], workload: Workload) -> dict[str, float]:
    """Median and spread over repeats, under the name of what the workload measures."""
    name = "prefill_tok_s" if is_prefill(workload) else "output_tok_s"
    found = spread([rate(run, workload) for run in runs])
    return {name: found["median"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def agreement(runs: list[Run], reference: list[Run]) -> dict[str, float]:
    """Greedy tokens against the reference's of the same repeats: the share of tokens before a
    request's first difference, and the share of requests without one."""
    same = total = equal = requests = 0
    for run, other in zip(runs, reference, strict=True):
        for ours, theirs in zip(run.tokens, other.tokens, strict=True):
            differs = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            first = next(differs, len(ours))
            same, total = same + first, total + len(ours)
            equal, requests = equal + (first == len(ours)), requests + 1
    return {"agree_tokens": same / total, "agree_requests": equal / requests}


def ratio(ours: list[Run], theirs: list[Run], workload: Workload) -> dict[str, Any]:
    """Of our rate to theirs, repeat by repeat, each pair measured within a minute or so.

    `verdict`: "faster" or "slower" only where every pair says so; "no difference" otherwise.
    """
    pairs = zip(ours, theirs, strict=True)
    found = [rate(a, workload) / rate(b, workload) for a, b in pairs]
    low, high = min(found), max(found)
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
    return {"ratio": statistics.median(found), "low": low, "high": high, "verdict": verdict}
