"""How many tokens are drafted: step costs, expected tokens a second, evidence. No device, no clock:
costs are told."""

from itertools import pairwise

import pytest

from jaxinfer.request import Request, Row, Sequence, SpeculationStats, StepPlan
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.speculative import speculator as module
from jaxinfer.speculative.config import SpeculativeConfig
from jaxinfer.speculative.speculator import Speculator, StepCosts, _fill

BUCKETS = (1, 8, 16, 32)
VOCAB = 50


class FakeProposer:
    """Can draft what it is told, and drafts what it is told."""

    def __init__(self, can: int = 100, drafts: list[list[int]] | None = None):
        self.can = can
        self.drafts = drafts
        self.caught_up = 0
        self.forgotten: list[Sequence] = []

    def available(self, sequence, most):
        return min(self.can, most)

    def propose(self, rows):
        return [[1] * row.max_draft for row in rows] if self.drafts is None else self.drafts

    def forget(self, sequence):
        self.forgotten.append(sequence)


def sequence() -> Sequence:
    return Sequence(Request("r", [1, 2], SamplingParams(), 100), 0, [1, 2, 3])


def sequences(count: int) -> list[Sequence]:
    return [sequence() for _ in range(count)]


def row_of(one: Sequence, draft: tuple[int, ...] = (), num_new: int = 1) -> Row:
    return Row(one, 2, num_new, True, 1, [1], max_draft=len(draft), draft=draft)


def plan_of(some: list[Sequence], *drafts: tuple[int, ...]) -> StepPlan:
    rows = [row_of(one) for one in some]
    for row, draft in zip(rows, drafts, strict=False):
        row.draft, row.max_draft = draft, len(draft)
    return StepPlan(0, rows)


def make(num_tokens: int = 4, proposer: FakeProposer | None = None, **config) -> Speculator:
    given = {"method": "ngram", "num_speculative_tokens": num_tokens, **config}
    return Speculator(
        SpeculativeConfig.from_dict(given), proposer or FakeProposer(), BUCKETS, VOCAB
    )


def measured(
    costs: dict[tuple[int, int], float], count: int = module._TRIES, **options
) -> Speculator:
    """A speculator that has seen steps of these costs: (lanes' bucket, rows' bucket that drafts or
    0) -> seconds."""
    made = make(**options)
    for key, seconds in costs.items():
        for _ in range(count):
            made.costs.add(key, seconds)
    return made


def teach(made: Speculator, one: Sequence, accepted: int, tried: int, times: int = 30) -> None:
    """Let `accepted` of `tried` drafted tokens be right, again and again."""
    row = row_of(one, tuple([1] * tried))
    drawn = [1] * accepted + [2] * (tried + 1 - accepted)
    for _ in range(times):
        made.verify(row, drawn)


# -- costs of steps --------------------------------------------------------------------


def test_cost_is_the_median_of_the_newest():
    costs = StepCosts()
    assert costs.seconds((8, 0)) is None and costs.count((8, 0)) == 0
    for seconds in (5.0, 1.0, 100.0):
        costs.add((8, 0), seconds)
    assert costs.seconds((8, 0)) == 5.0 and costs.count((8, 0)) == 3
    for _ in range(module._SAMPLES):
        costs.add((8, 0), 2.0)
    assert costs.seconds((8, 0)) == 2.0 and costs.count((8, 0)) == module._SAMPLES
    assert costs.table() == {(8, 0): 2.0}
    assert costs.seconds((8, 1)) is None  # with drafts is another kind


def test_an_old_cost_is_forgotten_and_measured_anew():
    costs = StepCosts()
    for _ in range(5):
        costs.add((8, 1), 9.0)
    for _ in range(module._STALE - 1):
        costs.add((1, 0), 1.0)
    assert costs.seconds((8, 1)) == 9.0
    costs.add((1, 0), 1.0)
    assert costs.seconds((8, 1)) is None and costs.count((8, 1)) == 0
    assert costs.table() == {(1, 0): 1.0}
    costs.add((8, 1), 4.0)
    assert costs.seconds((8, 1)) == 4.0 and costs.count((8, 1)) == 1  # the nines are gone
    assert costs.seconds((8, 1), module._TRIES) == 4.0  # and one is believed


