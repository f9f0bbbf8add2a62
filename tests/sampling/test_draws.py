"""What is drawn: chi-square tests against the reference, keys, and rows on their own.

Draws come from fixed seeds, so a test that passes always passes. A chi-square fails at a p-value of
1e-5, and the last tests plant wrong samplers to show that this finds them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import sampling
from jaxinfer.batch import Builder
from jaxinfer.buckets import Buckets
from jaxinfer.request import Request, Row, Sequence, StepPlan
from jaxinfer.sampling_params import SamplingParams
from tests.sampling import reference
from tests.sampling.chi_square import is_drawn_from

pytestmark = pytest.mark.optimised

ROWS = 4096
CALLS = 49
NUM_DRAWS = ROWS * CALLS
assert NUM_DRAWS >= 200_000

DRAW = jax.jit(
    lambda logits, params: sampling.draw(
        jnp.broadcast_to(logits, (params.position.size, logits.size)), params
    )
)
SAMPLE = jax.jit(
    lambda logits, params, history, table: sampling.sample(
        logits, params, lambda: history, table, logits.shape[1]
    )
)

FILTERS = {
    "none": {},
    "top_k": {"top_k": 10},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
}


def normal(vocab: int, scale: float = 2.0, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, vocab).astype(np.float32)


def draws(logits: np.ndarray, vary: str, calls: int = CALLS, **row) -> np.ndarray:
    """One draw for each of ROWS * calls values of `vary`, a column of the parameters."""
    found = []
    for call in range(calls):
        values = np.arange(call * ROWS, (call + 1) * ROWS)
        params = reference.device_params(
            ROWS, **({"seed": 12345, "position": 7} | row | {vary: values})
        )
        found.append(np.asarray(DRAW(logits, params)))
    return np.concatenate(found)


def probabilities(logits: np.ndarray, **row) -> np.ndarray:
    return reference.softmax(reference.filtered(logits, row))


def count(tokens: np.ndarray, vocab: int) -> np.ndarray:
    return np.bincount(tokens, minlength=vocab)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_distribution_over_positions(temperature, name):
    logits, row = normal(64), {"temperature": temperature, **FILTERS[name]}
    p = probabilities(logits, **row)
    assert np.count_nonzero(p) > 1
    assert is_drawn_from(count(draws(logits, "position", **row), 64), p)


@pytest.mark.parametrize("name", ["none", "all"])
@pytest.mark.parametrize("vary", ["seed", "sample_index"])
def test_distribution_over_seeds_and_samples(vary, name):
    logits, row = normal(64, seed=2), {"temperature": 1.0, **FILTERS[name]}
    assert is_drawn_from(count(draws(logits, vary, **row), 64), probabilities(logits, **row))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "name"),
    [(1.7, "all"), (1.0, "none"), (0.3, "min_p"), (1.7, "top_p"), (1.0, "top_k")],
)
def test_distribution_of_a_larger_vocabulary(temperature, name):
    logits, row = normal(1000, seed=3), {"temperature": temperature, **FILTERS[name]}
    tokens = draws(logits, "position", **row)
    assert is_drawn_from(count(tokens, 1000), probabilities(logits, **row))


@pytest.mark.parametrize("vary", ["position", "seed", "sample_index"])
def test_neighbouring_draws_are_independent(vary):
    """Pairs of draws whose positions (or seeds, or sample indices) follow one another."""
    logits = normal(8, scale=0.7)
    p = probabilities(logits)
    pairs = draws(logits, vary, calls=2 * CALLS).reshape(-1, 2)
    cells = np.bincount(pairs[:, 0] * 8 + pairs[:, 1], minlength=64)
    assert is_drawn_from(cells, np.outer(p, p).ravel())


SWAPPED = {
    "top_p before temperature": ({"top_p": 0.8}, {"temperature": 1.7}),
    "top_p before top_k": ({"temperature": 1.7, "top_p": 0.8}, {"top_k": 20}),
    "min_p before top_p": ({"temperature": 1.7, "min_p": 0.1}, {"top_p": 0.8}),
    "min_p before temperature": ({"min_p": 0.05}, {"temperature": 1.7}),
    "temperature twice": ({"temperature": 1.7}, {"temperature": 1.7}),
}
"""Two steps of a sampler that does things in the wrong order; one row is the right order."""


@pytest.mark.parametrize("name", SWAPPED)
def test_a_swapped_order_is_found(name):
    logits, rng = normal(64), np.random.default_rng(4)
    first, second = SWAPPED[name]
    p = probabilities(logits, **(first | second))
    q = reference.softmax(reference.filtered(reference.filtered(logits, first), second))
    assert is_drawn_from(rng.multinomial(NUM_DRAWS, p), p)
    assert not is_drawn_from(rng.multinomial(NUM_DRAWS, q), p)
    row = {**first, **second}
    assert not is_drawn_from(count(draws(logits, "position", calls=5, **row), 64), q)


def test_the_right_distribution_is_accepted():
    rng = np.random.default_rng(0)
    for row in FILTERS.values():
        p = probabilities(normal(64), **row)
        assert all(is_drawn_from(rng.multinomial(NUM_DRAWS, p), p) for _ in range(100))


def test_the_sampler_with_a_planted_error_is_found():
    logits, row = normal(64), {"temperature": 1.0}
    p = probabilities(logits, **row)
    tokens = draws(logits, "position", **row)
    assert is_drawn_from(count(tokens, 64), p)
    assert not is_drawn_from(count(draws(logits, "position", temperature=1.02), 64), p)
    for token in (np.argmax(p), np.argmin(p), 0):
        nudged = tokens.copy()
        nudged[::50] = token  # 2 % of the draws
        assert not is_drawn_from(count(nudged, 64), p)
    pairs = tokens.reshape(-1, 2)
    repeated = np.where(np.arange(len(pairs)) % 50 == 0, pairs[:, 0], pairs[:, 1])
    cells = np.bincount(pairs[:, 0] * 64 + repeated, minlength=64 * 64)
    assert not is_drawn_from(cells, np.outer(p, p).ravel())


SEEDS = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 1 << 33, 5 << 32, (5 << 32) + 1]
SEEDS += [2**62, 2**63 - 1, -(2**63), -(2**63) + 1, -2, -(2**32), -(2**31), -(2**32) - 1]


def test_seeds_that_share_half_their_bits_have_keys_of_their_own():
    """Through the packed array that carries them, as in a step."""
    rows = []
    for arrival, seed in enumerate(SEEDS):
        request = Request(f"r{arrival}", [1, 2, 3], SamplingParams(), 4, seed=seed)
        rows.append(Row(Sequence(request, 0, [1, 2, 3, 4]), 3, 1, True, 1, [1]))
    builder = Builder(Buckets.make(len(rows), 64), page_size=16, pages_per_row=2)
    built = builder.build(StepPlan(1, rows), [0] * len(rows))
    sample = builder.layouts[built.bucket].unpack(jnp.asarray(built.packed)).sample
    keys = np.asarray(jax.random.key_data(sampling.row_keys(sample)))
    assert len({tuple(key) for key in keys.tolist()}) == len(SEEDS)
    given = reference.device_params(len(SEEDS), seed=SEEDS, position=4)
    expected = np.asarray(jax.random.key_data(sampling.row_keys(given)))
    assert np.array_equal(keys, expected)


def test_keys_of_seeds_samples_and_positions_are_distinct():
    rows = [
        {"seed": seed, "sample_index": index, "position": position}
        for seed in (*SEEDS, *range(3, 100))
        for index in range(4)
        for position in (0, 1, 2, 3, 4095, 2**31 - 1)
    ]
    params = reference.device_params(len(rows), **reference.columns(rows))
    keys = np.asarray(jax.random.key_data(sampling.row_keys(params)))
    assert len({tuple(key) for key in keys.tolist()}) == len(rows)


def test_samples_of_one_request_differ():
    index = np.arange(64)
    tokens = [
        np.asarray(
            DRAW(
                np.zeros(1000, np.float32),
                reference.device_params(64, seed=9, sample_index=index, position=p),
            )
        )
        for p in range(3)
    ]
    assert len({tuple(row) for row in np.stack(tokens, 1).tolist()}) == 64


def test_a_row_does_not_depend_on_its_neighbours():
    """The same 16 rows: in order, shuffled, in a wider batch of other rows, and alone."""
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 1.5, (16, 64)).astype(np.float32)
    history = rng.integers(0, 64, (16, 24), dtype=np.int32)
    table = np.zeros((4, 64), np.float32)
    table[1], table[2, ::3] = rng.normal(0, 1, 64), -np.inf
    options = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 30, "repetition": 1.4},
        {"temperature": 2.0, "top_p": 0.9, "bias_slot": 1},
        {"temperature": 0.7, "min_p": 0.01, "presence": 1.0, "frequency": 0.3, "bias_slot": 2},
    ]

    def tokens(which: np.ndarray, position: int) -> list[int]:
        rows = [
            options[r % 5] | {"seed": 40 + int(r), "prompt_len": 4, "position": position}
            for r in which
        ]
        params = reference.device_params(len(rows), **reference.columns(rows))
        return np.asarray(SAMPLE(logits[which], params, history[which], table)).tolist()

    changed = set()
    for position in range(4, 24):
        whole = np.array(tokens(np.arange(16), position))
        changed.add(tuple(whole[1:]))
        shuffled = rng.permutation(16)
        assert tokens(shuffled, position) == whole[shuffled].tolist()
        crowded = rng.integers(0, 16, 37)
        assert tokens(crowded, position) == whole[crowded].tolist()
        for alone in (position % 16, (position + 7) % 16):
            assert tokens(np.array([alone]), position) == [whole[alone]]
    assert len(changed) == 20
