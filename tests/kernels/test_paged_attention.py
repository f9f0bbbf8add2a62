"""paged_attention of every implementation: oracle, poisoned padding, needles, refused arguments."""

import itertools
from dataclasses import replace
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Ops
from tests.kernels.cases import (
    AXES,
    EXCLUDED,
    Built,
    Case,
    all_pairs,
    attend,
    build,
    case_of,
    changed,
    error_of,
    need,
    oracle,
    pairs_of,
    pairwise,
    run,
    scenario,
    why_not,
)

pytestmark = pytest.mark.optimised

CHOICES = pairwise()
IMPLEMENTATIONS = pallas_kernels.available("cpu")
# One choice in so many runs, most often with the implementation that a CPU uses; `-m slow` runs the
# others.
ONE_IN = {"reference": 3, "xla": 2, "interpret": 4}
MIXED = Case(rows=((1, 37), (1, 64), (1, 150), (20, 20), (70, 150), (4, 90)), num_decode=3)


def test_the_choices_cover_every_pair():
    covered = set().union(*map(pairs_of, CHOICES))
    assert covered == all_pairs(AXES, EXCLUDED)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_is_refused_has_a_reason_and_most_is_not(name: str):
    reasons = [why_not(name, case_of(choice).spec) for choice in CHOICES]
    assert sum(reason is None for reason in reasons) > len(CHOICES) // 2
    for reason in filter(None, reasons):
        assert f"impl {name!r} cannot do this: " in reason
        assert any(argument in reason for argument in ("num_", "head_dim", "page_size", "dtype"))


def _comparisons() -> list:
    comparisons = []
    for name in IMPLEMENTATIONS:
        for i, choice in enumerate(CHOICES):
            label = "-".join(str(x).replace(" ", "") for x in (name, *choice.values()))
            marks = [pytest.mark.slow] if i % ONE_IN[name] else []
            comparisons.append(pytest.param(name, case_of(choice), id=label, marks=marks))
    return comparisons


@lru_cache
def _built_and_expected(case: Case) -> tuple[Built, np.ndarray]:
    built = build(case)
    return built, oracle(built)


@pytest.mark.parametrize(("name", "case"), _comparisons())
def test_equals_the_oracle_with_nan_in_everything_unused(name: str, case: Case):
    built, expected = _built_and_expected(case)
    out = attend(pallas_kernels.resolve(name), built, fill=np.nan)
    assert error_of(out, expected) <= 1
    padding = np.setdiff1d(np.arange(len(out)), np.concatenate(built.tokens))
    assert not out[padding].any()


def test_another_page_size(ops: Ops):
    built = build(Case(**scenario("mixed", 32), page_size=32, window=70))
    assert error_of(attend(ops, built), oracle(built)) <= 1


