"""Who gets pages: refusal, admission, preemption, and the samples that share a prompt."""

import pytest

from jaxinfer.config import SchedulerConfig
from jaxinfer.errors import CapacityError, InvalidRequestError
from jaxinfer.request import Request, Sequence, Status
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.scheduling.queue import Entry
from jaxinfer.scheduling.room import choose_victim
from tests.scheduling.harness import Harness, ids, shape

# -- refusal, admission, preemption ---------------------------------------------------------------


def test_what_never_fits_is_refused():
    h = Harness(num_pages=4, page_size=4)
    with pytest.raises(CapacityError, match="needs 4 pages for 13 tokens") as info:
        h.add([1] * 10, max_tokens=4)
    assert (info.value.need, info.value.have) == (4, 3)
    h.add([1] * 10, max_tokens=3)  # its last token is never fed back: 12 tokens, 3 pages
    h.drain()
    h.check_drained()


def test_full_queue_refuses():
    h = Harness(max_num_waiting=3)
    h.add([1], n=3)
    with pytest.raises(CapacityError, match="max_num_waiting=3"):
        h.add([1])
    h.drain()
    h.check_drained()


@pytest.mark.parametrize("prompt", [[], [1] * 32])
def test_prompts_without_room_are_refused(prompt):
    with pytest.raises(InvalidRequestError, match="a prompt must have 1"):
        Harness().add(prompt)


def test_id_in_use_is_refused():
    h = Harness()
    h.add([1])
    with pytest.raises(InvalidRequestError, match="'0' is in use"):
        h.scheduler.add(Request("0", [1], SamplingParams(), 1))


def test_failed_admission_changes_nothing():
    h = Harness(num_pages=6, page_size=2, max_num_seqs=3, max_num_batched_tokens=8)
    h.add([1, 2, 1, 2, 1, 2], max_tokens=2)
    h.step()
    h.drain()  # pages of 1 2 1 2 1 2 are cached and idle
    h.add([0, 0, 0], max_tokens=3)
    h.plan()
    waiting = h.add([1, 2, 1, 2, 1, 2, 1, 2], max_tokens=1)
    h.commit()

    def state():
        cache = h.scheduler.cache
        nodes = [(node.page, node.stamp, node.expires) for node in cache.nodes()]
        sequence = waiting.sequences[0]
        return (
            list(h.pool.refcounts), cache.num_evictable, nodes, waiting.num_cached_tokens,
            sequence.pages, sequence.num_computed, sequence.status, h.scheduler.num_waiting,
        )  # fmt: skip

    before = state()
    planner, roster = h.scheduler._planner, h.scheduler._roster
    assert planner._try_admit(roster.waiting.head(), 8, 0.0) == 0
    assert state() == before
    h.drain()
    h.check_drained()


def test_admission_leaves_a_page_for_each_running_sequence():
    h = Harness(num_pages=5, page_size=2, enable_prefix_caching=False)
    h.add([1, 1], max_tokens=4)
    h.add([2, 2, 2], max_tokens=2)
    h.add([0, 0], max_tokens=2)
    assert ids(h.plan()) == ["0", "1"], "3 of 4 pages are taken and two sequences run"
    h.drain()
    assert h.scheduler.metrics()["num_preemptions"] == 0
    h.check_drained()


def entry(number, pages, num_computed, num_preemptions=0, priority=0):
    request = Request(str(number), [1], SamplingParams(), 8, arrival=number)
    sequence = Sequence(request, 0, [1] * (num_computed + 1), Status.RUNNING, pages, num_computed)
    sequence.num_preemptions = num_preemptions
    return Entry(sequence, (priority, number, 0), 32)


def victim(running, needy=0, **config):
    pool = PagePool(20, 4)
    taken = {page: 0 for e in running for page in e.sequence.pages}
    assert pool.allocate(len(taken))
    for e in running:
        for page in e.sequence.pages:
            taken[page] += 1
    for page, count in taken.items():
        pool.refcounts[page] = count
    config = SchedulerConfig(8, 8, 32, max_preemptions=3, **config)
    return choose_victim(pool, None, config, running, running[needy]).key[1]


def test_victim_has_the_least_work_to_redo():
    assert victim([entry(0, [1], 1), entry(1, [2], 3), entry(2, [3, 4], 7)]) == 1


def test_victim_is_never_the_oldest():
    assert victim([entry(0, [1], 1), entry(1, [2, 3, 4], 12)], needy=1) == 1


def test_ties_go_to_the_latest_arrival():
    assert victim([entry(0, [1], 1), entry(1, [2], 3), entry(2, [3], 3)]) == 2


