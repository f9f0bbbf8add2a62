"""The text and the JSON document of a `Profile`: what `jaxinfer profile` prints."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxinfer.profiling.analysis import NO_SCOPE, Part, Profile, Spread
from jaxinfer.profiling.events import PHASES

SCHEMA = 1
SMALL = 0.001
"""Scopes of a smaller share of the time are added up in one line."""


def document(profile: Profile) -> dict[str, Any]:
    """Everything as JSON: seconds, counts, shares of the device's busy time (0 to 1).

    {"schema": 1, "trace", "platform", "bucket"?: ..., "device": {"busy_s", "elapsed_s"},
     "steps": {"count", "cut", "period_s", "by_bucket": [{"bucket", "count", "total_s", "p50_s",
     "p99_s"}]}, "host_gap": {"count", "total_s", "share", "p50_s", "p99_s"}, "idle_in_steps": the
     same, "host": [{"phase", "count", "total_s", "p50_s", "p99_s"}], "scopes": [{"scope", "count",
     "time_s", "elapsed_s", "share"}], "operations": the same with "name", "compiles":
     [{"program", "start_s", "seconds", "is_loaded"}], "notes": [str]}
    """
    return {
        "schema": SCHEMA,
        "trace": profile.trace.path,
        "platform": profile.trace.platform,
        "device": {
            "busy_s": profile.busy,
            "elapsed_s": sum(part.elapsed for part in profile.scopes),
        },
        "steps": {
            "count": profile.num_steps,
            "cut": profile.num_cut,
            "period_s": profile.period,
            "by_bucket": [
                {"bucket": label, **_spread(spread)} for label, spread in profile.steps.items()
            ],
        },
        "host_gap": {**_spread(profile.between), "share": _share(profile.between, profile.period)},
        "idle_in_steps": {
            **_spread(profile.inside),
            "share": _share(profile.inside, sum(s.total for s in profile.steps.values())),
        },
        "host": [{"phase": name, **_spread(profile.phases[name])} for name in PHASES],
        "scopes": [_part(part, profile) for part in profile.scopes],
        "operations": [{"name": p.name, **_part(p, profile)} for p in profile.operations],
        "compiles": [
            {
                "program": c.program,
                "start_s": c.start,
                "seconds": c.seconds,
                "is_loaded": c.is_loaded,
            }
            for c in profile.trace.compiles
        ],
        "notes": notes(profile),
    }


def _spread(spread: Spread) -> dict[str, float | int]:
    return {
        "count": len(spread.values),
        "total_s": spread.total,
        "p50_s": spread.percentile(50),
        "p99_s": spread.percentile(99),
    }


def _share(spread: Spread, whole: float) -> float:
    return spread.total / whole if whole else 0.0


def _part(part: Part, profile: Profile) -> dict[str, Any]:
    return {
        "scope": path(part.scope),
        "count": part.count,
        "time_s": part.time,
        "elapsed_s": part.elapsed,
        "share": part.time / profile.busy if profile.busy else 0.0,
    }


def path(scope: Sequence[str]) -> str:
    return "/".join(scope) or NO_SCOPE


def notes(profile: Profile) -> list[str]:
    """What a reader of the numbers must know."""
    found = list(profile.trace.notes)
    if profile.trace.platform == "cpu":
        found.append(
            "On a CPU an operation's time is that from its start to its end on the clock, shared "
            "where several ran at once; how many cores one used is not in a trace."
        )
    if not profile.num_steps:
        found.append("No whole step of the engine is in the trace: no step times and no host gap.")
    if profile.num_cut:
        found.append(
            f"{profile.num_cut} steps ran when the recording began or ended; they count as device "
            f"time but not as steps."
        )
    if profile.trace.compiles:
        found.append("Programs were made while the trace ran: host times include it.")
    return found


def render(profile: Profile, top: int) -> str:
    """The report as text; `top`: how many operations."""
    elapsed = sum(part.elapsed for part in profile.scopes)
    lines = [
        f"{profile.trace.path} ({profile.trace.platform})",
        f"device busy {_time(profile.busy)}, operations' own durations together {_time(elapsed)}",
        *_steps(profile),
        *_host(profile),
        *_compiles(profile),
        "",
        "time by scope",
        *_scopes(profile),
        "",
        f"top {top} operations (layers added up, numbers dropped)",
        *_operations(profile, top),
        "",
        *(f"note: {note}" for note in notes(profile)),
    ]
    return "\n".join(lines).rstrip()


def _steps(profile: Profile) -> list[str]:
    if not profile.num_steps:
        return []
    rows = [["steps", "count", "total", "p50", "p99"]]
    rows += [[label or "step", *_cells(spread)] for label, spread in profile.steps.items()]
    rows.append(["host gap before a step", *_cells(profile.between)])
    rows.append(["idle inside a step", *_cells(profile.inside)])
    share = _share(profile.between, profile.period)
    inside = _share(profile.inside, sum(s.total for s in profile.steps.values()))
    return [
        "",
        *_table(rows),
        f"host gap {share:.2%} of the time from step to step; idle inside {inside:.2%} of the "
        f"steps' time",
    ]


def _host(profile: Profile) -> list[str]:
    rows = [["host, by phase", "count", "total", "p50", "p99"]]
    rows += [[n, *_cells(profile.phases[n])] for n in PHASES if profile.phases[n].values]
    return ["", *_table(rows)] if len(rows) > 1 else []


def _compiles(profile: Profile) -> list[str]:
    made = profile.trace.compiles
    loaded = [c for c in made if c.is_loaded]
    if not made:
        return ["", "compiles: none"]
    total = _time(sum(c.seconds for c in made))
    title = f"compiles: {len(made) - len(loaded)}, loaded from a cache: {len(loaded)}; {total}"
    rows = [
        [c.program or "a program", "loaded" if c.is_loaded else "compiled", _time(c.seconds)]
        for c in made
    ]
    return ["", title, *_table(rows)]


def _scopes(profile: Profile) -> list[str]:
    """The scopes as a tree: a line's time has that of the lines below it."""
    totals: dict[tuple[str, ...], tuple[int, float]] = {}
    for part in profile.scopes:
        scope = part.scope or (NO_SCOPE,)
        for depth in range(1, len(scope) + 1):
            count, seconds = totals.get(scope[:depth], (0, 0.0))
            totals[scope[:depth]] = (count + part.count, seconds + part.time)
    rows = [["scope", "ops", "total", "share"]]
    small = _branch((), totals, profile.busy, rows)
    if small:
        rows.append([f"(below {SMALL:.1%} each)", "", _time(small), _percent(small, profile)])
    return _table(rows)


