"""Arithmetic over a `Trace`: where the device's time went, how long it waited for the host.

Time is shared: an instant in which k operations of a device run at once counts 1/k for each. So the
times of all operations add up to the time in which the device ran anything, however many threads or
streams it has. A loop or a branch gets an instant only where nothing inside it runs.

A step is a run of the engine's program. The host gap before it is the time since the step before it
in which the device ran nothing at all, unless the engine had no request then (span "wake").
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxinfer.profiling.events import PHASES, WAKE, Operation, Trace, TraceError

NO_SCOPE = "(no scope)"
_COPY = re.compile(r"(\.(\d+|clone|remat\d*))+$")


@dataclass(slots=True)
class Spread:
    """Seconds of several like things."""

    values: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.values)

    def percentile(self, percent: int) -> float:
        """Nearest rank; 0 where there are none."""
        if not self.values:
            return 0.0
        return float(np.percentile(self.values, percent, method="inverted_cdf"))


@dataclass(slots=True)
class Part:
    """The share of one scope or one kind of operation: `time` is shared, `elapsed` is not (but for
    loops and branches, whose duration is that of what they run)."""

    name: str
    scope: tuple[str, ...]
    count: int = 0
    time: float = 0.0
    elapsed: float = 0.0


@dataclass(slots=True)
class Profile:
    """What a trace tells. Seconds; `busy` is the device time that `operations` divide among them.

    `steps` has the duration of each whole step by label, `between` the host gaps before steps,
    `inside` the time in steps in which nothing ran, `phases` the host's seconds by phase.
    """

    trace: Trace
    busy: float
    operations: list[Part]
    scopes: list[Part]
    steps: dict[str, Spread]
    num_cut: int
    between: Spread
    inside: Spread
    period: float
    phases: dict[str, Spread]

    @property
    def num_steps(self) -> int:
        return sum(len(spread.values) for spread in self.steps.values())


def analyse(trace: Trace, bucket: str | None = None) -> Profile:
    """The profile of a trace; `bucket`: of the whole steps with this label alone.

    Raises:
        TraceError: no step has that label.
    """
    operations = trace.operations
    whole = _whole_steps(trace)
    num_cut = sum(run.is_step for run in trace.runs) - len(whole)
    if bucket is not None:
        labels = sorted({trace.runs[i].label for i in whole} - {""})
        whole = [i for i in whole if trace.runs[i].label == bucket]
        if not whole:
            known = ", ".join(map(repr, labels)) or "none"
            raise TraceError(f"no step of bucket {bucket!r} is in {trace.path}; it has {known}")
        chosen = set(whole)
        operations = [op for op in operations if op.run in chosen]
    times = _times_by_device(operations)
    between, inside, period = _gaps(trace, whole)
    steps: dict[str, Spread] = {}
    for run in (trace.runs[i] for i in whole):
        steps.setdefault(run.label, Spread()).values.append(run.end - run.start)
    return Profile(
        trace=trace,
        busy=sum(times),
        operations=_group(operations, times, by_name=True),
        scopes=_group(operations, times, by_name=False),
        steps=dict(sorted(steps.items(), key=lambda kv: -kv[1].total)),
        num_cut=num_cut,
        between=between,
        inside=inside,
        period=period,
        phases=_phases(trace),
    )


def shared_times(operations: Sequence[Operation]) -> list[float]:
    """Seconds of each operation (of one device), shared where several run at once."""
    times = [0.0] * len(operations)
    edges: list[tuple[float, bool, int]] = []
    for i, op in enumerate(operations):
        edges.append((op.start, True, i))
        edges.append((max(op.start, op.end), False, i))
    # At one instant: ends of what began before, then starts, then ends of what took no time.
    edges.sort(key=lambda e: (e[0], e[1] or operations[e[2]].start == e[0], not e[1]))
    clock = last = 0.0  # `clock` runs at 1/k: what one of k running operations gets
    running = 0
    controls: dict[int, None] = {}
    begun = [0.0] * len(operations)
    for at, is_start, i in edges:
        if running:
            clock += (at - last) / running
        elif controls:
            times[next(reversed(controls))] += at - last
        last = at
        if operations[i].control:
            if is_start:
                controls[i] = None
            else:
                controls.pop(i)
        elif is_start:
            running += 1
            begun[i] = clock
        else:
            running -= 1
            times[i] = clock - begun[i]
    return times


def _times_by_device(operations: Sequence[Operation]) -> list[float]:
    times = [0.0] * len(operations)
    devices: dict[str, list[int]] = {}
    for i, op in enumerate(operations):
        devices.setdefault(op.device, []).append(i)
    for indices in devices.values():
        found = shared_times([operations[i] for i in indices])
        for i, seconds in zip(indices, found, strict=True):
            times[i] = seconds
    return times


def _group(operations: Sequence[Operation], times: Sequence[float], *, by_name: bool) -> list[Part]:
    """Sums by scope, or by scope and the operation's name without its number; largest first."""
    parts: dict[tuple[str, tuple[str, ...]], Part] = {}
    for op, seconds in zip(operations, times, strict=True):
        name = _COPY.sub("", op.name) if by_name else ""
        part = parts.setdefault((name, op.scope), Part(name, op.scope))
        part.count += 1
        part.time += seconds
        part.elapsed += seconds if op.control else op.end - op.start
    return sorted(parts.values(), key=lambda part: -part.time)


