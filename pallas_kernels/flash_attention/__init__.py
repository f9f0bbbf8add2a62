"""Flash attention over contiguous K and V, forward and backward; no S x S array anywhere.

    flash_attention(q [B, S, N, H], k [B, Sk, K, H], v [B, Sk, K, H], *, causal=True, window=None,
                    soft_cap=None, scale=None, segment_ids=None, q_offset=0) -> [B, S, N, H]

The contract of every implementation:

- Query i of a sequence is at position q_offset + i, key j at position j. Causal: it sees j <= its
  position; with a window w (causal only) just j > position - w. With segment ids it sees keys of
  its own segment alone. Not causal: it sees every key of its segment.
- score = scale * q . k (scale: H ** -0.5 unless given); with a soft cap c, c * tanh(score / c);
  then the mask; softmax in float32. Query head n reads KV head n // (N // K). The output has q's
  dtype. A query that sees nothing gives zeros, and gradients of zero.
- Positions are below 2**30 (the caller's duty where q_offset is an array), so that the sum of two,
  or of one and the window, fits int32.
- Any S and Sk; what an implementation pads, it also masks: it changes no bit of a result.
- Rows of the batch, and KV heads with their query heads, are apart: a NaN or an infinity in one
  changes no bit of another. Within both it may reach everything, also queries and keys that do not
  see where it stands: a hidden key weighs 0, and 0 * NaN is NaN. So what stands in hidden places,
  such as the padding of packed sequences, must be finite.
- The backward pass recomputes the probabilities from the saved log-sum-exp (Dao et al.,
  arXiv 2205.14135, algorithm 4; arXiv 2307.08691): memory is linear in S. dk and dv are summed
  over the query heads of their group. No gradient flows to segment_ids or q_offset.

Reverse mode, first order: `jax.grad` and `jax.vjp`, not `jax.jvp` nor a gradient of a gradient.

An implementation is a module with two functions, and `unsupported`, which says what it cannot do;
`attention` makes the differentiable one of them.

    forward(q, k, v, mask, options, target) -> (out [B, S, N, H], lse [B, N, S] float32)
    backward(q, k, v, out, lse, dout, mask, options, target) -> (dq, dk, dv), dtypes of q, k, v

lse is the natural logarithm of the sum of exp(score) over visible keys; MASKED where none is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import Target, check_array, check_int32, check_options, dtype_name

MAX_POSITION = 2**30


@dataclass(frozen=True)
class Options:
    """The static part of one call."""

    causal: bool
    window: int | None
    soft_cap: float | None
    scale: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """The part of the mask that is data, int32. Segment ids are None where none were given."""

    q_offset: jax.Array  # [B]
    q_segments: jax.Array | None  # [B, S]
    kv_segments: jax.Array | None  # [B, Sk]


SegmentIds = jax.Array | tuple[jax.Array, jax.Array]


@lru_cache
def attention(implementation: Any, target: Target) -> Callable[..., jax.Array]:
    """`flash_attention` of this module's contract, by `implementation`, built for `target`."""

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def run(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, options: Options) -> jax.Array:
        return implementation.forward(q, k, v, mask, options, target)[0]

    def run_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, options: Options) -> Any:
        out, lse = implementation.forward(q, k, v, mask, options, target)
        return out, (q, k, v, out, lse, mask)

    def run_backward(options: Options, saved: Any, dout: jax.Array) -> Any:
        q, k, v, out, lse, mask = saved
        grads = implementation.backward(q, k, v, out, lse, dout, mask, options, target)
        # Integers have no tangents: float0 is jax's word for that.
        return *grads, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask)

    run.defvjp(run_forward, run_backward)

    def flash_attention(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        causal: bool = True,
        window: int | None = None,
        soft_cap: float | None = None,
        scale: float | None = None,
        segment_ids: SegmentIds | None = None,
        q_offset: int | jax.Array = 0,
    ) -> jax.Array:
        """See `pallas_kernels.flash_attention` for the contract."""
        mask, options = validate(
            q, k, v, causal, window, soft_cap, scale, segment_ids=segment_ids, q_offset=q_offset
        )
        return run(q, k, v, mask, options)

    return flash_attention


def validate(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
    *,
    segment_ids: SegmentIds | None,
    q_offset: int | jax.Array,
) -> tuple[Mask, Options]:
    """The call's mask and options; ValueError, naming argument, value and what is allowed, unless
    they fit each other. `segment_ids` is `[B, S]` for both sides (then S == Sk) or a pair
    (`[B, S]`, `[B, Sk]`); `q_offset` an int >= 0 or int32 `[]` or `[B]`."""
    check_array("q", q, (None, None, None, None), "[B, S, N, H]")
    batch, q_len, num_heads, head_dim = q.shape
    check_array("k", k, (batch, None, None, head_dim), "[B, Sk, K, H] with q's B and H")
    check_array("v", v, tuple(k.shape), "[B, Sk, K, H], k's shape")
    for name, x in (("q", q), ("k", k), ("v", v)):
        dtype_name(x.dtype, f"{name}.dtype")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype}; they must be the same")
    if num_heads % k.shape[2]:
        raise ValueError(f"q has {num_heads} heads; it must be a multiple of k's {k.shape[2]}")
    scale = float(head_dim**-0.5) if scale is None else scale
    check_options(scale, window, soft_cap)
    if not isinstance(causal, bool):
        raise ValueError(f"causal is {causal!r}; it must be True or False")
    if window is not None:
        if not causal:
            raise ValueError(f"window is {window} with causal=False; a window needs causal=True")
        window = min(int(window), MAX_POSITION)  # one as long hides nothing
    if isinstance(q_offset, bool) or not (isinstance(q_offset, int) or hasattr(q_offset, "dtype")):
        raise ValueError(f"q_offset is {q_offset!r}; it must be an int or an int32 array")
    if isinstance(q_offset, int | np.integer):
        if not 0 <= q_offset <= MAX_POSITION - q_len:
            raise ValueError(f"q_offset is {q_offset}; it must be >= 0, and 2**30 - S at most")
        q_offset = jnp.full(batch, q_offset, jnp.int32)
    check_int32("q_offset", q_offset)
    if q_offset.ndim:
        check_array("q_offset", q_offset, (batch,), "[] or [B]")
    q_offset = jnp.broadcast_to(q_offset, (batch,))
    q_segments = kv_segments = None
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        if len(pair) != 2 or not all(hasattr(x, "dtype") for x in pair):
            given = len(segment_ids) if isinstance(segment_ids, tuple | list) else 1
            raise ValueError(
                f"segment_ids is a {type(segment_ids).__name__} of {given}; it must be an int32 "
                f"array or two in a tuple"
            )
        q_segments, kv_segments = pair
        for name, x, length in (("q", q_segments, q_len), ("kv", kv_segments, k.shape[1])):
            check_array(f"segment_ids ({name})", x, (batch, length), "[B, S] or [B, Sk]")
            check_int32(f"segment_ids ({name})", x)
    return Mask(q_offset, q_segments, kv_segments), Options(causal, window, soft_cap, scale)
