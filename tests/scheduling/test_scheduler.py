"""Scheduler: single behaviours, each in the smallest setting that shows it."""

import pytest

from jaxinfer.config import SchedulerConfig
from jaxinfer.errors import ConfigError, InvalidRequestError, NumericalError
from jaxinfer.request import Request
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduling.scheduler import NO_TOKEN_ALLOWED, NOT_FINITE
from tests.scheduling.harness import Harness, ids, shape

# -- chunks and budget ----------------------------------------------------------------------------


def test_long_prompt_is_computed_in_chunks_beside_decoding():
    h = Harness(max_num_seqs=4, max_num_batched_tokens=6)
    h.add([1, 2], max_tokens=8)
    assert shape(h.plan()) == [("0", 0, 0, 2, True)]
    h.commit()
    h.add([0] * 12)
    assert shape(h.plan()) == [("0", 0, 2, 1, True), ("1", 0, 0, 5, False)]
    h.commit()
    assert shape(h.plan()) == [("0", 0, 3, 1, True), ("1", 0, 5, 5, False)]
    h.commit()
    assert shape(h.plan()) == [("0", 0, 4, 1, True), ("1", 0, 10, 2, True)]
    h.commit()
    h.drain()
    h.check_drained()


def test_prompt_chunk_of_one_token_counts_as_decode():
    h = Harness(max_num_seqs=3, max_num_batched_tokens=5)
    h.add([1] * 3)
    h.add([2] * 5)
    h.add([0])
    assert [(row.num_new, row.samples) for row in h.plan().rows] == [(3, True), (2, False)]
    h.commit()
    plan = h.plan()
    assert shape(plan) == [("0", 0, 3, 1, True), ("2", 0, 0, 1, True), ("1", 0, 2, 3, True)]
    assert plan.num_tokens == 5


def test_rows_are_bounded():
    h = Harness(max_num_seqs=2, max_num_batched_tokens=8)
    for _ in range(5):
        h.add([1])
    assert len(h.plan().rows) == 2
    assert (h.scheduler.num_running, h.scheduler.num_waiting) == (2, 3)
    h.drain()
    h.check_drained()


# -- overlap --------------------------------------------------------------------------------------


def test_overlap_takes_the_last_token_from_the_device():
    h = Harness()
    h.add([1, 2, 3], max_tokens=2)
    h.add([2, 2], max_tokens=3)
    first = h.plan()
    second = h.plan()
    assert [row.fed_from for row in first.rows] == [None, None]
    assert [row.fed_from for row in second.rows] == [0, 1]
    assert [row.num_generated for row in second.rows] == [1, 1]
    h.commit()
    third = h.plan()
    assert ids(third) == ["1"], "request 0 ends for certain when the second step is committed"
    assert third.rows[0].fed_from == 1
    with pytest.raises(RuntimeError, match="two uncommitted plans"):
        h.scheduler.plan()
    with pytest.raises(RuntimeError, match="not the oldest"):
        h.scheduler.commit(third, [0])
    h.drain(overlap=True)
    h.check_drained()


def test_pages_of_an_ended_sequence_stay_until_its_last_step_is_committed():
    h = Harness(num_pages=4)
    request = h.add([1, 2, 3, 4, 0])
    h.plan()
    h.plan()
    pages = list(request.sequences[0].pages)
    assert h.scheduler.abort(request.request_id)
    assert request.is_finished and request.sequences[0].finish_reason == "abort"
    h.commit()
    assert [h.pool.refcount(page) for page in pages] == [1, 1]
    h.commit()
    assert [h.pool.refcount(page) for page in pages] == [0, 0]
    h.check_drained()


def test_banned_words_of_several_tokens_wait_for_the_host():
    h = Harness()
    h.add([1, 2], bad_token_ids=((1, 2),))
    h.add([1, 2], bad_token_ids=((1,),))
    h.plan()
    assert ids(h.plan()) == ["1"]
    h.drain(overlap=True)
    h.check_drained()


def test_short_of_pages_the_outstanding_step_is_committed_first():
    h = Harness(num_pages=4, page_size=2, enable_prefix_caching=False)
    h.add([1, 1], max_tokens=3)
    h.add([2, 2], max_tokens=3)
    h.plan()
    assert h.plan() is None and h.scheduler.num_outstanding == 1
    assert h.scheduler.metrics()["num_preemptions"] == 0
    h.commit()
    assert ids(h.plan()) == ["0"] and h.scheduler.metrics()["num_preemptions"] == 1
    h.drain(overlap=True)
    h.check_drained()


# -- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "0123"), ("priority", "1302")])
def test_order_of_service(policy, order):
    h = Harness(max_num_seqs=1, policy=policy)
    for priority in (2, 0, 2, 1):
        h.add([1], max_tokens=1, priority=priority)
    served = []
    while h.scheduler.has_work:
        served += ids(h.plan())
        h.commit()
    assert "".join(served) == order


