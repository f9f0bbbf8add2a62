"""What speculative decoding emits has the target's distribution, whatever is drafted.

Chi-square tests of 200,000 draws and more from fixed seeds, at a p-value of 1e-5, against float64
NumPy: first tokens, second tokens and pairs, rows of all temperatures and greedy ones in each
batch. Planted errors fail the same check.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import sampling
from jaxinfer.speculative.verify import emitted
from tests.speculative import chain
from tests.speculative.chain import FAR, FILTERS, NEAR, SAMPLE, TEMPERATURES, Chain

pytestmark = pytest.mark.optimised

KINDS = {
    "greedy": {"kind": "greedy"},
    "fixed": {"kind": "fixed"},
    "equal": {"kind": "shared", "distance": 0.0},
    "near": {"kind": "shared", "distance": NEAR},
    "far": {"kind": "shared", "distance": FAR},
    "independent": {"kind": "independent", "distance": NEAR},
}
QUICK = [
    ("greedy", 0.3, "none"),
    ("fixed", 1.0, "top_k"),
    ("near", 1.7, "all"),
    ("independent", 1.0, "penalties"),
]
"""Each temperature, and drafters of every kind; the rest of the product is slow."""
REST = [case for case in itertools.product(KINDS, TEMPERATURES, FILTERS) if case not in QUICK]


@pytest.mark.parametrize(
    ("kind", "temperature", "name"),
    [*QUICK, *[pytest.param(*case, marks=pytest.mark.slow) for case in REST]],
)
def test_distribution(kind, temperature, name):
    made = Chain(**KINDS[kind], temperature=temperature, row=FILTERS[name])
    assert made.is_right()
    rate = made.num_accepted / made.num_drafts
    # Both outcomes of a draft are in the sample, but for a draft that is the target.
    assert (rate == 1.0) if kind == "equal" else (0 < rate < 1), rate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "temperature", "name"),
    [
        ("fixed", 1.0, "none"),
        *[
            (kind, temperature, name)
            for kind in ("near", "far", "greedy")
            for temperature, name in ((0.3, "none"), (1.0, "all"), (1.7, "top_p"))
        ],
    ],
)
def test_distribution_of_a_larger_vocabulary(kind, temperature, name):
    shape = {"vocab": 1024, "length": 1}
    made = Chain(**KINDS[kind], **shape, temperature=temperature, row=FILTERS[name])
    assert made.is_right()
    assert 0 < made.num_accepted < made.num_drafts


# -- planted errors --------------------------------------------------------------------


def accept_always(draft: list[int], drawn: list[int]) -> list[int]:
    return [*draft, drawn[-1]]


def emit_the_draft_on_rejection(draft: list[int], drawn: list[int]) -> list[int]:
    tokens = emitted(draft, drawn)
    if len(tokens) <= len(draft):
        tokens[-1] = draft[len(tokens) - 1]
    return tokens


def keep_what_follows_a_rejection(draft: list[int], drawn: list[int]) -> list[int]:
    """The draw after a wrong prefix is taken as if the prefix were right."""
    return list(drawn)


def _temperature_last(logits_by_token, history, params, bias) -> jax.Array:
    """Filters, then temperature."""
    last = jnp.take_along_axis(history, params.position[:, None] - 1, axis=1)[:, 0]
    logits = logits_by_token.at[last].get(mode="clip")
    one = jnp.where(params.temperature > 0, 1.0, 0.0).astype(jnp.float32)
    kept = sampling.filtered_logits(logits, dataclasses.replace(params, temperature=one))
    off = dataclasses.replace(
        params,
        top_k=jnp.zeros_like(params.top_k),
        top_p=jnp.ones_like(params.top_p),
        min_p=jnp.zeros_like(params.min_p),
    )
    return sampling.draw(kept, off)


def _greedy_divided(logits_by_token, history, params, bias) -> jax.Array:
    """A greedy row's logits over its temperature, which is 0: its positive ones are all equal."""
    last = jnp.take_along_axis(history, params.position[:, None] - 1, axis=1)[:, 0]
    logits = logits_by_token.at[last].get(mode="clip")
    divided = jnp.clip(logits / params.temperature[:, None], -1e30, 1e30)
    logits = jnp.where(params.temperature[:, None] > 0, logits, divided)
    return sampling.sample(logits, params, lambda: history, bias, logits.shape[1])


