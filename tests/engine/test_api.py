"""LLM's interface on the tiny model: forms of prompts, every SamplingParams field, streams,
aborts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import (
    LLM,
    ConfigError,
    InvalidRequestError,
    RequestOutputKind,
    SamplingParams,
    kv_cache,
)
from pallas_kernels.paged_attention import Ragged
from tests.helpers import VOCAB_SIZE, assert_no_leak, tiny_llm

EOS = 258
PAGE = 8


@pytest.fixture(scope="module")
def shared(tiny):
    with tiny_llm(tiny, max_logprobs=-1) as made:
        yield made


@pytest.fixture
def llm(shared: LLM):
    """The module's engine with an empty cache; the test must leave no page behind."""
    shared.reset_prefix_cache()
    yield shared
    assert_no_leak(shared)


def greedy(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields})


def draws(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 1, "max_tokens": 8, "ignore_eos": True, **fields})


def one(llm: LLM, prompt, params):
    return llm.generate(prompt, params)[0].outputs[0]


def logits_of(llm: LLM, ids: list[int]) -> np.ndarray:
    """[len(ids), V] float64 log-softmax at every position: one dense pass over pages of its own."""
    count = len(ids)
    num_pages = -(-count // 16)
    at = jnp.arange(count, dtype=jnp.int32)
    ragged = Ragged(
        page_table=1 + jnp.arange(num_pages, dtype=jnp.int32)[None],
        kv_lens=jnp.array([count], jnp.int32),
        cu_q_lens=jnp.array([0, count], jnp.int32),
        num_decode=jnp.int32(0),
        slots=at + 16,
        decode_only=False,
    )
    pages = kv_cache.allocate(llm.model, num_pages + 1, 16).layers
    tokens = jnp.array(ids, jnp.int32)
    hidden, _ = llm.model.forward(llm.params, pages, tokens, at, ragged)
    logits = np.asarray(llm.model.logits(llm.params, hidden), np.float64)
    top = logits.max(axis=1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))


# -- prompts and lists
# --------------------------------------------------------------------------------


def test_every_form_of_prompt_gives_the_same_tokens(llm):
    ids = llm.get_tokenizer().encode("hello there")
    assert len(ids) == len("hello there")
    forms = [
        "hello there",
        ids,
        {"prompt": "hello there"},
        {"prompt_token_ids": ids},
        {"prompt": "hello there", "prompt_token_ids": ids},
        {"prompt": "hello there", "cache_salt": "me"},
    ]
    want = one(llm, forms[0], greedy()).token_ids
    assert len(want) == 8
    for form in forms:
        assert one(llm, form, greedy()).token_ids == want
    together = llm.generate(forms, greedy())
    assert [o.outputs[0].token_ids for o in together] == [want] * len(forms)
    assert [o.prompt for o in together] == [
        "hello there", None, "hello there", None, "hello there", "hello there",
    ]  # fmt: skip
    assert all(o.prompt_token_ids == ids and o.finished and o.error is None for o in together)


def test_params_per_prompt_and_order(llm):
    prompts = ["one", "two two two", "three", "four" * 10]
    lengths = [5, 1, 9, 3]
    params = [greedy(max_tokens=n) for n in lengths]
    outputs = llm.generate(prompts, params, priority=[3, 2, 1, 0])
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths
    for prompt, choose, output in zip(prompts, params, outputs, strict=True):
        assert output.outputs[0].token_ids == one(llm, prompt, choose).token_ids
        assert output.outputs[0].finish_reason == "length"
    with pytest.raises(InvalidRequestError, match="2 entries for 4 prompts"):
        llm.generate(prompts, params[:2])
    with pytest.raises(InvalidRequestError, match="priority has 1 entries for 4"):
        llm.generate(prompts, params, priority=[1])
    with pytest.raises(InvalidRequestError, match="priority must be an integer"):
        llm.generate("x", greedy(), priority=1.5)  # type: ignore[arg-type]


def test_default_params_are_vllms(llm):
    output = llm.generate("hello")[0]
    assert len(output.outputs) == 1
    assert len(output.outputs[0].token_ids) <= 16
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_priority_is_served_first(tiny):
    with tiny_llm(tiny, max_num_seqs=1, scheduling_policy="priority") as llm:
        for i, priority in enumerate([5, 1, 3]):
            llm.add_request(str(i), [i + 1] * 4, greedy(max_tokens=2), priority=priority)
        finished = []
        while llm.has_unfinished_requests():
            finished += [o.request_id for o in llm.step() if o.finished]
        assert finished == ["1", "2", "0"]
        assert_no_leak(llm)


