"""The sampler's arithmetic against a NumPy float64 reference: penalties, bias, filters, edge rows.

What is drawn is in test_draws.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import sampling
from jaxinfer.sampling import NON_FINITE, NOTHING_ALLOWED
from tests.sampling import reference

ROWS, WIDTH = 16, 24
FILTER = jax.jit(sampling.filtered_logits)
PROCESS = jax.jit(
    lambda logits, params, history, table, valid: sampling.process_logits(
        logits, params, lambda: history, table, valid
    ),
    static_argnums=4,
)
SAMPLE = jax.jit(
    lambda logits, params, history, table, valid: sampling.sample(
        logits, params, lambda: history, table, valid
    ),
    static_argnums=4,
)

MIXED = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3, "top_k": 5},
    {"temperature": 1.7, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.1, "min_p": 0.9},
    {"temperature": 1.0, "top_k": 2**31 - 1},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 50.0, "top_p": 0.999},
    {"temperature": 0.01, "top_p": 0.5, "top_k": 40},
    {"temperature": 1.3, "top_k": 7, "min_p": 0.3},
    {"temperature": 1.3, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.6, "top_k": 1000},
]
"""Greedy and random rows, every filter alone, in pairs and together."""

PENALISED = [
    {"presence": 0.7, "prompt_len": 6, "position": 15},
    {"frequency": 1.1, "prompt_len": 6, "position": 15},
    {"repetition": 1.5, "prompt_len": 6, "position": 15},
    {"presence": -2.0, "frequency": -0.5, "repetition": 0.5, "prompt_len": 3, "position": 20},
    {"presence": 2.0, "frequency": 2.0, "repetition": 2.0, "prompt_len": 1, "position": WIDTH},
    {"repetition": 1.3, "prompt_len": 8, "position": 8},
    {"presence": 1.0, "frequency": 1.0, "prompt_len": 8, "position": 8},
    {"prompt_len": 8, "position": 12},
    {"bias_slot": 1, "prompt_len": 2, "position": 9},
    {"bias_slot": 2, "repetition": 1.2, "prompt_len": 2, "position": 9},
    {"bias_slot": 3, "frequency": 0.4, "presence": 0.3, "prompt_len": 2, "position": 9},
    {"temperature": 0.0, "repetition": 1.8, "prompt_len": 4, "position": 11},
    {"temperature": 0.0, "bias_slot": 1, "prompt_len": 4, "position": 11},
    {},
    {"repetition": 1.01, "prompt_len": 0, "position": 0},
    {"repetition": 1.1, "frequency": 0.1, "prompt_len": 0, "position": 5},
]


def params(rows: list[dict]):
    return reference.device_params(len(rows), **reference.columns(rows))


def normal(vocab: int, seed: int, scale: float = 3.0, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab)).astype(np.float32)


def histories(vocab: int, seed: int = 0, rows: int = ROWS) -> np.ndarray:
    """[S, C] tokens, few enough different ones to repeat."""
    return np.random.default_rng(seed).integers(0, min(vocab, 12), (rows, WIDTH), dtype=np.int32)


def bias_table(vocab: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    table = np.zeros((4, vocab), np.float32)
    table[1] = rng.normal(0, 2, vocab)
    table[2, rng.permutation(vocab)[: vocab // 2]] = -np.inf
    table[3, :5] = [100, -100, -np.inf, 0.5, -0.5]
    return table


def draw(logits, rows, history=None, table=None, valid=None) -> list[int]:
    vocab = logits.shape[1]
    history = histories(vocab, rows=len(rows)) if history is None else history
    table = bias_table(vocab) if table is None else table
    valid = vocab if valid is None else valid
    return np.asarray(SAMPLE(logits, params(rows), history, table, valid)).tolist()


def check_filtered(logits: np.ndarray, rows: list[dict]) -> int:
    """Assert that each row is right; how many kept exactly the tokens that the reference keeps."""
    exact = 0
    for got, x, row in zip(np.asarray(FILTER(logits, params(rows))), logits, rows, strict=True):
        kept = np.isfinite(got)
        tight, plain, loose = (
            np.isfinite(reference.filtered(x, row, slack)) for slack in (-3e-6, 0.0, 3e-6)
        )
        assert np.all(kept >= tight), row
        assert np.all(kept <= loose), row
        exact += np.array_equal(kept, plain)
        expected = np.where(kept, x / (row.get("temperature", 1.0) or 1.0), -np.inf)
        np.testing.assert_allclose(got[kept], expected[kept], rtol=1e-6)
        np.testing.assert_allclose(
            reference.softmax(got.astype(np.float64)), reference.softmax(expected), atol=2e-6
        )
    return exact


@pytest.mark.parametrize("vocab", [64, 1000])
def test_filters_of_mixed_rows(vocab):
    """Row r takes option set (r + shift), so each set meets each row's logits."""
    exact = total = 0
    for shift, scale in itertools.product(range(0, ROWS, 3), (0.5, 3.0, 12.0)):
        rows = MIXED[shift:] + MIXED[:shift]
        exact += check_filtered(normal(vocab, seed=100 + shift, scale=scale), rows)
        total += ROWS
    assert exact >= 0.99 * total


