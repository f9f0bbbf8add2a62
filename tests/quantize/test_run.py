"""Whole runs on tiny models: what is written loads as it was chosen; stopping, going on, errors."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.models import build
from jaxinfer.quant.packed import PackedWeight
from jaxinfer.quantize import calibrate, layer, run
from jaxinfer.quantize.partial import FOLDER, Partial
from jaxinfer.quantize.run import quantize
from jaxinfer.quantize.settings import Request
from jaxinfer.weights import load, open_model
from jaxinfer.weights.packed_reader import PackedReader
from jaxinfer.weights.safetensors import QUANTISED, open_file
from pallas_kernels.dispatch import resolve
from scripts import quantize as script
from tests.helpers import greedy, tiny_llm, tiny_weights, write_tiny_model
from tests.quantize.test_formats import same

TEXT = " ".join(f"The {i}th fox jumps over {i * i} lazy dogs." for i in range(60))
SMALL: dict[str, Any] = {"num_sequences": 6, "sequence_length": 32}
CASES: dict[str, Request] = {
    "rtn": Request(method="rtn", group_size=16),
    "rtn-zeros": Request(method="rtn", group_size=48, symmetric=False),
    "rtn-8": Request(method="rtn", bits=8),
    "rtn-8-packed": Request(method="rtn", bits=8, layout="pack-quantized", group_size=24),
    "awq": Request(method="awq", group_size=16, **SMALL),
    "gptq": Request(method="gptq", group_size=16, **SMALL),
    "gptq-zeros": Request(method="gptq", symmetric=False, group_size=-1, act_order=False, **SMALL),
    "kv": Request(method="kv", **SMALL),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose hidden channels differ much in size, as those of real models do."""
    base = tmp_path_factory.mktemp("model")
    (base / "text.txt").write_text(TEXT)
    weights = tiny_weights(json.loads((write_tiny_model(base / "m") / "config.json").read_text()))
    weights["model.embed_tokens.weight"][:, 3] *= 8
    write_tiny_model(base / "m", weights=weights)
    (base / "m" / "LICENSE").write_text("as is")
    return base


def go(folder: Path, out: Path, request: Request) -> run.Summary:
    return quantize(folder / "m", out, request, calibration=folder / "text.txt", progress=False)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[str, PackedWeight]:
    """Every PackedWeight that a run chooses, by module."""
    weights: dict[str, PackedWeight] = {}
    quantise = layer.quantise

    def spy(*args: Any) -> layer.Packed:
        packed = quantise(*args)
        weights.update({weight.name: weight for weight in packed.weights.values()})
        return packed

    monkeypatch.setattr(layer, "quantise", spy)
    return weights


@pytest.mark.parametrize("case", [case for case in CASES if case != "kv"])
def test_what_was_chosen_is_what_loads(
    case: str, folder: Path, tmp_path: Path, chosen: dict[str, PackedWeight]
):
    request = CASES[case]
    summary = go(folder, tmp_path / "out", request)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert len(chosen) == 14
    with open_model(folder / "m") as plain, open_model(tmp_path / "out") as source:
        assert source.config == plain.config
        reader = source.reader
        assert isinstance(reader, PackedReader)
        assert reader.infos.keys() == plain.reader.infos.keys()
        for name, weight in chosen.items():
            got = reader.checkpoint.read(f"{name}.weight")
            same(got, weight)
            np.testing.assert_array_equal(got.dequantize(), weight.dequantize())
        unchanged = [n for n in plain.reader.infos if n not in reader.checkpoint.packed]
        assert len(unchanged) == 7
        for name in unchanged:
            if "layernorm" not in name or request.method != "awq":
                np.testing.assert_array_equal(reader.read(name), plain.reader.read(name))
    if request.method != "rtn":
        assert len(summary.errors) == 2
        means = {n: np.mean([e[n] for e in summary.errors], axis=0) for n in summary.errors[0]}
        assert all(own < nearest for own, nearest in means.values()), means


@pytest.mark.parametrize("case", ["awq", "gptq"])
def test_the_engine_runs_it(case: str, folder: Path, tmp_path: Path):
    go(folder, tmp_path / "out", CASES[case])
    with tiny_llm(tmp_path / "out", max_num_seqs=1) as llm:
        assert len(llm.generate("The quick", greedy())[0].outputs[0].token_ids) == 8


