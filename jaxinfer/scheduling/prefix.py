"""PrefixCache: full pages of known tokens, found again by the exact tokens that led to them.

A tree per salt. A node is a page; its key under its parent is the tuple of its tokens, so a dict
lookup compares the tokens themselves and no hash collision can share a wrong page. A page that no
sequence references stays until the pool needs it: least recently used first, leaves before parents.
Nodes may be pinned (never evicted) and may have a time to live, in seconds since their last use.
"""

import heapq
import math
from collections.abc import Iterator, Sequence

from jaxinfer.scheduling.pages import PagePool


class Node:
    """A cached page. `tokens` are its `page_size` tokens, the ones before are its ancestors'.

    `is_used`: sequences reference its page. A node that is used or pinned has a parent that is too,
    so what can be given up is always whole ends of branches.
    """

    __slots__ = (
        "children",
        "expires",
        "is_alive",
        "is_pinned",
        "is_used",
        "page",
        "parent",
        "salt",
        "stamp",
        "tokens",
        "ttl",
    )

    def __init__(self, parent: "Node | None", tokens: tuple[int, ...], page: int, salt: str):
        self.parent = parent
        self.tokens = tokens
        self.page = page
        self.salt = salt
        self.children: dict[tuple[int, ...], Node] = {}
        self.is_pinned = False
        self.is_used = True
        self.is_alive = True
        self.ttl: float | None = None
        self.expires = math.inf
        self.stamp = 0


