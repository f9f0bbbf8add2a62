"""The sampler: raw logits in, one token per row out. Pure, per-row, the same code wherever it is
used.

Order: penalties, bias and bans, temperature, top-k, top-p, min-p, draw. Work that no row of the
batch needs is skipped at run time by lax.cond, so one compiled program serves every mix of
requests. Thresholds are found by bisection over the values' bits instead of a sort: 32 passes of
counting, exact, and ties at a threshold are all kept, so the result does not depend on a sort's
order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jaxinfer.batch import SampleParams

NON_FINITE = -1
"""Token id that stands for: a logit of this row was NaN or infinite."""
NOTHING_ALLOWED = -2
"""Token id that stands for: every token of this row was banned."""
_NEG_INF = float("-inf")
_MAX = float(jnp.finfo(jnp.float32).max)
_ARGMAX_BLOCK = 128
"""Columns; it divides the vocabularies of most models."""
_TINY = float(jnp.finfo(jnp.float32).tiny)


def process_logits(
    logits: Float[Array, "S V"],
    params: SampleParams,
    history: Callable[[], Int32[Array, "S C"]],
    bias_table: Float[Array, "B V"],
    valid_vocab: int,
) -> Float[Array, "S V"]:
    """Logits after penalties, bias and bans: what greedy decoding takes the largest of.

    Args:
        logits: raw logits, float32.
        history: gives each row's tokens by position (prompt, then output), anything past its
        length;
            called only where a row has a penalty.
        bias_table: rows to add (logit_bias, and -inf for what is banned); row 0 is all zeros.
        valid_vocab: ids from here on (padding rows of the embedding) are banned.
    """
    with jax.named_scope("penalties"):
        logits = jax.lax.cond(
            jnp.any(_has_penalty(params)),
            lambda x: _apply_penalties(x, params, history()),
            lambda x: x,
            logits,
        )
    with jax.named_scope("bias"):
        logits = jax.lax.cond(
            jnp.any(params.bias_slot > 0),
            lambda x: x + bias_table.at[params.bias_slot].get(mode="clip"),
            lambda x: x,
            logits,
        )
    return _ban_padding(logits, valid_vocab)


def _has_penalty(params: SampleParams) -> Bool[Array, " S"]:
    return (params.presence != 0) | (params.frequency != 0) | (params.repetition != 1)


def _ban_padding(logits: Float[Array, "S V"], valid_vocab: int) -> Float[Array, "S V"]:
    """-inf for the ids that pad the embedding."""
    vocab = logits.shape[1]
    if valid_vocab == vocab:
        return logits
    return jnp.where(jnp.arange(vocab)[None] < valid_vocab, logits, _NEG_INF)


def _apply_penalties(
    logits: Float[Array, "S V"], params: SampleParams, history: Int32[Array, "S C"]
) -> Float[Array, "S V"]:
    """Repetition (Keskar et al. 2019) over prompt and output; presence and frequency over
    output."""
    rows, width = history.shape
    vocab = logits.shape[1]
    where = jnp.arange(width)[None]
    is_prompt = where < params.prompt_len[:, None]
    is_output = ~is_prompt & (where < params.position[:, None])
    # Out-of-range column: dropped by the scatter.
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], history.shape)
    in_prompt = (
        jnp.zeros((rows, vocab), bool)
        .at[row, jnp.where(is_prompt, history, vocab)]
        .set(True, mode="drop")
    )
    counts = (
        jnp.zeros((rows, vocab), jnp.float32)
        .at[row, jnp.where(is_output, history, vocab)]
        .add(1.0, mode="drop")
    )
    seen = in_prompt | (counts > 0)
    repetition = params.repetition[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    # A tiny penalty overflows, and inf plus a ban would be NaN, which argmax prefers to any number.
    logits = jnp.where(seen, jnp.clip(scaled, -_MAX, _MAX), logits)
    logits = logits - params.frequency[:, None] * counts
    return logits - params.presence[:, None] * (counts > 0).astype(jnp.float32)


def filtered_logits(logits: Float[Array, "S V"], params: SampleParams) -> Float[Array, "S V"]:
    """Logits / temperature, with -inf where top-k, top-p or min-p removes a token.

    softmax of the result is the distribution that a random row draws from. Greedy rows pass
    unchanged.
    """
    random = params.temperature > 0
    with jax.named_scope("temperature"):
        scaled = logits / jnp.where(random, params.temperature, 1.0)[:, None]
        # Finite logits stay finite and bans -inf at any temperature: inf would make NaN below.
        scaled = jnp.where(logits > _NEG_INF, jnp.clip(scaled, -_MAX, _MAX), _NEG_INF)
    needs = random & ((params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0))
    with jax.named_scope("filters"):
        return jax.lax.cond(
            jnp.any(needs), lambda x: _filter(x, params, random), lambda x: x, scaled
        )


def _filter(
    x: Float[Array, "S V"], params: SampleParams, random: Bool[Array, " S"]
) -> Float[Array, "S V"]:
    keys = _sortable(x)
    vocab = x.shape[1]
    top_k = jnp.where(random & (params.top_k > 0), params.top_k, vocab)

    @jax.named_scope("top_k")
    def keep_top_k(x):
        threshold = _largest_threshold(
            lambda t: (
                jnp.sum(keys >= t[:, None], axis=1, dtype=jnp.int32) >= jnp.minimum(top_k, vocab)
            ),
            x.shape[0],
        )
        return jnp.where(keys >= threshold[:, None], x, _NEG_INF)

    x = jax.lax.cond(jnp.any(top_k < vocab), keep_top_k, lambda x: x, x)
    # A value that float32 flushes to 0 would be reached by the empty set.
    top_p = jnp.where(random, jnp.maximum(params.top_p, _TINY), 1.0)

    @jax.named_scope("top_p")
    def keep_top_p(x):
        mass = jax.nn.softmax(x, axis=1)
        threshold = _largest_threshold(
            lambda t: jnp.sum(jnp.where(keys >= t[:, None], mass, 0.0), axis=1) >= top_p,
            x.shape[0],
        )
        keep = (keys >= threshold[:, None]) | (top_p >= 1)[:, None]
        return jnp.where(keep, x, _NEG_INF)

    x = jax.lax.cond(jnp.any(top_p < 1), keep_top_p, lambda x: x, x)
    with jax.named_scope("min_p"):
        min_p = jnp.where(random, params.min_p, 0.0)
        floor = jnp.max(x, axis=1) + jnp.log(min_p)  # log(0) = -inf: off
        return jnp.where(x >= floor[:, None], x, _NEG_INF)


def _sortable(x: Float[Array, "S V"]) -> UInt32[Array, "S V"]:
    """Unsigned integers in the order of the floats (IEEE 754: flip all bits of negatives)."""
    # -0 and 0 are one value. (XLA drops `x + 0.0`.)
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(
    enough: Callable[[UInt32[Array, " S"]], Bool[Array, " S"]], rows: int
) -> UInt32[Array, " S"]:
    """Per row, the largest 32-bit threshold for which `enough` (monotone, true at 0) still
    holds."""

    def bit(i, threshold):
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(candidate), candidate, threshold)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros((rows,), jnp.uint32))


@jax.named_scope("row_keys")
def row_keys(params: SampleParams) -> Array:
    """[S] typed PRNG keys from (64-bit seed, sample index, position): nothing else changes a
    draw."""

    def key(low, high, index, position):
        base = jax.random.key(low.astype(jnp.uint32), impl="threefry2x32")
        for word in (high, index, position):
            base = jax.random.fold_in(base, word.astype(jnp.uint32))
        return base

    return jax.vmap(key)(params.seed_low, params.seed_high, params.sample_index, params.position)


@jax.named_scope("draw")
def draw(
    processed: Float[Array, "S V"], params: SampleParams, keys: Callable[[], Array] | None = None
) -> Int32[Array, " S"]:
    """One token per row: the largest processed logit for greedy rows, a seeded draw for the others.

    The draw is the Gumbel-max trick: argmax of filtered logits plus noise by token id, so a token's
    noise depends on (row key, token id) alone.
    """
    random = params.temperature > 0
    make_keys = keys or (lambda: row_keys(params))

    def with_random(logits):
        filtered = filtered_logits(logits, params)
        with jax.named_scope("noise"):
            noise = jax.vmap(lambda k: jax.random.gumbel(k, (logits.shape[1],), jnp.float32))(
                make_keys()
            )
            choice = argmax(filtered + noise)
        return jnp.where(random, choice, argmax(logits))

    return jax.lax.cond(jnp.any(random), with_random, argmax, processed)


@jax.named_scope("argmax")
def argmax(x: Float[Array, "S V"]) -> Int32[Array, " S"]:
    """The first column of each row's largest value, as jnp.argmax where no value is NaN; any id
    where one is.

    In two levels, because a max is vectorised on a CPU and a search for its index is not: the first
    block whose max is the row's, then the first column in that block.
    """
    rows, vocab = x.shape
    if vocab % _ARGMAX_BLOCK:
        return jnp.argmax(x, axis=1).astype(jnp.int32)
    blocks = x.reshape(rows, vocab // _ARGMAX_BLOCK, _ARGMAX_BLOCK)
    best = jnp.max(blocks, axis=2)
    block = jnp.argmax(best, axis=1).astype(jnp.int32)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1, mode="clip")[:, 0]
    return block * _ARGMAX_BLOCK + jnp.argmax(inside, axis=1).astype(jnp.int32)


@jax.named_scope("sampler")
def sample(
    logits: Float[Array, "S V"],
    params: SampleParams,
    history: Callable[[], Int32[Array, "S C"]],
    bias_table: Float[Array, "B V"],
    valid_vocab: int,
    keys: Callable[[], Array] | None = None,
    broken: Bool[Array, " S"] | None = None,
) -> Int32[Array, " S"]:
    """[S] token ids, NON_FINITE (also where `broken`) or NOTHING_ALLOWED. Arguments as in
    process_logits()."""
    with jax.named_scope("finite"):
        finite = jnp.all(jnp.isfinite(logits), axis=1)
        if broken is not None:
            finite &= ~broken

    def any_row(logits: jax.Array) -> jax.Array:
        processed = process_logits(logits, params, history, bias_table, valid_vocab)
        tokens = draw(processed, params, keys)
        with jax.named_scope("allowed"):
            allowed = jnp.max(processed, axis=1) > _NEG_INF
        return jnp.where(allowed, tokens, NOTHING_ALLOWED)

    # One branch around all stages: the conditions inside hand [S, V] logits on, a copy each.
    special = _has_penalty(params) | (params.bias_slot > 0) | (params.temperature > 0)
    tokens = jax.lax.cond(
        jnp.any(special), any_row, lambda x: argmax(_ban_padding(x, valid_vocab)), logits
    )
    return jnp.where(finite, tokens, NON_FINITE)


def log_probs(
    logits: Float[Array, "R V"], chosen: Int32[Array, " R"], num_top: int
) -> tuple[Float[Array, " R"], Int32[Array, " R"], Int32[Array, "R K"], Float[Array, "R K"]]:
    """Log-softmax of raw logits at `chosen` and its 1-based rank; ids and log-probs of the best
    K."""
    normalizer = jax.nn.logsumexp(logits, axis=1)
    picked = jnp.take_along_axis(logits, jnp.maximum(chosen, 0)[:, None], axis=1, mode="clip")
    rank = 1 + jnp.sum(logits > picked, axis=1, dtype=jnp.int32)
    best, ids = jax.lax.top_k(logits, num_top)
    return (
        picked[:, 0] - normalizer,
        rank,
        ids.astype(jnp.int32),
        best - normalizer[:, None],
    )
