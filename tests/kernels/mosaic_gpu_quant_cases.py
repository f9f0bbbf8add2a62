"""The Hopper quantised matmul in the Mosaic GPU interpreter, which also looks for races between
warpgroups, TMA copies and barriers; and faults planted in it, which the comparison must find. Slow
there: few cases, each with all that it can hold.

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
from pallas_kernels.quant_matmul.mosaic_gpu import Config, _Kernel
from tests.kernels import quant_cases
from tests.kernels.quant_cases import FORMATS, FP8, W8A8, W8A16

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
    # Tiles of two groups.
    "int8_32": (FORMATS["int8_zeros"], 5, 64, 192, "float16", Config(1, 64, 2, 1)),
    "int4": (Format("int4", group_size=64), 5, 64, 256, "bfloat16", Config(1, 32, 3, 2)),
    "int4_zeros": (
        Format("int4", group_size=128, zero_points=True),
        5,
        128,
        384,
        "float16",
        Config(2, 64, 2, 1),
    ),
    # Tiles of four groups, and of one group and a third.
    "int4_32": (FORMATS["int4_zeros_32"], 5, 64, 256, "bfloat16", Config(1, 64, 2, 1)),
    "int4_96": (FORMATS["int4_96"], 3, 64, 384, "bfloat16", Config(1, 64, 2, 1)),
    # Two blocks of 72 rows, for which warpgroups pass registers on.
    "int4_rows": (FORMATS["int4_32"], 140, 128, 128, "bfloat16", Config(2, 64, 2, 1)),
    # Two blocks of rows.
    "w8a8": (W8A8, 130, 64, 256, "bfloat16", Config(1, 128, 2, 1)),
    "w8a8_splits": (W8A8, 2, 64, 256, "bfloat16", Config(1, 64, 2, 2)),
    "w8a16": (W8A16, 5, 64, 256, "bfloat16", Config(1, 64, 2, 2)),
    # Low digits begin within a block of rows.
    "w8a16_rows": (W8A16, 70, 128, 128, "float16", Config(2, 64, 2, 1)),
    "fp8": (FP8, 5, 64, 256, "bfloat16", Config(1, 64, 2, 1)),
    "fp8_weights": (Format("float8_e4m3fn"), 5, 64, 128, "bfloat16", Config(1, 64, 2, 1)),
}


def is_right(name: str) -> bool:
    """Bit for bit where the contract has integers, else within float32's bounds."""
    format, num_rows, n, k, dtype, config = CASES[name]
    target = Target("gpu", "NVIDIA H200", plgpu.InterpretGPUParams(detect_races=True))
    x = quant_cases.rows(num_rows, k, seed=1, dtype=dtype)
    weight = quant_cases.make(format, n, k, seed=2)
    op = partial(mosaic_gpu.quant_matmul, format=format, target=target, config=config)
    out = np.asarray(jax.jit(op)(jnp.asarray(x), weight.data, weight.scales, weight.zeros))
    jax.effects_barrier()
    if format in (W8A8, W8A16):
        return np.array_equal(out, quant_cases.integer_definition(x, weight))
    want, allowed = quant_cases.float64_definition(x.astype(np.float32), weight)
    return bool((np.abs(out - want) <= allowed + 1e-37).all())


@pytest.mark.parametrize("name", CASES)
def test_the_contract_without_races(name: str, capfd: Any):
    assert is_right(name)
    assert "RACE DETECTED" not in capfd.readouterr().out


# -- faults

_digits = mosaic_gpu.digits
_call, _columns, _values, _product = (
    _Kernel.call,
    _Kernel.columns,
    _Kernel.values,
    _Kernel.product,
)
_pieces: Any = _Kernel.pieces


def _second_rows_are_the_first(self: Any, operands: list[Any], target: Target) -> Any:
    rows = operands[0]
    copied = rows.at[:, self.width :].set(rows[:, : rows.shape[1] - self.width])
    return _call(self, [copied, *operands[1:]], target)


# name -> cases that must notice it, of which object what is replaced
FAULTS: dict[str, tuple[tuple[str, ...], Any, str, Any]] = {
    "the group of the first piece": (
        ("int4_32", "int8_32"),
        _Kernel,
        "columns",
        lambda self, grouped, n, tile, piece: _columns(self, grouped, n, tile, (0, 0)),
    ),
    "the group of the tile before": (
        ("int4", "int8_groups"),
        _Kernel,
        "columns",
        lambda self, grouped, n, tile, piece: _columns(
            self, grouped, n, jnp.maximum(tile - 1, 0), piece
        ),
    ),
    "the last piece dropped": (
        ("int4_32", "int4_96"),
        _Kernel,
        "pieces",
        property(lambda self: _pieces.fget(self)[:-1]),
    ),
    "zero points ignored": (
        ("int4_32", "int8_32"),
        _Kernel,
        "values",
        lambda self, w, zero: _values(self, w, None),
    ),
    "halves of a byte swapped": (
        ("int4", "int4_32"),
        _Kernel,
        "values",
        lambda self, w, zero: _values(self, w, zero)[::-1],
    ),
    "high halves dropped": (
        ("int4_32",),
        _Kernel,
        "product",
        lambda self, *lists: _product(self, *(x[:1] for x in lists)),
    ),
    "a split dropped": (
        ("w8a16", "int4"),
        _Kernel,
        "call",
        lambda self, *args: _call(self, *args)[:1],
    ),
    "the second rows are the first": (
        ("int4_rows", "w8a16_rows"),
        _Kernel,
        "call",
        _second_rows_are_the_first,
    ),
    "digits swapped": (
        ("w8a16",),
        mosaic_gpu,
        "digits",
        lambda x: (_digits(x)[0][::-1], _digits(x)[1]),
    ),
}
PLANTED = [(fault, name) for fault, (names, *_) in FAULTS.items() for name in names]


@pytest.mark.parametrize("number", range(len(PLANTED)))
def test_a_fault_is_noticed(number: int, monkeypatch: pytest.MonkeyPatch):
    fault, name = PLANTED[number]
    monkeypatch.setattr(*FAULTS[fault][1:])
    assert not is_right(name), (fault, name)