PLANTED: dict[str, dict] = {
    "accept always": {"verify": accept_always},
    "emit the draft on rejection": {"verify": emit_the_draft_on_rejection},
    "keep what follows a rejection": {"verify": keep_what_follows_a_rejection},
    "residual with the draft in it": {"fresh_on_rejection": True},
    "temperature after top-p": {"sample": jax.jit(_temperature_last), "row": {"top_p": 0.7}},
    "greedy rows divided by their temperature": {"sample": jax.jit(_greedy_divided)},
    "the noise of the row's position in all lanes": {"lane_shift": 0},
    "penalties do not see the draft": {"drafts_in_history": False, "row": FILTERS["penalties"]},
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_found(name):
    """With a third of the draws that the right code passes with."""
    right = {"kind": "shared", "num_draws": 65_000}
    assert not Chain(**{**right, **PLANTED[name]}).is_right()


def test_what_errors_are_planted_in_is_right_without_them():
    """By as many draws."""
    assert Chain(row={"top_p": 0.7} | FILTERS["penalties"], num_draws=65_000).is_right()


def test_noise_of_a_planted_lane_at_its_own_position_is_the_samplers():
    made = Chain(row=FILTERS["all"])
    seeds = np.arange(made.num_rows)
    drafts = made.drafts(seeds)
    right = made.step(seeds, drafts)
    lanes = np.repeat(made.history(), 3, axis=0)
    lanes[:, chain.START : chain.START + 2] = np.repeat(drafts, 3, axis=0)
    again = chain.planted(made, seeds, chain.START + np.arange(3), lanes).reshape(-1, 3)
    assert np.array_equal(right, again)
    assert made.sample is SAMPLE


# -- how many drafts are accepted ------------------------------------------------------


def rate_of_shared_noise(p: np.ndarray, q: np.ndarray) -> float:
    """P(two Gumbel-max draws with the same noise are equal): sum over x of
    1 / sum over y of max(p(y) / p(x), q(y) / q(x)) (Daliri, Musco, Suresh 2024)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.maximum(p[None] / p[:, None], q[None] / q[:, None])
    both = (p > 0) & (q > 0)
    return float(np.sum(1 / np.sum(ratio[both], axis=1)))


@pytest.mark.parametrize(
    ("distance", "temperature"),
    [(0.0, 1.0), (0.2, 1.0), (NEAR, 0.3), (NEAR, 1.0), (NEAR, 1.7), (FAR, 1.0)],
)
def test_acceptance_is_what_theory_says(distance, temperature):
    made = Chain(distance=distance, temperature=temperature, length=1)
    made.temperatures[:] = temperature
    p = made.probabilities(made.target, chain.PROMPT, temperature)
    q = made.probabilities(made.draft_table, chain.PROMPT, temperature)
    d = 0.5 * np.sum(np.abs(p - q))
    want = rate_of_shared_noise(p, q)
    assert (1 - d) / (1 + d) - 1e-9 <= want <= 1 - d + 1e-9  # 1 - d: the most of any coupling
    shared = made.acceptance(num_batches=5)
    made.kind = "independent"
    independent = made.acceptance(num_batches=5)
    sigmas = 4.5 * np.sqrt(0.25 / (5 * made.num_rows))
    assert shared == pytest.approx(want, abs=sigmas)
    assert shared >= (1 - d) / (1 + d) - sigmas
    assert independent == pytest.approx(np.sum(p * q), abs=sigmas)
    assert shared > independent


@pytest.mark.parametrize("token", ["best", "rare"])
def test_a_point_mass_is_accepted_with_the_targets_probability(token):
    made = Chain(kind="fixed")
    made.temperatures[:] = 1.0
    p = made.probabilities(made.target, chain.PROMPT, 1.0)
    drafted = int(np.argmax(p) if token == "best" else np.argsort(p)[40])
    made.drafts = lambda seeds: np.full((made.num_rows, 2), drafted)
    made.num_accepted = made.num_drafts = 0
    first = np.concatenate(
        [made.batch(np.arange(i * made.num_rows, (i + 1) * made.num_rows))[:, 0] for i in range(8)]
    )
    count = made.num_drafts
    sigmas = 4.5 * np.sqrt(p[drafted] * (1 - p[drafted]) / count)
    assert made.num_accepted / count == pytest.approx(p[drafted], abs=sigmas)
    # Given that it is not accepted, the rest comes as p without it, renormalised.
    rejected = first[first != drafted]
    assert len(rejected) == count - made.num_accepted
    residual = np.where(np.arange(64) == drafted, 0, p)
    counts = np.bincount(rejected, minlength=64)
    assert chain.is_drawn_from(counts, residual / residual.sum())
