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

import numpy as np

from benchmarks import machine

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"


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
        self.path = output or result_path(benchmark)
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

    def keep(self, rows: Sequence[dict[str, Any]], key: str) -> None:
        """Take over rows of `earlier` runs; the note of it names them by their `key`."""
        if rows:
            self.rows.extend(rows)
            names = ", ".join(dict.fromkeys(row[key] for row in rows))
            self.note(f"measured in parts, each row has its date; from earlier runs: {names}")

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


def result_path(benchmark: str) -> Path:
    """Where the results of this machine are kept unless --output says otherwise."""
    return RESULTS / machine.name() / f"{benchmark}.json"


def earlier(path: Path, benchmark: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that --merge finds in the result at `path`; none where there is no file.

    Raises BenchmarkError where it is of another machine, other versions or other `settings`.
    """
    try:
        old = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"--merge: {path} cannot be read ({error})") from None
    then = old | old.get("settings", {}) if isinstance(old, dict) else {}
    now = {"schema": SCHEMA, "benchmark": benchmark, "machine": machine.about(), **settings}
    for key, wanted in now.items():
        if then.get(key) != wanted:
            raise BenchmarkError(
                f"--merge: {path} has {key} {then.get(key)!r:.300}, now it is {wanted!r:.300}; "
                f"rows of both in one table would mislead: leave --merge out and measure all again"
            )
    return old["rows"]


def _command(benchmark: str, arguments: Sequence[str]) -> str:
    """As it was typed, but for the folders of this machine: they are nobody else's."""
    shown = [re.sub(r"(^|=)/\S*/(?=\S)", r"\1.../", argument) for argument in arguments]
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *shown])


def percentiles(
    values: Iterable[float], percents: Sequence[int] = (50, 90, 99)
) -> dict[str, float]:
    """{"p50": ...} of `values`, nearest rank; empty where there are none."""
    found = list(values)
    if not found:
        return {}
    ranks = np.percentile(found, percents, method="inverted_cdf").tolist()
    return {f"p{p}": value for p, value in zip(percents, ranks, strict=True)}


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
    # Files of before it was recorded have none; a GPU machine's CPU need not say.
    instructions = f" with {about['instructions']}" if about.get("instructions") else ""
    return (
        f"Measured {content['date'][:10]} on {about['cpu']}{instructions}, {about['cores']} cores, "
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
