"""The table of block sizes: what a file may hold, how it is asked, and how tools try others."""

import json
from dataclasses import fields, replace

import pytest

from pallas_kernels import tuning
from pallas_kernels.aot_targets import CHIPS
from pallas_kernels.flash_attention import mosaic_gpu, tpu_config
from pallas_kernels.paged_attention import mosaic_gpu_decode, mosaic_gpu_prefill, tpu_decode
from scripts import tune_kernels

KIND = "TPU v5 lite"
ENTRY = tuning.Entry(
    op="paged_attention",
    stage="decode",
    key={"head_dim": 128, "dtype": "int8"},
    config={"block": 512, "buffers": 3},
    source="static",
    score=12.5,
    versions={"jax": "0.11.2"},
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of tables, and no table remembered from another."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def write(*entries):
    tuning.file_of(KIND).write_text(tuning.render(KIND, entries))


def test_lookup_finds_equal_keys_only(folder):
    write(ENTRY)
    found = tuning.lookup(KIND, "paged_attention", "decode", dtype="int8", head_dim=128)
    assert found == {"block": 512, "buffers": 3}
    assert tuning.lookup(KIND, "paged_attention", "decode", head_dim=128) is None
    assert tuning.lookup(KIND, "paged_attention", "decode", dtype="int8", head_dim=64) is None
    assert tuning.lookup(KIND, "paged_attention", "prefill", dtype="int8", head_dim=128) is None
    assert tuning.lookup("TPU v4", "paged_attention", "decode", dtype="int8", head_dim=128) is None
    assert tuning.lookup(None, "paged_attention", "decode", dtype="int8", head_dim=128) is None


def test_what_is_rendered_is_parsed_and_does_not_depend_on_order(folder):
    other = replace(ENTRY, stage="prefill", source="measured", score=3)
    text = tuning.render(KIND, [ENTRY, other])
    assert text == tuning.render(KIND, [other, ENTRY])
    assert set(e.id for e in tuning.parse(text, "x", KIND)) == {ENTRY.id, other.id}
    assert ENTRY in tuning.parse(text, "x", KIND)
    assert tuning.parse(tuning.render(KIND, []), "x", KIND) == ()


def test_a_trial_answers_instead_of_the_table_and_records(folder):
    write(ENTRY)
    asked = {"dtype": "int8", "head_dim": 128}
    with tuning.trial({("paged_attention", "decode"): {"block": 64}}) as trial:
        assert tuning.lookup(KIND, "paged_attention", "decode", **asked) == {"block": 64}
        assert tuning.lookup(None, "flash_attention", "forward", head_dim=64) is None
    assert trial.asked == [ENTRY.id, ("flash_attention", "forward", (("head_dim", 64),))]
    assert tuning.lookup(KIND, "paged_attention", "decode", **asked) == ENTRY.config


BAD = {
    "op": ("matmul", "op is 'matmul'; allowed: flash_attention, paged_attention"),
    "stage": ("forward", "stage is 'forward'; allowed: decode, prefill"),
    "source": ("guess", "source is 'guess'; allowed: static, measured"),
    "score": (None, "score is None; it must be a number"),
    "key": ({"head_dim": 1.5}, "it must be an object of ints and strings"),
    "config": ({"block": -1}, "it must be an object of ints >= 0"),
    "versions": ({"jax": 11}, "it must be an object of strings"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_named(name):
    value, message = BAD[name]
    content = {"device_kind": KIND, "entries": [vars(ENTRY) | {name: value}]}
    with pytest.raises(ValueError, match=r"here, entry 0") as error:
        tuning.parse(json.dumps(content), "here", KIND)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("[]", 'must be an object with a list "entries"'),
        ('{"device_kind": "TPU v4", "entries": []}', "its name says 'TPU v5 lite'"),
        ('{"device_kind": "TPU v5 lite", "entries": [1]}', "entry 0 is 1; it must be an object"),
        ('{"device_kind": "TPU v5 lite", "entries": [{"op": ""}]}', "it must have"),
    ],
)
def test_a_bad_file_is_named(text, message):
    with pytest.raises(ValueError, match="here") as error:
        tuning.parse(text, "here", KIND)
    assert message in str(error.value)


def test_an_entry_may_be_there_once():
    text = tuning.render(KIND, [ENTRY, replace(ENTRY, score=1.0)])
    with pytest.raises(ValueError, match="entry 1: its op, stage and key were there before"):
        tuning.parse(text, "here", KIND)


def test_the_files_that_are_shipped_are_good():
    files = {path.name for path in tuning.FOLDER.glob("*.json")}
    kinds = {tuning.file_of(chip.device_kind).name: chip.device_kind for chip in CHIPS.values()}
    assert files <= kinds.keys()
    for name in files:
        found = tuning.entries(kinds[name])
        assert found
        text = (tuning.FOLDER / name).read_text()
        assert text == tuning.render(kinds[name], found), f"{name} is not as the tuner writes it"


CONFIGS = {
    ("tpu", "forward"): tpu_config.ForwardConfig,
    ("tpu", "decode"): tpu_decode.DecodeConfig,
    ("mosaic_gpu", "forward"): mosaic_gpu.ForwardConfig,
    ("mosaic_gpu", "backward"): mosaic_gpu.BackwardConfig,
    ("mosaic_gpu", "decode"): mosaic_gpu_decode.DecodeConfig,
    ("mosaic_gpu", "prefill"): mosaic_gpu_prefill.PrefillConfig,
}


@pytest.mark.parametrize("name", tune_kernels.SPACES)
def test_the_tuner_tries_what_the_kernels_have(name):
    impl, stage = name
    tried = tune_kernels.candidates(impl, tune_kernels.Case(stage, "Llama-3-8B"))
    assert len(tried) > 1
    for config in tried:
        # One that a kernel refuses by its value is skipped; one it has no field for is our fault.
        known = {field.name for field in fields(CONFIGS[name])}
        assert config.keys() <= known, (config, known)


def test_a_dry_run_says_what_would_be_tried(capsys, monkeypatch):
    monkeypatch.setattr(tune_kernels, "missing_compilers", lambda chips: [])
    assert tune_kernels.main(["--chip", "v5e", "--only", "decode", "--dry-run", "--again"]) == 0
    said = capsys.readouterr().out
    assert "paged_attention decode Llama-3-8B int8: 5 candidates for {" in said


def test_tuning_without_the_compiler_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(tune_kernels, "missing_compilers", lambda chips: ["pip install libtpu"])
    assert tune_kernels.main(["--chip", "v5e"]) == 2
    assert "pip install libtpu" in capsys.readouterr().err


def test_the_best_is_kept_only_where_it_beats_the_rule(capsys):
    case = tune_kernels.Case("decode", "Llama-3-8B")

    def score(chip, case, config):
        if config is None:
            return 10.0
        if config["block"] == 2048:
            raise ValueError("does not fit")
        return 20.0 - config["block"] / 64

    best = tune_kernels.tune(CHIPS["v5e"], "tpu", case, score, {"head_dim": 128})
    assert (best.config["block"], best.score, best.source) == (1024, 4.0, "measured")
    level = tune_kernels.tune(CHIPS["v5e"], "tpu", case, lambda *_: 10.0, {"head_dim": 128})
    assert level.config == {}
    assert "does not fit" in capsys.readouterr().out
