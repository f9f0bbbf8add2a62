"""Builds a `tokenizers.Tokenizer` from a GGUF file's metadata; it tokenises as llama.cpp does.

Two vocabulary kinds are known: "gpt2" (byte-level BPE; `tokenizer.ggml.pre` names how words are
split) and "llama" (SentencePiece BPE: merges ordered by score, bytes for what has no token). Others
are refused: a wrong pre-tokenizer gives fluent but wrong ids. Metadata is validated before use.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from jaxinfer.errors import TokenizerError
from jaxinfer.tokenizer_files import rust_errors

MAX_TOKENS = 4_000_000
MAX_TOKEN_BYTES = 1_000_000
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type` (0 is "undefined")."""

_SPACE = "\u2581"
_NO_TOKEN = " no token "
"""Name of the entry for bytes without a token: no byte-level token has spaces in its name."""
_CONTRACTIONS = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """Regular expressions that split the text in turn, and what else the name implies."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3_PRE = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_DIGITS_PRE = PreTokenizer((r"\p{N}", _GPT2))
_GPT2_PRE = PreTokenizer((_GPT2,))
_QWEN2_PRE = PreTokenizer((_QWEN2,))
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer(_DEFAULT),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2"), _LLAMA3_PRE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS_PRE),
    **dict.fromkeys(("exaone", "minerva-7b"), _DIGITS_PRE),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), _GPT2_PRE),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _QWEN2_PRE),
}
"""llama.cpp's names; each family is compared with llama.cpp in the test goldens."""