def test_waiting_is_bounded():
    h = Harness(max_num_seqs=1, policy="priority", max_wait_steps=3)
    h.add([1], max_tokens=1, priority=9)
    served = []
    for _ in range(6):
        h.add([2], max_tokens=1, priority=0)
        served += ids(h.plan())
        h.commit()
    assert served.index("0") == 3


def test_priority_is_ignored_under_fcfs():
    h = Harness(max_num_seqs=1)
    h.add([1], priority=9)
    h.add([1], priority=0)
    assert ids(h.plan()) == ["0"]


# -- ends -----------------------------------------------------------------------------------------


def test_stop_tokens():
    tokens = Harness().expected(Request("x", [1, 2], SamplingParams(), 8), 0)[0]
    h = Harness()
    listed = h.add([1, 2], max_tokens=8, stop_token_ids=[tokens[1]])
    ended = h.add([1, 2], max_tokens=8, eos=(tokens[1],))
    h.drain(overlap=True)
    for request, stop_reason in ((listed, tokens[1]), (ended, None)):
        sequence = request.sequences[0]
        assert sequence.finish_reason == "stop" and sequence.stop_reason == stop_reason
        assert sequence.tokens[2:] == tokens[: tokens.index(tokens[1]) + 1]
    h.check_drained()


def test_max_model_len_ends_a_sequence():
    h = Harness(max_model_len=8)
    request = h.add([1] * 6, max_tokens=100)
    h.drain()
    assert len(request.sequences[0].tokens) == 8
    assert request.sequences[0].finish_reason == "length"


@pytest.mark.parametrize("num_steps", range(6))
def test_abort_at_any_stage(num_steps):
    h = Harness(num_pages=8, max_num_batched_tokens=4)
    other = h.add([2, 2], max_tokens=6)
    request = h.add([1] * 7, n=2, max_tokens=5)
    for _ in range(num_steps):
        if len(h.pending) == 2:
            h.commit()
        h.plan()
    assert h.scheduler.abort(request.request_id)
    assert not h.scheduler.abort(request.request_id)
    h.check()
    h.drain(overlap=True)
    assert all(sequence.finish_reason == "abort" for sequence in request.sequences)
    assert other.sequences[0].finish_reason == "length"
    h.check_drained()


def test_abort_takes_the_exact_id():
    h = Harness()
    for _ in range(11):
        h.add([1])
    assert h.scheduler.abort("1")
    assert [r.is_finished for r in h.requests] == [i == 1 for i in range(11)]


@pytest.mark.parametrize(
    ("value", "error"), [(NOT_FINITE, NumericalError), (NO_TOKEN_ALLOWED, InvalidRequestError)]
)
def test_a_bad_row_fails_its_request_alone(value, error):
    h = Harness(page_size=2)
    bad, good = h.add([1, 2, 0], n=2), h.add([2, 2, 2])
    plan = h.scheduler.plan()
    tokens = h.device.run(plan)
    tokens[ids(plan).index("0")] = value
    h.device.poisoned.add(("0", 2))
    h.banned.add("0")
    drawn = h.scheduler.commit(plan, tokens)
    assert [sequence.request for sequence, _ in drawn] == [good]
    assert h.scheduler.take_failed() == [bad] and h.scheduler.take_failed() == []
    assert isinstance(bad.error, error) and "'0'" in str(bad.error)
    assert all(sequence.finish_reason == "error" for sequence in bad.sequences)
    h.scheduler.check_invariants()
    if value == NOT_FINITE:
        assert h.scheduler.cache.match(bad.prompt_token_ids, "", 0.0) == []
    h.drain()
    assert good.sequences[0].finish_reason == "length"


def test_nan_in_a_chunk_that_does_not_sample_is_not_cached():
    h = Harness(page_size=2, max_num_batched_tokens=4)
    request = h.add([1, 2, 0, 1, 2, 0])
    h.device.poisoned.add((request.request_id, 1))
    h.step()
    assert isinstance(request.error, NumericalError) and h.scheduler.cache.num_cached == 0
    h.check_drained()


# -- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"max_num_seqs": 0},
        {"max_num_seqs": True},
        {"max_num_batched_tokens": 3},
        {"max_model_len": -1},
        {"policy": "lifo"},
        {"max_preemptions": 0},
        {"max_wait_steps": 1.5},
        {"max_num_waiting": 0},
    ],
)
def test_bad_configurations_are_refused(fields):
    good = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 32}
    SchedulerConfig(**good)
    with pytest.raises(ConfigError) as info:
        SchedulerConfig(**{**good, **fields})
    assert info.value.field in (*fields, "max_num_batched_tokens")