def _whole_steps(trace: Trace) -> list[int]:
    """Indices of the steps that the trace has from their first operation to their last.

    Cut are one that ran before anything was dispatched in the trace, and one whose tokens the host
    had not yet when the recording ended.
    """
    dispatched = min((s.start for s in trace.spans if s.name == "dispatch"), default=None)
    collected = max((s.end for s in trace.spans if s.name == "wait"), default=None)
    whole = []
    for i, run in enumerate(trace.runs):
        # The end of an operation may be noted a little after the host was told of it.
        late = run.end - 0.1 * (run.end - run.start)
        began = dispatched is None or run.start >= dispatched
        if run.is_step and began and (collected is None or late <= collected):
            whole.append(i)
    return sorted(whole, key=lambda i: (trace.runs[i].device, trace.runs[i].start))


def _gaps(trace: Trace, whole: Sequence[int]) -> tuple[Spread, Spread, float]:
    """(host gap before each step but the first, idle time inside each, time from start to start).

    Only steps that directly follow each other on a device make a gap.
    """
    wakes = sorted(span.start for span in trace.spans if span.name == WAKE)
    between, inside, period = Spread(), Spread(), 0.0
    chosen = set(whole)
    for device in sorted({run.device for run in trace.runs}):
        merged = _merge((op.start, op.end) for op in trace.operations if op.device == device)
        starts = [start for start, _ in merged]
        steps = [i for i, run in enumerate(trace.runs) if run.device == device and run.is_step]
        steps.sort(key=lambda i: trace.runs[i].start)
        for before, i in zip([None, *steps], steps, strict=False):
            run = trace.runs[i]
            if i not in chosen:
                continue
            inside.values.append(_idle(merged, starts, run.start, run.end))
            if before is None:
                continue
            end = trace.runs[before].end
            woken = bisect_left(wakes, min(end, run.start))
            if woken < len(wakes) and wakes[woken] < run.start:
                continue
            between.values.append(_idle(merged, starts, end, run.start))
            period += run.start - trace.runs[before].start
    return between, inside, period


def _merge(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _idle(
    merged: Sequence[tuple[float, float]], starts: Sequence[float], begin: float, end: float
) -> float:
    """Seconds of [begin, end) in none of the disjoint, ordered intervals."""
    if end <= begin:
        return 0.0
    idle = end - begin
    for at in range(max(0, bisect_left(starts, begin) - 1), len(merged)):
        start, stop = merged[at]
        if start >= end:
            break
        idle -= max(0.0, min(stop, end) - max(start, begin))
    return max(0.0, idle)


def _phases(trace: Trace) -> dict[str, Spread]:
    """The host's seconds by phase of the engine, one value each time."""
    phases = {name: Spread() for name in PHASES}
    for span in trace.spans:
        if span.name in phases:
            phases[span.name].values.append(span.seconds)
    return phases
