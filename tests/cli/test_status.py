"""The exit status of `jaxinfer`, and what is said of what went wrong."""

import json

import pytest

from jaxinfer import cli
from jaxinfer.runner import Runner
from tests.cli.flags import EIGHT, OPTIONS


def test_some_prompts_failed(run, texts):
    status, out, err = run("generate", "one", "x" * 2000, *EIGHT)
    assert status == 1
    assert out == f"[0] 'one' -> {texts['one']!r}\n"
    assert err.startswith("[1] error: the prompt has 2000 tokens") or "2000" in err
    status, out, err = run("generate", "one", "x" * 2000, "--output-format", "jsonl", *EIGHT)
    assert (status, err) == (1, "")
    records = [json.loads(line) for line in out.splitlines()]
    assert records[0]["error"] is None
    assert "2000" in records[1]["error"]
    assert records[1]["outputs"][0]["finish_reason"] == "error"


def test_a_prompt_that_is_not_unicode(run):
    """What a shell hands on as an unpaired surrogate."""
    assert run("generate", "\udcff")[0] == 2
    status, out, _ = run("generate", "one", "\udcff", "--output-format", "jsonl", *EIGHT)
    assert status == 1
    assert json.loads(out.splitlines()[1])["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "--temperature", "-1"), "temperature must be"),
        (("x", "--top-p", "nan"), "top_p must be"),
        (("x", "--n", "2"), "n must be 1 with temperature 0"),
        (("x", "--max-model-len", "5000"), "exceeds the model's 1024"),
        (("x", "--page-size", "7"), "page_size must be"),
        (("x", "--max-tokens", "100000"), "max_tokens"),
        (("",), "empty"),
        (("x" * 2000,), "2000 tokens"),
        (("x", "--input", "file"), "not both"),
        (("--input", "/no/such/file.txt"), "/no/such/file.txt"),
        (("--input", "/tmp"), "/tmp"),
        ((), "standard input has no prompts"),
        (("x", "--temprature", "1"), "temprature"),
        (("x", "--temperature", "warm"), "warm"),
        (("x", "--output-format", "xml"), "xml"),
        (("x", "--dtype", "int4"), "int4"),
    ],
    ids=lambda v: " ".join(v)[:30] if isinstance(v, tuple) else "",
)
def test_bad_arguments(run, arguments, message):
    status, out, err = run("generate", *arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "has no prompts"),
        ("p.txt", b"\n \n", "has no prompts"),
        ("p.txt", b"good\n\xff\xfe\n", "line 2: not UTF-8"),
        ("p.txt", b"good\n" + b"x" * (cli.MAX_LINE_BYTES + 1), "line 2: 2000001 bytes; at most"),
        ("p.jsonl", b'"good"\n{', "line 2: not JSON"),
        ("p.jsonl", b"5\n", "line 1: needs a string"),
        ("p.jsonl", b'{"prompt": 5}\n', "line 1: needs a string"),
        ("p.jsonl", b"{}\n", "line 1: needs a string"),
        ("p.jsonl", b'{"promt": "x"}\n', "did you mean 'prompt'"),
        ("p.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("p.jsonl", b"1" * 5_000, "line 1: not JSON"),
        ("p.jsonl", b'"\xff"', "line 1: not UTF-8"),
    ],
    ids=range(12),
)
def test_bad_files(run, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    status, out, err = run("generate", "--input", str(path))
    assert (status, out) == (2, "")
    assert message in err
    assert str(path) in err
    assert len(err) < 500


def test_bad_model_folder(run, tmp_path, capsys):
    assert cli.main(["generate", "x", "--model", str(tmp_path), *OPTIONS]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_dead_engine(run_fresh, monkeypatch):
    def broken(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Runner, "run", broken)
    for prompts in (["one"], ["one", "two"]):
        status, _, err = run_fresh("generate", *prompts)
        assert status == 3
        assert "the device is gone" in err


def test_interrupted(run_fresh, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "run", interrupted)
    for prompts in (["one"], ["one", "two"]):
        assert run_fresh("generate", *prompts)[::2] == (130, "interrupted\n")
