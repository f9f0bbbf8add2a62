"""The parent's side of a worker: start, ask, pause and resume it, read its memory, end it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


class WorkerError(Exception):
    """A worker could not be started, died or did not answer; the message has its last words."""


class Worker:
    """An engine in a process and a session of its own, so that all its children are known.

    While it is paused (SIGSTOP to the whole group) none of its threads takes time from another.
    """

    def __init__(self, name: str, python: str, module: str, *, timeout: float) -> None:
        self.name = name
        self._timeout = timeout
        self._begun = time.perf_counter()
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._received = b""
        try:
            self._process = subprocess.Popen(
                [python, "-m", f"benchmarks.peers.{module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                cwd=ROOT,
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise WorkerError(f"{python} cannot be started: {error}") from None

    @property
    def age(self) -> float:
        """Seconds since its process was started."""
        return time.perf_counter() - self._begun

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the reply. Raises WorkerError; the worker is gone then."""
        stdin = self._process.stdin
        if stdin is None:
            raise AssertionError("the worker was started with a pipe")
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except OSError:
            raise self._death(f"ended before {request['op']!r}") from None
        line = self._read_line(request["op"])
        try:
            return json.loads(line)
        except ValueError:
            raise self._death(f"answered {request['op']!r} with {line[:200]!r}") from None

    def _read_line(self, op: str) -> bytes:
        stdout = self._process.stdout
        if stdout is None:
            raise AssertionError("the worker was started with a pipe")
        end = time.monotonic() + self._timeout
        while b"\n" not in self._received:
            ready, _, _ = select.select([stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise self._death(f"did not answer {op!r} within {self._timeout:g} s")
            data = os.read(stdout.fileno(), 1 << 20)
            if not data:
                raise self._death(f"ended in {op!r}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _death(self, what: str) -> WorkerError:
        """Ends the worker; the error that says `what` and the end of its standard error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # its own exit status, where it is ending by itself
        status = self._process.returncode
        self._errors.seek(0)
        tail = self._errors.read().strip()[-1500:]
        self.kill()
        ended = "" if status is None else f" (exit status {status})"
        return WorkerError(f"{self.name} {what}{ended}" + (f": {tail}" if tail else ""))

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def peak_memory(self) -> int | None:
        """Sum over its processes of their peak resident memory, in bytes; None without /proc.

        Peaks of several processes need not coincide and shared pages count in each, so that for
        an engine of several processes this is an upper bound.
        """
        if not Path("/proc/self/status").exists():
            return None
        total = 0
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                # the name, in brackets, may hold anything; after it: state, parent, group, session
                session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
                if session != self._process.pid:
                    continue
                for line in (folder / "status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        total += int(line.split()[1]) * 1024
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
        return total

    def close(self) -> dict[str, Any]:
        """Its last reply; the process is gone after it."""
        self.resume()
        try:
            return self.ask({"op": "close"})
        finally:
            self.kill()

    def kill(self) -> None:
        """End the whole group. Ending it twice is fine."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._errors.close()
