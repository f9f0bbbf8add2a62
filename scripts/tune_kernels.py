"""Chooses block sizes for one chip and writes pallas_kernels/tuned/<chip>.json.

    python -m scripts.tune_kernels --chip v5e            # by the TPU compiler's schedule; no TPU
    python -m scripts.tune_kernels --chip v6e --only decode --dry-run
    python -m scripts.tune_kernels --chip device         # measured on the GPU of this machine

Run from the repository root. Every case (heads x dtype x stage) tries each candidate of its space
and the kernel's own rule; the best is written down where it is better than the rule by 1 %.
What a file has is kept and not tried again unless --again, so that a run that was stopped goes on
about where it was. A score of a TPU is cycles for a token of a decode row, or for a block of
scores; a measured one is microseconds for a call.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import jax

from pallas_kernels import aot_cases, tpu_static, tuning
from pallas_kernels.aot_targets import CHIPS, Chip, missing_compilers
from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.tpu_layout import Layout
from pallas_kernels.tpu_static import PEAKS

Config = dict[str, int]
Space = Mapping[str, Sequence[int]]

# Fields of each kernel's configuration and what is tried. All combinations, less what the kernel
# refuses or what does not fit.
SPACES: dict[tuple[str, str], Space] = {
    ("tpu", "forward"): {
        "block_q": (64, 128, 256, 512),
        "heads": (1, 2, 3, 4, 8),
        "block_kv": (1024, 2048),
        "compute_kv": (256, 512, 1024),
    },
    ("tpu", "decode"): {"block": (128, 256, 512, 1024, 2048), "buffers": (3,)},
    ("mosaic_gpu", "forward"): {
        "block_q": (64, 128),
        "block_kv": (64, 128, 256),
        "stages": (2, 3, 4),
        "compute_wgs": (2, 3),
        "ping_pong": (0, 1),
    },
    ("mosaic_gpu", "backward"): {
        "dkv_block_kv": (64, 128),
        "dkv_block_q": (64, 128),
        "dq_block_q": (64, 128),
        "dq_block_kv": (64, 128),
    },
    ("mosaic_gpu", "decode"): {"tile": (64, 128), "stages": (2, 3, 4, 6), "splits": (0,)},
    ("mosaic_gpu", "prefill"): {"tile": (64, 128), "stages": (2, 3, 4)},
}
# Rows of a tile of the TPU's forward kernel that are worth trying.
TILE_ROWS = (512, 1024)
DECODE_CONTEXT = 2048


@dataclass(frozen=True)
class Case:
    """One shape to tune."""

    stage: str
    heads: str
    page_dtype: str = "bfloat16"

    @property
    def op(self) -> str:
        return "flash_attention" if self.stage in ("forward", "backward") else "paged_attention"

    @property
    def request(self) -> dict[str, Any]:
        """For `aot_cases`: which program, and its options."""
        options = {"heads_name": self.heads, "stage": self.stage}
        if self.op == "flash_attention":
            return {"make": "flash_program", "options": options}
        return {"make": "paged_program", "options": options | {"page_dtype": self.page_dtype}}

    def __str__(self) -> str:
        return f"{self.op} {self.stage} {self.heads} {self.page_dtype}"


def cases(stages: Sequence[str], heads: Sequence[str]) -> Iterator[Case]:
    for stage, name in itertools.product(stages, heads):
        paged = stage in ("decode", "prefill")
        for page_dtype in ("bfloat16", "int8") if paged else ("bfloat16",):
            yield Case(stage, name, page_dtype)


def candidates(impl: str, case: Case) -> list[Config]:
    """All of the space that may be worth trying for the case."""
    space = SPACES[impl, case.stage]
    found = [dict(zip(space, c, strict=True)) for c in itertools.product(*space.values())]
    if (impl, case.stage) != ("tpu", "forward"):
        return found
    heads = aot_cases.HEADS[case.heads]
    group = heads.num_heads // heads.num_kv_heads
    return [
        c
        for c in found
        if group % c["heads"] == 0
        and c["block_q"] * c["heads"] in TILE_ROWS
        and (c["heads"] == group or group > 8)
    ]


# -- scores


def static_score(chip: Chip, case: Case, config: Config | None) -> float:
    """Cycles by the compiler's schedule; lower is better."""
    configs = {f"{case.op}/{case.stage}": config} if config else {}
    request = case.request | {"chip": chip.name, "impl": "tpu", "configs": configs}
    kernels = tpu_static.schedule(request)
    kernel = max(kernels, key=lambda k: k.whole.busy["MATMUL"])
    if case.stage == "forward":
        # Cycles for each that the matrix unit must work; a step of the grid costs some besides.
        hot = kernel.hot()
        busy = hot.busy["MATMUL"] / kernel.slots["MATMUL"]
        return (hot.bundles + STEP_CYCLES) / busy
    loop = kernel.hot(loops_only=True)
    heads = aot_cases.HEADS[case.heads]
    layout = Layout(chip.page_size, heads.num_kv_heads, heads.head_dim, case.page_dtype)
    with tuning.trial({(case.op, case.stage): config} if config else {}):
        used = tpu.configs(heads.num_heads, layout, chip.target)[0]
    item = 1 if case.page_dtype == "int8" else 2
    vector = heads.head_dim * item + (4 if item == 1 else 0)
    peak, block = PEAKS[chip.device_kind], used.block
    late = DMA_LATENCY * peak.clock / (used.buffers - 1)
    moved = block * 2 * heads.num_kv_heads * vector
    # Half of a row's last block is computed for nothing; only its own pages are copied.
    work = loop.bundles * (1 + block / 2 / DECODE_CONTEXT)
    return max(work, peak.dma_cycles(moved), late) / block


