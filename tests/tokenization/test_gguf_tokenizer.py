"""Malformed GGUF tokenizer metadata is refused with the field's name; the rest of it is obeyed."""

import numpy as np
import pytest

from jaxinfer.errors import TokenizerError
from jaxinfer.tokenizer import check_vocab, from_gguf

TOKENS = 804


def refused(metadata, *words):
    with pytest.raises(TokenizerError) as caught:
        from_gguf(metadata, "some.gguf")
    for word in ("some.gguf", *words):
        assert word in str(caught.value)


def test_arrays_may_be_numpy(bpe):
    types = np.array(bpe()["tokenizer.ggml.token_type"], np.int32)
    tokenizer = from_gguf(bpe(pre="gpt-2", token_type=types))
    assert tokenizer.vocab_size == len(types) == TOKENS
    assert tokenizer.decode(tokenizer.encode("the end")) == "the end"


@pytest.mark.parametrize("name", ["model", "tokens", "merges"])
def test_missing_field(bpe, name):
    refused(bpe(pre="gpt-2", **{name: None}), f"tokenizer.ggml.{name}")


def test_unknown_kinds_ask_for_a_tokenizer(bpe):
    refused(bpe(pre="no-such"), "tokenizer.ggml.pre", "'no-such'", "smollm", "tokenizer=")
    refused(bpe(model="bert"), "tokenizer.ggml.model", "'bert'", "tokenizer=")


@pytest.mark.parametrize("name", ["token_type", "scores"])
@pytest.mark.parametrize("length", [0, TOKENS - 1, TOKENS + 1])
def test_lengths_agree(bpe, name, length):
    refused(bpe(pre="gpt-2", **{name: [1] * length}), name, str(length), str(TOKENS))


@pytest.mark.parametrize("name", ["bos", "eos", "unknown", "padding"])
@pytest.mark.parametrize("value", [-1, TOKENS, 2**40, 1.0, True, "1"])
def test_special_ids_are_in_the_vocabulary(bpe, name, value):
    refused(bpe(pre="gpt-2", **{f"{name}_token_id": value}), f"{name}_token_id", repr(value))


@pytest.mark.parametrize(
    ("tokens", "word"),
    [([], "tokens"), (["a", "a"], "repeats"), (["a", 5], "tokens[1]"), (["a", b"\xff"], "UTF-8")],
)
def test_bad_tokens(bpe, tokens, word):
    refused(bpe(pre="gpt-2", tokens=tokens, token_type=None, merges=[]), word)


def test_huge_token(bpe):
    tokens = ["a", "b" * 1_000_001]
    refused(bpe(pre="gpt-2", tokens=tokens, token_type=None, merges=[]), "tokens[1]", "bytes")


@pytest.mark.parametrize(
    ("merge", "word"),
    [("a", "two tokens"), ("a b c", "two tokens"), (7, "two tokens"), ("a QQQ", "'QQQ'")],
)
def test_bad_merges(bpe, merge, word):
    refused(bpe(pre="gpt-2", merges=[merge]), "merges[0]", word)


def test_repeated_merge(bpe):
    first = bpe()["tokenizer.ggml.merges"][0]
    refused(bpe(pre="gpt-2", merges=[first, first]), "merges[1]", "repeats")


@pytest.mark.parametrize("kind", [-1, 7, 1.5, "1"])
def test_bad_token_type(bpe, kind):
    refused(bpe(pre="gpt-2", token_type=[1] * (TOKENS - 1) + [kind]), f"token_type[{TOKENS - 1}]")


def test_sentencepiece_needs_scores_and_bytes(spm):
    refused(spm(scores=None), "scores")
    count = len(spm()["tokenizer.ggml.tokens"])
    refused(spm(scores=[float("nan")] * count), "scores[0]")
    tokens = ["x" if t == "<0x41>" else t for t in spm()["tokenizer.ggml.tokens"]]
    tokens[tokens.index("x")] = "lost"
    refused(spm(tokens=list(dict.fromkeys(tokens))), "tokenizer.ggml.t")


def test_bos_that_is_missing(bpe):
    refused(bpe(pre="llama-bpe"), "bos_token_id")
    refused(bpe(pre="gpt-2", add_eos_token=True), "eos_token_id")
    refused(bpe(pre="gpt-2", add_bos_token=1), "add_bos_token")


def test_ends_are_added_only_when_asked(bpe):
    tokenizer = from_gguf(
        bpe(pre="gpt-2", bos_token_id=0, eos_token_id=1, add_bos_token=True, add_eos_token=True)
    )
    bare = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.encode("the") == [0, *bare, 1]
    assert tokenizer.encode("") == [0, 1]
    assert tokenizer.encode("", add_special_tokens=False) == []


def test_special_and_user_defined_tokens(bpe):
    tokenizer = from_gguf(bpe(pre="gpt-2"))
    names = bpe()["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("a<|eot_id|>b<tool>c")
    assert names.index("<|eot_id|>") in ids and names.index("<tool>") in ids
    assert tokenizer.decode(ids) == "ab<tool>c"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|eot_id|>b<tool>c"


def test_tokenizer_larger_than_the_embedding(bpe):
    tokenizer = from_gguf(bpe(pre="gpt-2"), "some.gguf")
    check_vocab(tokenizer, TOKENS)
    check_vocab(tokenizer, TOKENS + 100)
    with pytest.raises(TokenizerError, match=f"{TOKENS - 1}.*{TOKENS - 1} rows"):
        check_vocab(tokenizer, TOKENS - 1)
