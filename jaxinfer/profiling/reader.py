"""Reads the trace that XLA's profiler wrote (`*.xplane.pb`) into a `Trace`.

The file is an XSpace: planes of lines of events (tsl/profiler/protobuf/xplane.proto). Where what we
want lies:

    CPU   plane "/host:CPU": operations are events with a stat hlo_op, on the lines of whichever
          threads ran them; "end: NAME" tells when one that went on elsewhere was done, or later:
          the thread that finishes it may first run all that waited for it
    GPU   planes "/device:GPU:n": kernels on the lines "Stream #n(...)", each with hlo_op and
          correlation_id, by which the launch is found on the host
    TPU   planes "/device:TPU:n": lines "XLA Ops" (named by the instruction's text) and
          "XLA Modules" (one event a run)
    all   plane "/host:metadata": the compiled programs, which know each operation's scope;
          plane "/host:CPU": annotations, compiles

What lines a plane has decides how it is read, so a GPU trace with XLA's derived lines works too.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

from jaxinfer.profiling import hlo, wire
from jaxinfer.profiling.devices import read_accelerator, stats_of
from jaxinfer.profiling.events import (
    COMPILE,
    PHASES,
    WAKE,
    Compile,
    Operation,
    Run,
    Span,
    Trace,
    TraceError,
)
from jaxinfer.profiling.programs import Programs

HOST = "/host:"
METADATA = "/host:metadata"
_XLA_COMPILE = "backend_compile_and_load"
"""What JAX calls a compilation, whatever the backend; not there where it loads a program."""
_SPANS = frozenset({WAKE, COMPILE, *PHASES})
_END = "end: "
_REGION = "ThreadpoolListener::StartRegion"
"""A thread of XLA's pool begins a piece of work."""
_EXECUTE = "ThunkExecutor::Execute"
"""A thread runs operations of a program: from its start, or what waited for one that is done."""
_QUIET = ("ThreadpoolListener", _END)


def newest(place: str | Path) -> Path:
    """The newest `*.xplane.pb` under the folder `place`, or `place` itself where it is a file.

    Raises:
        TraceError: nothing is there, or no trace.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise TraceError(
            f"{path} does not exist; name the folder that was given to --profile, or a .xplane.pb"
        )
    found = sorted(path.rglob("*.xplane.pb"), key=lambda p: (p.stat().st_mtime_ns, str(p)))
    if not found:
        raise TraceError(
            f"{path} holds no trace (*.xplane.pb); record one with: jaxinfer generate --profile "
            f"{path} PROMPT"
        )
    return found[-1]


def load(place: str | Path) -> Trace:
    """Read the newest trace under `place` (see `newest`).

    Raises:
        TraceError: there is none; it is not a whole trace; or no operation of a device is in it.
    """
    path = newest(place)
    try:
        with warnings.catch_warnings():
            # Of a type that jaxlib makes when it is first used, on Python 3.12 and newer. As an
            # error it would end the process.
            warnings.filterwarnings("ignore", "builtin type .* has no __module__")
            trace = _read(str(path), path.read_bytes())
    except wire.WireError as error:
        raise TraceError(
            f"{path} is not a whole trace ({error}); was the run that wrote it cut short?"
        ) from None
    except OSError as error:
        raise TraceError(f"{path} cannot be read ({error})") from None
    if not trace.operations:
        raise TraceError(
            f"{path} has no operation of a device in it, only what the host did: nothing ran while "
            f"it was recorded, or the profiler had no access to the device"
        )
    return trace


def _read(path: str, data: bytes) -> Trace:
    """Raises WireError where `data` is not a whole trace."""
    try:
        profile = ProfileData.from_serialized_xspace(data)
    except RuntimeError as error:
        raise wire.WireError(str(error)) from None
    trace = Trace(path, "cpu")
    host = _Host()
    planes = list(profile.planes)
    for plane in planes:
        if plane.name.startswith(HOST) and plane.name != METADATA:
            _read_host(plane, trace, host)
    for plane in planes:
        read_accelerator(plane, trace, host.launches)
    _read_compiles(trace, host)
    if trace.platform != "cpu":
        _drop_cpu(trace)
    trace.operations.sort(key=lambda op: op.start)
    _find_scopes(trace, Programs(memoryview(data), METADATA))
    _label_runs(trace)
    return trace


def _drop_cpu(trace: Trace) -> None:
    """Leave out what the host computed beside an accelerator: it is not the device's time."""
    kept = [i for i, run in enumerate(trace.runs) if not run.device.startswith("cpu")]
    now = {before: after for after, before in enumerate(kept)}
    trace.runs = [trace.runs[i] for i in kept]
    trace.operations = [op for op in trace.operations if not op.device.startswith("cpu")]
    for op in trace.operations:
        op.run = None if op.run is None else now[op.run]


def _find_scopes(trace: Trace, programs: Programs) -> None:
    """Fill in what the compiled programs know of each operation."""
    names: dict[tuple[Any, str], set[str]] = {}
    for op in trace.operations:
        names.setdefault((op.program_id, op.program), set()).add(op.name)
    found = {key: programs.find(*key, operations) for key, operations in names.items()}
    of_weights: dict[hlo.Reading, hlo.Scope] = {}
    for program in found.values():
        of_weights.update(program.scopes_of_weights() if program else {})
    known = {
        (key, name): (program.scope(name, of_weights), program.is_control(name))
        for key, program in found.items()
        if program is not None
        for name in names[key]
    }
    for op in trace.operations:
        key = ((op.program_id, op.program), op.name)
        if key in known:
            scope, op.control = known[key]
            op.scope = scope or op.scope


