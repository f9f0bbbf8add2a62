"""A tokenizer for tests whose ids 0..255 are bytes and whose next ids are special tokens."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.errors import InvalidRequestError

SPECIALS = ("<bos>", "<eos>", "<pad>")


class ByteTokenizer:
    """Has jaxinfer.tokenizer.Tokenizer's methods; `vocab_size` may leave room for unused ids."""

    bytewise = True
    strips_space = False
    chat_template = None
    path = "byte tokenizer"

    def __init__(self, vocab_size: int = 256 + len(SPECIALS)):
        if vocab_size < 256 + len(SPECIALS):
            raise ValueError(f"vocab_size must be at least {256 + len(SPECIALS)}; got {vocab_size}")
        self.vocab_size = vocab_size
        self._ids = {text: 256 + i for i, text in enumerate(SPECIALS)}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = self._ids.values()
        self.all_special_ids = frozenset(self._ids.values())
        self.added_ids = self.all_special_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [self.bos_token_id] if add_special_tokens else []
        for part in re.split(f"({'|'.join(SPECIALS)})", text):
            ids += [self._ids[part]] if part in self._ids else part.encode()
        return ids

    def max_chars_for(self, num_tokens: int) -> int:
        return num_tokens * max(map(len, SPECIALS))

    def token_bytes(self, token: int) -> bytes:
        if 0 <= token < 256:
            return bytes([token])
        return next((text.encode() for text, i in self._ids.items() if i == token), b"")

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        for i, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise InvalidRequestError(f"ids[{i}] is outside the vocabulary: {token}")
        skipped = self.all_special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(token) for token in ids if token not in skipped)
        return data.decode(errors="replace")

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> str:
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
