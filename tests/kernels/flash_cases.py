"""Inputs for the flash attention tests, what must come out, and how far off a result may be.

A Case is small data; `build` turns it into arrays, `run` gives the output and the gradients of an
implementation, `oracle` what they must be: float64 NumPy on the inputs as they were rounded, the
gradients in closed form. `errors_of` compares the two.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.common import DTYPES, Target
from pallas_kernels.flash_attention import attention, reference, tpu, validate, xla
from tests.kernels.cases import EPS, Choice

CAUSAL_MASKS = ("causal", "window", "soft_cap", "window+soft_cap", "causal+segments", "q_offset")
AXES: dict[str, tuple[Any, ...]] = {
    "heads": ((3, 3), (6, 2), (8, 2), (16, 2), (5, 1)),  # MHA, GQA 3, 4, 8, MQA
    "head_dim": (64, 128, 256),
    "dtype": DTYPES,
    "mask": ("full", *CAUSAL_MASKS, "segments"),
    # (S, Sk): one query, an odd size, edges of blocks of 32, 64 and 128, and much longer keys
    "lengths": ((1, 130), (77, 77), (127, 129), (129, 128), (50, 200)),
}
WINDOW, SOFT_CAP = 19, 1.5
NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Implementation:
    """One of those under test: a module of `flash_attention`, and what it is built for."""

    name: str
    module: Any
    target: Target


@dataclass(frozen=True)
class Configured:
    """A module of `flash_attention` with block sizes that are not its own choice."""

    module: Any
    forward_config: Any
    backward_config: Any

    def forward(self, *args: Any) -> Any:
        return self.module.forward(*args, config=self.forward_config)

    def backward(self, *args: Any) -> Any:
        return self.module.backward(*args, config=self.backward_config)


IMPLEMENTATIONS = [
    Implementation("reference", reference, Target("cpu")),
    # Blocks so small that the short cases of a test have several of them, unequal ones.
    Implementation("xla", Configured(xla, xla.Config(32, 64), xla.Config(64, 32)), Target("cpu")),
    Implementation("tpu", tpu, Target("cpu", None, interpret=True)),
]


@dataclass(frozen=True)
class Case:
    """One call. `q_offset` has one entry for each of the two rows of the batch."""

    q_len: int
    kv_len: int
    heads: tuple[int, int] = (6, 2)
    head_dim: int = 64
    dtype: str = "float32"
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    segments: bool = False
    q_offset: tuple[int, int] = (0, 0)


@dataclass
class Built:
    """A Case as arrays."""

    case: Case
    q: np.ndarray  # [B, S, N, H]
    k: np.ndarray  # [B, Sk, K, H]
    v: np.ndarray
    dout: np.ndarray  # [B, S, N, H]: what the gradients are taken for
    q_offset: np.ndarray  # [B]
    segments: tuple[np.ndarray, np.ndarray] | None  # [B, S], [B, Sk]


@dataclass
class Expected:
    """What must come out, float64, and its noise: the square root of the sum of the squares of the
    terms that are added up in it. Rounding each term once costs about eps / 4 of that."""

    value: np.ndarray
    noise: np.ndarray


def case_of(choice: Choice) -> Case:
    """The Case of one combination of AXES."""
    mask = choice["mask"]
    q_len, kv_len = choice["lengths"]
    q_offset = (0, 0)
    if mask == "q_offset":
        kv_len = max(kv_len, q_len + 40)
        q_offset = (kv_len - q_len, (kv_len - q_len) // 2)
    return Case(
        q_len,
        kv_len,
        **{name: choice[name] for name in ("heads", "head_dim", "dtype")},
        causal=mask in CAUSAL_MASKS,
        window=WINDOW if "window" in mask else None,
        soft_cap=SOFT_CAP if "soft_cap" in mask else None,
        segments="segments" in mask,
        q_offset=q_offset,
    )


def build(case: Case, seed: int = 0) -> Built:
    """Random N(0, 1) inputs for `case`, rounded to its dtype.

    The segments of row 0 are runs, those of row 1 are mixed; one query of each row and one key
    have a segment of their own (of more than one).
    """
    rng = np.random.default_rng(seed)
    num_heads, num_kv_heads = case.heads
    dtype = np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))

    def draw(length: int, heads: int) -> np.ndarray:
        return rng.standard_normal((2, length, heads, case.head_dim)).astype(dtype)

    segments = None
    if case.segments:
        segments = (_segments(rng, case.q_len), _segments(rng, case.kv_len))
        for own, ids in zip((-7, 2**31 - 1), segments, strict=True):
            if ids.shape[1] > 1:
                ids[:, ids.shape[1] // 3] = own
    return Built(
        case=case,
        q=draw(case.q_len, num_heads),
        k=draw(case.kv_len, num_kv_heads),
        v=draw(case.kv_len, num_kv_heads),
        dout=draw(case.q_len, num_heads),
        q_offset=np.asarray(case.q_offset, np.int32),
        segments=segments,
    )


def _segments(rng: np.random.Generator, length: int) -> np.ndarray:
    runs = np.arange(length) // 45
    return np.stack([runs, rng.integers(0, 3, length) if length > 1 else runs]).astype(np.int32)


def run(implementation: Implementation, built: Built) -> dict[str, np.ndarray]:
    """The output and the gradients for `dout`, under jit, by NAMES."""
    case = built.case
    options = (case.causal, case.window, case.soft_cap, case.scale)
    arrays = (built.q, built.k, built.v, built.dout, built.q_offset, built.segments)
    results = _run(implementation, options, *jax.tree.map(jnp.asarray, arrays))
    for x, like in zip(results, (built.q, built.q, built.k, built.v), strict=True):
        assert x.dtype == like.dtype and x.shape == like.shape
    return dict(zip(NAMES, map(np.asarray, results), strict=True))


# Half of the time to compile a case is LLVM's optimisation.
@partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})
def _run(
    implementation: Implementation,
    options: tuple[Any, ...],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    q_offset: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, ...]:
    causal, window, soft_cap, scale = options
    flash_attention = attention(implementation.module, implementation.target)
    function = partial(
        flash_attention,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        segment_ids=segments,
        q_offset=q_offset,
    )
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(dout)


def lse_of(implementation: Implementation, built: Built) -> np.ndarray:
    """`[B, N, S]`: the second result of the implementation's forward."""
    case = built.case
    q, k, v, q_offset, segments = jax.tree.map(
        jnp.asarray, (built.q, built.k, built.v, built.q_offset, built.segments)
    )
    mask, options = validate(
        *(q, k, v, case.causal, case.window, case.soft_cap, case.scale),
        segment_ids=segments,
        q_offset=q_offset,
    )
    forward = jax.jit(implementation.module.forward, static_argnums=(4, 5))
    return np.asarray(forward(q, k, v, mask, options, implementation.target)[1])