_CONTROL_TEXTS = frozenset(
    [
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "</s>", "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>"),
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "<|fim_middle|>", "<MID>"),
        *("<fim-middle>", "<fim_middle>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "[PAD]"),
        *("<PAD>", "\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    ]
)
"""Texts that llama.cpp treats as control tokens whatever the file says of their type."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says of its tokenizer. Ids are None where the file names none."""

    backend: Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None
    dropped_id: int | None
    """Stands for bytes without a token; to be taken out of encoded ids."""


@dataclass(frozen=True)
class _Vocabulary:
    """Validated lists of one file: `tokens[i]` has type `types[i]` and score `scores[i]`."""

    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    ids: dict[str, int]


def build(metadata: Mapping[str, Any], path: object = None) -> GgufTokenizer:
    """The tokenizer described by the `tokenizer.*` keys of a GGUF file.

    Args:
        metadata: GGUF keys to Python values; arrays are lists or NumPy arrays.
        path: the file, for messages.

    Raises:
        TokenizerError: a field is missing, malformed or of an unknown kind, or contradicts another.
    """
    model = _field(metadata, "model", str, path)
    if model not in ("gpt2", "llama"):
        raise _unknown("model", model, ("gpt2", "llama"), path)
    vocabulary = _read_vocabulary(metadata, path)
    if model == "gpt2":
        backend, add_bos = _byte_level(metadata, vocabulary, path)
    else:
        backend, add_bos = _sentencepiece(metadata, vocabulary, path), True
    with rust_errors("adding the special tokens", path):
        backend.add_special_tokens(_added(vocabulary, special=True))
        backend.add_tokens(_added(vocabulary, special=False))
    size = len(vocabulary.tokens)
    default_bos, default_eos = (1, 2) if model == "llama" else (None, None)
    bos = _token_id(metadata, "bos_token_id", size, path, default_bos)
    eos = _token_id(metadata, "eos_token_id", size, path, default_eos)
    add_bos = _field(metadata, "add_bos_token", bool, path, add_bos)
    add_eos = _field(metadata, "add_eos_token", bool, path, False)
    with rust_errors("building the post-processor", path):
        _add_ends(backend, vocabulary, bos if add_bos else None, eos if add_eos else None)
    for name, wanted, token in (("bos", add_bos, bos), ("eos", add_eos, eos)):
        if wanted and token is None:
            raise _error(f"is missing, and {name} is to be added", f"{name}_token_id", path)
    _token_id(metadata, "unknown_token_id", size, path, None)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise _error("must be a string", "chat_template", path, key="tokenizer.chat_template")
    pad = _token_id(metadata, "padding_token_id", size, path, None)
    dropped = backend.token_to_id(_NO_TOKEN)
    return GgufTokenizer(backend, bos, eos, pad, template, dropped)


def _error(problem: str, field: str, path: object, key: str | None = None) -> TokenizerError:
    where = f"{path}: " if path is not None else ""
    return TokenizerError(f"{where}{key or 'tokenizer.ggml.' + field} {problem}", path=path)


def _unknown(field: str, given: str, known: Sequence[str], path: object) -> TokenizerError:
    return _error(
        f"is {given!r:.100}, known are {', '.join(known)}; pass tokenizer= (a directory or hub id "
        f"that has tokenizer.json)",
        field,
        path,
    )


def _field(metadata: Mapping[str, Any], name: str, kind: type, path: object, *default: Any) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None and default:
        return default[0]
    if value is None:
        raise _error("is missing; pass tokenizer= (a directory or hub id)", name, path)
    if kind is bool and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    if not isinstance(value, kind) or kind is bool:
        raise _error(f"must be a {kind.__name__}; got {value!r:.100}", name, path)
    return value


def _array(metadata: Mapping[str, Any], name: str, path: object) -> list[Any] | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise _error(f"must be an array; got {type(value).__name__}", name, path)
    return list(value)


def _token_id(metadata: Mapping[str, Any], name: str, size: int, path: object, default: Any) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return default if default is not None and default < size else None
    if hasattr(value, "item"):
        value = value.item()
    if type(value) is not int or not 0 <= value < size:
        raise _error(f"must be in 0..{size - 1} (the vocabulary); got {value!r:.100}", name, path)
    return value


def _read_vocabulary(metadata: Mapping[str, Any], path: object) -> _Vocabulary:
    tokens = _array(metadata, "tokens", path)
    if not tokens or len(tokens) > MAX_TOKENS:
        count = "no entries" if not tokens else f"{len(tokens)} entries"
        raise _error(f"has {count}; 1..{MAX_TOKENS} are allowed", "tokens", path)
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if not isinstance(token, str):
            raise _error(f"must be UTF-8 text; got {token!r:.100}", f"tokens[{i}]", path)
        token = token or f"[EMPTY_{i}]"  # as llama.cpp names them
        if len(token) > MAX_TOKEN_BYTES // 4 and len(token.encode()) > MAX_TOKEN_BYTES:
            raise _error(f"has more than {MAX_TOKEN_BYTES} bytes", f"tokens[{i}]", path)
        if token == _NO_TOKEN:
            raise _error(f"has the reserved name {token!r}", f"tokens[{i}]", path)
        if ids.setdefault(token, i) != i:
            raise _error(f"repeats tokens[{ids[token]}]: {token!r:.100}", f"tokens[{i}]", path)
    types = _array(metadata, "token_type", path)
    scores = _array(metadata, "scores", path)
    for name, values in (("token_type", types), ("scores", scores)):
        if values is not None and len(values) != len(tokens):
            raise _error(
                f"has {len(values)} entries, tokenizer.ggml.tokens has {len(tokens)}", name, path
            )
    for i, kind in enumerate(types or ()):
        if type(kind) is not int or not 0 <= kind <= BYTE:
            raise _error(f"must be in 0..{BYTE}; got {kind!r:.100}", f"token_type[{i}]", path)
    for i, score in enumerate(scores or ()):
        if type(score) not in (int, float) or math.isnan(score):
            raise _error(f"must be a number; got {score!r:.100}", f"scores[{i}]", path)
    types = types or [NORMAL] * len(tokens)
    for text in _CONTROL_TEXTS & ids.keys():
        types[ids[text]] = CONTROL
    return _Vocabulary(list(ids), types, scores, ids)


def _added(vocabulary: _Vocabulary, *, special: bool) -> list[AddedToken]:
    """Tokens found in the text before anything else: control and unknown ones, or user-defined."""
    kinds = (CONTROL, UNKNOWN) if special else (USER_DEFINED,)
    return [
        AddedToken(token, special=special, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in kinds
    ]


def _add_ends(backend: Tokenizer, vocabulary: _Vocabulary, bos: Any, eos: Any) -> None:
    ends = {"BOS": bos, "EOS": eos}
    used: list[Any] = [
        {"id": name, "ids": [i], "tokens": [vocabulary.tokens[i]]}
        for name, i in ends.items()
        if i is not None
    ]
    if used:
        single = ["BOS"] * (bos is not None) + ["$A"] + ["EOS"] * (eos is not None)
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, path: object
) -> tuple[Tokenizer, bool]:
    name = _field(metadata, "pre", str, path, "default")
    if name not in PRE_TOKENIZERS:
        raise _unknown("pre", name, tuple(PRE_TOKENIZERS), path)
    pre = PRE_TOKENIZERS[name]
    merges = _read_merges(metadata, vocabulary, path)
    with rust_errors("building the byte-level BPE tokenizer", path):
        # Without an unknown token the library drops such bytes before it merges, and so joins what
        # stands on either side; llama.cpp drops them after.
        ids = {**vocabulary.ids, _NO_TOKEN: len(vocabulary.tokens)}
        model = BPE(ids, merges, ignore_merges=pre.ignore_merges, unk_token=_NO_TOKEN)
        backend = Tokenizer(model)
        splits = [pre_tokenizers.Split(Regex(s), "isolated") for s in pre.splits]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _read_merges(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, path: object
) -> list[tuple[str, str]]:
    lines = _array(metadata, "merges", path)
    if lines is None:
        raise _error("is missing; pass tokenizer= (a directory or hub id)", "merges", path)
    merges: dict[tuple[str, str], int] = {}
    for i, line in enumerate(lines):
        parts = tuple(line.split(" ")) if isinstance(line, str) else ()
        if len(parts) != 2:
            raise _error(f"must be two tokens and a space; got {line!r:.100}", f"merges[{i}]", path)
        left, right = parts
        for token in (left, right, left + right):
            if token not in vocabulary.ids:
                raise _error(f"has the unknown token {token!r:.100}", f"merges[{i}]", path)
        if merges.setdefault((left, right), i) != i:
            raise _error(f"repeats merges[{merges[left, right]}]", f"merges[{i}]", path)
    return list(merges)


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary, path: object) -> Tokenizer:
    """Space becomes U+2581, then the pair whose token scores highest is merged, until none can."""
    if vocabulary.scores is None:
        raise _error("is missing", "scores", path)
    prefix = _field(metadata, "add_space_prefix", bool, path, True)
    unknown = _token_id(metadata, "unknown_token_id", len(vocabulary.tokens), path, 0)
    if not all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256)):
        raise _error("lacks some of the byte tokens <0x00> to <0xFF>", "tokens", path)
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind == BYTE and not re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            raise _error(f"marks {token!r:.100} as a byte", "token_type", path)
    merges = [pair for _, _, pair in sorted(_score_merges(vocabulary), key=lambda m: m[:2])]
    with rust_errors("building the SentencePiece tokenizer", path):
        backend = Tokenizer(
            BPE(
                vocabulary.ids,
                merges,
                unk_token=vocabulary.tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        steps = [normalizers.Prepend(_SPACE)] if prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
        backend.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([decoders.Strip(" ", 1, 0)] if prefix else [])
        )
    return backend


def _score_merges(vocabulary: _Vocabulary) -> Iterator[tuple[float, int, tuple[str, str]]]:
    """(minus score, token id, pair) of every pair of tokens that joins to a token."""
    ids, scores = vocabulary.ids, vocabulary.scores or []
    for i, token in enumerate(vocabulary.tokens):
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in ids and pair[1] in ids:
                yield -scores[i], i, pair
