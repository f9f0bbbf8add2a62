"""The facade: what encode and decode refuse, and that hostile lengths stay cheap."""

import time

import pytest

from jaxinfer.errors import InvalidRequestError, TokenizerError
from jaxinfer.tokenizer import from_gguf
from jaxinfer.tokenizer_files import rust_errors
from tests.tokenization.byte_tokenizer import ByteTokenizer


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d \ude00"])
def test_lone_surrogates_are_refused(default_tokenizer, text):
    with pytest.raises(InvalidRequestError, match=r"surrogate \(U\+D"):
        default_tokenizer.encode(text)
    assert default_tokenizer.encode("ok")


@pytest.mark.parametrize("text", [None, 5, b"bytes", ["a"]])
def test_only_strings_are_encoded(default_tokenizer, text):
    with pytest.raises(InvalidRequestError, match="must be a string"):
        default_tokenizer.encode(text)


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "a\x00b",
        "\ufeffx",
        "\u202eabc",
        "\ufffe",
        "e" + "\u0301" * 1000,
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    ],
)
def test_odd_characters_round_trip(default_tokenizer, text):
    assert default_tokenizer.decode(default_tokenizer.encode(text)) == text


@pytest.mark.parametrize("token", [-1, 49152, 2**31, 2**40, 1.0, True, "1", None])
def test_decode_refuses_ids_outside_the_vocabulary(default_tokenizer, token):
    with pytest.raises(InvalidRequestError, match=r"ids\[1\].*0\.\.49151"):
        default_tokenizer.decode([5, token])


def test_token_text(default_tokenizer):
    texts = [
        default_tokenizer.token_text(t) for t in default_tokenizer.encode("Hi<|im_end|>\u2603")
    ]
    assert texts[:2] == ["Hi", "<|im_end|>"] and "\ufffd" in texts[2:]
    assert default_tokenizer.token_text(49152) == default_tokenizer.token_text(10**9) == ""


def test_ids_of_the_default_model(default_tokenizer):
    assert default_tokenizer.vocab_size == 49152
    assert default_tokenizer.bos_token_id == 1 and default_tokenizer.eos_token_id == 2
    assert default_tokenizer.all_special_ids == frozenset(range(17))


@pytest.mark.parametrize("unit", ["a", "\U0001f44d", " "])
def test_huge_texts_are_refused_by_length_alone(default_tokenizer, unit):
    text = unit * (2_000_000 // len(unit.encode()))
    start = time.process_time()
    limit = default_tokenizer.max_chars_for(2048)
    assert len(text) > limit
    assert time.process_time() - start < 1


def test_no_text_of_that_many_characters_fits(default_tokenizer):
    """The bound is never too low: the longest token, repeated, stays within it."""
    longest = max((default_tokenizer.token_text(i) for i in range(49152)), key=len)
    text = longest * 4
    assert len(text) <= default_tokenizer.max_chars_for(len(default_tokenizer.encode(text)))


def test_encoding_is_not_quadratic(default_tokenizer):
    def seconds(count):
        start = time.process_time()
        default_tokenizer.encode("a" * count)
        return time.process_time() - start

    seconds(1000)
    assert seconds(160_000) < 60 * max(seconds(10_000), 1e-3)


def test_bound_of_a_sentencepiece_vocabulary(spm):
    tokenizer = from_gguf(spm())
    longest = max(map(len, spm()["tokenizer.ggml.tokens"]))
    assert tokenizer.max_chars_for(10) == 10 * longest


class PanicException(BaseException):
    """Named and derived as the one that a panic in Rust raises."""


def test_panics_become_errors_and_interrupts_do_not():
    for error in (PanicException("retry-limit"), Exception("retry-limit")):
        doing = rust_errors("encoding", "f.json")
        with pytest.raises(TokenizerError, match=r"f\.json: encoding failed: retry-limit"), doing:
            raise error
    for kind in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(kind), rust_errors("encoding"):
            raise kind


def test_byte_tokenizer_has_the_same_methods(default_tokenizer):
    tokenizer = ByteTokenizer(vocab_size=300)
    public = {n for n in dir(default_tokenizer) if not n.startswith("_")} - {"backend"}
    assert public - set(dir(tokenizer)) == {"decode_whole"}
    ids = tokenizer.encode("h\u00e9<eos>")
    assert ids == [256, 104, 195, 169, 257] and tokenizer.decode(ids) == "h\u00e9"
    assert tokenizer.token_text(299) == "" and tokenizer.max_chars_for(2) >= 2
