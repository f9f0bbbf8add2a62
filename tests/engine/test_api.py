"""LLM.generate and chat on the tiny model: forms of prompts, what ends a request, what is drawn."""

import jax
import pytest

import jaxinfer
from jaxinfer import (
    ConfigError,
    InvalidRequestError,
    SamplingParams,
)
from tests.helpers import VOCAB_SIZE, assert_no_leak, draws, greedy, one, tiny_llm

EOS = 258
PAGE = 8


# -- prompts and lists -----------------------------------------------------------------


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
    outputs = llm.generate(prompts, params, priority=[0, 0, 0, 0])
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths
    for prompt, choose, output in zip(prompts, params, outputs, strict=True):
        assert output.outputs[0].token_ids == one(llm, prompt, choose).token_ids
        assert output.outputs[0].finish_reason == "length"
    with pytest.raises(InvalidRequestError, match="scheduling_policy"):
        llm.generate("one", priority=3)
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


# -- where it ends ---------------------------------------------------------------------


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


# -- what may be drawn -----------------------------------------------------------------


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


# -- text ------------------------------------------------------------------------------


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


def test_public_names():
    for name in ("LLM", "SamplingParams", "generate", "RequestOutput", "CapacityError"):
        assert hasattr(jaxinfer, name)
    assert jax.default_backend() == "cpu"
