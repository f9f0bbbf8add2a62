"""Text to token ids and back: one facade over a GGUF file's and a directory's tokenizer.

Decoding is defined on bytes wherever the vocabulary allows it (byte-level BPE, SentencePiece with
byte fallback): the tokens' bytes are joined and read as UTF-8, with U+FFFD for what is not UTF-8.
So a text is the same however its tokens arrive. Incremental decoding is in detokenizer.py.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxinfer import gguf_tokenizer, tokenizer_files
from jaxinfer.chat_template import ChatTemplate
from jaxinfer.errors import InvalidRequestError, TokenizerError
from jaxinfer.tokenizer_files import rust_errors

_SPACE = "\u2581"
_UNBOUNDED = 2**62


def _printable_bytes() -> dict[int, int]:
    """GPT-2's byte-level alphabet: code point of a token's character to the byte it stands for."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {byte: byte for byte in own} | {256 + i: byte for i, byte in enumerate(others)}


_BYTE_OF = _printable_bytes()


class Tokenizer:
    """Encodes, decodes and renders chats. Made by `from_gguf` or `from_directory`.

    Attributes:
        vocab_size: largest token id + 1.
        bos_token_id, eos_token_id, pad_token_id: None where the model has none.
        all_special_ids: ids that `skip_special_tokens` leaves out.
        added_ids: special ids and the tokens that were added beside them.
        bytewise: whether every token is a sequence of bytes (see `token_bytes`).
        strips_space: whether a decoded text loses one leading space.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        chat_templates: Mapping[str, str] | None = None,
        dropped_id: int | None = None,
        path: object = None,
    ):
        self.backend = backend
        self._dropped_id = dropped_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.path = path
        with rust_errors("reading the vocabulary", path):
            vocab = backend.get_vocab(with_added_tokens=True)
            added = backend.get_added_tokens_decoder()
            kind = _decoder_kind(backend)
        if dropped_id is not None:
            vocab = {token: i for token, i in vocab.items() if i != dropped_id}
        if not vocab:
            raise TokenizerError(f"{path}: the tokenizer has no tokens", path=path)
        self.vocab_size = max(vocab.values()) + 1
        self.added_ids = frozenset(added)
        self.all_special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bytewise = kind != "other"
        self.strips_space = kind == "sentencepiece-strip"
        self._byte_level = kind == "byte-level"
        self._bytes: dict[int, bytes] = {}
        self._longest = _longest_token(backend, vocab, kind)
        # Compiled here, so that a broken template is found when the model is loaded.
        self._chats = {
            name: ChatTemplate(source, self._special_texts(), path)
            for name, source in (chat_templates or {}).items()
        }

    @property
    def chat_template(self) -> str | None:
        """The template that `apply_chat_template` uses (Jinja); None where the model has none."""
        return self._chats["default"].source if "default" in self._chats else None

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        self._chats = {}
        if source is not None:
            self._chats["default"] = ChatTemplate(source, self._special_texts(), request=True)

    def _special_texts(self) -> dict[str, str]:
        names = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        names["pad_token"] = self.pad_token_id
        return {k: self.backend.id_to_token(i) or "" for k, i in names.items() if i is not None}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`. Special tokens spelled out in it become their ids.

        Raises:
            InvalidRequestError: `text` is not a string, or has a lone surrogate.
        """
        if not isinstance(text, str):
            raise InvalidRequestError(
                f"text must be a string; got {type(text).__name__}", param="prompt"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
                f"{error.start}, which is not valid Unicode; remove it",
                param="prompt",
            ) from None
        with rust_errors("encoding a text", self.path):
            ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        dropped = self._dropped_id
        return [i for i in ids if i != dropped] if dropped is not None and dropped in ids else ids

    def max_chars_for(self, num_tokens: int) -> int:
        """A text of more characters than this has more than `num_tokens` tokens.

        A cheap refusal of hopeless prompts. Very large where tokens have no bound on the text they
        stand for (a normalizer that deletes characters, an unknown token). Characters that a
        byte-level vocabulary has no token for are dropped by `encode` but count here.
        """
        return _UNBOUNDED if self._longest is None else num_tokens * self._longest

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of `ids`; U+FFFD where the bytes are not UTF-8.

        `spaces_between_special_tokens=False` writes a run of added tokens without the space that
        some decoders (WordPiece) put between tokens; bytewise tokenizers put none.

        Raises:
            InvalidRequestError: an id is not an integer in 0..vocab_size-1.
        """
        top = self.vocab_size - 1
        for i, token in enumerate(ids):
            if type(token) is not int or not 0 <= token <= top:
                raise InvalidRequestError(
                    f"ids[{i}] must be an integer in 0..{top} (the vocabulary); got {token!r:.100}",
                    param=f"ids[{i}]",
                    value=token,
                )
        if skip_special_tokens:
            ids = [token for token in ids if token not in self.all_special_ids]
        if not self.bytewise:
            return self.decode_whole(ids, spaces_between_special_tokens)
        text = b"".join(map(self.token_bytes, ids)).decode(errors="replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def decode_whole(self, ids: Sequence[int], spaces_between_special_tokens: bool = True) -> str:
        """The library's own decoding of `ids`, special tokens included."""
        with rust_errors("decoding token ids", self.path):
            if spaces_between_special_tokens:
                return self._decode_after(None, ids)
            parts, start = [], 0
            for i in range(1, len(ids)):
                if ids[i] in self.added_ids and ids[i - 1] in self.added_ids:
                    parts.append(
                        self._decode_after(ids[start - 1] if start else None, ids[start:i])
                    )
                    parts.append(self.backend.id_to_token(ids[i]) or "")
                    start = i + 1
            parts.append(self._decode_after(ids[start - 1] if start else None, ids[start:]))
            return "".join(parts)

    def _decode_after(self, before: int | None, ids: Sequence[int]) -> str:
        """The text of `ids` where the token `before` precedes them."""
        context = [] if before is None else [before]
        text = self.backend.decode([*context, *ids], skip_special_tokens=False)
        return text[len(self.backend.decode(context, skip_special_tokens=False)) :]

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text (bytewise tokenizers). Empty for ids past the vocabulary."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._read_bytes(token)
        return found

    def _read_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        with rust_errors("reading a token", self.path):
            text = self.backend.id_to_token(token)
        if text is None:
            return b""
        if token in self.added_ids:
            return text.encode()
        if self._byte_level:
            known = [_BYTE_OF.get(ord(char), -1) for char in text]
            return text.encode() if -1 in known else bytes(known)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        return text.replace(_SPACE, " ").encode()

    def token_text(self, token: int) -> str:
        """One token's own text, special tokens included; "" for ids past the vocabulary."""
        if self.bytewise:
            return self.token_bytes(token).decode(errors="replace")
        return self.decode_whole([token]) if 0 <= token < self.vocab_size else ""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, to be encoded with `add_special_tokens=False`.

        Args: see ChatTemplate.render. `chat_template` replaces the model's own: Jinja text, or the
            name of one of its named templates. With `tools`, one named "tool_use" is preferred.

        Raises:
            InvalidRequestError: there is no template, or the messages do not suit it.
        """
        name = "default" if chat_template is None else chat_template
        if chat_template is None and tools and "tool_use" in self._chats:
            name = "tool_use"
        chat = self._chats.get(name)
        if chat is None and chat_template is not None:
            chat = ChatTemplate(chat_template, self._special_texts(), request=True)
        if chat is None:
            raise InvalidRequestError(
                "the model has no chat template; pass chat_template= (Jinja text), or use generate "
                "with a prompt you format yourself",
                param="chat_template",
            )
        return chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=chat_template_kwargs,
        )


def from_gguf(metadata: Mapping[str, Any], path: object = None) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata; see gguf_tokenizer.build."""
    built = gguf_tokenizer.build(metadata, path)
    return Tokenizer(
        built.backend,
        bos_token_id=built.bos_token_id,
        eos_token_id=built.eos_token_id,
        pad_token_id=built.pad_token_id,
        chat_templates={"default": built.chat_template} if built.chat_template else None,
        dropped_id=built.dropped_id,
        path=path,
    )


