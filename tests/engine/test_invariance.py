"""The same tokens whatever shares the batch and however it is cut, cached, preempted or overlapped.

Greedy and seeded. XLA picks other loops for other shapes, so float32 sums round differently; where
a token differs from the reference's, the test computes both tokens' scores (logits, and the noise
of a seeded draw) and demands that they are closer than TIES: a tie that rounding may break either
way.
"""

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from tests.engine.ties import score_gap
from tests.helpers import ENGINE_DEFAULTS, TIES, assert_no_leak, tiny_llm

pytestmark = pytest.mark.optimised

NUM_PROMPTS = 32
NEW_TOKENS = 12


def prompts() -> list[list[int]]:
    """Lengths 1 to 90; every fourth begins like the one before it, so that prefixes are shared."""
    rng = np.random.default_rng(7)
    out: list[list[int]] = []
    for i in range(NUM_PROMPTS):
        length = int(rng.integers(1, 90))
        ids = rng.integers(0, 256, length).tolist()
        out.append(out[-1][:40] + ids[:20] if i % 4 == 3 else ids)
    return out


def params(i: int) -> SamplingParams:
    """Every other request draws at temperature 1, some of them filtered or penalised."""
    if i % 2 == 0:
        return SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    return SamplingParams(
        temperature=1.0,
        seed=1000 + i,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        top_k=20 if i % 3 == 0 else 0,
        top_p=0.9 if i % 5 == 0 else 1.0,
        frequency_penalty=0.5 if i % 7 == 0 else 0.0,
    )


class Reference:
    """Tokens of each prompt alone: no batch, no cache, no overlap, one chunk."""

    def __init__(self, folder, **options):
        self.tie = TIES[{**ENGINE_DEFAULTS, **options}["kv_cache_dtype"]]
        self.llm = tiny_llm(
            folder,
            max_num_seqs=1,
            max_num_batched_tokens=128,
            enable_prefix_caching=False,
            async_scheduling=False,
            **options,
        )
        self._tokens: dict[int, list[int]] = {}

    def tokens(self, i: int) -> list[int]:
        """Those of prompt i."""
        if i not in self._tokens:
            output = self.llm.generate(prompts()[i], params(i))[0]
            self._tokens[i] = output.outputs[0].token_ids
        return self._tokens[i]

    def check(self, i: int, got: list[int]) -> None:
        want = self.tokens(i)
        assert len(got) == len(want)
        for at, (a, b) in enumerate(zip(got, want, strict=True)):
            if a != b:
                gap = score_gap(self.llm, prompts()[i] + want[:at], params(i), a, b)
                assert gap < self.tie, f"prompt {i}, token {at}: {a} for {b}, {gap:.2e} apart"
                return  # what follows a tie continues another text


@pytest.fixture(scope="module")
def reference(tiny):
    made = Reference(tiny)
    yield made
    made.llm.close()


def run(llm: LLM, indices: list[int], reference: Reference) -> None:
    inputs = prompts()
    outputs = llm.generate([inputs[i] for i in indices], [params(i) for i in indices])
    for i, output in zip(indices, outputs, strict=True):
        assert output.error is None
        reference.check(i, output.outputs[0].token_ids)
    assert_no_leak(llm)


_SHAPES = [  # chunk, page size, cached
    (16, 8, True),
    (64, 16, False),
    (512, 64, True),
    (16, 64, False),
    (64, 8, True),
    (512, 8, False),
]
_QUICK = [(16, 8, True, True), (64, 16, False, False), (512, 8, False, True)]
_MIXES = [
    pytest.param(*mix, marks=[pytest.mark.slow] * (mix not in _QUICK))
    for mix in ((*shape, overlap) for shape in _SHAPES for overlap in (True, False))
]


@pytest.mark.parametrize(("chunk", "page_size", "cached", "overlap"), _MIXES)
def test_batches_chunks_pages_cache_overlap(tiny, reference, chunk, page_size, cached, overlap):
    """Alone, in batches of 2, 7 and 32, twice over (the second time from the cache), shuffled."""
    rng = np.random.default_rng(chunk + page_size)
    with tiny_llm(
        tiny,
        max_num_seqs=min(chunk, 32),
        max_num_batched_tokens=chunk,
        page_size=page_size,
        num_pages=4000 // page_size,
        enable_prefix_caching=cached,
        async_scheduling=overlap,
    ) as llm:
        run(llm, [3], reference)
        run(llm, [4, 5], reference)
        run(llm, rng.permutation(NUM_PROMPTS)[:7].tolist(), reference)
        run(llm, rng.permutation(NUM_PROMPTS).tolist(), reference)
        run(llm, rng.permutation(NUM_PROMPTS).tolist(), reference)
        hits = llm.get_metrics()["num_prefix_hits"]
        assert (hits > 0) == cached


@pytest.mark.parametrize("overlap", [True, False])
def test_preemption(tiny, reference, overlap):
    """A pool for about four requests and eight that want it."""
    with tiny_llm(
        tiny, max_num_seqs=8, page_size=8, num_pages=30, async_scheduling=overlap, max_model_len=128
    ) as llm:
        run(llm, list(range(NUM_PROMPTS)), reference)
        assert llm.get_metrics()["num_preemptions"] > 0


def test_arrival_while_others_run(tiny, reference):
    """Requests that join at every step give what they give alone."""
    inputs = prompts()
    with tiny_llm(tiny) as llm:
        waiting = list(range(NUM_PROMPTS))
        done: dict[int, list[int]] = {}
        while waiting or llm.has_unfinished_requests():
            if waiting:
                i = waiting.pop()
                llm.add_request(str(i), inputs[i], params(i))
            for output in llm.step():
                if output.finished:
                    done[int(output.request_id)] = output.outputs[0].token_ids
        assert sorted(done) == list(range(NUM_PROMPTS))
        for i, tokens in done.items():
            reference.check(i, tokens)
        assert_no_leak(llm)


def test_a_new_engine_gives_the_same(tiny, reference):
    """Restart: nothing but the request decides a seeded draw."""
    with tiny_llm(tiny, seed=99) as llm:
        run(llm, [1, 3, 5, 7], reference)


def test_unseeded_draws_follow_the_engine_seed(tiny):
    ask = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)

    def tokens(seed: int) -> list[list[int]]:
        with tiny_llm(tiny, seed=seed) as llm:
            return [o.outputs[0].token_ids for o in llm.generate([[1, 2, 3]] * 2, ask)]

    first, again, other = tokens(1), tokens(1), tokens(2)
    assert first == again
    assert first[0] != first[1]  # two requests of one engine draw differently
    assert first != other


def test_the_tie_rule_can_fail(tiny, reference):
    """A wrong token is not excused as a tie."""
    wrong = list(reference.tokens(0))
    wrong[5] = (wrong[5] + 1) % 256
    with pytest.raises(AssertionError, match="apart"):
        reference.check(0, wrong)
