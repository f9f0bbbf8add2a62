"""The device nouns Batch, SampleParams, StepResult, and build(), which pads a plan to its bucket.

A step's host integers travel to the device as one packed int32 array (floats by their bits): one
transfer however many fields there are. `Layout` is the single description of that array; `build`
writes it with NumPy and `unpack` reads it inside the compiled step. Only build() pads.
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxinfer.buckets import Bucket, Buckets
from jaxinfer.request import Row, Sequence, StepPlan
from pallas_kernels.paged_attention import Ragged

_SAMPLE_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "presence",
    "frequency",
    "repetition",
    "top_k",
    "seed_low",
    "seed_high",
    "sample_index",
    "prompt_len",
    "num_logprobs",
)
_NUM_FLOATS = 6
_PADDING_SAMPLE = np.zeros((len(_SAMPLE_FIELDS), 1), np.int32)
# A penalty of 0 would be one: padding must not switch work on for the whole batch.
_PADDING_SAMPLE[_SAMPLE_FIELDS.index("repetition")] = np.float32(1).view(np.int32)


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class SampleParams:
    """Per-row sampling parameters, one entry per row of the step.

    `top_k` 0, `top_p` 1 and `min_p` 0 are off; `temperature` 0 is greedy. (`seed_low`, `seed_high`,
    `sample_index`, `position`) key the row's random draw; `position` is that of the token drawn.
    `bias_slot` is the row of the bias table to add; 0 adds nothing.
    """

    temperature: Float[Array, " S"]
    top_p: Float[Array, " S"]
    min_p: Float[Array, " S"]
    presence: Float[Array, " S"]
    frequency: Float[Array, " S"]
    repetition: Float[Array, " S"]
    top_k: Int32[Array, " S"]
    seed_low: Int32[Array, " S"]
    seed_high: Int32[Array, " S"]
    sample_index: Int32[Array, " S"]
    prompt_len: Int32[Array, " S"]
    num_logprobs: Int32[Array, " S"]
    position: Int32[Array, " S"]
    bias_slot: Int32[Array, " S"]

    def at_positions(self, position: Int32[Array, " S"]) -> "SampleParams":
        """The same rows, drawing tokens of other positions."""
        return replace(self, position=position)


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Batch:
    """One step's input on the device: T flat new tokens of S rows, padded to a bucket.

    `feed[t]` >= 0: take token t from that row of the step before, whose sample is still on the
    device. `last[s]` is the flat token whose logits row s samples from. `targets[t]` is the prompt
    token that follows token t where prompt log-probs are wanted, else -1.
    """

    tokens: Int32[Array, " T"]
    positions: Int32[Array, " T"]
    feed: Int32[Array, " T"]
    targets: Int32[Array, " T"]
    last: Int32[Array, " S"]
    ragged: Ragged
    sample: SampleParams


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class StepResult:
    """What a step gives back; arrays stay on the device until the host asks for them.

    `tokens[s]`: the token drawn, -1 where a logit was NaN or infinite, -2 where every token was
    banned; padded to max_num_seqs so that the next step can be fed from it whatever its bucket.
    Log-probs (natural logarithm, of the raw logits) and 1-based ranks of the drawn token, and the K
    best tokens, per row; the same for the prompt's next token, per flat token. Zeros where not
    asked.
    """

    tokens: Int32[Array, " R"]
    logprobs: Float[Array, " S"]
    ranks: Int32[Array, " S"]
    top_ids: Int32[Array, "S K"]
    top_logprobs: Float[Array, "S K"]
    prompt_logprobs: Float[Array, " T"]
    prompt_ranks: Int32[Array, " T"]
    prompt_top_ids: Int32[Array, "T K"]
    prompt_top_logprobs: Float[Array, "T K"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each field of a Batch lies in the packed int32 array of its bucket."""

    bucket: Bucket
    pages_per_row: int

    def fields(self) -> list[tuple[str, tuple[int, ...]]]:
        tokens, rows = self.bucket.num_tokens, self.bucket.num_rows
        return [
            ("tokens", (tokens,)),
            ("positions", (tokens,)),
            ("slots", (tokens,)),
            ("feed", (tokens,)),
            ("targets", (tokens,)),
            ("last", (rows,)),
            ("kv_lens", (rows,)),
            ("cu_q_lens", (rows + 1,)),
            ("num_decode", ()),
            ("bias_slot", (rows,)),
            ("sample", (len(_SAMPLE_FIELDS), rows)),
            ("page_table", (rows, self.pages_per_row)),
        ]

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for _, shape in self.fields())

    def split(self, packed):
        """The packed array, NumPy or JAX, as a dict of views by field name."""
        views, at = {}, 0
        for name, shape in self.fields():
            size = math.prod(shape)
            views[name] = packed[at : at + size].reshape(shape)
            at += size
        return views

    def unpack(self, packed: Int32[Array, " X"]) -> Batch:
        """The Batch inside the compiled step."""
        f = self.split(packed)
        rows = [f["sample"][i] for i in range(len(_SAMPLE_FIELDS))]
        floats = [jax.lax.bitcast_convert_type(r, jnp.float32) for r in rows[:_NUM_FLOATS]]
        columns = dict(zip(_SAMPLE_FIELDS, floats + rows[_NUM_FLOATS:], strict=True))
        ragged = Ragged(
            page_table=f["page_table"],
            kv_lens=f["kv_lens"],
            cu_q_lens=f["cu_q_lens"],
            num_decode=f["num_decode"],
            slots=f["slots"],
            decode_only=self.bucket.decode_only,
        )
        sample = SampleParams(**columns, position=f["kv_lens"], bias_slot=f["bias_slot"])
        return Batch(
            tokens=f["tokens"],
            positions=f["positions"],
            feed=f["feed"],
            targets=f["targets"],
            last=f["last"],
            ragged=ragged,
            sample=sample,
        )


