"""What a trace says, whatever the platform: operations, runs of programs, host spans, compiles.

Times are seconds since the trace began. Nothing here knows a file format. The names of spans are
those that engine.py and runner.py give them.
"""

from dataclasses import dataclass, field

from jaxinfer.errors import JaxInferError

PHASES = ("plan", "propose", "build", "dispatch", "wait", "collect")
"""What a step of the engine does on the host, in order; it sleeps in "wait"."""
WAKE = "wake"
"""The span in which a request comes to an engine that had none."""
COMPILE = "compile"
"""The span in which a program of the engine is made; its details name the program."""


class TraceError(JaxInferError, ValueError):
    """A trace that is not there, cannot be read, or holds nothing to report."""


@dataclass(slots=True)
class Operation:
    """One execution of one instruction on one device.

    `name` is XLA's, `scope` the named scopes it was written in (outermost first, layers merged).
    `control`: a loop, branch or call, whose time is mostly that of others. `run`: index into
    `Trace.runs`; None where the trace does not tell.
    """

    name: str
    program: str
    program_id: object
    device: str
    start: float
    end: float
    scope: tuple[str, ...] = ()
    control: bool = False
    run: int | None = None


@dataclass(slots=True)
class Run:
    """One execution of a compiled program on one device; `label` is what the host called it."""

    program: str
    device: str
    start: float
    end: float
    label: str = ""
    program_id: object = None

    @property
    def is_step(self) -> bool:
        """Whether it is one of the engine's steps."""
        return self.program == "jit_step"


@dataclass(slots=True)
class Span:
    """Something the host did: its name, when, on which thread, with which details."""

    name: str
    start: float
    end: float
    thread: str
    details: dict[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(slots=True)
class Compile:
    """One program made: when it began, how long it took, which ("" if not told).

    `is_loaded`: it came from a compile cache. The engine's programs count from tracing on, others
    from XLA on.
    """

    program: str
    start: float
    seconds: float
    is_loaded: bool = False


@dataclass(slots=True)
class Trace:
    """One recorded trace. `notes` tell what the reader could not find out, and why."""

    path: str
    platform: str
    operations: list[Operation] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    compiles: list[Compile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
