"""Operations and runs of a GPU's or a TPU's plane of a trace.

GPU: one line for each stream, "Stream #n(...)", whose events are kernels and copies. A kernel has
the stats hlo_op, hlo_module and program_id, which XLA gave it when it was launched, and the
correlation_id of that launch, which tells the run; its stat "name" may be the operation's op_name.
Kernels of a CUDA graph have no operation.
TPU: the line "XLA Ops", whose events bear the text of their instruction ("%fusion.3 = ..."), and
"XLA Modules", with one event for each run ("jit_step(123)").
"""

import re
from bisect import bisect_right
from typing import Any

from jaxinfer.profiling.events import Operation, Run, Trace
from jaxinfer.profiling.hlo import scope_of

KINDS = ("GPU", "TPU")
_PLANE = re.compile(r"^/device:(GPU|TPU):(\d+)")
_MODULE = re.compile(r"^(.*?)\((-?\d+)\)$")
_LOOPS = ("while", "conditional", "call")


def read_accelerator(plane: Any, trace: Trace, launches: dict[int, float]) -> None:
    """Add the operations and runs of `plane` to `trace`; `launches` are the host's, by correlation.

    Planes of other devices than GPUs and TPUs are left alone.
    """
    matched = _PLANE.match(plane.name)
    if matched is None:
        return
    trace.platform = matched[1].lower()
    device = f"{trace.platform}:{matched[2]}"
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith("Stream #")]
    runs = _module_runs([line for line in lines if line.name == "XLA Modules"], device)
    if streams:
        _read_streams(streams, device, trace, _Runs(trace, launches))
    else:
        first = len(trace.runs)
        trace.runs += runs
        for line in lines:
            if line.name == "XLA Ops":
                _read_xla_ops(line, device, trace, runs, first)


def stats_of(event: Any) -> dict[str, Any]:
    """The stats of an event by name, without those whose name a damaged trace has lost."""
    return {name: value for name, value in event.stats if name}


def _module_runs(lines: list[Any], device: str) -> list[Run]:
    runs = []
    for line in lines:
        for event in line.events:
            start = event.start_ns / 1e9
            matched = _MODULE.match(event.name)
            name, number = (matched[1], int(matched[2])) if matched else (event.name, None)
            end = start + event.duration_ns / 1e9
            runs.append(Run(name, device, start, end, program_id=number))
    return sorted(runs, key=lambda run: run.start)


def _read_xla_ops(line: Any, device: str, trace: Trace, runs: list[Run], first: int) -> None:
    starts = [run.start for run in runs]
    for event in line.events:
        start = event.start_ns / 1e9
        at = bisect_right(starts, start) - 1
        run = runs[at] if at >= 0 and start <= runs[at].end else None
        name = event.name.partition(" = ")[0].removeprefix("%")
        trace.operations.append(
            Operation(
                name,
                run.program if run else "",
                run.program_id if run else None,
                device,
                start,
                start + event.duration_ns / 1e9,
                control=name.partition(".")[0] in _LOOPS,
                run=first + at if run else None,
            )
        )


class _Runs:
    """Which run a kernel belongs to: that of the engine's dispatch in or after which it was
    launched."""

    def __init__(self, trace: Trace, launches: dict[int, float]):
        self._trace = trace
        self._launches = launches
        self._dispatches = sorted(s.start for s in trace.spans if s.name == "dispatch")
        self._known: dict[tuple[Any, ...], int] = {}

    @property
    def are_told(self) -> bool:
        """Whether the engine's dispatches are in the trace."""
        return bool(self._dispatches)

    def find(self, stats: dict[str, Any], program: str, device: str) -> int | None:
        launched = self._launches.get(stats.get("correlation_id", -1))
        if launched is None or not program or not self._dispatches:
            return None
        dispatch = bisect_right(self._dispatches, launched)
        key = (device, dispatch, program, stats.get("program_id"))
        if key not in self._known:
            self._known[key] = len(self._trace.runs)
            empty = (float("inf"), float("-inf"))
            self._trace.runs.append(
                Run(program, device, *empty, program_id=stats.get("program_id"))
            )
        return self._known[key]


def _read_streams(lines: list[Any], device: str, trace: Trace, runs: _Runs) -> None:
    in_graphs = lost = 0
    for line in lines:
        for event in line.events:
            stats = stats_of(event)
            start = event.start_ns / 1e9
            end = start + event.duration_ns / 1e9
            program = str(stats.get("hlo_module", ""))
            run = runs.find(stats, program, device)
            lost += run is None and bool(program) and runs.are_told
            in_graphs += "cuda_graph_id" in stats
            if run is not None:
                found = trace.runs[run]
                found.start, found.end = min(found.start, start), max(found.end, end)
            name = str(stats.get("hlo_op") or event.name)
            trace.operations.append(
                Operation(
                    name,
                    program,
                    stats.get("program_id"),
                    device,
                    start,
                    end,
                    scope=scope_of(str(stats.get("name", ""))),
                    run=run,
                )
            )
    if in_graphs:
        trace.notes.append(
            f"{in_graphs} kernels of {device} ran in CUDA graphs, where the profiler does not tell "
            f"operations apart; record with XLA_FLAGS=--xla_gpu_enable_command_buffer= to see them"
        )
    if lost:
        trace.notes.append(
            f"{lost} kernels of {device} have no launch in the trace by which to find their step"
        )
