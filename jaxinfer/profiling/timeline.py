"""The timeline of an engine's steps, as a Chrome trace (.json) or a picture (.png). Host only.

A Chrome trace opens in Perfetto and chrome://tracing: a slice for each step on the device's track,
one for each phase on the host's, and counters. Format: "Trace Event Format" of the Catapult
project.
"""

import importlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.errors import ConfigError
from jaxinfer.metrics import StepStats

KINDS = (".json", ".png")
COUNTERS = {
    "rows in the batch": "num_rows",
    "new tokens": "num_tokens",
    "drafted tokens among them": "num_draft_tokens",
    "pages in use": "pages_used",
    "tokens found in the prefix cache": "cached_tokens",
    "preemptions": "num_preemptions",
}
"""Counter tracks and the field of StepStats each shows."""
_DEVICE, _HOST = 1, 2


def check(path: str | Path) -> Path:
    """The file that a timeline can be written to as `path`.

    Raises:
        ConfigError: it ends in neither .json nor .png, cannot be written, or is a picture and
        matplotlib is not installed.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in KINDS:
        raise ConfigError(
            f"timeline {file}: the name must end in {' or '.join(KINDS)}; got {file.suffix!r}"
        )
    if file.is_dir():
        raise ConfigError(f"timeline {file} is a folder; name a file")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
        if file.exists():
            file.open("ab").close()
    except OSError as error:
        raise ConfigError(
            f"timeline {file} cannot be written ({error}); name another file"
        ) from None
    if file.suffix.lower() == ".png":
        _figure()
    return file


def write(path: str | Path, steps: Iterable[StepStats]) -> None:
    """Write the timeline of `steps`, oldest first, in the format that the file's ending names.

    Raises:
        ConfigError: see `check`.
    """
    file = check(path)
    kept = list(steps)
    try:
        if file.suffix.lower() == ".json":
            file.write_text(json.dumps(chrome_trace(kept)))
        else:
            _draw(kept).savefig(file, format="png")
    except OSError as error:
        raise ConfigError(
            f"timeline {file} cannot be written ({error}); name another file"
        ) from None


def slices(steps: Sequence[StepStats]) -> list[tuple[float, float] | None]:
    """(start, end) of each step on the device, in seconds since the first began.

    A step starts when it was dispatched or when the one before it ended, whichever was later;
    None where the host has not seen its end.
    """
    zero = steps[0].begun if steps else 0.0
    spans: list[tuple[float, float] | None] = []
    busy_until = float("-inf")
    for step in steps:
        if step.finished is None:
            spans.append(None)
            continue
        sent = step.begun + step.plan_seconds + step.build_seconds + step.dispatch_seconds
        start = min(max(sent, busy_until), step.finished)
        busy_until = step.finished
        spans.append((start - zero, step.finished - zero))
    return spans


def chrome_trace(steps: Sequence[StepStats]) -> dict[str, Any]:
    """The steps as a Chrome trace: microseconds since the first began."""
    events: list[dict[str, Any]] = [
        _named("process_name", 0, "jaxinfer"),
        _named("thread_name", _DEVICE, "steps on the device"),
        _named("thread_name", _HOST, "host"),
    ]
    zero = steps[0].begun if steps else 0.0
    for step, span in zip(steps, slices(steps), strict=True):
        begun = step.begun - zero
        if span is not None:
            details = {title: getattr(step, name) for title, name in COUNTERS.items()}
            events.append(_slice(step.bucket, _DEVICE, span[0], span[1] - span[0], details))
        at = begun
        for phase in ("plan", "propose", "build", "dispatch"):
            seconds = getattr(step, f"{phase}_seconds")
            if phase == "propose" and not seconds:
                continue  # nothing was to be drafted
            events.append(_slice(phase, _HOST, at, seconds))
            at += seconds
        if step.finished is not None:
            end = step.finished - zero
            events.append(_slice("wait", _HOST, end - step.wait_seconds, step.wait_seconds))
            events.append(_slice("collect", _HOST, end, step.collect_seconds))
        for title, name in COUNTERS.items():
            value = {"value": getattr(step, name)}
            events.append({"name": title, "ph": "C", "pid": 0, "ts": begun * 1e6, "args": value})
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 0, "tid": thread, "args": {"name": name}}


def _slice(
    name: str, thread: int, start: float, seconds: float, details: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "X",
        "pid": 0,
        "tid": thread,
        "ts": start * 1e6,
        "dur": seconds * 1e6,
        "args": details or {},
    }


def _figure() -> Any:
    """matplotlib's Figure, which draws without a display."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise ConfigError(
            "a timeline as .png needs matplotlib: pip install matplotlib, or name a .json file"
        ) from None


def _draw(steps: Sequence[StepStats]) -> Any:
    """Step and host time, and each counter, over time."""
    figure = _figure()(figsize=(12, 10), layout="constrained")
    times, *others = figure.subplots(1 + len(COUNTERS), 1, sharex=True)
    zero = steps[0].begun if steps else 0.0
    begun = [step.begun - zero for step in steps]
    spans = [span for span in slices(steps) if span is not None]
    host = [1e3 * _host_seconds(step) for step in steps]
    times.plot([a for a, _ in spans], [1e3 * (b - a) for a, b in spans], ".", label="step")
    times.plot(begun, host, ".", label="host: plan, build, dispatch, collect")
    times.set_ylabel("ms")
    times.legend(loc="upper right")
    times.set_title(f"{len(steps)} steps")
    for axes, (title, name) in zip(others, COUNTERS.items(), strict=True):
        values = [getattr(step, name) for step in steps]
        axes.step(begun, values, where="post")
        axes.set_ylabel(title.replace(" in the ", "\nin the "), fontsize=8)
        axes.set_ylim(0, 1.1 * max([1, *values]))
    others[-1].set_xlabel("seconds since the first step")
    return figure


def _host_seconds(step: StepStats) -> float:
    return step.plan_seconds + step.build_seconds + step.dispatch_seconds + step.collect_seconds