class Stopped(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("case", ["rtn", "awq", "gptq", "kv"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    request = CASES[case]
    go(folder, tmp_path / "whole", request)
    want = (tmp_path / "whole" / "model.safetensors").read_bytes()

    write = Partial.write
    for last in (1, 2, None):
        with monkeypatch.context() as patch:

            def stop(self: Partial, part: int, *rest: Any, last: int | None = last) -> None:
                write(self, part, *rest)
                if part == last:
                    raise Stopped

            patch.setattr(Partial, "write", stop)
            if last is None:
                go(folder, tmp_path / "out", request)
                continue
            with pytest.raises(Stopped):
                go(folder, tmp_path / "out", request)
            assert not (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == want
    assert not (tmp_path / "out" / FOLDER).exists()


def test_stopped_while_the_folder_is_put_in_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        rename, count = Path.rename, []

        def stop(self: Path, target: Path) -> Path:
            if Path(target).parent == out:
                count.append(target)
            if len(count) == 3:
                raise Stopped
            return rename(self, target)

        patch.setattr(Path, "rename", stop)
        with pytest.raises(Stopped):
            go(folder, out, CASES["rtn"])
    assert not (out / "config.json").exists()
    go(folder, out, CASES["rtn"])
    assert {"config.json", "model.safetensors"} <= {path.name for path in out.iterdir()}
    assert not (out / FOLDER).exists()
    with open_model(out) as source:
        assert source.quantised is not None


def test_other_arguments_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:

        def stop(*args: Any) -> None:
            raise Stopped

        patch.setattr(Partial, "finish", stop)
        with pytest.raises(Stopped):
            go(folder, tmp_path / "out", CASES["rtn"])
    with pytest.raises(ConfigError, match=r"group_size 16, now 48.*delete"):
        go(folder, tmp_path / "out", Request(method="rtn", group_size=48))
    go(folder, tmp_path / "out", CASES["rtn"])
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        go(folder, tmp_path / "out", CASES["rtn"])


def test_kv_scales(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """fp8 scales beside untouched weights; to a quantised checkpoint too."""
    go(folder, tmp_path / "gptq", CASES["gptq"])
    quantize(
        tmp_path / "gptq", tmp_path / "both", CASES["kv"],
        calibration=folder / "text.txt", progress=False,
    )  # fmt: skip
    go(folder, tmp_path / "kv", CASES["kv"])
    for before, after in (("gptq", "both"), (folder / "m", "kv")):
        old, new = (
            open_file(tmp_path / name / "model.safetensors", QUANTISED) for name in (before, after)
        )
        added = new.infos.keys() - old.infos.keys()
        attention = [f"model.layers.{i}.self_attn" for i in (0, 1)]
        assert added == {f"{a}.{s}" for a in attention for s in ("k_scale", "v_scale")}
        for name in old.infos:
            np.testing.assert_array_equal(new.read(name), old.read(name))
        assert all(new.read(name).shape == (1,) and new.read(name) > 0 for name in added)
        config = json.loads((tmp_path / after / "config.json").read_text())["quantization_config"]
        assert config["kv_cache_scheme"] == {
            "type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False,
            "symmetric": True,
        }  # fmt: skip
    assert config["quant_method"] == "compressed-tensors" and config["config_groups"] == {}
    with open_model(tmp_path / "both") as source:
        assert source.quantised is not None and source.quantised.method == "gptq"
    with open_model(tmp_path / "kv") as source:
        assert source.quantised is None
        model = build(source.config, resolve("reference"), "float32")
        with caplog.at_level(logging.WARNING):
            load(source, model, lambda array, path: array, progress=False)
        assert "4 static scales" in caplog.text


def test_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    go(folder, tmp_path / "one", CASES["rtn"])
    monkeypatch.setattr(run, "MAX_SHARD_BYTES", 20_000)
    go(folder, tmp_path / "many", CASES["rtn"])
    names = {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    assert names == {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    with open_model(tmp_path / "one") as one, open_model(tmp_path / "many") as many:
        assert one.reader.infos.keys() == many.reader.infos.keys()
        for name in one.reader.infos:
            np.testing.assert_array_equal(many.reader.read(name), one.reader.read(name))


@pytest.fixture
def left(tmp_path: Path) -> Iterator[Path]:
    """An output folder of which nothing is left."""
    yield tmp_path / "out"
    assert not (tmp_path / "out").exists()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "gguf"}, "one of rtn, awq"),
    "bits": ({"method": "awq", "bits": 8}, "bits must be 4 with method awq; got 8"),
    "group": ({"method": "rtn", "group_size": 64}, r"64 does not divide .*48, 96.*: .*16, 24, 48"),
    "default": ({"method": "rtn"}, "128, 64 and 32 do not divide"),
    "channel": ({"method": "rtn", "bits": 8, "group_size": 16}, "must be -1 in int-quantized"),
    "format": ({"method": "rtn", "layout": "gptq"}, "format must be pack-quantized"),
    "order": ({"method": "rtn", "act_order": True}, "act_order has no meaning"),
    "kv": ({"method": "kv", "group_size": 16}, "group_size has no meaning"),
    "short": ({"method": "gptq", "group_size": 16}, r"tokens, \d sequences of 512; 128 are asked"),
    "none": ({"method": "awq", "group_size": 16, "num_sequences": 0}, "an integer >= 1; got 0"),
    "long": ({"method": "awq", "group_size": 16, "sequence_length": 2000}, "1024 positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case: str, folder: Path, left: Path):
    fields, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        go(folder, left, Request(**fields))


@pytest.mark.parametrize("method", ["awq", "gptq", "kv"])
def test_a_text_is_needed(method: str, folder: Path, left: Path, tmp_path: Path):
    request = Request(method=method, group_size=None if method == "kv" else 16, **SMALL)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    for text, message in (
        (None, "none is bundled; pass a UTF-8 text"),
        (tmp_path / "absent.txt", "cannot be read"),
        (tmp_path / "latin.txt", r"not UTF-8 text \(byte 3\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantize(folder / "m", left, request, calibration=text, progress=False)


def test_models_that_are_refused(folder: Path, tmp_path: Path, left: Path):
    go(folder, tmp_path / "once", CASES["rtn"])
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(tmp_path / "once", left, CASES["rtn"], progress=False)
    write_tiny_model(tmp_path / "narrow", intermediate_size=92)
    with pytest.raises(ConfigError, match="multiples of 8; use rtn"):
        quantize(tmp_path / "narrow", left, Request(method="gptq", group_size=4), progress=False)


def break_weights(path: Path) -> None:
    weights = tiny_weights(json.loads((path / "config.json").read_text()))
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write_tiny_model(path, weights=weights)


def lose_weights(path: Path) -> None:
    weights = tiny_weights(json.loads((path / "config.json").read_text()))
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_tiny_model(path, weights=weights)


@pytest.mark.parametrize(
    ("change", "message"), [(break_weights, "NaN or infinity"), (lose_weights, "has no tensor")]
)
def test_nothing_is_left_of_a_run_that_fails(
    change: Callable[[Path], None], message: str, tmp_path: Path, left: Path
):
    model = write_tiny_model(tmp_path / "m")
    change(model)
    with pytest.raises(ConfigError, match=message):
        quantize(model, left, CASES["rtn"], progress=False)


def test_overflow_of_the_calibration_is_said(
    folder: Path, left: Path, monkeypatch: pytest.MonkeyPatch
):
    embed = calibrate.Layers.embed
    monkeypatch.setattr(calibrate.Layers, "embed", lambda *args: embed(*args) * np.float32(np.inf))
    with pytest.raises(ConfigError, match="layer 0 is given NaN or infinity"):
        go(folder, left, CASES["awq"])


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "out")
    options = ["--group-size", "16", "--num-sequences", "6", "--sequence-length", "32"]
    text = ["--calibration", str(folder / "text.txt")]
    assert script.main([str(folder / "m"), out, "--method", "awq", *options]) == 2
    assert "needs a calibration text" in capsys.readouterr().err
    assert script.main([str(folder / "m"), out, "--method", "awq", *options, *text]) == 0
    assert "rounding to nearest" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
