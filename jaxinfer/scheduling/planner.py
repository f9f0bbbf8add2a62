"""Planner: which tokens of which sequences the next step computes, and in which pages.

Running sequences with one new token come first, then running prefills, then admissions, each in the
order of their keys, until the budget of tokens, the rows or the pages are used up. Whether the
running ones have the pages they need is settled before anything changes.
"""

from collections.abc import Callable

from jaxinfer.errors import CapacityError
from jaxinfer.request import Request, Row, Sequence, StepPlan
from jaxinfer.scheduling.queue import Entry
from jaxinfer.scheduling.room import choose_victim, first_short, pages_needed
from jaxinfer.scheduling.roster import Outstanding, Roster

DraftLengths = Callable[[list[Sequence]], list[int]]
"""How many tokens at most may be drafted for each of the rows of a decode step."""


class Planner:
    """Makes StepPlans out of a Roster."""

    def __init__(self, roster: Roster):
        self._roster = roster
        self._config, self._pool, self._cache = roster.config, roster.pool, roster.cache
        self._next_step_id = 0

    def plan(self, draft_lengths: DraftLengths | None = None) -> StepPlan | None:
        """The next step, or None where nothing can run before the outstanding plan is committed."""
        roster = self._roster
        if roster.outstanding and roster.outstanding[-1].plan.has_drafts:
            return None  # how many of its tokens count is not known yet
        roster.sweep()
        now = roster.clock()
        if roster.cache is not None:
            roster.cache.expire(now)
        while True:
            chosen, need, budget = self._select()
            if need <= roster.pool.num_available:
                break
            needy = first_short(roster.pool, chosen)
            if needy is None:
                break
            if roster.outstanding:
                return None
            self._make_room(needy)
        draft = _Draft()
        for entry, num_new in chosen:
            self._take(entry, num_new, draft)
        self._admit(budget, now, draft)
        if draft_lengths is not None and self._may_draft(draft):
            self._extend(draft.ones, draft_lengths)
        return self._seal(draft) if draft.ones or draft.chunks else None

    def _may_draft(self, draft: "_Draft") -> bool:
        """A step of nothing but decode rows whose tokens the host knows: prompts come first."""
        return bool(draft.ones) and not (draft.chunks or draft.joins or self._roster.outstanding)

    def _extend(self, ones: list[tuple[Entry, Row]], draft_lengths: DraftLengths) -> None:
        """Give rows pages for tokens to be drafted, as far as there are pages that nobody needs."""
        pool = self._pool
        spare = pool.num_available - len(self._roster.running)
        for (entry, row), wanted in zip(
            ones, draft_lengths([row.sequence for _, row in ones]), strict=True
        ):
            sequence = entry.sequence
            # A verified draft gives one token more than it has.
            length = min(wanted, entry.limit - len(sequence.tokens) - 1)
            if length < 1 or not row.samples:
                continue
            grow = pool.num_pages_for(row.kv_len + length) - len(row.pages)
            if grow and grow > spare:  # room in the last page is free
                continue
            spare -= grow
            if grow:
                row.pages = sequence.pages = row.pages + pool.allocate(grow)
            row.max_draft = length

    def _select(self) -> tuple[list[tuple[Entry, int]], int, int]:
        """Running sequences that get new tokens and how many, the pages they need, budget left."""
        chosen: list[tuple[Entry, int]] = []
        prefills: list[tuple[Entry, int]] = []
        need = 0
        page_size, refcounts = self._pool.page_size, self._pool.refcounts
        for entry in self._roster.running:
            sequence = entry.sequence
            in_flight = sequence.num_in_flight
            num_tokens = len(sequence.tokens) + in_flight
            start = sequence.num_computed
            if in_flight and (num_tokens >= entry.limit or entry.needs_host_tokens):
                continue
            if num_tokens - start == 1:
                chosen.append((entry, 1))
                if start % page_size == 0 or refcounts[sequence.pages[-1]] > 1:
                    need += 1
            elif num_tokens > start:
                prefills.append((entry, num_tokens - start))
        budget = self._config.max_num_batched_tokens - len(chosen)
        for entry, num_pending in prefills:
            num_new = min(num_pending, budget)
            if num_new:
                chosen.append((entry, num_new))
                need += pages_needed(self._pool, entry.sequence, num_new)
                budget -= num_new
        return chosen, need, budget

    def _make_room(self, needy: Entry) -> None:
        """Preempt somebody for `needy`, or fail it if it is alone. Nothing is outstanding."""
        running = self._roster.running
        if len(running) > 1:
            victim = choose_victim(self._pool, self._cache, self._config, running, needy)
            self._roster.preempt(victim)
        else:
            self._fail_for_pages(needy.sequence.request)
            self._roster.sweep()

    def _fail_for_pages(self, request: Request) -> None:
        num_pinned = self._cache.num_pinned if self._cache else 0
        error = CapacityError(
            f"request {request.request_id!r} is alone and the page pool has no page left for it: "
            f"{num_pinned} of {self._pool.num_usable} pages are pinned; unpin some "
            "(or reset_prefix_cache), or give the KV cache more memory",
            have=self._pool.num_available,
        )
        self._roster.fail(request, error)
        self._roster.failed.append(request)

    def _take(self, entry: Entry, num_new: int, draft: "_Draft") -> None:
        """Make the row for the next `num_new` tokens of `entry`; its pages are available."""
        sequence, pool = entry.sequence, self._pool
        start = sequence.num_computed
        end = start + num_new
        pages = sequence.pages
        # Rows keep the list they were made with, so a list of pages is replaced, never changed.
        if start % pool.page_size and pool.refcounts[pages[-1]] > 1:
            shared, own = pages[-1], pool.allocate(1)[0]
            pool.decref((shared,))
            draft.copies.append((shared, own))
            pages = sequence.pages = [*pages[:-1], own]
            self._roster.counters.num_page_copies += 1
        grow = -(-end // pool.page_size) - len(pages)
        if grow:
            pages = sequence.pages = pages + pool.allocate(grow)
        request = sequence.request
        in_flight = sequence.num_in_flight
        num_tokens = len(sequence.tokens) + in_flight
        samples = end == num_tokens and not request.cache_only
        row = Row(
            sequence,
            start,
            num_new,
            samples,
            num_tokens - len(request.prompt_token_ids),
            pages,
            entry.row if in_flight else None,
        )
        (draft.ones if num_new == 1 else draft.chunks).append((entry, row))
        sequence.num_computed = end
        if samples:
            sequence.num_in_flight = in_flight + 1
            if self._roster.held and request in self._roster.held:
                self._fork(entry, draft)

    def _fork(self, leader: Entry, draft: "_Draft") -> None:
        """The other samples of the leader's request draw their first token from its logits."""
        source = leader.sequence
        entries = self._roster.unhold(source.request)
        # Each will want a page of its own next; without one it would be preempted at once.
        num_joining = min(
            self._config.max_num_seqs - len(self._roster.running),
            max(0, self._pool.num_available - len(self._roster.running)),
        )
        for entry in entries[num_joining:]:
            self._roster.waiting.push(entry)
        for entry in entries[:num_joining]:
            sequence = entry.sequence
            self._roster.start(entry)
            self._pool.incref(source.pages)
            sequence.pages = source.pages
            sequence.num_computed = source.num_computed
            sequence.num_committed = source.num_committed
            sequence.num_in_flight = 1
            entry.node, entry.num_chained = leader.node, leader.num_chained
            entry.epoch = leader.epoch
            row = Row(sequence, source.num_computed, 0, True, 0, source.pages)
            draft.joins.append((entry, row, leader))

    def _admit(self, budget: int, now: float, draft: "_Draft") -> None:
        """Start waiting sequences, in order, while there are rows, budget and pages for them."""
        num_before = self._roster.counters.num_admissions
        while budget and len(self._roster.running) < self._config.max_num_seqs:
            entry = self._roster.waiting.head()
            if entry is None:
                break
            num_new = self._try_admit(entry, budget, now)
            if num_new:
                self._take(entry, num_new, draft)
                budget -= num_new
            elif self._roster.running or self._roster.outstanding:
                break
            else:
                self._fail_for_pages(entry.sequence.request)
        if self._roster.counters.num_admissions > num_before:
            self._roster.waiting.num_rounds += 1

    def _try_admit(self, entry: Entry, budget: int, now: float) -> int:
        """Start `entry` and return the size of its first chunk; 0, with nothing changed, if the
        pages for that chunk, and one more for each running sequence, are not available.
        """
        sequence, pool = entry.sequence, self._pool
        request = sequence.request
        available = pool.num_available - len(self._roster.running)
        if available < 1:
            return 0
        nodes = []
        if self._cache is not None and request.params.prompt_logprobs is None:
            nodes = self._cache.match(sequence.tokens, request.cache_salt, now)
        start = len(nodes) * pool.page_size
        num_new = min(budget, len(sequence.tokens) - start)
        need = pool.num_pages_for(start + num_new) - len(nodes)
        num_idle = self._cache.num_idle(nodes) if self._cache else 0
        if need + num_idle > available:
            return 0
        sequence.pages = [node.page for node in nodes]
        pool.incref(sequence.pages)
        sequence.num_computed = sequence.num_committed = start
        entry.node, entry.num_chained = (nodes[-1] if nodes else None), len(nodes)
        if self._cache is not None:
            entry.epoch = self._cache.epoch
            self._cache.touch(nodes, now)
        if not sequence.num_preemptions:
            self._roster.counters.num_prefix_queries += len(sequence.tokens)
            self._roster.counters.num_prefix_hits += start
            if sequence.index == 0:
                request.num_cached_tokens = start
                request.metrics.first_scheduled_time = now
        self._roster.waiting.remove(entry)
        self._roster.start(entry)
        return num_new

    def _seal(self, draft: "_Draft") -> StepPlan:
        """Put the rows in their final order and remember the plan until its commit."""
        members = draft.ones + draft.chunks
        entries = [entry for entry, _ in members] + [entry for entry, _, _ in draft.joins]
        rows = [row for _, row in members] + [row for _, row, _ in draft.joins]
        for index, entry in enumerate(entries):
            entry.row = index
            entry.num_outstanding += 1
        for _, row, leader in draft.joins:
            row.logits_row = leader.row
        plan = StepPlan(self._next_step_id, rows, draft.copies)
        self._next_step_id += 1
        self._roster.outstanding.append(Outstanding(plan, entries))
        return plan


class _Draft:
    """The rows of a plan that is being made, by kind."""

    __slots__ = ("chunks", "copies", "joins", "ones")

    def __init__(self) -> None:
        self.ones: list[tuple[Entry, Row]] = []
        self.chunks: list[tuple[Entry, Row]] = []
        self.joins: list[tuple[Entry, Row, Entry]] = []
        self.copies: list[tuple[int, int]] = []
