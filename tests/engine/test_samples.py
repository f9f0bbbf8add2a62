"""Samples, seeds and log-probs through LLM, against a dense pass of the model."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import (
    LLM,
    InvalidRequestError,
    kv_cache,
)
from pallas_kernels.paged_attention import Ragged
from tests.helpers import VOCAB_SIZE, assert_no_leak, draws, greedy, one, tiny_llm

EOS = 258
PAGE = 8


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


# -- n > 1 -----------------------------------------------------------------------------


def test_samples_differ_are_ordered_and_share_the_prompts_pages(llm):
    prompt = list(range(1, 5 * PAGE))
    pool = llm.engine.scheduler.pool
    free = pool.num_available
    llm.add_request("n", prompt, draws(n=4, seed=3, max_tokens=6))
    most = 0
    final = None
    while llm.has_unfinished_requests():
        final = next(iter(llm.step()), final)
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


# -- log-probs -------------------------------------------------------------------------


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


def test_prompt_logprobs_of_chunks_of_one_token(llm, tiny):
    """Beside a row that decodes, two tokens a step leave one for the prompt: a step that looks like
    decoding, whose program must still give the log-probs."""
    prompt = list(range(40, 52))
    params = draws(seed=1, prompt_logprobs=2, max_tokens=1)
    alone = llm.generate(prompt, params)[0].prompt_logprobs
    other = draws(seed=2, max_tokens=30, ignore_eos=True)
    with tiny_llm(tiny, max_num_seqs=2, max_num_batched_tokens=2) as made:
        beside = made.generate([[7], prompt], [other, params])[1].prompt_logprobs
        steps = [s for s in made.engine.metrics.steps if s.num_rows == s.num_tokens == 2]
    assert {s.bucket for s in steps} >= {"mixed 3x2"} and len(steps) >= 10
    assert alone is not None and beside is not None and len(beside) == len(prompt)
    for mine, other_entry in zip(beside[1:], alone[1:], strict=True):
        assert list(mine) == list(other_entry)
        for token in mine:
            assert mine[token].logprob == pytest.approx(other_entry[token].logprob, abs=1e-4)


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


def test_logprobs_bounded_by_max_logprobs(tiny):
    with tiny_llm(tiny, max_num_seqs=1, max_num_batched_tokens=32, max_logprobs=2) as llm:
        assert len(one(llm, "x", greedy(logprobs=2)).logprobs) == 8
        for name, count in (("logprobs", 3), ("prompt_logprobs", 21), ("logprobs", -1)):
            with pytest.raises(
                InvalidRequestError, match=rf"{name} must be in 0\.\.2; got {count}"
            ):
                llm.generate("x", greedy(**{name: count}))
        assert_no_leak(llm)
