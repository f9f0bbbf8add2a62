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
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

# Sections of an accelerator's run and the most seconds each may take, in the order of what is
# missed most if time runs out. What one does not use, the later ones may.
ACCELERATOR = {
    "ceilings": 40,
    "check": 80,
    "decode": 150,
    "prefill": 110,
    "backward": 80,
    "paged_prefill": 60,
}
CPU = {"decode": 120, "memory": 60, "prefill": 120}
STATIC = {"static": 1800}
TABLES = {"accelerator": ACCELERATOR, "cpu": CPU, "static": STATIC}

COLUMNS = ("section", "case", "impl", "us", "achieved", "roofline_us", "share", "note")
WIDTHS = (13, 44, 12, 10, 14, 11, 6, 0)


def machine_of() -> tuple[str, str]:
    """(platform, name of the folder of results), asked in another process: a parent that holds the
    accelerator would leave none to its children."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"jax finds no device: {done.stderr.strip()[-500:]}")
    found, kind = done.stdout.strip().splitlines()[-1].split("|")
    name = f"cpu {platform.machine()}" if found == "cpu" else kind
    return found, name.lower().replace(" ", "_")


class Report:
    """Rows as they come: a line of the table each, and the file again."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        print(_line(COLUMNS), flush=True)

    def add(self, row: dict[str, Any]) -> None:
        if "left_out" in row:
            self.left_out.append(row["left_out"])
            print(f"left out: {row['left_out']}", flush=True)
        elif "ceilings" in row:
            self.about["ceilings"] = row["ceilings"]
            print(f"ceilings: {row['ceilings']}", flush=True)
        else:
            self.rows.append(row)
            print(_line([row.get(name, "") for name in COLUMNS]), flush=True)
        content = {"about": self.about, "rows": self.rows, "left_out": self.left_out}
        text = json.dumps(content, indent=1, sort_keys=True)
        self.path.write_text(text + "\n")


def _line(cells: Sequence[Any]) -> str:
    texts = [f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
    return " ".join(f"{text:<{width}}" for text, width in zip(texts, WIDTHS, strict=True)).rstrip()


def run_section(table: str, name: str, seconds: float, report: Report) -> None:
    """Runs a section in its own process and takes its rows; kills it when its time is over."""
    ceilings = json.dumps(report.about.get("ceilings", {}))
    command = [sys.executable, "-m", "benchmarks.kernels", "--child", table, ceilings]
    command += ["--seconds", str(seconds), name]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        # A section stops by itself; the timer is for a kernel that never comes back.
        timer = threading.Timer(seconds + 30, process.kill)
        timer.start()
        said: list[str] = []
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    report.add(json.loads(line))
                else:
                    said = [*said[-5:], line.rstrip()[:200]]
        finally:
            timer.cancel()
        if process.wait():
            last = " | ".join(said)
            report.add({"left_out": f"rest of {name}: exit code {process.returncode}: {last}"})


def child(table: str, ceilings: str, name: str, seconds: float) -> None:
    """One section, in this process: a JSON line for each row."""
    # Imported here: the parent must not touch the accelerator that its children use.
    from benchmarks import kernels_cpu, kernels_device, kernels_static

    module = {"accelerator": kernels_device, "cpu": kernels_cpu, "static": kernels_static}[table]
    deadline = time.monotonic() + seconds
    for row in module.SECTIONS[name](deadline, json.loads(ceilings)):
        print(json.dumps(row), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", help="of the run; none: all")
    parser.add_argument("--static", action="store_true", help="TPU cost without a TPU")
    parser.add_argument("--seconds", type=float, help="for the whole run (default: 510)")
    parser.add_argument("--output", type=Path, help="of the JSON file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        table, ceilings = args.child
        child(table, ceilings, args.sections[0], args.seconds)
        return
    found, machine = ("tpu", "static-tpu") if args.static else machine_of()
    table = "static" if args.static else "cpu" if found == "cpu" else "accelerator"
    known = TABLES[table]
    unknown = [name for name in args.sections if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    names = [n for n in known if not args.sections or n in args.sections or n == "ceilings"]
    seconds = args.seconds or (1800.0 if args.static else 510.0)
    path = args.output or RESULTS / machine / "kernels.json"
    report = Report(path, {"machine": machine, "platform": found})
    end = time.monotonic() + seconds
    for i, name in enumerate(names):
        left = end - time.monotonic() - 30
        later = sum(known[n] for n in names[i + 1 :])
        share = left if i + 1 == len(names) else max(known[name], left - later)
        if left < 15:
            report.add({"left_out": f"section {name}: no time"})
            continue
        run_section(table, name, min(share, left), report)
    print(f"\n{len(report.rows)} rows in {path}; {len(report.left_out)} left out")


if __name__ == "__main__":
    main()