# -- n > 1
# --------------------------------------------------------------------------------------------


def test_samples_differ_are_ordered_and_share_the_prompts_pages(llm):
    prompt = list(range(1, 5 * PAGE))
    pool = llm.engine.scheduler.pool
    free = pool.num_available
    llm.add_request("n", prompt, draws(n=4, seed=3, max_tokens=6))
    most = 0
    final = None
    while llm.has_unfinished_requests():
        for final in llm.step():
            pass
        most = max(most, free - pool.num_available)
    assert final is not None
    assert final.finished
    assert [o.index for o in final.outputs] == [0, 1, 2, 3]
    texts = {tuple(o.token_ids) for o in final.outputs}
    assert len(texts) == 4
    # 39 prompt tokens and 6 new: 4 whole pages shared, then at most 2 of each sample's own.
    assert 5 <= most <= 4 + 4 * 2
    again = llm.generate(prompt, draws(n=4, seed=3, max_tokens=6))[0]
    assert [o.token_ids for o in again.outputs] == [o.token_ids for o in final.outputs]
    first = one(llm, prompt, draws(n=1, seed=3, max_tokens=6))
    assert first.token_ids == final.outputs[0].token_ids


def test_stream_of_samples_gives_each_end_once(llm):
    prompt = "several"
    params = draws(n=3, seed=5, max_tokens=12, ignore_eos=False, stop_token_ids=list(range(40)))
    want = llm.generate(prompt, params)[0]
    assert len({len(o.token_ids) for o in want.outputs}) > 1, "the samples should end apart"
    ids: dict[int, list[int]] = {0: [], 1: [], 2: []}
    text = {0: "", 1: "", 2: ""}
    ends: list[int] = []
    for output in llm.stream(prompt, params):
        for sample in output.outputs:
            assert sample.index not in ends
            ids[sample.index] += sample.token_ids
            text[sample.index] += sample.text
            if sample.finish_reason is not None:
                ends.append(sample.index)
    assert sorted(ends) == [0, 1, 2]
    assert [ids[i] for i in range(3)] == [o.token_ids for o in want.outputs]
    assert [text[i] for i in range(3)] == [o.text for o in want.outputs]


# -- log-probs
# ----------------------------------------------------------------------------------------


def check_entry(entry, chosen: int, row: np.ndarray, count: int) -> None:
    """`entry` holds the chosen token first and the `count` best of `row`, with values and ranks."""
    assert next(iter(entry)) == chosen
    best = np.argsort(-row, kind="stable")[:count].tolist()
    assert set(entry) == {chosen, *best}
    for token, given in entry.items():
        assert given.logprob == pytest.approx(row[token], abs=2e-4)
        assert given.rank == 1 + int((row > row[token]).sum())
        assert isinstance(given.decoded_token, str)


@pytest.mark.parametrize("length", [1, 5, PAGE, 3 * PAGE + 1, 90])
def test_logprobs_and_prompt_logprobs(llm, length):
    prompt = np.random.default_rng(length).integers(0, 256, length).tolist()
    params = draws(seed=1, logprobs=3, prompt_logprobs=2, max_tokens=5)
    for attempt in range(2):  # the second time the prompt is in the cache
        output = llm.generate(prompt, params)[0]
        sample = output.outputs[0]
        rows = logits_of(llm, prompt + sample.token_ids)
        assert sample.logprobs is not None
        assert len(sample.logprobs) == len(sample.token_ids) == 5
        for i, (token, entry) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
            check_entry(entry, token, rows[length - 1 + i], 3)
        total = sum(e[t].logprob for e, t in zip(sample.logprobs, sample.token_ids, strict=True))
        assert sample.cumulative_logprob == pytest.approx(total, abs=1e-5)
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == length
        for i, entry in enumerate(output.prompt_logprobs[1:], 1):
            check_entry(entry, prompt[i], rows[i - 1], 2)
        assert output.num_cached_tokens == 0, attempt  # every position is computed
    cached = llm.generate(prompt, draws(seed=1, logprobs=3, max_tokens=5))[0]
    assert cached.num_cached_tokens == (length - 1) // PAGE * PAGE
    assert cached.outputs[0].token_ids == sample.token_ids
    for mine, before in zip(cached.outputs[0].logprobs or [], sample.logprobs, strict=True):
        assert list(mine) == list(before)
        for token in mine:
            assert mine[token].logprob == pytest.approx(before[token].logprob, abs=1e-4)


