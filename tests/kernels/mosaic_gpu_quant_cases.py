"""The Hopper quantised matmul in the Mosaic GPU interpreter, which also looks for races between
warpgroups, TMA copies and barriers. Slow there: few cases, each with all that it can hold.

Run by `test_quant_matmul_mosaic_gpu`, in a process of its own (see `mosaic_gpu_paged_cases`). The
interpreter has no wgmma with A in registers: there the weights pass through shared memory.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Format
from pallas_kernels.common import Target
from pallas_kernels.quant_matmul import mosaic_gpu
from pallas_kernels.quant_matmul.mosaic_gpu import Config
from tests.kernels import quant_cases
from tests.kernels.quant_cases import FP8, W8A8

# format, rows, N, K, dtype of the rows, tiles
CASES: dict[str, tuple[Format, int, int, int, str, Config]] = {
    # A ring that is filled more than once; two blocks of outputs.
    "int8": (Format("int8"), 3, 128, 256, "bfloat16", Config(1, 64, 2, 1)),
    # Two splits of K, two warpgroups, scales of groups of two tiles each.
    "int8_groups": (
        Format("int8", group_size=128, zero_points=True),
        9,
        128,
        256,
        "bfloat16",
        Config(2, 64, 2, 2),
    ),
    "int4": (Format("int4", group_size=64), 5, 64, 256, "bfloat16", Config(1, 32, 3, 2)),
    "int4_zeros": (
        Format("int4", group_size=128, zero_points=True),
        5,
        128,
        384,
        "float16",
        Config(2, 64, 2, 1),
    ),
    # Two blocks of rows.
    "w8a8": (W8A8, 70, 64, 256, "bfloat16", Config(1, 128, 2, 1)),
    "w8a8_splits": (W8A8, 2, 64, 256, "bfloat16", Config(1, 64, 2, 2)),
    "fp8": (FP8, 5, 64, 256, "bfloat16", Config(1, 64, 2, 1)),
    "fp8_weights": (Format("float8_e4m3fn"), 5, 64, 128, "bfloat16", Config(1, 64, 2, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_float64_on_the_same_values(name: str, capfd: Any):
    format, num_rows, n, k, dtype, config = CASES[name]
    target = Target("gpu", "NVIDIA H200", plgpu.InterpretGPUParams(detect_races=True))
    x = quant_cases.rows(num_rows, k, seed=1, dtype=dtype)
    weight = quant_cases.make(format, n, k, seed=2)
    op = partial(mosaic_gpu.quant_matmul, format=format, target=target, config=config)
    out = np.asarray(jax.jit(op)(jnp.asarray(x), weight.data, weight.scales, weight.zeros))
    jax.effects_barrier()
    assert "RACE DETECTED" not in capfd.readouterr().out
    if format == W8A8:
        np.testing.assert_array_equal(out, quant_cases.integer_definition(x, weight))
        return
    want, allowed = quant_cases.float64_definition(x.astype(np.float32), weight)
    error = np.abs(out - want)
    assert (error <= allowed + 1e-37).all(), (error / (allowed + 1e-37)).max()