class PrefixCache:
    """Finds, keeps and gives up pages by their exact prefix. The pool's `keeper`."""

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.page_size = pool.page_size
        self.num_evictable = 0
        self.num_pinned = 0
        self.num_evictions = 0
        self.epoch = 0
        """Counts resets: pages computed in an earlier epoch must not be inserted any more."""
        self._roots: dict[str, Node] = {}
        self._node_of: dict[int, Node] = {}
        self._by_age: list[tuple[int, Node]] = []
        self._by_expiry: list[tuple[float, int, Node]] = []
        self._clock = 0
        pool.keeper = self

    @property
    def num_cached(self) -> int:
        """Pages in the cache, whether in use, pinned or idle."""
        return len(self._node_of)

    # -- finding and adding ---------------------------------------------------------------------

    def match(self, tokens: Sequence[int], salt: str, now: float) -> list[Node]:
        """Nodes of the longest cached run of full pages that begins `tokens`; changes no node.

        At least the last token is left out, so that a step always has logits to compute.
        """
        self.expire(now)
        return list(self._path(tokens, salt, (len(tokens) - 1) // self.page_size))

    def _path(self, tokens: Sequence[int], salt: str, max_pages: int) -> Iterator[Node]:
        node = self._roots.get(salt)
        size = self.page_size
        for start in range(0, max_pages * size, size):
            if node is None:
                return
            node = node.children.get(tuple(tokens[start : start + size]))
            if node is not None:
                yield node

    def touch(self, nodes: Sequence[Node], now: float) -> None:
        """Restart the time to live of `nodes`, which are being used."""
        for node in nodes:
            if node.ttl is not None:
                node.expires = now + node.ttl

    def insert(
        self, parent: Node | None, tokens: tuple[int, ...], page: int, salt: str
    ) -> tuple[Node, bool]:
        """The node of `tokens` after `parent` (None: at the start), and whether it is new.

        `page` is full and committed; its owner references it and the pages of all nodes before. It
        enters the cache unless another page is there for the same prefix: then that node is
        returned, and the owner must take its page in exchange. `parent` must be alive.
        """
        if parent is None:
            parent = self._roots.get(salt)
            if parent is None:
                parent = self._roots[salt] = Node(None, (), 0, salt)
        node = parent.children.get(tokens)
        if node is not None:
            return node, False
        if not self.pool.refcounts[page] or page in self._node_of:
            raise RuntimeError(f"page {page} is free, or cached under another prefix")
        node = parent.children[tokens] = Node(parent, tokens, page, salt)
        self._node_of[page] = node
        return node, True

    def num_idle(self, nodes: Sequence[Node]) -> int:
        """How many of `nodes` count as evictable now."""
        return sum(not (node.is_used or node.is_pinned) for node in nodes)

    # -- what the pool tells --------------------------------------------------------------------

    def mark_used(self, page: int) -> None:
        node = self._node_of.get(page)
        if node is None:
            raise RuntimeError(f"page {page} is free and cannot be shared")
        node.is_used = True
        self.num_evictable -= not node.is_pinned

    def mark_idle(self, page: int) -> bool:
        node = self._node_of.get(page)
        if node is None:
            return False
        node.is_used = False
        self._note_idle(node)
        return True

    def _note_idle(self, node: Node) -> None:
        if node.is_pinned:
            return
        self.num_evictable += 1
        self._clock += 1
        node.stamp = self._clock
        if not node.children:
            self._queue_for_eviction(node)

    # -- giving up ------------------------------------------------------------------------------

    def _queue_for_eviction(self, node: Node) -> None:
        # Entries are not removed when a node is used again; they are dropped here and in evict().
        if len(self._by_age) > 2 * len(self._node_of) + 64:
            self._by_age = [item for item in self._by_age if self._is_evictable_leaf(*item)]
            heapq.heapify(self._by_age)
        heapq.heappush(self._by_age, (node.stamp, node))

    @staticmethod
    def _is_evictable_leaf(stamp: int, node: Node) -> bool:
        is_idle = node.is_alive and not (node.is_used or node.is_pinned)
        return is_idle and not node.children and node.stamp == stamp

    def evict(self, num_pages: int) -> None:
        """Give up `num_pages` (<= num_evictable) pages, each the least recently used idle leaf."""
        while num_pages:
            stamp, node = heapq.heappop(self._by_age)
            if self._is_evictable_leaf(stamp, node):
                self._drop(node)
                self.num_evictions += 1
                num_pages -= 1

    def expire(self, now: float) -> None:
        """Drop every node whose time to live is over, and all after it."""
        while self._by_expiry and self._by_expiry[0][0] <= now:
            _, tie, node = heapq.heappop(self._by_expiry)
            if not node.is_alive or node.expires == math.inf:
                continue
            if node.expires > now:
                heapq.heappush(self._by_expiry, (node.expires, tie, node))
            else:
                self._drop(node)

    def _drop(self, node: Node) -> None:
        """Take `node` and all after it out of the cache; pages that nobody references go free."""
        parent = node.parent
        if parent is None:
            raise RuntimeError("a root is no page")
        del parent.children[node.tokens]
        if not parent.children:
            if parent.parent is None:
                del self._roots[parent.salt]
            elif not (parent.is_used or parent.is_pinned):
                self._queue_for_eviction(parent)
        self._forget(node)

    def _forget(self, top: Node) -> None:
        """Mark `top` and all after it dead, children first."""
        order = [top]
        for node in order:
            order.extend(node.children.values())
        for node in reversed(order):
            node.is_alive = False
            self.num_evictable -= not (node.is_used or node.is_pinned)
            self.num_pinned -= node.is_pinned
            del self._node_of[node.page]
            if not node.is_used:
                self.pool.reclaim(node.page)

    def reset(self) -> None:
        """Forget everything, pins included. Pages in use stay with their sequences, uncached."""
        for root in self._roots.values():
            for node in root.children.values():
                self._forget(node)
        self._roots.clear()
        self._by_age.clear()
        self._by_expiry.clear()
        self.epoch += 1

    # -- pins and time to live ------------------------------------------------------------------

    def pin(
        self, tokens: Sequence[int], salt: str, ttl: float | None, pin: bool, now: float
    ) -> int:
        """Mark the cached full pages of `tokens`; returns how many tokens they hold.

        `pin`: never evict them, until `ttl` runs out. `ttl`: seconds after their last use at which
        they, and what follows them, are dropped; None for never. A shorter time than one given
        before, or leaving `pin` out, takes nothing back.
        """
        self.expire(now)
        nodes = list(self._path(tokens, salt, len(tokens) // self.page_size))
        for node in nodes:
            if pin and not node.is_pinned:
                node.is_pinned = True
                self.num_pinned += 1
                self.num_evictable -= not node.is_used
            if pin or ttl is not None:
                self._extend(node, math.inf if ttl is None else ttl, now)
        return len(nodes) * self.page_size

    def unpin(self, tokens: Sequence[int], salt: str) -> int:
        """Take back the pins on `tokens` that no longer pinned prompt needs; how many tokens."""
        nodes = list(self._path(tokens, salt, len(tokens) // self.page_size))
        num_unpinned = 0
        for node in reversed(nodes):
            if any(child.is_pinned for child in node.children.values()):
                break
            if node.is_pinned:
                node.is_pinned = False
                self.num_pinned -= 1
                num_unpinned += 1
                if not node.is_used:
                    self._note_idle(node)
            if node.ttl == math.inf and all(c.ttl is None for c in node.children.values()):
                node.ttl = None
        return num_unpinned * self.page_size

    def _extend(self, node: Node, ttl: float, now: float) -> None:
        # A node's time is never shorter than that of one after it: pin() marks whole paths and
        # keeps the longest, and touch() restarts whole paths. So a drop takes no live pin with it.
        node.ttl = ttl if node.ttl is None else max(node.ttl, ttl)
        was_queued = node.expires < math.inf
        node.expires = now + node.ttl
        if len(self._by_expiry) > 2 * len(self._node_of) + 64:
            self._by_expiry = [item for item in self._by_expiry if item[2].is_alive]
            heapq.heapify(self._by_expiry)
        if node.expires < math.inf and not was_queued:
            self._clock += 1
            heapq.heappush(self._by_expiry, (node.expires, self._clock, node))

    def is_pinned(self, page: int) -> bool:
        node = self._node_of.get(page)
        return node is not None and node.is_pinned

    # -- checking -------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """Every cached node, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    def idle_pages(self) -> list[int]:
        """Cached pages that no sequence references."""
        return [page for page in self._node_of if not self.pool.refcounts[page]]

    def check_invariants(self) -> None:
        """Counts agree with the tree, and every idle leaf can be found by evict()."""
        nodes = list(self.nodes())
        assert {n.page: n for n in nodes} == self._node_of, "tree and page index differ"
        assert len(nodes) == len(self._node_of), "a page is cached under two prefixes"
        assert all(root.children for root in self._roots.values()), "an empty root was kept"
        queued = {id(n) for stamp, n in self._by_age if self._is_evictable_leaf(stamp, n)}
        for node in nodes:
            assert node.is_alive and len(node.tokens) == self.page_size
            assert node.is_used == bool(self.pool.refcounts[node.page])
            if not (node.is_used or node.is_pinned or node.children):
                assert id(node) in queued, "an idle leaf was lost"
            for child in node.children.values():
                assert node.is_used or not child.is_used, "a page in use hangs on an idle one"
                assert node.is_pinned or not child.is_pinned, "a pin hangs on nothing"
                assert child.ttl is None or child.expires <= node.expires, "parent expires first"
        assert self.num_evictable == self.num_idle(nodes)
        assert self.num_pinned == sum(node.is_pinned for node in nodes)