def test_logprobs_0_and_all(llm):
    none_more = one(llm, "abc", greedy(logprobs=0))
    assert [list(e) for e in none_more.logprobs] == [[t] for t in none_more.token_ids]
    everything = one(llm, "abc", greedy(logprobs=-1, max_tokens=1)).logprobs[0]
    assert len(everything) == VOCAB_SIZE
    assert sorted(p.rank for p in everything.values()) == list(range(1, VOCAB_SIZE + 1))
    assert sum(math.exp(p.logprob) for p in everything.values()) == pytest.approx(1, abs=1e-4)


def test_logprobs_are_of_the_raw_logits(llm):
    plain = one(llm, "raw", greedy(logprobs=5, max_tokens=1))
    first = plain.token_ids[0]
    banned = one(llm, "raw", greedy(logprobs=5, max_tokens=1, logit_bias={first: -100}))
    assert banned.token_ids[0] != first
    assert banned.logprobs[0][first].logprob == pytest.approx(plain.logprobs[0][first].logprob)
    assert banned.logprobs[0][banned.token_ids[0]].rank == 2


# -- where it ends
# ------------------------------------------------------------------------------------


def printable(**fields) -> SamplingParams:
    """Only ASCII letters, so that stop strings can be cut from the text."""
    letters = list(range(32, 90))
    return greedy(max_tokens=16, allowed_token_ids=letters, frequency_penalty=0.5, **fields)


def test_stop_string_over_several_tokens(llm):
    full = one(llm, "tell me", printable())
    assert len(full.text) == 16
    stop = full.text[5:9]
    at = full.text.index(stop)
    cut = one(llm, "tell me", printable(stop=stop))
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (full.text[:at], "stop", stop)
    assert cut.token_ids == full.token_ids[: at + 4]
    kept = one(
        llm, "tell me", printable(stop=["never seen", stop], include_stop_str_in_output=True)
    )
    assert kept.text == full.text[: at + 4]
    assert kept.stop_reason == stop
    # A prefix of another stop string counts first; what is streamed never shows part of a stop.
    first = one(llm, "tell me", printable(stop=[stop, stop[:2]]))
    assert first.text == full.text[: full.text.index(stop[:2])]
    assert first.stop_reason == stop[:2]
    pieces = [d.outputs[0].text for d in llm.stream("tell me", printable(stop=stop))]
    assert "".join(pieces) == full.text[:at]
    late = one(llm, "tell me", printable(stop=stop, min_tokens=at + 4))
    assert len(late.token_ids) > at + 4


def test_stop_string_completed_by_the_last_token(llm):
    full = one(llm, "tell me", printable())
    cut = one(llm, "tell me", printable(stop=full.text[-3:]))
    assert (cut.finish_reason, cut.stop_reason) == ("stop", full.text[-3:])
    assert cut.text == full.text[: full.text.index(full.text[-3:])]


def test_stop_token_ids(llm):
    full = one(llm, "tell me", printable())
    token = full.token_ids[4]
    at = full.token_ids.index(token)
    cut = one(llm, "tell me", printable(stop_token_ids=[token]))
    assert (cut.finish_reason, cut.stop_reason) == ("stop", token)
    assert cut.token_ids == full.token_ids[: at + 1]
    assert cut.text == full.text[:at]
    kept = one(llm, "tell me", printable(stop_token_ids=[token], include_stop_str_in_output=True))
    assert kept.text == full.text[: at + 1]
    later = one(llm, "tell me", printable(stop_token_ids=[token], min_tokens=at + 3))
    assert len(later.token_ids) >= at + 3
    assert token not in later.token_ids[: at + 3]


def test_eos_ends_unless_ignored_or_too_early(llm):
    def push(at_least: int, ignore: bool):
        params = greedy(logit_bias={EOS: 100}, ignore_eos=ignore, min_tokens=at_least)
        return one(llm, "end", params)

    ended = push(0, False)
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([EOS], "stop", None)
    assert ended.text == ""
    assert push(0, True).token_ids == [EOS] * 8
    late = push(3, False)
    assert EOS not in late.token_ids[:3]
    assert late.token_ids[3:] == [EOS]