def test_work_that_others_keep_alive_does_not_count():
    assert victim([entry(0, [1, 2], 8), entry(1, [1, 2, 3], 9), entry(2, [4], 3)]) == 1


def test_who_was_preempted_often_is_spared():
    assert victim([entry(0, [1], 1), entry(1, [2], 2, 3), entry(2, [3], 4)]) == 2
    assert victim([entry(0, [1], 1), entry(1, [2], 2, 3), entry(2, [3], 4, 3)]) == 1


def test_better_priority_does_not_give_way():
    running = [entry(0, [1], 9), entry(1, [2], 1), entry(2, [3], 4, 0, 5), entry(3, [4], 3, 0, 5)]
    assert victim(running, needy=3) == 3
    assert victim(running, needy=1) == 1


def test_preempted_sequence_keeps_its_tokens_and_returns_first():
    h = Harness(num_pages=6, page_size=2, max_num_seqs=2, enable_prefix_caching=False)
    h.add([1, 1, 1], max_tokens=6)
    second = h.add([2, 2, 2], max_tokens=6)
    third = h.add([0, 0], max_tokens=1)
    while not h.scheduler.metrics()["num_preemptions"]:
        h.step()
    assert second.metrics.num_preemptions == 1
    assert second.sequences[0].num_generated > 0 and not second.sequences[0].pages
    while not second.is_finished:
        h.step()
        assert not third.is_finished or second.sequences[0].status is not Status.WAITING
    h.drain()
    h.check_drained()


def test_alone_among_pinned_pages_a_request_fails_with_an_error():
    h = Harness(num_pages=6, page_size=2)
    told = h.add([1] * 6, cache_only=True)
    waiting = h.add([2, 2], max_tokens=8)
    h.step()
    assert told.sequences[0].finish_reason == "length"
    assert h.scheduler.pin(told.prompt_token_ids, "", None, True) == 6
    h.drain()
    assert isinstance(waiting.error, CapacityError) and "3 of 5 pages are pinned" in str(
        waiting.error
    )
    with pytest.raises(CapacityError, match="the pool has 2 that are not pinned"):
        h.add([2, 2], max_tokens=8)
    h.add([1] * 6 + [2], max_tokens=4)  # fits: the pinned pages are its own beginning
    h.drain()
    h.check_drained()


# -- samples of one request -----------------------------------------------------------------------


def test_samples_share_the_prompt_and_copy_on_write():
    h = Harness(max_num_batched_tokens=8)
    request = h.add([1, 2, 0, 1, 2, 0], n=3)
    plan = h.plan()
    assert shape(plan) == [("0", 0, 0, 6, True), ("0", 1, 6, 0, True), ("0", 2, 6, 0, True)]
    assert [row.logits_row for row in plan.rows] == [None, 0, 0]
    leader = request.sequences[0].pages
    assert all(sequence.pages == leader for sequence in request.sequences)
    assert [h.pool.refcount(page) for page in leader] == [3, 3]
    h.commit()
    plan = h.plan()
    assert [source for source, _ in plan.copies] == [leader[1]] * 2, "the last one writes in place"
    assert len({sequence.pages[1] for sequence in request.sequences}) == 3
    assert {sequence.pages[0] for sequence in request.sequences} == {leader[0]}
    h.commit()
    h.drain()
    assert len({tuple(sequence.tokens) for sequence in request.sequences}) == 3
    h.check_drained()


def test_logits_row_is_in_the_final_order():
    h = Harness()
    h.add([1, 1], max_tokens=5)
    h.step()
    h.add([2, 2, 2], n=2)
    plan = h.plan()
    assert [row.num_new for row in plan.rows] == [1, 3, 0] and plan.rows[2].logits_row == 1


def test_samples_beyond_the_rows_come_later_by_prefix_hit():
    h = Harness(max_num_seqs=2, page_size=2)
    request = h.add([1, 2, 0, 1, 2], n=4)
    assert [row.num_new for row in h.plan().rows] == [5, 0]
    assert h.scheduler.num_waiting == 2
    h.drain()
    assert request.num_cached_tokens == 0
    assert h.scheduler.metrics()["num_prefix_hits"] == 8
    h.check_drained()


def test_one_sample_may_stop_while_others_go_on():
    h = Harness()
    request = h.add([1, 2, 0, 1, 2, 0], n=3, max_tokens=6)
    h.step()
    h.scheduler.finish(request.sequences[0], "stop string", "text")
    h.drain(overlap=True)
    reasons = [sequence.finish_reason for sequence in request.sequences]
    assert reasons == ["stop string", "length", "length"]
    h.check_drained()
