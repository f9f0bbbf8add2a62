"""paged_attention of every implementation: oracle, poisoned padding, needles, mutations."""

import itertools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Ops
from tests.kernels.cases import (
    AXES,
    Built,
    Case,
    attend,
    build,
    case_of,
    changed,
    error_of,
    oracle,
    pairwise,
    run,
    scenario,
)

CHOICES = pairwise()
MIXED = Case(rows=((1, 37), (1, 64), (1, 150), (20, 20), (70, 150), (4, 90)), num_decode=3)


@pytest.fixture(params=pallas_kernels.IMPLEMENTATIONS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return pallas_kernels.resolve(request.param)


def test_the_choices_cover_every_pair():
    pairs = {
        (a, x, b, y) for a, b in itertools.combinations(AXES, 2) for x in AXES[a] for y in AXES[b]
    }
    covered = {
        (a, choice[a], b, choice[b])
        for choice in CHOICES
        for a, b in itertools.combinations(AXES, 2)
    }
    assert covered == pairs


@pytest.mark.parametrize(
    "choice", CHOICES, ids=lambda choice: "-".join(str(x).replace(" ", "") for x in choice.values())
)
def test_equals_the_oracle_with_nan_in_everything_unused(ops: Ops, choice: dict):
    built = build(case_of(choice))
    expected = oracle(built)
    out = attend(ops, built, fill=np.nan)
    assert error_of(out, expected) <= 1
    padding = np.setdiff1d(np.arange(len(out)), np.concatenate(built.tokens))
    assert not out[padding].any()


@pytest.mark.parametrize("page_size", [32, 128])
def test_other_page_sizes(ops: Ops, page_size: int):
    built = build(Case(**scenario("mixed", page_size), page_size=page_size, window=70))
    assert error_of(attend(ops, built), oracle(built)) <= 1


@pytest.mark.parametrize(("name", "dtype"), [("decode", "float32"), ("mixed", "bfloat16")])
def test_what_is_unused_changes_no_bit(ops: Ops, name: str, dtype: str):
    built = build(Case(**scenario(name, 8), dtype=dtype, window=None if dtype == "float32" else 50))
    clean = attend(ops, built, fill=0.0)
    assert np.array_equal(clean, attend(ops, built, fill=np.nan))
    assert np.array_equal(clean, attend(ops, built, fill="garbage"))
    table = built.ragged["page_table"].copy()
    for i, kv_len in enumerate(built.ragged["kv_lens"]):
        used = -(-kv_len // built.case.page_size)
        table[i, used:] = [2**31 - 1, -(2**31), 10**6, -1, 3][i % 5]
    assert np.array_equal(clean, attend(ops, changed(built, page_table=table)))


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


def _drop_page(built: Built) -> Built:
    table, kv_lens = built.ragged["page_table"].copy(), built.ragged["kv_lens"].copy()
    table[:, 1:-1] = table[:, 2:]
    kv_lens[kv_lens > 32] -= built.case.page_size
    return changed(built, page_table=table, kv_lens=kv_lens)


def _swap_rows_pages(built: Built) -> Built:
    table = built.ragged["page_table"].copy()
    table[[0, 2], 1] = table[[2, 0], 1]
    table[[3, 4], 1] = table[[4, 3], 1]
    return changed(built, page_table=table)


def _swap_own_pages(built: Built) -> Built:
    """Rows 0 and 3 end within a page: what stands behind their ends moves into view."""
    table = built.ragged["page_table"].copy()
    table[0, [0, 4]] = table[0, [4, 0]]
    table[3, [0, 2]] = table[3, [2, 0]]
    return changed(built, page_table=table)


def _half_the_keys(built: Built) -> Built:
    return changed(built, kv_lens=built.ragged["kv_lens"] // 2)


def _longer(built: Built, by: int) -> Built:
    kv_lens = built.ragged["kv_lens"]
    return changed(built, kv_lens=np.where(kv_lens > 0, kv_lens + by, 0))


def _other_group(built: Built) -> Built:
    return replace(built, q=np.roll(built.q, 1, axis=1))


MUTATIONS = {
    "a dropped page": _drop_page,
    "half the keys": _half_the_keys,
    "pages swapped between rows": _swap_rows_pages,
    "pages swapped within a row": _swap_own_pages,
    "length + 1": lambda built: _longer(built, 1),
    "length - 1": lambda built: _longer(built, -1),
    "wrong head group": _other_group,
    "window + 1": lambda built: replace(built, case=replace(built.case, window=31)),
    "window - 1": lambda built: replace(built, case=replace(built.case, window=29)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_notices(ops: Ops, name: str):
    """What this suite must catch, it catches in its loosest dtype, decoded and tiled rows alike."""
    window = 30 if "window" in name else None
    built = build(replace(MIXED, dtype="bfloat16", window=window))
    expected = oracle(built)
    assert error_of(attend(ops, built, fill="garbage"), expected) <= 1
    mutant = attend(ops, MUTATIONS[name](built), fill="garbage")
    decoded, tiled = slice(0, 3), slice(3, int(built.ragged["cu_q_lens"][-1]))
    assert error_of(mutant[decoded], expected[decoded]) > 2
    assert error_of(mutant[tiled], expected[tiled]) > 2


def test_nan_of_one_row_stays_in_that_row(ops: Ops):
    built = build(MIXED)
    built.v[1][:], built.k[4][:] = np.nan, np.nan
    out = attend(ops, built)
    expected = oracle(build(MIXED))
    healthy = np.concatenate([built.tokens[i] for i in (0, 2, 3, 5)])
    assert error_of(out[healthy], expected[healthy]) <= 1
    assert np.isnan(out[built.tokens[1]]).all() and np.isnan(out[built.tokens[4]]).all()


def test_no_array_grows_with_tokens_times_length():
    """512 new tokens at 8192 positions: no temporary near tokens x length, or the gathered row."""
    ops = pallas_kernels.resolve("xla")
    case = Case(rows=((512, 8192),), page_size=16, heads=(4, 2), padding_rows=0)
    built = build(case)
    pages = ops.allocate(built.num_pages, 16, 2, case.head_dim, "float32")
    lowered = run.lower(ops, jnp.asarray(built.q), pages, built.device_ragged(), 0.25, None, None)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2_000_000 < 4 * 512 * 8192 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((4, 5, 16))}, r"q has 5 heads; it must be a multiple of .* 2 KV heads"),
        ({"q": jnp.zeros((4, 6, 8))}, r"q has shape \(4, 6, 8\).*\(any, any, 16\)"),
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
    pages = ops.allocate(3, 8, 2, 16, "float32")
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(change.get("q", jnp.zeros((4, 6, 16))), pages, ragged, **options)
