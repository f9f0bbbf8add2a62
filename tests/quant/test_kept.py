"""Weights kept as stored: the very floats that each format stands for, and their matmul."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import EngineConfig, models
from jaxinfer.params import flatten
from jaxinfer.quant import gguf_blocks, kept
from jaxinfer.quant.arrays import Kept, QuantArray, einsum, take
from jaxinfer.quant.packed import PackedWeight
from jaxinfer.setup_model import quantised
from jaxinfer.weights import load, open_model
from pallas_kernels import resolve
from pallas_kernels.quant_matmul import Format
from tests.models.tiny import run
from tests.quant import gguf_files
from tests.quant.packers import CASES, checkpoint
from tests.quant.stored import LAYER, goldens, opened
from tests.quant.test_gguf_blocks import HALVES, bits_of, random_blocks

OPS = resolve("xla")
GOLDENS = goldens()
FP8 = "float8_e4m3fn"
HELD = {
    "awq": Kept(Format("int4", 16, True)),
    "gptq-2": Kept(Format("int4", 16, True)),
    "gptq-3-act-order": Kept(Format("int4", 16, True), permuted=True),
    "gptq-4-act-order": Kept(Format("int4", 16, True), permuted=True),
    "gptq-4-channel": Kept(Format("int4", 32, True)),
    "gptq-8": Kept(Format("int8", 16, True)),
    "gptq-v2-3": Kept(Format("int4", 16, True)),
    "gptq-v2-4-act-order": Kept(Format("int4", 16, True), permuted=True),
    "gptq-2-converted": Kept(Format("int4", 16, True)),
    "gptq-4-converted": Kept(Format("int4", 16, True)),
    "gptq-8-converted": Kept(Format("int8", 16, True)),
    "ct-pack4-group": Kept(Format("int4", 16)),
    "ct-pack4-group-zeros": Kept(Format("int4", 16, True)),
    "ct-pack4-channel-odd": Kept(Format("int4", 36, True)),
    "ct-pack8-group": Kept(Format("int8", 16)),
    "ct-int8-channel": Kept(Format("int8")),
    "ct-int8-channel-zeros": Kept(Format("int8", 32, True)),
    "ct-int8-tensor": Kept(Format("int8")),
    "ct-fp8-channel": Kept(Format(FP8)),
    "ct-fp8-tensor": Kept(Format(FP8)),
    "fp8-block": Kept(Format(FP8, 16)),
}
"""How each golden is held; all but ct-fp8-block, whose last block of inputs is smaller."""


def held(weight: PackedWeight, how: Kept, order: np.ndarray | None = None) -> QuantArray:
    """`weight` as a leaf [K, N] of arrays on the device, of the shapes that were planned."""
    num_inputs, num_outputs = weight.shape
    order = np.arange(num_outputs) if order is None else order
    leaf = QuantArray.of_shape((num_inputs, len(order)), (0,), how)
    made = jax.device_put(kept.hold(weight, order, leaf))
    assert jax.tree.structure(made) == jax.tree.structure(leaf)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(made)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(leaf)
    ]
    return made


def golden(case: str, **group: Any) -> tuple[Kept | str, PackedWeight, np.ndarray]:
    """(how it is held, the packed weight, the matrix [K, N] of the format's own library); `group`
    replaces entries of a compressed-tensors config group."""
    config, parts, expected = GOLDENS[case]
    if group:
        config = {**config, "config_groups": {"g": {**config["config_groups"]["group_0"], **group}}}
    stored = opened(config, {f"{LAYER}.{part}": array for part, array in parts.items()})
    name = f"{LAYER}.weight"
    weight = stored.read(name)
    how = kept.of_checkpoint(stored.format, weight.shape[0], stored.group_indices(name))
    return how, weight, expected


@pytest.mark.parametrize("case", HELD)
def test_it_stands_for_the_librarys_floats(case: str):
    how, weight, expected = golden(case)
    assert how == HELD[case]
    assert isinstance(how, Kept)
    got = np.asarray(held(weight, how).dequantised())
    np.testing.assert_array_equal(bits_of(got), bits_of(weight.dequantize()))
    np.testing.assert_array_equal(got.astype(expected.dtype), expected, strict=True)


def test_every_golden_is_held_but_one():
    assert GOLDENS.keys() - HELD.keys() == {"ct-fp8-block"}
    how, _, _ = golden("ct-fp8-block")
    assert isinstance(how, Kept) and how.format.group_size == 16
    with pytest.raises(ValueError, match="group_size is 16; it must divide K, 36"):
        QuantArray.of_shape((36, 20), (0,), how)


@pytest.mark.parametrize(
    "case", ["awq", "gptq-3-act-order", "gptq-8", "fp8-block", "ct-fp8-tensor"]
)
@pytest.mark.parametrize("num_rows", [1, 16])
def test_einsum_is_that_of_the_floats(case: str, num_rows: int):
    how, weight, _ = golden(case)
    assert isinstance(how, Kept)
    check_einsum(held(weight, how), num_rows)


def check_einsum(w: QuantArray, num_rows: int) -> None:
    x = np.random.default_rng(num_rows).standard_normal((num_rows, w.shape[0])).astype(np.float32)
    floats = np.asarray(w.dequantised()).astype(np.float64)
    got = jax.jit(partial(einsum, "td,df->tf", ops=OPS))(x, w=w)
    # float32 sums of K products, each rounded: far from what a wrong group or input would give
    bound = 4 * w.shape[0] ** 0.5 * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(floats))
    assert (np.abs(got - x @ floats) <= bound).all()


def test_int8_activations_are_within_half_a_step():
    """W8A8: each x is off by half a step of its row at most, and nothing else rounds."""
    inputs = {"num_bits": 8, "type": "int", "dynamic": True}
    how, weight, _ = golden("ct-int8-channel", input_activations=inputs)
    assert isinstance(how, Kept) and how == Kept(Format("int8", activations="int8"))
    w = held(weight, how)
    x = np.random.default_rng(0).standard_normal((5, w.shape[0])).astype(np.float32)
    floats = np.asarray(w.dequantised()).astype(np.float64)
    got = np.asarray(einsum("td,df->tf", jnp.asarray(x), w, OPS))
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    off = np.abs(got - x @ floats)
    assert (off <= 0.501 * step * np.abs(floats).sum(axis=0)).all() and off.any()
    rounded = np.round(x / step) * step
    np.testing.assert_allclose(got, rounded @ floats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", HALVES)
def test_gguf_blocks(kind: str):
    """Realistic blocks exactly; with absurd scales beside offsets, to one more rounding."""
    how = kept.of_block(kind)
    assert isinstance(how, Kept) and how.offsets == (kind in ("Q4_1", "Q4_K"))
    raw = gguf_files.blocks(kind, (24, 512), 1)
    weight = gguf_blocks.read("w", raw, (24, 512), kind)
    w = held(weight, how)
    np.testing.assert_array_equal(
        bits_of(np.asarray(w.dequantised())), bits_of(weight.dequantize())
    )
    for num_rows in (1, 16):
        check_einsum(w, num_rows)

    weight = gguf_blocks.read("w", random_blocks(kind, (12, 512)), (12, 512), kind)
    got, want = np.asarray(held(weight, how).dequantised()), weight.dequantize()
    if weight.offsets is None:
        np.testing.assert_array_equal(got, want)
        return
    size = np.repeat(np.abs(weight.offsets) + 16 * np.abs(weight.scales), weight.group_size, axis=0)
    assert (np.abs(got - want) <= 2 * np.finfo(np.float32).eps * size).all()


def test_a_table_of_blocks_gives_its_rows():
    weight = gguf_blocks.read("w", gguf_files.blocks("Q4_1", (24, 64), 1), (24, 64), "Q4_1")
    leaf = QuantArray.of_shape((24, 64), (1,), Kept(Format("int4", 32), offsets=True))
    table = jax.device_put(kept.hold(weight, np.arange(24), leaf))
    rows = take(table, jnp.asarray([3, 0, 99]), "float32")
    np.testing.assert_array_equal(rows, weight.dequantize().T[[3, 0, 23]])


def test_a_table_with_permuted_inputs_gives_its_rows():
    _, weight, _ = golden("gptq-4-act-order")
    leaf = QuantArray.of_shape((32, 32), (1,), HELD["gptq-4-act-order"])
    table = jax.device_put(kept.hold(weight, np.arange(32), leaf))
    rows = take(table, jnp.arange(32), "float32")
    np.testing.assert_array_equal(rows, weight.dequantize().T)


def test_outputs_are_chosen_and_moved():
    _, weight, _ = golden("fp8-block")  # outputs in blocks of 8 share scales
    order = np.array([9, 0, 15, 3])
    w = held(weight, HELD["fp8-block"], order)
    np.testing.assert_array_equal(w.dequantised(), weight.dequantize()[:, order])


def test_unequal_groups_cannot_be_held():
    config, parts, _ = GOLDENS["gptq-4-act-order"]
    uneven = parts["g_idx"].copy()
    uneven[np.flatnonzero(uneven == 0)[0]] = 1
    stored = opened(config, {f"{LAYER}.{p}": a for p, a in {**parts, "g_idx": uneven}.items()})
    groups = stored.group_indices(f"{LAYER}.weight")
    how = kept.of_checkpoint(stored.format, 32, groups)
    assert how == "its groups (g_idx) are of unequal size"
    assert kept.of_block("Q5_K") == "type Q5_K (kept are Q8_0, Q4_0, Q4_1, Q4_K, Q6_K)"


# -- whole models


def loaded(path: Path, *, is_kept: bool, **options: Any) -> tuple[models.Model, dict[str, Any]]:
    with open_model(path) as source:
        model = models.build(source.config, OPS, "float32")
        if is_kept:
            model = quantised(EngineConfig(**options), model, source)
        params = load(source, model, lambda a, path: jax.device_put(a), progress=False)
    return model, params


def check_params(got: dict[str, Any], want: dict[str, Any]) -> int:
    """Every leaf stands for the same floats, bit for bit; the number of those kept."""
    count = 0
    got, want = flatten(got), flatten(want)
    assert got.keys() == want.keys()
    for path, leaf in got.items():
        if isinstance(leaf, QuantArray):
            leaf, count = leaf.dequantised(), count + 1
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(want[path]), err_msg=path)
    return count


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gguf_models_of_every_block(tmp_path: Path, name: str):
    """q and k with their rows back in order, fused and transposed matrices, the tied table."""
    path = getattr(gguf_files, name)(tmp_path / "x.gguf")
    model, params = loaded(path, is_kept=True, quantization="gguf")
    plain, floats = loaded(path, is_kept=False)
    assert check_params(params, floats) == {"llama": 15, "gpt2": 13}[name]
    tokens = np.arange(5, 37, dtype=np.int32)
    got, want = (run(*pair, tokens, 32, 32) for pair in ((model, params), (plain, floats)))
    # float32 sums of 256 or 512 products in another order, through two layers
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_are_kept(tmp_path: Path, case: str):
    folder = checkpoint(case).write(tmp_path / "m")
    model, params = loaded(folder, is_kept=True)
    plain, floats = loaded(folder, is_kept=False)
    # K is 48 or 96: blocks of 32 inputs divide down_proj's alone
    assert check_params(params, floats) == (2 if case == "fp8-block" else 14)
    activations = {leaf.format.activations for leaf in flatten(params).values()
                   if isinstance(leaf, QuantArray)}  # fmt: skip
    assert activations == {{"ct-int8": "int8", "fp8-tensor": FP8}.get(case, "float")}
    if case not in ("gptq-4-act-order", "ct-int4"):
        return  # einsum has the others
    tokens = np.arange(5, 37, dtype=np.int32)
    got, want = (run(*pair, tokens, 32, 32) for pair in ((model, params), (plain, floats)))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