def visible(built: Built) -> np.ndarray:
    """`[B, S, Sk]` bool: which query sees which key."""
    case = built.case
    q_pos = built.q_offset.astype(np.int64)[:, None, None] + np.arange(case.q_len)[:, None]
    kv_pos = np.arange(case.kv_len)
    seen = np.ones((len(built.q), case.q_len, case.kv_len), bool)
    if case.causal:
        seen &= kv_pos <= q_pos
    if case.window is not None:
        seen &= kv_pos > q_pos - case.window
    if built.segments is not None:
        seen &= built.segments[0][:, :, None] == built.segments[1][:, None, :]
    return seen


def log_sum_exp(built: Built) -> np.ndarray:
    """`[B, N, S]` float64, -inf where a query sees nothing."""
    _, scores, _ = _scores(built)
    with np.errstate(divide="ignore"):
        lse = np.log(np.sum(np.exp(scores), axis=-1))
    return lse.reshape(len(lse), -1, lse.shape[-1])


def _scores(built: Built) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q as float64 `[B, S, K, G, H]`; scores `[B, K, G, S, Sk]`, -inf where unseen; and their
    derivative by scale * q . k."""
    case = built.case
    batch, q_len, _, head_dim = built.q.shape
    q = built.q.astype(np.float64).reshape(batch, q_len, case.heads[1], -1, head_dim)
    scale = head_dim**-0.5 if case.scale is None else case.scale
    scores = scale * np.einsum("bskgh,btkh->bkgst", q, built.k.astype(np.float64), optimize=True)
    slope = np.ones_like(scores)
    if case.soft_cap is not None:
        slope = 1 / np.cosh(scores / case.soft_cap) ** 2
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    return q, np.where(visible(built)[:, None, None], scores, -np.inf), slope


def oracle(built: Built, *, soft_cap_slope: bool = True) -> dict[str, Expected]:
    """By NAMES, what must come out. Without `soft_cap_slope` the gradients are wrong: they forget
    the derivative of the soft cap."""
    q, scores, slope = _scores(built)
    scale = q.shape[-1] ** -0.5 if built.case.scale is None else built.case.scale
    slope = scale * (slope if soft_cap_slope else 1.0)
    k, v = built.k.astype(np.float64), built.v.astype(np.float64)
    dout = built.dout.astype(np.float64).reshape(q.shape)
    largest = np.max(scores, axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0.0))
    total = np.sum(weights, axis=-1, keepdims=True)
    weights /= np.where(total > 0, total, 1.0)

    def add(letters: str, *terms: np.ndarray, like: np.ndarray) -> Expected:
        value = np.einsum(letters, *terms, optimize=True)
        noise = np.einsum(letters, *(x**2 for x in terms), optimize=True) ** 0.5
        return Expected(value.reshape(like.shape), noise.reshape(like.shape))

    out = add("bkgst,btkh->bskgh", weights, v, like=q)
    dweights = np.einsum("bskgh,btkh->bkgst", dout, v, optimize=True)
    delta = np.einsum("bskgh,bskgh->bkgs", dout, out.value)[..., None]
    dscores = weights * (dweights - delta) * slope
    dq = add("bkgst,btkh->bskgh", dscores, k, like=q)
    dk = add("bkgst,bskgh->btkh", dscores, q, like=k)
    dv = add("bkgst,bskgh->btkh", weights, dout, like=v)
    # delta is computed from the rounded output: one error for a whole row of dscores.
    rounding = np.einsum("bskgh,bskgh->bkgs", dout**2, out.value**2)[..., None] ** 0.5
    drift = weights * slope * rounding
    dq.noise += np.abs(np.einsum("bkgst,btkh->bskgh", drift, k, optimize=True))
    dk.noise += add("bkgst,bskgh->btkh", drift, q, like=k).noise
    for like_q in (out, dq):
        like_q.value, like_q.noise = (x.reshape(built.q.shape) for x in vars(like_q).values())
    return dict(zip(NAMES, (out, dq, dk, dv), strict=True))


def error_of(result: np.ndarray, expected: Expected) -> float:
    """The largest error as a multiple of what is allowed; infinite where `result` is not finite.

    Allowed is eps (|x| + 2 noise) + 1e-6: rounding the result costs at most eps |x| / 2, and each
    rounding of the terms (probabilities and their gradients as operands of a product, delta) has a
    standard deviation of about eps / 4 of the noise. In float32 nothing is rounded but sums; there
    eps stands for 32 of its units, which covers sums of a few hundred terms and exp of scores
    that are a few units off.
    """
    eps = EPS[result.dtype.name] * (32 if result.dtype == np.float32 else 1)
    allowed = eps * (np.abs(expected.value) + 2 * expected.noise) + 1e-6
    ratio = np.abs(result.astype(np.float64) - expected.value) / allowed
    return float(np.where(np.isfinite(ratio), ratio, np.inf).max())


def errors_of(results: dict[str, np.ndarray], expected: dict[str, Expected]) -> dict[str, float]:
    """`error_of` by NAMES."""
    return {name: error_of(results[name], expected[name]) for name in NAMES}


def changed(built: Built, **arrays: Any) -> Built:
    """`built` with other arrays."""
    return replace(built, **arrays)
