"""assemble: what it accepts, every way a checkpoint can be wrong, and what it says then."""

import dataclasses
import itertools
import logging
import weakref

import ml_dtypes
import numpy as np
import pytest

from jaxinfer import models
from jaxinfer.errors import ModelFormatError
from jaxinfer.params import TensorInfo, assemble, flatten, is_finite, plus_one, unflatten
from jaxinfer.weights import config_from_hf
from pallas_kernels.dispatch import resolve
from tests.models import tiny


def build(case: str = "llama", dtype: str = "float32") -> models.Model:
    return models.build(config_from_hf(tiny.CONFIGS[case], None), resolve("reference"), dtype)


def checkpoint(case: str = "llama") -> dict[str, np.ndarray]:
    return tiny.make_tensors(case, tiny.load_golden(case).shapes)


def run(model: models.Model, tensors: dict[str, np.ndarray], **options) -> dict:
    """assemble from memory, leaves kept as NumPy arrays."""
    reader = options.pop("reader", None) or tiny.DictReader(tensors)
    options = {"ignored": model.ignored, "path": "/tmp/model.safetensors"} | options
    return assemble(
        reader, model.rules, model.config, model.shapes(), lambda a, path: np.array(a), **options
    )


def refuse(tensors: dict[str, np.ndarray], model: models.Model | None = None) -> str:
    """The message with which `tensors` are refused; nothing may have been read by then."""
    reader = tiny.DictReader(tensors)
    with pytest.raises(ModelFormatError) as caught:
        run(model or build(), tensors, reader=reader)
    assert reader.names_read == []
    assert caught.value.path == "/tmp/model.safetensors"
    assert "/tmp/model.safetensors" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", tiny.CONFIGS)
def test_rules_cover_every_tensor_once(case):
    """Against the names and shapes of Hugging Face's own state dict, stored with the goldens."""
    model, tensors = build(case), checkpoint(case)
    reader = tiny.DictReader(tensors)
    params = run(model, tensors, reader=reader)
    assert sorted(reader.names_read) == sorted(tensors)
    got, expected = flatten(params), flatten(model.shapes())
    assert {p: (a.shape, a.dtype) for p, a in got.items()} == {
        p: (s.shape, s.dtype) for p, s in expected.items()
    }
    assert sum(a.size for a in got.values()) == sum(a.size for a in tensors.values())


def test_projections_are_laid_out_by_head():
    model, tensors = build(), checkpoint()
    attn = run(model, tensors)["layers_1"]["attn"]
    prefix, h = "model.layers.1.self_attn.", model.config.head_dim
    q, k = tensors[prefix + "q_proj.weight"], tensors[prefix + "k_proj.weight"]
    o, bias = tensors[prefix + "o_proj.weight"], tensors[prefix + "q_proj.bias"]
    for head in range(model.config.num_heads):
        rows = slice(head * h, (head + 1) * h)
        np.testing.assert_array_equal(attn["q"][head], q[rows])
        np.testing.assert_array_equal(attn["o"][:, head], o[:, rows])
        np.testing.assert_array_equal(attn["q_bias"][head], bias[rows])
    np.testing.assert_array_equal(attn["k"][1], k[h : 2 * h])


def test_missing_unused_and_mis_shaped_are_listed_together():
    tensors = checkpoint()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((56, 48), np.float32)
    tensors["model.norm.weight"] = np.zeros(47, np.float32)
    message = refuse(tensors)
    assert "missing: model.layers.0.mlp.up_proj.weight" in message
    assert "unused: model.layers.2.mlp.up_proj.weight (56, 48)" in message
    assert "shape: model.norm.weight is (47,)" in message
    assert "expected (48,)" in message
    assert "3 problem(s)" in message


def test_a_transposed_tensor_is_refused_though_its_size_fits():
    tensors = checkpoint()
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    message = refuse(tensors)
    assert f"{name} is (48, 64)" in message
    assert "expected (64, 48)" in message


def test_only_the_first_problems_are_listed():
    message = refuse({})
    assert message.count("missing: ") == 10
    assert "and 25 more" in message


def test_integer_weights_are_refused_before_reading():
    tensors = checkpoint()
    reader = tiny.DictReader(tensors)
    reader.infos["model.norm.weight"] = TensorInfo((48,), "I8")
    with pytest.raises(ModelFormatError, match=r"dtype: model\.norm\.weight is I8"):
        run(build(), tensors, reader=reader)
    assert reader.names_read == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_tensor_that_is_not_finite_is_named(value, dtype):
    tensors = checkpoint()
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].astype(dtype)
    tensors[name][3, 5] = value
    with pytest.raises(ModelFormatError, match="NaN or infinity") as caught:
        run(build(), tensors)
    assert caught.value.field == name
    assert name in str(caught.value)


