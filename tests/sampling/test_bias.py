"""BiasRows: which table row each sequence gets, and what is uploaded, against rows made afresh."""

from collections.abc import Iterable

import numpy as np
import pytest

from jaxinfer.bias import BiasRows, bias_row
from jaxinfer.intake import _bias_key
from jaxinfer.request import Request, Row, Sequence, StepPlan
from jaxinfer.sampling_params import SamplingParams

VOCAB = 32
PROMPT = [1, 2, 3]


def sequence(
    output: Iterable[int] = (),
    *,
    bad: tuple[tuple[int, ...], ...] = (),
    stop_ids: Iterable[int] = (),
    prompt: list[int] | None = None,
    **fields,
) -> Sequence:
    """A sequence that has generated `output`; its request is keyed as intake keys it."""
    params = SamplingParams(**fields)
    prompt = PROMPT if prompt is None else prompt
    request = Request(
        "r",
        prompt,
        params,
        params.max_tokens or 16,
        stop_ids=frozenset(stop_ids),
        bad_token_ids=bad,
        bias_key=_bias_key(params, bad),
    )
    return Sequence(request, 0, [*prompt, *output])


def row(seq: Sequence, samples: bool = True) -> Row:
    """The row that draws the sequence's next token."""
    return Row(seq, len(seq.tokens) - 1, 1, samples, len(seq.tokens) - seq.prompt_len, [1])


def plan(*sequences: Sequence) -> StepPlan:
    return StepPlan(1, [row(s) for s in sequences])


def expected(seq: Sequence) -> np.ndarray:
    """The bias of the sequence's next token, from the meaning of each field."""
    request, params = seq.request, seq.request.params
    output = seq.tokens[seq.prompt_len :]
    values = np.zeros(VOCAB, np.float32)
    for token in range(VOCAB):
        values[token] = (params.logit_bias or {}).get(token, 0.0)
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            values[token] = -np.inf
        if token in request.stop_ids and len(output) < params.min_tokens:
            values[token] = -np.inf
        for word in request.bad_token_ids:
            *before, last = word
            if (
                last == token
                and len(before) <= len(output)
                and output[len(output) - len(before) :] == before
            ):
                values[token] = -np.inf
    return values


class Table:
    """The device table, as the uploads make it."""

    def __init__(self, capacity: int):
        self.bias = BiasRows(capacity, VOCAB)
        self.rows = np.zeros((capacity, VOCAB), np.float32)

    def step(self, *sequences: Sequence) -> tuple[list[int], list[int]]:
        """(slots, slots uploaded); asserts that each sequence's row of the table is right."""
        slots, uploads = self.bias.assign(plan(*sequences))
        uploaded = [slot for slot, _ in uploads]
        assert len(slots) == len(sequences)
        assert len(set(uploaded)) == len(uploaded)
        assert all(0 < slot < len(self.rows) for slot in uploaded)
        for slot, values in uploads:
            assert (values.shape, values.dtype) == ((VOCAB,), np.float32)
            self.rows[slot] = values
        for slot, seq in zip(slots, sequences, strict=True):
            np.testing.assert_array_equal(self.rows[slot], expected(seq))
        assert not np.any(self.rows[0])
        return slots, uploaded


def test_rows_without_bias_share_slot_0_and_upload_nothing():
    table = Table(4)
    assert table.step(sequence(), sequence([5]), sequence(stop_ids=[7], min_tokens=0)) == (
        [0, 0, 0],
        [],
    )
    assert table.step() == ([], [])


def test_equal_content_shares_a_slot():
    table = Table(4)
    a, b = sequence(logit_bias={3: 1.5, 4: -2.0}), sequence(logit_bias={4: -2.0, 3: 1.5})
    other = sequence(logit_bias={3: 1.5, 4: -2.5})
    assert table.step(a, b, other, sequence()) == ([1, 1, 2, 0], [1, 2])
    assert table.step(b, other) == ([1, 2], [])


def test_each_kind_of_bias():
    table = Table(10)
    slots, uploaded = table.step(
        sequence(logit_bias={0: 100.0, VOCAB - 1: -100.0}),
        sequence(allowed_token_ids=[2, 9]),
        sequence(allowed_token_ids=[2, 9], logit_bias={2: -7.0, 5: 7.0}),
        sequence(bad=((6,), (7, 8))),
        sequence(stop_ids=[11, 12], min_tokens=2),
        sequence(bad=((9,),), allowed_token_ids=[2, 9], stop_ids=[2], min_tokens=1),
    )
    assert slots == uploaded == [1, 2, 3, 4, 5, 6]


def test_a_prompt_chunk_that_draws_nothing_has_no_bias():
    bias = BiasRows(4, VOCAB)
    seq = sequence(logit_bias={3: 1.0}, stop_ids=[5], min_tokens=3)
    assert bias.assign(StepPlan(1, [row(seq, samples=False)])) == ([0], [])


