"""The kernels beside the hardware's limits and beside others' kernels.

    python -m benchmarks.kernels                 # what the machine has: GPU, TPU or CPU
    python -m benchmarks.kernels --static        # TPU cost by the compiler's schedule; needs libtpu
    python -m benchmarks.kernels decode prefill  # some sections

On an accelerator it first measures the ceilings (copy bandwidth, bfloat16 matmul on random data)
and checks the kernels against the reference; then each row stands beside its roofline: the time in
which the ceilings allow what it must move and multiply. Every section runs in a process of its own
with a share of --seconds, so that it always ends; what there was no time for is printed and kept.
The rows go to benchmarks/results/<machine>/kernels.json as they come.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import command_line, machine, sections
from benchmarks.report import RESULTS, Report, run_main

# Sections of an accelerator's run and the most seconds each may take, in the order of what is
# missed most if time runs out. What one does not use, the later ones may.
ACCELERATOR = {
    "ceilings": 40,
    "check": 80,
    "decode": 150,
    "prefill": 110,
    "backward": 80,
    "paged_prefill": 60,
    "quant": 90,
}
CPU = {"decode": 120, "memory": 60, "prefill": 120}
STATIC = {"static": 1800}
TABLES = {"accelerator": ACCELERATOR, "cpu": CPU, "static": STATIC}

COLUMNS = ("section", "case", "impl", "us", "achieved", "roofline_us", "share", "note")
WIDTHS = (13, 44, 12, 10, 14, 11, 6, 0)


def keep(report: Report, row: dict[str, Any]) -> None:
    """A line of the table for a row, and the row in the file; what was left out is a note."""
    if "left_out" in row:
        report.note(f"left out: {row['left_out']}")
        return
    report.add(row)
    if row["section"] == "ceilings":
        print(f"ceilings: {ceilings_of(report)}", flush=True)
    else:
        print(_line([row.get(name, "") for name in COLUMNS]), flush=True)


def ceilings_of(report: Report) -> dict[str, float]:
    """What the run measured of the machine, once it has; see `kernels_device.ceilings`."""
    found = next((row for row in report.rows if row["section"] == "ceilings"), {})
    return {name: value for name, value in found.items() if name != "section"}


def _line(cells: Sequence[Any]) -> str:
    texts = [f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
    return " ".join(f"{text:<{width}}" for text, width in zip(texts, WIDTHS, strict=True)).rstrip()


def run_section(
    table: str, name: str, seconds: float, report: Report, profile: Path | None
) -> None:
    """Runs a section in its own process and takes its rows; kills it when its time is over."""
    command = [sys.executable, "-m", "benchmarks.kernels"]
    command += ["--child", table, json.dumps(ceilings_of(report)), "--seconds", str(seconds), name]
    if profile:
        command += ["--profile", str(profile / name)]
    # A section stops by itself; the rest is for a kernel that never comes back.
    problem = sections.run(command, seconds + 30, partial(keep, report))
    if problem:
        keep(report, {"left_out": f"rest of {name}: {problem}"})


def child(table: str, ceilings: str, name: str, seconds: float, profile: Path | None) -> None:
    """One section, in this process: a JSON line for each row."""
    # Imported here: the parent must not touch the accelerator that its children use.
    from benchmarks import kernels_cpu, kernels_device, kernels_static
    from jaxinfer.profiling import record

    module = {"accelerator": kernels_device, "cpu": kernels_cpu, "static": kernels_static}[table]
    deadline = time.monotonic() + seconds
    with record.trace(profile):
        for row in module.SECTIONS[name](deadline, json.loads(ceilings)):
            print(json.dumps(row), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command_line.parser("kernels", __doc__)
    parser.add_argument("sections", nargs="*", help="of the run; none: all")
    parser.add_argument("--static", action="store_true", help="TPU cost without a TPU")
    parser.add_argument("--seconds", type=float, help="for the whole run (default: 510)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="an XLA trace of each section")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        table, ceilings = args.child
        child(table, ceilings, args.sections[0], args.seconds, args.profile)
        return
    table = "static"
    if not args.static:
        table = "cpu" if machine.device()[0] == "cpu" else "accelerator"
    known = TABLES[table]
    unknown = [name for name in args.sections if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    names = [n for n in known if not args.sections or n in args.sections or n == "ceilings"]
    seconds = args.seconds or (1800.0 if args.static else 510.0)
    path = args.output or (RESULTS / "static-tpu" / "kernels.json" if args.static else None)
    report = Report("kernels", output=path, settings={"table": table, "seconds": seconds})
    print(_line(COLUMNS), flush=True)
    end = time.monotonic() + seconds
    for i, name in enumerate(names):
        left = end - time.monotonic() - 30
        if left < 15:
            keep(report, {"left_out": f"section {name}: no time"})
            continue
        run_section(table, name, sections.share(known, names, i, left), report, args.profile)
    if not report.content["notes"]:
        report.finish()
    rows, left_out = len(report.rows), len(report.content["notes"])
    print(f"\n{rows} rows in {report.path}; {left_out} left out")


if __name__ == "__main__":
    run_main(main)
