"""Drafted tokens through the scheduler: who gets them, what is kept, what is rolled back."""

import random

import pytest

from jaxinfer.errors import NumericalError
from jaxinfer.request import Row, Sequence, StepPlan
from jaxinfer.scheduling.scheduler import NO_TOKEN_ALLOWED, NOT_FINITE
from tests.echo import reference
from tests.scheduling.harness import VOCAB, Harness


def lengths(*values: int):
    """Draft lengths for the first rows; 0 for the others."""
    return lambda sequences: [*values, *[0] * len(sequences)][: len(sequences)]


def decoding(prompts: list[list[int]], max_tokens: int = 12, **config) -> Harness:
    """Requests past their prompts, nothing in flight."""
    h = Harness(**{"max_num_batched_tokens": 64, "max_num_seqs": 8, **config})
    for prompt in prompts:
        h.add(prompt, max_tokens=max_tokens)
    h.step()
    return h


def truth(sequence: Sequence, count: int) -> list[int]:
    return reference(sequence.tokens, count, VOCAB, sequence.index)


def wrong(token: int) -> int:
    return (token + 1) % VOCAB


def planned(h: Harness, *values: int) -> StepPlan:
    plan = h.scheduler.plan(lengths(*values))
    assert plan is not None
    return plan


def row_of(plan: StepPlan, index: int = 0) -> Row:
    return plan.rows[index]


def test_a_right_draft_counts_and_what_follows_a_wrong_token_does_not():
    h = decoding([[1, 2, 3]])
    (sequence,) = h.requests[0].sequences
    known = list(sequence.tokens)
    t = truth(sequence, 4)
    plan = planned(h, 4)
    h.scheduler.set_drafts(plan, [[t[0], t[1], wrong(t[2]), t[3]]])
    lanes, first = plan.lanes()
    drawn = h.device.run(lanes)
    assert first == [0] and len(lanes.rows) == 5
    assert drawn[:3] == t[:3]
    got = h.scheduler.commit(plan, drawn[:1], {0: drawn[1:3]})
    assert got == [(sequence, token) for token in t[:3]]
    assert sequence.tokens == known + t[:3]
    # The last token has no K/V yet, and what the wrong one left does not count.
    assert sequence.num_computed == sequence.num_committed == len(sequence.tokens) - 1
    assert sequence.num_in_flight == 0
    h.check()
    h.drain()
    h.check_drained()


def test_lanes_are_rows_at_the_next_positions_of_the_same_pages():
    h = decoding([[1, 2, 3], [3, 2, 1]])
    plan = planned(h, 2, 0)
    h.scheduler.set_drafts(plan, [[4, 0], []])
    assert plan.num_tokens == 2
    lanes, first = plan.lanes()
    assert first == [0, 3] and lanes.num_tokens == 4 and not lanes.rows[0].draft
    row = row_of(plan)
    assert [r.start for r in lanes.rows[:3]] == [row.start, row.start + 1, row.start + 2]
    assert [r.num_generated for r in lanes.rows[:3]] == [row.num_generated + j for j in range(3)]
    assert [r.draft for r in lanes.rows] == [(), (4,), (4, 0), ()]
    assert all(r.pages is row.pages and r.samples for r in lanes.rows[:3])
    h.device.run(lanes)
    h.scheduler.commit(plan, [0, 0], {0: [4]})


def test_a_plan_without_drafts_is_its_own_lanes():
    h = decoding([[1, 2, 3]])
    plan = planned(h, 3)
    h.scheduler.set_drafts(plan, [[]])
    assert plan.lanes() == (plan, [0])
    h.scheduler.commit(plan, h.device.run(plan))


def test_pages_for_a_draft_come_with_the_plan_and_go_with_what_is_not_used():
    h = decoding([[1, 2, 3]], page_size=2)
    (sequence,) = h.requests[0].sequences
    free = h.pool.num_available
    plan = planned(h, 6)
    assert row_of(plan).max_draft == 6
    assert len(sequence.pages) == 5 and h.pool.num_available == free - 3  # ten tokens
    h.check()
    h.scheduler.set_drafts(plan, [[0, 0, 0]])
    assert len(sequence.pages) == 4 and row_of(plan).pages is sequence.pages
    h.check()
    drawn = h.device.run(plan.lanes()[0])
    t = truth(sequence, 1)
    assert drawn[0] == t[0]
    h.scheduler.commit(plan, drawn[:1], {0: []})
    assert len(sequence.pages) == 2
    h.check()


def test_a_draft_is_cut_at_what_was_planned():
    h = decoding([[1, 2, 3]])
    plan = planned(h, 2)
    h.scheduler.set_drafts(plan, [[1] * 50])
    assert row_of(plan).draft == (1, 1)
    h.scheduler.commit(plan, [1], {0: []})


