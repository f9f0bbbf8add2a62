"""The TPU kernels where the shared suite does not look: the interpreter that watches memory and
copies, the words of a page, block sizes, lowering for chips that are not there."""

import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_kernels.kv_write.tpu as kv_write_tpu
from pallas_kernels import Ops, Ragged, Spec
from pallas_kernels.common import QUANTISED, Target, quantise
from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.tpu_decode import DecodeConfig
from pallas_kernels.paged_attention.tpu_layout import (
    Layout,
    all_values,
    exponent,
    spread,
    token_scales,
    unpack,
)
from pallas_kernels.paged_attention.tpu_prefill import PrefillConfig
from tests.kernels.cases import Case, build, error_of, oracle, run, write

INTERPRETED = Target("cpu", None, True)
SMALL = DecodeConfig(16, 2), PrefillConfig(tile=16, small_tile=8, block=16, buffers=2)


def ops_of(target: Target, config: Any = None) -> Ops:
    """The TPU modules as an Ops, with block sizes of choice."""
    return Ops(
        name="interpret",
        platform=target.platform,
        reason="test",
        allocate=partial(tpu.allocate, target=target),
        page_bytes=tpu.page_bytes,
        kv_write=kv_write_tpu.kv_write,
        paged_attention=partial(tpu.paged_attention, target=target, config=config),
        copy_pages=tpu.copy_pages,
        flash_attention=lambda *_, **__: jnp.zeros(()),  # not asked for here
        quant_matmul=lambda *_, **__: jnp.zeros(()),
    )


def attend(ops: Ops, case: Case) -> float:
    """The error of `case` with NaN in every slot that holds no token."""
    built = build(case)
    pages = ops.allocate(
        built.num_pages, case.page_size, case.heads[1], case.head_dim, case.spec.page_dtype
    )
    shape = (built.num_pages * case.page_size, case.heads[1], case.head_dim)
    k, v = (np.full(shape, np.nan, built.q.dtype) for _ in range(2))
    k[built.written], v[built.written] = np.concatenate(built.k), np.concatenate(built.v)
    slots = jnp.arange(shape[0], dtype=jnp.int32)
    pages = write(ops, pages, jnp.asarray(k), jnp.asarray(v), slots)
    options = (case.head_dim**-0.5, case.window, case.soft_cap)
    out = run(ops, jnp.asarray(built.q), pages, built.device_ragged(), *options)
    return error_of(np.asarray(out), oracle(built))


ROWS = ((1, 5), (1, 70), (0, 0), (1, 17), (40, 90), (5, 33), (0, 9), (17, 17))


@pytest.mark.parametrize(
    ("config", "page_dtype"),
    [
        ((DecodeConfig(8, 4), PrefillConfig(8, 8, block=8, buffers=3)), "float8_e4m3fn"),
        ((DecodeConfig(512, 2), PrefillConfig(32, 8, block=32, buffers=2)), "bfloat16"),
    ],
)
def test_block_sizes_change_how_not_what(config: Any, page_dtype: str):
    case = Case(
        ROWS, 2, heads=(4, 2), head_dim=64, dtype="bfloat16", page_dtype=page_dtype, window=21
    )
    assert attend(ops_of(INTERPRETED, config), case) <= 1


@pytest.mark.parametrize(
    ("page_dtype", "num_kv_heads", "head_dim"),
    [
        ("bfloat16", 1, 80),
        ("bfloat16", 3, 256),
        ("int8", 1, 256),
        ("int8", 5, 80),
        ("float8_e4m3fn", 1, 80),
        ("float8_e4m3fn", 2, 256),
        ("float8_e4m3fn", 5, 64),
    ],
)
def test_every_way_heads_share_words(page_dtype: str, num_kv_heads: int, head_dim: int):
    """Padded heads, K and V in one row of words, halves of lanes, several pieces."""
    case = Case(
        ((1, 9), (1, 40)),
        2,
        decode_only=True,
        heads=(3 * num_kv_heads, num_kv_heads),
        head_dim=head_dim,
        dtype="bfloat16",
        page_dtype=page_dtype,
    )
    assert attend(ops_of(INTERPRETED), case) <= 1


WATCHED = """
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from pallas_kernels.common import Target
from tests.kernels.cases import Case
from tests.kernels.test_paged_attention_tpu import SMALL, attend, ops_of
ops = ops_of(Target("cpu", None, pltpu.InterpretParams({})), SMALL)
common = dict(heads=(2, 1), padding_rows=1, padding_tokens=1)
for case in (
    Case(((1, 37), (1, 1), (1, 70)), 3, True, window=30, page_dtype="int8", **common),
    Case(((1, 20), (20, 36), (0, 5), (5, 41)), 1, window=25, **common),
    Case(((1, 20), (40, 50)), 1, dtype="bfloat16", page_dtype="float8_e4m3fn", **common),
):
    assert attend(ops, case) <= 1, case
    races = interpret_pallas_call.races
    assert races is None or not races.races_found, case
"""


