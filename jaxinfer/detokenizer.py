"""Turns one sample's tokens into text as they arrive, and ends it at a stop string.

The text never holds half a UTF-8 character, does not depend on how the tokens were grouped, and
equals `Tokenizer.decode` of all of them. `delta()` gives out only what no stop string can claim.
"""

import codecs
from collections.abc import Sequence

from jaxinfer.tokenizer import Tokenizer

_CONTEXT_TOKENS = 6
"""Prompt tokens before the first new one that a decoder may look at (its spaces depend on them)."""
_MAX_PENDING = 8
"""Tokens held back at most while a text ends in U+FFFD: a character has at most 4 bytes."""


class _ByteStream:
    """Decodes tokens that are byte sequences. O(1) per token."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skipped: frozenset[int]):
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tail = b""
        for token in reversed(prompt_ids):
            if token not in skipped:
                tail = tokenizer.token_bytes(token) + tail
            if len(tail) >= 4:
                break
        # A prompt may end inside a character: its bytes wait here for the rest. What they complete
        # is the model's text; what is already whole is the prompt's.
        self._decoder.decode(tail)
        self._strip = tokenizer.strips_space and not tail

    def push(self, token: int) -> str:
        return "" if token in self._skipped else self._read(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        return self._read(b"", final=True)

    def _read(self, data: bytes, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text


class _WindowStream:
    """Decodes tokens whose text depends on those before: a short window is decoded anew each time.

    The new text is what the window's text gained. The window starts at the last token whose text
    was given out, so that the decoder's treatment of a first token (its space) is not repeated.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        skipped: frozenset[int],
        spaces_between_special_tokens: bool,
    ):
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._spaces = spaces_between_special_tokens
        self._window = [t for t in prompt_ids[-_CONTEXT_TOKENS:] if t not in skipped]
        self._num_read = len(self._window)
        self._known = self._decode(self._window).rstrip("\ufffd")

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode_whole(ids, self._spaces)

    def push(self, token: int) -> str:
        if token in self._skipped or token >= self._tokenizer.vocab_size:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and len(self._window) - self._num_read <= _MAX_PENDING:
            return ""
        return self._give(text)

    def finish(self) -> str:
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        new = text[len(self._known) :]
        if new:
            self._window = self._window[self._num_read :]
            self._num_read = len(self._window)
            self._known = self._decode(self._window)
        return new


class Detokenizer:
    """The text of one sample.

    `push` tokens; read `text` (all so far) or `delta()` (new since the last call and safe to show);
    `flush` at the end. Once `stopped_by` names a stop string, the text is final.

    Args:
        tokenizer: whose ids these are. Ids past its vocabulary (an embedding's padding) are "".
        prompt_ids: what came before; gives context (leading spaces, a character cut in two).
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: see `Tokenizer.decode`.
        stop: stop strings. The text is cut where the first of them is complete; of two that are
            complete at the same character, the longer counts. Never empty strings.
        include_stop_str_in_output: keep the stop string, cut only what follows it.
        min_tokens: stop strings completed by the first `min_tokens` tokens are ordinary text.
        detokenize: False keeps the text empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        detokenize: bool = True,
    ):
        self.stopped_by: str | None = None
        self._stop = sorted(stop, key=len, reverse=True)
        self._reach = max(map(len, self._stop), default=1) - 1
        self._keep_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._detokenize = detokenize
        self._num_tokens = 0
        self._done = False
        self._parts: list[str] = []
        self._tail = ""  # the last `_reach` characters of the text
        self._unsent: list[str] = []
        skipped = tokenizer.all_special_ids if skip_special_tokens else frozenset()
        self._stream = (
            _ByteStream(tokenizer, prompt_ids, skipped)
            if tokenizer.bytewise
            else _WindowStream(tokenizer, prompt_ids, skipped, spaces_between_special_tokens)
        )

    @property
    def text(self) -> str:
        """All text so far, but for the bytes of an unfinished character."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if self._done or not self._detokenize:
                return
            self._num_tokens += 1
            self._append(self._stream.push(token))

    def flush(self) -> None:
        """No tokens follow: gives out what was held back, U+FFFD for an unfinished character."""
        if not self._done and self._detokenize:
            self._append(self._stream.finish())
        self._done = True

    def delta(self) -> str:
        """Text not yet given out, without an end that may still become a stop string."""
        unsent = "".join(self._unsent)
        cut = len(unsent) - (0 if self._done else self._held(unsent))
        self._unsent = [unsent[cut:]]
        return unsent[:cut]

    def _append(self, new: str) -> None:
        if not new:
            return
        before = len(self._tail)
        searched = self._tail + new
        if self._stop and self._num_tokens > self._min_tokens:
            match = self._find(searched, before)
            if match is not None:
                self.stopped_by, start = match
                self._done = True
                end = start + len(self.stopped_by) if self._keep_stop else start
                if end < before:
                    self._drop(before - end)
                    return
                new = searched[before:end]
        self._parts.append(new)
        self._unsent.append(new)
        if self._reach:
            self._tail = searched[-self._reach :]

    def _find(self, text: str, seen: int) -> tuple[str, int] | None:
        """The stop string complete earliest in `text` after its first `seen` characters."""
        best: tuple[int, str, int] | None = None
        for stop in self._stop:
            start = text.find(stop, max(0, seen - len(stop) + 1))
            if start >= 0 and (best is None or start + len(stop) < best[0]):
                best = (start + len(stop), stop, start)
        return None if best is None else best[1:]

    def _held(self, unsent: str) -> int:
        """How many characters at the end of `unsent` are the beginning of a stop string."""
        if self._keep_stop or not self._stop:
            return 0
        for size in range(min(len(unsent), self._reach), 0, -1):
            end = unsent[-size:]
            if any(stop.startswith(end) for stop in self._stop):
                return size
        return 0

    def _drop(self, count: int) -> None:
        """Takes the last `count` characters back; they were held, so never given out."""
        self._parts = [self.text[:-count]]
        self._unsent = ["".join(self._unsent)[:-count]]
