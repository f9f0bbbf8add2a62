"""The draft model's programs: drafting k tokens in one loop, and catching up. Pure; runner.py
compiles them.

The draft's pages have the ids of the target's, so a row's page table serves both, and so do prefix
hits and preemption. A drafted token is drawn by the engine's sampler with the row's own parameters
and noise, but without its bias and bans: what the target will draw, if it sees the same logits.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxinfer import sampling
from jaxinfer.batch import Batch, Layout
from jaxinfer.kv_cache import KVPages, write_tokens
from jaxinfer.models import Model
from jaxinfer.step import row_history
from pallas_kernels.paged_attention import Ragged


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class DraftResult:
    """`drafts[s]`: the tokens drafted for row s, then zeros; none where the program only caught up.
    `tokens` is what was handed in as `previous`."""

    tokens: Int32[Array, " R"]
    drafts: Int32[Array, "S k"]


def draft_step(
    model: Model,
    layout: Layout,
    params: dict,
    pages: KVPages,
    bias_table: Float[Array, "B V"],
    previous: Int32[Array, " R"],
    packed: Int32[Array, " X"],
    *,
    num_tokens: int,
    valid_vocab: int,
) -> tuple[DraftResult, KVPages]:
    """Arguments as step()'s, of the draft model, but `previous[0]`: how many tokens to draft, up to
    `num_tokens`.

    In a decode bucket: so many tokens after each row's one token, K/V of the last of them too, so
    that a row whose whole draft is accepted has one token to compute next time, as any other has.
    Past the pages that a row has, K/V go to the trash page. In a mixed bucket: K/V of the rows'
    tokens alone.
    """
    batch = layout.unpack(packed)
    if layout.bucket.decode_only:
        start = jnp.zeros((layout.bucket.num_rows, num_tokens), jnp.int32)
        drafts, pages = _draft(
            model, params, pages, bias_table, batch, start, previous[0], valid_vocab
        )
        return DraftResult(previous, drafts), pages
    written = write_tokens(pages.tokens, batch.ragged.slots, batch.tokens)
    _, layers = model.forward(params, pages.layers, batch.tokens, batch.positions, batch.ragged)
    drafts = jnp.zeros((layout.bucket.num_rows, 0), jnp.int32)
    return DraftResult(previous, drafts), KVPages(layers, written)


def _draft(
    model: Model,
    params: dict,
    pages: KVPages,
    bias_table: Float[Array, "B V"],
    batch: Batch,
    drafts: Int32[Array, "S k"],
    length: Int32[Array, ""],
    valid_vocab: int,
) -> tuple[Int32[Array, "S k"], KVPages]:
    """`drafts` with the first `length` columns filled."""
    rows = batch.tokens.shape[0]
    table = batch.ragged.page_table
    size = pages.tokens.shape[1]

    def slots(positions: jax.Array) -> jax.Array:
        page = table.at[jnp.arange(rows), positions // size].get(mode="fill", fill_value=0)
        return page * size + positions % size

    def body(i, carry):
        tokens, drafts, layers, written = carry
        positions = batch.positions + i
        at = slots(positions)
        written = write_tokens(written, at, tokens)
        ragged = Ragged(
            page_table=table,
            # Padding has no keys: it must not attend to what other rows left behind.
            kv_lens=jnp.where(batch.ragged.kv_lens > 0, positions + 1, 0),
            cu_q_lens=batch.ragged.cu_q_lens,
            num_decode=batch.ragged.num_decode,
            slots=at,
            decode_only=True,
        )
        hidden, layers = model.forward(params, layers, tokens, positions, ragged)

        def draw() -> jax.Array:
            return sampling.sample(
                model.logits(params, hidden),
                batch.sample.at_positions(positions + 1),
                lambda: row_history(written, table),
                bias_table,
                valid_vocab,
            )

        drawn = jax.lax.cond(i < length, draw, lambda: tokens)
        column = jnp.where(i < length, i, drafts.shape[1])  # out of range: dropped
        drafts = drafts.at[:, column].set(drawn, mode="drop")
        return jnp.maximum(drawn, 0), drafts, layers, written

    start = (batch.tokens, drafts, pages.layers, pages.tokens)
    _, drafts, layers, written = jax.lax.fori_loop(0, length + 1, body, start)
    return drafts, KVPages(layers, written)
