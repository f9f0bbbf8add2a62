"""The `jaxinfer` command: what it reads and prints, and its exit status."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer import LLM, cli
from jaxinfer.cli_commands import Sampling
from jaxinfer.runner import Runner
from tests.helpers import tiny_llm, write_tiny_model

OPTIONS = (
    "--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--page-size", "8",
    "--num-pages", "128", "--compilation-cache-dir", "None",
)  # fmt: skip
LETTERS = list(range(32, 90))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def texts(model) -> dict[str, str]:
    """What LLM generates greedily for the prompts below, 8 tokens each."""
    with tiny_llm(model, max_num_seqs=2, max_num_batched_tokens=32) as llm:
        params = Sampling(max_tokens=8).params()
        outputs = llm.generate(["one", "two words", "dritté"], params)
        return {o.prompt: o.outputs[0].text for o in outputs}


@pytest.fixture
def run_fresh(model, capsys, monkeypatch):
    """run(command, *arguments, stdin=bytes) -> (status, standard output, standard error)."""

    def run(command: str, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        try:
            status = cli.main([command, "--model", str(model), *OPTIONS, *arguments])
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def kept():
    """Engines by their options, so that not every command compiles its own."""
    engines: dict[str, LLM] = {}
    yield engines
    for llm in engines.values():
        llm.close()


@pytest.fixture
def run(run_fresh, kept, monkeypatch):
    """As run_fresh, but commands with equal engine options share an engine."""

    def open_kept(**options):
        key = repr(sorted(options.items()))
        if key not in kept:
            kept[key] = LLM(**options)
        kept[key].reset_prefix_cache()
        return contextlib.nullcontext(kept[key])

    monkeypatch.setattr(cli, "LLM", open_kept)
    return run_fresh


EIGHT = ("--max-tokens", "8")


# -- generate --------------------------------------------------------------------------


def test_one_prompt_is_streamed(run_fresh, texts):
    assert run_fresh("generate", "one", *EIGHT) == (0, texts["one"] + "\n", "")


def test_streaming_flushes_each_piece(run, texts, monkeypatch):
    pieces = []
    real = cli._stream_text

    def watch(*args):
        for text in real(*args):
            pieces.append(text)
            yield text

    monkeypatch.setattr(cli, "_stream_text", watch)
    run("generate", "one", *EIGHT)
    assert "".join(pieces) == texts["one"]
    assert len(pieces) > 1


def test_several_prompts_as_text(run, texts):
    status, out, err = run("generate", "one", "two words", *EIGHT)
    assert (status, err) == (0, "")
    assert out == "".join(
        f"[{i}] {p!r} -> {texts[p]!r}\n" for i, p in enumerate(["one", "two words"])
    )


def test_json_lines(run, texts):
    status, out, err = run(
        "generate", "one", "two words", "--output-format", "jsonl", "--logprobs", "1",
        "--prompt-logprobs", "0", *EIGHT,
    )  # fmt: skip
    assert (status, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["index"] for r in records] == [0, 1]
    assert [r["prompt"] for r in records] == ["one", "two words"]
    assert [r["outputs"][0]["text"] for r in records] == [texts["one"], texts["two words"]]
    first = records[0]
    sample = first["outputs"][0]
    assert (first["num_prompt_tokens"], first["error"]) == (3, None)
    assert sample["finish_reason"] == "length"
    assert len(sample["token_ids"]) == len(sample["logprobs"]) == 8
    chosen = sample["logprobs"][0][str(sample["token_ids"][0])]
    assert set(chosen) == {"logprob", "rank", "decoded_token"}
    assert [p is None for p in first["prompt_logprobs"]] == [True, False, False]


def test_one_prompt_as_json(run, texts):
    out = run("generate", "one", "--output-format", "jsonl", *EIGHT)[1]
    assert json.loads(out)["outputs"][0]["text"] == texts["one"]


def test_samples_are_labelled(run):
    status, out, _ = run("generate", "one", "--n", "2", "--temperature", "1", *EIGHT)
    assert status == 0
    assert [line.split("]")[0] for line in out.splitlines()] == ["[0.0", "[0.1"]


def test_prompts_from_a_text_file(run, texts, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\n  \ntwo words\ndritté".encode())
    status, out, err = run("generate", "--input", str(path), "--output-format", "jsonl", *EIGHT)
    assert (status, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    assert {r["prompt"]: r["outputs"][0]["text"] for r in records} == texts
    assert list(texts) == [r["prompt"] for r in records]


def test_prompts_from_json_lines(run, texts, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n"two words"\n')
    status, out, _ = run("generate", "--input", str(path), "--output-format", "jsonl", *EIGHT)
    assert status == 0
    got = [json.loads(line)["outputs"][0]["text"] for line in out.splitlines()]
    assert got == [texts["one"], texts["two words"]]


@pytest.mark.parametrize("arguments", [(), ("--input", "-")])
def test_prompts_from_standard_input(run, texts, arguments):
    assert run("generate", *arguments, *EIGHT, stdin=b"one\n") == (0, texts["one"] + "\n", "")


def test_sampling_flags_reach_the_request(run, texts, model):
    with tiny_llm(model, max_num_seqs=2, max_num_batched_tokens=32) as llm:
        text = llm.generate("one", Sampling(max_tokens=8).params())[0].outputs[0].text
        word = llm.get_tokenizer().decode([70])
        assert text == texts["one"]
    status, out, _ = run("generate", "--stop", text[2], "--stop", "zzz", "one", *EIGHT)
    assert (status, out) == (0, text[: text.index(text[2])] + "\n")
    assert word not in run("generate", "one", "--bad-words", word, *EIGHT)[1]


def test_seed_repeats_a_run(run_fresh):
    random = ("--temperature", "1", *EIGHT)
    first = run_fresh("generate", "one", "--seed", "1", *random)
    assert run_fresh("generate", "one", "--seed", "1", *random) == first
    assert run_fresh("generate", "one", "--seed", "2", *random)[1] != first[1]


def test_overrides_are_json(run, texts):
    status, out, _ = run("generate", "one", "--hf-overrides", '{"rope_theta": 3.0}', *EIGHT)
    assert status == 0 and out != texts["one"] + "\n"
    assert run("generate", "one", "--hf-overrides", "{")[0] == 2
    status, _, err = run("generate", "one", "--hf-overrides", "[]")
    assert status == 2
    assert "hf_overrides must be a dict" in err


def test_speculative_config_is_json(run, texts):
    config = '{"method": "ngram", "num_speculative_tokens": 3}'
    flag = "--speculative-config"
    assert run("generate", "one", flag, config, *EIGHT) == (0, texts["one"] + "\n", "")
    for wrong, message in (
        ('{"method": "eagle", "num_speculative_tokens": 3}', "method must be one of"),
        ('{"method": "ngram", "num_speculative_tokens": 0}', "num_speculative_tokens must be"),
        ("[]", "must be a dictionary"),
    ):
        status, out, err = run("generate", "one", flag, wrong)
        assert (status, out) == (2, "")
        assert "speculative_config" in err and message in err and "Traceback" not in err
    assert run("generate", "one", flag, "{")[0] == 2


def test_verbose_is_told_on_standard_error(run, texts):
    status, out, err = run("generate", "one", "--verbose", "True", *EIGHT)
    assert (status, out) == (0, texts["one"] + "\n")
    assert "memory plan:" in err


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_kv_cache_dtype(run_fresh, model, dtype):
    with tiny_llm(model, max_num_seqs=2, max_num_batched_tokens=32, kv_cache_dtype=dtype) as llm:
        text = llm.generate("two words", Sampling(max_tokens=8).params())[0].outputs[0].text
    found = run_fresh("generate", "two words", "--kv-cache-dtype", dtype, *EIGHT)
    assert found == (0, text + "\n", "")


def test_another_kv_cache_dtype_is_refused_with_the_list(run_fresh):
    status, out, err = run_fresh("generate", "one", "--kv-cache-dtype", "int4", *EIGHT)
    assert (status, out) == (2, "")
    assert "kv-cache-dtype" in err and "int8" in err and "fp8" in err


# -- exit status -----------------------------------------------------------------------


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


# -- chat ------------------------------------------------------------------------------


def chat_answers(model, *turns: str, system: str | None = None) -> list[str]:
    """The answers of LLM.chat to `turns`, one conversation."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    with tiny_llm(model, max_num_seqs=2, max_num_batched_tokens=32) as llm:
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            output = llm.chat(messages, Sampling(max_tokens=8).params())[0]
            answers.append(output.outputs[0].text)
            messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_chat_keeps_the_conversation(run, model):
    want = chat_answers(model, "hello", "and then?")
    status, out, err = run("chat", *EIGHT, stdin=b"hello\n\nand then?\n")
    assert (status, err) == (0, "")
    assert out == "".join(answer + "\n" for answer in want)


