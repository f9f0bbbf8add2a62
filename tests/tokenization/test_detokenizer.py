"""Incremental text equals whole text for any bytes and grouping; stop strings cut it right."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxinfer.detokenizer import Detokenizer
from jaxinfer.tokenizer import Tokenizer, from_gguf
from tests.tokenization.byte_tokenizer import ByteTokenizer
from tests.tokenization.conftest import golden, metadata_of

BYTES = ByteTokenizer(vocab_size=300)
FEW = settings(max_examples=100, deadline=None)
ODD = ["é", "漢字", "👨\u200d👩\u200d👧", "🇫🇷", " ", "  ", "\n", "a", "the", "\ufffd", "e\u0301"]


def word_pieces() -> Tokenizer:
    """A tokenizer that is not bytewise: its decoder puts spaces between words."""
    words = ["[UNK]", "the", "cat", "##s", "sat", "[A]", "[B]", "\ufffd", "##\ufffd", "\u00e9"]
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    backend.add_special_tokens(["[A]", "[B]"])
    return Tokenizer(backend)


def byte_pieces() -> Tokenizer:
    """Byte tokens under a decoder that is not known to be bytewise, so a window decodes them."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581the", "\u2581cat", "s"]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return Tokenizer(backend)


KINDS = {
    "bpe": from_gguf(metadata_of("gpt2", golden("bpe_vocabulary"), pre="gpt-2")),
    "spm": from_gguf(metadata_of("llama", golden("spm_vocabulary"))),
    "spm bare": from_gguf(metadata_of("llama", golden("spm_vocabulary"), add_space_prefix=False)),
    "bytes": BYTES,
    "words": word_pieces(),
}


def chunks(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    """`ids` cut into pieces, some of them empty."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def run(tokenizer, pieces, prompt=(), **options) -> tuple[Detokenizer, list[str]]:
    made = Detokenizer(tokenizer, prompt, **options)
    deltas = []
    for piece in pieces:
        made.push(piece)
        deltas.append(made.delta())
    made.flush()
    deltas.append(made.delta())
    assert "".join(deltas) == made.text and made.delta() == ""
    return made, deltas


@pytest.mark.parametrize("name", KINDS)
@FEW
@given(data=st.data())
def test_incremental_equals_whole_for_random_ids(name, data):
    tokenizer = KINDS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    made, _ = run(tokenizer, chunks(data, ids), skip_special_tokens=skip)
    assert made.text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["bpe", "spm", "spm bare", "bytes"])
@FEW
@given(data=st.data())
def test_incremental_equals_whole_for_random_bytes(name, data):
    """Bytes that are often not UTF-8, or UTF-8 cut anywhere, each as its own token."""
    tokenizer = KINDS[name]
    singles = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    raw = data.draw(st.one_of(st.binary(max_size=24), st.text(max_size=10).map(str.encode)))
    raw = raw[data.draw(st.integers(0, 3)) :]
    ids = [singles[bytes([byte])] for byte in raw if bytes([byte]) in singles]
    made, _ = run(tokenizer, chunks(data, ids), skip_special_tokens=False)
    assert made.text == tokenizer.decode(ids, skip_special_tokens=False)


@FEW
@given(data=st.data())
def test_incremental_equals_whole_for_the_default_model(default_tokenizer, data):
    parts = data.draw(st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=4)), max_size=10))
    ids = default_tokenizer.encode("".join(parts), add_special_tokens=False)
    ids = data.draw(st.permutations(ids)) if data.draw(st.booleans()) else ids
    made, deltas = run(default_tokenizer, chunks(data, ids))
    assert made.text == default_tokenizer.decode(ids)
    backend = default_tokenizer.backend
    assert made.text == backend.decode(ids, skip_special_tokens=True)
    for delta in deltas:
        delta.encode()


@pytest.mark.parametrize("name", ["bpe", "spm", "spm bare"])
@FEW
@given(data=st.data())
def test_text_after_a_prompt(name, data):
    """Text continues the prompt's: the leading space stays, no character of it is repeated."""
    tokenizer = KINDS[name]
    prompt = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    before = tokenizer.decode(prompt)
    made, _ = run(tokenizer, chunks(data, ids), prompt)
    whole = tokenizer.decode(prompt + ids)
    if not before.endswith("\ufffd"):
        assert made.text == whole[len(before) :]
    else:
        assert whole.endswith(made.text)


def test_prompt_that_ends_inside_a_character():
    """The bytes wait for their rest: no U+FFFD at the seam."""
    made, deltas = run(BYTES, [[0x98], [0x80], [33]], list("x😀".encode()[:-2]))
    assert deltas == ["", "😀", "!", ""] and made.text == "😀!"


VALID = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=3)