def test_max_tokens_none_fills_the_context(tiny):
    with tiny_llm(tiny, max_num_seqs=1, max_num_batched_tokens=32, max_model_len=40) as llm:
        output = one(llm, list(range(9)), greedy(max_tokens=None))
        assert len(output.token_ids) == 31
        assert output.finish_reason == "length"
        exact = one(llm, list(range(9)), greedy(max_tokens=31))
        assert exact.token_ids == output.token_ids
        with pytest.raises(InvalidRequestError, match=r"9 tokens.*32.*max_model_len \(40\)"):
            llm.generate(list(range(9)), greedy(max_tokens=32))
        assert len(one(llm, [1] * 39, greedy(max_tokens=None)).token_ids) == 1
        assert_no_leak(llm)


# -- what may be drawn
# --------------------------------------------------------------------------------


def test_bad_words_of_one_token_and_of_several(llm):
    tokenizer = llm.get_tokenizer()
    full = one(llm, "words", printable())
    letter = full.text[0]
    without = one(llm, "words", printable(bad_words=[letter]))
    assert letter not in without.text
    at = next(i for i in range(1, 12) if full.text.index(full.text[i : i + 2]) == i)
    pair = full.text[at : at + 2]
    assert len(tokenizer.encode(pair, add_special_tokens=False)) == 2
    no_pair = one(llm, "words", printable(bad_words=[pair]))
    assert pair not in no_pair.text
    assert no_pair.text[: at + 1] == full.text[: at + 1]  # its first letter alone is allowed
    assert no_pair.text[at + 1] != full.text[at + 1]
    long = one(llm, "words", printable(bad_words=[full.text[1:6], pair]))
    assert full.text[1:6] not in long.text
    assert pair not in long.text


def test_bad_word_that_overlaps_itself(llm):
    """aab is banned after aa, also when the a before it began another try."""
    a, b = 65, 66
    params = greedy(allowed_token_ids=[a, b], logit_bias={a: 0.0, b: 50.0}, max_tokens=12)
    tokenizer = llm.get_tokenizer()
    text = {t: tokenizer.decode([t]) for t in (a, b)}
    assert one(llm, "x", params).token_ids == [b] * 12
    word = text[b] * 2 + text[a]
    forced = greedy(
        allowed_token_ids=[a, b], bad_words=[text[b] * 3, word], max_tokens=12, logit_bias={b: 50.0}
    )
    with pytest.raises(InvalidRequestError, match="no token is allowed"):
        llm.generate("x", forced)  # after bb neither is left
    three = greedy(
        allowed_token_ids=[a, b], bad_words=[text[b] * 3], max_tokens=12, logit_bias={b: 50.0}
    )
    assert one(llm, "x", three).token_ids == [b, b, a] * 4


def test_allowed_token_ids_and_bias(llm):
    assert set(one(llm, "only", greedy(allowed_token_ids=[70, 71])).token_ids) <= {70, 71}
    assert one(llm, "bias", greedy(logit_bias={77: 100})).token_ids == [77] * 8
    drawn = one(llm, "bias", draws(seed=2, max_tokens=32, allowed_token_ids=[5, 6, 7]))
    assert set(drawn.token_ids) == {5, 6, 7}
    everything = {token: -100.0 for token in range(VOCAB_SIZE)}
    same = one(llm, "bias", greedy(logit_bias=everything))
    assert same.token_ids == one(llm, "bias", greedy()).token_ids


def test_ids_without_a_token_are_never_drawn(llm):
    drawn = one(llm, "pad", draws(temperature=100.0, seed=0, max_tokens=200))
    assert max(drawn.token_ids) < 259
    assert len(set(drawn.token_ids)) > 100


def test_filters(llm):
    want = one(llm, "filters", greedy()).token_ids
    for alone in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert one(llm, "filters", draws(seed=9, **alone)).token_ids == want
    assert one(llm, "filters", draws(seed=9, top_k=10**9)).token_ids == (
        one(llm, "filters", draws(seed=9)).token_ids
    )


