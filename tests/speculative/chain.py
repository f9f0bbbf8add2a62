"""Speculative decoding of a Markov chain, by the engine's own sampler and verification, no model.

A target is a table of logits by the token before. A batch of rows drafts, draws a lane for each
prefix of the draft as a step does (position, history and key of the lane), and emits; rows that
emitted one token take another step. `exact` is the distribution that must come out, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import sampling
from jaxinfer.speculative.verify import emitted
from tests.sampling import reference
from tests.sampling.chi_square import is_drawn_from

PROMPT = [3, 5, 3, 9]
START = len(PROMPT)
TEMPERATURES = (0.3, 1.0, 1.7)
NEAR, FAR = 0.5, 2.5

FILTERS: dict[str, dict[str, float]] = {
    "none": {},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.85},
    "min_p": {"min_p": 0.06},
    "penalties": {"repetition": 1.5, "presence": 0.7, "frequency": 0.9},
    "bias": {"bias_slot": 1},
}
FILTERS["all"] = {name: value for row in FILTERS.values() for name, value in row.items()} | {
    "top_p": 0.95,
    "top_k": 30,
    "min_p": 0.01,
}


def table(vocab: int, seed: int, scale: float = 2.0) -> np.ndarray:
    """[V, V] logits of the next token by the last."""
    return np.random.default_rng(seed).normal(0, scale, (vocab, vocab)).astype(np.float32)


def _sample(logits_by_token, history, params, bias) -> jax.Array:
    last = jnp.take_along_axis(history, params.position[:, None] - 1, axis=1)[:, 0]
    logits = logits_by_token.at[last].get(mode="clip")
    return sampling.sample(logits, params, lambda: history, bias, logits.shape[1])


Sample = Callable[..., jax.Array]
SAMPLE: Sample = jax.jit(_sample)


@dataclass
class Chain:
    """The target, the draft's table, the rows' parameters, and how drafts are made.

    `kind`: "greedy" (a point mass: the draft's best token), "fixed" (the same tokens for all rows,
    as a look-up would), "shared" (drawn with the rows' keys) or "independent" (with other keys).
    The last fields are where errors are planted.
    """

    vocab: int = 64
    kind: str = "shared"
    distance: float = NEAR
    row: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    length: int = 2
    num_draws: int = 200_000
    sample: Sample = SAMPLE
    verify: Callable[[list[int], list[int]], list[int]] = emitted
    lane_shift: int = 1
    drafts_in_history: bool = True
    fresh_on_rejection: bool = False

    def __post_init__(self) -> None:
        self.target = table(self.vocab, 1)
        noise = table(self.vocab, 2, 1.0)
        self.draft_table = self.target + np.float32(self.distance) * noise
        self.bias = np.zeros((2, self.vocab), np.float32)
        self.bias[1] = np.random.default_rng(3).normal(0, 1, self.vocab)
        self.bias[1, ::5] = -np.inf
        self.num_rows = 2**19 // self.vocab
        others = [t for t in TEMPERATURES if t != self.temperature]
        # One row in 16 is greedy, and two others are at the other temperatures.
        group = np.arange(self.num_rows) % 16
        self.temperatures = np.select(
            [group == 3, group == 7, group == 11], [0.0, *others], self.temperature
        ).astype(np.float32)

    def params(self, seeds: np.ndarray, positions: np.ndarray, repeats: int = 1):
        return reference.device_params(
            len(seeds) * repeats,
            **(
                self.row
                | {
                    "temperature": np.repeat(self.temperatures, repeats),
                    "seed": np.repeat(seeds, repeats),
                    "prompt_len": START,
                    "position": np.tile(positions, len(seeds)),
                }
            ),
        )

    # -- one batch ---------------------------------------------------------------------

    def drafts(self, seeds: np.ndarray) -> np.ndarray:
        """[N, k] drafted tokens."""
        history = self.history()
        if self.kind == "fixed":
            best = np.argsort(self.target[PROMPT[-1]])[::-1]
            first = best[1 if self.row else 0]
            fixed = [first, np.argmax(self.target[first])][: self.length]
            return np.tile(fixed, (self.num_rows, 1))
        for j in range(self.length):
            at = START + j
            if self.kind == "greedy":
                drawn = np.argmax(self.draft_table[history[:, at - 1]], axis=1)
            else:
                shift = 10**9 if self.kind == "independent" else 0
                params = self.params(seeds + shift, np.array([at]))
                drawn = SAMPLE(self.draft_table, history, params, self.bias)
            history[:, at] = drawn
        return history[:, START : START + self.length]

    def history(self) -> np.ndarray:
        """[N, C] tokens by position; what is not known yet is 0."""
        made = np.zeros((self.num_rows, START + 4), np.int32)
        made[:, :START] = PROMPT
        return made

    def acceptance(self, num_batches: int) -> float:
        """How many first drafted tokens equal what their row draws."""
        equal = []
        for i in range(num_batches):
            seeds = np.arange(i * self.num_rows, (i + 1) * self.num_rows)
            drafts = self.drafts(seeds)
            equal.append(self.step(seeds, drafts[:, :0])[:, 0] == drafts[:, 0])
        return float(np.mean(equal))

    def step(self, seeds: np.ndarray, drafts: np.ndarray) -> np.ndarray:
        """[N, k + 1]: what each lane draws."""
        count = drafts.shape[1] + 1
        history = self.history()
        history[:, START : START + count - 1] = drafts
        positions = START + np.arange(count)
        params = self.params(seeds, positions, count)
        lanes = np.repeat(history, count, axis=0)
        given = (self.target, lanes, params, self.bias)
        if self.lane_shift == 1 and self.drafts_in_history:
            return np.asarray(self.sample(*given)).reshape(-1, count)
        return planted(self, seeds, positions, lanes).reshape(-1, count)

    def batch(self, seeds: np.ndarray) -> np.ndarray:
        """[N, 2]: the first two tokens of each row."""
        drafts = self.drafts(seeds)
        drawn = self.step(seeds, drafts)
        if self.fresh_on_rejection:
            fresh = self.step(seeds + 2 * 10**9, drafts)
            # Where a draft is not accepted its token may come again.
            drawn = np.where(np.c_[drawn[:, :-1] == drafts, drawn[:, -1:] >= 0], drawn, fresh)
        tokens = [
            self.verify(draft, row)[:2]
            for draft, row in zip(drafts.tolist(), drawn.tolist(), strict=True)
        ]
        first = np.array([row[0] for row in tokens], np.int32)
        history = self.history()
        history[:, START] = first
        params = self.params(seeds, np.array([START + 1]))
        then = np.asarray(self.sample(self.target, history, params, self.bias))
        second = [
            row[1] if len(row) > 1 else other for row, other in zip(tokens, then, strict=True)
        ]
        self.num_accepted += int(np.sum(drawn[:, 0] == drafts[:, 0]))
        self.num_drafts += len(seeds)
        return np.stack([first, np.array(second, np.int32)], 1)

    # -- all of them -------------------------------------------------------------------

    def is_right(self) -> bool:
        """Whether the rows of each temperature have the target's distribution."""
        self.num_accepted = self.num_drafts = 0
        share = np.mean(self.temperatures == np.float32(self.temperature))
        num_batches = int(np.ceil(self.num_draws / (self.num_rows * share)))
        tokens = np.concatenate(
            [
                self.batch(np.arange(i * self.num_rows, (i + 1) * self.num_rows))
                for i in range(num_batches)
            ]
        )
        at = np.tile(self.temperatures, num_batches)
        assert np.sum(at == np.float32(self.temperature)) >= self.num_draws
        return all(
            self.agrees(tokens[at == np.float32(temperature)], temperature)
            for temperature in (0.0, *TEMPERATURES)
        )

    def agrees(self, tokens: np.ndarray, temperature: float) -> bool:
        """First tokens, second tokens, pairs of tokens that are equal, pairs."""
        if np.any(tokens < 0) or np.any(tokens >= self.vocab):
            return False
        first, then = self.exact(temperature)
        pairs = first[:, None] * then
        if not is_drawn_from(np.bincount(tokens[:, 0], minlength=self.vocab), first):
            return False
        if not is_drawn_from(np.bincount(tokens[:, 1], minlength=self.vocab), pairs.sum(0)):
            return False
        # Most pairs are too rare for cells of their own, but together these are not.
        same, equal = np.mean(tokens[:, 0] == tokens[:, 1]), np.trace(pairs)
        counts = len(tokens) * np.array([same, 1 - same])
        if not is_drawn_from(np.rint(counts), np.array([equal, 1 - equal])):
            return False
        cells = np.bincount(tokens[:, 0] * self.vocab + tokens[:, 1], minlength=self.vocab**2)
        return is_drawn_from(cells, pairs.ravel())

    def exact(self, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        """[V] probabilities of the first token, [V, V] of the second by the first."""
        first = self.probabilities(self.target, PROMPT, temperature)
        then = np.zeros((self.vocab, self.vocab))
        for token in np.flatnonzero(first):
            then[token] = self.probabilities(self.target, [*PROMPT, int(token)], temperature)
        return first, then

    def probabilities(self, logits, history: list[int], temperature: float) -> np.ndarray:
        row = self.row | {
            "temperature": temperature,
            "prompt_len": START,
            "position": len(history),
        }
        bias = self.bias[int(row.get("bias_slot", 0))]
        x = reference.processed(logits[history[-1]], row, np.array(history), bias, self.vocab)
        if not temperature:
            return (np.arange(self.vocab) == np.argmax(x)).astype(np.float64)
        return reference.softmax(reference.filtered(x, row))


def planted(chain: Chain, seeds: np.ndarray, positions: np.ndarray, lanes: np.ndarray):
    """Lanes whose noise or history is not that of their position: what must be found."""
    last = np.tile(positions, len(seeds)) - 1
    logits = jnp.asarray(chain.target[lanes[np.arange(len(lanes)), last]])
    params = chain.params(seeds, positions, len(positions))
    noise = chain.params(seeds, START + chain.lane_shift * (positions - START), len(positions))
    width = lanes.shape[1] if chain.drafts_in_history else START
    history = jnp.asarray(lanes[:, :width])
    return np.asarray(_PLANTED(logits, params, noise, history, chain.bias))


_PLANTED = jax.jit(
    lambda logits, params, noise, history, bias: sampling.sample(
        logits,
        params,
        lambda: history,
        bias,
        logits.shape[1],
        keys=lambda: sampling.row_keys(noise),
    )
)
