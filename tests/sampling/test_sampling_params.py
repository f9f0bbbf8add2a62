"""SamplingParams: every field's range and type, what each message says, and vLLM's defaults."""

import copy
import dataclasses
import math
import pickle

import pytest

from jaxinfer.errors import InvalidRequestError, JaxInferError
from jaxinfer.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    RequestOutputKind,
    SamplingParams,
)

NAN, INF = math.nan, math.inf

VLLM_DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
}

NOT_NUMBERS = ["1", b"1", None, [1.0], {}, 1j, True, False, object]
NOT_INTS = ["1", [1], {}, 1.0, 1.5, True, False, NAN, INF]
NOT_BOOLS = [0, 1, "true", None, 1.0]

REFUSED: dict[str, list[object]] = {
    "n": [0, -1, MAX_N + 1, 10**9, 10**400, 10**5000, None, *NOT_INTS],
    "presence_penalty": [-2.001, 2.001, NAN, INF, -INF, 10**400, *NOT_NUMBERS],
    "frequency_penalty": [-2.001, 2.001, NAN, INF, -INF, 10**400, *NOT_NUMBERS],
    "repetition_penalty": [0, 0.0, -0.0, -1, 2.001, NAN, INF, 10**400, *NOT_NUMBERS],
    "temperature": [-1e-9, -1, NAN, INF, -INF, 1e999, 3.5e38, 10**400, 10**5000, *NOT_NUMBERS],
    "top_p": [0, 0.0, -0.0, 1.0000001, -1, 2, NAN, INF, *NOT_NUMBERS],
    "top_k": [-2, -(10**400), None, *NOT_INTS],
    "min_p": [-0.001, 1.5, 1.0000001, NAN, INF, *NOT_NUMBERS],
    "seed": [2**63, -(2**63) - 1, 10**400, *NOT_INTS],
    "stop": [
        "",
        [""],
        ["a", ""],
        ["a"] * 17,
        "a" * 257,
        ["a" * 257],
        [1],
        ["a", None],
        5,
        {"a": 1},
        b"a",
        True,
    ],
    "stop_token_ids": [[-1], [1.0], [True], ["1"], [None], [1, -1], 5, "12", {1: 1}, {1}],
    "max_tokens": [0, -1, -(10**400), *NOT_INTS],
    "min_tokens": [-1, 17, 10**400, 10**5000, None, *NOT_INTS],
    "logprobs": [-2, *NOT_INTS],
    "prompt_logprobs": [-2, *NOT_INTS],
    "ignore_eos": NOT_BOOLS,
    "detokenize": NOT_BOOLS,
    "skip_special_tokens": NOT_BOOLS,
    "spaces_between_special_tokens": NOT_BOOLS,
    "include_stop_str_in_output": NOT_BOOLS,
    "output_kind": [0, "CUMULATIVE", None, RequestOutputKind],
    "logit_bias": [
        {-1: 1.0},
        {"abc": 1.0},
        {"5": 1.0},
        {1.0: 1.0},
        {True: 1.0},
        {1e9: 1.0},
        {5: NAN},
        {5: INF},
        {5: 101},
        {5: -100.5},
        {5: "x"},
        {5: None},
        {5: True},
        dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0),
        [1, 2],
        "x",
        0,
    ],
    "allowed_token_ids": [[], (), [-1], [1.5], [True], ["1"], 5, "5", {1: 2}],
    "bad_words": [[""], [1], ["a", None], "word", 5, {"a": 1}],
}

ACCEPTED: dict[str, list[object]] = {
    "n": [1, 2, MAX_N],
    "presence_penalty": [-2, 2, -2.0, 2.0, 0, -0.0],
    "frequency_penalty": [-2, 2, 0.5],
    "repetition_penalty": [5e-324, 1e-6, 1, 2, 2.0],
    "temperature": [0, 0.0, 1, 2.0, 100, 1e38, MAX_TEMPERATURE],
    "top_p": [5e-324, 1e-9, 0.5, 1, 1.0],
    "top_k": [0, 1, 2**31, 2**63, 10**400],
    "min_p": [0, 0.0, 5e-324, 1, 1.0],
    "seed": [None, 0, 1, 2**63 - 1, -(2**63), -2, 2**32],
    "stop_token_ids": [[], [0], [1, 2, 2**40]],
    "max_tokens": [None, 1, 2**31, 2**63, 10**400],
    "min_tokens": [0, 16],
    "logprobs": [None, 0, -1, 5, 10**6],
    "prompt_logprobs": [None, 0, -1, 5],
    "ignore_eos": [True, False],
    "output_kind": list(RequestOutputKind),
    "logit_bias": [None, {}, {0: 100, 7: -100.0}, dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)],
    "allowed_token_ids": [None, [0], [3, 1, 3]],
    "bad_words": [None, [], ["a", " b c"]],
}


def cases(table: dict[str, list[object]]) -> list:
    """One test case per value, with short names."""
    return [
        pytest.param(name, value, id=f"{name}-{i}")
        for name, values in table.items()
        for i, value in enumerate(values)
    ]