def test_the_least_recently_used_row_makes_room():
    table = Table(3)  # two rows besides slot 0
    a, b, c = (sequence(logit_bias={i: 1.0}) for i in range(3))
    assert table.step(a, b) == ([1, 2], [1, 2])
    assert table.step(a) == ([1], [])
    assert table.step(c) == ([2], [2])  # b was used longest ago
    assert table.step(a, c) == ([1, 2], [])
    assert table.step(b) == ([1], [1])  # a's, not c's


def test_a_row_of_this_step_is_never_evicted_by_it():
    table = Table(3)
    a, b, c = (sequence(logit_bias={i: 1.0}) for i in range(3))
    table.step(a, b)
    slots, _ = table.step(c, a)  # c takes a place while a, the oldest, is still wanted
    assert slots[0] != slots[1]


def test_min_tokens_bans_the_stops_until_it_is_reached():
    table = Table(4)
    options = {"stop_ids": [7, 8], "min_tokens": 2}
    assert table.step(sequence([], **options)) == ([1], [1])
    assert table.step(sequence([5], **options)) == ([1], [])
    assert table.step(sequence([5, 6], **options)) == ([0], [])
    biased = options | {"logit_bias": {7: 3.0}}
    assert table.step(sequence([5], **biased)) == ([2], [2])
    assert table.step(sequence([5, 6], **biased)) == ([3], [3])


def test_min_tokens_counts_output_only():
    table = Table(4)
    long_prompt = sequence([4], prompt=[1] * 20, stop_ids=[7], min_tokens=2)
    assert table.step(long_prompt) == ([1], [1])


def test_bad_words_of_several_tokens_are_completed_by_output_alone():
    table = Table(8)
    bad = ((2, 3, 9), (3, 10), (20, 21))
    assert table.step(sequence([], bad=bad)) == ([0], [])  # the prompt ends in 2, 3
    assert table.step(sequence([3], bad=bad)) == ([1], [1])  # 10 banned; 2 was prompt
    assert table.step(sequence([2, 3], bad=bad)) == ([2], [2])  # 9 and 10 banned
    assert table.step(sequence([2, 3, 4], bad=bad)) == ([0], [])
    assert table.step(sequence([4, 20], bad=bad), sequence([5, 3], bad=bad)) == ([3, 1], [3])


def test_bias_row_is_what_it_says():
    params = SamplingParams(logit_bias={2: 1.5, 3: -1.0}, allowed_token_ids=[2, 4])
    values = bias_row(6, params, banned=[4])
    assert values.dtype == np.float32
    assert values.tolist() == [-np.inf, -np.inf, 1.5, -np.inf, -np.inf, -np.inf]
    assert bias_row(4, SamplingParams()).tolist() == [0.0] * 4


def test_banned_ids_the_model_does_not_have_are_ignored():
    """A tokenizer may know more tokens than the model's vocabulary."""
    assert bias_row(4, SamplingParams(), banned=[1, 4, 10**6]).tolist() == [0, -np.inf, 0, 0]


def random_sequence(rng: np.random.Generator) -> Sequence:
    """Few different values, so that contents repeat across requests."""
    fields: dict = {}
    if rng.random() < 0.4:
        fields["logit_bias"] = {int(rng.integers(3)): float(rng.choice([-1.0, 2.0]))}
    if rng.random() < 0.3:
        fields["allowed_token_ids"] = [0, 1, 2, 5 + int(rng.integers(2))]
    if rng.random() < 0.4:
        fields |= {"stop_ids": [int(rng.integers(4, 7))], "min_tokens": int(rng.integers(4))}
    if rng.random() < 0.4:
        words = [(0, 1), (1,), (2, 0, 1), (1, 1)]
        fields["bad"] = tuple(words[i] for i in rng.permutation(4)[: rng.integers(1, 4)])
    return sequence([], **fields)


@pytest.mark.parametrize(("capacity", "seed"), [(2, 0), (3, 1), (5, 2), (9, 3), (17, 4)])
def test_random_plans_always_see_their_own_rows(capacity, seed):
    """As in an engine: at most capacity - 1 sequences run; they grow, end and are replaced."""
    rng = np.random.default_rng(seed)
    table, running = Table(capacity), []
    repeats = num_uploads = 0
    for _ in range(400):
        running = [s for s in running if rng.random() > 0.1]
        while len(running) < capacity - 1 and rng.random() < 0.8:
            running.append(random_sequence(rng))
        order = [running[i] for i in rng.permutation(len(running))]
        chosen = order[: int(rng.integers(len(running) + 1))]
        slots, uploaded = table.step(*chosen)
        num_uploads += len(uploaded)
        assert table.step(*chosen) == (slots, [])
        repeats += bool(chosen)
        for seq in chosen:
            seq.tokens.append(int(rng.integers(3)))
    assert repeats > 100
    assert num_uploads > capacity
