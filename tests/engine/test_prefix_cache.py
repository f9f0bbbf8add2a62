"""The prompt cache through LLM: what is read and written, salts, pins, times to live,
conversations."""

import numpy as np
import pytest

from jaxinfer import LLM, InvalidRequestError, SamplingParams
from tests.helpers import assert_no_leak, tiny_llm

PAGE = 8
NUM_PAGES = 30


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def shared(tiny):
    with tiny_llm(tiny, num_pages=NUM_PAGES, max_num_seqs=4, max_num_batched_tokens=32) as made:
        yield made


@pytest.fixture
def clock(llm, monkeypatch):
    made = FakeClock()
    monkeypatch.setattr(llm.engine.scheduler._roster, "clock", made)
    return made


@pytest.fixture(scope="module")
def uncached(tiny):
    with tiny_llm(
        tiny, enable_prefix_caching=False, max_num_seqs=4, max_num_batched_tokens=32
    ) as made:
        yield made


def greedy(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 4, "ignore_eos": True, **fields})


def ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def run(llm: LLM, prompt, **fields):
    return llm.generate(prompt, greedy(**fields))[0]


def fill(llm: LLM, count: int = 12) -> None:
    """Ask for so much else that whatever may be evicted is."""
    for i in range(count):
        run(llm, ids(500 + i, 60))


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 40, 41])
def test_second_call_reads_whole_pages_but_never_the_whole_prompt(llm, uncached, length):
    prompt = ids(length, length)
    first, second = run(llm, prompt), run(llm, prompt)
    assert first.num_cached_tokens == 0
    # K/V exist of the prompt and of all but the last token generated.
    assert first.num_cache_creation_tokens == (length + 3) // PAGE * PAGE
    assert second.num_cached_tokens == (length - 1) // PAGE * PAGE
    assert second.num_cache_creation_tokens == 0
    want = run(uncached, prompt)
    assert (want.num_cached_tokens, want.num_cache_creation_tokens) == (0, 0)
    assert first.outputs[0].token_ids == want.outputs[0].token_ids
    assert second.outputs[0].token_ids == want.outputs[0].token_ids