@pytest.mark.parametrize(
    "params",
    ["dma_execution_mode='on_wait'", "dma_execution_mode='eager', detect_races=True"],
)
def test_under_the_interpreter_that_watches_memory(params: str):
    # It raises on reads out of bounds and on a copy that nobody waits for, and fills what nobody
    # wrote with NaN. A process of its own, because a wait that never ends can only be killed.
    subprocess.run([sys.executable, "-c", WATCHED.format(params)], check=True, timeout=300)


def test_float8_is_unpacked_exactly():
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    words = np.arange(256, dtype=np.uint32).reshape(2, 128)
    is_number = ~np.isnan(values)
    for slot in range(4):
        got = jax.jit(unpack, static_argnums=(1, 2))(words << 8 * slot, slot, "float8_e4m3fn")
        assert np.array_equal(np.asarray(got).ravel()[is_number], values[is_number])


def test_float8_is_shifted_exactly_but_for_the_smallest():
    layout = Layout(8, 4, 128, "float8_e4m3fn")
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    words = np.arange(256, dtype=np.uint32).reshape(2, 128)
    is_normal = ~np.isnan(values) & (np.abs(values) >= 2.0**-6)
    smallest = np.abs(values[~is_normal & ~np.isnan(values)])
    assert smallest.max() < 448 / 28000
    for slot in range(4):
        shifted = jax.jit(partial(all_values, layout=layout, dtype=jnp.dtype(jnp.bfloat16)))
        got = shifted([words << 8 * slot])
        row = slot % 2 * 4 + slot // 2  # sections of 2 tokens with 2 vectors each
        got = np.asarray(got, np.float32)[[row, row + 2]].ravel()
        want = values * 2.0 ** -exponent(layout, jnp.bfloat16)
        assert np.array_equal(got[is_normal], want[is_normal])


@pytest.mark.parametrize("page_size", [8, 16, 128])
@pytest.mark.parametrize(("first", "step", "width"), [(0, 1, 4), (4, 1, 4), (1, 2, 2), (6, 1, 1)])
def test_scales_are_spread_in_the_order_of_columns(
    page_size: int, first: int, step: int, width: int
):
    layout = Layout(page_size, 4, 128, "int8")
    tokens = 256
    k, v = np.random.default_rng(0).random((2, tokens, 4), np.float32)
    every = np.asarray(token_scales(jnp.asarray(k), jnp.asarray(v), layout))[:, 0]
    assert np.array_equal(every, np.concatenate([k, v], axis=1))
    rows = np.full((tokens // layout.scale_tokens, 128), np.nan, np.float32)
    rows[:, : layout.scale_tokens * 8] = every.reshape(len(rows), -1)
    got = spread(jnp.asarray(rows), first, step, width, layout)
    columns = [first + step * i for i in range(width)]
    assert np.array_equal(np.asarray(got)[0], every[:, columns].ravel())


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "dtype", "words"),
    [
        (8, 128, "bfloat16", 8 * 128),
        (8, 64, "bfloat16", 4 * 128),
        (1, 128, "bfloat16", 128),
        (3, 64, "bfloat16", 2 * 128),
        (2, 256, "float32", 4 * 256),
        (8, 128, "int8", 4 * 128 + 2 * 8),
        (2, 128, "float8_e4m3fn", 128 + 8),
    ],
)
def test_bytes_of_a_page(num_kv_heads: int, head_dim: int, dtype: str, words: int):
    """No padding where heads fill their words; the pool is as large as its pages."""
    assert tpu.page_bytes(16, num_kv_heads, head_dim, dtype) == 16 * 4 * words
    pages = tpu.allocate(3, 16, num_kv_heads, head_dim, dtype, target=INTERPRETED)
    assert sum(x.nbytes for x in jax.tree.leaves(pages)) == 3 * 16 * 4 * words


def test_words_hold_what_was_written():
    """The first row of words: heads 0 and 1 of K; the third: heads 0 and 1 of V."""
    pages = tpu.allocate(2, 8, 4, 128, "bfloat16", target=INTERPRETED)
    k, v = jax.random.normal(jax.random.key(0), (2, 1, 4, 128))
    slots = jnp.asarray([8 + 3], jnp.int32)
    data = np.asarray(kv_write_tpu.kv_write(pages, k, v, slots).data)
    rows = data[1, 3 * 4 : 4 * 4].view(ml_dtypes.bfloat16).reshape(4, 128, 2)
    for row, (x, first) in enumerate(((k, 0), (k, 2), (v, 0), (v, 2))):
        want = np.asarray(x[0, first : first + 2].astype(jnp.bfloat16)).T
        assert np.array_equal(rows[row], want)
    assert not data[0].any() and not data[1, : 3 * 4].any() and not data[1, 4 * 4 :].any()


