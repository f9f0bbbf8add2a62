"""No compile after warm-up, in every feature mix; every bucket is known and bounded."""

import numpy as np
import pytest

from jaxinfer import RecompileError, SamplingParams
from jaxinfer.buckets import Buckets
from jaxinfer.request import Row, StepPlan
from jaxinfer.runner import COMPILES
from tests.helpers import assert_no_leak, tiny_llm

NUM_REQUESTS = 200


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Any mix of options."""

    def maybe(value, otherwise, chance=0.3):
        return value if rng.random() < chance else otherwise

    temperature = maybe(0.0, float(rng.uniform(0.3, 1.7)), 0.4)
    return SamplingParams(
        temperature=temperature,
        n=1 if temperature == 0 else maybe(3, 1),
        top_k=maybe(int(rng.integers(1, 300)), 0),
        top_p=maybe(float(rng.uniform(0.1, 1)), 1.0),
        min_p=maybe(0.1, 0.0),
        presence_penalty=maybe(0.5, 0.0),
        frequency_penalty=maybe(-0.5, 0.0),
        repetition_penalty=maybe(1.3, 1.0),
        seed=maybe(int(rng.integers(0, 2**62)), None),
        stop=maybe(["\x01", "ab"], None),
        stop_token_ids=maybe([5, 6], None),
        ignore_eos=maybe(True, False),
        max_tokens=int(rng.integers(1, 24)),
        min_tokens=maybe(1, 0),
        logprobs=maybe(int(rng.integers(0, 21)), None),
        prompt_logprobs=maybe(2, None),
        logit_bias=maybe({3: 5.0, 200: -100.0}, None),
        allowed_token_ids=maybe(list(range(40, 90)), None),
        bad_words=maybe(["a", "the", "xyz"], None),
    )


def test_zero_compiles_in_a_mixed_run(tiny):
    rng = np.random.default_rng(0)
    with tiny_llm(
        tiny, strict=True, max_num_batched_tokens=128, num_pages=400, max_model_len=1024
    ) as llm:
        llm.warmup()
        asks = [random_params(rng) for _ in range(NUM_REQUESTS)]
        inputs = [rng.integers(0, 256, int(rng.integers(1, 701))).tolist() for _ in asks]
        shared = inputs[0]
        inputs[1::10] = [shared + ids[:30] for ids in inputs[1::10]]
        before = COMPILES.compiles
        outputs = llm.generate(inputs, asks)
        llm.cache_prompt(inputs[3], pin=True)
        llm.reset_prefix_cache()
        llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=3))
        list(llm.stream("hello", SamplingParams(max_tokens=3)))
        assert COMPILES.compiles == before
        assert llm.get_metrics()["num_compiles_after_warmup"] == 0
        assert all(o.error is None for o in outputs)
        used = {step.bucket for step in llm.engine.metrics.steps}
        assert len(used) > 3  # the mix visited decode and mixed shapes
        assert_no_leak(llm)


def test_strict_raises_on_a_compile(tiny):
    with tiny_llm(tiny, strict=True) as llm:
        llm.warmup()
        bucket = llm.engine.runner.buckets[0]
        del llm.engine.runner._programs[bucket]
        with pytest.raises(RecompileError, match="strict=True"):
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 64, 256])
@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 100, 512, 2048])
def test_buckets_hold_every_plan(rows, tokens):
    """Every plan that the scheduler may make has a bucket, and there are few."""
    tokens = max(tokens, rows)
    buckets = Buckets.make(rows, tokens)
    assert len(buckets.all) <= 18
    assert all(b.decode_only for b in buckets.decode)
    assert not any(b.decode_only for b in buckets.mixed)

    def plan(sizes: list[int]) -> StepPlan:
        return StepPlan(0, [Row(None, 0, n, True, 0, []) for n in sizes])

    rng = np.random.default_rng(rows * 10_000 + tokens)
    for _ in range(50):
        count = int(rng.integers(1, rows + 1))
        sizes = [1] * int(rng.integers(0, count + 1))
        left = tokens - len(sizes)
        while len(sizes) < count:
            size = int(rng.integers(0, left + 1))
            sizes.append(size)
            left -= size
        chosen = buckets.choose(plan(sizes))
        assert len(sizes) <= chosen.num_rows and sum(sizes) <= chosen.num_tokens
        if not all(n == 1 for n in sizes):
            assert not chosen.decode_only
    assert buckets.choose(plan([1] * rows)).decode_only