def test_penalties(llm):
    pair = {"allowed_token_ids": [80, 81], "max_tokens": 10}
    plain = one(llm, "again", greedy(logit_bias={80: 1.0}, **pair)).token_ids
    frequency = one(
        llm,
        "again",
        greedy(allowed_token_ids=list(range(20)), frequency_penalty=2.0, max_tokens=20),
    ).token_ids
    base = one(llm, "again", greedy(allowed_token_ids=list(range(20)), max_tokens=20)).token_ids
    assert len(set(frequency)) > len(set(base))
    presence = one(
        llm, "again", greedy(allowed_token_ids=list(range(20)), presence_penalty=2.0, max_tokens=20)
    ).token_ids
    assert len(set(presence)) > len(set(base))
    # Negative penalties reward: the first token drawn is drawn for ever.
    reward = one(llm, "again", greedy(frequency_penalty=-2.0, presence_penalty=-2.0, max_tokens=30))
    assert len(set(reward.token_ids[-10:])) == 1
    assert len(plain) == 10
    # Repetition sees the prompt as well: the two tokens of the prompt give way to others.
    ids = [80, 81] * 3
    seen = one(llm, ids, greedy(repetition_penalty=0.05, max_tokens=4)).token_ids
    unseen = one(llm, ids, greedy(max_tokens=4)).token_ids
    assert seen != unseen


# -- text
# ---------------------------------------------------------------------------------------------


def test_text_options(llm):
    params = {"logit_bias": {256: 100}, "max_tokens": 2}
    assert one(llm, "text", greedy(**params)).text == ""
    shown = one(llm, "text", greedy(skip_special_tokens=False, **params))
    assert shown.text == "<|endoftext|><|endoftext|>"
    silent = one(llm, "text", greedy(detokenize=False))
    assert silent.text == ""
    assert silent.token_ids == one(llm, "text", greedy()).token_ids
    for text in ("\0nul", "\ufeffbom", "a\u0301" * 30, "\u202eright", "👩‍👩‍👧"):
        output = llm.generate(text, greedy(max_tokens=1))[0]
        assert llm.get_tokenizer().decode(output.prompt_token_ids) == text


def test_chat(llm):
    messages = [{"role": "user", "content": "hi {{ 7*7 }} {% for %}"}]
    output = llm.chat(messages, greedy())[0]
    text = llm.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False)
    assert text == output.prompt
    assert text.endswith("hi {{ 7*7 }} {% for %}<|im_end|>\n<|im_start|>assistant\n")
    assert output.prompt_token_ids.count(257) == 2
    both = llm.chat([messages, [*messages, {"role": "assistant", "content": "yes"}]], greedy())
    assert both[0].outputs[0].token_ids == output.outputs[0].token_ids
    assert len(both) == 2
    go_on = llm.chat(
        [*messages, {"role": "assistant", "content": "yes"}],
        greedy(max_tokens=1),
        add_generation_prompt=False,
        continue_final_message=True,
    )[0]
    assert go_on.prompt.endswith("assistant\nyes")
    assert llm.chat(messages, greedy(), cache_salt="a")[0].num_cached_tokens == 0


# -- streams and steps
# --------------------------------------------------------------------------------


def test_stream_equals_generate(llm):
    prompt, params = "stream of text", draws(seed=4, max_tokens=40, temperature=2.0)
    want = llm.generate(prompt, params)[0].outputs[0]
    deltas = list(llm.stream(prompt, params))
    assert len(deltas) > 10
    assert "".join(d.outputs[0].text for d in deltas) == want.text
    assert [t for d in deltas for t in d.outputs[0].token_ids] == want.token_ids
    assert [d.finished for d in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].outputs[0].finish_reason == "length"
    assert len({d.request_id for d in deltas}) == 1


def test_stream_logprobs_come_once(llm):
    params = greedy(logprobs=1, prompt_logprobs=1)
    want = llm.generate("once", params)[0]
    deltas = list(llm.stream("once", params))
    assert [e for d in deltas for e in d.outputs[0].logprobs or []] == want.outputs[0].logprobs
    given = [d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None]
    assert len(given) == 1
    assert given[0][0] is None
    assert all(entry is not None for entry in given[0][1:])


