"""Entry, the scheduler's own record about a sequence, and WaitingQueue, who is admitted next."""

import heapq
import itertools
from collections import deque

from jaxinfer.request import Sequence
from jaxinfer.scheduling.prefix import Node

Key = tuple[int, int, int]
"""(priority, arrival, index): the lowest is served first."""


class Entry:
    """What the scheduler remembers about one sequence.

    `limit` is the number of tokens at which it ends. `node` and `num_chained` are the last page of
    its prefix that is in the cache and how many pages lead to it; None and 0 at the start. `row` is
    its row in the last plan that had it, `num_outstanding` the uncommitted plans that have it.
    `ticket` is its place in the waiting queue, 0 when it is not there.
    """

    __slots__ = (
        "epoch",
        "key",
        "limit",
        "needs_host_tokens",
        "node",
        "num_chained",
        "num_outstanding",
        "row",
        "sequence",
        "ticket",
        "waiting_since",
    )

    def __init__(self, sequence: Sequence, key: Key, limit: int):
        self.sequence = sequence
        self.key = key
        self.limit = limit
        # A banned word of several tokens is matched against the tokens before it, on the host.
        self.needs_host_tokens = any(len(word) > 1 for word in sequence.request.bad_token_ids)
        self.node: Node | None = None
        self.num_chained = 0
        self.epoch = 0
        self.row = 0
        self.num_outstanding = 0
        self.ticket = 0
        self.waiting_since = 0


class WaitingQueue:
    """Sequences waiting for admission, by key, except that nobody waits for ever.

    `num_rounds` counts the steps that admitted somebody; who is still here `max_wait_rounds` rounds
    after being pushed comes first. Removal is lazy: items whose ticket is not their entry's are
    stale.
    """

    def __init__(self, max_wait_rounds: int):
        self.max_wait_rounds = max_wait_rounds
        self.num_rounds = 0
        self._by_key: list[tuple[Key, int, Entry]] = []
        self._by_time: deque[tuple[int, Entry]] = deque()
        self._tickets = itertools.count(1)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, entry: Entry) -> None:
        entry.ticket = next(self._tickets)
        entry.waiting_since = self.num_rounds
        heapq.heappush(self._by_key, (entry.key, entry.ticket, entry))
        self._by_time.append((entry.ticket, entry))
        self._size += 1

    def remove(self, entry: Entry) -> None:
        """Take out `entry`, which is in the queue."""
        if not entry.ticket:
            raise RuntimeError(f"sequence {entry.key} is not waiting")
        entry.ticket = 0
        self._size -= 1
        # Without this a queue whose requests are all aborted would keep them for ever.
        if len(self._by_key) > 2 * self._size + 64:
            self._by_key = [item for item in self._by_key if item[2].ticket == item[1]]
            heapq.heapify(self._by_key)
        if len(self._by_time) > 2 * self._size + 64:
            self._by_time = deque(item for item in self._by_time if item[1].ticket == item[0])

    def head(self) -> Entry | None:
        """Who is admitted next, or None; it stays in the queue."""
        by_time, by_key = self._by_time, self._by_key
        while by_time and by_time[0][1].ticket != by_time[0][0]:
            by_time.popleft()
        if not by_time:
            return None
        oldest = by_time[0][1]
        if self.num_rounds - oldest.waiting_since >= self.max_wait_rounds:
            return oldest
        while by_key[0][2].ticket != by_key[0][1]:
            heapq.heappop(by_key)
        return by_key[0][2]

    def entries(self) -> list[Entry]:
        """Who is waiting, in the order of their keys."""
        return [e for _, ticket, e in sorted(self._by_key) if e.ticket == ticket]
