"""Speculation in service: NaN, errors behind a stop string, compiles, counts, real look-ups."""

import jax
import numpy as np
import pytest

from jaxinfer import LLM, EngineDeadError, InvalidRequestError, NumericalError
from jaxinfer.runner import COMPILES
from tests.helpers import assert_no_leak, draws, greedy, tiny_llm
from tests.speculative import forced
from tests.speculative.forced import CONFIG, LENGTH, Proposer, Texts, checked, force

SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 32}
POISON = 7


def ids(seed: int, length: int) -> list[int]:
    """Without the token that may be poisoned."""
    return np.random.default_rng(seed).integers(POISON + 1, 256, length).tolist()


@pytest.fixture(scope="module")
def plain(tiny):
    with tiny_llm(tiny, **SMALL) as made:
        yield made


@pytest.fixture(scope="module")
def shared(tiny):
    with checked(tiny_llm(tiny, speculative_config=CONFIG, **SMALL)) as made:
        yield made


@pytest.fixture
def llm(shared):
    shared.reset_prefix_cache()
    yield shared
    assert_no_leak(shared)


@pytest.fixture
def poisoned(llm, plain):
    """Token 7's embedding is NaN in both engines; the weights are put back after the test."""
    good = [(made, made.engine.runner.params) for made in (llm, plain)]
    for made, params in good:
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        bad = [
            leaf.at[POISON].set(np.nan) if "embed" in jax.tree_util.keystr(path) else leaf
            for path, leaf in leaves
        ]
        made.engine.runner.params = jax.tree_util.tree_unflatten(tree, bad)
    yield llm
    for made, params in good:
        made.engine.runner.params = params
        made.reset_prefix_cache()


def told(llm: LLM, prompts: list[list[int]], params) -> Texts:
    outputs = llm.generate(prompts, params)
    return {(tuple(p), 0): o.outputs[0].token_ids for p, o in zip(prompts, outputs, strict=True)}


# -- numbers that are not finite -------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_rejected_draft_of_nan_harms_nobody(poisoned, plain, seed):
    """Its K/V stay in the pages, behind what counts and in pages given back, until overwritten."""
    prompts = [ids(10 * seed + i, 5 + 6 * i) for i in range(4)]
    params = [greedy(max_tokens=20), draws(max_tokens=20, seed=1)] * 2
    for one in params:
        one.logit_bias = {POISON: -100.0}
    texts = told(plain, prompts, params)
    rng = np.random.default_rng(seed)

    def draft(row) -> list[int]:
        right = forced.truth(texts, row, int(rng.integers(0, LENGTH)))
        return [*right, POISON, *right, POISON][: row.max_draft]

    speculator = force(poisoned, Proposer(draft))
    outputs = poisoned.generate(prompts, params)
    assert [o.error for o in outputs] == [None] * 4
    assert [o.outputs[0].token_ids for o in outputs] == list(texts.values())
    assert 0 < speculator.stats.num_accepted_tokens < speculator.stats.num_draft_tokens
    cache = poisoned.engine.scheduler.cache
    assert all(POISON not in node.tokens for node in cache.nodes())
    again = poisoned.generate(prompts, params)  # from the cache
    assert [o.outputs[0].token_ids for o in again] == list(texts.values())


@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_nan_in_a_token_that_was_generated(poisoned, plain, kind):
    """As without drafts: the tokens up to it, then the error, of that request alone."""
    prompts = [ids(50, 9), ids(51, 11)]
    params = [greedy(max_tokens=12, logit_bias={POISON: 100.0}), greedy(max_tokens=12)]
    good = told(plain, prompts[1:], params[1:])
    with pytest.raises(NumericalError):
        plain.generate(prompts[0], params[0])
    bad = POISON if kind == "right" else POISON + 1
    force(poisoned, Proposer(lambda row: [bad] * row.max_draft))
    outputs = poisoned.generate(prompts, params)
    assert isinstance(outputs[0].error, NumericalError) and outputs[1].error is None
    assert outputs[0].outputs[0].token_ids == [POISON]
    assert outputs[0].outputs[0].finish_reason == "error"
    assert outputs[1].outputs[0].token_ids == good[tuple(prompts[1]), 0]


def find(plain: LLM, params, begins: list[int]) -> list[int]:
    """A prompt whose text begins so."""
    prompts = [ids(1000 + i, 6) for i in range(64)]
    for prompt, text in told(plain, prompts, params).items():
        if text[: len(begins)] == begins:
            return list(prompt[0])
    raise AssertionError(f"no text begins with {begins}")