# Guesses, for the schedule does not say: what a step of the grid costs besides its body, in cycles,
# and seconds from the start of a copy to its end, of which the blocks in flight hide their share.
STEP_CYCLES, DMA_LATENCY = 200, 2e-6


GUESS = 1e-3  # seconds of a measured call, which chooses how many are timed at once


def measured_score(chip: Chip, case: Case, config: Config | None) -> float:
    """Microseconds of one call on the device that is there."""
    # Imported here: the static way needs no accelerator, and this asks for one.
    from benchmarks import kernels_device as device

    heads = aot_cases.HEADS[case.heads]
    shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim)
    ops = device.ours(*shape, case.page_dtype)
    jax.clear_caches()  # block sizes are not part of what jax compares programs by
    with tuning.trial({(case.op, case.stage): config} if config else {}):
        if case.op == "flash_attention":
            args = device.flash_inputs(2, 8192, *shape)
            attend = partial(ops.flash_attention, window=heads.window, soft_cap=heads.soft_cap)
            return 1e6 * device.flash_seconds(attend, args, case.stage == "backward", GUESS)
        size = device.PAGE_SIZE[chip.platform]
        rows = [(1, 2048)] * 64 if case.stage == "decode" else [(2048, 8192)]
        num_decode = len(rows) if case.stage == "decode" else 0
        ragged, count = device.ragged_of(rows, size, num_decode)
        copies = 4
        pages = device.filled_pool(ops, copies * count, shape, case.page_dtype)
        return 1e6 * device.attend_seconds(ops, pages, ragged, shape, copies, GUESS)


# -- the run


def key_of(chip: Chip, impl: str, case: Case) -> dict[str, int | str]:
    """What the kernel asks the table with for this case; ValueError where it asks nothing."""
    request = case.request
    program = getattr(aot_cases, request["make"])(impl, chip, **request["options"])
    if program.refused:
        raise ValueError(program.refused)
    with tuning.trial() as lookups:
        jax.eval_shape(program.function, *program.args)
    for op, stage, key in lookups.asked:
        if (op, stage) == (case.op, case.stage):
            return dict(key)
    raise ValueError(f"{impl} looks nothing up for {case}")


def tune(chip: Chip, impl: str, case: Case, score: Any, key: dict[str, int | str]) -> tuning.Entry:
    """The best configuration of the case; prints what each scores."""
    rule = score(chip, case, None)
    print(f"{case}: rule {rule:.4g}", flush=True)
    best, best_score = None, rule
    for config in candidates(impl, case):
        begun = time.monotonic()
        try:
            got = score(chip, case, config)
        except Exception as error:
            print(f"  {config}: {str(error).splitlines()[0][:120]}", flush=True)
            continue
        print(f"  {config}: {got:.4g} ({time.monotonic() - begun:.0f} s)", flush=True)
        if got < 0.99 * best_score:  # what is level stays with the rule, or the smaller block
            best, best_score = config, got
    source = "static" if score is static_score else "measured"
    names = ("jax", "libtpu") if source == "static" else ("jax",)
    versions = {name: version(name) for name in names}
    return tuning.Entry(
        case.op, case.stage, key, best or {}, source, round(best_score, 4), versions
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        prog="python -m scripts.tune_kernels",
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    static = [name for name, chip in CHIPS.items() if chip.device_kind in PEAKS]
    parser.add_argument("--chip", required=True, choices=[*static, "device"])
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="forward, decode, ...")
    parser.add_argument("--heads", nargs="+", default=["Llama-3-8B"], choices=aot_cases.HEADS)
    parser.add_argument("--again", action="store_true", help="try what the file has already, too")
    parser.add_argument("--dry-run", action="store_true", help="say what would be tried")
    args = parser.parse_args(argv)
    if args.chip == "device":
        kind = jax.devices()[0].device_kind
        found = [c for c in CHIPS.values() if c.device_kind == kind and c.platform == "gpu"]
        if not found:
            parser.error(f"this machine has {kind!r}; measured tuning is for a GPU in the list")
        chip, impl, score = found[0], "mosaic_gpu", measured_score
    else:
        chip, impl, score = CHIPS[args.chip], "tpu", static_score
        if missing := missing_compilers([chip]):
            print("\n".join(missing), file=sys.stderr)
            return 2
    stages = [stage for name, stage in SPACES if name == impl]
    unknown = set(args.only or []) - set(stages)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; {impl} has {', '.join(stages)}")
    have = {entry.id: entry for entry in tuning.entries(chip.device_kind)}
    for case in cases(args.only or stages, args.heads):
        key = key_of(chip, impl, case)
        known = (case.op, case.stage, tuple(sorted(key.items()))) in have
        if known and not args.again:
            print(f"{case}: in the file already")
            continue
        if args.dry_run:
            print(f"{case}: {len(candidates(impl, case))} candidates for {key}")
            continue
        entry = tune(chip, impl, case, score, key)
        have.pop(entry.id, None)
        if entry.config:
            have[entry.id] = entry
            print(f"{case}: {dict(entry.config)} scores {entry.score:.4g}")
        else:
            print(f"{case}: nothing is better than the rule")
        if have:
            text = tuning.render(chip.device_kind, have.values())
            tuning.file_of(chip.device_kind).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
