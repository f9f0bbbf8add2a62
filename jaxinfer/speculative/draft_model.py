"""Draft-model proposer: which of a row's tokens the draft model has yet to read, and its drafts.

Its K/V lie in pages of its own under the ids of the target's pages, so what is known of a page is
known by its id and by how often it was given out: pages of a shared prefix are read once, and a
page that changed hands is read anew.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Protocol

from jaxinfer.request import Row, Sequence

_READ_FOR_ONE = 32
"""Tokens that the draft model may have to read for each that the request may still generate."""


class Device(Protocol):
    """The draft model on its device."""

    max_num_tokens: int
    """Most tokens that `fill` takes at once."""

    def fill(self, rows: list[Row]) -> None:
        """Compute K/V of the rows' tokens."""
        ...

    def draft(self, rows: list[Row]) -> list[list[int]]:
        """The tokens drafted after each row, which has one token, as many as the largest
        `max_draft`; its K/V, and the drafts', are computed."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """`sequence` has ended."""
        ...


@dataclass(frozen=True, slots=True)
class _Draft:
    """What was drafted after the first `known` tokens: K/V are right as far as it was, if they
    are still where they were written. `places`: (page, its generation), from that of token `known`
    on."""

    known: int
    tokens: list[int]
    places: list[tuple[int, int]]


class DraftModelProposer:
    """Drafts with a second model.

    Args:
        device: the model.
        generations: how often each page was given out, by its id; the page pool's own list.
        page_size: tokens in a page.
    """

    def __init__(self, device: Device, generations: Seq[int], page_size: int):
        self.caught_up = 0
        self._device = device
        self._generations = generations
        self._page_size = page_size
        self._filled: dict[int, tuple[int, int]] = {}
        """Page to (its generation, leading tokens of it that are computed)."""
        self._drafted: dict[Sequence, _Draft] = {}

    def available(self, sequence: Sequence, most: int) -> int:
        """None where the draft model does not see what is banned or preferred, or would have to
        read much for the tokens that are left."""
        request = sequence.request
        if request.bias_key or request.bad_token_ids:
            return 0
        unread = len(sequence.tokens) - 1 - self._num_computed(sequence, sequence.pages)
        left = request.max_tokens - (len(sequence.tokens) - sequence.prompt_len)
        return most if unread <= _READ_FOR_ONE * left else 0

    def propose(self, rows: Seq[Row]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in rows]
        ready: list[tuple[int, Row]] = []
        behind: list[Row] = []
        budget = self._device.max_num_tokens
        for i, row in enumerate(rows):
            if not row.max_draft:
                continue
            last = len(row.sequence.tokens) - 1
            start = min(self._num_computed(row.sequence, row.pages), last)
            count = min(last - start, budget)
            if count:
                behind.append(Row(row.sequence, start, count, False, 0, row.pages))
                budget -= count
            if start + count == last:
                ready.append((i, replace(row, start=last, draft=())))
        self.caught_up = sum(row.num_new for row in behind)
        if behind:
            self._device.fill(behind)
            for row in behind:
                self._note(row.pages, row.start, row.kv_len)
        if ready:
            found = self._device.draft([row for _, row in ready])
            for (i, row), draft in zip(ready, found, strict=True):
                drafts[i] = draft
                self._note(row.pages, row.start, row.kv_len)
                places = self._places(row.pages[row.kv_len // self._page_size :])
                self._drafted[row.sequence] = _Draft(row.kv_len, draft, places)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self._drafted.pop(sequence, None)
        self._device.forget(sequence)

    def _num_computed(self, sequence: Sequence, pages: list[int]) -> int:
        """Leading tokens of a sequence with these pages whose K/V the draft model has."""
        size = self._page_size
        total = 0
        for page in pages:
            generation, count = self._filled.get(page, (0, 0))
            if generation != self._generations[page]:
                count = 0
            total += count
            if count < size:
                break
        drafted = self._drafted.get(sequence)
        if drafted is None or total != drafted.known:
            return total
        first = total // size
        now = self._places(pages[first : first + len(drafted.places)])
        tokens = sequence.tokens[total:]
        for position, (token, guess) in enumerate(
            zip(tokens, drafted.tokens, strict=False), drafted.known
        ):
            index = position // size - first
            if token != guess or index >= len(now) or now[index] != drafted.places[index]:
                break
            total += 1
        self._note(pages, drafted.known, total)
        return total

    def _places(self, pages: Seq[int]) -> list[tuple[int, int]]:
        return [(page, self._generations[page]) for page in pages]

    def _note(self, pages: Seq[int], start: int, stop: int) -> None:
        """Tokens start..stop - 1 of a sequence with these pages are computed, and all before."""
        size = self._page_size
        for index in range(start // size, -(-stop // size)):
            count = min(size, stop - index * size)
            self._filled[pages[index]] = (self._generations[pages[index]], count)
