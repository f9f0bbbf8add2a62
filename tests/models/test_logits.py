"""Every architecture against Hugging Face transformers: stored logits always, torch if present."""

import dataclasses
import functools

import numpy as np
import pytest

from jaxinfer import models
from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.weights import config_from_hf
from pallas_kernels.dispatch import resolve
from tests.models import tiny

TOLERANCE = 1e-4  # of the largest logit; float32 rounding gives about 2e-6
# (tokens per step, width they are padded to): one prefill, chunks, token by token
STEPS = {"prefill": (tiny.NUM_TOKENS, 40), "chunks": (7, 10), "decode": (1, 1)}


@functools.cache
def parts(case: str, impl: str = "reference"):
    """The tiny model of `case`, its parameters, its golden."""
    golden = tiny.load_golden(case)
    model = models.build(config_from_hf(tiny.CONFIGS[case], None), resolve(impl), "float32")
    return model, tiny.load(model, tiny.make_tensors(case, golden.shapes)), golden


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", tiny.CONFIGS)
def test_logits_equal_goldens(case, steps):
    model, params, golden = parts(case)
    got = tiny.run(model, params, golden.tokens, *STEPS[steps])
    assert got.shape == (tiny.NUM_TOKENS, model.config.vocab_size)
    assert got.dtype == np.float32
    assert tiny.relative_error(got, golden.logits) < TOLERANCE


@pytest.mark.parametrize("case", ["mistral", "gemma2", "gpt2"])
def test_logits_equal_goldens_with_xla_ops(case):
    model, params, golden = parts(case, "xla")
    got = tiny.run(model, params, golden.tokens, *STEPS["chunks"])
    assert tiny.relative_error(got, golden.logits) < TOLERANCE


@pytest.mark.parametrize("case", tiny.CONFIGS)
def test_logits_equal_torch(case):
    pytest.importorskip("torch", reason="torch is not installed; the goldens serve")
    from tests.models import hugging_face  # imports torch

    theirs = hugging_face.build(case)
    model, _, golden = parts(case)
    tokens = np.flip(golden.tokens).copy()  # another sequence than the goldens'
    params = tiny.load(model, hugging_face.tensors(theirs))  # tied heads are in it too
    got = tiny.run(model, params, tokens, *STEPS["chunks"])
    assert tiny.relative_error(got, hugging_face.logits(theirs, tokens)) < TOLERANCE


NO_WINDOWS_2, NO_WINDOWS_4 = (None,) * 2, (None,) * 4
MUTATIONS = [
    ("llama", {"rope": RopeConfig(10000.0)}),
    ("llama", {"rope": RopeConfig(10000.0, "linear", 8.0)}),
    ("llama", {"query_scale": 0.2}),
    ("smollm2", {"rope": RopeConfig(12000.0)}),
    ("smollm2", {"norm_eps": 1e-2}),
    ("smollm2", {"activation": "gelu"}),
    ("mistral", {"windows": NO_WINDOWS_2}),
    ("mistral", {"windows": (9, 9)}),
    ("qwen2", {"windows": NO_WINDOWS_2}),
    ("qwen2", {"windows": (8, 8)}),
    ("gemma2", {"windows": (None, 8, None, 8)}),
    ("gemma2", {"attn_soft_cap": None}),
    ("gemma2", {"final_soft_cap": None}),
    ("gemma2", {"embed_scale": 1.0}),
    ("gemma3", {"rope_local": None}),
    ("gemma3", {"rope": RopeConfig(1000000.0)}),
    ("gemma3", {"windows": NO_WINDOWS_4}),
]


@pytest.mark.parametrize(("case", "change"), MUTATIONS)
def test_goldens_notice_a_wrong_config(case, change):
    """Otherwise the comparison with the goldens would prove nothing about that field."""
    model, params, golden = parts(case)
    wrong = models.build(dataclasses.replace(model.config, **change), model.ops, "float32")
    got = tiny.run(wrong, params, golden.tokens, *STEPS["prefill"])
    assert tiny.relative_error(got, golden.logits) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, "bfloat16") for case in tiny.CONFIGS), ("llama", "float16")]
)
def test_low_precision_is_close(case, dtype):
    reference, _, golden = parts(case)
    model = models.build(reference.config, reference.ops, dtype)
    params = tiny.load(model, tiny.make_tensors(case, golden.shapes))
    assert params["embed"].dtype == dtype
    assert params["norm"]["scale"].dtype == "float32"
    got = tiny.run(model, params, golden.tokens, *STEPS["prefill"])
    assert got.dtype == np.float32
    error = np.sqrt(np.mean((got - golden.logits) ** 2) / np.mean(golden.logits**2))
    assert 0 < error < (3e-2 if dtype == "bfloat16" else 5e-3)


def test_tiny_models_cover_every_kind_of_head():
    """MHA, MQA and GQA all run, and head_dim is not always hidden_size / num_heads."""
    configs: list[ModelConfig] = [parts(case)[0].config for case in tiny.CONFIGS]
    assert {c.num_kv_heads for c in configs} == {1, 2, 4}
    assert any(c.head_dim * c.num_heads != c.hidden_size for c in configs)
    assert {c.architecture for c in configs} >= set(models.ARCHITECTURES) - {
        "Gemma3TextForCausalLM"
    }
