"""Prompt lookup: what followed the last tokens the last time they stood in the text. Host only.

Every place where `prompt_lookup_min` tokens end is remembered as the text grows, one dictionary
entry a token; a look-up compares the newest places with the end of the text, backwards, up to
`prompt_lookup_max` tokens, and takes the longest match, the newest of equals.
"""

from collections.abc import Sequence as Seq

from jaxinfer.request import Row, Sequence

_PLACES = 16
"""Places that a look-up compares, newest first: its cost does not grow with the text."""


class _Index:
    """Where the n-grams of one text end."""

    __slots__ = ("ends", "num_indexed")

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], list[int]] = {}
        self.num_indexed = 0


class NgramProposer:
    """Drafts from the sequence's own prompt and output (Saxena 2023, prompt lookup decoding).

    `shortest` and `longest`: fewest tokens at the end of the text that must be found again, and
    most that are compared.
    """

    def __init__(self, shortest: int, longest: int):
        self.shortest = shortest
        self.longest = longest
        self.caught_up = 0
        self._indexes: dict[Sequence, _Index] = {}

    def available(self, sequence: Sequence, most: int) -> int:
        """`most` where the end of the text was found before it, else 0."""
        return most if self._find(sequence) is not None else 0

    def propose(self, rows: Seq[Row]) -> list[list[int]]:
        drafts = []
        for row in rows:
            start = self._find(row.sequence) if row.max_draft else None
            drafts.append([] if start is None else _copied(row.sequence.tokens, start, row))
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)

    def _find(self, sequence: Sequence) -> int | None:
        """Where the longest match of the text's end ends, which is where its continuation is."""
        tokens = sequence.tokens
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = _Index()
        n, length = self.shortest, len(tokens)
        # The n-gram at the very end is not entered: nothing follows it yet.
        for end in range(max(index.num_indexed + 1, n), length):
            index.ends.setdefault(tuple(tokens[end - n : end]), []).append(end)
        index.num_indexed = length - 1
        best, place = 0, None
        for end in reversed(index.ends.get(tuple(tokens[length - n :]), [])[-_PLACES:]):
            match = self._match(tokens, end)
            if match > best:
                best, place = match, end
                if match == self.longest:
                    break
        return place

    def _match(self, tokens: list[int], end: int) -> int:
        """Tokens before `end` that equal the last ones, up to `longest`."""
        last = len(tokens)
        most = min(self.longest, end)
        for i in range(self.shortest, most):
            if tokens[end - 1 - i] != tokens[last - 1 - i]:
                return i
        return most


def _copied(tokens: list[int], start: int, row: Row) -> list[int]:
    """`row.max_draft` tokens from `start` on; past the end of the text, from the draft itself, so
    that a text of a short period is continued."""
    draft = tokens[start : start + row.max_draft]
    period = len(tokens) - start
    for i in range(len(draft), row.max_draft):
        draft.append(draft[i - period])
    return draft
