"""Quantised checkpoints, de-quantised: weights and tokens of the float ones they stand for."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxinfer import ConfigError, ModelFormatError, models
from jaxinfer.params import flatten
from jaxinfer.weights import load, open_model
from jaxinfer.weights.packed_reader import PackedReader
from tests.helpers import greedy, tiny_llm, write_tiny_model
from tests.quant.packers import CASES, Checkpoint, Tensors, checkpoint, stored

SMALL = {"max_num_seqs": 1, "max_num_batched_tokens": 32}
PROMPTS = ["The quick brown fox", "jumps"]
UP = "model.layers.1.mlp.up_proj"


def generated(folder: Path, **options: Any) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """(greedy tokens of PROMPTS, parameters by path)."""
    with tiny_llm(folder, **SMALL, **options) as llm:
        outputs = llm.generate(PROMPTS, greedy(max_tokens=12))
        params = {path: np.asarray(leaf) for path, leaf in flatten(llm.params).items()}
    return [list(output.outputs[0].token_ids) for output in outputs], params


def loaded(folder: Path, dtype: str) -> dict[str, np.ndarray]:
    """The parameters alone, by path, as host arrays."""
    with open_model(folder) as source:
        model = models.build(source.config, None, dtype)
        return flatten(load(source, model, lambda array, path: np.array(array), progress=False))


def same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for path, array in want.items():
        assert (got[path].dtype, got[path].shape) == (array.dtype, array.shape), path
        assert got[path].tobytes() == array.tobytes(), path


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_weights_are_the_float_checkpoints(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    packed = checkpoint(case)
    plain = write_tiny_model(tmp_path / "float", weights=packed.floats)
    want_tokens, want = generated(plain)
    assert "weights:" not in capfd.readouterr().err
    tokens, params = generated(packed.write(tmp_path / "packed"), verbose=True, dequantize=True)
    assert tokens == want_tokens
    same_bits(params, want)
    told = capfd.readouterr().err.splitlines()
    assert [line for line in told if "weights:" in line] == [f"weights: {CASES[case][2]}"]


@pytest.mark.parametrize("case", ["awq", "ct-fp8"])
def test_another_dtype_is_rounded_to_once(case: str, tmp_path: Path):
    packed = checkpoint(case)
    want = loaded(write_tiny_model(tmp_path / "float", weights=packed.floats), "bfloat16")
    same_bits(loaded(packed.write(tmp_path / "packed"), "bfloat16"), want)


def test_a_packed_head_and_shards(tmp_path: Path):
    """`lm_head` may be packed too; a layer's tensors may lie in several files."""
    packed = checkpoint("awq")
    parts, meant = CASES["awq"][1](packed.floats["lm_head.weight"])
    packed.floats["lm_head.weight"] = np.ascontiguousarray(meant, np.float32)
    del packed.tensors["lm_head.weight"]
    packed.tensors.update({f"lm_head.{part}": array for part, array in parts.items()})
    want = loaded(write_tiny_model(tmp_path / "float", weights=packed.floats), "float32")
    folder = packed.write(tmp_path / "packed")
    same_bits(loaded(folder, "float32"), want)

    (folder / "model.safetensors").unlink()
    shard_of = {name: f"{i % 3}.safetensors" for i, name in enumerate(packed.tensors)}
    for shard in set(shard_of.values()):
        some = {name: array for name, array in packed.tensors.items() if shard_of[name] == shard}
        (folder / shard).write_bytes(stored(some))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    same_bits(loaded(folder, "float32"), want)


@pytest.mark.parametrize("case", ["awq", "ct-int8", "fp8-block"])
def test_nothing_that_was_read_is_memory_of_the_file(case: str, tmp_path: Path):
    folder = checkpoint(case).write(tmp_path / "m")
    with open_model(folder) as source:
        assert isinstance(source.reader, PackedReader)
        weight = source.reader.checkpoint.read(f"{UP}.weight")
    before = weight.dequantize()
    path = folder / "model.safetensors"
    with path.open("r+b") as file:  # the same file, with other bytes
        file.write(bytes(path.stat().st_size))
    np.testing.assert_array_equal(weight.dequantize(), before)