def test_streams_interleaved_with_generate(llm):
    prompts = ["first one", "the second", "and a third"]
    want = [one(llm, p, greedy(max_tokens=10 + i)).token_ids for i, p in enumerate(prompts)]
    a = llm.stream(prompts[0], greedy(max_tokens=10))
    b = llm.stream([prompts[1], prompts[2]], [greedy(max_tokens=11), greedy(max_tokens=12)])
    got: dict[str, list[int]] = {}

    def take(stream):
        output = next(stream, None)
        if output is not None:
            got.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
        return output is not None

    for _ in range(3):
        assert take(a)
        assert take(b)
    assert one(llm, "in between", greedy()).finish_reason == "length"
    assert one(llm, prompts[0], greedy(max_tokens=10)).token_ids == want[0]
    while take(a) | take(b):
        pass
    by_end = {
        request_id.split("-")[1:][-1] + request_id.split("-")[1]: t for request_id, t in got.items()
    }
    assert sorted(map(tuple, by_end.values())) == sorted(map(tuple, want))


def test_closing_a_stream_frees_its_pages(llm):
    stream = llm.stream(list(range(60)), greedy(max_tokens=200))
    other = llm.stream("goes on", greedy(max_tokens=20))
    for _ in range(3):
        next(stream)
    next(other)
    stream.close()
    assert llm.engine.scheduler.num_running == 1
    rest = [t for d in other for t in d.outputs[0].token_ids]
    assert len(rest) >= 18
    assert not llm.engine.has_work


def test_output_kinds(llm):
    want = one(llm, "kinds", greedy(max_tokens=6)).token_ids
    seen: dict[str, list[list[int]]] = {}
    for kind in RequestOutputKind:
        llm.add_request(kind.name, "kinds", greedy(max_tokens=6, output_kind=kind))
    while llm.has_unfinished_requests():
        for output in llm.step():
            seen.setdefault(output.request_id, []).append(output.outputs[0].token_ids)
    assert seen["FINAL_ONLY"] == [want]
    assert [t for part in seen["DELTA"] for t in part] == want
    assert len(seen["DELTA"]) == len(seen["CUMULATIVE"]) == 6
    assert seen["CUMULATIVE"] == [want[: i + 1] for i in range(6)]


def test_outputs_of_added_requests_wait_while_others_are_served(llm):
    llm.add_request("mine", "waits", greedy(output_kind=RequestOutputKind.FINAL_ONLY))
    assert one(llm, "another", greedy(max_tokens=20)).finish_reason == "length"
    found = []
    while llm.has_unfinished_requests():
        found += llm.step()
    assert [o.request_id for o in found] == ["mine"]
    assert found[0].outputs[0].token_ids == one(llm, "waits", greedy()).token_ids
    with pytest.raises(InvalidRequestError, match="non-empty string"):
        llm.add_request("", "x", greedy())
    llm.add_request("twice", "x", greedy())
    with pytest.raises(InvalidRequestError, match="'twice' is in use"):
        llm.add_request("twice", "x", greedy())
    while llm.has_unfinished_requests():
        llm.step()


# -- abort
# --------------------------------------------------------------------------------------------


def drain(llm: LLM) -> dict[str, object]:
    last = {}
    while llm.has_unfinished_requests():
        for output in llm.step():
            last[output.request_id] = output
    return last


@pytest.mark.parametrize("steps", range(7))
def test_abort_at_every_stage(llm, steps):
    """A prompt of three chunks: waiting, in each chunk, in flight, decoding, all beside another."""
    llm.add_request("good", "stays", greedy(max_tokens=12))
    llm.add_request("gone", list(range(150)), greedy(max_tokens=30))
    for _ in range(steps):
        llm.step()
    llm.abort("gone")
    llm.abort(["gone", "unknown"])
    last = drain(llm)
    assert last["gone"].finished
    assert last["gone"].outputs[0].finish_reason == "abort"
    assert last["good"].outputs[0].token_ids == one(llm, "stays", greedy(max_tokens=12)).token_ids


def test_abort_in_the_queue_and_after_the_end(llm):
    for i in range(12):  # four more than max_num_seqs
        llm.add_request(str(i), [i + 1] * 10, draws(n=1, seed=i, max_tokens=10))
    llm.step()
    llm.abort(["10", "11"])
    last = drain(llm)
    assert sorted(last, key=int) == [str(i) for i in range(12)]
    reasons = [last[str(i)].outputs[0].finish_reason for i in range(12)]
    assert reasons == ["length"] * 10 + ["abort"] * 2
    assert last["11"].outputs[0].token_ids == []
    llm.abort("3")
    assert not llm.has_unfinished_requests()