@pytest.mark.parametrize("kind", ["nan", "ban"])
def test_a_stop_string_before_what_would_fail(llm, plain, request, kind):
    """The step that accepts the stop string's token and the next already knows the error of the
    token after: plain decoding would have ended before it."""
    word = plain.get_tokenizer().decode([65])
    params = greedy(max_tokens=8, allowed_token_ids=[65, POISON])
    prompt = find(plain, params, [65, 65, POISON])
    draft = [65, 65, POISON, POISON, 65]
    stopping = params.clone()
    stopping.stop = [word + word]
    if kind == "nan":
        request.getfixturevalue("poisoned")
    else:  # after "AA" nothing is allowed
        both = plain.get_tokenizer().decode([65, 65])
        last = plain.get_tokenizer().decode([POISON])
        stopping.bad_words = params.bad_words = [both + word, both + last]
    error = NumericalError if kind == "nan" else InvalidRequestError
    with pytest.raises(error):
        plain.generate(prompt, params)

    def rest(row) -> list[int]:
        done = len(row.sequence.tokens) - row.sequence.prompt_len
        return draft[done : done + row.max_draft]

    speculator = force(llm, Proposer(rest))
    with pytest.raises(error):
        llm.generate(prompt, params)
    for made in (plain, llm):
        (output,) = made.generate([prompt], stopping)
        assert output.error is None
        sample = output.outputs[0]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", word + word)
        assert sample.token_ids == [65, 65]
    assert speculator.stats.num_accepted_tokens > 0


@pytest.mark.parametrize("step", [1, 2, 4])
def test_ctrl_c_at_a_step_with_drafts(llm, plain, monkeypatch, step):
    """Raised in the runner: the plan has pages for its drafts and never ran."""
    prompts = [ids(70, 9), ids(71, 12)]
    ask = greedy(max_tokens=24)
    texts = told(plain, prompts, ask)
    speculator = force(llm, forced.oracle(texts))
    runner = llm.engine.runner
    real, count = runner.run, [0]

    def run(*args):
        count[0] += 1
        if count[0] == step + 1:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", run)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, ask)
    assert count[0] == step + 1 and not llm.engine.has_work
    assert_no_leak(llm)
    outputs = llm.generate(prompts, ask)
    assert [o.outputs[0].token_ids for o in outputs] == list(texts.values())
    assert speculator.stats.num_drafts > 0


# -- compiles, counts ------------------------------------------------------------------


def test_zero_compiles_after_warm_up(tiny):
    rng = np.random.default_rng(0)
    with checked(tiny_llm(tiny, strict=True, speculative_config=CONFIG, **SMALL)) as llm:
        llm.warmup(use_tqdm=False)
        before = COMPILES.compiles
        prompts = [ids(int(seed), int(rng.integers(1, 60))) for seed in range(24)]
        prompts[::3] = [(ids(i, 5) * 9)[:40] for i in range(8)]
        params = [
            greedy(max_tokens=12, logprobs=1, presence_penalty=0.5),
            draws(max_tokens=9, n=2, top_k=20, bad_words=["ab"]),
            greedy(max_tokens=20),
        ] * 8
        params[0] = greedy(max_tokens=30, logit_bias={40: 80.0})  # a text that repeats
        adaptive = llm.engine.speculator
        for batch in (24, 1, 5):
            outputs = llm.generate(prompts[:batch], params[:batch])
            assert all(o.error is None for o in outputs)
        assert adaptive is not None and adaptive.stats.num_drafts > 0
        speculator = force(llm, Proposer(lambda row: [9] * row.max_draft))
        outputs = llm.generate(prompts, params)
        assert all(o.error is None for o in outputs) and speculator.stats.num_drafts > 10
        assert COMPILES.compiles == before
        assert llm.get_metrics()["num_compiles_after_warmup"] == 0
        assert_no_leak(llm)


