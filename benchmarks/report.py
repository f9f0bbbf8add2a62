"""Result files and tables that every benchmark shares.

A result is one JSON document, written again after every row so that a run that is cut short keeps
what it has:

    {"schema": 1, "benchmark": str, "command": str, "date": ISO 8601, "machine": {...},
     "settings": {...}, "rows": [{...}], "notes": [str], "complete": bool}

`notes` tells what was left out and why. Times are seconds, memory bytes, unless a name says
otherwise.
"""

import datetime
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"


class BenchmarkError(Exception):
    """What a user must know and can change; `run_main` prints it and exits with 2."""


class Report:
    """Rows of one run and the file they are kept in."""

    def __init__(
        self,
        benchmark: str,
        *,
        output: Path | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """`output`: the JSON file; None: benchmarks/results/<machine>/<benchmark>.json.

        Raises BenchmarkError where it cannot be written, before anything is measured.
        """
        self.path = output or RESULTS / machine.name() / f"{benchmark}.json"
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "benchmark": benchmark,
            "command": _command(benchmark, sys.argv[1:]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine.about(),
            "settings": settings or {},
            "rows": [],
            "notes": [],
            "complete": False,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise BenchmarkError(
                f"{self.path} cannot be written ({error}); name another with --output"
            ) from None

    def _write(self) -> None:
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(part, self.path)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        self._write()

    def note(self, text: str) -> None:
        """Keep, and print, what a reader of the rows must know."""
        print(text, file=sys.stderr, flush=True)
        self.content["notes"].append(text)
        self._write()

    def finish(self) -> None:
        """Everything that was asked for has been measured."""
        self.content["complete"] = True
        self._write()


def _command(benchmark: str, arguments: Sequence[str]) -> str:
    """As it was typed, but for the folders of this machine: they are nobody else's."""
    shown = [re.sub(r"(^|=)/\S*/(?=\S)", r"\1.../", argument) for argument in arguments]
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *shown])


def percentiles(
    values: Iterable[float], percents: Sequence[int] = (50, 90, 99)
) -> dict[str, float]:
    """{"p50": ...} of `values`, nearest rank; empty where there are none."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{p}": ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in percents}


def spread(values: Sequence[float]) -> dict[str, float]:
    """{"median", "low", "high"} of repeats."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """`rows` as GitHub-style Markdown, aligned so that a terminal shows it well too."""
    cells = [list(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def markers(name: str) -> tuple[str, str]:
    """The lines of a README between which the table of a benchmark goes."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def check_markers(path: Path, name: str) -> None:
    """BenchmarkError unless `path` has `name`'s two markers, in order."""
    _split(path, name)


def _split(path: Path, name: str) -> tuple[str, str]:
    begin_line, end_line = markers(name)
    try:
        old = path.read_text()
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read ({error}); name another README") from None
    begin, end = old.find(begin_line), old.find(end_line)
    if begin < 0 or end < begin:
        raise BenchmarkError(
            f"{path} needs the lines {begin_line} and {end_line}; the table goes between"
        )
    return old[: begin + len(begin_line)], old[end:]


def replace_between(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers of `name` in `path`."""
    before, after = _split(path, name)
    try:
        path.write_text(f"{before}\n{text}\n{after}")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written ({error})") from None


def measured_on(content: dict[str, Any], benchmark: str) -> str:
    """When, on what and with which command a result was made, in a sentence or two."""
    about = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"Measured {content['date'][:10]} on {about['cpu']}, {about['cores']} cores, "
        f"{about['memory_gb']} GB, {about['platform']} ({about['device']}); {versions}. "
        f"Command: `{content['command']}`; rows: "
        f"`results/{about['name']}/{benchmark}.json`."
    )


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark's `main`; a BenchmarkError or ValueError ends it with a line and status 2."""
    try:
        main()
    except (BenchmarkError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
