"""`jaxinfer generate`: what it reads and prints."""

import json

import pytest

from jaxinfer import cli
from jaxinfer.cli_commands import Sampling
from tests.cli.flags import EIGHT
from tests.helpers import tiny_llm


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