def test_static_scales_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    packed = checkpoint("ct-fp8")
    scales = {f"{UP}.input_scale": np.ones(1, np.float32)}
    scales |= {f"model.layers.{i}.self_attn.k_scale": np.ones(1, np.float32) for i in (0, 1)}
    want = loaded(packed.write(tmp_path / "without"), "float32")
    assert "static scales" not in caplog.text
    packed.tensors.update(scales)
    with caplog.at_level(logging.WARNING):
        same_bits(loaded(packed.write(tmp_path / "with"), "float32"), want)
    assert f"3 static scales of activations or of the KV cache are left out ({UP}" in caplog.text


def test_biases_that_packers_add_are_left_out_only_if_zero(tmp_path: Path):
    packed = checkpoint("gptq-4")
    assert f"{UP}.bias" in packed.tensors  # a Llama has no such bias
    packed.tensors[f"{UP}.bias"][3] = 1
    with pytest.raises(ModelFormatError, match=rf"unused: {UP}\.bias"):
        tiny_llm(packed.write(tmp_path / "m"))


def test_biases_that_the_model_has_are_kept(tmp_path: Path):
    packed = checkpoint("gptq-4")
    bias = np.linspace(-1, 1, 96, dtype=np.float16)
    packed.tensors[f"{UP}.bias"] = bias
    packed.tensors.update(
        {f"model.layers.0.mlp.{n}_proj.bias": np.zeros(s, np.float16)
         for n, s in (("gate", 96), ("up", 96), ("down", 48))}
    )  # fmt: skip
    params = loaded(packed.write(tmp_path / "m", mlp_bias=True), "float32")
    np.testing.assert_array_equal(params["layers_1/mlp/up_bias"], bias)
    assert not params["layers_0/mlp/up_bias"].any()


def drop(part: str) -> Callable[[Checkpoint], None]:
    def change(packed: Checkpoint) -> None:
        del packed.tensors[f"{UP}.{part}"]

    return change


def shorten(part: str) -> Callable[[Checkpoint], None]:
    def change(packed: Checkpoint) -> None:
        packed.tensors[f"{UP}.{part}"] = packed.tensors[f"{UP}.{part}"][:-1]

    return change


def poison(part: str) -> Callable[[Checkpoint], None]:
    def change(packed: Checkpoint) -> None:
        packed.tensors[f"{UP}.{part}"].flat[5] = np.nan

    return change


def configure(**fields: Any) -> Callable[[Checkpoint], None]:
    return lambda packed: packed.config.update(fields)


def in_float(packed: Checkpoint) -> None:
    packed.tensors.clear()
    packed.tensors.update(packed.floats)


def integer_table(packed: Checkpoint) -> None:
    table: Tensors = packed.tensors
    table["model.embed_tokens.weight"] = table["model.embed_tokens.weight"].astype(np.int8)


