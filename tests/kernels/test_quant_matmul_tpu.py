"""What is the TPU kernel's own: its tiles, its two ways with scales of groups, the interpreter that
watches memory, what it refuses, and faults planted in it, which the comparison must find."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Format
from pallas_kernels.common import Target
from pallas_kernels.quant_matmul import tpu
from tests.kernels import quant_cases
from tests.kernels.quant_cases import FORMATS, W8A8, Weight

CHIPS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", None)
INTERPRET = Target("cpu", None, interpret=True)
SMALL = tpu.Config(32, 128, 128)


def compute(x: np.ndarray, weight: Weight, target: Target = INTERPRET) -> np.ndarray:
    op = jax.jit(partial(tpu.quant_matmul, format=weight.format, target=target, config=SMALL))
    return np.asarray(op(jnp.asarray(x), weight.data, weight.scales, weight.zeros))


def is_right(out: np.ndarray, x: np.ndarray, weight: Weight) -> bool:
    """The comparison of the suite."""
    if weight.format == W8A8:
        return bool(np.array_equal(out, quant_cases.integer_definition(x, weight)))
    want, allowed = quant_cases.float64_definition(x.astype(np.float32), weight)
    return bool((np.abs(out - want) <= allowed + 1e-37).all())


# Several tiles of each axis, the last of rows and of outputs cut off: 70 of 96 rows, 200 of 256
# outputs, and of K 3 tiles of 128 lanes.
@pytest.mark.parametrize("name", ["w8a8", "int8", "int4", "int4_zeros_32", "fp8", "int8_zeros"])
@pytest.mark.parametrize("num_rows", [3, 70])
def test_many_tiles(name: str, num_rows: int):
    format = FORMATS[name]
    k = 768 if format.dtype == "int4" else 384
    x, weight = quant_cases.rows(num_rows, k), quant_cases.make(format, 200, k)
    assert is_right(compute(x, weight), x, weight)


@pytest.mark.parametrize("k", [1152, 2176])
def test_int8_by_bfloat16_products_is_exact(k: int):
    """On a chip without int8 products, with sums of 1024 as large as they get."""
    x, weight = quant_cases.rows(5, k), quant_cases.make(W8A8, 40, k)
    x[1] = 1.0
    weight.data[:2] = -128
    target = Target("cpu", "TPU v4", interpret=True)
    want = quant_cases.integer_definition(x, replace(weight, values=weight.data))
    whole = tpu.Config(32, 128, k)
    op = jax.jit(partial(tpu.quant_matmul, format=W8A8, target=target, config=whole))
    out = op(jnp.asarray(x), weight.data, weight.scales, None)
    np.testing.assert_array_equal(np.asarray(out), want)


@pytest.mark.parametrize("name", ["int8_groups", "int4_zeros_32", "fp8_groups"])
def test_scaled_weights_are_rounded_as_xla_rounds_them(name: str):
    """Many bfloat16 rows: a weight is rounded with its scale, by 2**-9 of itself at most."""
    x = quant_cases.rows(300, 192, dtype="bfloat16")
    weight = quant_cases.make(FORMATS[name], 40, 192)
    values = x.astype(np.float64)
    want, allowed = quant_cases.float64_definition(x.astype(np.float32), weight)
    unshifted = replace(weight, zeros=None).float64()
    allowed = allowed + 2.0**-9 * np.abs(values) @ np.abs(unshifted).T
    config = tpu.Config(512, 128, 128)
    op = partial(tpu.quant_matmul, format=weight.format, target=INTERPRET, config=config)
    out = jax.jit(op)(jnp.asarray(x), weight.data, weight.scales, weight.zeros)
    assert (np.abs(np.asarray(out) - want) <= allowed + 1e-37).all()


WATCHED = """
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from pallas_kernels.common import Target
from tests.kernels import quant_cases
from tests.kernels.test_quant_matmul_tpu import compute, is_right
params = pltpu.InterpretParams({})
for name, k in (("w8a8", 256), ("int4_zeros_32", 512)):
    weight = quant_cases.make(quant_cases.FORMATS[name], 150, k)
    x = quant_cases.rows(40, k)
    assert is_right(compute(x, weight, Target("cpu", None, params)), x, weight)
    races = interpret_pallas_call.races
    assert races is None or not races.races_found
