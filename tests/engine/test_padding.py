"""Padding never speaks: what padding and unused pages hold changes no bit of any output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import SamplingParams
from jaxinfer.batch import Builder, HostBatch
from tests.helpers import tiny_llm

pytestmark = pytest.mark.optimised

ASK = [
    SamplingParams(temperature=0, max_tokens=10, logprobs=5, prompt_logprobs=3, ignore_eos=True),
    SamplingParams(temperature=1, seed=4, max_tokens=9, logprobs=2, top_p=0.8, ignore_eos=True),
    SamplingParams(temperature=1, seed=5, max_tokens=8, frequency_penalty=1, n=2, ignore_eos=True),
]


def run(llm) -> list:
    rng = np.random.default_rng(3)
    inputs = [rng.integers(0, 256, n).tolist() for n in (5, 33, 70)]
    outputs = llm.generate(inputs, ASK)
    assert all(o.error is None for o in outputs)
    return [(o.outputs, o.prompt_logprobs) for o in outputs]


def poison_pages(llm) -> None:
    """Every page that holds nothing yet: all of them, page 0 too."""
    runner = llm.engine.runner
    runner.pages = jax.tree_util.tree_map(
        lambda x: jnp.full_like(
            x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max
        ),
        runner.pages,
    )


def poison_padding(monkeypatch: pytest.MonkeyPatch) -> list[HostBatch]:
    """Fill every padded entry of the packed batch that the contract leaves open."""
    build = Builder.build
    seen: list[HostBatch] = []

    def poisoned(self, plan, slots):
        batch = build(self, plan, slots)
        f = self.layouts[batch.bucket].split(batch.packed)
        rows, tokens = len(plan.rows), plan.num_tokens
        f["tokens"][tokens:] = 2**31 - 1
        f["positions"][tokens:] = 10**6
        f["feed"][tokens:] = -1
        f["last"][rows:] = tokens and tokens - 1
        f["sample"][:6, rows:] = np.float32(np.nan).view(np.int32)
        f["sample"][6:11, rows:] = 2**31 - 1
        for i, row in enumerate(plan.rows):
            f["page_table"][i, len(row.pages) :] = 10**6
        f["page_table"][rows:] = 10**6
        seen.append(batch)
        return batch

    monkeypatch.setattr(Builder, "build", poisoned)
    return seen


@pytest.mark.parametrize(
    ("impl", "kv_cache_dtype"),
    [
        ("xla", "auto"),
        ("reference", "auto"),
        ("xla", "int8"),
        ("xla", "fp8"),
        pytest.param("reference", "fp8", marks=pytest.mark.slow),
        pytest.param("interpret", "int8", marks=pytest.mark.slow),
        pytest.param("interpret", "fp8", marks=pytest.mark.slow),
    ],
)
def test_nan_in_padding_and_unused_pages_changes_no_bit(tiny, monkeypatch, impl, kv_cache_dtype):
    options = {"max_num_batched_tokens": 32, "attention_impl": impl, "num_pages": 60}
    options["kv_cache_dtype"] = kv_cache_dtype
    with tiny_llm(tiny, **options) as llm:
        clean = run(llm)
    seen = poison_padding(monkeypatch)
    with tiny_llm(tiny, **options) as llm:
        poison_pages(llm)
        poisoned = run(llm)
    assert any(b.offsets[-1] < b.bucket.num_tokens for b in seen)  # there was padding
    assert poisoned == clean