@pytest.mark.parametrize("steps", range(5))
def test_abort_of_samples(llm, steps):
    llm.add_request("n", list(range(70)), draws(n=3, seed=1, max_tokens=20))
    for _ in range(steps):
        llm.step()
    llm.abort("n")
    last = drain(llm)
    assert [o.finish_reason for o in last["n"].outputs] == ["abort"] * 3


# -- numbers
# ------------------------------------------------------------------------------------------


def test_request_metrics_are_ordered(llm):
    m = llm.generate("times", greedy())[0].metrics
    assert m is not None
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time
    assert m.num_preemptions == 0


def test_engine_metrics(llm):
    before = llm.get_metrics()
    llm.generate(["one", "two"], greedy(max_tokens=5))
    after = llm.get_metrics()
    assert after["generation_tokens"] - before["generation_tokens"] == 10
    assert after["prompt_tokens"] - before["prompt_tokens"] == 6
    assert after["requests_finished_length"] - before["requests_finished_length"] == 2
    assert {"num_steps", "num_compiles", "num_compile_cache_hits", "num_preemptions", "num_running",
            "num_waiting", "num_evictions", "num_prefix_hits", "num_prefix_queries",
            "time_to_first_token_p50", "inter_token_latency_p99", "host_seconds_per_step",
            "num_compiles_after_warmup"} <= set(after)  # fmt: skip
    assert after["num_running"] == after["num_waiting"] == 0
    assert all(isinstance(v, (int, float)) and v >= 0 for v in after.values())


def test_seeds_of_64_bits_are_distinct(llm):
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**40, 2**63 - 1, -(2**63), -2, -(2**32)]
    params = [draws(seed=s, max_tokens=12) for s in seeds]
    outputs = llm.generate(["seed"] * len(seeds), params)
    tokens = [tuple(o.outputs[0].token_ids) for o in outputs]
    assert len(set(tokens)) == len(seeds)
    again = llm.generate(["seed"] * len(seeds), params[::-1])
    assert [tuple(o.outputs[0].token_ids) for o in again] == tokens[::-1]


def test_without_a_seed_draws_differ_but_repeat_with_the_engine(tiny, llm):
    outputs = llm.generate(["free"] * 3, draws(max_tokens=12))
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 3
    small = {"max_num_seqs": 1, "max_num_batched_tokens": 32}
    runs = []
    for seed in (0, 0, 1):
        with tiny_llm(tiny, seed=seed, **small) as made:
            runs.append(one(made, "free", draws(max_tokens=12)).token_ids)
    assert runs[0] == runs[1] != runs[2]


def test_no_tokenizer(tiny):
    with tiny_llm(tiny, skip_tokenizer_init=True, max_num_seqs=1, max_num_batched_tokens=32) as llm:
        output = one(llm, [1, 2, 3], greedy(logprobs=1))
        assert len(output.token_ids) == 8
        assert output.text == ""
        assert output.logprobs[0][output.token_ids[0]].decoded_token is None
        for prompt in ("text", [{"role": "user", "content": "x"}]):
            with pytest.raises((InvalidRequestError, ConfigError), match="tokenizer"):
                llm.generate(prompt, greedy()) if isinstance(prompt, str) else llm.chat(prompt)
        with pytest.raises(InvalidRequestError, match="bad_words need a tokenizer"):
            llm.generate([1], greedy(bad_words=["x"]))
        assert_no_leak(llm)


def test_logprobs_bounded_by_max_logprobs(tiny):
    with tiny_llm(tiny, max_num_seqs=1, max_num_batched_tokens=32, max_logprobs=2) as llm:
        assert len(one(llm, "x", greedy(logprobs=2)).logprobs) == 8
        for name, count in (("logprobs", 3), ("prompt_logprobs", 21), ("logprobs", -1)):
            with pytest.raises(
                InvalidRequestError, match=rf"{name} must be in 0\.\.2; got {count}"
            ):
                llm.generate("x", greedy(**{name: count}))
        assert_no_leak(llm)


def test_public_names():
    for name in ("LLM", "SamplingParams", "generate", "RequestOutput", "CapacityError"):
        assert hasattr(jaxinfer, name)
    assert jax.default_backend() == "cpu"
