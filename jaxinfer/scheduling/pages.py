"""PagePool: which KV pages are free, and how many sequences hold each of the others.

A page is given out by `allocate` with one reference. A page whose last reference goes is free
again, unless the prefix cache keeps it: then it is idle, and given out when the free list is short.
Page 0 is the trash page: padding is written there, nobody owns it and it is never given out.
"""

from collections.abc import Iterable
from typing import Protocol

from jaxinfer.errors import ConfigError


class NoPages(Exception):
    """Fewer pages can be given out than were asked for; the pool is unchanged."""


class PageKeeper(Protocol):
    """What a pool asks of the prefix cache, which may keep pages that nobody references."""

    num_evictable: int

    def mark_used(self, page: int) -> None:
        """`page`, idle and kept, got its first reference."""
        ...

    def mark_idle(self, page: int) -> bool:
        """`page` lost its last reference; True to keep it, False to let it go free."""
        ...

    def evict(self, num_pages: int) -> None:
        """Give up `num_pages` idle pages, each through `PagePool.reclaim`."""
        ...


class PagePool:
    """Reference counts of pages 1..num_pages-1, of `page_size` tokens each."""

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 2:
            raise ConfigError(
                f"num_pages must be >= 2 (page 0 is the trash page); got {num_pages}",
                field="num_pages",
            )
        if page_size < 1:
            raise ConfigError(f"page_size must be >= 1; got {page_size}", field="page_size")
        self.num_pages = num_pages
        self.page_size = page_size
        self.refcounts = [0] * num_pages
        """References per page; read-only outside the pool."""
        self.generations = [0] * num_pages
        """How often each page was given out; read-only outside the pool."""
        self.keeper: PageKeeper | None = None
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_usable(self) -> int:
        """Pages that can ever be given out."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that nobody references and that hold nothing worth keeping."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give out now: the free ones and what the cache can give up."""
        return len(self._free) + (self.keeper.num_evictable if self.keeper else 0)

    def refcount(self, page: int) -> int:
        return self.refcounts[page]

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int) -> list[int]:
        """`num_pages` pages with one reference each, all or none.

        Raises:
            NoPages: fewer than `num_pages` are available; nothing has changed.
        """
        short = num_pages - len(self._free)
        if short > 0:
            if self.keeper is None or self.keeper.num_evictable < short:
                raise NoPages(f"{num_pages} pages wanted, {self.num_available} available")
            self.keeper.evict(short)
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self.refcounts[page] = 1
            self.generations[page] += 1
        return pages

    def incref(self, pages: Iterable[int]) -> None:
        """Add a reference to each page, which is in use or kept by the cache."""
        for page in pages:
            count = self.refcounts[page]
            if count == 0:
                if self.keeper is None:
                    raise RuntimeError(f"page {page} is free and cannot be shared")
                self.keeper.mark_used(page)
            self.refcounts[page] = count + 1

    def decref(self, pages: Iterable[int]) -> list[int]:
        """Drop a reference to each page; returns those that became free (not those kept idle)."""
        freed = []
        for page in pages:
            count = self.refcounts[page] - 1
            if count < 0:
                raise RuntimeError(f"page {page} was released more often than it was taken")
            self.refcounts[page] = count
            if count == 0 and not (self.keeper and self.keeper.mark_idle(page)):
                freed.append(page)
        self._free.extend(freed)
        return freed

    def reclaim(self, page: int) -> None:
        """Take back an idle page that the cache no longer keeps."""
        if self.refcounts[page]:
            raise RuntimeError(f"page {page} is in use and cannot be reclaimed")
        self._free.append(page)

    def check_invariants(self, kept_idle: Iterable[int] = ()) -> None:
        """Every page but 0 is in exactly one of: free, kept idle by the cache, in use."""
        free = set(self._free)
        kept = set(kept_idle)
        used = {page for page, count in enumerate(self.refcounts) if count > 0}
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert min(self.refcounts) >= 0, "a page has a negative reference count"
        assert 0 not in free | kept | used, "the trash page was given out"
        assert not (free & kept or free & used or kept & used), "a page is in two sets"
        assert len(free) + len(kept) + len(used) == self.num_usable, "a page leaked"
