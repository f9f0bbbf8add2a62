"""The device step: model and sampler composed. Pure; no jit, no state. runner.py compiles it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxinfer import sampling
from jaxinfer.batch import Batch, Layout, StepResult
from jaxinfer.kv_cache import KVPages, write_tokens
from jaxinfer.models import Model
from pallas_kernels.dispatch import Ops

_PROMPT_CHUNK = 16
"""Rows of [., V] logits held at once for prompt log-probs: the vocabulary never meets all T
tokens."""


def step(
    model: Model,
    layout: Layout,
    params: dict,
    pages: KVPages,
    bias_table: Float[Array, "B V"],
    previous: Int32[Array, " R"],
    packed: Int32[Array, " X"],
    *,
    num_top: int,
    valid_vocab: int,
) -> tuple[StepResult, KVPages]:
    """Compute one ragged step: prompt chunks, decode rows or a mix, as `layout` says.

    Args:
        layout: static; how `packed` is laid out.
        pages: donated by the caller; every new token's K/V and id are written first.
        bias_table: rows that SampleParams.bias_slot selects; row 0 is zeros.
        previous: the tokens of the step before, which Batch.feed indexes.
        num_top: K of the log-prob outputs. valid_vocab: ids the tokenizer has.
    """
    with jax.named_scope("unpack"):
        batch = layout.unpack(packed)
    with jax.named_scope("feed"):
        fed = previous.at[jnp.maximum(batch.feed, 0)].get(mode="clip")
        tokens = jnp.where(batch.feed >= 0, jnp.maximum(fed, 0), batch.tokens)
        page_tokens = write_tokens(pages.tokens, batch.ragged.slots, tokens)
    hidden, layers = model.forward(params, pages.layers, tokens, batch.positions, batch.ragged)
    with jax.named_scope("logits"):
        logits = model.logits(params, hidden.at[batch.last].get(mode="clip"))
        broken = ~_finite_rows(hidden, batch.ragged.cu_q_lens)
    drawn = sampling.sample(
        logits,
        batch.sample,
        lambda: row_history(page_tokens, batch.ragged.page_table),
        bias_table,
        valid_vocab,
        broken=broken,
    )
    with jax.named_scope("logprobs"):
        chosen = _row_log_probs(logits, drawn, batch.sample.num_logprobs, num_top)
        prompt = _empty_log_probs(batch.targets.shape[0], num_top)
        if not layout.bucket.decode_only:  # Buckets.choose sends no row there that asks for them
            prompt = _prompt_log_probs(model, params, hidden, batch, num_top)
    with jax.named_scope("result"):
        padding = previous.shape[0] - drawn.shape[0]
        result = StepResult(jnp.pad(drawn, (0, padding)), *chosen, *prompt)
    return result, KVPages(layers, page_tokens)


def row_history(
    page_tokens: Int32[Array, "P page_size"], page_table: Int32[Array, "S MP"]
) -> Int32[Array, "S C"]:
    """Each row's tokens by position, anything past its length."""
    rows = page_tokens.at[page_table].get(mode="clip")
    return rows.reshape(page_table.shape[0], -1)


def _finite_rows(hidden: Float[Array, "T D"], cu_q_lens: Int32[Array, " S1"]) -> Bool[Array, " S"]:
    """Whether every new token of each row has finite activations (a row with none: True)."""
    bad = ~jnp.all(jnp.isfinite(hidden), axis=1)
    before = jnp.concatenate(
        [jnp.zeros((1,), jnp.int32), jnp.cumsum(bad.astype(jnp.int32), dtype=jnp.int32)]
    )
    at = before.at[cu_q_lens].get(mode="clip")
    return at[1:] == at[:-1]


def _empty_log_probs(rows: int, num_top: int):
    return (
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows, num_top), jnp.int32),
        jnp.zeros((rows, num_top), jnp.float32),
    )


def _row_log_probs(logits, drawn, wanted, num_top: int):
    return jax.lax.cond(
        jnp.any(wanted > 0),
        lambda: sampling.log_probs(logits, drawn, num_top),
        lambda: _empty_log_probs(logits.shape[0], num_top),
    )


def _prompt_log_probs(model: Model, params: dict, hidden, batch: Batch, num_top: int):
    """Log-probs of batch.targets, a few rows of logits at a time; skipped where none is wanted."""
    count = batch.targets.shape[0]
    chunk = min(_PROMPT_CHUNK, count)
    padding = -count % chunk

    def one(args):
        states, targets = args
        return sampling.log_probs(model.logits(params, states), targets, num_top)

    def compute():
        states = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[1])
        targets = jnp.pad(batch.targets, (0, padding)).reshape(-1, chunk)
        outputs = jax.lax.map(one, (states, targets))
        return tuple(o.reshape(-1, *o.shape[2:])[:count] for o in outputs)

    return jax.lax.cond(
        jnp.any(batch.targets >= 0), compute, lambda: _empty_log_probs(count, num_top)
    )


@jax.named_scope("copy_pages")
def copy_pages(
    ops: Ops, pages: KVPages, source: Int32[Array, " C"], destination: Int32[Array, " C"]
) -> KVPages:
    """Copy-on-write: page source[i] into page destination[i]; (0, 0) pairs do nothing."""
    return KVPages(
        layers=tuple(ops.copy_pages(layer, source, destination) for layer in pages.layers),
        tokens=pages.tokens.at[destination].set(pages.tokens[source], mode="drop"),
    )


@jax.named_scope("set_bias_row")
def set_bias_row(
    table: Float[Array, "B V"], slot: Int32[Array, ""], row: Float[Array, " V"]
) -> Float[Array, "B V"]:
    """`table` with row `slot` replaced."""
    return table.at[slot].set(row, mode="drop")