def test_ties_at_a_threshold_are_all_kept():
    logits = np.tile(np.array([5, 4, 4, 4, 1, 1, 0] + [-9] * 57, np.float32), (ROWS, 1))
    rows = [
        {"top_k": 2},
        {"top_k": 3},
        {"top_k": 5},
        {"top_k": 6},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"min_p": float(np.exp(np.float32(-1.1)))},
        {"top_k": 2, "top_p": 0.99},
    ] * 2
    kept = np.isfinite(np.asarray(FILTER(logits, params(rows)))).sum(1).tolist()
    assert kept == [4, 4, 6, 6, 4, 4, 4, 4] * 2
    assert check_filtered(logits, rows) == ROWS


def test_zero_and_minus_zero_are_one_value():
    logits = np.full((ROWS, 64), -3.0, np.float32)
    logits[:, 10], logits[:, 20] = -0.0, 0.0
    rows = [{"top_k": 1}, {"top_p": 0.3}, {"min_p": 1.0}, {"top_k": 1, "temperature": 0.5}] * 4
    kept = np.isfinite(np.asarray(FILTER(logits, params(rows))))
    assert [np.flatnonzero(row).tolist() for row in kept] == [[10, 20]] * ROWS


def test_all_equal_logits_keep_everything():
    logits = np.full((ROWS, 64), -2.5, np.float32)
    rows = [row for row in MIXED if row["temperature"]] + MIXED[1:3]
    assert np.all(np.isfinite(np.asarray(FILTER(logits, params(rows)))))


@pytest.mark.parametrize("value", [30.0, 1e4, 1e30, 3e38])
def test_one_huge_logit_takes_all(value):
    logits = normal(64, seed=1, scale=0.1)
    logits[:, 40] = value
    rows = [{**row, "temperature": min(row["temperature"], 1.0)} for row in MIXED]
    assert draw(logits, rows) == [40] * ROWS
    logits[:, 41] = -value
    assert draw(logits, rows) == [40] * ROWS


def test_filters_too_small_for_float32_keep_the_best_token():
    """1e-45 is subnormal and 1e-60 rounds to 0 in float32; both mean: the smallest set there is."""
    logits = normal(64, seed=2, scale=1.0)
    tiny = [1e-30, 1e-38, 1e-40, 1e-45, 1e-60, 5e-324, 1e-7, 1e-20] * 2
    best = np.argmax(logits, 1).tolist()
    assert draw(logits, [{"top_p": p} for p in tiny]) == best
    kept = np.isfinite(np.asarray(FILTER(logits, params([{"min_p": p} for p in tiny]))))
    assert np.all(kept)


def test_the_largest_temperature_is_uniform_over_what_is_allowed():
    logits = normal(64, seed=3)
    top = float(np.finfo(np.float32).max)
    rows = [{"temperature": top, "bias_slot": 2}, {"temperature": top, "top_k": 4}] * 8
    got = np.asarray(FILTER(logits + bias_table(64)[2], params(rows)))
    assert not np.any(np.isnan(got))
    assert np.array_equal(np.isfinite(got[0]), np.isfinite(bias_table(64)[2]))
    allowed = set(np.flatnonzero(np.isfinite(bias_table(64)[2])))
    assert set(draw(logits, rows)[::2]) <= allowed