"""


@pytest.mark.parametrize(
    "params",
    ["dma_execution_mode='on_wait'", "dma_execution_mode='eager', detect_races=True"],
)
def test_under_the_interpreter_that_watches_memory(params: str):
    # What nobody wrote is NaN there, the cut off parts of the last tiles with it.
    subprocess.run([sys.executable, "-c", WATCHED.format(params)], check=True, timeout=300)


@pytest.mark.parametrize("device_kind", CHIPS)
@pytest.mark.parametrize("num_rows", [1, 600])
@pytest.mark.parametrize("name", ["w8a8", "int8_zeros", "int4_zeros_32", "int4_96", "fp8"])
def test_lowers_for_tpu(device_kind: str | None, name: str, num_rows: int):
    x = jax.ShapeDtypeStruct((num_rows, 1536), jnp.bfloat16)
    op = partial(tpu.quant_matmul, format=FORMATS[name], target=Target("tpu", device_kind))
    args = FORMATS[name].shapes(1600, 1536).values()
    lowered = jax.jit(op).trace(x, *args).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == 1


def test_tiles_hold_whole_groups():
    for lanes in (48, 96, 128, 288, 576, 4096, 5504, 14336):
        for span in (1, 16, 32, 48, 64, 128, 256):
            if lanes % span:
                continue
            for most in (128, 1024, 4096):
                block = tpu._block_k(lanes, span, most)
                assert lanes % block == 0 and block % span == 0
                assert block == lanes or block % 128 == 0
    assert tpu._block_k(14336, 64, 4096) == 3584


def test_what_no_tile_fits_is_refused_and_left_to_xla():
    """K of 32800 has no divisor that is a multiple of 128."""
    k, target = 32800, Target("tpu", "TPU v5 lite")
    why_not = tpu.unsupported(Format("int8"), 64, k, "bfloat16", target)
    assert why_not is not None and "K is 32800 and group_size None" in why_not
    args = [jax.ShapeDtypeStruct((4, k), jnp.bfloat16), *Format("int8").shapes(64, k).values()]

    def calls(impl: str) -> int:
        ops = pallas_kernels.resolve(impl, "tpu", device_kind="TPU v5 lite")
        op = jax.jit(partial(ops.quant_matmul, format=Format("int8")))
        return op.trace(*args).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    assert calls("auto") == 0
    with pytest.raises(ValueError, match="K is 32800"):
        calls("tpu")
    args = [jax.ShapeDtypeStruct((4, 512), jnp.bfloat16), *Format("int8").shapes(64, 512).values()]
    assert calls("auto") == calls("tpu") == 1


@pytest.mark.parametrize("field", ["block_t", "block_n", "block_k"])
def test_tiles_that_cannot_be_are_named(field: str):
    with pytest.raises(ValueError, match=rf"{field} is 40; it must be a multiple of"):
        replace(SMALL, **{field: 40})


# -- faults

_call, _dot, _turn, _stored = tpu._call, tpu._dot, tpu._turn, tpu._stored


def _with(change: Any) -> Any:
    """`_call` with arrays changed by name."""

    def call(plan: Any, arrays: Any, target: Target) -> jax.Array:
        changed = {name: change.get(name, lambda x: x)(x) for name, x in arrays.items()}
        return _call(plan, changed, target)

    return {"_call": call}


def _first_tile_again(x: jax.Array) -> jax.Array:
    """Rows from 32 on are those from 0 on."""
    return x.at[:, 32:].set(x[:, : x.shape[1] - 32])


# name -> formats that must notice it, what replaces names of the module
FAULTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "the scale of the group before": (
        ("int8_groups", "int4_32", "fp8_groups", "int8_zeros"),
        {"_turn": lambda values, to: _turn(jnp.roll(values, 1, axis=1), to)},
    ),
    "halves of a byte swapped": (
        ("int4", "int4_32", "int4_zeros_32"),
        {"_stored": lambda plan, data: _stored(plan, data)[::-1]},
    ),
    "zero points ignored": (
        ("int8_zeros", "int4_zeros_32"),
        {"_dot": lambda x, w, axis=1: _dot(x, w, axis) * axis},
    ),
    "the last tile of K dropped": (
        ("w8a8", "int8", "int8_groups", "int4_zeros_32", "fp8"),
        {"_call": lambda plan, *rest: _call(replace(plan, steps=plan.steps - 1), *rest)},
    ),
    "the scales of rows ignored": (("w8a8", "fp8"), _with({"row_scales": jnp.ones_like})),
    "the scale of the output before": (
        ("w8a8", "int8", "int4", "fp8"),
        _with({"scales": lambda x: jnp.roll(x, 1, axis=1)}),
    ),
    "the second tile of rows is the first": (
        ("w8a8", "int4_zeros_32"),
        _with({"x": _first_tile_again}),
    ),
    "the offset of int4 forgotten": (
        ("int4", "int4_zeros_32"),
        {"_stored": lambda plan, data: [x + np.int8(8) for x in _stored(plan, data)]},
    ),
}


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault, (names, _) in FAULTS.items() for name in names]
)
@pytest.mark.parametrize("num_rows", [5, 40])
def test_a_fault_in_the_kernel_is_noticed(
    monkeypatch: pytest.MonkeyPatch, fault: str, name: str, num_rows: int
):
    """Few rows, whose sums are scaled, and more, before which weights are."""
    if "tile of rows" in fault and num_rows <= 32:
        pytest.skip("one tile of rows")
    format = FORMATS[name]
    k = 768 if format.dtype == "int4" else 384
    x, weight = quant_cases.rows(num_rows, k, seed=3), quant_cases.make(format, 40, k)
    monkeypatch.setattr(tpu, "MOST_SCALED_ROWS", 16 * 8)
    jax.clear_caches()
    assert is_right(compute(x, weight), x, weight)
    for attribute, faulty in FAULTS[fault][1].items():
        monkeypatch.setattr(tpu, attribute, faulty)
    jax.clear_caches()
    assert not is_right(compute(x, weight), x, weight)
