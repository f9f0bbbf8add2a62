"""Token ids equal llama.cpp's, stored by make_goldens.py, for every pre-tokenizer family."""

import pytest

from jaxinfer.tokenizer import from_gguf
from tests.tokenization.conftest import golden, metadata_of

SMALL = golden("small")


def test_default_model_tokenizes_as_llama_cpp(default_tokenizer):
    texts, expected = golden("texts"), golden("smollm2")
    assert len(texts) == len(expected) >= 200
    for text, ids in zip(texts, expected, strict=True):
        assert default_tokenizer.encode(text) == ids, repr(text)


@pytest.mark.parametrize("name", SMALL)
def test_small_vocabulary_tokenizes_as_llama_cpp(name):
    case = SMALL[name]
    lists = golden("bpe_vocabulary" if case["model"] == "gpt2" else "spm_vocabulary")
    tokenizer = from_gguf(metadata_of(case["model"], lists, **case["fields"]))
    texts = golden("texts")[::2][: len(case["ids"])]
    assert len(texts) == len(case["ids"]) >= 40
    for text, ids in zip(texts, case["ids"], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)


def test_families_differ():
    """The goldens tell the pre-tokenizers apart: each family has its own ids somewhere."""
    families = [str(case["ids"]) for name, case in SMALL.items() if name != "bpe ends"]
    assert len(set(families)) == len(families) >= 7


def test_text_survives_a_round_trip(default_tokenizer):
    """All texts but those with bytes that this vocabulary lacks."""
    lacking = set("\x04\x06\x13\x14\x16\x1d")
    kept = 0
    for text in golden("texts"):
        if lacking & set(text) or any(0x40000 <= ord(c) <= 0xBFFFF for c in text):
            continue
        ids = default_tokenizer.encode(text, add_special_tokens=False)
        assert default_tokenizer.decode(ids, skip_special_tokens=False) == text
        kept += 1
    assert kept > 280
