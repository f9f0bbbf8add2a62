"""Drafting that does not ask whether it pays, and drafters that are perfect, flaky or hostile."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from jaxinfer import LLM
from jaxinfer.request import Row, Sequence, StepPlan
from jaxinfer.speculative.speculator import Speculator
from tests.helpers import VOCAB_SIZE

LENGTH = 4
CONFIG = {"method": "ngram", "num_speculative_tokens": LENGTH}

Texts = dict[tuple[tuple[int, ...], int], list[int]]
"""By prompt and sample: the tokens that plain decoding gave."""


class Forced(Speculator):
    """Drafts as many tokens as its lanes hold in every step that can; keeps what it saw.

    Every third step is not waited for, so that steps with drafts and overlapped ones mix.
    """

    calls = 0
    max_lanes = 0

    def should_wait(self, plan: StepPlan) -> bool:
        self.calls += 1
        return plan.has_drafts or self.calls % 3 != 0

    def lengths(self, sequences: list[Sequence]) -> list[int]:
        spare = self._buckets[-1] - len(sequences)
        lengths = []
        for _ in sequences:
            lengths.append(min(spare, self.config.num_speculative_tokens))
            spare -= lengths[-1]
        return lengths

    def note_step(self, plan: StepPlan, num_lanes: int, seconds: float) -> None:
        self.max_lanes = max(self.max_lanes, num_lanes)
        super().note_step(plan, num_lanes, seconds)


class Proposer:
    """Drafts what a function of the row says."""

    def __init__(self, draft: Callable[[Row], list[int]], num_lists: int | None = None):
        self.caught_up = 0
        self.draft = draft
        self.num_lists = num_lists

    def available(self, sequence: Sequence, most: int) -> int:
        return most

    def propose(self, rows: Seq[Row]) -> list[list[int]]:
        drafts = [self.draft(row) for row in rows]
        return drafts if self.num_lists is None else drafts[: self.num_lists]

    def forget(self, sequence: Sequence) -> None:
        pass


def truth(texts: Texts, row: Row, count: int) -> list[int]:
    """What plain decoding says next; nothing where it says no more."""
    sequence = row.sequence
    text = texts.get((tuple(sequence.request.prompt_token_ids), sequence.index), [])
    done = len(sequence.tokens) - sequence.prompt_len
    return text[done : done + count]


def oracle(texts: Texts) -> Proposer:
    return Proposer(lambda row: truth(texts, row, row.max_draft))


def flaky(texts: Texts, seed: int = 0) -> Proposer:
    """Right up to a random place, of a random length."""
    rng = np.random.default_rng(seed)

    def draft(row: Row) -> list[int]:
        tokens = truth(texts, row, int(rng.integers(0, row.max_draft + 1)))
        return [t if rng.random() < 0.8 else int(rng.integers(0, 256)) for t in tokens]

    return Proposer(draft)


def hostile(texts: Texts) -> dict[str, Proposer]:
    def wrong(row: Row) -> list[int]:
        return [(t + 1) % 256 for t in truth(texts, row, row.max_draft)]

    def long(row: Row) -> list[int]:
        return truth(texts, row, 2 * LENGTH) + [3] * 50

    def mixed(row: Row) -> list[int]:
        return [*truth(texts, row, 1), VOCAB_SIZE, 5]

    return {
        "wrong": Proposer(wrong),
        "repeats": Proposer(lambda row: [row.sequence.tokens[-1]] * row.max_draft),
        "out of vocabulary": Proposer(lambda row: [VOCAB_SIZE, 10**12]),
        "padding of the vocabulary": Proposer(lambda row: [VOCAB_SIZE - 1] * row.max_draft),
        "out of vocabulary after a right one": Proposer(mixed),
        "negative": Proposer(lambda row: [-1, -2]),
        "empty": Proposer(lambda row: []),
        "longer than asked": Proposer(long),
        "fewer lists than rows": Proposer(lambda row: truth(texts, row, LENGTH), num_lists=1),
        "numpy": Proposer(lambda row: np.array(truth(texts, row, LENGTH), np.int32)),
    }


def force(llm: LLM, proposer: Proposer) -> Forced:
    """Let `llm`, which was made with CONFIG, draft with `proposer` in every step."""
    old = llm.engine.speculator
    assert old is not None
    made = Forced(old.config, proposer, old._buckets, old._vocab_size)
    llm.engine.speculator = made
    return made


def checked(llm: LLM) -> LLM:
    """`llm`, whose books are checked after each step from now on."""
    step = llm.engine.step

    def step_and_check():
        outputs = step()
        llm.engine.scheduler.check_invariants()
        return outputs

    llm.engine.step = step_and_check  # type: ignore[method-assign]
    return llm