@dataclass(slots=True)
class HostBatch:
    """A built step: its bucket, the packed array, and where each row's tokens lie (for commit)."""

    bucket: Bucket
    packed: np.ndarray
    offsets: list[int]


@dataclass(slots=True)
class _RowCache:
    """What build() keeps of a sequence between steps, so that a step costs O(rows), not
    O(tokens)."""

    sample: np.ndarray
    pages: np.ndarray
    page_list: list[int] | None = None


class Builder:
    """Builds the packed array of a plan, keeping each sequence's constant columns and page row."""

    def __init__(self, buckets: Buckets, page_size: int, pages_per_row: int):
        self.buckets = buckets
        self.page_size = page_size
        self.layouts = {b: Layout(b, pages_per_row) for b in buckets.all}
        self.pages_per_row = pages_per_row
        self._cache: dict[Sequence, _RowCache] = {}

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept of a finished sequence."""
        self._cache.pop(sequence, None)

    def build(
        self, plan: StepPlan, bias_slots: Seq[int], bucket: Bucket | None = None
    ) -> HostBatch:
        """Pad `plan` to its bucket, or to the one given. `bias_slots[i]` is the bias-table row of
        plan row i."""
        bucket = bucket or self.buckets.choose(plan)
        layout = self.layouts[bucket]
        packed = np.zeros(layout.size, np.int32)
        f = layout.split(packed)
        rows = plan.rows
        num_rows = len(rows)
        offsets, num_decode = _offsets(rows)
        f["feed"][:] = -1
        f["targets"][:] = -1
        f["cu_q_lens"][: num_rows + 1] = offsets
        f["cu_q_lens"][num_rows + 1 :] = offsets[-1]
        f["kv_lens"][:num_rows] = [row.kv_len for row in rows]
        f["last"][:num_rows] = [
            offsets[(i if row.logits_row is None else row.logits_row) + 1] - 1
            for i, row in enumerate(rows)
        ]
        f["bias_slot"][:num_rows] = bias_slots
        f["num_decode"][...] = num_decode
        sample, table = f["sample"], f["page_table"]
        sample[:, num_rows:] = _PADDING_SAMPLE
        for i, row in enumerate(rows):
            cached = self._refresh(row)
            sample[:, i] = cached.sample
            table[i] = cached.pages
        self._fill_decode(f, rows[:num_decode])
        for row, offset in zip(rows[num_decode:], offsets[num_decode:-1], strict=True):
            self._fill_chunk(f, row, offset)
        return HostBatch(bucket, packed, offsets)

    def _refresh(self, row: Row) -> _RowCache:
        """The row's cached columns and page row, brought up to this step."""
        cached = self._cache.get(row.sequence)
        if cached is None:
            cached = _RowCache(_sample_column(row.sequence), np.zeros(self.pages_per_row, np.int32))
            self._cache[row.sequence] = cached
        # The scheduler replaces a sequence's list of pages and never changes it.
        if cached.page_list is not row.pages:
            cached.pages[: len(row.pages)] = row.pages
            cached.pages[len(row.pages) :] = 0
            cached.page_list = row.pages
        return cached

    def _fill_decode(self, f: dict[str, np.ndarray], rows: list[Row]) -> None:
        n = len(rows)
        size = self.page_size
        starts = [row.start for row in rows]
        f["positions"][:n] = starts
        f["slots"][:n] = [
            row.pages[p // size] * size + p % size for row, p in zip(rows, starts, strict=True)
        ]
        f["feed"][:n] = [-1 if row.fed_from is None else row.fed_from for row in rows]
        f["tokens"][:n] = [_token(row) for row in rows]
        for i, row in enumerate(rows):
            if row.sequence.request.params.prompt_logprobs is not None:
                self._fill_targets(f, row, i)

    def _fill_chunk(self, f: dict[str, np.ndarray], row: Row, offset: int) -> None:
        n = row.num_new
        if not n:
            return
        span = slice(offset, offset + n)
        positions = np.arange(row.start, row.start + n, dtype=np.int32)
        pages = self._cache[row.sequence].pages[positions // self.page_size]
        f["positions"][span] = positions
        f["slots"][span] = pages * self.page_size + positions % self.page_size
        tokens = row.sequence.tokens[row.start : row.start + n]
        if row.fed_from is not None:
            f["feed"][offset + n - 1] = row.fed_from
            tokens = [*tokens, 0]
        f["tokens"][span] = tokens
        if row.sequence.request.params.prompt_logprobs is not None:
            self._fill_targets(f, row, offset)

    @staticmethod
    def _fill_targets(f: dict[str, np.ndarray], row: Row, offset: int) -> None:
        """Ask for the log-prob of each prompt token that follows one of this row's tokens."""
        sequence = row.sequence
        if sequence.index:
            return
        following = sequence.request.prompt_token_ids[row.start + 1 : row.kv_len + 1]
        f["targets"][offset : offset + len(following)] = following


def _token(row: Row) -> int:
    """The one new token of a decode row; 0 where it is still on the device."""
    if row.draft:
        return row.draft[-1]
    return row.sequence.tokens[row.start] if row.fed_from is None else 0


def _offsets(rows: list[Row]) -> tuple[list[int], int]:
    """Flat token offsets of the rows (one more than rows), and how many leading rows have one
    token."""
    offsets, num_decode = [0], 0
    for i, row in enumerate(rows):
        offsets.append(offsets[-1] + row.num_new)
        if row.num_new == 1 and num_decode == i:
            num_decode += 1
    return offsets, num_decode


def _sample_column(sequence: Sequence) -> np.ndarray:
    """The row's constant sampling parameters as int32 words, in the order of _SAMPLE_FIELDS."""
    params = sequence.request.params
    seed = sequence.request.seed & (2**64 - 1)
    floats = np.array(
        [
            0.0 if params.is_greedy else params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        ],
        np.float32,
    )
    # -1 (the whole vocabulary) and k alike only switch the computation on; the host cuts to k.
    wants = 0 if params.logprobs is None else 1
    ints = np.array(
        [
            min(params.top_k, 2**31 - 1),
            seed & 0xFFFFFFFF,
            seed >> 32,
            sequence.index,
            sequence.prompt_len,
            wants,
        ],
        np.int64,
    )
    return np.concatenate([floats.view(np.int32), ints.astype(np.uint32).view(np.int32)])
