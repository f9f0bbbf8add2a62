"""The least time that a workload can take: weights and K/V read at the memory's rate, products at
the processor's, both as measured in the same run.

    prefill  the products of T = S - C new tokens after C cached ones
    decode   what a step of the mean number of rows over the mean context takes

It is a bound for the work that is asked, not for how an engine goes about it: prompts are computed
once, every row is always full, and with prefix caching a prefix is computed once.
"""

import functools
import json
import subprocess
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.models import ROOT
from benchmarks.roofline import Decoder, Limits
from benchmarks.workloads import Workload


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes and floating-point operations a second; a rate that was not measured is absent."""

    bytes_s: float
    flops: dict[str, float]
    by: dict[str, Any]


def measure(python: str, seconds: float) -> Ceilings:
    """By this Python, in a process of its own. Raises RuntimeError or OSError where that fails."""
    done = subprocess.run(
        [python, "-m", "benchmarks.peers.ceilings", str(seconds)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        flops = {k: found[k] for k in ("float32", "bfloat16", "int8")}
        return Ceilings(found["bytes_s"], flops, found["by"])
    except (ValueError, LookupError):
        said = done.stderr.strip()[-500:] or f"exit status {done.returncode}"
        raise RuntimeError(f"{python} did not measure the ceilings: {said}") from None


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@functools.lru_cache(64)
def cached_lengths(workload: Workload) -> list[int]:
    """Of each prompt in turn, what a perfect prefix cache has of it from the prompts before."""
    lengths: list[int] = []
    seen: list[tuple[int, ...]] = []
    for round_ in workload.rounds:
        for ask in round_:
            longest = max((_common(ask.prompt, old) for old in seen), default=0)
            lengths.append(min(longest, len(ask.prompt) - 1) if workload.prefix_caching else 0)
            seen.append(ask.prompt)
    return lengths


def bound_seconds(
    workload: Workload, decoder: Decoder, ceilings: Ceilings, peak: str
) -> float | None:
    """The least seconds for an engine whose steps cost what `decoder` says and whose products are
    of the number type `peak`; None where its rate is not known."""
    rate = ceilings.flops.get(peak)
    if rate is None:
        return None
    limits = Limits(ceilings.bytes_s, rate)
    asks = [ask for round_ in workload.rounds for ask in round_]
    seconds = 0.0
    for ask, cached in zip(asks, cached_lengths(workload), strict=True):
        seconds += decoder.prefill(1, len(ask.prompt), cached).flops / rate
    for round_ in workload.rounds:
        tokens = sum(ask.max_tokens - 1 for ask in round_)
        if not tokens:
            continue
        rows = min(workload.max_num_seqs, len(round_))
        steps = max(-(-tokens // rows), max(ask.max_tokens for ask in round_) - 1)
        seen = sum((ask.max_tokens - 1) * (len(ask.prompt) + ask.max_tokens / 2) for ask in round_)
        seconds += steps * decoder.decode(tokens / steps, seen / tokens).seconds(limits)
    return seconds
