"""Bias rows: what logit_bias, allowed_token_ids, bad_words and min_tokens add to a row's logits.

The device holds a table of [V] rows; a step names one per sequence. Rows are kept by content, so
equal requests share one and a row is uploaded only when it is new. The table has a row for every
running sequence, so the least recently used one is never needed by the step at hand.
"""

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from jaxinfer.request import Row, StepPlan
from jaxinfer.sampling_params import SamplingParams

_Key = tuple[bytes, frozenset[int], tuple[int, ...]]
_PLAIN: _Key = (b"", frozenset(), ())


class BiasRows:
    """Decides each row's slot in the table; slot 0 is all zeros and never changes."""

    def __init__(self, capacity: int, vocab_size: int):
        self.capacity = capacity
        self.vocab_size = vocab_size
        self._slots: OrderedDict[_Key, int] = OrderedDict()

    def assign(self, plan: StepPlan) -> tuple[list[int], list[tuple[int, np.ndarray]]]:
        """(slot of each plan row, [(slot, its new [V] float32 row)] to upload before the step)."""
        slots, uploads = [], []
        for row in plan.rows:
            key = _key(row)
            if key is _PLAIN:
                slots.append(0)
                continue
            slot = self._slots.get(key)
            if slot is None:
                slot = self._take()
                self._slots[key] = slot
                request = row.sequence.request
                single = [ids[0] for ids in request.bad_token_ids if len(ids) == 1]
                banned = [*single, *key[1], *key[2]]
                uploads.append((slot, bias_row(self.vocab_size, request.params, banned)))
            self._slots.move_to_end(key)
            slots.append(slot)
        return slots, uploads

    def reset(self) -> None:
        """Forget what the device's table holds; every row is uploaded anew when it is needed."""
        self._slots.clear()

    def _take(self) -> int:
        if len(self._slots) + 1 < self.capacity:
            return len(self._slots) + 1
        _, slot = self._slots.popitem(last=False)
        return slot


def bias_row(vocab_size: int, params: SamplingParams, banned: Iterable[int] = ()) -> np.ndarray:
    """[V] float32 to add to the logits: logit_bias, and -inf for what is not allowed or banned.

    Banned ids outside the vocabulary (a tokenizer may know more ids than the model) need no ban.
    """
    row = np.zeros(vocab_size, np.float32)
    if params.allowed_token_ids is not None:
        row[:] = -np.inf
        row[params.allowed_token_ids] = 0.0
    for token, bias in (params.logit_bias or {}).items():
        row[token] += bias
    row[[token for token in banned if token < vocab_size]] = -np.inf
    return row


def _key(row: Row) -> _Key:
    """What decides the row's bias now; _PLAIN itself where nothing does."""
    request = row.sequence.request
    min_tokens = request.params.min_tokens
    if not row.samples or not (request.bias_key or min_tokens or request.bad_token_ids):
        return _PLAIN
    num_generated = row.kv_len - row.sequence.prompt_len
    stops = request.stop_ids if num_generated < min_tokens else frozenset()
    banned = _completed_words(row, num_generated) if request.bad_token_ids else ()
    if not (request.bias_key or stops or banned):
        return _PLAIN
    return (request.bias_key, stops, banned)


def _completed_words(row: Row, num_generated: int) -> tuple[int, ...]:
    """Last tokens of the bad words whose other tokens are the newest output (vLLM's rule).

    The scheduler plans such a row only when its last token is known on the host.
    """
    words = row.sequence.request.bad_token_ids
    known = row.kv_len - len(row.draft)
    longest = max(len(ids) for ids in words)
    tokens = (*row.sequence.tokens[max(0, known - longest) : known], *row.draft)
    banned = set()
    for ids in words:
        before = len(ids) - 1
        if 0 < before <= num_generated and tokens[len(tokens) - before :] == ids[:-1]:
            banned.add(ids[-1])
    return tuple(sorted(banned))
