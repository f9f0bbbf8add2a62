"""Counters and per-step statistics of an engine. Host only; bounded whatever it serves."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from jaxinfer.request import Request

HISTORY = 4096
"""Steps and requests that are kept for percentiles."""


@dataclass(slots=True)
class StepStats:
    """One step: its bucket's name, rows, new tokens, pages in use, and host seconds by phase.

    `cached_tokens` are those that its new rows found in the prefix cache, `num_preemptions` the
    sequences that gave way for it. `begun` and `finished` are of time.perf_counter: when its
    planning began, and when the host had its tokens (None: not yet).
    """

    bucket: str
    num_rows: int
    num_tokens: int
    pages_used: int
    plan_seconds: float
    build_seconds: float
    dispatch_seconds: float
    propose_seconds: float = 0.0
    num_draft_tokens: int = 0
    cached_tokens: int = 0
    num_preemptions: int = 0
    begun: float = 0.0
    wait_seconds: float = 0.0
    collect_seconds: float = 0.0
    finished: float | None = None


@dataclass(slots=True)
class Metrics:
    """What `llm.get_metrics()` reports; counts since the engine started."""

    num_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    requests_finished: dict[str, int] = field(default_factory=dict)
    steps: deque[StepStats] = field(default_factory=lambda: deque(maxlen=HISTORY))
    time_to_first_token: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    inter_token_latency: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    last_token_times: dict[Request, float] = field(default_factory=dict)
    """Of requests that have not ended."""

    def note_tokens(self, request: Request, count: int, now: float) -> None:
        """`count` tokens of `request`, 1 or more, were handed to its output: each took its part of
        the time since those before."""
        self.generation_tokens += count
        last = self.last_token_times.get(request)
        if last is None:
            request.metrics.first_token_time = now
            self.time_to_first_token.append(now - request.metrics.arrival_time)
        else:
            self.inter_token_latency.extend([(now - last) / count] * count)
        self.last_token_times[request] = now

    def forget(self, request: Request) -> None:
        """`request` has ended."""
        self.last_token_times.pop(request, None)

    def finished(self, reason: str) -> None:
        """`reason` is one of the four finish reasons, never text of a user."""
        self.requests_finished[reason] = self.requests_finished.get(reason, 0) + 1

    def summary(self) -> dict[str, float | int]:
        """Flat name -> number; times in seconds."""
        numbers: dict[str, float | int] = {
            "num_steps": self.num_steps,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
        }
        for reason, count in sorted(self.requests_finished.items()):
            numbers[f"requests_finished_{reason}"] = count
        for name in ("time_to_first_token", "inter_token_latency"):
            values = list(getattr(self, name))
            for percent in (50, 90, 99) if values else ():
                nearest_rank = np.percentile(values, percent, method="inverted_cdf")
                numbers[f"{name}_p{percent}"] = float(nearest_rank)
        host = [s.plan_seconds + s.propose_seconds + s.build_seconds for s in self.steps]
        if host:
            numbers["host_seconds_per_step"] = sum(host) / len(host)
        return numbers
