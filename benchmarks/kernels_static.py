"""The rows of `benchmarks.kernels --static`: what the TPU compiler's schedule says of the kernels.

us is cycles over the clock: of the decode loop for one block of one row, beside the time in which
HBM can deliver that block; and of the other kernels' inner loops, beside what the matrix unit would
need alone. Stalls on memory are not in a schedule: these are the compiler's numbers, not measured.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels import aot_cases
from pallas_kernels.aot_targets import CHIPS, Chip, missing_compilers
from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.tpu_layout import Layout
from pallas_kernels.tpu_static import PEAKS, Kernel, schedule

Row = dict[str, Any]

CHIP_NAMES = ("v5e", "v6e")
FLASH_HEADS = ("Llama-3-8B", "Llama-3.2-1B", "Gemma-2")  # head dims 128, 64, 256


def static(deadline: float, _: Any) -> Iterator[Row]:
    """Every kernel for v5e and v6e at the block sizes it would run with."""
    if missing := missing_compilers([CHIPS[name] for name in CHIP_NAMES]):
        raise SystemExit("; ".join(missing))
    for name in CHIP_NAMES:
        chip = CHIPS[name]
        for heads in ("Llama-3-8B", "Qwen3-0.6B"):
            for page_dtype in ("bfloat16", "int8"):
                yield from _tried(deadline, _decode, chip, heads, page_dtype)
        for heads in FLASH_HEADS:
            for stage in ("forward", "backward"):
                yield from _tried(deadline, _matmuls, chip, heads, stage)
        yield from _tried(deadline, _matmuls, chip, "Llama-3-8B", "prefill")


def _tried(deadline: float, rows: Callable[..., Iterator[Row]], *args: Any) -> Iterator[Row]:
    chip, *rest = args
    case = " ".join([chip.name, *rest])
    if time.monotonic() > deadline:
        yield {"left_out": case}
        return
    try:
        yield from rows(*args)
    except RuntimeError as error:
        yield {"section": "static", "case": case, "impl": "tpu", "note": f"cannot run: {error}"}


def _decode(chip: Chip, heads_name: str, page_dtype: str) -> Iterator[Row]:
    """The loop over blocks, beside the copy of a block."""
    heads = aot_cases.HEADS[heads_name]
    options = {"heads_name": heads_name, "stage": "decode", "page_dtype": page_dtype}
    (kernel,) = schedule(
        {"chip": chip.name, "impl": "tpu", "make": "paged_program", "options": options}
    )
    layout = Layout(chip.page_size, heads.num_kv_heads, heads.head_dim, page_dtype)
    block = tpu.configs(heads.num_heads, layout, chip.target)[0].block
    item = 1 if page_dtype == "int8" else 2
    vector = heads.head_dim * item + (4 if item == 1 else 0)
    peak, loop = PEAKS[chip.device_kind], kernel.hot(loops_only=True)
    cycles = peak.dma_cycles(block * 2 * heads.num_kv_heads * vector)
    yield {
        "section": "decode",
        "case": f"{chip.name} {heads_name} {page_dtype}, {block} tokens",
        "impl": "tpu",
        "us": loop.bundles / peak.clock * 1e6,
        "roofline_us": cycles / peak.clock * 1e6,
        "bundles": loop.bundles,
        "dma_cycles": round(cycles),
        "spills": loop.spills,
        "share": round(cycles / loop.bundles, 3),
        "note": f"{loop.bundles} cycles, copy {cycles:.0f}: {loop.bundles / cycles:.2f} of it",
    }


def _matmuls(chip: Chip, heads_name: str, stage: str) -> Iterator[Row]:
    """The part that most of the products are in, of each kernel of the stage."""
    heads = aot_cases.HEADS[heads_name]
    make = "paged_program" if stage == "prefill" else "flash_program"
    request = {"chip": chip.name, "impl": "tpu", "make": make}
    kernels = schedule(request | {"options": {"heads_name": heads_name, "stage": stage}})
    for kernel in kernels:
        if stage != "prefill" or "decode" not in kernel.name:
            yield _matmul_row(chip, heads, kernel, f"{chip.name} {heads_name} {stage}")


def _matmul_row(chip: Chip, heads: aot_cases.Heads, kernel: Kernel, case: str) -> Row:
    peak, hot = PEAKS[chip.device_kind], kernel.hot()
    busy = hot.share("MATMUL", kernel.slots)
    # Every product is H deep or H wide: where that does not fill the unit, a busy one does less.
    fill = heads.head_dim / (-(-heads.head_dim // peak.matrix_size) * peak.matrix_size)
    return {
        "section": "matmul",
        "case": f"{case} {kernel.name.rsplit('.', 1)[0]}",
        "impl": "tpu",
        "us": hot.bundles / peak.clock * 1e6,
        "roofline_us": hot.bundles * busy * fill / peak.clock * 1e6,
        "bundles": hot.bundles,
        "spills": hot.spills,
        "matrix_unit_busy": round(busy, 3),
        "share": round(busy * fill, 3),
        "note": f"matrix unit busy {busy:.0%}, {hot.spills} spills and fills",
    }


SECTIONS: dict[str, Callable[[float, Any], Iterator[Row]]] = {"static": static}
