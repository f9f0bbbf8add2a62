"""Who needs pages that are not there, and who gives way: functions of the state, changing none."""

from collections.abc import Sequence as Seq

from jaxinfer.config import SchedulerConfig
from jaxinfer.request import Sequence
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.scheduling.prefix import PrefixCache
from jaxinfer.scheduling.queue import Entry


def pages_needed(pool: PagePool, sequence: Sequence, num_new: int) -> int:
    """New pages for the next `num_new` tokens, one to copy a shared last page into included."""
    need = pool.num_pages_for(sequence.num_computed + num_new) - len(sequence.pages)
    if sequence.num_computed % pool.page_size:
        need += pool.refcounts[sequence.pages[-1]] > 1
    return need


def first_short(pool: PagePool, chosen: Seq[tuple[Entry, int]]) -> Entry | None:
    """The first entry, in the order of service, that gets too few pages; None if none does."""
    available = pool.num_available
    num_holders: dict[int, int] = {}
    for entry, num_new in sorted(chosen, key=lambda item: item[0].key):
        sequence = entry.sequence
        available -= pages_needed(pool, sequence, num_new)
        if sequence.num_computed % pool.page_size and pool.refcounts[sequence.pages[-1]] > 1:
            # The last holder of a shared page writes in place: it was charged one page too many.
            page = sequence.pages[-1]
            num_holders[page] = num_holders.get(page, pool.refcounts[page]) - 1
            available += num_holders[page] == 0
        if available < 0:
            return entry
    return None


def choose_victim(
    pool: PagePool,
    cache: PrefixCache | None,
    config: SchedulerConfig,
    running: Seq[Entry],
    needy: Entry,
) -> Entry:
    """Who of `running` (two or more, sorted by key) loses its pages, so that `needy` gets some.

    The least work to redo, then the latest arrival. Never the first, nor one of a better priority
    than `needy`; one preempted `max_preemptions` times only when all were. May be `needy` itself.
    """
    candidates = [entry for entry in running[1:] if entry.key[0] >= needy.key[0]]
    spared = [e for e in candidates if e.sequence.num_preemptions < config.max_preemptions]
    return min(
        reversed(spared or candidates),
        key=lambda entry: work_to_redo(pool, cache, entry.sequence),
    )


def work_to_redo(pool: PagePool, cache: PrefixCache | None, sequence: Sequence) -> int:
    """Tokens to compute again after a preemption, but for leading pages that others keep alive."""
    num_kept = 0
    for page in sequence.pages:
        if pool.refcounts[page] == 1 and not (cache and cache.is_pinned(page)):
            break
        num_kept += pool.page_size
    return max(0, sequence.num_computed - num_kept)