def from_directory(directory: str | Path) -> Tokenizer:
    """The tokenizer of a directory with `tokenizer.json`, as transformers reads it.

    Raises:
        TokenizerError: a file is missing, malformed, or means something else than it says.
    """
    files = tokenizer_files.load(Path(directory))
    return Tokenizer(
        files.backend,
        bos_token_id=files.bos_token_id,
        eos_token_id=files.eos_token_id,
        pad_token_id=files.pad_token_id,
        chat_templates=files.templates,
        path=directory,
    )


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises TokenizerError where the tokenizer has ids past the embedding (`vocab_size` rows)."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{tokenizer.path}: the tokenizer has token ids up to {tokenizer.vocab_size - 1}, the "
            f"model's embedding has {vocab_size} rows; use the tokenizer that belongs to the model",
            path=tokenizer.path,
        )


def _decoder_kind(backend: tokenizers.Tokenizer) -> str:
    """byte-level, sentencepiece, sentencepiece-strip, or other."""
    if backend.decoder is None:
        return "other"
    state = json.loads(backend.decoder.__getstate__())
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return "byte-level"
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"]:
        return "other"
    if (parts[0]["pattern"], parts[0]["content"]) != ({"String": _SPACE}, " "):
        return "other"
    if kinds[3:] == ["Strip"] and (parts[3]["content"], parts[3]["start"]) == (" ", 1):
        return "sentencepiece-strip" if parts[3]["stop"] == 0 else "other"
    return "other" if kinds[3:] else "sentencepiece"


def _longest_token(
    backend: tokenizers.Tokenizer, vocab: Mapping[str, int], kind: str
) -> int | None:
    """Most characters that one token can stand for; None where nothing bounds it."""
    if kind == "other" or (
        kind != "byte-level" and any(f"<0x{byte:02X}>" not in vocab for byte in range(256))
    ):
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None
    factor = 1
    if backend.normalizer is not None:
        state = json.loads(backend.normalizer.__getstate__())
        steps = state["normalizers"] if state["type"] == "Sequence" else [state]
        for step in steps:
            if step["type"] == "NFC":
                factor = 4  # NFC joins at most 4 characters to one
            elif (
                step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"]
            ):
                continue
            elif step["type"] != "Prepend":
                return None
    return factor * max(map(len, vocab))