BAD: dict[str, tuple[str, Callable[[Checkpoint], None], type[ValueError], str]] = {
    "no scales": ("awq", drop("scales"), ModelFormatError, r"scales' is missing.*every file"),
    "no zeros": ("gptq-4", drop("qzeros"), ModelFormatError, r"qzeros' is missing.*every file"),
    "no groups": ("gptq-4-act-order", drop("g_idx"), ModelFormatError, r"g_idx' is missing"),
    "no scale": ("ct-int8", drop("weight_scale"), ModelFormatError, r"weight_scale' is missing"),
    "no block scale": ("fp8-block", drop("weight_scale_inv"), ModelFormatError, r"inv' is missing"),
    "zeros short": ("awq", shorten("qzeros"), ModelFormatError, r"qzeros' has shape \(2, 12\)"),
    "scales short": ("ct-int4", shorten("weight_scale"), ModelFormatError, r"shape \(95, 3\)"),
    "blocks short": ("fp8-block", shorten("weight_scale_inv"), ModelFormatError, r"shape \(5, 2\)"),
    "fewer rows": ("fp8-tensor", shorten("weight"), ModelFormatError, r"up_proj.*\(95, 48\)"),
    "NaN": ("gptq-8", poison("scales"), ModelFormatError, r"scales' holds NaN or infinity"),
    "NaN in fp8": ("ct-fp8", poison("weight"), ModelFormatError, r"weight' holds NaN"),
    "all float": ("awq", in_float, ModelFormatError, r"no tensor is packed.*remove quantization"),
    "integers": ("awq", integer_table, ModelFormatError, r"embed_tokens\.weight is I8; floating"),
    "group": ("awq", configure(group_size=8), ModelFormatError, r"qzeros' has shape .*groups of 8"),
    "no division": ("awq", configure(group_size=32), ModelFormatError, r"48 inputs, which groups"),
    "bits": ("gptq-8", configure(bits=4), ModelFormatError, r"model\.layers\.0\.self_attn"),
    "width": ("awq", configure(bits=8), ConfigError, r"quantization_config\.bits must be 4.*got 8"),
    "method": (
        "awq", configure(quant_method="bitsandbytes"), ConfigError,
        r"quant_method must be one of these: awq .*gptq .*compressed-tensors .*fp8 .*bitsandbytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path):
    base, change, error, message = BAD[case]
    packed = checkpoint(base)
    packed = Checkpoint(dict(packed.config), packed.tensors, packed.floats)
    change(packed)
    folder = packed.write(tmp_path / "m")
    with pytest.raises(error, match=f"(?s){message}") as caught:
        tiny_llm(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("case", "dtype"), [("awq", "I32"), ("ct-int8", "I8"), ("fp8-block", "F8")]
)
def test_integers_without_a_quantization_config_are_refused(case: str, dtype: str, tmp_path: Path):
    packed = checkpoint(case)
    message = rf"{dtype}.*needs a quantization_config .*supported: F32, F16, BF16$"
    with pytest.raises(ModelFormatError, match=message):
        tiny_llm(packed.write(tmp_path / "m", quantization_config=None))
    folder = packed.write(tmp_path / "m")
    with pytest.raises(ModelFormatError, match=message):
        tiny_llm(folder, hf_overrides={"quantization_config": None})
    bare = packed.write(tmp_path / "bare", quantization_config=None)
    given = open_model(bare, hf_overrides={"quantization_config": packed.config})
    assert given.quantised == open_model(folder).quantised


def test_a_config_alone_needs_no_packed_weights(tmp_path: Path):
    folder = checkpoint("awq").write(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    source = open_model(folder, weights=False)  # as load_format="dummy" does
    assert source.quantised is not None and source.config.num_layers == 2


def test_a_dtype_that_the_config_leaves_out_is_that_of_the_float_tensors(tmp_path: Path):
    """Neither the scales' float16 nor the packed integers count."""
    folder = checkpoint("awq").write(tmp_path / "m", torch_dtype=None)
    assert open_model(folder).config.dtype == "float32"


def test_a_packed_head_beside_tied_embeddings_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    packed = checkpoint("awq")
    parts, _ = CASES["awq"][1](packed.tensors.pop("lm_head.weight"))
    packed.tensors.update({f"lm_head.{part}": array for part, array in parts.items()})
    with caplog.at_level(logging.WARNING):
        loaded(packed.write(tmp_path / "m", tie_word_embeddings=True), "float32")
    assert "lm_head.weight is left unused, though it differs" in caplog.text


def test_quantised_gpt2_is_refused(tmp_path: Path):
    folder = checkpoint("awq").write(tmp_path / "m", architectures=["GPT2LMHeadModel"])
    with pytest.raises(ConfigError, match=r"quantization_config must be absent.*GPT2LMHeadModel"):
        open_model(folder, weights=False)
