"""Roster: where every sequence is, and the moves between WAITING, RUNNING and FINISHED.

The planner starts and requeues, commit and callers end. Whatever gives pages back is here, because
pages of a sequence in a step that is not committed must stay where they are until it is.
"""

import bisect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxinfer.config import SchedulerConfig
from jaxinfer.request import Request, Status, StepPlan
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.scheduling.prefix import PrefixCache
from jaxinfer.scheduling.queue import Entry, WaitingQueue


@dataclass(slots=True)
class Outstanding:
    """A plan that is not committed: `entries[i]` is of `plan.rows[i]`.

    `retired` are pages that its rows read and whose owner took another for them meanwhile.
    """

    plan: StepPlan
    entries: list[Entry]
    retired: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Counters:
    """Events since the start. Prefix counts are in tokens; `num_steps` are committed plans."""

    num_steps: int = 0
    num_admissions: int = 0
    num_preemptions: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_page_copies: int = 0


class Roster:
    """The state that planning and committing share."""

    def __init__(self, config: SchedulerConfig, pool: PagePool, clock: Callable[[], float]):
        self.config = config
        self.pool = pool
        self.clock = clock
        self.cache = PrefixCache(pool) if config.enable_prefix_caching else None
        self.counters = Counters()
        self.requests: dict[str, list[Entry]] = {}
        """Entries of every request that has not ended."""
        self.waiting = WaitingQueue(config.max_wait_steps)
        self.held: dict[Request, list[Entry]] = {}
        """Samples 1.. of requests whose first prefill is not yet planned to its end."""
        self.num_held = 0
        self.running: list[Entry] = []
        """Sorted by key; has ended entries until `sweep`."""
        self.outstanding: deque[Outstanding] = deque()
        self.failed: list[Request] = []
        self._has_ended = False

    def hold(self, request: Request, entries: list[Entry]) -> None:
        """Keep `entries` back until their leader's prompt is computed."""
        self.held[request] = entries
        self.num_held += len(entries)

    def unhold(self, request: Request) -> list[Entry]:
        entries = self.held.pop(request)
        self.num_held -= len(entries)
        return entries

    def start(self, entry: Entry) -> None:
        """WAITING to RUNNING; the caller gives it pages."""
        entry.sequence.status = Status.RUNNING
        bisect.insort(self.running, entry, key=lambda e: e.key)
        self.counters.num_admissions += 1

    def preempt(self, entry: Entry) -> None:
        """RUNNING to WAITING: its pages go, its tokens stay. It is in no outstanding plan."""
        if entry.num_outstanding:
            raise RuntimeError(f"sequence {entry.key} is in a step and cannot be preempted")
        sequence = entry.sequence
        self.running.remove(entry)
        self.release(entry)
        sequence.status = Status.WAITING
        sequence.num_computed = sequence.num_committed = 0
        sequence.num_preemptions += 1
        sequence.request.metrics.num_preemptions += 1
        self.counters.num_preemptions += 1
        self.waiting.push(entry)

    def end(self, entry: Entry, reason: str, stop_reason: int | str | None = None) -> None:
        """To FINISHED, from anywhere; nothing happens to what has ended."""
        sequence = entry.sequence
        if sequence.status is Status.FINISHED:
            return
        request = sequence.request
        if sequence.status is Status.RUNNING:
            self._has_ended = True
        elif entry.ticket:
            self.waiting.remove(entry)
        else:
            self.held[request].remove(entry)
            self.num_held -= 1
            if not self.held[request]:
                del self.held[request]
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        if sequence.index == 0 and request in self.held:
            for sibling in self.unhold(request):
                self.waiting.push(sibling)
        if not entry.num_outstanding:
            self.release(entry)
        if request.is_finished:
            del self.requests[request.request_id]

    def fail(self, request: Request, error: Exception) -> None:
        """End what has not ended of `request`, because of `error`."""
        request.error = error
        for entry in list(self.requests[request.request_id]):
            self.end(entry, "error")

    def release(self, entry: Entry) -> None:
        """Give the pages back, the last first: the cache then gives up ends of prefixes first."""
        pages, entry.sequence.pages = entry.sequence.pages, []
        self.pool.decref(reversed(pages))
        entry.node = None

    def retire(self, entry: Entry, page: int) -> None:
        """Give back a page that `entry` no longer has, after the last plan that may read it."""
        if entry.num_outstanding:
            self.outstanding[-1].retired.append(page)
        else:
            self.pool.decref((page,))

    def sweep(self) -> None:
        """Drop ended entries from `running`."""
        if self._has_ended:
            is_running = Status.RUNNING
            self.running = [e for e in self.running if e.sequence.status is is_running]
            self._has_ended = False
