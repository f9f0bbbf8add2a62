"""Sections of a benchmark: each in a process of its own with a share of the time, so that one that
hangs or dies takes nothing with it. A section prints a JSON object a line; each is handed on as it
comes. Imports no jax: a parent that holds the accelerator would leave none to its children.
"""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

Row = dict[str, Any]


def share(budgets: Mapping[str, float], names: Sequence[str], at: int, left: float) -> float:
    """Seconds for section `names[at]` of `left`: its budget, and what the later ones leave."""
    later = sum(budgets[name] for name in names[at + 1 :])
    return min(left, max(budgets[names[at]], left - later))


def run(
    command: Sequence[str],
    seconds: float,
    take: Callable[[Row], None],
    *,
    env: Mapping[str, str] | None = None,
) -> str | None:
    """Run a section and `take` its rows; why it did not end well, None where it did.

    It is killed, with all that it started, after `seconds`.
    """
    late = threading.Event()
    with subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=None if env is None else dict(env),
        start_new_session=True,
    ) as process:

        def kill() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def end() -> None:
            late.set()
            kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        said: list[str] = []
        try:
            for line in process.stdout or ():
                row = _row(line)
                if row is not None:
                    take(row)
                elif line.strip():
                    said = [*said[-5:], line.strip()[:300]]
            process.wait()
        finally:
            timer.cancel()
            kill()  # whatever outlives it; no process is left to hold the device
    if late.is_set():
        return f"killed after {seconds:.0f} s: {' | '.join(said[-2:]) or 'it said nothing'}"
    if process.returncode:
        return f"exit status {process.returncode}: {' | '.join(said) or 'it said nothing'}"
    return None


def _row(line: str) -> Row | None:
    """The JSON object that a line is; None for what libraries print."""
    if not line.startswith("{"):
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None