def test_extreme_penalties_never_unban_a_token():
    """A penalty of 1e-40 would make inf, and inf plus a ban NaN, which argmax prefers."""
    logits = np.full((ROWS, 64), 1.0, np.float32)
    table = np.zeros((4, 64), np.float32)
    table[1, :12] = -np.inf  # every token of the histories
    table[1, 30] = 2.0
    rows = [
        {"temperature": t, "repetition": r, "bias_slot": 1, "prompt_len": 4, "position": 20}
        for r in (1e-6, 1e-38, 1e-40, 1e-60)
        for t in (0.0, 1e-2, 0.0, 1e-2)
    ]
    assert draw(logits, rows, table=table) == [30] * ROWS
    unbiased = draw(logits, [{**row, "bias_slot": 0} for row in rows])
    assert all(t in h[:20] for t, h in zip(unbiased, histories(64).tolist(), strict=True))


@pytest.mark.parametrize("vocab", [64, 1000])
def test_penalties_bias_and_bans(vocab):
    table, history = bias_table(vocab), histories(vocab)
    for seed, valid in ((11, vocab), (12, vocab - 7)):
        logits = normal(vocab, seed)
        got = np.asarray(PROCESS(logits, params(PENALISED), history, table, valid))
        for r, row in enumerate(PENALISED):
            bias = table[row.get("bias_slot", 0)]
            expected = reference.processed(logits[r], row, history[r], bias, valid)
            np.testing.assert_allclose(got[r], expected, rtol=1e-5, atol=1e-5, err_msg=str(row))


def test_each_penalty_sees_the_tokens_it_should():
    """Presence and frequency: output only. Repetition: prompt and output."""
    logits = np.tile(np.array([2.0, -2.0, 0.0, 1.0], np.float32).repeat(16), (ROWS, 1))
    history = np.full((ROWS, WIDTH), 63, np.int32)
    history[:, :8] = [0, 16, 48, 48, 1, 1, 1, 17]  # prompt of 4, output of 4
    where = {"prompt_len": 4, "position": 8}
    rows = [
        {"presence": 0.5, **where},
        {"frequency": 0.5, **where},
        {"repetition": 2.0, **where},
        {"presence": -1.0, "frequency": 0.25, **where},
    ]
    got = np.asarray(PROCESS(logits, params(rows * 4), history, bias_table(64), 64)) - logits
    changed = [{int(t): float(row[t]) for t in np.flatnonzero(row)} for row in got[:4]]
    assert changed == [
        {1: -0.5, 17: -0.5},
        {1: -1.5, 17: -0.5},
        {0: -1.0, 1: -1.0, 16: -2.0, 17: -2.0, 48: -0.5},
        {1: 0.25, 17: 0.75},
    ]
    assert np.array_equal(got[:4], got[12:])


@pytest.mark.parametrize("rubbish", [-1, -(2**31), 64, 2**31 - 1, 5])
def test_the_unused_tail_of_the_history_is_never_read(rubbish):
    logits, history = normal(64, seed=21), histories(64)
    clean = np.asarray(PROCESS(logits, params(PENALISED), history, bias_table(64), 64))
    for r, row in enumerate(PENALISED):
        history[r, row.get("position", 0) :] = rubbish
    soiled = np.asarray(PROCESS(logits, params(PENALISED), history, bias_table(64), 64))
    assert np.array_equal(clean, soiled)


def test_large_counts_are_exact():
    """70,000 times one token: beyond what 16 bits, or a sum in half precision, could hold."""
    history = np.full((1, 70_000), 3, np.int32)
    rows = [{"frequency": 0.5, "prompt_len": 0, "position": 70_000}]
    logits = np.zeros((1, 64), np.float32)
    got = np.asarray(PROCESS(logits, params(rows), history, bias_table(64), 64))
    assert got[0, 3] == -35_000
    assert np.count_nonzero(got) == 1


def test_rows_that_ask_for_nothing_are_unchanged_bit_for_bit():
    """The other rows switch every computation on."""
    logits = normal(64, seed=22)
    got = np.asarray(PROCESS(logits, params(PENALISED), histories(64), bias_table(64), 64))
    for r in (7, 13):
        assert np.array_equal(got[r].view(np.int32), logits[r].view(np.int32))
    got = np.asarray(FILTER(logits, params(MIXED)))
    for r in (0, 1, 6, 7):
        assert np.array_equal(got[r].view(np.int32), logits[r].view(np.int32))