@pytest.mark.parametrize(("max_tokens", "longest"), [(1, 0), (2, 0), (3, 1), (4, 2), (12, 6)])
def test_no_draft_beyond_max_tokens(max_tokens, longest):
    """A draft of k tokens gives k + 1, and one token was there before."""
    h = decoding([[1, 2, 3]], max_tokens=max_tokens)
    plan = h.scheduler.plan(lengths(6))
    assert (plan is None) == (max_tokens == 1)
    if plan is not None:
        assert row_of(plan).max_draft == longest
        h.scheduler.set_drafts(plan, [[]])
        h.scheduler.commit(plan, [0])


def test_no_draft_beyond_max_model_len():
    h = decoding([[1, 2, 3]], max_tokens=100, max_model_len=8)
    plan = planned(h, 6)
    assert row_of(plan).max_draft == 3  # 4 tokens known, 4 to come
    h.scheduler.set_drafts(plan, [truth(row_of(plan).sequence, 3)])
    drawn = h.device.run(plan.lanes()[0])
    h.scheduler.commit(plan, drawn[:1], {0: drawn[1:]})
    assert h.requests[0].sequences[0].finish_reason == "length"
    h.check()


def test_prompts_and_steps_in_flight_come_first():
    asked = []

    def ask(sequences):
        asked.append(len(sequences))
        return [3] * len(sequences)

    h = Harness(max_num_seqs=4, max_num_batched_tokens=16)
    h.add([1, 2, 3], max_tokens=9)
    first = h.scheduler.plan(ask)  # the prompt
    drawn = h.device.run(first)
    second = h.scheduler.plan(ask)  # decode, its token is on the device
    assert not asked
    more = h.device.run(second)
    h.scheduler.commit(first, drawn)
    h.scheduler.commit(second, more)
    h.add([4, 4], max_tokens=9)
    mixed = h.scheduler.plan(ask)  # decode beside a prompt
    assert not asked
    h.scheduler.commit(mixed, h.device.run(mixed))
    alone = h.scheduler.plan(ask)
    assert asked == [2]
    h.scheduler.set_drafts(alone, [[0], []])
    assert h.scheduler.plan(ask) is None  # how many of its tokens count is not known
    h.scheduler.commit(alone, h.device.run(alone.lanes()[0])[::2], {0: []})
    assert h.scheduler.plan(ask) is not None


def test_a_row_that_draws_nothing_has_no_draft():
    """One token of a prompt that is only to be cached, and one of a prompt cut by the budget."""
    h = Harness(max_num_seqs=2, max_num_batched_tokens=2)
    h.add([1], cache_only=True)
    h.add([1, 2, 3])
    plan = planned(h, 4, 4)
    assert [(row.num_new, row.samples, row.max_draft) for row in plan.rows] == [(1, False, 0)] * 2
    h.scheduler.commit(plan, h.device.run(plan))
    h.drain()
    h.check_drained()


def test_a_draft_takes_no_page_that_somebody_needs():
    h = decoding([[1, 2, 3], [2, 2, 2]], page_size=2, num_pages=8)
    assert h.pool.num_available == 3
    plan = planned(h, 6, 6)
    # Each has two pages for its four tokens; one is left for each, and one over.
    assert [row.max_draft for row in plan.rows] == [0, 0]
    h.scheduler.set_drafts(plan, [[], []])
    h.scheduler.commit(plan, h.device.run(plan))
    h.drain()
    h.check_drained()


def test_room_in_the_last_page_is_free_to_draft():
    h = decoding([[1, 2], [2, 2]], page_size=8, num_pages=4, max_tokens=8, max_model_len=10)
    assert h.pool.num_available == 1  # fewer than there are rows
    plan = planned(h, 4, 4)
    assert [row.max_draft for row in plan.rows] == [4, 4]
    h.scheduler.set_drafts(plan, [truth(row.sequence, 4) for row in plan.rows])
    drawn = h.device.run(plan.lanes()[0])
    h.scheduler.commit(plan, drawn[::5], {0: drawn[1:5], 1: drawn[6:]})
    h.check()


@pytest.mark.parametrize("value", [NOT_FINITE, NO_TOKEN_ALLOWED])
def test_a_row_that_can_draw_none_after_its_draft_keeps_what_came_before(value):
    """The request ends by the step whose own token it is: a stop string in what came before may
    end it first, and then plain decoding would have had no error."""
    h = decoding([[1, 2, 3]])
    (sequence,) = h.requests[0].sequences
    t = truth(sequence, 2)
    plan = planned(h, 2)
    h.scheduler.set_drafts(plan, [t])
    h.device.run(plan.lanes()[0])
    got = h.scheduler.commit(plan, [t[0]], {0: [value]})
    assert got == [(sequence, t[0])]
    assert not sequence.is_finished and h.requests[0].error is None
    h.scheduler.check_invariants()
    again = planned(h, 0)
    h.scheduler.set_drafts(again, [[]])
    h.device.run(again)
    assert h.scheduler.commit(again, [value]) == []
    assert sequence.finish_reason == "error" and h.requests[0].error is not None
    assert isinstance(h.requests[0].error, NumericalError) == (value == NOT_FINITE)