def test_every_field_is_in_the_tables():
    fields = {f.name for f in dataclasses.fields(SamplingParams)}
    assert set(REFUSED) == fields
    assert set(VLLM_DEFAULTS) == fields


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert {name: getattr(params, name) for name in VLLM_DEFAULTS} == VLLM_DEFAULTS
    assert type(params.top_k) is int
    assert not params.is_greedy


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_refused(name, value):
    """The message names the field and shows the value (its start where it is long)."""
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    error, message = caught.value, str(caught.value)
    assert isinstance(error, ValueError)
    assert isinstance(error, JaxInferError)
    assert error.param is not None
    assert error.param.startswith(name)
    assert name in message
    assert len(message) < 400
    if type(value) is int and abs(value) >= 10**4300:  # Python would not print it
        assert message.endswith("got an integer of 16610 bits")
    else:
        assert f"got {repr(error.value)[:97]}" in message


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
def test_accepted(name, value):
    kept = getattr(SamplingParams(**{name: value}), name)
    assert kept == value
    if isinstance(VLLM_DEFAULTS[name], float):
        assert type(kept) is float


@pytest.mark.parametrize("value", [0, 0.0, -0.0, 5e-324, 1e-45, 1e-6, 9.9e-6])
def test_greedy_temperatures(value):
    assert SamplingParams(temperature=value).is_greedy


@pytest.mark.parametrize("value", [1e-5, 0.005, 0.00999, 0.01])
def test_small_temperatures_are_raised(value):
    params = SamplingParams(temperature=value)
    assert params.temperature == MIN_TEMPERATURE == 0.01
    assert not params.is_greedy
    assert SamplingParams(temperature=0.011).temperature == 0.011


@pytest.mark.parametrize("temperature", [0, -0.0, 1e-6])
def test_several_greedy_samples_are_refused(temperature):
    with pytest.raises(InvalidRequestError, match=r"n must be 1 with temperature 0.*n=2") as caught:
        SamplingParams(n=2, temperature=temperature)
    assert (caught.value.param, caught.value.value) == ("n", 2)
    assert SamplingParams(n=2, temperature=1e-5).n == 2


def test_values_that_mean_off_or_unset():
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(stop=None, stop_token_ids=None).stop == []
    assert SamplingParams(stop="a").stop == ["a"]
    assert SamplingParams(stop=("a", "b")).stop == ["a", "b"]
    assert SamplingParams(stop=["a" * 256] * 16).stop == ["a" * 256] * 16
    assert SamplingParams(allowed_token_ids=(1, 2)).allowed_token_ids == [1, 2]


def test_fields_that_contradict_each_other():
    with pytest.raises(InvalidRequestError, match=r"min_tokens must be <= max_tokens \(4\); got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=5, max_tokens=None).min_tokens == 5
    with pytest.raises(InvalidRequestError, match="stop strings need detokenize=True"):
        SamplingParams(stop="a", detokenize=False)
    assert SamplingParams(stop_token_ids=[1], detokenize=False).stop == []


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("temprature", "temperature"),
        ("topp", "top_p"),
        ("max_token", "max_tokens"),
        ("Seed", "seed"),
    ],
)
def test_unknown_fields_get_a_suggestion(given, near):
    with pytest.raises(InvalidRequestError, match=f"{given}.*did you mean '{near}'") as caught:
        SamplingParams(**{given: 1})
    assert caught.value.param == given


def test_unknown_fields_without_a_near_name_list_the_known():
    with pytest.raises(
        InvalidRequestError, match=r"'qqqq'; known: n, presence_penalty, .*bad_words"
    ):
        SamplingParams(qqqq=1)


@pytest.mark.parametrize(
    "name",
    ["best_of", "structured_outputs", "guided_decoding", "logits_processors", "use_beam_search"],
)
def test_vllm_fields_that_are_missing_say_so(name):
    with pytest.raises(InvalidRequestError, match=f"^SamplingParams: {name}: ") as caught:
        SamplingParams(**{name: None})
    assert "did you mean" not in str(caught.value)
    assert caught.value.param == name


def test_positional_arguments_are_refused():
    """The order of fields is no interface: a number there could mean anything."""
    with pytest.raises(InvalidRequestError, match=r"keyword arguments only; got 0\.7 by position"):
        SamplingParams(0.7)


def test_no_attribute_can_be_made_up():
    with pytest.raises(AttributeError):
        SamplingParams().temprature = 0.5


def test_copies_are_equal_and_independent():
    params = SamplingParams(
        temperature=0.5,
        stop=["a"],
        stop_token_ids=[3],
        logit_bias={1: 2.0},
        bad_words=["x"],
        seed=7,
    )
    for made in (params.clone(), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert made == params
        assert made is not params
        made.temperature = 0.9
        for mutable in (made.stop, made.stop_token_ids, made.bad_words):
            mutable.append("more")
        made.logit_bias[9] = 1.0
        assert made != params
    assert (params.temperature, params.stop, params.stop_token_ids) == (0.5, ["a"], [3])
    assert (params.logit_bias, params.bad_words) == ({1: 2.0}, ["x"])


def test_arguments_are_copied():
    """What the caller does to its own lists afterwards changes nothing."""
    stop, ids, bias, words = ["a"], [1], {1: 1.0}, ["w"]
    params = SamplingParams(
        stop=stop, stop_token_ids=ids, allowed_token_ids=ids, logit_bias=bias, bad_words=words
    )
    stop.append("")
    ids.append(-1)
    words.append("")
    bias[1] = NAN
    assert params.stop == ["a"]
    assert params.stop_token_ids == params.allowed_token_ids == [1]
    assert params.logit_bias == {1: 1.0}
    assert params.bad_words == ["w"]
    assert SamplingParams().stop is not SamplingParams().stop
