"""The layer-by-layer run is the model; AWQ's folding leaves it the same; statistics are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import models
from jaxinfer.params import expand
from jaxinfer.quantize.calibrate import Layers
from jaxinfer.quantize.grid import Grid
from jaxinfer.quantize.layer import fold
from jaxinfer.weights import config_from_hf
from pallas_kernels.dispatch import resolve
from tests.models import tiny

CASES = ["llama", "smollm2", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
LENGTH = 16


class Tiny:
    """A tiny model, its tensors, and what its layers see of random tokens."""

    def __init__(self, case: str):
        self.model = models.build(
            config_from_hf(tiny.CONFIGS[case], None), resolve("reference"), "float32"
        )
        self.config = self.model.config
        self.golden = tiny.load_golden(case)
        self.tensors = tiny.make_tensors(case, self.golden.shapes)
        self.rules = expand(self.model.rules, self.config.num_layers)
        self.layers = Layers(self.model)

    def of_layer(self, number: int):
        return [rule for rule in self.rules if rule.path.startswith(f"layers_{number}/")]

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        shared = {"embed": self.tensors["model.embed_tokens.weight"]}
        return self.layers.embed(shared, tokens)

    def run(self, number: int, hidden: np.ndarray, *, record: bool):
        params = self.layers.params(number, self.of_layer(number), self.tensors)
        return self.layers.run(number, params, hidden, record=record)


@pytest.mark.parametrize("case", CASES)
def test_layer_by_layer_is_the_model(case: str):
    """Against the logits of Hugging Face transformers, to the tolerance of the models' own tests;
    a second sequence in the batch is another's."""
    model = Tiny(case)
    tokens = np.stack([model.golden.tokens, model.golden.tokens[::-1]])
    hidden = model.embed(tokens)
    for number in range(model.config.num_layers):
        hidden, _ = model.run(number, hidden, record=False)
    params = tiny.load(model.model, model.tensors)
    norm = models.layers.RMSNorm(model.config.norm_eps)
    normed = norm.apply({"params": params["norm"]}, jnp.asarray(hidden[0]))
    logits = np.asarray(model.model.logits(params, normed))
    assert tiny.relative_error(logits, model.golden.logits) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_folding_changes_nothing_but_rounding(case: str):
    model = Tiny(case)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, LENGTH), np.int32)
    hidden = model.embed(tokens)
    folded = dict(model.tensors)
    grid = Grid(4, 8, False, "float16")
    moved = []
    for number in range(model.config.num_layers):
        after, statistics = model.run(number, hidden, record=True)
        rules = {r.path.removeprefix(f"layers_{number}/"): r for r in model.of_layer(number)}
        by_leaf = {leaf: model.tensors[rule.name] for leaf, rule in rules.items()}
        assert statistics is not None
        out, scales = fold(by_leaf, rules, model.config, grid, statistics.inputs)
        folded |= {rules[leaf].name: array for leaf, array in out.items()}
        moved += [float(np.ptp(scale)) for scale in scales.inputs.values()]
        hidden = after
    assert max(moved) > 0.1
    before, after = (
        tiny.run(model.model, tiny.load(model.model, t), model.golden.tokens, 32, 32)
        for t in (model.tensors, folded)
    )
    assert not np.array_equal(before, after)
    # a float32 product more in each of the layer's inputs and outputs
    assert tiny.relative_error(after, before) < 2e-5


def test_statistics_are_those_of_the_inputs():
    """Against NumPy in float64: the first layer's attention input, and its values."""
    model = Tiny("qwen2")
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, model.config.vocab_size, (300, LENGTH), np.int32)  # several batches
    hidden = model.embed(tokens)
    _, statistics = model.run(0, hidden, record=True)
    assert statistics is not None
    x = model.tensors["model.embed_tokens.weight"][tokens].reshape(-1, model.config.hidden_size)
    x = x.astype(np.float64)
    gain = model.tensors["model.layers.0.input_layernorm.weight"]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_eps) * gain
    seen = statistics.inputs["attn/q"]
    np.testing.assert_allclose(seen.hessian, x.T @ x, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(seen.magnitudes, np.abs(x).sum(0), rtol=1e-5)
    attn = "model.layers.0.self_attn.v_proj."
    v = x @ model.tensors[attn + "weight"].T + model.tensors[attn + "bias"]
    np.testing.assert_allclose(statistics.largest_v, np.abs(v).max(), rtol=1e-5)
    assert {leaf: s.hessian.shape[0] for leaf, s in statistics.inputs.items()} == {
        "attn/q": 32, "attn/o": 32, "mlp/up": 32, "mlp/down": 56
    }  # fmt: skip
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(statistics))
