"""What the comparison with the oracle notices: each fault in one row of each case of the suite.

The faults are put into a NumPy form of paged attention, not into the implementations: that the
suite would notice them is a property of its cases and of `error_of`, and so it holds for all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from pallas_kernels.common import PAGE_DTYPES, QUANTISED
from tests.kernels.cases import Built, build, case_of, error_of, oracle, pairwise, quantised


@dataclass(frozen=True)
class Paged:
    """A batch as an implementation sees it, in float64; unused slots hold N(0, 1)."""

    q: np.ndarray  # [T, N, H]
    k: np.ndarray  # [slots, K, H]
    v: np.ndarray
    k_scale: np.ndarray  # [slots, K]; ones where the pages are not quantised
    v_scale: np.ndarray
    page_table: np.ndarray  # [S, MP]
    kv_lens: np.ndarray  # [S]
    cu_q_lens: np.ndarray  # [S + 1]
    page_size: int
    window: int | None
    soft_cap: float | None
    kv_heads: np.ndarray  # [N]: the KV head of each query head
    # Of a row of the given length, whether each of the positions is looked at.
    looked_at: Callable[[np.ndarray, int], np.ndarray] = field(default=lambda p, n: p >= 0)


def paged_of(built: Built) -> Paged:
    """`built` on its pages."""
    case = built.case
    rng = np.random.default_rng(7)
    shape = (built.num_pages * case.page_size, case.heads[1], case.head_dim)
    data, scales = [], []
    for rows in (built.k, built.v):
        x = rng.standard_normal(shape).astype(built.q.dtype)
        x[built.written] = np.concatenate(rows)
        scale = np.ones(shape[:2])
        if case.spec.page_dtype in QUANTISED:
            x, scale = quantised(x, case.spec.page_dtype)
        data.append(x.astype(np.float64))
        scales.append(scale)
    return Paged(
        built.q.astype(np.float64),
        *data,
        *scales,
        **{name: built.ragged[name] for name in ("page_table", "kv_lens", "cu_q_lens")},
        page_size=case.page_size,
        window=case.window,
        soft_cap=case.soft_cap,
        kv_heads=np.arange(case.heads[0]) // (case.heads[0] // case.heads[1]),
    )


def attention(paged: Paged) -> np.ndarray:
    """`[T, N, H]`; a query that sees nothing gives zeros."""
    p = paged
    out = np.zeros_like(p.q)
    for row, kv_len in enumerate(p.kv_lens):
        first, end = p.cu_q_lens[row : row + 2]
        if first == end:
            continue
        positions = np.arange(kv_len)
        q_pos = (kv_len - end + np.arange(first, end))[:, None]
        visible = (positions <= q_pos) & p.looked_at(positions, kv_len)
        if p.window is not None:
            visible &= positions > q_pos - p.window
        slots = p.page_table[row][positions // p.page_size] * p.page_size + positions % p.page_size
        for kv_head in range(p.k.shape[1]):
            heads = np.flatnonzero(p.kv_heads == kv_head)
            q = p.q[first:end, heads].reshape(-1, p.q.shape[-1])
            scores = q @ p.k[slots, kv_head].T * p.k_scale[slots, kv_head] * q.shape[-1] ** -0.5
            if p.soft_cap is not None:
                scores = p.soft_cap * np.tanh(scores / p.soft_cap)
            weights = np.exp(scores)  # of N(0, 1): finite without a maximum taken off
            weights *= np.repeat(visible, len(heads), axis=0)
            total = weights.sum(axis=1, keepdims=True)
            weights *= p.v_scale[slots, kv_head] / np.where(total == 0, 1, total)
            out[first:end, heads] = (weights @ p.v[slots, kv_head]).reshape(
                end - first, len(heads), -1
            )
    return out


def _swap_first_and_last_page(p: Paged) -> Paged:
    table = p.page_table.copy()
    for row, kv_len in zip(table, p.kv_lens, strict=True):
        last = max(kv_len - 1, 0) // p.page_size
        row[[0, last]] = row[[last, 0]]
    return replace(p, page_table=table)


def _swap_pages_between_rows(p: Paged) -> Paged:
    table = p.page_table.copy()
    table[:, 0] = np.roll(table[:, 0], 1)
    return replace(p, page_table=table)


def _longer(p: Paged, by: int) -> Paged:
    return replace(p, kv_lens=np.where(p.kv_lens > 0, p.kv_lens + by, 0))


def _window(p: Paged, by: int) -> Paged:
    return p if p.window is None else replace(p, window=p.window + by)


def _another_scale(p: Paged, axis: int) -> Paged:
    return replace(p, k_scale=np.roll(p.k_scale, 1, axis), v_scale=np.roll(p.v_scale, 1, axis))


def _head(p: Paged, kv_heads: np.ndarray) -> Paged:
    return replace(p, kv_heads=kv_heads % p.k.shape[1])


def _looked_at(p: Paged, looked_at: Callable[[np.ndarray, int], np.ndarray]) -> Paged:
    return replace(p, looked_at=looked_at)


FAULTS: dict[str, Callable[[Paged], Paged]] = {
    "the first page dropped": lambda p: _looked_at(p, lambda j, n: j >= p.page_size),
    "the last page dropped": lambda p: _looked_at(
        p, lambda j, n: j < (n - 1) // p.page_size * p.page_size
    ),
    "half the keys": lambda p: _looked_at(p, lambda j, n: j % 2 == 0),
    "pages swapped within a row": _swap_first_and_last_page,
    "pages swapped between rows": _swap_pages_between_rows,
    "the page table of another row": lambda p: replace(p, page_table=np.roll(p.page_table, 1, 0)),
    "length + 1": lambda p: _longer(p, 1),
    "length - 1": lambda p: _longer(p, -1),
    "window + 1": lambda p: _window(p, 1),
    "window - 1": lambda p: _window(p, -1),
    "window ignored": lambda p: replace(p, window=None),
    "soft cap ignored": lambda p: replace(p, soft_cap=None),
    "the next head group": lambda p: _head(p, p.kv_heads + 1),
    "heads dealt out in turn": lambda p: _head(p, np.arange(len(p.kv_heads))),
    "K and V swapped": lambda p: replace(p, k=p.v, v=p.k, k_scale=p.v_scale, v_scale=p.k_scale),
    "the scales of K and V swapped": lambda p: replace(p, k_scale=p.v_scale, v_scale=p.k_scale),
    "K's scales ignored": lambda p: replace(p, k_scale=np.full_like(p.k_scale, p.k_scale.mean())),
    "V's scales ignored": lambda p: replace(p, v_scale=np.full_like(p.v_scale, p.v_scale.mean())),
    "the scales of the token before": lambda p: _another_scale(p, 0),
    "the scales of another head": lambda p: _another_scale(p, 1),
}


@pytest.fixture(scope="module")
def batches() -> list[tuple[Built, Paged, np.ndarray, np.ndarray]]:
    """Each case of the suite, on its pages, with the oracle and the faultless result."""
    batches = []
    for choice in pairwise():
        built = build(case_of(choice))
        paged = paged_of(built)
        batches.append((built, paged, oracle(built), attention(paged)))
    return batches


def test_without_a_fault_it_is_the_oracle(batches: list):
    for built, _, expected, exact in batches:
        assert np.abs(exact - expected).max() < 1e-12
        assert error_of(exact.astype(built.q.dtype), expected) <= 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_one_row_is_noticed(batches: list, name: str):
    """In every row whose result it changes at all, and with every dtype of pages it concerns."""
    seen = set()
    for built, paged, expected, exact in batches:
        faulty = attention(FAULTS[name](paged))
        for tokens in built.tokens:
            if np.abs(faulty[tokens] - exact[tokens]).max(initial=0) > 1e-9:
                out = faulty[tokens].astype(built.q.dtype)
                assert error_of(out, expected[tokens]) > 1, (built.case, tokens)
                seen.add(built.case.spec.page_dtype)
    assert seen == set(QUANTISED if "scale" in name else PAGE_DTYPES)
