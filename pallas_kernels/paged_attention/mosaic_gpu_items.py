"""How the query tokens of rows of several tokens are cut into items of 128 query rows.

An item is `tokens` consecutive tokens of one row of the batch for `heads` query heads of one KV
head, head-major: a head's tokens lie together, as one TMA copy of q `[T, N, H]` brings them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import Ragged

ROWS = 128  # query rows of an item: 64 for each computing warpgroup


@dataclass(frozen=True)
class Shape:
    """The static sizes of one call."""

    heads: int  # query heads of an item
    chunks: int  # items of a KV head for the same tokens
    tokens: int  # query tokens of an item, a multiple of 8
    group: int
    num_kv_heads: int
    head_dim: int
    quantised: bool
    mid: Any  # dtype of the wgmma operands
    out_dtype: Any

    def pieces(self, warpgroup: int) -> list[tuple[int, int, int, int]]:
        """(head, first token, tokens, first row of the warpgroup's 64) of its parts of heads."""
        found = []
        for head in range(self.heads):
            first = max(head * self.tokens, warpgroup * 64)
            end = min((head + 1) * self.tokens, warpgroup * 64 + 64)
            if first < end:
                token = first - head * self.tokens
                found.append((head, token, end - first, first - warpgroup * 64))
        return found


def packing(group: int) -> tuple[int, int]:
    """Heads and tokens of an item: heads divide the group, tokens are a multiple of 8."""
    options = [(heads, ROWS // heads // 8 * 8) for heads in range(1, 17) if group % heads == 0]
    return max(options, key=lambda option: (option[0] * option[1], option[0]))


def plan(ragged: Ragged, num_tokens: int, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """The tiles of tokens: `plan [tiles, 4]` int32 of (row, first token, its position, number of
    tokens), and how many there are `[1]`. Later tokens of a row see more and come first."""
    num_rows = ragged.page_table.shape[0]
    starts = ragged.cu_q_lens[:-1]
    is_tiled = jnp.arange(num_rows, dtype=jnp.int32) >= ragged.num_decode
    q_lens = jnp.where(is_tiled, ragged.cu_q_lens[1:] - starts, 0)
    q_lens = jnp.where(ragged.kv_lens > 0, q_lens, 0)
    tiles = (q_lens + (shape.tokens - 1)) // shape.tokens
    ends = jnp.cumsum(tiles, dtype=jnp.int32)
    most = num_tokens // shape.tokens + min(num_rows, num_tokens)
    index = ends[-1] - 1 - jnp.arange(most, dtype=jnp.int32)
    row = jnp.sum(ends <= index[:, None], axis=1, dtype=jnp.int32)
    row = jnp.clip(row, 0, num_rows - 1)
    done = (index - ends[row] + tiles[row]) * shape.tokens
    position = ragged.kv_lens[row] - q_lens[row] + done
    size = jnp.minimum(q_lens[row] - done, shape.tokens)
    return jnp.stack([row, starts[row] + done, position, size], axis=1), ends[-1:]
