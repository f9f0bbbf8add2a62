"""Speculation changes no output: tokens, text, ends and log-probs are those of plain decoding.

Tokens are compared exactly. Batches of other shapes round float32 sums differently, by about 1e-6;
no two best tokens of these fixed texts are so close.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from jaxinfer import LLM, RequestOutput, SamplingParams
from tests.helpers import assert_no_leak, draws, greedy, tiny_llm
from tests.speculative import forced
from tests.speculative.forced import CONFIG, LENGTH, Texts, checked, force

LETTERS = list(range(32, 90))
TOKENS = 20


@dataclass
class Case:
    name: str
    prompt: list[int]
    params: SamplingParams
    plain: RequestOutput | None = None


def ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def written(llm: LLM, prompt: list[int], **fields) -> list[int]:
    ask = greedy(max_tokens=TOKENS, allowed_token_ids=LETTERS, **fields)
    return llm.generate(prompt, ask)[0].outputs[0].token_ids


def make_cases(llm: LLM) -> list[Case]:
    """Every sampling parameter, greedy and random; stops and bans that the texts run into."""
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.6}
    filters = {"top_k": 30, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3}
    fields: dict[str, dict] = {
        "greedy": {},
        "random": {"temperature": 1.0, "seed": 1},
        "cold": {"temperature": 0.3, "seed": 2},
        "filters": {**filters, "seed": 3},
        "penalties": penalties,
        "random penalties": {**penalties, "temperature": 0.8, "seed": 4},
        "bias": {"logit_bias": {5: 4.0, 6: 4.0, 200: -100.0}},
        "random bias": {"logit_bias": {5: 4.0, 200: -100.0}, "temperature": 1.0, "seed": 5},
        "logprobs": {"logprobs": 3},
        "random logprobs": {"logprobs": 2, "temperature": 1.0, "seed": 6, "prompt_logprobs": 1},
        "few tokens": {"max_tokens": 3},
        "two tokens": {"max_tokens": 2, "temperature": 1.0, "seed": 7},
        "one token": {"max_tokens": 1},
        "samples": {"n": 3, "temperature": 1.0, "seed": 8},
        "everything": {**filters, **penalties, "logit_bias": {9: 2.0}, "seed": 9, "logprobs": 1},
    }
    cases = [
        Case(name, ids(200 + i, 5 + 7 * i), greedy(**{"max_tokens": TOKENS, **f}))
        for i, (name, f) in enumerate(fields.items())
    ]
    # A prompt of one token is a decode row from the start, and drafts at once.
    cases.append(Case("short prompt", [77], greedy(max_tokens=TOKENS)))
    cases.append(Case("random short prompt", [78], draws(max_tokens=TOKENS, seed=11)))
    decode = llm.get_tokenizer().decode
    for i, name in enumerate(STOPPING):
        prompt = ids(300 + i, 9)
        text = written(llm, prompt)
        f = STOPPING[name](text, decode)
        cases.append(Case(name, prompt, greedy(max_tokens=TOKENS, allowed_token_ids=LETTERS, **f)))
    return cases


def at_first_use(text: list[int]) -> int:
    """A late token that is not among those before it: that one is banned so long changes none."""
    return next(at for at in range(13, 5, -1) if text[at] not in text[:at])


STOPPING: dict[str, Callable[[list[int], Callable[[list[int]], str]], dict]] = {
    "stop id": lambda text, decode: {"stop_token_ids": [text[9]]},
    "stop id after min_tokens": lambda text, _: {
        "stop_token_ids": [text[at_first_use(text)]],
        "min_tokens": at_first_use(text),
    },
    "stop id before min_tokens": lambda text, _: {
        "stop_token_ids": [text[at_first_use(text)]],
        "min_tokens": at_first_use(text) + 1,
    },
    "stop string": lambda text, decode: {"stop": [decode(text[6:8])]},
    "stop string kept": lambda text, decode: {
        "stop": [decode(text[3:6])],
        "include_stop_str_in_output": True,
    },
    "bad word": lambda text, decode: {"bad_words": [decode(text[6:8])]},
    "bad words": lambda text, decode: {
        "bad_words": [decode(text[6:8]), decode(text[3:6]), decode(text[1:2])],
        "temperature": 1.0,
        "seed": 10,
    },
}
"""By the text that would come without: what stops it or is banned from it."""


@pytest.fixture(scope="module")
def plain(tiny):
    with tiny_llm(tiny, max_num_seqs=32) as made:
        yield made


@pytest.fixture(scope="module")
def cases(plain) -> list[Case]:
    made = make_cases(plain)
    outputs = plain.generate([c.prompt for c in made], [c.params for c in made])
    for case, output in zip(made, outputs, strict=True):
        assert output.error is None and output.metrics.speculation is None
        case.plain = output
    return made


@pytest.fixture(scope="module")
def texts(cases) -> Texts:
    return {(tuple(c.prompt), o.index): o.token_ids for c in cases for o in c.plain.outputs}


def test_the_cases_run_into_their_stops_and_bans(plain, cases):
    ends = {c.name: c.plain.outputs[0] for c in cases}
    assert ends["stop id"].finish_reason == ends["stop string"].finish_reason == "stop"
    assert 2 <= len(ends["stop id"].token_ids) <= 10
    after, before = ends["stop id after min_tokens"], ends["stop id before min_tokens"]
    assert after.finish_reason == "stop" and 7 <= len(after.token_ids) <= 14
    by_name = {c.name: c for c in cases}
    text = written(plain, by_name["stop id before min_tokens"].prompt)
    at = at_first_use(text)
    assert before.token_ids[:at] == text[:at] and before.token_ids[at] != text[at]
    assert 2 <= len(ends["stop string"].token_ids) <= 8
    for case in cases:
        if case.name == "bad word":
            unbanned = written(plain, case.prompt)
            word = plain.get_tokenizer().encode(case.params.bad_words[0], add_special_tokens=False)
            assert len(word) == 2 and unbanned[6:8] == word
            banned = ends["bad word"].token_ids
            assert banned[:7] == unbanned[:7] and banned[7] != word[1]


def spec_llm(folder, **options) -> LLM:
    return checked(
        tiny_llm(folder, **{"max_num_seqs": 32, "speculative_config": CONFIG, **options})
    )


@pytest.fixture(scope="module")
def shared(tiny):
    with spec_llm(tiny) as made:
        yield made


@pytest.fixture
def llm(shared):
    shared.reset_prefix_cache()
    yield shared
    assert_no_leak(shared)


def check(case: Case, got: RequestOutput) -> None:
    want = case.plain
    assert want is not None and got.error is None and got.finished
    assert len(got.outputs) == len(want.outputs)
    for a, b in zip(got.outputs, want.outputs, strict=True):
        assert a.token_ids == b.token_ids, case.name
        assert (a.text, a.finish_reason, a.stop_reason) == (b.text, b.finish_reason, b.stop_reason)
        assert (a.logprobs is None) == (b.logprobs is None)
        # Log-softmax in float32 of logits whose sums were rounded in another order.
        if a.logprobs is not None and b.logprobs is not None:
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)
            for x, y in zip(a.logprobs, b.logprobs, strict=True):
                assert x.keys() == y.keys()
                for token, entry in x.items():
                    assert entry.logprob == pytest.approx(y[token].logprob, abs=1e-4)
                    assert entry.rank == y[token].rank
    assert (got.prompt_logprobs is None) == (want.prompt_logprobs is None)


def run(llm: LLM, cases: list[Case], batch: int) -> list[RequestOutput]:
    """All cases in batches of so many."""
    outputs = []
    for i in range(0, len(cases), batch):
        some = cases[i : i + batch]
        found = llm.generate([c.prompt for c in some], [c.params for c in some])
        for case, output in zip(some, found, strict=True):
            check(case, output)
        outputs += found
    return outputs


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 32])
@pytest.mark.parametrize("kind", ["oracle", "flaky"])
def test_batches_of_mixed_rows(llm, cases, texts, kind, batch):
    drafter = forced.oracle(texts) if kind == "oracle" else forced.flaky(texts, batch)
    speculator = force(llm, drafter)
    run(llm, cases, batch)
    stats = speculator.stats
    assert stats.num_accepted_tokens > 40
    assert speculator.max_lanes <= 32
    if kind == "oracle":
        assert stats.acceptance_rate == 1.0
    else:
        assert 0.3 < stats.acceptance_rate < 0.95


@pytest.mark.parametrize("name", forced.hostile({}))
def test_hostile_proposers(llm, cases, texts, name):
    speculator = force(llm, forced.hostile(texts)[name])
    run(llm, cases, 5)
    stats = speculator.stats
    nothing = name in ("out of vocabulary", "negative", "empty")
    assert (stats.num_draft_tokens == 0) == nothing
    if name in ("wrong", "padding of the vocabulary"):
        assert stats.num_accepted_tokens == 0 < stats.num_drafts
    if name in ("longer than asked", "numpy"):
        assert stats.num_accepted_tokens > 40
        assert len(stats.num_accepted_tokens_per_pos) == LENGTH
    if name == "out of vocabulary after a right one":
        assert stats.acceptance_rate == 1.0 and len(stats.num_accepted_tokens_per_pos) == 1


def test_a_full_draft_saves_steps(llm, cases, texts):
    """Four right tokens a step: 20 tokens take a prefill and four verifications."""
    force(llm, forced.oracle(texts))
    case = cases[0]
    before = llm.get_metrics()["num_steps"]
    (output,) = run(llm, [case], 1)
    steps = llm.get_metrics()["num_steps"] - before
    # One of three steps is not waited for.
    assert steps <= 8 < TOKENS
    assert output.metrics.speculation.mean_accepted_length > 4


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"async_scheduling": False, "page_size": 16, "enable_prefix_caching": False}, 5),
        pytest.param({"async_scheduling": False, "page_size": 8}, 3, marks=pytest.mark.slow),
        pytest.param(
            {"page_size": 16, "num_pages": 12, "max_model_len": 160}, 32, marks=pytest.mark.slow
        ),
        ({"page_size": 8, "num_pages": 24, "max_model_len": 160}, 32),
    ],
    ids=["no overlap, no cache", "no overlap", "few pages of 16", "few pages of 8"],
)
def test_engines(tiny, cases, texts, options, batch):
    """Pages, chunks, overlap, cache and preemption."""
    with spec_llm(tiny, max_num_seqs=8, max_num_batched_tokens=32, **options) as llm:
        for seed in range(2):
            speculator = force(llm, forced.flaky(texts, seed))
            run(llm, cases, batch)
            assert speculator.stats.num_accepted_tokens > 20
            assert_no_leak(llm)
        few = options.get("num_pages", 200) < 100
        assert (llm.get_metrics()["num_preemptions"] > 0) == few


@pytest.mark.parametrize("length", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_one_row_with_more_lanes_than_sequences(tiny, cases, texts, length):
    config = {**CONFIG, "num_speculative_tokens": length}
    options = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "speculative_config": config}
    with spec_llm(tiny, **options) as llm:
        speculator = force(llm, forced.oracle(texts))
        run(llm, cases, 4)
        assert speculator.stats.acceptance_rate == 1.0
        assert len(speculator.stats.num_accepted_tokens_per_pos) == length
        assert speculator.max_lanes == length + 1
        assert_no_leak(llm)


def test_prefix_hits(llm, cases, texts):
    """What steps with drafts put into the cache is what the prompt of a next turn finds."""
    force(llm, forced.flaky(texts))
    run(llm, cases, 8)
    again = run(llm, cases, 8)
    assert sum(output.num_cached_tokens for output in again) > 200
    nodes = {node.tokens for node in llm.engine.scheduler.cache.nodes()}
    known = set()
    for case in cases:
        for output in case.plain.outputs:
            text = [*case.prompt, *output.token_ids]
            known |= {tuple(text[i : i + 8]) for i in range(0, len(text) - 7, 8)}
    assert nodes <= known | tails_of_stop_strings(cases, nodes)
    turn = [*cases[0].prompt, *cases[0].plain.outputs[0].token_ids, 1, 2, 3]
    (output,) = llm.generate(turn, greedy())
    assert output.num_cached_tokens == (len(turn) - 4) // 8 * 8


def tails_of_stop_strings(cases: list[Case], nodes: set) -> set:
    """Pages that hold true text behind a stop string: accepted before the string was seen."""
    stopped = [c for c in cases if c.params.stop]
    tails = set()
    for case in stopped:
        text = [*case.prompt, *case.plain.outputs[0].token_ids]
        last = tuple(text[len(text) // 8 * 8 :])
        tails |= {node for node in nodes if node[: len(last)] == last}
    return tails


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("at", [2, 3, 5])
def test_abort_in_mid_flight(shared, cases, texts, overlap, at):
    llm = shared
    llm.reset_prefix_cache()
    force(llm, forced.oracle(texts))
    depth, llm.engine._depth = llm.engine._depth, 2 if overlap else 1
    some = [c for c in cases if c.params.max_tokens == TOKENS][:6]
    for i, case in enumerate(some):
        llm.add_request(str(i), case.prompt, case.params)
    done = {}
    for step in range(200):
        if step == at:
            llm.abort("1")
        done |= {o.request_id: o for o in llm.step() if o.finished}
        if not llm.has_unfinished_requests():
            break
    llm.engine._depth = depth
    for i, case in enumerate(some):
        if i != 1:
            check(case, done[str(i)])
    aborted = done["1"].outputs[0]
    assert aborted.finish_reason == "abort"
    want = some[1].plain.outputs[0].token_ids
    assert aborted.token_ids == want[: len(aborted.token_ids)]
    assert_no_leak(llm)


def test_streams_give_every_token_once(llm, cases, texts):
    force(llm, forced.oracle(texts))
    for case in cases:
        tokens: dict[int, list[int]] = {}
        parts: dict[int, str] = {}
        for output in llm.stream(case.prompt, case.params):
            for sample in output.outputs:
                tokens[sample.index] = tokens.get(sample.index, []) + sample.token_ids
                parts[sample.index] = parts.get(sample.index, "") + sample.text
        for sample in case.plain.outputs:
            assert tokens[sample.index] == sample.token_ids
            assert parts[sample.index] == sample.text
