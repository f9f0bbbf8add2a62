"""What XLA prepares for the prefill kernel: the list of tiles, and queries and results as words.

A row of 128 words holds a piece of head n in its low halves and of head n + W in its high halves;
float32 has one head in a row. A token is whole tiles of 8 rows, so that it can be copied alone.
"""

from dataclasses import dataclass
from math import gcd

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention import Ragged
from pallas_kernels.paged_attention.tpu_decode import Options
from pallas_kernels.paged_attention.tpu_layout import LANES, SUBLANES, Layout, pack


@dataclass(frozen=True)
class Words:
    """Rows of one token of q and of the result."""

    num_heads: int
    dtype: str
    pieces: int

    @property
    def halves(self) -> int:
        return 2 if self.dtype == "bfloat16" else 1

    @property
    def heads(self) -> int:
        """W, the heads of one half, padded so that a token is whole tiles of 8 rows."""
        multiple = SUBLANES // gcd(SUBLANES, self.pieces)
        needed = -(-self.num_heads // self.halves)
        return -(-needed // multiple) * multiple

    @property
    def rows(self) -> int:
        return self.heads * self.pieces


def to_words(x: jax.Array, words: Words) -> jax.Array:
    """`[T, N, H padded]` as `[T * rows, 128]`."""
    heads = words.heads
    x = jnp.pad(x, ((0, 0), (0, words.halves * heads - x.shape[1]), (0, 0)))
    return pack([x[:, i * heads : (i + 1) * heads] for i in range(words.halves)]).reshape(-1, LANES)


def from_words(x: jax.Array, words: Words) -> jax.Array:
    """`[T * rows, 128]` as `[T, N padded, H padded]`."""
    x = x.reshape(-1, words.heads, words.pieces * LANES)
    if words.halves == 1:
        return lax.bitcast_convert_type(x, jnp.float32)
    halves = (x.astype(jnp.uint16), (x >> 16).astype(jnp.uint16))
    return lax.bitcast_convert_type(jnp.concatenate(halves, axis=1), jnp.bfloat16)


def list_tiles(
    tile: int,
    counts: jax.Array,  # [S] tiles of each row
    begin: jax.Array,  # [S] tokens of each row before its first tile
    limit: int,
    q_lens: jax.Array,
    table_width: int,
    ragged: Ragged,
    layout: Layout,
    options: Options,
) -> tuple[jax.Array, ...]:
    """For each tile its row, first flat token, position of that token, tokens, and the pages
    [first, last) that it sees; then the number of tiles."""
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    index = jnp.arange(limit + 1, dtype=jnp.int32)
    row = jnp.sum(ends <= index[:, None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, counts.shape[0] - 1)
    done = begin[row] + (index - ends[row] + counts[row]) * tile
    size = jnp.clip(q_lens[row] - done, 0, tile)
    pos = ragged.kv_lens[row] - q_lens[row] + done
    low = jnp.zeros_like(pos)
    if options.window is not None:
        low = jnp.maximum(pos - (options.window - 1), 0)
    first = jnp.clip(low // layout.page_size, 0, table_width - 1)
    last = (pos + size + (layout.page_size - 1)) // layout.page_size
    last = jnp.clip(last, first + 1, table_width)
    return row, ragged.cu_q_lens[row] + done, pos, size, first, last, ends[-1:]