@FEW
@given(data=st.data(), texts=st.lists(st.one_of(st.integers(256, 258), VALID)))
def test_window_holds_back_half_characters(data, texts):
    """For valid UTF-8: the library itself decodes a run of byte tokens as a whole."""
    tokenizer = byte_pieces()
    assert not tokenizer.bytewise
    ids = [i for t in texts for i in ([t] if isinstance(t, int) else t.encode())]
    made, deltas = run(tokenizer, [[i] for i in ids])
    assert made.text == tokenizer.decode(ids)
    assert not any("\ufffd" in delta for delta in deltas)
    assert run(tokenizer, chunks(data, ids))[0].text == made.text and len(deltas) == len(ids) + 1


def test_half_a_character_is_held_back_until_the_end():
    made = Detokenizer(BYTES)
    made.push(list("é".encode()[:1]))
    assert made.text == made.delta() == ""
    made.flush()
    assert made.text == made.delta() == "\ufffd"
    made.flush()
    made.push([65])
    assert made.text == "\ufffd"


def test_ids_past_the_vocabulary_are_empty():
    for tokenizer in KINDS.values():
        made, _ = run(tokenizer, [[1, tokenizer.vocab_size + 5, 10**6]])
        assert made.text == run(tokenizer, [[1]])[0].text


def test_detokenize_false():
    made, deltas = run(BYTES, [[65, 66]], detokenize=False)
    assert made.text == "" and set(deltas) == {""} and made.stopped_by is None


def test_spaces_between_special_tokens():
    words = KINDS["words"]
    ids = [1, 5, 6, 2]
    apart, _ = run(words, [ids], skip_special_tokens=False)
    close, _ = run(words, [ids], skip_special_tokens=False, spaces_between_special_tokens=False)
    assert apart.text == words.decode(ids, False) == "the [A] [B] cat"
    assert close.text == words.decode(ids, False, False) == "the [A][B] cat"


def first_stop(text: str, stops: list[str]) -> tuple[str, str] | None:
    """(text before, stop): the slow and obvious rule. The first end counts, then the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return None


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(),
    text=st.text("abé漢", max_size=20),
    stops=st.lists(st.text("abé漢", min_size=1, max_size=4), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings_cut_the_same_for_any_grouping(data, text, stops, include):
    ids = list(text.encode())
    expected = first_stop(text, stops)
    options = {"stop": stops, "include_stop_str_in_output": include}
    made, deltas = run(BYTES, chunks(data, ids), **options)
    if expected is None:
        assert made.stopped_by is None and made.text == text
        return
    before, stop = expected
    assert made.stopped_by == stop
    assert made.text == (before + stop if include else before)
    assert "".join(deltas) == made.text


@FEW
@given(data=st.data(), text=st.text("ab", max_size=16))
def test_stop_strings_in_tokens_of_several_characters(data, text):
    tokenizer = KINDS["bpe"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    stops = data.draw(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3))
    made, _ = run(tokenizer, chunks(data, ids), stop=stops)
    expected = first_stop(text, stops)
    assert (made.text, made.stopped_by) == (expected or (text, None))


@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, ""), (1, ""), (2, "ab"), (3, "abx"), (5, "abxab")]
)
def test_min_tokens(min_tokens, text):
    """A stop string that the first min_tokens tokens complete is ordinary text."""
    made, _ = run(BYTES, [[byte] for byte in b"abxab"], stop=["ab", "x"], min_tokens=min_tokens)
    assert made.text == text


def test_min_tokens_covers_every_token_up_to_it():
    made, _ = run(BYTES, [list(b"ababab")], stop=["ab"], min_tokens=5)
    assert made.text == "abab" and made.stopped_by == "ab"


def test_no_part_of_a_stop_string_is_given_out():
    made = Detokenizer(BYTES, stop=["STOP"])
    seen = []
    for byte in b"go STOcks STOP never":
        made.push([byte])
        seen.append(made.delta())
    assert "".join(seen) == made.text == "go STOcks "
    assert seen[3:7] == ["", "", "", "STOc"]


def test_what_is_held_back_comes_at_the_end():
    made = Detokenizer(BYTES, stop=["STOP"])
    made.push(list(b"STO"))
    assert made.delta() == "" and made.text == "STO"
    made.flush()
    assert made.delta() == "STO" and made.stopped_by is None


def test_long_outputs_take_linear_time():
    tokenizer = KINDS["spm"]
    choose = random.Random(0)
    ids = [choose.randrange(300, tokenizer.vocab_size) for _ in range(20_000)]
    made, _ = run(tokenizer, [[token] for token in ids], stop=["never in it"])
    assert made.text == tokenizer.decode(ids)
