"""PrefixCache: exact prefixes, leaves evicted first, pins, time to live, and no wrong sharing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.scheduling.pages import NoPages, PagePool
from jaxinfer.scheduling.prefix import PrefixCache


def filled(num_pages=10, page_size=2):
    pool = PagePool(num_pages, page_size)
    return pool, PrefixCache(pool)


def put(pool, cache, tokens, salt="", release=True):
    """Cache the full pages of `tokens` as a sequence does, and end it; returns its pages."""
    size = pool.page_size
    nodes = list(cache.match([*tokens, -5], salt, 0.0))
    pages = [node.page for node in nodes]
    pool.incref(pages)
    pages += pool.allocate(len(tokens) // size - len(pages))
    node = None
    for index, page in enumerate(pages):
        node, _ = cache.insert(node, tuple(tokens[index * size : (index + 1) * size]), page, salt)
    if release:
        pool.decref(reversed(pages))
    check(pool, cache)
    return pages


def hit(cache, tokens, salt="", now=0.0):
    return [node.page for node in cache.match(tokens, salt, now)]


def check(pool, cache):
    cache.check_invariants()
    pool.check_invariants(cache.idle_pages())


def test_hit_never_covers_the_whole_prompt():
    pool, cache = filled()
    pages = put(pool, cache, [1, 2, 3, 4])
    assert hit(cache, [1, 2, 3, 4]) == pages[:1]
    assert hit(cache, [1, 2, 3, 4, 5]) == pages
    assert hit(cache, [1, 2]) == []
    assert hit(cache, [1, 2, 3]) == pages[:1]
    assert hit(cache, [9, 2, 3, 4, 5]) == []


def test_same_page_after_another_prefix_is_another_page():
    pool, cache = filled()
    first = put(pool, cache, [1, 1, 7, 7])
    second = put(pool, cache, [2, 2, 7, 7])
    assert not set(first) & set(second)
    assert hit(cache, [2, 2, 7, 7, 0]) == second


def test_salts_do_not_share():
    pool, cache = filled()
    put(pool, cache, [1, 2, 3, 4], salt="a")
    assert hit(cache, [1, 2, 3, 4, 5], salt="b") == []
    assert hit(cache, [1, 2, 3, 4, 5], salt="") == []


def test_equal_hashes_share_nothing():
    # hash(-1) == hash(-2) in CPython, so these keys collide in every dict.
    assert hash((-1, 0)) == hash((-2, 0))
    pool, cache = filled()
    pages = put(pool, cache, [-1, 0])
    assert hit(cache, [-2, 0, 0]) == []
    assert hit(cache, [-1, 0, 0]) == pages


def test_existing_page_stays():
    pool, cache = filled()
    first = put(pool, cache, [1, 2], release=False)
    mine = pool.allocate(1)
    node, is_new = cache.insert(None, (1, 2), mine[0], "")
    assert node.page == first[0] and not is_new
    assert pool.decref(mine) == mine


def test_leaves_go_first_and_least_recently_used():
    pool, cache = filled(num_pages=7)
    old = put(pool, cache, [1, 1, 2, 2, 3, 3])
    new = put(pool, cache, [1, 1, 4, 4])
    assert pool.num_free == 2 and cache.num_evictable == pool.num_available - 2 == 4
    taken = pool.allocate(3)
    assert old[2] in taken and cache.num_evictions == 1
    taken += pool.allocate(1)
    assert old[1] in taken, "the leaf of the older branch goes before the newer branch"
    assert hit(cache, [1, 1, 4, 4, 0]) == new
    taken += pool.allocate(2)
    assert cache.num_cached == 0 and pool.num_available == 0
    check(pool, cache)
    with pytest.raises(NoPages):
        pool.allocate(1)


def test_pages_in_use_are_not_evicted():
    pool, cache = filled(num_pages=4)
    pages = put(pool, cache, [1, 2, 3, 4], release=False)
    assert cache.num_evictable == 0
    with pytest.raises(NoPages):
        pool.allocate(2)
    assert hit(cache, [1, 2, 3, 4, 5]) == pages
    pool.decref(reversed(pages))
    assert len(pool.allocate(3)) == 3


def test_pinned_pages_stay_until_unpinned():
    pool, cache = filled(num_pages=5)
    pages = put(pool, cache, [1, 2, 3, 4])
    assert cache.pin([1, 2, 3, 4], "", None, True, 0.0) == 4
    assert cache.num_pinned == 2 and all(cache.is_pinned(page) for page in pages)
    assert len(pool.allocate(2)) == 2
    with pytest.raises(NoPages):
        pool.allocate(1)
    check(pool, cache)
    assert cache.unpin([1, 2], "") == 0, "the longer pinned prompt needs its beginning"
    assert cache.unpin([1, 2, 3, 4], "") == 4
    check(pool, cache)
    assert len(pool.allocate(2)) == 2


def test_time_to_live():
    pool, cache = filled()
    put(pool, cache, [1, 2, 3, 4])
    put(pool, cache, [1, 2, 5, 5])
    assert cache.pin([1, 2, 3, 4, 9], "", 10.0, True, now=0.0) == 4
    assert len(hit(cache, [1, 2, 3, 4, 9], now=9.0)) == 2
    cache.touch(cache.match([1, 2, 3, 4, 9], "", 9.0), 9.0)
    assert len(hit(cache, [1, 2, 3, 4, 9], now=18.0)) == 2, "use restarts the time"
    assert hit(cache, [1, 2, 3, 4, 9], now=19.0) == []
    assert hit(cache, [1, 2, 5, 5, 9], now=19.0) == [], "what follows an expired page goes too"
    assert cache.num_pinned == 0 and pool.num_free == pool.num_usable
    check(pool, cache)


def test_longer_time_wins():
    pool, cache = filled()
    put(pool, cache, [1, 2])
    cache.pin([1, 2], "", 50.0, False, now=0.0)
    cache.pin([1, 2], "", 5.0, False, now=0.0)
    assert len(hit(cache, [1, 2, 3], now=49.0)) == 1
    assert hit(cache, [1, 2, 3], now=50.0) == []


def test_expired_page_in_use_is_uncached_but_not_freed():
    pool, cache = filled()
    pages = put(pool, cache, [1, 2], release=False)
    cache.pin([1, 2], "", 5.0, True, now=0.0)
    assert hit(cache, [1, 2, 3], now=6.0) == []
    check(pool, cache)
    assert pool.refcount(pages[0]) == 1
    assert pool.decref(pages) == pages


def test_reset_forgets_pins_and_keeps_pages_in_use():
    pool, cache = filled()
    used = put(pool, cache, [1, 2], release=False)
    put(pool, cache, [3, 4])
    cache.pin([1, 2], "", None, True, 0.0)
    cache.reset()
    check(pool, cache)
    assert cache.num_cached == cache.num_pinned == cache.num_evictable == 0
    assert pool.num_free == pool.num_usable - 1
    assert pool.decref(used) == used


def test_use_without_eviction_does_not_grow_the_books():
    pool, cache = filled()
    for _ in range(1000):
        put(pool, cache, [1, 2])
        cache.pin([1, 2], "", 5.0, False, now=0.0)
        cache.match([1, 2], "", 6.0)
    assert len(cache._by_age) + len(cache._by_expiry) < 300


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=1, max_size=9),
            st.sampled_from(["", "a"]),
            st.sampled_from(["put", "put", "put", "pin", "unpin", "wait", "reset", "take"]),
        ),
        max_size=40,
    )
)
def test_random_use_finds_only_what_was_put(operations):
    pool, cache = filled(num_pages=8)
    content: dict[int, tuple] = {}
    now = 0.0
    for tokens, salt, kind in operations:
        nodes = cache.match(tokens, salt, now)
        for depth, node in enumerate(nodes, 1):
            assert content[node.page] == (salt, tuple(tokens[: depth * 2]))
        need = len(tokens) // 2 - len(nodes)
        if kind == "put" and need + cache.num_idle(nodes) <= pool.num_available:
            cache.touch(nodes, now)
            pages = [node.page for node in nodes]
            pool.incref(pages)
            pages += pool.allocate(need)
            node = None
            for i, page in enumerate(pages):
                node, is_new = cache.insert(node, tuple(tokens[2 * i : 2 * i + 2]), page, salt)
                if is_new:
                    content[page] = (salt, tuple(tokens[: 2 * i + 2]))
            pool.decref(reversed(pages))
        elif kind == "pin":
            cache.pin(tokens, salt, float(len(tokens)), len(tokens) % 2 == 0, now)
        elif kind == "unpin":
            cache.unpin(tokens, salt)
        elif kind == "wait":
            now += len(tokens)
        elif kind == "reset":
            cache.reset()
        elif kind == "take" and pool.num_available:
            pool.decref(pool.allocate(1))
        check(pool, cache)
    cache.reset()
    assert pool.num_free == pool.num_usable
