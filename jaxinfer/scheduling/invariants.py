"""What must hold between any two calls of a Scheduler. Tests ask; an engine need not."""

from collections import Counter

from jaxinfer.request import Status
from jaxinfer.scheduling.queue import Entry
from jaxinfer.scheduling.roster import Roster


def check_roster(roster: Roster) -> None:
    """Raise AssertionError where pages, sequences, queues and cache disagree."""
    roster.sweep()
    entries = [entry for group in roster.requests.values() for entry in group]
    in_plans = [entry for step in roster.outstanding for entry in step.entries]
    everyone = list({id(entry): entry for entry in [*entries, *in_plans]}.values())
    _check_pages(roster, everyone)
    size = roster.pool.page_size
    room = {  # for tokens to be drafted
        id(entry): -(-(row.kv_len + row.max_draft) // size)
        for step in roster.outstanding
        for entry, row in zip(step.entries, step.plan.rows, strict=True)
        if row.max_draft
    }
    for entry in everyone:
        _check_entry(entry, size, in_plans.count(entry), room.get(id(entry), 0))
    keys = [entry.key for entry in roster.running]
    assert keys == sorted(keys), "running sequences are out of order"
    assert len(keys) <= roster.config.max_num_seqs, "more sequences run than rows exist"
    live = [entry for entry in entries if not entry.sequence.is_finished]
    running = [entry for entry in live if entry.sequence.status is Status.RUNNING]
    assert {id(e) for e in running} == {id(e) for e in roster.running}
    held = [entry for group in roster.held.values() for entry in group]
    queued = roster.waiting.entries()
    assert len(held) == roster.num_held and len(queued) == len(roster.waiting)
    assert len(live) == len(running) + len(queued) + len(held), "a sequence is nowhere, or twice"
    for step in roster.outstanding:
        assert len(step.plan.rows) <= roster.config.max_num_seqs
        assert step.plan.num_tokens <= roster.config.max_num_batched_tokens


def _check_pages(roster: Roster, everyone: list[Entry]) -> None:
    """References are exactly those of tables and of retired pages; nothing leaks."""
    counts = Counter(page for entry in everyone for page in entry.sequence.pages)
    counts.update(page for step in roster.outstanding for page in step.retired)
    for page, refcount in enumerate(roster.pool.refcounts):
        assert counts[page] == refcount, f"page {page}: {counts[page]} holders, count {refcount}"
    roster.pool.check_invariants(roster.cache.idle_pages() if roster.cache else ())
    if roster.cache is not None:
        roster.cache.check_invariants()


def _check_entry(entry: Entry, page_size: int, num_outstanding: int, most_pages: int) -> None:
    """The integers of one sequence agree with its status, its pages and its place."""
    sequence = entry.sequence
    assert entry.num_outstanding == num_outstanding
    assert len(set(sequence.pages)) == len(sequence.pages), "a table has a page twice"
    if sequence.status is Status.FINISHED:
        assert sequence.finish_reason is not None and not entry.ticket
        assert num_outstanding or not sequence.pages, "an ended sequence kept its pages"
        return
    assert sequence.finish_reason is None
    assert len(sequence.tokens) < entry.limit or sequence.request.cache_only
    assert 0 <= sequence.num_committed <= sequence.num_computed <= sequence.num_tokens
    if sequence.status is Status.WAITING:
        assert not (sequence.pages or sequence.num_computed or sequence.num_in_flight)
        assert not num_outstanding, "a waiting sequence is in a step"
        return
    assert not entry.ticket, "a running sequence is queued"
    assert entry.num_chained * page_size <= sequence.num_committed, "cached before its commit"
    num_pages = -(-sequence.num_computed // page_size)
    most_pages = max(num_pages, most_pages)
    assert num_pages <= len(sequence.pages) <= most_pages, "wrong table length"
    assert sequence.num_in_flight <= num_outstanding
    assert num_outstanding or sequence.num_committed == sequence.num_computed
