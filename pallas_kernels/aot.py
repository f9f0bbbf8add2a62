"""Compiles every kernel for chips that are not there, and says what the compilers made of it.

    python -m pallas_kernels.aot --all                      every program for every chip
    python -m pallas_kernels.aot --chip v5e --op paged_attention
    python -m pallas_kernels.aot --list                     what there is; compiles nothing

Exit status: 0 all is well; 1 a program does not compile, a GPU kernel spills registers, or a
donated page pool is copied; 2 wrong arguments, or a compiler that is not installed.

Other packages add programs through the entry point group "pallas_kernels.aot": a function
`programs(chip_name) -> list[Program]`.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import entry_points
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import aot_cases
from pallas_kernels.aot_targets import (
    CHIPS,
    ENVIRONMENT,
    Chip,
    Program,
    Result,
    compile_program,
    missing_compilers,
)

__all__ = ["CHIPS", "Chip", "Program", "Result", "main"]

GROUP = "pallas_kernels.aot"
TIMEOUT = 600.0  # seconds that one program may take


@lru_cache
def programs_for(chip_name: str) -> dict[str, Program]:
    """Every program for a chip by its name: this package's and those of the entry points."""
    found = aot_cases.programs(CHIPS[chip_name])
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        found += point.load()(chip_name)
    named = {program.name: program for program in reversed(found)}
    for program in found:  # the same shape may stand in the list and in the tuned file
        named[program.name] = named.pop(program.name)
    return named


