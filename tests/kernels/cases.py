"""Batches for the kernel tests: what they hold, how they are laid on pages, and what must come out.

A Case is small data; `build` turns it into arrays through the public operations only, so one suite
serves every page layout. `oracle` is float64 NumPy on the inputs as they were rounded, and for
quantised pages on data * scale.
"""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Ops, Ragged, Spec
from pallas_kernels.common import DTYPES, PAGE_DTYPES, QUANTISED, quantise

Choice = dict[str, Any]  # axis -> value
Pair = tuple[str, Any, str, Any]  # axis, value, later axis, value

AXES: dict[str, tuple[Any, ...]] = {
    "heads": ((3, 3), (6, 2), (8, 2), (16, 2), (5, 1)),  # MHA, GQA 3, 4, 8, MQA
    "head_dim": (16, 64, 128, 256),
    "dtype": DTYPES,
    "page_dtype": PAGE_DTYPES,
    "page_size": (8, 16, 64, 128),
    "mask": ("causal", "window", "soft_cap", "window+soft_cap"),
    "scenario": ("decode", "prefill", "mixed", "verify", "empty", "edges", "shared"),
}
# Pages are quantised or have q's dtype.
EXCLUDED = {
    ("dtype", dtype, "page_dtype", page_dtype)
    for dtype, page_dtype in itertools.permutations(DTYPES, 2)
}
WINDOW, SOFT_CAP = 19, 1.5
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@dataclass(frozen=True)
class Case:
    """`rows` are (new tokens, kv_len); the first `num_decode` of them have one new token each."""

    rows: tuple[tuple[int, int], ...]
    num_decode: int = 0
    decode_only: bool = False
    heads: tuple[int, int] = (6, 2)
    head_dim: int = 16
    dtype: str = "float32"
    page_dtype: str | None = None  # None: as dtype
    page_size: int = 8
    window: int | None = None
    soft_cap: float | None = None
    shared_pages: int = 0  # the first pages of every row are those of row 0
    padding_rows: int = 2
    padding_tokens: int = 3

    @property
    def spec(self) -> Spec:
        """What an implementation must be able to do for this case."""
        page_dtype = self.page_dtype or self.dtype
        return Spec(*self.heads, self.head_dim, self.page_size, self.dtype, page_dtype)


@dataclass
class Built:
    """A Case as arrays: `tokens[i]` are row i's flat tokens, `k[i]` and `v[i]` `[kv_len, K, H]`."""

    case: Case
    q: np.ndarray
    k: list[np.ndarray]
    v: list[np.ndarray]
    tokens: list[np.ndarray]
    ragged: dict[str, np.ndarray]
    num_pages: int
    written: np.ndarray = field(repr=False)  # slots that hold a real token

    def device_ragged(self) -> Ragged:
        """The Ragged of this batch."""
        arrays = {name: jnp.asarray(x, jnp.int32) for name, x in self.ragged.items()}
        return Ragged(**arrays, decode_only=self.case.decode_only)


def scenario(name: str, page_size: int) -> dict[str, Any]:
    """Rows of a named scenario; lengths cross the blocks and tiles of the implementations."""
    p = page_size
    decode = tuple((1, n) for n in (37, 1, 300, 128))
    edges = tuple((1, m * p + d) for m in (1, 2) for d in (-1, 0, 1))
    return {
        "decode": {"rows": decode, "num_decode": 4, "decode_only": True},
        "prefill": {"rows": ((150, 150), (70, 200), (8, 8)), "padding_tokens": 5},
        "mixed": {"rows": (*decode[:3], (33, 33), (65, 130)), "num_decode": 3},
        "verify": {"rows": ((5, 270), (3, 3), (9, p + 9), (1, p + 1), (8, 129))},
        "empty": {"rows": ((1, 20), (0, 0), (0, 33), (7, 7), (1, 1), (0, 0)), "num_decode": 1},
        "edges": {"rows": (*edges, (p, p), (p + 1, 2 * p), (p - 1, 2 * p - 1)), "num_decode": 6},
        "shared": {
            "rows": ((1, 3 * p + 2), (1, 2 * p), (6, 2 * p + 6), (p, 3 * p)),
            "num_decode": 2,
            "shared_pages": 2 if p < 64 else 1,
        },
    }[name]


def pairs_of(choice: Choice) -> set[Pair]:
    """The pairs of two axes' values that stand in `choice`."""
    return {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(choice, 2)}


def all_pairs(axes: Mapping[str, tuple[Any, ...]], excluded: Collection[Pair] = ()) -> set[Pair]:
    """The pairs that `pairwise` covers."""
    return {
        (a, x, b, y)
        for a, b in itertools.combinations(axes, 2)
        for x, y in itertools.product(axes[a], axes[b])
    } - set(excluded)