@pytest.mark.parametrize("num_right", [0, 1, 3, 5])
@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_the_cache_has_as_much_as_without_drafts(num_right, page_size):
    """Also of the step that ends the sequence: the next turn of the conversation reads it."""
    prompt, max_tokens = [1, 2, 3], 8
    h = decoding([prompt], max_tokens, page_size=page_size, num_pages=40)
    (sequence,) = h.requests[0].sequences
    for _ in range(20):
        if sequence.is_finished:
            break
        plan = planned(h, 5)
        most = row_of(plan).max_draft
        draft = truth(sequence, most)
        draft[num_right:] = [wrong(token) for token in draft[num_right:]]
        h.scheduler.set_drafts(plan, [draft])
        drawn = h.device.run(plan.lanes()[0])
        h.scheduler.commit(plan, drawn[:1], {0: drawn[1 : 1 + min(num_right, most)]})
        h.check()
    assert sequence.tokens == prompt + reference(prompt, max_tokens, VOCAB)
    # K/V exist of all but the last token.
    cached = (len(prompt) + max_tokens - 1) // page_size
    assert h.scheduler.cache is not None and h.scheduler.cache.num_cached == cached
    assert h.requests[0].num_cache_creation_tokens == cached * page_size


def test_what_was_rejected_is_in_no_cached_page():
    h = decoding([[1, 2, 3]], page_size=2)
    (sequence,) = h.requests[0].sequences
    plan = planned(h, 6)
    h.scheduler.set_drafts(plan, [[wrong(token) for token in truth(sequence, 6)]])
    drawn = h.device.run(plan.lanes()[0])
    h.scheduler.commit(plan, drawn[:1], {0: []})
    assert h.scheduler.cache is not None
    cached = [node.tokens for node in h.scheduler.cache.nodes()]
    assert sorted(cached) == sorted([tuple(sequence.tokens[:2]), tuple(sequence.tokens[2:4])])
    h.check()


@pytest.mark.parametrize("when", ["planned", "drafted"])
def test_abort_of_a_row_with_a_draft(when):
    h = decoding([[1, 2, 3], [3, 3, 3]], page_size=2)
    plan = planned(h, 4, 4)
    if when == "planned":
        h.scheduler.abort("0")
    h.scheduler.set_drafts(plan, [[1, 1], truth(plan.rows[1].sequence, 2)])
    h.scheduler.abort("0")
    h.scheduler.check_invariants()
    drawn = h.device.run(plan.lanes()[0])
    got = h.scheduler.commit(plan, [drawn[0], drawn[3]], {1: drawn[4:]})
    assert [s.request.request_id for s, _ in got] == ["1"] * 3
    h.check()
    h.drain()
    h.check_drained()


def test_a_stop_token_inside_a_draft_ends_it_there():
    h = Harness(max_num_batched_tokens=64)
    prompt = [1, 2, 3]
    t = reference(prompt, 6, VOCAB)
    stop = t[2]
    h.add(prompt, max_tokens=6, stop_token_ids=[stop])
    h.step()
    (sequence,) = h.requests[0].sequences
    assert not sequence.is_finished
    plan = planned(h, 4)
    h.scheduler.set_drafts(plan, [t[1:5]])
    drawn = h.device.run(plan.lanes()[0])
    got = h.scheduler.commit(plan, drawn[:1], {0: drawn[1:]})
    assert [token for _, token in got] == t[1 : t.index(stop) + 1]
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", stop)
    h.check()
    h.check_drained()


def test_set_drafts_is_of_the_newest_plan():
    h = decoding([[1, 2, 3]])
    plan = planned(h, 2)
    other = StepPlan(99, plan.rows)
    with pytest.raises(RuntimeError, match="not the newest"):
        h.scheduler.set_drafts(other, [[]])
    h.scheduler.set_drafts(plan, [[]])
    h.scheduler.commit(plan, h.device.run(plan))
    with pytest.raises(RuntimeError, match="not the newest"):
        h.scheduler.set_drafts(plan, [[]])


@pytest.mark.parametrize("seed", range(6))
def test_long_lives_with_drafts(seed):
    """Both outcomes of a draft happen, in pools that are short of pages too."""
    rng = random.Random(seed)
    h = Harness(
        num_pages=rng.choice([14, 20, 40]),
        page_size=rng.choice([1, 2, 4]) if seed else 4,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        drafts=random.Random(seed),
    )
    for _ in range(12):
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 4))]
        h.add(prompt, max_tokens=rng.randint(1, 9), n=rng.choice([1, 2]))
    h.drain(overlap=seed % 2 == 0)
    assert h.num_accepted and h.num_rejected
    h.check_drained()
