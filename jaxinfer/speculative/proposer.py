"""The Proposer protocol: what a source of drafted tokens must offer."""

from collections.abc import Sequence as Seq
from typing import Protocol

from jaxinfer.request import Row, Sequence


class Proposer(Protocol):
    """Drafts tokens for rows of a decode step. What it drafts decides speed, never the output."""

    caught_up: int
    """Tokens that the newest `propose` had to compute before its drafts: those decoded without it,
    and prompts."""

    def available(self, sequence: Sequence, most: int) -> int:
        """How many tokens (0..most) it could draft after `sequence.tokens`; asked in each step,
        also while the sequence's newest token is still on the device."""
        ...

    def propose(self, rows: Seq[Row]) -> list[list[int]]:
        """Up to `row.max_draft` tokens after `row.sequence.tokens` for each row, whose pages have
        room for them. Fewer, none or nonsense is allowed."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """`sequence` has ended."""
        ...
