"""Command-line options that several benchmarks have, in the same words, and their checks."""

import argparse
from pathlib import Path

from benchmarks.report import README, BenchmarkError, check_markers


def parser(benchmark: str, about: str | None) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.BENCHMARK`: `about` is its help as written. It has --output."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"JSON file; default: benchmarks/results/<machine>/{benchmark}.json",
    )
    return made


def add_chart(made: argparse.ArgumentParser, shows: str) -> None:
    """--chart PNG and --no-chart; see `charts.check`."""
    chart = made.add_mutually_exclusive_group()
    chart.add_argument(
        "--chart", type=Path, metavar="PNG", help=f"of {shows}; default: beside the JSON file"
    )
    chart.add_argument("--no-chart", action="store_true")


def add_update_readme(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--update-readme",
        nargs="?",
        const=README,
        type=Path,
        metavar="FILE",
        help="write the table between the markers of benchmarks/README.md (or FILE)",
    )


def check_update_readme(options: argparse.Namespace, benchmark: str) -> None:
    """Raises BenchmarkError, before anything is measured, where the table has no place."""
    if options.update_readme is None:
        return
    if options.toy:
        raise BenchmarkError("--update-readme with --toy: figures of a toy are not published")
    check_markers(options.update_readme, benchmark)