def test_finite_means_neither_nan_nor_infinite():
    largest = np.array([3.3e38, -3.3e38, 0.0, 1e-40])
    for dtype in (np.float32, ml_dtypes.bfloat16):
        assert is_finite(largest.astype(dtype))
        assert not is_finite(np.array([1.0, np.nan]).astype(dtype))


def test_overflow_of_float16_is_an_error():
    tensors = checkpoint()
    tensors["model.embed_tokens.weight"][0, 0] = 1e5
    with pytest.raises(ModelFormatError, match=r"model\.embed_tokens\.weight.*overflows float16"):
        run(build(dtype="float16"), tensors)


def test_a_reader_that_disagrees_with_its_header_is_an_error():
    tensors = checkpoint()
    reader = tiny.DictReader(tensors)
    tensors["model.norm.weight"] = np.zeros(48, np.int32)
    with pytest.raises(ModelFormatError, match=r"model\.norm\.weight.*int32"):
        run(build(), tensors, reader=reader)


def test_all_zeros_are_warned_about(caplog):
    tensors = checkpoint()
    tensors["model.layers.0.mlp.gate_proj.bias"][:] = 0
    with caplog.at_level(logging.WARNING):
        run(build(), tensors)
    assert [r.getMessage() for r in caplog.records] == [
        "model.layers.0.mlp.gate_proj.bias of /tmp/model.safetensors is all zeros; "
        "the weights may be a placeholder"
    ]


def test_a_tied_model_leaves_a_stored_head_unused(caplog):
    model, tensors = build("smollm2"), checkpoint("smollm2")
    tensors["lm_head.weight"] = np.ones((97, 32), np.float32)
    with caplog.at_level(logging.WARNING):
        params = run(model, tensors)
        assert "lm_head" not in params and caplog.records == []
        tensors["lm_head.weight"] = np.ones((100, 32), np.float32)
        assert "lm_head" not in run(model, tensors)
    assert "lm_head.weight (100, 32) is left unused" in caplog.text


def test_an_untied_model_needs_its_head():
    tensors = checkpoint()
    del tensors["lm_head.weight"]
    assert "missing: lm_head.weight" in refuse(tensors)


def test_buffers_of_old_checkpoints_are_skipped():
    tensors = checkpoint("gpt2")
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 48, 48), np.float32)
    tensors["transformer.h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    params = run(build("gpt2"), tensors)
    assert flatten(params).keys() == flatten(build("gpt2").shapes()).keys()


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_a_base_model_saved_without_its_prefix_loads(case):
    tensors = checkpoint(case)
    bare = {
        name if name == "lm_head.weight" else name.partition(".")[2]: array
        for name, array in tensors.items()
    }
    want, got = flatten(run(build(case), tensors)), flatten(run(build(case), bare))
    assert want.keys() == got.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(array, got[path])


def test_gemma_norms_are_one_plus_the_weight_in_float32():
    stored = np.array([0.5, -0.001], ml_dtypes.bfloat16)
    got = plus_one(stored, build("gemma2").config)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, 1 + stored.astype(np.float32))
    params = run(build("gemma2", "bfloat16"), checkpoint("gemma2"))
    stored = checkpoint("gemma2")["model.layers.0.input_layernorm.weight"]
    np.testing.assert_array_equal(params["layers_0"]["attn_norm"]["scale"], stored + 1)


def test_progress_reaches_the_total():
    seen = []
    tensors = checkpoint("gpt2")
    run(build("gpt2"), tensors, progress=lambda *args: seen.append(args))
    assert [name for name, _, _ in seen] == list(dict.fromkeys(name for name, _, _ in seen))
    total = sum(a.size for a in tensors.values())
    assert seen[-1][1:] == (total, total)
    assert all(b > a for (_, a, _), (_, b, _) in itertools.pairwise(seen))


def test_the_host_never_holds_two_tensors():
    """Every array that was read is dropped before the next read."""
    given: list[weakref.ref] = []

    class Reader(tiny.DictReader):
        def read(self, name):
            alive = [ref for ref in given if ref() is not None]
            assert alive == [], f"an earlier tensor was alive when {name} was read"
            array = self.tensors[name].copy()
            given.append(weakref.ref(array))
            return array

    tensors = checkpoint()
    run(build(), tensors, reader=Reader(tensors))
    assert len(given) == len(tensors)


def test_trees_flatten_and_unflatten():
    flat = {"a": 1, "b/c": 2, "b/d/e": 3}
    assert unflatten(flat) == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert flatten(unflatten(flat)) == flat


def test_a_wrong_config_is_refused():
    """Weights of one size with the configuration of another: told by metadata alone."""
    config = dataclasses.replace(build().config, num_kv_heads=4)
    model = models.build(config, resolve("reference"), "float32")
    message = refuse(checkpoint(), model)
    assert "model.layers.0.self_attn.k_proj.weight is (32, 48); expected (64, 48)" in message
