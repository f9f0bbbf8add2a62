"""What a TPU kernel costs by the compiler's own schedule, without a TPU.

libtpu writes the VLIW bundles of every kernel and what each keeps busy. From these come the cycles
of every loop and branch, and what it spills. Read before the last pass ("pre-delay"), which drops
the empty bundles that the hardware's interlocks replace: with them a bundle is a cycle (XLA's own
4096^3 matmul comes out at 97.5 % of v5e's and v6e's peak). Stalls on DMA are not in there: they are
what `dma_cycles` is beside it for.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pallas_kernels import aot_cases, tuning
from pallas_kernels.aot_targets import CHIPS, ENVIRONMENT, lower

_BUNDLES = "-packed-bundles-post-ra.txt"
_USE = "-pre-delay_hlo-static-per-bundle-utilization.txt"


@dataclass(frozen=True)
class Peak:
    """What a chip's core can do. `flops_per_cycle`: bfloat16, all matrix units together;
    `matrix_size` is the side of one."""

    clock: float  # Hz
    flops_per_cycle: int
    matrix_size: int
    hbm_bytes_per_second: float

    def dma_cycles(self, num_bytes: float) -> float:
        """Cycles that HBM needs at least to deliver `num_bytes`."""
        return num_bytes / self.hbm_bytes_per_second * self.clock


# Clock times flops per cycle is the published peak: 197 and 918 TFLOP/s; so is the bandwidth.
PEAKS = {
    "TPU v5 lite": Peak(1.5e9, 4 * 128 * 128 * 2, 128, 819e9),
    "TPU v6 lite": Peak(1.75e9, 4 * 256 * 256 * 2, 256, 1640e9),
}


@dataclass(frozen=True)
class Region:
    """A loop or a branch: bundles [start, end] of the kernel. `busy` counts, for each unit of the
    core ("MATMUL", "VSTORE:SPILL", ...), the slots taken."""

    start: int
    end: int
    is_loop: bool
    busy: Mapping[str, int]

    @property
    def bundles(self) -> int:
        return self.end - self.start + 1

    @property
    def spills(self) -> int:
        return self.busy.get("VSTORE:SPILL", 0) + self.busy.get("VLOAD:FILL", 0)

    def share(self, unit: str, slots: Mapping[str, int]) -> float:
        """How much of `unit` is busy, from 0 to 1."""
        return self.busy[unit] / (slots[unit] * self.bundles)


@dataclass(frozen=True)
class Kernel:
    """The schedule of one kernel; `slots` are what a bundle has of each unit, regions go from the
    longest to the shortest."""

    name: str
    slots: Mapping[str, int]
    whole: Region
    regions: tuple[Region, ...]

    def hot(self, unit: str = "MATMUL", *, loops_only: bool = False) -> Region:
        """The smallest region (or loop) with at least half of all that the kernel's code does on
        `unit`: what runs once for each block of keys, for an attention kernel."""
        enough = self.whole.busy.get(unit, 0) / 2
        enough = max(1, enough)
        taken = [r for r in self.regions if r.is_loop or not loops_only]
        found = [r for r in taken if r.busy.get(unit, 0) >= enough]
        return min(found, key=lambda r: r.bundles, default=self.whole)


def parse(name: str, bundles: str, use: str) -> Kernel:
    """A kernel from the texts of its two files; ValueError where they are not what they were."""
    head, _, body = use.partition("== UTILIZATION:")
    columns = head.splitlines()
    if len(columns) < 3 or not body:
        raise ValueError(f"{name}: libtpu's utilisation file has another form than it had")
    units = [unit.strip() for unit in columns[1].split(",")]
    rows = [[int(x) for x in line.split()] for line in body.splitlines() if line[:1].isdigit()]
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    loop_starts: set[int] = set()
    address = 0
    for line in bundles.splitlines():
        if found := re.match(r"\s*(0x[0-9a-f]+|0)\s.*?:", line):
            address = int(found[1], 16)
            if "LB:" in found[0]:
                loop_starts.add(address)
        starts.update(dict.fromkeys(re.findall(r"Start region (\d+)", line), address))
        ends.update(dict.fromkeys(re.findall(r"End region (\d+)", line), address))
    if not rows or not starts:
        raise ValueError(f"{name}: libtpu's files have no bundles or no regions")

    def region(start: int, end: int) -> Region:
        sums = [sum(column) for column in zip(*rows[start : end + 1], strict=True)]
        return Region(start, end, start in loop_starts, dict(zip(units, sums, strict=True)))

    # Several regions may span the same bundles.
    spans = {(starts[r], ends[r]) for r in starts if r in ends}
    ordered = sorted((region(*span) for span in spans), key=lambda r: r.bundles, reverse=True)
    slots = dict(zip(units, map(int, columns[2].split()), strict=True))
    return Kernel(name, slots, region(0, len(rows) - 1), tuple(ordered))


def kernels_in(folder: Path, name: str = "") -> list[Kernel]:
    """The kernels of a dump whose names contain `name`, in the order they were compiled."""
    found = []
    for path in sorted(folder.glob(f"*{_BUNDLES}")):
        if "schedule-analysis" in path.name:
            continue
        stem = re.sub(r"-\d+$", "", path.name.removesuffix(_BUNDLES))
        kernel = stem.partition("-")[2]
        if name not in kernel:
            continue
        uses = sorted(folder.glob(f"{_escaped(stem)}-*{_USE}"))
        if uses:
            texts = (p.read_text(errors="replace") for p in (path, uses[-1]))
            found.append(parse(kernel, *texts))
    return found


def _escaped(stem: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", stem)


def schedule(request: Mapping[str, Any], timeout: float = 600.0) -> list[Kernel]:
    """The Mosaic kernels of one program, compiled in a process of its own: libtpu reads where to
    dump once, when it is loaded. RuntimeError when it does not compile.

    `request`: "chip" and "impl"; "make" ("flash_program" or "paged_program" of `aot_cases`) and
    "options", its other arguments; "configs", block sizes by "op/stage", instead of the tuned.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.tpu_static", json.dumps(request)],
            env=os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"compiling failed: {lines[-1][:300]}")
        names = json.loads(done.stdout.splitlines()[-1])
        return [k for k in kernels_in(Path(folder)) if k.name in names]


def main(argument: str) -> None:
    """Compiles what `schedule` was asked for and prints the names of the Mosaic kernels."""
    request = json.loads(argument)
    chip = CHIPS[request["chip"]]
    make = getattr(aot_cases, request["make"])
    options = dict(request["options"])
    if isinstance(options["heads_name"], list):
        options["heads_name"] = aot_cases.Heads(*options["heads_name"])
    program = make(request["impl"], chip, **options)
    if program.refused:
        raise SystemExit(f"refused: {program.refused}")
    configs = {tuple(name.split("/")): c for name, c in request.get("configs", {}).items()}
    with tuning.trial(configs):
        text = lower(program, chip).compile().as_text()
    calls = re.findall(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"', text)
    print(json.dumps(calls))


if __name__ == "__main__":
    main(sys.argv[1])