@pytest.mark.parametrize(
    ("name", "dtype", "page_dtype", "window"),
    [
        ("decode", "float32", None, None),
        ("mixed", "bfloat16", None, 50),
        ("decode", "bfloat16", "float8_e4m3fn", 50),
        ("mixed", "float32", "int8", None),
    ],
)
def test_what_is_unused_changes_no_bit(
    ops: Ops, name: str, dtype: str, page_dtype: str | None, window: int | None
):
    case = Case(**scenario(name, 8), dtype=dtype, page_dtype=page_dtype, window=window)
    built = build(case)
    clean = attend(ops, built, fill=0.0)
    assert np.array_equal(clean, attend(ops, built, fill=np.nan))
    assert np.array_equal(clean, attend(ops, built, fill="garbage"))
    table = built.ragged["page_table"].copy()
    for i, kv_len in enumerate(built.ragged["kv_lens"]):
        used = -(-kv_len // built.case.page_size)
        table[i, used:] = [2**31 - 1, -(2**31), 10**6, -1, 3][i % 5]
    assert np.array_equal(clean, attend(ops, changed(built, page_table=table)))


@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_what_lies_outside_the_tables_and_the_pool_is_clipped(ops: Ops, name: str):
    """Lengths beyond a row's table count as its capacity; ids outside the pool as its ends."""
    built = build(Case(**scenario(name, 8), window=50))
    table = built.ragged["page_table"].copy()
    table[0, 0], table[1, 0] = 0, built.num_pages - 1
    kv_lens = built.ragged["kv_lens"].copy()
    kv_lens[2] = table.shape[1] * built.case.page_size
    inside = attend(ops, changed(built, page_table=table, kv_lens=kv_lens), fill=0.0)
    table[0, 0], table[1, 0] = -7, 2**31 - 1
    kv_lens[2] = 10**9
    outside = attend(ops, changed(built, page_table=table, kv_lens=kv_lens), fill=0.0)
    assert np.array_equal(inside, outside)
    reference = attend(
        pallas_kernels.resolve("reference"),
        changed(built, page_table=table, kv_lens=kv_lens),
        fill=0.0,
    )
    assert error_of(outside, reference.astype(np.float64)) <= 1


def test_a_row_does_not_depend_on_its_batch_mates(ops: Ops):
    """Same shapes, other lengths and contents around it: the row's bits stay."""
    rows = ((1, 37), (1, 300), (9, 130), (70, 90))
    built = build(Case(rows=rows, num_decode=2))
    kv_lens = built.ragged["kv_lens"].copy()
    kv_lens[[1, 2]] = [5, 20]
    full = attend(ops, built)
    other = attend(ops, changed(built, kv_lens=kv_lens))
    kept = np.concatenate([built.tokens[0], built.tokens[3]])
    assert np.array_equal(full[kept], other[kept])
    assert not np.array_equal(full[built.tokens[1]], other[built.tokens[1]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [19, 70])
def test_rows_decoded_in_groups_come_back_in_their_order(num_rows: int, dtype: str):
    """The XLA form on a CPU takes rows by length; a row's group changes none of its bits."""
    ops = pallas_kernels.resolve("xla")
    lens = [1 + 37 * i % 211 for i in range(num_rows)]
    case = Case(rows=tuple((1, n) for n in lens), num_decode=num_rows, dtype=dtype)
    built = build(replace(case, decode_only=True))
    full = attend(ops, built, fill=np.nan)
    assert error_of(full, oracle(built)) <= 1
    kv_lens = built.ragged["kv_lens"].copy()
    kept = np.asarray(lens) > 100
    kv_lens[:num_rows][~kept] = 1
    other = attend(ops, changed(built, kv_lens=kv_lens), fill=np.nan)
    tokens = np.concatenate(built.tokens)
    assert np.array_equal(full[tokens[kept]], other[tokens[kept]])


@pytest.mark.parametrize("decode_only", [True, False])
def test_decode_rows_in_fewer_tokens_than_rows(ops: Ops, decode_only: bool):
    """A batch of many padding rows and few tokens, and the same rows as a decode batch."""
    case = Case(rows=((1, 20), (1, 140)), num_decode=2, padding_rows=6, decode_only=decode_only)
    built = build(replace(case, padding_tokens=1))
    assert error_of(attend(ops, built), oracle(built)) <= 1


def test_decode_rows_may_also_come_as_tiles(ops: Ops):
    """num_decode says how rows are computed, not what they give."""
    built = build(MIXED)
    as_tiles = attend(ops, changed(built, num_decode=np.asarray(0)))
    assert error_of(as_tiles, oracle(built)) <= 1


@pytest.mark.parametrize("new", [1, 5])
def test_needles_at_every_page_boundary(ops: Ops, new: int):
    """One key with a large logit in each row: the last token's output is that key's V."""
    page_size, kv_len = 8, 133
    edges = [m * page_size + d for m in range(17) for d in (-1, 0, 1)]
    positions = [p for p in edges if 0 <= p <= kv_len - new]
    case = Case(
        rows=((new, kv_len),) * len(positions),
        num_decode=len(positions) if new == 1 else 0,
        decode_only=new == 1,
        page_size=page_size,
    )
    built = build(case)
    expected = np.zeros((len(positions), *built.q.shape[1:]), np.float32)
    group = case.heads[0] // case.heads[1]
    lasts = [tokens[-1] for tokens in built.tokens]
    for i, (last, p) in enumerate(zip(lasts, positions, strict=True)):
        built.q[last] = np.repeat(built.q[last, ::group], group, axis=0)
        built.k[i][p] = (
            40.0
            * built.q[last, ::group]
            / np.sum(built.q[last, ::group] ** 2, axis=-1, keepdims=True)
            * np.sqrt(case.head_dim)
        )
        expected[i] = np.repeat(built.v[i][p], group, axis=0)
    out = attend(ops, built)[lasts]
    assert error_of(out, expected) <= 5


@pytest.mark.parametrize("page_dtype", [None, "int8"])
def test_nan_of_one_row_stays_in_that_row(ops: Ops, page_dtype: str | None):
    case = replace(MIXED, page_dtype=page_dtype)
    built = build(case)
    built.v[1][:], built.k[4][:] = np.nan, np.nan
    out = attend(ops, built)
    expected = oracle(build(case))
    healthy = np.concatenate([built.tokens[i] for i in (0, 2, 3, 5)])
    assert error_of(out[healthy], expected[healthy]) <= 1
    assert np.isnan(out[built.tokens[1]]).all() and np.isnan(out[built.tokens[4]]).all()


def _temporaries(num_tokens: int, length: int) -> int:
    """Bytes of temporaries of "xla" for one row's last `num_tokens` of `length` positions."""
    ops = pallas_kernels.resolve("xla")
    case = Case(rows=((num_tokens, length),), page_size=16, heads=(4, 2), padding_rows=0)
    pages = ops.allocate(length // 16 + 1, 16, 2, case.head_dim, "float32")
    ragged = pallas_kernels.Ragged(
        page_table=jnp.zeros((1, length // 16), jnp.int32),
        kv_lens=jnp.full(1, length, jnp.int32),
        cu_q_lens=jnp.asarray([0, num_tokens], jnp.int32),
        num_decode=jnp.int32(0),
        slots=jnp.zeros(num_tokens, jnp.int32),
    )
    q = jnp.zeros((num_tokens, *case.heads[:1], case.head_dim))
    memory = run.lower(ops, q, pages, ragged, 0.25, None, None).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_the_memory_of_prefill_grows_linearly_with_its_length():
    """Temporaries are a few times q at 1k, 4k and 16k tokens; nothing is tokens x tokens."""
    lengths = (1024, 4096, 16384)
    taken = [_temporaries(length, length) for length in lengths]
    for (short, less), (long, more) in itertools.pairwise(zip(lengths, taken, strict=True)):
        assert more <= less * long / short
    q_bytes = lengths[-1] * 4 * 16 * 4
    assert taken[-1] <= 5 * q_bytes < lengths[-1] ** 2 * 4 * 4 / 16


def test_no_array_grows_with_the_length_of_what_is_cached():
    """512 new tokens at 2048 and at 8192 positions: the same but for the page table."""
    assert _temporaries(512, 8192) <= _temporaries(512, 2048) + 4 * 8192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((4, 5, 16))}, r"q has 5 heads; it must be a multiple of .* 2 KV heads"),
        ({"q": jnp.zeros((4, 6, 8))}, r"q has shape \(4, 6, 8\).*\(>= 1, >= 1, 16\)"),
        ({"q": jnp.zeros((4, 6, 16), jnp.int32)}, "q.dtype is int32; allowed: float32, bfloat16"),
        ({"q": jnp.zeros((5, 6, 16))}, r"ragged.slots has shape \(4,\)"),
        ({"kv_lens": jnp.zeros(3, jnp.int32)}, r"ragged.kv_lens has shape \(3,\)"),
        ({"cu_q_lens": jnp.zeros(4, jnp.int32)}, r"ragged.cu_q_lens has shape \(4,\)"),
        ({"kv_lens": jnp.zeros(4)}, "ragged.kv_lens is float32; it must be int32"),
        ({"num_decode": jnp.zeros(1, jnp.int32)}, r"ragged.num_decode has shape \(1,\)"),
        ({"page_table": jnp.zeros(4, jnp.int32)}, r"ragged.page_table has shape \(4,\)"),
        (
            {"q": jnp.zeros((5, 6, 16)), "slots": jnp.zeros(5, jnp.int32)},
            "decode_only with 5 tokens and 4 rows",
        ),
        ({"window": 0}, "window is 0; it must be an int >= 1"),
        ({"window": 2**40}, "window is 1099511627776; it must be None or in"),
        ({"soft_cap": 1e39}, "soft_cap is 1e.39; it must be None or a finite float > 0"),
        ({"scale": 10**400}, "scale is 10+; it must be a finite float"),
        ({"scale": True}, "scale is True; it must be a finite float"),
        ({"q": [1.0]}, r"q is a list; it must be an array \[T, N, H\]"),
        ({"window": 2.0}, "window is 2.0"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0; it must be None or"),
        ({"scale": float("nan")}, "scale is nan"),
    ],
)
def test_arguments_that_do_not_fit_are_named(ops: Ops, change: dict, message: str):
    row = jnp.zeros(4, jnp.int32)
    arrays = {
        "page_table": jnp.zeros((4, 2), jnp.int32),
        "kv_lens": row,
        "cu_q_lens": jnp.zeros(5, jnp.int32),
        "num_decode": jnp.int32(0),
        "slots": row,
    }
    options = {"scale": 1.0, "window": None, "soft_cap": None}
    ragged = pallas_kernels.Ragged(
        **{name: change.get(name, x) for name, x in arrays.items()}, decode_only=True
    )
    options = {name: change.get(name, x) for name, x in options.items()}
    need(ops, Case(rows=()).spec)
    pages = ops.allocate(3, 8, 2, 16, "float32")
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(change.get("q", jnp.zeros((4, 6, 16))), pages, ragged, **options)
