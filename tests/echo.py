"""The echo device: a model whose KV pages hold token ids, so that every wrong page is found out.

The next token is a function of all tokens that a row reads back through its page table. A row that
reads a slot nobody wrote, or another sequence's, or that writes a page others share, is found out.
A drafted token is a row like any other: what it left in a slot shows in every draw that reads it.
"""

from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np

from jaxinfer.request import Row, StepPlan
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.scheduling.scheduler import NOT_FINITE

UNWRITTEN = -1
NAN = -9
"""What a slot holds in place of a token where K/V are not finite."""


def next_token(history: Seq[int], vocab: int, index: int = 0) -> int:
    """What the echo model says after `history` [S] in sample `index` of a request."""
    return (7 * int(np.sum(history)) + len(history) + 13 * index) % vocab


def reference(prompt: Seq[int], num_tokens: int, vocab: int, index: int = 0) -> list[int]:
    """The `num_tokens` tokens that sample `index` of `prompt` generates, computed alone."""
    history = list(prompt)
    for _ in range(num_tokens):
        history.append(next_token(history, vocab, index))
    return history[len(prompt) :]


class EchoDevice:
    """Runs StepPlans in the order given, as a device does; `pool` only says who shares a page.

    `poisoned` are (request id, position) whose K/V come out NaN, as do those of tokens outside the
    vocabulary, which only drafts have; who reads them draws NOT_FINITE.
    """

    def __init__(self, pool: PagePool, vocab: int = 97):
        self.pool = pool
        self.vocab = vocab
        self.pages = np.full((pool.num_pages, pool.page_size), UNWRITTEN, np.int64)
        self.last: list[int] = []
        self.poisoned: set[tuple[str, int]] = set()

    def run(self, plan: StepPlan) -> list[int]:
        """The token of each row; 0 for rows that do not sample. Call it right after plan()."""
        kinds = [min(row.num_new, 2) or 3 for row in plan.rows]
        assert kinds == sorted(kinds), "rows with one new token, then chunks, then none"
        self._copy(plan)
        # Samples that begin in this step already share the pages that their leader's row writes.
        num_joining = Counter(row.logits_row for row in plan.rows if row.logits_row is not None)
        written: set[tuple[int, int]] = set()
        tokens = [self._new_tokens(row) for row in plan.rows]
        for i, (row, new) in enumerate(zip(plan.rows, tokens, strict=True)):
            for position, token in enumerate(new, row.start):
                page, offset = self._slot(row, position)
                num_holders = self.pool.refcount(page) - num_joining[i]
                assert num_holders == 1, f"page {page} is shared and written"
                assert (page, offset) not in written, f"page {page} is written by two rows"
                written.add((page, offset))
                is_bad = (row.sequence.request.request_id, position) in self.poisoned
                self.pages[page, offset] = token if 0 <= token < self.vocab and not is_bad else NAN
        # All writes come before all reads, as in a device step.
        self.last = [self._draw(plan, row) for row in plan.rows]
        return list(self.last)

    def _copy(self, plan: StepPlan) -> None:
        sources = [source for source, _ in plan.copies]
        targets = [target for _, target in plan.copies]
        assert len(set(targets)) == len(targets), "two copies into one page"
        assert 0 not in sources + targets, "the trash page is copied"
        self.pages[targets] = self.pages[sources]

    def _slot(self, row: Row, position: int) -> tuple[int, int]:
        page = row.pages[position // self.pool.page_size]
        assert page != 0, "the trash page is in a table"
        return page, position % self.pool.page_size

    def _new_tokens(self, row: Row) -> list[int]:
        if row.draft:
            assert row.num_new == 1 and row.fed_from is None and row.samples
            assert row.start == len(row.sequence.tokens) + len(row.draft) - 1
            return [row.draft[-1]]
        known = row.sequence.tokens[row.start : row.kv_len]
        if row.fed_from is None:
            assert len(known) == row.num_new, "a row needs a token that the host does not know"
            return known
        assert row.num_new == 1 and not known, "only a last token can be on the device"
        return [self.last[row.fed_from]]

    def _draw(self, plan: StepPlan, row: Row) -> int:
        source = row
        if row.logits_row is not None:
            source = plan.rows[row.logits_row]
            assert row.num_new == 0 and row.samples
            assert source.num_new > 0 and source.samples and source.kv_len == row.kv_len
        slots = [self._slot(row, position) for position in range(row.kv_len)]
        history = [int(self.pages[slot]) for slot in slots]
        assert UNWRITTEN not in history, "a row reads a slot nobody wrote"
        if NAN in history:
            return NOT_FINITE
        return next_token(history, self.vocab, row.sequence.index) if row.samples else 0
