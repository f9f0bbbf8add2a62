"""Bad `speculative_config`s: the error says what to change. Also through LLM and the command."""

import pytest

from jaxinfer import ConfigError
from jaxinfer.speculative.config import MAX_SPECULATIVE_TOKENS, SpeculativeConfig
from tests.helpers import tiny_llm

GOOD = {"method": "ngram", "num_speculative_tokens": 4}
DRAFT = {"model": "folder", "num_speculative_tokens": 4}

BAD = [
    ("ngram", r"must be a dictionary such as .*'ngram'"),
    (["ngram"], "must be a dictionary"),
    (4, "must be a dictionary"),
    ({}, "method must be one of .*'ngram'.*None"),
    ({"num_speculative_tokens": 4}, "method must be one of"),
    ({**GOOD, "method": "eagle"}, "method must be one of .*'eagle'"),
    ({**GOOD, "method": None}, "method must be one of"),
    ({**GOOD, "method": ["ngram"]}, "method must be one of"),
    ({**GOOD, "method": 3}, "method must be one of"),
    ({"method": "ngram"}, "needs num_speculative_tokens"),
    ({**GOOD, "num_speculative_token": 4}, "did you mean 'num_speculative_tokens'"),
    ({**GOOD, "zzz": 4}, "no key 'zzz'; known: method"),
    ({**GOOD, 5: 4}, "no key 5"),
    ({**GOOD, "model": "folder"}, "'ngram' has no key 'model'"),
    ({**DRAFT, "prompt_lookup_max": 4}, "'draft_model' has no key 'prompt_lookup_max'"),
    *[
        (
            {**GOOD, "num_speculative_tokens": value},
            f"num_speculative_tokens must be .*>= 1.*{text}",
        )
        for value, text in (
            (0, "got 0"),
            (-1, "got -1"),
            (MAX_SPECULATIVE_TOKENS + 1, f"<= {MAX_SPECULATIVE_TOKENS}; got 33"),
            (10**30, "got 1000"),
            (True, "got True"),
            (4.0, "got 4.0"),
            ("4", "got '4'"),
            (None, "got None"),
        )
    ],
    *[
        ({**GOOD, name: value}, f"{name} must be an integer >= 1")
        for name in ("prompt_lookup_min", "prompt_lookup_max")
        for value in (0, 65, None, "3", 2.0, False)
    ],
    ({**GOOD, "prompt_lookup_min": 5, "prompt_lookup_max": 4}, r"\(5\) must not exceed .*\(4\)"),
    *[({**GOOD, "disable_by_batch_size": v}, "disable_by_batch_size") for v in (0, -1, "8", True)],
    *[({**DRAFT, "max_model_len": v}, "max_model_len must be") for v in (0, -5, "100", 1.5)],
    ({"method": "draft_model", "num_speculative_tokens": 4}, "needs model: a folder"),
    ({**DRAFT, "model": None}, "needs model"),
    ({**DRAFT, "model": ""}, "needs model"),
    ({**DRAFT, "model": 5}, "needs model.*got 5"),
    ({**DRAFT, "model": "self"}, "'self' and quantization go together.*int8.*int4"),
    ({**DRAFT, "quantization": "int4"}, "'self' and quantization go together"),
    ({**DRAFT, "model": "self", "quantization": "fp8"}, "must be one of int8,.*got 'fp8'"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=range(len(BAD)))
def test_bad_config(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        SpeculativeConfig.from_dict(given)
    assert isinstance(caught.value, ValueError)
    assert "speculative_config" in str(caught.value)
    assert caught.value.field == "speculative_config"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [1, 4, MAX_SPECULATIVE_TOKENS])
def test_good_config(value):
    config = SpeculativeConfig.from_dict({**GOOD, "num_speculative_tokens": value})
    assert config.num_speculative_tokens == value
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == (3, 8)
    assert config.disable_by_batch_size is None and config.model is None


def test_one_bound_of_the_look_up_moves_the_other():
    least = SpeculativeConfig.from_dict({**GOOD, "prompt_lookup_min": 20})
    assert (least.prompt_lookup_min, least.prompt_lookup_max) == (20, 20)
    most = SpeculativeConfig.from_dict({**GOOD, "prompt_lookup_max": 2})
    assert (most.prompt_lookup_min, most.prompt_lookup_max) == (2, 2)


def test_a_model_says_the_method():
    config = SpeculativeConfig.from_dict({**DRAFT, "max_model_len": None})
    assert (config.method, config.model) == ("draft_model", "folder")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"method": "eagle"}, {}, "method must be one of"),
        ({**GOOD, "num_speculative_tokens": 0}, {}, "num_speculative_tokens"),
        (
            {**GOOD, "num_speculative_tokens": 8},
            {"max_num_seqs": 4, "max_num_batched_tokens": 8},
            r"num_speculative_tokens=8 must be less than max_num_batched_tokens \(8\)",
        ),
        ("ngram", {}, "speculative_config"),
    ],
)
def test_llm_refuses_it_before_anything_is_loaded(tiny, given, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_llm(tiny, speculative_config=given, **options)