@dataclass(slots=True)
class _Host:
    """What the host's planes have that is to be joined with other things: when kernels were
    launched, by correlation; XLA's compiles; (start, end, module) of XLA's passes."""

    launches: dict[int, float] = field(default_factory=dict)
    compiles: list[Compile] = field(default_factory=list)
    modules: list[tuple[float, float, str]] = field(default_factory=list)


def _read_host(plane: Any, trace: Trace, host: _Host) -> None:
    """Annotations, compiles and launches; on a CPU the operations too."""
    ends: dict[int, tuple[float, float]] = {}
    pending: list[tuple[Operation, Any]] = []
    runs: dict[tuple[Any, Any], int] = {}
    for line in plane.lines:
        thread = _Thread()
        for event in sorted(line.events, key=lambda e: (e.start_ns, -e.duration_ns)):
            name = event.name
            start, end = event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9
            if name.startswith(_QUIET):
                if name.startswith(_END):
                    ends[stats_of(event).get("_c", -1)] = (start, thread.before(start))
                elif name == _REGION:
                    thread = _Thread()
                continue
            stats = stats_of(event)
            if "correlation_id" in stats:  # of a GPU's kernel, whose hlo_op it may bear
                host.launches[stats["correlation_id"]] = start
            elif "hlo_op" in stats:
                thread.operation(start)
                pending.append((_cpu_operation(stats, start, end, trace, runs), stats.get("_p")))
            elif name == _EXECUTE:
                thread.execute(start, end)
            elif name == _XLA_COMPILE:
                host.compiles.append(Compile("", start, end - start))
            elif "module" in stats and "(" in name:
                host.modules.append((start, end, str(stats["module"])))
            elif name in _SPANS:
                details = {k: str(v) for k, v in stats.items() if not k.startswith("_")}
                trace.spans.append(Span(name, start, end, line.name, details))
    for operation, key in pending:
        # What was handed to other threads is done when its end is marked, or when the thread that
        # marks it went on with what waited for it.
        marked, went_on = ends.get(key, (0.0, 0.0))
        done = went_on if operation.start <= went_on else marked
        operation.end = max(operation.end, done)
        run = trace.runs[operation.run or 0]
        run.start, run.end = min(run.start, operation.start), max(run.end, operation.end)
        trace.operations.append(operation)


class _Thread:
    """What one piece of work on a thread of XLA's pool has run so far, in the order of starts."""

    def __init__(self) -> None:
        self._running: list[tuple[float, float]] = []
        """Executes (start, end), each within the one before it."""
        self._last = -1.0
        """Start of the outermost Execute that ended last, if no operation came after it; or -1."""

    def _advance(self, now: float) -> None:
        while self._running and self._running[-1][1] <= now:
            self._last = self._running.pop()[0]

    def execute(self, start: float, end: float) -> None:
        """An Execute."""
        self._advance(start)
        self._running.append((start, end))

    def operation(self, start: float) -> None:
        """An operation begins."""
        self._advance(start)
        self._last = -1.0

    def before(self, now: float) -> float:
        """When the Execute began that ended last before `now`, nothing after it; -1: none."""
        self._advance(now)
        return self._last


def _cpu_operation(
    stats: dict[str, Any], start: float, end: float, trace: Trace, runs: dict[tuple[Any, Any], int]
) -> Operation:
    device = f"cpu:{stats.get('device_ordinal', 0)}"
    name, program = str(stats["hlo_op"]), str(stats.get("hlo_module", ""))
    program_id = stats.get("program_id")
    key = (stats.get("run_id"), program_id)
    if key not in runs:
        runs[key] = len(trace.runs)
        trace.runs.append(Run(program, device, start, end, program_id=program_id))
    return Operation(name, program, program_id, device, start, end, run=runs[key])


def _read_compiles(trace: Trace, host: _Host) -> None:
    """The engine's compiles by the names it gives them, and all others by their module.

    A module is that of a compile if its passes ran within it; the first that no other claims.
    """
    ours = [span for span in trace.spans if span.name == COMPILE]
    counts = [0] * len(ours)
    taken: set[str] = set()
    host.modules.sort()
    for compile in sorted(host.compiles, key=lambda c: c.start):
        end = compile.start + compile.seconds
        around = [i for i, s in enumerate(ours) if s.start <= compile.start and end <= s.end]
        around.sort(key=counts.__getitem__)  # two at a time: each has one
        if around:
            counts[around[0]] += 1
            continue
        inside = [
            name
            for begun, ended, name in host.modules
            if compile.start <= begun and ended <= end and name.startswith(("jit", "pmap"))
        ]
        compile.program = next((n for n in inside if n not in taken), "".join(inside[:1]))
        taken.add(compile.program)
        trace.compiles.append(compile)
    for span, count in zip(ours, counts, strict=True):
        program = span.details.get("program", "")
        trace.compiles.append(Compile(program, span.start, span.seconds, is_loaded=not count))
    trace.compiles.sort(key=lambda c: c.start)


def _label_runs(trace: Trace) -> None:
    """Give each run the bucket that the engine's annotation of its dispatch names."""
    dispatches = sorted(
        (s.start, s.details["bucket"]) for s in trace.spans if "bucket" in s.details
    )
    steps = sorted((r for r in trace.runs if r.is_step), key=lambda r: r.start)
    if not dispatches or not steps:
        return
    first = [run for run in steps if run.device == steps[0].device]
    behind = sum(run.start < dispatches[0][0] for run in first)  # dispatched before the trace
    votes: dict[Any, dict[str, int]] = {}
    for run, (_, bucket) in zip(first[behind:], dispatches, strict=False):
        counts = votes.setdefault(run.program_id, {})
        counts[bucket] = counts.get(bucket, 0) + 1
    for run in steps:
        counts = votes.get(run.program_id)
        if counts:
            run.label = max(counts, key=counts.__getitem__)