def _branch(
    parent: tuple[str, ...],
    totals: dict[tuple[str, ...], tuple[int, float]],
    busy: float,
    rows: list[list[str]],
) -> float:
    """Add the lines below `parent`, largest first; seconds of those too small for one."""
    small = 0.0
    depth = len(parent)
    below = [s for s in totals if len(s) == depth + 1 and s[:depth] == parent]
    for scope in sorted(below, key=lambda s: -totals[s][1]):
        count, seconds = totals[scope]
        if seconds < SMALL * busy:
            small += seconds
            continue
        share = f"{seconds / busy:.1%}"
        rows.append(["  " * depth + scope[-1], str(count), _time(seconds), share])
        small += _branch(scope, totals, busy, rows)
    return small


def _operations(profile: Profile, top: int) -> list[str]:
    rows = [["operation", "scope", "count", "total", "each", "share"]]
    for part in profile.operations[:top]:
        rows.append(
            [
                part.name,
                path(part.scope),
                str(part.count),
                _time(part.time),
                _time(part.time / part.count),
                _percent(part.time, profile),
            ]
        )
    return _table(rows, left=2)


def _percent(seconds: float, profile: Profile) -> str:
    return f"{seconds / profile.busy:.1%}" if profile.busy else ""


def _cells(spread: Spread) -> list[str]:
    return [
        str(len(spread.values)),
        _time(spread.total),
        _time(spread.percentile(50)),
        _time(spread.percentile(99)),
    ]


def _time(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            value = seconds / size
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns" if seconds else "0"


def _table(rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Rows as columns; the first `left` flush left, the others flush right."""
    listed = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*listed, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in listed
    ]
