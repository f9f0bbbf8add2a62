"""Bad parameters, prompts and messages: the error names value and remedy, the rest is unharmed."""

import math
import re
from typing import Any

import numpy as np
import pytest

from jaxinfer import LLM, InvalidRequestError, SamplingParams
from tests.helpers import VOCAB_SIZE, greedy, tiny_llm

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def shared(tiny):
    with tiny_llm(tiny, max_model_len=128, num_pages=60) as made:
        yield made


@pytest.fixture(scope="module")
def good_tokens(shared) -> list[int]:
    return shared.generate("a good one", greedy())[0].outputs[0].token_ids


@pytest.fixture
def llm(llm: LLM, good_tokens):
    """As in all modules; after the test a good request succeeds, too."""
    yield llm
    assert llm.generate("a good one", greedy())[0].outputs[0].token_ids == good_tokens


# -- sampling parameters ---------------------------------------------------------------

HUGE = 10**400
BAD_PARAMS: list[tuple[str, Any]] = [
    *[("temperature", v) for v in (NAN, INF, -INF, -1, 1e999, "1", None, True, [1], HUGE)],
    *[("top_p", v) for v in (0, 1.0000001, -1, NAN, "x")],
    *[("min_p", v) for v in (1.5, -0.1, NAN)],
    *[("top_k", v) for v in (-2, 1.5, True, "5")],
    *[("max_tokens", v) for v in (0, -1, 1.5, True, 2**31, 2**63, HUGE)],
    *[("min_tokens", v) for v in (-1, 9, 1.0)],
    *[("n", v) for v in (0, -1, 2, 17, 16385, 10**9, 1.0, True)],  # 2: the request is greedy
    *[("seed", v) for v in (2**63, -(2**63) - 1, 1.5, True, "1")],
    *[("stop", v) for v in ("", [""], ["x"] * 17, "x" * 257, [1], 5, b"x")],
    *[("stop_token_ids", v) for v in ([-1], [VOCAB_SIZE], [1.0], [True], 5, "5")],
    *[("logit_bias", v) for v in ({-1: 0.0}, {VOCAB_SIZE: 0.0}, {"abc": 1.0}, {10**9: 1.0})],
    *[("logit_bias", v) for v in ({1: NAN}, {1: 101}, {1: -101}, {1: "x"}, [1], {True: 1.0})],
    ("logit_bias", {i: 0.0 for i in range(1025)}),
    *[("allowed_token_ids", v) for v in ([], [-1], [VOCAB_SIZE], [2**40], [1.5], "x")],
    *[("bad_words", v) for v in ([""], [1], "word")],
    *[("logprobs", v) for v in (21, -2, True, 1.5)],
    *[("prompt_logprobs", v) for v in (21, -2, True)],
    *[("presence_penalty", v) for v in (2.1, -2.1, NAN, "x")],
    *[("frequency_penalty", v) for v in (3, INF)],
    *[("repetition_penalty", v) for v in (0, -1, 2.1, NAN)],
    *[("ignore_eos", v) for v in (1, None)],
    *[("detokenize", v) for v in (0, "no")],
    *[("output_kind", v) for v in ("DELTA", 1)],
]


@pytest.mark.parametrize(
    ("name", "value"), BAD_PARAMS, ids=lambda v: re.sub(r"\W+", "", repr(v))[:20]
)
def test_bad_sampling_params(llm, name, value):
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate("hello", greedy(**{name: value}))
    assert isinstance(caught.value, ValueError)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", [0, -0.0, 1e-45, 1e-6])
def test_temperatures_that_are_greedy(llm, good_tokens, value):
    output = llm.generate("a good one", greedy(temperature=value))[0]
    assert output.outputs[0].token_ids == good_tokens


def test_unknown_and_later_fields(llm):
    with pytest.raises(InvalidRequestError, match="did you mean 'temperature'"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]
    for name in ("structured_outputs", "logits_processors", "use_beam_search", "guided_decoding"):
        with pytest.raises(InvalidRequestError, match=f"{name}: .*not available yet"):
            SamplingParams(**{name: 1})
    with pytest.raises(InvalidRequestError, match="keyword arguments only"):
        SamplingParams(1)  # type: ignore[call-arg]
    for wrong in ({"temperature": 0}, "greedy", 5):
        with pytest.raises(InvalidRequestError, match="sampling_params must be SamplingParams"):
            llm.generate("x", wrong)  # type: ignore[arg-type]


def test_changing_params_afterwards_is_checked_as_well(llm):
    """SamplingParams is mutable, as vLLM's; a bad value set later must not reach the device."""
    params = greedy()
    params.temperature = NAN
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.generate("x", params)


# -- prompts ---------------------------------------------------------------------------

BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "empty"),
    ([], "empty list"),
    ({"prompt": ""}, "empty"),
    ({"prompt_token_ids": []}, "empty"),
    ({}, "needs 'prompt'"),
    ({"prompt": None}, "needs 'prompt'"),
    ({"prompt": 5}, "must be a string"),
    ({"prompt_token_ids": "abc"}, "list of token ids"),
    ({"prompt_token_ids": np.array([1])}, "list of token ids"),
    ({"promt": "x"}, "did you mean 'prompt'"),
    ({"prompt": "x", "multi_modal_data": {}}, "multi_modal_data.*not supported"),
    ({"prompt": "x", "prompt_embeds": 1}, "prompt_embeds.*not supported"),
    ({"prompt": "x", "cache_salt": 5}, "cache_salt"),
    ([-1], r"\[0\].*0\.\.263.*-1"),
    ([VOCAB_SIZE], r"\[0\].*0\.\.263.*264"),
    ([1, 2**31], r"\[1\]"),
    ([1, 2**40], r"\[1\]"),
    ([1.0], r"\[0\].*1\.0"),
    ([True], r"\[0\].*True"),
    ([1, "1"], r"\[1\].*'1'"),
    ([1, None], r"\[1\].*None"),
    ([1, 2, HUGE], r"\[2\]"),
    ("\ud800", "surrogate|UTF-8"),
    (None, "NoneType"),
    (5, "int"),
    (b"bytes", "bytes"),
    ({1, 2}, "set"),
    ([1] * 128, r"128 tokens.*max_model_len is 128"),
    ([1] * 129, r"129 tokens"),
    ("x" * 127, r"127 tokens.*max_tokens \(8\).*128.*<= 1"),
    ("a" * 2_000_000, "characters.*max_model_len=128"),
    ("👩" * 500_000, "characters.*max_model_len=128"),
    (" " * 2_000_000, "characters.*max_model_len=128"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_bad_prompt(llm, prompt, message):
    with pytest.raises(InvalidRequestError, match=f"(?s){message}") as caught:
        llm.generate(prompt, greedy())
    assert len(str(caught.value)) < 400
    with pytest.raises(InvalidRequestError):
        list(llm.stream(prompt, greedy()))
    if prompt != []:
        with pytest.raises(InvalidRequestError):
            llm.add_request("bad", prompt, greedy())
    assert not llm.has_unfinished_requests()


@pytest.mark.parametrize(
    "bad", ["", [], [VOCAB_SIZE], [[]], None, 5, {"x": 1}, [1] * 200, "\ud800"], ids=repr
)
def test_a_bad_prompt_fails_alone(llm, good_tokens, bad):
    outputs = llm.generate(["a good one", bad, "a good one"], greedy())
    assert [o.error is None for o in outputs] == [True, False, True]
    assert isinstance(outputs[1].error, InvalidRequestError)
    assert outputs[1].finished
    assert outputs[1].outputs[0].finish_reason == "error"
    for i in (0, 2):
        assert outputs[i].outputs[0].token_ids == good_tokens


def test_bad_params_of_one_prompt_fail_alone(llm, good_tokens):
    params = [greedy(), greedy(stop_token_ids=[10**6]), "none", greedy()]
    outputs = llm.generate(["a good one"] * 4, params)  # type: ignore[arg-type]
    assert [o.error is None for o in outputs] == [True, False, False, True]
    assert outputs[3].outputs[0].token_ids == good_tokens


def test_a_list_of_one_bad_prompt_does_not_raise(llm):
    outputs = llm.generate([""], greedy())
    assert isinstance(outputs[0].error, InvalidRequestError)


def test_prompts_at_the_edge_of_the_context(llm):
    assert len(llm.generate([1] * 127, greedy(max_tokens=1))[0].outputs[0].token_ids) == 1
    exact = llm.generate([1] * 120, greedy())[0].outputs[0]
    assert (len(exact.token_ids), exact.finish_reason) == (8, "length")
    repeated = llm.generate([7] * 100, greedy(max_tokens=28))[0].outputs[0]
    assert repeated.finish_reason == "length"


BAD_MESSAGES: list[Any] = [
    [],
    None,
    "text",
    {"role": "user", "content": "x"},
    [{}],
    [{"content": "x"}],
    [{"role": 5, "content": "x"}],
    [{"role": "root", "content": "x"}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    ["hello"],
    [5],
]


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=repr)
def test_malformed_messages(llm, messages):
    with pytest.raises(InvalidRequestError) as caught:
        llm.chat(messages, greedy())
    assert re.search("messages|content|role", str(caught.value))


def test_one_malformed_conversation_fails_alone(llm):
    good = [{"role": "user", "content": "hi"}]
    outputs = llm.chat([good, [{"role": "root", "content": "x"}], [], good], greedy())
    assert [o.error is None for o in outputs] == [True, False, False, True]


def test_chat_without_a_template(llm, monkeypatch):
    with pytest.raises(InvalidRequestError, match="template"):
        llm.chat([{"role": "user", "content": "x"}], chat_template="{% broken")
