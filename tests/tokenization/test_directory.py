"""Tokenizers of directories: each malformed file is refused with its name and the fault."""

import copy
import json

import pytest

from jaxinfer.errors import TokenizerError
from jaxinfer.tokenizer import Tokenizer, from_directory

WORDS = ["a", "b", "c", "ab", "<eos>"]
GOOD = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": 4,
            "content": "<eos>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
    "post_processor": None,
    "decoder": {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    },
    "model": {
        "type": "BPE",
        "vocab": {word: i for i, word in enumerate(WORDS)},
        "merges": [["a", "b"]],
    },
}
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}


def changed(**paths):
    """GOOD with the value at `section__key` replaced."""
    content = copy.deepcopy(GOOD)
    for path, value in paths.items():
        *above, last = path.split("__")
        place = content
        for name in above:
            place = place[name]
        place[last] = value
    return content


def write(folder, content=GOOD, config=CONFIG):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "tokenizer.json").write_text(text)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def refused(folder, *words):
    with pytest.raises(TokenizerError) as caught:
        from_directory(folder)
    for word in (str(folder), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("config", [CONFIG, None])
def test_good_directory(tmp_path, config):
    tokenizer = from_directory(write(tmp_path, config=config))
    assert isinstance(tokenizer, Tokenizer) and tokenizer.vocab_size == 5 and tokenizer.bytewise
    assert tokenizer.encode("abc<eos>") == [3, 2, 4]
    assert tokenizer.decode([3, 2, 4]) == "abc" and tokenizer.all_special_ids == {4}
    assert tokenizer.eos_token_id == (4 if config else None)


def test_missing_files(tmp_path):
    refused(tmp_path / "nowhere", "not a directory")
    refused(tmp_path, "tokenizer.json", "not found", "tokenizer=")
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01")
    refused(tmp_path, "tokenizer.model", "convert")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["line 1, column 1"]),
        ("{", ["line 1, column 2"]),
        ('{\n "a": 1,\n}', ["line 3, column 1"]),
        ("[]", ["object", "list"]),
        ("{}", ['"model"']),
        ("NaN", ["NaN"]),
        ("[" * 100_000, ["tokenizer.json"]),
    ],
)
def test_not_a_tokenizer(tmp_path, text, words):
    refused(write(tmp_path, text), *words)


def test_not_utf8(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    refused(tmp_path, "tokenizer.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed(model__vocab={"a": 0, "b": 0}), ["'a'", "'b'", "id 0"]),
        (changed(model__vocab={"a": -1}), ["'a'", "-1"]),
        (changed(model__vocab={"a": 1.5}), ["'a'", "1.5"]),
        (changed(model__vocab={}), ["empty"]),
        (changed(model__vocab=7), ["model.vocab"]),
        (changed(model__merges=[["a", "x"]]), ["merges[0]", "'x'"]),
        (changed(model__merges=[["a", "b", "c"]]), ["merges[0]", "two tokens"]),
        (changed(model__merges=["a"]), ["merges[0]", "two tokens"]),
        (changed(model__merges=[["b", "c"]]), ["merges[0]", "'bc'"]),
        (changed(added_tokens=[{"id": 0, "content": "new"}]), ["'new'", "'a'"]),
        (changed(added_tokens=[{"id": 9, "content": "a"}]), ["'a'", "9"]),
        (changed(added_tokens=[{"content": "new"}]), ["added token"]),
        (changed(added_tokens=[{"id": "5", "content": "new"}]), ["added token"]),
        (changed(pre_tokenizer={"type": "Nonsense"}), ["tokenizers 0."]),
        (changed(normalizer={"type": "Nonsense"}), ["tokenizers 0."]),
        (
            changed(
                pre_tokenizer={
                    "type": "Split",
                    "pattern": {"Regex": "(("},
                    "behavior": "Isolated",
                    "invert": False,
                }
            ),
            ["tokenizers 0."],
        ),
    ],
)
def test_contradictory_files(tmp_path, content, words):
    refused(write(tmp_path, content), *words)


def test_added_id_with_a_gap(tmp_path):
    token = {**GOOD["added_tokens"][0], "id": 999, "content": "<far>"}
    refused(write(tmp_path, changed(added_tokens=[*GOOD["added_tokens"], token])), "<far>", "999")


def test_eos_that_is_not_in_the_vocabulary(tmp_path):
    refused(write(tmp_path, config={**CONFIG, "eos_token": "<other>"}), "eos_token", "<other>")


def test_code_of_the_directory_is_never_run(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass T: pass\n")
    write(tmp_path, config={**CONFIG, "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}})
    try:
        from_directory(tmp_path)
    except TokenizerError as error:
        assert str(tmp_path) in str(error)
    assert not canary.exists()


def test_a_catastrophic_regex_ends_in_an_error(tmp_path):
    """The regex library panics at its retry limit; the tokenizer works on afterwards."""
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    content = changed(pre_tokenizer={**split, "pattern": {"Regex": "(a|a|ab)+$"}})
    tokenizer = from_directory(write(tmp_path, content))
    with pytest.raises(TokenizerError, match="encoding a text failed"):
        tokenizer.encode("a" * 60 + "c")
    assert tokenizer.encode("ab") == [3]


def test_named_chat_templates(tmp_path):
    named = [
        {"name": n, "template": f"{n}:{{{{ messages[0].content }}}}"} for n in ("default", "../x")
    ]
    tokenizer = from_directory(write(tmp_path, config={**CONFIG, "chat_template": named}))
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages) == "default:Hi"
    assert tokenizer.apply_chat_template(messages, chat_template="../x") == "../x:Hi"
    (tmp_path / "chat_template.jinja").write_text("file:{{ messages[0].content }}")
    assert from_directory(tmp_path).apply_chat_template(messages) == "file:Hi"


@pytest.mark.parametrize("template", [5, [5], [{"name": "a"}], {"a": "b"}])
def test_malformed_chat_templates(tmp_path, template):
    refused(write(tmp_path, config={**CONFIG, "chat_template": template}), "chat_template")