def pairwise(
    axes: Mapping[str, tuple[Any, ...]] = AXES, excluded: Collection[Pair] = EXCLUDED
) -> list[Choice]:
    """Few choices, of one value from each of `axes`, in which every pair of values of two axes
    stands somewhere, and no pair of `excluded` anywhere."""
    missing, excluded = all_pairs(axes, excluded), set(excluded)
    rng = np.random.default_rng(0)
    chosen = []
    while missing:
        a, x, b, y = min(missing, key=repr)
        candidates = []
        while len(candidates) < 100:
            choice = {name: values[rng.integers(len(values))] for name, values in axes.items()}
            choice[a], choice[b] = x, y
            if not pairs_of(choice) & excluded:
                candidates.append(choice)
        best = max(candidates, key=lambda choice: len(pairs_of(choice) & missing))
        missing -= pairs_of(best)
        chosen.append(best)
    return chosen


def case_of(choice: dict[str, Any]) -> Case:
    """The Case of one combination of AXES."""
    names = ("heads", "head_dim", "dtype", "page_dtype", "page_size")
    plain = {name: choice[name] for name in names}
    return Case(
        **scenario(choice["scenario"], choice["page_size"]),
        **plain,
        window=WINDOW if "window" in choice["mask"] else None,
        soft_cap=SOFT_CAP if "soft_cap" in choice["mask"] else None,
    )