@pytest.mark.parametrize("same", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
def test_prompts_that_share_a_beginning(llm, uncached, same):
    one, other = ids(1, 40), ids(2, 40)
    other = [*one[:same], (one[same] + 1) % 256, *other[same + 1 :]]
    run(llm, one)
    output = run(llm, other)
    assert output.num_cached_tokens == same // PAGE * PAGE
    assert output.outputs[0].token_ids == run(uncached, other).outputs[0].token_ids


def test_samples_of_one_prompt_are_cached_once(llm):
    prompt = ids(3, 20)
    params = SamplingParams(n=4, seed=1, max_tokens=10, ignore_eos=True)
    output = llm.generate(prompt, params)[0]
    # Two pages of the prompt, and of each sample the page 16..23 and nothing beyond token 28.
    assert output.num_cache_creation_tokens == (2 + 4) * PAGE
    again = llm.generate(prompt, params)[0]
    assert [o.token_ids for o in again.outputs] == [o.token_ids for o in output.outputs]
    assert again.num_cached_tokens == 2 * PAGE


def test_equal_prompts_in_one_batch(llm, uncached):
    prompt = ids(4, 30)
    outputs = llm.generate([prompt] * 4, greedy())
    want = run(uncached, prompt).outputs[0].token_ids
    assert [o.outputs[0].token_ids for o in outputs] == [want] * 4
    assert sum(o.num_cache_creation_tokens for o in outputs) == 4 * PAGE


def test_salts_are_separate(llm):
    prompt = ids(5, 40)

    def read(**salt) -> int:
        return run(llm, {"prompt_token_ids": prompt, **salt}).num_cached_tokens

    assert read(cache_salt="alice") == 0
    assert read(cache_salt="alice") == 32
    assert read(cache_salt="bob") == 0
    assert read() == 0
    assert read() == 32
    assert read(cache_salt="bob") == 32
    for bad in ("", 5, "x" * 1025, b"alice"):
        with pytest.raises(InvalidRequestError, match="cache_salt"):
            read(cache_salt=bad)


def test_next_turn_reuses_the_answer(llm):
    messages = [{"role": "user", "content": "tell me"}]
    params = greedy(max_tokens=20, allowed_token_ids=list(range(40, 80)))
    first = llm.chat(messages, params)[0]
    messages += [
        {"role": "assistant", "content": first.outputs[0].text},
        {"role": "user", "content": "more"},
    ]
    second = llm.chat(messages, params)[0]
    known = len(first.prompt_token_ids) + 19  # the last token drawn has no K/V
    assert second.prompt_token_ids[: known + 1] == (
        first.prompt_token_ids + first.outputs[0].token_ids
    )
    assert second.num_cached_tokens == known // PAGE * PAGE
    assert second.num_cached_tokens > len(first.prompt_token_ids)


def test_prompt_logprobs_bypass_reading_and_fill_the_cache(llm, uncached):
    prompt = ids(6, 50)
    fields = {"prompt_logprobs": 1, "logprobs": 1}
    want = run(uncached, prompt, **fields)
    for _ in range(2):
        output = run(llm, prompt, **fields)
        assert output.num_cached_tokens == 0
        assert output.outputs[0].token_ids == want.outputs[0].token_ids
        for mine, theirs in zip(output.prompt_logprobs, want.prompt_logprobs, strict=True):
            assert (mine is None) == (theirs is None)
            for token, entry in (mine or {}).items():
                assert entry.logprob == pytest.approx(theirs[token].logprob, abs=1e-4)
                assert entry.rank == theirs[token].rank
    assert run(llm, prompt).num_cached_tokens == 48


def test_reset(llm):
    prompt = ids(7, 40)
    run(llm, prompt)
    assert llm.reset_prefix_cache() is True
    assert run(llm, prompt).num_cached_tokens == 0
    llm.cache_prompt(prompt, pin=True)
    llm.reset_prefix_cache()
    pool = llm.engine.scheduler.pool
    assert pool.num_available == pool.num_usable
    assert run(llm, prompt).num_cached_tokens == 0


def test_reset_while_requests_run(llm, uncached):
    prompt = ids(8, 40)
    stream = llm.stream(prompt, greedy(max_tokens=12))
    tokens = list(next(stream).outputs[0].token_ids)
    llm.reset_prefix_cache()
    tokens += [t for d in stream for t in d.outputs[0].token_ids]
    assert tokens == run(uncached, prompt, max_tokens=12).outputs[0].token_ids
    assert run(llm, prompt).num_cached_tokens == 0


# -- cache_prompt ----------------------------------------------------------------------


def test_cache_prompt_fills_the_cache(llm, uncached):
    prompt = ids(9, 44)
    made = llm.cache_prompt(prompt)
    assert (made.num_cached_tokens, made.num_cache_creation_tokens) == (0, 40)
    assert made.finished
    assert made.outputs[0].token_ids == []
    again = llm.cache_prompt(prompt)
    assert (again.num_cached_tokens, again.num_cache_creation_tokens) == (40, 0)
    used = run(llm, prompt + ids(10, 10))
    assert used.num_cached_tokens == 40
    want = run(uncached, prompt + ids(10, 10))
    assert used.outputs[0].token_ids == want.outputs[0].token_ids
    text = llm.cache_prompt({"prompt": "a text of more than a page", "cache_salt": "s"})
    assert text.num_cache_creation_tokens == 24
    assert run(llm, {"prompt": "a text of more than a page", "cache_salt": "s"}).num_cached_tokens


def test_whole_context_can_be_cached(tiny):
    with tiny_llm(tiny, max_num_seqs=1, max_num_batched_tokens=32, max_model_len=64) as llm:
        assert llm.cache_prompt(ids(11, 64)).num_cache_creation_tokens == 64
        with pytest.raises(InvalidRequestError, match=r"65 tokens.*max_model_len"):
            llm.cache_prompt(ids(11, 65))
        assert_no_leak(llm)


def test_pin_survives_pressure(llm):
    kept, lost = ids(12, 40), ids(13, 40)
    llm.cache_prompt(kept, pin=True)
    llm.cache_prompt(lost)
    fill(llm)
    assert run(llm, kept).num_cached_tokens == 32
    assert run(llm, lost).num_cached_tokens == 0
    assert llm.get_metrics()["num_evictions"] > 0
    pool = llm.engine.scheduler.pool
    assert pool.num_available == pool.num_usable - 5
    llm.unpin_prompt(kept)
    assert pool.num_available == pool.num_usable
    fill(llm)
    assert run(llm, kept).num_cached_tokens == 0
    llm.unpin_prompt(ids(14, 30))  # never cached: nothing to do
    llm.cache_prompt(kept, pin=True)
    llm.reset_prefix_cache()


def test_pins_of_prompts_that_share_a_beginning(llm):
    head = ids(15, 16)
    one, other = head + ids(16, 16), head + ids(17, 16)
    llm.cache_prompt(one, pin=True)
    llm.cache_prompt(other, pin=True)
    llm.unpin_prompt(one)
    fill(llm)
    assert run(llm, [*other, 0]).num_cached_tokens == 32
    assert run(llm, [*one, 0]).num_cached_tokens == 16
    llm.unpin_prompt(other)


def test_ttl(llm, clock):
    prompt, forever = ids(18, 40), ids(19, 40)
    llm.cache_prompt(prompt, ttl=10)
    llm.cache_prompt(forever)
    clock.now += 9
    assert run(llm, prompt).num_cached_tokens == 32  # the use restarts the time
    clock.now += 9
    assert run(llm, prompt).num_cached_tokens == 32
    clock.now += 11
    assert run(llm, prompt).num_cached_tokens == 0
    assert run(llm, forever).num_cached_tokens == 32


def test_pin_with_ttl_ends(llm, clock):
    prompt = ids(20, 40)
    llm.cache_prompt(prompt, ttl=5, pin=True)
    fill(llm)
    assert run(llm, prompt).num_cached_tokens == 32
    clock.now += 6
    assert run(llm, prompt).num_cached_tokens == 0
    assert llm.engine.scheduler.cache.num_pinned == 0


def test_bad_cache_prompt(llm, uncached):
    with pytest.raises(InvalidRequestError, match="enable_prefix_caching=True"):
        uncached.cache_prompt("text")
    for ttl in (0, -1, float("nan"), float("inf"), "5", True):
        with pytest.raises(InvalidRequestError, match="ttl"):
            llm.cache_prompt("text", ttl=ttl)
    with pytest.raises(InvalidRequestError, match="pin must be True or False"):
        llm.cache_prompt("text", pin=1)  # type: ignore[arg-type]
    for prompt in ("", [], [999], [[1]], None):
        with pytest.raises(InvalidRequestError):
            llm.cache_prompt(prompt)
    for prompt in ("", [999]):
        with pytest.raises(InvalidRequestError):
            llm.unpin_prompt(prompt)


def test_caching_off(uncached):
    prompt = ids(21, 40)
    for _ in range(2):
        output = run(uncached, prompt)
        assert (output.num_cached_tokens, output.num_cache_creation_tokens) == (0, 0)
    assert uncached.reset_prefix_cache() is True
    pool = uncached.engine.scheduler.pool
    assert pool.num_available == pool.num_usable
    assert_no_leak(uncached)


def test_random_use_gives_the_uncached_tokens(llm, uncached):
    """Prompts that share beginnings by chance, with evictions, against the engine without a
    cache."""
    rng = np.random.default_rng(22)
    stems = [ids(30 + i, 60) for i in range(3)]
    prompts = [
        stems[rng.integers(3)][: rng.integers(1, 60)] + ids(60 + i, int(rng.integers(0, 30)))
        for i in range(40)
    ]
    params = [SamplingParams(seed=i, max_tokens=6, ignore_eos=True) for i in range(40)]
    before = llm.get_metrics()
    got = llm.generate(prompts, params)
    want = uncached.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
    after = llm.get_metrics()
    assert after["num_prefix_hits"] > before["num_prefix_hits"]
    assert after["num_evictions"] > before["num_evictions"]