def test_chat_reset_exit_and_system(run, model):
    first = chat_answers(model, "hello", system="be brief")[0]
    assert first != chat_answers(model, "hello")[0]
    typed = b"hello\n/reset\nhello\n/exit\nnever read\n"
    status, out, err = run("chat", "--system", "be brief", *EIGHT, stdin=typed)
    assert (status, out, err) == (0, (first + "\n") * 2, "")


def test_chat_goes_on_after_a_turn_that_fails(run, model):
    want = chat_answers(model, "hello")[0]
    typed = ("x" * 3000 + "\nhello\n").encode()
    status, out, err = run("chat", *EIGHT, stdin=typed)
    assert (status, out) == (1, want + "\n")
    assert err.startswith("error: ")
    assert "/reset starts again" in err


def test_chat_help_and_bad_input(run):
    status, out, err = run("chat", stdin=b"/help\n")
    assert (status, out) == (0, "")
    assert "/reset" in err
    status, _, err = run("chat", stdin=b"\xff\xfe\n")
    assert status == 2
    assert "standard input: not UTF-8" in err
    assert run("chat", stdin=b"") == (0, "", "")


# -- help and processes ----------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_tells_every_flag(run, command):
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    for flag in ("--model", "--temperature", "--max-tokens", "--stop", "--max-num-seqs", "--seed",
                 "--hf-overrides", "--enable-prefix-caching", "--verbose"):  # fmt: skip
        assert flag in out
    assert ("--system" in out) == (command == "chat")
    assert "engine:" not in out  # no option has become a subcommand
    assert "Traceback" not in out


def process(*arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jaxinfer", *arguments],
        input=stdin, capture_output=True, timeout=300, cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_module_help():
    done = process("--help")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"generate" in done.stdout and b"chat" in done.stdout
    assert process().returncode == 2


def test_a_reader_that_leaves_is_no_error(model, texts):
    """`jaxinfer ... | head`: no traceback. And a whole run as a process is quiet."""
    arguments = ["generate", "--model", str(model), *OPTIONS, "one", *EIGHT]
    done = process(*arguments)
    assert (done.returncode, done.stdout.decode()) == (0, texts["one"] + "\n")
    assert done.stderr == b""
    read, write = os.pipe()
    os.close(read)
    left = subprocess.run(
        [sys.executable, "-m", "jaxinfer", *arguments],
        stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, timeout=300,
        cwd=Path(__file__).resolve().parents[1], env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    os.close(write)
    assert (left.returncode, left.stderr) == (0, b"")