def chosen(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(chip, program) of all that the arguments ask for."""
    names = args.chip or list(CHIPS)
    return [
        (chip, name)
        for chip in names
        for name, program in programs_for(chip).items()
        if (args.op or "") in name
        and (args.match or "") in f"{name} {program.note}"
        and (not args.impl or name.startswith(f"{args.impl}/"))
    ]


def run(tasks: Sequence[tuple[str, str]], jobs: int) -> Iterator[Result]:
    """The results of `tasks`, as they come, from `jobs` processes."""
    waiting = deque(tasks)
    workers = [_Worker() for _ in range(min(jobs, len(tasks)))]
    try:
        for worker in workers:
            worker.give(waiting.popleft())
        while busy := [worker for worker in workers if worker.task]:
            ready = wait([worker.pipe for worker in busy], timeout=1.0)
            for worker in busy:
                if worker.pipe in ready or worker.is_late:
                    yield worker.take()
                    if waiting:
                        worker.give(waiting.popleft())
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that compiles one program after another. A compiler that dies takes only it."""

    def __init__(self) -> None:
        self.task: tuple[str, str] | None = None
        self._process: Any = None

    def _start(self) -> None:
        # A fresh interpreter: the compilers read the environment when they are loaded.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        handle, name = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self._log = Path(name)
        self._process = context.Process(target=_serve, args=(theirs, self._log), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, task: tuple[str, str]) -> None:
        if self._process is None:
            self._start()
        self.task, self._deadline = task, time.monotonic() + TIMEOUT
        self.pipe.send(task)

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def take(self) -> Result:
        """The result of the task; when the process died or is late, that it did."""
        if self.task is None:
            raise RuntimeError("the worker has no task")
        (chip, name), self.task = self.task, None
        problem = f"compiling took longer than {TIMEOUT:.0f} s"
        if self.pipe.poll():
            try:
                return self.pipe.recv()
            except EOFError:
                self._process.join()
                said = "\n".join(self._log.read_text(errors="replace").splitlines()[-4:])
                code = self._process.exitcode
                problem = f"the compiler's process died with exit code {code}\n{said}"
        self.stop()
        return Result(chip, name, problems=(problem,))

    def stop(self) -> None:
        if self._process is None:
            return
        self.pipe.close()  # one that waits for work ends by itself
        self._process.join(timeout=2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None
        self._log.unlink(missing_ok=True)


def _serve(pipe: Connection, log_path: Path) -> None:
    """Compiles what comes through `pipe` until it closes."""
    while True:
        try:
            chip, name = pipe.recv()
        except EOFError:
            return
        pipe.send(compile_program(programs_for(chip)[name], CHIPS[chip], log_path))


# -- the table

WIDTHS = (72, 6, 8, 10, 5, 6, 6)
HEADINGS = ("op and shape", "chip", "compiled", "VMEM/SMEM", "regs", "spills", "sec")


def row(result: Result) -> str:
    """One line of the table, with a line for each problem and for a whole program's memory."""
    cells = (
        f"{result.name}  {result.note}".rstrip(),
        result.chip,
        result.status,
        "-" if result.kernel_memory is None else _size(result.kernel_memory),
        "-" if result.registers is None else result.registers,
        "-" if result.spills is None else result.spills,
        f"{result.seconds:.1f}",
    )
    lines = [_columns(cells)]
    if result.memory and not result.name.startswith(tuple(aot_cases.IMPLEMENTATIONS)):
        lines.append("    " + "  ".join(f"{k} {_size(v)}" for k, v in result.memory.items()))
    if result.refused:
        lines.append(f"    refused: {result.refused}")
    if result.copies:
        lines.append(f"    copies its donated pages, which is tolerated: {result.copies}")
    lines += [f"    {line[:200]}" for p in result.problems for line in p.splitlines()[:4]]
    return "\n".join(lines)


def _columns(cells: Sequence[Any]) -> str:
    first, *rest = zip(cells, WIDTHS, strict=True)
    return " ".join([f"{first[0]!s:<{first[1]}}", *(f"{x!s:>{width}}" for x, width in rest)])


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    made = argparse.ArgumentParser(
        prog="python -m pallas_kernels.aot",
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Callable[..., Any] = made.add_argument
    add("--all", action="store_true", help="every program for every chip")
    add("--chip", action="append", choices=list(CHIPS), help="only this chip; may be repeated")
    add("--op", choices=aot_cases.OPS, help="only this operation")
    add("--impl", choices=list(aot_cases.IMPLEMENTATIONS), help="only this implementation")
    add("--match", metavar="TEXT", help="only programs whose names or notes contain TEXT")
    add("--jobs", type=int, default=2, metavar="N", help="compiler processes (default: 2)")
    add("--json", type=Path, metavar="FILE", help="write the results there too")
    add("--list", action="store_true", help="name the programs and compile nothing")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    made = parser()
    args = made.parse_args(argv)
    if not (args.all or args.chip or args.op or args.impl or args.match or args.list):
        made.error("say what to compile: --all, or some of --chip, --op, --impl, --match")
    if args.jobs < 1:
        made.error(f"--jobs is {args.jobs}; it must be >= 1")
    # This process asks no device for anything; those that compile start with the environment.
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    missing = missing_compilers([CHIPS[name] for name in args.chip or CHIPS])
    if missing and not args.list:
        print("\n".join(missing), file=sys.stderr)
        return 2
    tasks = chosen(args)
    if args.list:
        print("\n".join(f"{chip:6} {name}" for chip, name in tasks))
        return 0
    if not tasks:
        made.error("no program has all of these; --list names them")
    return _report(tasks, args.jobs, args.json)


def _report(tasks: Sequence[tuple[str, str]], jobs: int, path: Path | None) -> int:
    begun = time.monotonic()
    points = [point.value for point in entry_points(group=GROUP)]
    print(f"programs of other packages: {', '.join(points) or 'none registered'}")
    print(_columns(HEADINGS), flush=True)
    results = []
    for result in run(tasks, jobs):
        results.append(result)
        print(row(result), flush=True)
    counts = Counter(result.status for result in results)
    failed = [result for result in results if result.problems]
    seconds = time.monotonic() - begun
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    print(f"\n{len(results)} programs: {told}; {seconds:.0f} s")
    for result in failed:
        print(f"FAILED {result.chip} {result.name}: {result.problems[0].splitlines()[0][:160]}")
    if path:
        rows = sorted((asdict(result) for result in results), key=lambda r: (r["chip"], r["name"]))
        path.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
