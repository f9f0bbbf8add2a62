"""Prompt caching as a request meets it: counts, salts, pins, and what must not be read."""

from tests.scheduling.harness import Harness


def test_counts_of_a_conversation():
    h = Harness(page_size=2)
    first = h.add([1, 2, 0, 1, 2], max_tokens=4)
    h.drain()
    assert (first.num_cached_tokens, first.num_cache_creation_tokens) == (0, 8)
    turn = h.add([*first.sequences[0].tokens, 2, 2], max_tokens=2)
    h.drain()
    assert (turn.num_cached_tokens, turn.num_cache_creation_tokens) == (8, 4)
    other = h.add(first.sequences[0].tokens, cache_salt="mine")
    h.drain()
    assert other.num_cached_tokens == 0
    h.check_drained()


def test_prompt_logprobs_are_computed_not_read():
    h = Harness(page_size=2)
    h.add([1, 2, 0, 1, 2])
    h.drain()
    request = h.add([1, 2, 0, 1, 2], prompt_logprobs=0)
    assert h.plan().rows[0].start == 0
    h.commit()
    assert request.num_cached_tokens == request.num_cache_creation_tokens == 0
    h.drain()
    h.check_drained()


def test_equal_prompts_computed_at_once_end_up_on_the_same_pages():
    h = Harness(page_size=2, max_num_batched_tokens=16)
    twins = [h.add([1, 2, 0, 1, 2], max_tokens=3) for _ in range(2)]
    h.plan()
    one, two = (request.sequences[0] for request in twins)
    assert not set(one.pages) & set(two.pages)
    h.commit()
    assert one.pages[:2] == two.pages[:2] and one.pages[2] != two.pages[2]
    h.drain(overlap=True)
    h.check_drained()


def test_reset_while_running_keeps_old_pages_out_of_the_new_cache():
    h = Harness(page_size=2)
    h.add([1, 2, 0, 1, 2], max_tokens=6)
    h.step()
    h.scheduler.reset_prefix_cache()
    h.drain()
    assert h.scheduler.cache.num_cached == 0
    h.check_drained()


def test_reset_before_the_first_commit_keeps_those_pages_out_too():
    h = Harness(page_size=2)
    h.add([1, 2, 0], max_tokens=4)
    h.plan()
    h.scheduler.reset_prefix_cache()
    h.drain()
    assert h.scheduler.cache.num_cached == 0
    h.check_drained()


def test_prefix_that_expires_under_a_running_sequence():
    h = Harness(page_size=2)
    request = h.add([1, 2, 0], max_tokens=6)
    h.step()
    assert h.scheduler.pin(request.prompt_token_ids, "", 5.0, True) == 2
    h.step()
    h.now = 6.0
    h.drain()
    assert h.scheduler.cache.num_cached == 0 and request.num_cache_creation_tokens == 4
    h.check_drained()


def test_cache_only_computes_the_prompt_and_samples_nothing():
    h = Harness(page_size=2, max_num_batched_tokens=4)
    request = h.add([1, 2, 0, 1, 2, 0], cache_only=True)
    while not request.is_finished:
        assert not any(row.samples for row in h.plan().rows)
        h.commit()
    assert request.sequences[0].tokens == request.prompt_token_ids
    assert request.num_cache_creation_tokens == 6
    assert h.scheduler.pin(request.prompt_token_ids, "", 10.0, True) == 6
    h.now = 9.0
    assert h.add([1, 2, 0, 1, 2, 0, 0]).num_cached_tokens == 0
    h.drain()
    assert h.requests[-1].num_cached_tokens == 6
    h.now = 20.0
    h.add([1, 2, 0, 1, 2, 0, 0])
    h.drain()
    assert h.requests[-1].num_cached_tokens == 0
    h.check_drained()


def test_without_caching_nothing_is_kept():
    h = Harness(enable_prefix_caching=False)
    h.add([1] * 9)
    h.drain()
    assert h.pool.num_free == h.pool.num_usable
    assert h.scheduler.pin([1] * 9, "", None, True) == h.scheduler.unpin([1] * 9, "") == 0