def test_trials_of_what_does_not_pay_become_rare():
    costs = StepCosts()
    tried: list[int] = []
    for step in range(40 * module._LONGEST_STALE // module._STALE):
        if costs.seconds((8, 1)) is None:
            costs.add((8, 1), 9.0)
            tried.append(step)
        for _ in range(module._STALE // 8):
            costs.add((1, 0), 1.0)
    waits = [(b - a) // 8 for a, b in pairwise(tried)]
    longest = module._LONGEST_STALE // module._STALE
    assert waits[: longest.bit_length()] == [2**i for i in range(longest.bit_length())]
    assert set(waits[longest.bit_length() :]) == {longest}
    for _ in range(module._SAMPLES + 1):  # it pays now
        costs.add((8, 1), 0.5)
    for _ in range(module._STALE):
        assert costs.seconds((8, 1)) == 0.5
        costs.add((1, 0), 1.0)
    assert costs.seconds((8, 1)) is None


# -- how many --------------------------------------------------------------------------


def test_nothing_is_drafted_before_plain_steps_were_measured():
    made = make()
    some = sequences(1)
    for _ in range(module._FIRST):
        assert made.lengths(some) == [0]
        made.costs.add((1, 0), 1.0)
    assert made.lengths(some) == [4]


def test_a_size_that_was_never_measured_is_tried_and_then_believed():
    made = measured({(1, 0): 1.0})
    one = sequences(1)
    for _ in range(module._TRIES):
        assert made.lengths(one) == [4]  # one slow step proves nothing
        made.note_step(plan_of(one, (1, 1, 1, 1)), 5, 50.0)
    assert made.costs.seconds((8, 1)) == 50.0
    assert made.lengths(one) == [0]
    for _ in range(module._TRIES + 1):
        made.costs.add((8, 1), 1.0)
    assert made.lengths(one) == [4]


def test_plain_steps_are_measured_again_when_their_cost_is_stale():
    """A sequence that always drafts would never learn that plain steps have become cheap."""
    made = measured({(1, 0): 1.0})
    one = sequences(1)
    for _ in range(module._STALE + 1):
        made.costs.add((8, 1), 1.5)
        if made.lengths(one) == [0]:
            break
    assert made.costs.seconds((1, 0)) is None
    for _ in range(module._FIRST):
        assert made.lengths(one) == [0]
        made.costs.add((1, 0), 0.2)
    assert made.lengths(one) == [0]  # a plain step costs an eighth of one with a draft


@pytest.mark.parametrize("cost", [1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
def test_a_draft_is_made_where_more_tokens_a_second_are_to_be_expected(cost):
    """At the acceptance that a sequence starts with."""
    made = measured({(1, 0): 1.0, (8, 1): cost})
    accepted, tried = module._PRIOR
    rate = accepted / tried
    tokens = 1 + sum(rate**i for i in range(1, 5))
    pays = tokens / cost > module._MARGIN
    assert made.lengths(sequences(1)) == [4 if pays else 0]
    assert 2.5 < tokens / module._MARGIN < 3.1  # the costs are on either side of it


def test_rows_share_the_lanes_by_their_acceptance():
    """Six rows leave two lanes of the bucket of 8, and ten of that of 16."""
    made = measured({(8, 0): 1.0, (8, 8): 1.0, (16, 8): 4.0, (32, 8): 9.0})
    some = sequences(6)
    teach(made, some[1], 4, 4)
    for one in some[2:]:
        teach(made, one, 0, 4)
    lengths = made.lengths(some)
    assert sum(lengths) == 2  # those of the bucket at hand are free
    assert lengths[1] == 2
    for _ in range(9):
        made.costs.add((16, 8), 1.01)
    lengths = made.lengths(some)
    assert lengths[:2] == [4, 4] and sum(lengths) == 10


@pytest.mark.parametrize("count", range(1, 40))
def test_lanes_never_pass_the_last_bucket(count):
    made = measured({(bucket, 0): 1.0 for bucket in BUCKETS}, num_tokens=32)
    if count > BUCKETS[-1]:
        assert made.lengths(sequences(count)) == [0] * count
        return
    lengths = made.lengths(sequences(count))
    assert len(lengths) == count and all(0 <= length <= 32 for length in lengths)
    assert count + sum(lengths) <= BUCKETS[-1]
    # One more lane for 31 rows is not worth the margin.
    assert (sum(lengths) > 0) == (count < BUCKETS[-1] - 1)


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_disable_by_batch_size(limit):
    made = measured({(1, 0): 1.0, (8, 0): 1.0}, disable_by_batch_size=limit)
    for count in range(1, 8):
        assert any(made.lengths(sequences(count))) == (count < limit)


def test_nothing_available_nothing_drafted():
    made = measured({(8, 0): 1.0, (16, 8): 9.0}, proposer=FakeProposer(can=0))
    assert made.lengths(sequences(3)) == [0] * 3
    made.proposer.can = 2
    assert made.lengths(sequences(3)) == [2, 2, 1]
    assert made.lengths([]) == []


def test_no_more_than_a_request_may_still_generate():
    """Of max_tokens 100; for more no step waits, and lanes go to who can use them."""
    made = measured({(1, 0): 1.0, (8, 0): 1.0, (16, 8): 9.0})
    one, other = sequences(2)
    for left, want in ((1, 0), (2, 1), (3, 2), (5, 4), (6, 4)):
        one.tokens = [1] * (2 + 100 - left)
        one.num_in_flight = 1  # the token that the row being planned will sample
        assert made.lengths([one]) == [want]
        one.num_in_flight = 0
        assert made.should_wait(plan_of([one])) == (want > 0)
    one.tokens = [1] * 98
    one.num_in_flight = 1
    assert made.lengths([one]) == [3]
    assert made.lengths([one, other]) == [3, 3]


def test_a_larger_bucket_is_taken_only_where_it_pays():
    costs = {(8, 0): 1.0, (8, 8): 1.0, (16, 8): 1.9, (32, 8): 1.95}
    made = measured(costs, num_tokens=6)
    lengths = made.lengths(sequences(4))
    assert 4 + sum(lengths) in range(17, 33)
    for _ in range(9):
        made.costs.add((32, 8), 20.0)
        made.costs.add((16, 8), 20.0)
    assert sum(made.lengths(sequences(4))) == 4  # the bucket at hand is as dear as without drafts


# -- evidence --------------------------------------------------------------------------


def test_drafts_that_fail_end_and_drafts_that_hold_go_on():
    made = measured({(1, 0): 1.0, (8, 1): 1.3})
    bad, good = sequences(2)
    teach(made, bad, 0, 4)
    teach(made, good, 4, 4)
    assert made.lengths([bad]) == [0]
    assert made.lengths([good]) == [4]


def test_evidence_fades_so_that_a_sequence_is_tried_again():
    made = measured({(1, 0): 1.0, (8, 1): 1.3})
    (one,) = sequences(1)
    teach(made, one, 0, 4)
    num_steps = 0
    while made.lengths([one]) == [0]:
        num_steps += 1
        assert num_steps < 1000
    assert num_steps > 5
    teach(made, one, 0, 4, times=1)
    again = 0
    while made.lengths([one]) == [0]:
        again += 1
        assert again < 1000
    assert again > 0


def test_evidence_fades_once_a_step():
    """With overlap `should_wait` is asked in place of `lengths`, and stands for the same step."""
    made = measured({(1, 0): 1.0, (8, 1): 1.3})
    asked, planned = sequences(2)
    for one in (asked, planned):
        teach(made, one, 0, 4)
    for _ in range(3):
        before = made._acceptance(asked)
        assert not made.should_wait(plan_of([asked]))
        assert made.lengths([planned]) == [0]
        assert made._acceptance(asked) == made._acceptance(planned) > before


def test_should_wait():
    made = measured({(1, 0): 1.0})
    one, other = sequences(2)
    assert made.should_wait(plan_of([one]))
    assert made.should_wait(plan_of([one], (1, 2)))
    assert not made.should_wait(StepPlan(0, [row_of(one, num_new=5)]))
    assert not made.should_wait(StepPlan(0, [row_of(one), row_of(other, num_new=0)]))
    one.status = one.status.FINISHED
    assert not made.should_wait(plan_of([one]))
    dear = measured({(1, 0): 1.0, (8, 1): 100.0})
    assert not dear.should_wait(plan_of([other]))
    assert dear.should_wait(plan_of([other], (1,)))  # its tokens count before the next is made


# -- what comes back -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drafts", "want"),
    [
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([[1, VOCAB, 2], [-1, 3]], [[1], []]),
        ([[VOCAB - 1, 0, 10**20], []], [[VOCAB - 1, 0], []]),
        ([[1, 2]], [[1, 2], []]),
        ([], [[], []]),
        ([[1], [2], [3], [4]], [[1], [2]]),
    ],
)
def test_what_is_no_token_ends_a_draft_and_every_row_has_one(drafts, want):
    made = make(proposer=FakeProposer(drafts=drafts))
    assert made.propose(plan_of(sequences(2))) == want


def test_counts():
    made = make()
    one, other = sequences(2)
    row = row_of(one, (1, 1, 1))
    assert made.verify(row, [1, 1, 2, 9]) == [1, 1, 2]
    made.count(row, 3, 3)
    assert made.verify(row, [1, 1, 1, 9]) == [1, 1, 1, 9]
    made.count(row, 4, 2)  # its sequence ended by the second
    made.count(row_of(other, (1,)), 1, 1)
    stats = one.request.metrics.speculation
    assert stats == SpeculationStats(2, 6, 5, 5, [2, 2, 1], [2, 2, 2])
    assert stats.acceptance_rate == 5 / 6 and stats.mean_accepted_length == 2.5
    assert made.metrics() == {
        "spec_decode_num_drafts": 3,
        "spec_decode_num_draft_tokens": 7,
        "spec_decode_num_accepted_tokens": 5,
        "spec_decode_acceptance_rate": 5 / 7,
        "spec_decode_mean_accepted_length": 2.0,
        "spec_decode_num_accepted_tokens_pos_0": 2,
        "spec_decode_num_accepted_tokens_pos_1": 2,
        "spec_decode_num_accepted_tokens_pos_2": 1,
    }
    assert make().metrics()["spec_decode_acceptance_rate"] == 0.0


def test_steps_are_noted_by_lanes_and_by_rows_that_draft():
    made = make()
    some = sequences(3)
    made.note_step(plan_of(some), 3, 1.0)
    made.note_step(plan_of(some, (1,) * 7), 10, 2.0)
    made.note_step(plan_of(some[:1]), 1, 3.0)
    assert made.costs.table() == {(8, 0): 1.0, (16, 8): 2.0, (1, 0): 3.0}


def test_a_step_is_not_noted_that_had_to_catch_up_or_drafted_in_vain():
    proposer = FakeProposer()
    made = make(proposer=proposer)
    plan = plan_of(sequences(1), (1, 1))
    proposer.caught_up = 7
    made.propose(plan)
    made.note_step(plan, 3, 9.0)
    assert made.costs.table() == {}
    proposer.caught_up = 0
    made.propose(plan)
    made.note_step(plan, 3, 2.0)
    plan.rows[0].draft = ()
    made.note_step(plan, 1, 9.0)
    assert made.costs.table() == {(8, 1): 2.0}


def test_a_larger_draft_is_not_taken_to_be_cheaper():
    """The draft of 1 is known to cost 6 plain steps; of 4 more are unknown, but not cheaper."""
    made = measured({(1, 0): 1.0, (8, 1): 6.0}, num_tokens=12)
    assert made.lengths(sequences(1)) == [0]


def test_what_ended_is_forgotten():
    made = make()
    (one,) = sequences(1)
    teach(made, one, 0, 4)
    assert made._evidence
    made.forget(one)
    made.forget(one)
    assert not made._evidence and made.proposer.forgotten == [one, one]


@pytest.mark.parametrize("num_lanes", [0, 1, 5, 9, 100])
def test_fill_gives_the_most_expected_tokens(num_lanes):
    """Against every way to share the lanes."""
    available, rates = [3, 0, 2, 4], [0.5, 0.9, 0.95, 0.3]
    lengths, tokens = _fill(available, rates, num_lanes)

    def value(given):
        return len(given) + sum(
            sum(rate**i for i in range(1, n + 1)) for n, rate in zip(given, rates, strict=True)
        )

    every = [
        [a, 0, c, d] for a in range(4) for c in range(3) for d in range(5) if a + c + d <= num_lanes
    ]
    assert lengths in every
    assert tokens == pytest.approx(value(lengths), abs=1e-12)
    assert tokens == pytest.approx(max(map(value, every)), abs=1e-12)
