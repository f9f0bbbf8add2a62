"""PagePool: reference counts, all or nothing, and no page lost or given out twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.errors import ConfigError
from jaxinfer.scheduling.pages import NoPages, PagePool


def test_trash_page_is_never_given_out():
    pool = PagePool(5, 4)
    assert pool.num_usable == 4
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]


def test_allocate_is_all_or_nothing():
    pool = PagePool(4, 4)
    pages = pool.allocate(2)
    with pytest.raises(NoPages, match="2 pages wanted, 1 available"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert pool.decref(pages) == pages
    assert pool.num_free == 3
    pool.check_invariants()


def test_last_reference_frees():
    pool = PagePool(4, 4)
    pages = pool.allocate(1)
    pool.incref(pages)
    assert pool.refcount(pages[0]) == 2
    assert pool.decref(pages) == []
    assert pool.decref(pages) == pages


def test_releasing_or_sharing_a_free_page_is_an_error():
    pool = PagePool(4, 4)
    with pytest.raises(RuntimeError, match="released more often"):
        pool.decref([1])
    with pytest.raises(RuntimeError, match="free and cannot be shared"):
        pool.incref([1])
    with pytest.raises(RuntimeError, match="in use"):
        pool.reclaim(pool.allocate(1)[0])


@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 4), (0, 4), (4, 0)])
def test_impossible_sizes_are_refused(num_pages, page_size):
    with pytest.raises(ConfigError):
        PagePool(num_pages, page_size)


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_num_pages_for(num_tokens, num_pages):
    assert PagePool(4, 4).num_pages_for(num_tokens) == num_pages


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), max_size=60))
def test_random_operations_keep_the_books(operations):
    pool = PagePool(8, 2)
    tables: list[list[int]] = []
    for kind, number in operations:
        if kind == 0 and number <= pool.num_free:
            tables.append(pool.allocate(number))
        elif kind == 1 and tables:
            shared = tables[number % len(tables)]
            pool.incref(shared)
            tables.append(list(shared))
        elif kind == 2 and tables:
            pool.decref(reversed(tables.pop(number % len(tables))))
        pool.check_invariants()
        for page in range(1, 8):
            assert pool.refcount(page) == sum(page in table for table in tables)
    for table in tables:
        pool.decref(table)
    assert pool.num_free == pool.num_usable