@pytest.mark.parametrize("dtype", QUANTISED)
def test_scales_stand_beside_their_tokens(dtype: str):
    pages = tpu.allocate(2, 32, 5, 64, dtype, target=INTERPRETED)
    k, v = jax.random.normal(jax.random.key(0), (2, 1, 5, 64))
    written = kv_write_tpu.kv_write(pages, k, v, jnp.asarray([32 + 21], jnp.int32))
    scales = np.array(written.scales)
    lanes = slice(21 % 16 * 8, 21 % 16 * 8 + 8)
    want = [np.asarray(quantise(x, dtype)[1])[0] for x in (k, v)]
    found = scales[1, :, 1, lanes]
    assert np.array_equal(found[0], np.concatenate([want[0][:4], want[1][:4]]))
    assert np.array_equal(found[1, [0, 4]], [want[0][4], want[1][4]])
    scales[1, :, 1, lanes] = 0
    assert not scales.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype is float16; allowed on TPU: float32, bfloat16"),
        ({"page_dtype": "float16"}, "page dtype is float16; allowed on TPU: float32, bfloat16, in"),
        ({"page_size": 12}, "page_size is 12; it must be a multiple of 8 up to 512"),
        ({"page_size": 1024}, "page_size is 1024; it must be"),
        ({"page_size": 64, "page_dtype": "int8"}, "page_size is 64; int8 pages .* multiple of 128"),
    ],
)
def test_what_is_refused(change: dict, message: str):
    good = {"page_size": 128, "dtype": "bfloat16", "page_dtype": "bfloat16"}
    spec = Spec(num_heads=8, num_kv_heads=2, head_dim=128, **{**good, **change})
    target = Target("tpu", "TPU v6 lite")
    with pytest.raises(ValueError, match=message):
        raise ValueError(tpu.unsupported(spec, target))
    if "dtype" not in change:
        with pytest.raises(ValueError, match=message):
            tpu.allocate(2, spec.page_size, 2, 128, spec.page_dtype, target=target)
    assert tpu.unsupported(Spec(8, 2, 128, **good), target) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecodeConfig(0, 2), "block is 0"),
        (lambda: DecodeConfig(128, 1), "buffers is 1; it must be at least 2"),
        (lambda: PrefillConfig(48, 8, 128, 2), "tile is 48; it must be a power of two from 8 on"),
        (lambda: PrefillConfig(64, 4, 128, 2), "small_tile is 4"),
        (lambda: PrefillConfig(8, 16, 128, 2), "small_tile is 16; it must be at most 8"),
        (lambda: PrefillConfig(16, 8, 128, 1), "buffers is 1"),
    ],
)
def test_block_sizes_that_cannot_be(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("device_kind", "heads", "head_dim", "dtype", "page_dtype", "page_size"),
    [
        ("TPU v4", (32, 8), 128, "bfloat16", "bfloat16", 128),
        ("TPU v5 lite", (9, 3), 64, "bfloat16", "bfloat16", 16),
        ("TPU v5", (8, 1), 256, "float32", "float32", 32),
        ("TPU v6 lite", (16, 2), 128, "bfloat16", "int8", 128),
        ("TPU7x", (6, 6), 64, "float32", "float8_e4m3fn", 128),
    ],
)
def test_lowers_for_tpu(
    device_kind: str,
    heads: tuple[int, int],
    head_dim: int,
    dtype: str,
    page_dtype: str,
    page_size: int,
):
    target = Target("tpu", device_kind)
    make = partial(tpu.allocate, 64, page_size, heads[1], head_dim, page_dtype, target=target)
    pages = jax.eval_shape(make)
    row = jnp.zeros(4, jnp.int32)
    ragged = Ragged(
        page_table=jnp.zeros((4, 8), jnp.int32),
        kv_lens=row,
        cu_q_lens=jnp.zeros(5, jnp.int32),
        num_decode=jnp.int32(0),
        slots=jnp.zeros(100, jnp.int32),
    )
    q = jax.ShapeDtypeStruct((100, heads[0], head_dim), dtype)
    options = {"scale": 0.1, "window": 70, "soft_cap": 30.0}
    attend = partial(tpu.paged_attention, target=target, **options)
    chip = AbstractDevice(device_kind=device_kind, num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=chip)):
        lowered = jax.jit(attend).trace(q, pages, ragged).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == 3