def _page_table(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Shuffled pages for every row, some of the pool unused; and the size of the pool."""
    counts = [-(-kv_len // case.page_size) for _, kv_len in case.rows]
    num_pages = sum(counts) + 4
    ids = rng.permutation(np.arange(1, num_pages))
    width = max(counts) + 1
    table = np.zeros((len(case.rows) + case.padding_rows, width), np.int32)
    for i, count in enumerate(counts):
        table[i, :count], ids = ids[:count], ids[count:]
        if i and case.shared_pages:
            table[i, : case.shared_pages] = table[0, : case.shared_pages]
    return table, num_pages


def build(case: Case, seed: int = 0) -> Built:
    """Random N(0, 1) inputs for `case`, rounded to its dtype."""
    rng = np.random.default_rng(seed)
    num_heads, num_kv_heads = case.heads
    dtype = np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    table, num_pages = _page_table(case, rng)
    num_rows = table.shape[0]
    news = np.zeros(num_rows, np.int64)
    news[: len(case.rows)] = [new for new, _ in case.rows]
    kv_lens = np.zeros(num_rows, np.int32)
    kv_lens[: len(case.rows)] = [kv_len for _, kv_len in case.rows]
    cu = np.concatenate([[0], np.cumsum(news)])
    num_tokens = num_rows if case.decode_only else int(cu[-1]) + case.padding_tokens
    slots = np.arange(num_tokens) % case.page_size
    k, v, tokens, written = [], [], [], []
    for i, (new, kv_len) in enumerate(case.rows):
        k.append(draw(kv_len, num_kv_heads, case.head_dim))
        v.append(draw(kv_len, num_kv_heads, case.head_dim))
        if i and case.shared_pages:
            same = case.shared_pages * case.page_size
            k[i][:same], v[i][:same] = k[0][:same], v[0][:same]
        tokens.append(np.arange(cu[i], cu[i + 1]))
        positions = np.arange(kv_len)
        row_slots = table[i, positions // case.page_size] * case.page_size
        written.append(row_slots + positions % case.page_size)
        slots[cu[i] : cu[i + 1]] = written[i][kv_len - new :]
    return Built(
        case=case,
        q=draw(num_tokens, num_heads, case.head_dim),
        k=k,
        v=v,
        tokens=tokens,
        ragged={
            "page_table": table,
            "kv_lens": kv_lens,
            "cu_q_lens": cu,
            "num_decode": np.asarray(case.num_decode),
            "slots": slots,
        },
        num_pages=num_pages,
        written=np.concatenate(written),
    )


def why_not(name: str, spec: Spec) -> str | None:
    """Why the implementation `name` refuses `spec` on CPU; None when it can do it."""
    try:
        pallas_kernels.resolve(name, "cpu", spec=spec)
    except ValueError as error:
        return str(error)
    return None


def need(ops: Ops, spec: Spec) -> None:
    """Skips the test, with the reason, where `ops` refuses `spec`."""
    reason = why_not(ops.name, spec)
    if reason:
        pytest.skip(reason)


def pages_of(ops: Ops, built: Built, fill: str | float) -> Any:
    """The pool of `built`; every slot that holds no token is `fill` ("garbage": N(0, 1))."""
    case = built.case
    dtype = case.spec.page_dtype
    need(ops, case.spec)
    pages = ops.allocate(built.num_pages, case.page_size, case.heads[1], case.head_dim, dtype)
    shape = (built.num_pages * case.page_size, case.heads[1], case.head_dim)
    if fill == "garbage":
        rng = np.random.default_rng(99)
        k_all, v_all = (rng.standard_normal(shape).astype(built.q.dtype) for _ in range(2))
    else:
        k_all, v_all = (np.full(shape, fill, built.q.dtype) for _ in range(2))
    k_all[built.written], v_all[built.written] = np.concatenate(built.k), np.concatenate(built.v)
    slots = jnp.arange(shape[0], dtype=jnp.int32)
    return write(ops, pages, jnp.asarray(k_all), jnp.asarray(v_all), slots)


# Compiled once for each shape and implementation, whatever the test.
@partial(jax.jit, static_argnums=0)
def write(ops: Ops, pages: Any, k: jax.Array, v: jax.Array, slots: jax.Array) -> Any:
    """ops.kv_write under jit."""
    return ops.kv_write(pages, k, v, slots)


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def run(
    ops: Ops,
    q: jax.Array,
    pages: Any,
    ragged: Ragged,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """ops.paged_attention under jit."""
    return ops.paged_attention(q, pages, ragged, scale=scale, window=window, soft_cap=soft_cap)


def attend(ops: Ops, built: Built, fill: str | float = np.nan) -> np.ndarray:
    """paged_attention of `built` under jit; queries that belong to no row are `fill` too."""
    q = built.q.copy()
    is_padding = np.ones(len(q), bool)
    is_padding[np.concatenate(built.tokens)] = False
    q[is_padding] = 0.5 if fill == "garbage" else fill
    case, pages, ragged = built.case, pages_of(ops, built, fill), built.device_ragged()
    options = (case.head_dim**-0.5, case.window, case.soft_cap)
    out = run(ops, jnp.asarray(q), pages, ragged, *options)
    assert out.dtype == q.dtype and out.shape == q.shape
    return np.asarray(out)


def quantised(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """What `quantise` gives for `x [..., H]`, both as float64."""
    flat = x.reshape(-1, x.shape[-1])
    # Compiled once for each H: the number of vectors is rounded up.
    padded = np.pad(flat, [(0, -len(flat) % 2**13), (0, 0)])
    data, scale = (np.asarray(y)[: len(flat)] for y in _quantise(padded, dtype))
    return data.astype(np.float64).reshape(x.shape), scale.astype(np.float64).reshape(x.shape[:-1])


_quantise = jax.jit(quantise, static_argnums=1)


def stored(built: Built, x: np.ndarray) -> np.ndarray:
    """`x [..., H]` as the pages of `built` hold it, float64."""
    dtype = built.case.spec.page_dtype
    if dtype not in QUANTISED:
        return x.astype(np.float64)
    data, scale = quantised(x, dtype)
    return data * scale[..., None]


def oracle(built: Built) -> np.ndarray:
    """`[T, N, H]` float64: softmax over each row's visible keys; zeros for padding tokens."""
    case = built.case
    out = np.zeros(built.q.shape, np.float64)
    group = case.heads[0] // case.heads[1]
    ends = np.cumsum([len(k) for k in built.k])[:-1]
    ks, vs = (np.split(stored(built, np.concatenate(x)), ends) for x in (built.k, built.v))
    for k, v, tokens, (new, kv_len) in zip(ks, vs, built.tokens, case.rows, strict=True):
        positions, q_pos = np.arange(kv_len), np.arange(kv_len - new, kv_len)[:, None]
        visible = positions <= q_pos
        if case.window is not None:
            visible &= positions > q_pos - case.window
        for head in range(case.heads[1]):
            heads = slice(head * group, (head + 1) * group)
            q = built.q[tokens, heads].astype(np.float64)  # [new, G, H]
            scores = q @ k[:, head].T * case.head_dim**-0.5
            if case.soft_cap is not None:
                scores = case.soft_cap * np.tanh(scores / case.soft_cap)
            scores = np.where(visible[:, None], scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-1e9))
            out[tokens, heads] = weights @ v[:, head] / weights.sum(axis=-1, keepdims=True)
    return out


def error_of(out: np.ndarray, expected: np.ndarray) -> float:
    """The largest error as a multiple of what is allowed; infinite where `out` is not finite.

    Allowed is 2e-5 in float32, else eps |o| + 2e-3 (rounding the output costs eps |o| / 2).
    That is within the rule for every kernel, 4 eps max|o| + 2e-3, which in bfloat16 misses a key of
    150.
    """
    eps = EPS[out.dtype.name]
    allowed = 2e-5 if out.dtype == np.float32 else eps * np.abs(expected) + 2e-3
    ratio = np.abs(out.astype(np.float64) - expected) / allowed
    return float(np.where(np.isfinite(ratio), ratio, np.inf).max())


def changed(built: Built, **arrays: np.ndarray) -> Built:
    """`built` with other arrays in its Ragged, the data as it was."""
    return replace(built, ragged={**built.ragged, **arrays})