def test_greedy_takes_the_lowest_id_of_a_tie():
    logits = normal(64, seed=23)
    logits[:, [9, 33, 50]] = 40.0
    assert draw(logits, [{"temperature": 0.0, "seed": r} for r in range(ROWS)]) == [9] * ROWS
    logits[:] = 0.0
    assert draw(logits, [{"temperature": 0.0}] * ROWS) == [0] * ROWS


def test_ids_past_the_vocabulary_are_never_drawn():
    logits = normal(64, seed=24)
    logits[:, 57:] = 50.0
    rows = [{**row, "bias_slot": r % 4} for r, row in enumerate(MIXED)]
    assert max(draw(logits, rows, valid=57)) < 57
    assert draw(logits, [{"temperature": 0.0}] * ROWS, valid=64) == [57] * ROWS


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
def test_a_logit_that_is_not_finite_ends_its_row_alone(bad):
    logits = normal(64, seed=25)
    rows = [row | penal for row, penal in zip(MIXED, PENALISED, strict=True)]
    clean = draw(logits, rows)
    assert min(clean) >= 0
    for victims in ([0], [5], [3, 4, 15]):
        soiled = logits.copy()
        for v in victims:
            soiled[v, 7 * v % 64] = bad
        expected = [NON_FINITE if r in victims else t for r, t in enumerate(clean)]
        assert draw(soiled, rows) == expected
    assert draw(np.full_like(logits, bad), rows) == [NON_FINITE] * ROWS


def test_everything_banned_is_told_apart():
    logits, table = normal(64, seed=26), bias_table(64)
    table[3] = -np.inf
    rows = [{**row, "bias_slot": 3 if r in (0, 5, 9) else 1} for r, row in enumerate(MIXED)]
    got = draw(logits, rows, table=table)
    clean = draw(logits, [{**row, "bias_slot": 1} for row in rows], table=table)
    assert got == [NOTHING_ALLOWED if r in (0, 5, 9) else t for r, t in enumerate(clean)]
    logits[5, 0] = np.nan
    assert draw(logits, rows, table=table)[5] == NON_FINITE


def test_minus_100_on_every_token_is_still_a_distribution():
    table = np.full((4, 64), -100.0, np.float32)
    logits = normal(64, seed=27)
    assert (
        draw(logits, [{"temperature": 0.0, "bias_slot": 1}] * ROWS, table=table)
        == np.argmax(logits, 1).tolist()
    )
    assert min(draw(logits, [{**row, "bias_slot": 1} for row in MIXED], table=table)) >= 0


def test_log_probs():
    logits = normal(64, seed=31)
    logits[:, 40] = logits[:, 11]  # a tie: both have the better rank, the lower id comes first
    logits[1] = 7.0
    logits[2, 5] = 1e30
    chosen = np.random.default_rng(3).integers(0, 64, ROWS).astype(np.int32)
    chosen[:4] = [40, 63, 5, NON_FINITE]
    x = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        expected = x - np.max(x, 1, keepdims=True)
        expected -= np.log(np.sum(np.exp(expected), 1, keepdims=True))
    order = np.argsort(-x, axis=1, kind="stable")
    for num_top in (1, 5, 64):
        log_probs = jax.jit(sampling.log_probs, static_argnums=2)
        got, rank, ids, best = (
            np.asarray(a) for a in log_probs(jnp.asarray(logits), jnp.asarray(chosen), num_top)
        )
        assert ids.shape == best.shape == (ROWS, num_top)
        picked = np.maximum(chosen, 0)
        np.testing.assert_allclose(got, expected[np.arange(ROWS), picked], rtol=1e-5, atol=1e-5)
        assert rank.tolist() == [1 + np.sum(x[r] > x[r, t]) for r, t in enumerate(picked)]
        assert np.array_equal(ids, order[:, :num_top])
        np.testing.assert_allclose(best, np.take_along_axis(expected, ids, 1), rtol=1e-5, atol=1e-5)
        assert rank[1] == 1