def test_metrics_agree_with_what_was_verified(llm, plain):
    prompts = [ids(80 + i, 6 + i) for i in range(3)]
    params = [greedy(max_tokens=18), draws(max_tokens=15, seed=2), greedy(max_tokens=1)]
    texts = told(plain, prompts, params)
    speculator = force(llm, forced.flaky(texts))
    seen: dict[str, list[tuple[int, int]]] = {"0": [], "1": [], "2": []}
    verify = speculator.verify

    def watch(row, drawn):
        tokens = verify(row, drawn)
        seen[row.sequence.request.request_id].append((len(row.draft), len(tokens) - 1))
        return tokens

    speculator.verify = watch
    before = llm.get_metrics()["generation_tokens"]
    for i, (prompt, ask) in enumerate(zip(prompts, params, strict=True)):
        llm.add_request(str(i), prompt, ask)
    outputs = {}
    while llm.has_unfinished_requests():
        outputs |= {o.request_id: o for o in llm.step() if o.finished}
    assert outputs["2"].metrics.speculation is None and not seen["2"]
    for name in ("0", "1"):
        stats = outputs[name].metrics.speculation
        assert stats.num_drafts == len(seen[name]) > 1
        assert stats.num_draft_tokens == sum(k for k, _ in seen[name])
        assert stats.num_accepted_tokens == sum(a for _, a in seen[name])
        assert stats.num_emitted_tokens == sum(a + 1 for _, a in seen[name])
    every = seen["0"] + seen["1"]
    metrics = llm.get_metrics()
    assert metrics["spec_decode_num_drafts"] == len(every)
    assert metrics["spec_decode_num_draft_tokens"] == sum(k for k, _ in every)
    accepted = sum(a for _, a in every)
    assert metrics["spec_decode_num_accepted_tokens"] == accepted
    rate = accepted / sum(k for k, _ in every)
    assert metrics["spec_decode_acceptance_rate"] == pytest.approx(rate)
    length = 1 + accepted / len(every)
    assert metrics["spec_decode_mean_accepted_length"] == pytest.approx(length)
    for position in range(max(k for k, _ in every)):
        count = sum(a > position for _, a in every)
        assert metrics[f"spec_decode_num_accepted_tokens_pos_{position}"] == count
    assert metrics["generation_tokens"] - before == 18 + 15 + 1
    steps = [s for s in llm.engine.metrics.steps if s.num_draft_tokens]
    assert sum(s.num_draft_tokens for s in steps[-len(every) :]) >= sum(k for k, _ in every)


def test_what_a_stop_string_cuts_off_is_not_counted_as_emitted(llm, plain):
    prompt = ids(90, 7)
    ask = greedy(max_tokens=16, allowed_token_ids=list(range(32, 90)))
    texts = told(plain, [prompt], ask)
    text = next(iter(texts.values()))
    ask.stop = [plain.get_tokenizer().decode(text[5:7])]
    force(llm, forced.oracle(texts))
    (output,) = llm.generate([prompt], ask)
    sample, stats = output.outputs[0], output.metrics.speculation
    assert sample.finish_reason == "stop" and sample.token_ids == text[: len(sample.token_ids)]
    assert stats.num_emitted_tokens < stats.num_accepted_tokens + stats.num_drafts
    assert stats.num_emitted_tokens <= len(sample.token_ids)


# -- look-ups as they are in service ---------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
def test_ngram_on_texts_that_repeat(tiny, plain, overlap):
    """The real proposer and the real decision when to draft, which depends on measured times."""
    prompts = [(ids(60 + i, 4 + i) * 12)[:40] for i in range(5)]
    # A bias towards a few tokens makes the output repeat as well.
    bias = {token: 6.0 for token in range(40, 43)}
    params = [
        greedy(max_tokens=40, logit_bias=bias) if i % 2 == 0 else draws(max_tokens=40, seed=i)
        for i in range(5)
    ]
    want = plain.generate(prompts, params)
    with checked(
        tiny_llm(tiny, async_scheduling=overlap, speculative_config=CONFIG, **SMALL)
    ) as llm:
        for batch in (1, 5):
            for i in range(0, 5, batch):
                outputs = llm.generate(prompts[i : i + batch], params[i : i + batch])
                for got, wanted in zip(outputs, want[i : i + batch], strict=True):
                    assert got.outputs[0].token_ids == wanted.outputs[0].token_ids
        metrics = llm.get_metrics()
        assert metrics["spec_decode_num_drafts"] > 0
        assert metrics["spec_decode_num_draft_tokens"] >= metrics["spec_decode_num_accepted_tokens"]
        assert not llm.engine.speculator._evidence and not llm.engine.speculator.proposer._indexes
        assert_no_leak(llm)


def test_a_failing_proposer_ends_the_engine_and_says_so(tiny):
    """A fault of jaxinfer's own, as one of the device."""
    llm = tiny_llm(tiny, speculative_config=CONFIG, **SMALL)

    def broken(row):
        raise KeyError("a bug")

    force(llm, Proposer(broken))
    with pytest.raises(EngineDeadError, match="a bug"):
        llm.generate(ids(1, 5), greedy())
    llm.close()
