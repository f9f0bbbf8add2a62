"""Quantised matmuls for `python -m pallas_kernels.aot`: weights of a published model, by format.

Each format meets each number of rows on each chip, and weights take turns; the TPUs together have
each format with each weight.
"""

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from pallas_kernels.aot_targets import CHIPS, Chip, Program
from pallas_kernels.quant_matmul import Format

FORMATS = {
    "w8a8": Format("int8", activations="int8"),
    "w8a16": Format("int8", activations="int16"),
    "int8": Format("int8"),
    "int4 groups of 128": Format("int4", group_size=128),
    "int4 groups of 128, zeros": Format("int4", group_size=128, zero_points=True),
    "fp8": Format("float8_e4m3fn", activations="float8_e4m3fn"),
}
# Outputs and inputs of Llama-3.1-8B.
WEIGHTS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate and up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ROWS = (1, 8, 64, 2048)
# What is rarer: (format, N, K, rows, dtype of the rows). SmolLM2's K is no multiple of 128.
OTHERS = (
    (Format("int8", group_size=128), 4096, 4096, 64, "bfloat16"),
    (Format("int8", group_size=32, zero_points=True), 1536, 4096, 8, "bfloat16"),
    (Format("int4", group_size=32), 4096, 4096, 8, "bfloat16"),
    (Format("int4", group_size=32, zero_points=True), 4096, 4096, 512, "bfloat16"),
    (Format("int4", group_size=64), 1536, 576, 8, "bfloat16"),
    (Format("int4", group_size=64), 64, 576, 8, "bfloat16"),
    (Format("int4"), 576, 1536, 8, "bfloat16"),
    (Format("float8_e4m3fn"), 1536, 576, 8, "bfloat16"),
    (Format("float8_e4m3fn", group_size=128), 4096, 4096, 64, "bfloat16"),
    (Format("int8", activations="int8"), 576, 1536, 1, "bfloat16"),
    (Format("int8", activations="int16"), 576, 1536, 1, "bfloat16"),
    # The most rows that the kernel for Hopper takes.
    (Format("int8", activations="int8"), 4096, 4096, 256, "bfloat16"),
    (Format("int8", activations="int16"), 4096, 14336, 128, "bfloat16"),
    (Format("int8"), 14336, 4096, 512, "bfloat16"),
    (Format("int4", group_size=128), 4096, 14336, 512, "bfloat16"),
    (Format("int4"), 4096, 4096, 512, "bfloat16"),
    (Format("float8_e4m3fn"), 4096, 4096, 512, "float16"),
    (Format("int8"), 576, 576, 40, "float32"),
    (Format("int4", group_size=128), 4096, 4096, 64, "float32"),
)


def programs(impl: str, chip: Chip) -> Iterator[Program]:
    """The quantised matmuls that a kernel is compiled with for `chip`."""
    turn = list(CHIPS).index(chip.name)
    names = list(WEIGHTS)
    for i, (label, format) in enumerate(FORMATS.items()):
        for j, rows in enumerate(ROWS):
            name = names[(turn + i + j) % len(names)]
            yield program(impl, chip, f"{name}/{label}", format, *WEIGHTS[name], rows)
    for format, n, k, rows, dtype in OTHERS:
        label = f"{n} x {k}/{format.dtype}"
        label += f" groups of {format.group_size}" if format.group_size else ""
        label += ", zeros" if format.zero_points else ""
        label += f" by {format.activations}" if format.activations != "float" else ""
        label += "" if dtype == "bfloat16" else f"/{dtype}"
        yield program(impl, chip, label, format, n, k, rows, dtype)


def program(
    impl: str,
    chip: Chip,
    label: str,
    format: Format,
    n: int,
    k: int,
    rows: int,
    dtype: str = "bfloat16",
) -> Program:
    """One product of `rows` rows with a weight [n, k]."""
    module: Any = importlib.import_module(f"pallas_kernels.quant_matmul.{impl}")
    refused = module.unsupported(format, n, k, dtype, chip.target)
    arrays = format.shapes(n, k)
    args = (jax.ShapeDtypeStruct((rows, k), dtype), *arrays.values())
    function = partial(module.quant_matmul, format=format, target=chip.target)
    return Program(f"{impl}/quant_matmul/{label}/{rows} rows", function, args, refused=refused)
