"""Speculator: how many tokens to draft for each row of a decode step, and the count of what came.

A drafted token is one more row (lane) of the step. What a step of so many lanes takes is measured
in service, so is how often each sequence's drafts were right; a draft is made where the tokens to
be expected for each second are more than without one. Nothing is drafted before both sides of that
comparison were measured, but for a first try of each.
"""

import heapq
import statistics
from collections import deque
from collections.abc import Sequence as Seq

from jaxinfer.request import Row, Sequence, SpeculationStats, StepPlan
from jaxinfer.speculative.config import SpeculativeConfig
from jaxinfer.speculative.proposer import Proposer
from jaxinfer.speculative.verify import emitted

_SAMPLES = 9
"""Steps of a size whose median is its cost."""
_FIRST = 2
"""Plain steps that are measured before the first draft of a batch of their size."""
_STALE = 256
"""Steps after which a cost that was not measured again is forgotten, so that it is tried again;
twice as many after each such trial, so that trials of what never pays cost less and less."""
_LONGEST_STALE = 2**13
"""What that grows to."""
_TRIES = 4
"""Steps of a kind that are made before their cost is believed for the first time: the first run of
a program is slow, and one step may be held up by anything. Later one is enough."""
_MARGIN = 1.03
"""Tokens a second with a draft over those without, from which on it is made."""
_PRIOR = (1.5, 2.0)
"""Accepted and tried tokens that a sequence starts with: drafts are believed until they fail."""
_KEEP = 0.85
"""What the evidence of a sequence still weighs after another of its drafts."""
_FADE = 0.985
"""What it still weighs after a step in which it could have drafted and did not."""


class StepCosts:
    """Median seconds of the newest steps, by (lanes padded to a bucket, rows of them that draft or
    0)."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], deque[float]] = {}
        self._newest: dict[tuple[int, int], int] = {}
        self._medians: dict[tuple[int, int], float] = {}
        self._lasting: dict[tuple[int, int], int] = {}
        self._num_steps = 0

    def add(self, key: tuple[int, int], seconds: float) -> None:
        count = self.count(key)
        if not count:
            is_trial = key in self._seconds
            self._lasting[key] = min(2 * self._lasting[key], _LONGEST_STALE) if is_trial else _STALE
            self._seconds[key] = deque(maxlen=_SAMPLES)
        elif count == _SAMPLES:  # more than a trial
            self._lasting[key] = _STALE
        self._num_steps += 1
        self._newest[key] = self._num_steps
        self._seconds[key].append(seconds)
        self._medians[key] = statistics.median(self._seconds[key])

    def count(self, key: tuple[int, int]) -> int:
        """Steps of this kind that are remembered."""
        if key not in self._newest or self._num_steps - self._newest[key] >= self._lasting[key]:
            return 0
        return len(self._seconds[key])

    def seconds(self, key: tuple[int, int], least: int = 1) -> float | None:
        """Their median; None where fewer than `least` are remembered, or, if they were forgotten
        before, none."""
        if key in self._seconds and self._lasting[key] > _STALE:
            least = 1
        return self._medians[key] if self.count(key) >= least else None

    def table(self) -> dict[tuple[int, int], float]:
        """Every cost that is known now."""
        return {key: value for key, value in self._medians.items() if self.count(key)}


class Speculator:
    """Decides drafts and counts them, for one engine.

    Args:
        lane_buckets: rows that a decode step may be padded to, ascending; the last bounds lanes.
        vocab_size: ids from here on are no drafts.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        proposer: Proposer,
        lane_buckets: Seq[int],
        vocab_size: int,
    ):
        self.config = config
        self.proposer = proposer
        self.costs = StepCosts()
        self.stats = SpeculationStats()
        self._buckets = tuple(lane_buckets)
        self._vocab_size = vocab_size
        self._evidence: dict[Sequence, tuple[float, float]] = {}
        self._caught_up: StepPlan | None = None

    # -- how many ---------------------------------------------------------------------------------

    def should_wait(self, plan: StepPlan) -> bool:
        """Whether the step after `plan`, which is on the device, had better have drafts: then it
        must wait for the tokens of `plan`."""
        if plan.has_drafts:
            return True
        if any(row.num_new != 1 for row in plan.rows):
            return False
        return any(self._decide([r.sequence for r in plan.rows if not r.sequence.is_finished], 0))

    def lengths(self, sequences: list[Sequence]) -> list[int]:
        """How many tokens to draft for each row of a decode step (the planner's DraftLengths).

        The rows are made: each sequence counts the token that its row will sample as in flight.
        """
        return self._decide(sequences, 1)

    def _decide(self, sequences: list[Sequence], num_planned: int) -> list[int]:
        """Lengths, for sequences of whose tokens `num_planned` are only planned."""
        chosen = self._choose(sequences, num_planned)
        if not any(chosen):
            for sequence in sequences:
                accepted, tried = self._evidence.get(sequence, _PRIOR)
                if tried != _PRIOR[1]:
                    self._evidence[sequence] = (
                        _PRIOR[0] + _FADE * (accepted - _PRIOR[0]),
                        _PRIOR[1] + _FADE * (tried - _PRIOR[1]),
                    )
        return chosen

    def _choose(self, sequences: list[Sequence], num_planned: int) -> list[int]:
        num_rows = len(sequences)
        none = [0] * num_rows
        limit = self.config.disable_by_batch_size
        if not num_rows or num_rows >= self._buckets[-1] or (limit and num_rows >= limit):
            return none
        base = self._bucket(num_rows)
        plain = self.costs.seconds((base, 0), _FIRST)
        if plain is None:
            return none
        most = self.config.num_speculative_tokens
        available = [self._available(sequence, most, num_planned) for sequence in sequences]
        num_wanted = sum(available)
        if not num_wanted:
            return none
        best, best_rate, cost = none, num_rows / plain * _MARGIN, plain
        rates = [self._acceptance(sequence) for sequence in sequences]
        for bucket in self._buckets:
            if bucket <= num_rows:
                continue
            lengths, tokens = _fill(available, rates, bucket - num_rows)
            cost = self._cost(bucket, base, cost)
            rate = tokens / cost
            if rate > best_rate:
                best, best_rate = lengths, rate
            if num_rows + num_wanted <= bucket:
                break
        return best

    def _available(self, sequence: Sequence, most: int, num_planned: int) -> int:
        """What can be drafted and used: a verified draft gives one token more than it has."""
        room = sequence.request.max_tokens - (sequence.num_generated - num_planned) - 1
        return self.proposer.available(sequence, min(most, room)) if room > 0 else 0

    def _cost(self, bucket: int, base: int, smaller: float) -> float:
        """Measured; before that, what a plain step of as many rows takes, or one of the next
        smaller bucket."""
        measured = self.costs.seconds((bucket, base), _TRIES)
        return measured or max(self.costs.seconds((bucket, 0)) or 0.0, smaller)

    def _bucket(self, num_rows: int) -> int:
        return next(bucket for bucket in self._buckets if num_rows <= bucket)

    def _acceptance(self, sequence: Sequence) -> float:
        accepted, tried = self._evidence.get(sequence, _PRIOR)
        return accepted / tried

    # -- what came --------------------------------------------------------------------------------

    def propose(self, plan: StepPlan) -> list[list[int]]:
        """The drafts of a plan's rows; what is no token id ends a draft."""
        drafts = self.proposer.propose(plan.rows)[: len(plan.rows)]
        self._caught_up = plan if self.proposer.caught_up else None
        return [self._ids(draft) for draft in drafts] + [[]] * (len(plan.rows) - len(drafts))

    def _ids(self, draft: Seq[int]) -> list[int]:
        good: list[int] = []
        for token in draft:
            if not 0 <= token < self._vocab_size:
                break
            good.append(int(token))
        return good

    def verify(self, row: Row, drawn: list[int]) -> list[int]:
        """The tokens that `row`, which has a draft, emits; its drafts to come are judged by it."""
        tokens = emitted(row.draft, drawn)
        num_accepted = len(tokens) - 1
        num_tried = min(len(row.draft), num_accepted + 1)
        accepted, tried = self._evidence.get(row.sequence, _PRIOR)
        self._evidence[row.sequence] = (
            _KEEP * accepted + num_accepted,
            _KEEP * tried + num_tried,
        )
        return tokens

    def count(self, row: Row, num_verified: int, num_emitted: int) -> None:
        """Count a draft of which `num_verified` tokens came back and `num_emitted` were used."""
        metrics = row.sequence.request.metrics
        metrics.speculation = metrics.speculation or SpeculationStats()
        for stats in (self.stats, metrics.speculation):
            stats.add(len(row.draft), num_verified - 1, num_emitted)

    def metrics(self) -> dict[str, float | int]:
        """Counters since the start, flat, under vLLM's names."""
        stats = self.stats
        numbers: dict[str, float | int] = {
            "spec_decode_num_drafts": stats.num_drafts,
            "spec_decode_num_draft_tokens": stats.num_draft_tokens,
            "spec_decode_num_accepted_tokens": stats.num_accepted_tokens,
            "spec_decode_acceptance_rate": stats.acceptance_rate,
            "spec_decode_mean_accepted_length": stats.mean_accepted_length,
        }
        for position, count in enumerate(stats.num_accepted_tokens_per_pos):
            numbers[f"spec_decode_num_accepted_tokens_pos_{position}"] = count
        return numbers

    def note_step(self, plan: StepPlan, num_lanes: int, seconds: float) -> None:
        """A decode step took so long, from the end of the step before to its own.

        Where drafts were wanted and none came, or the proposer had first to read what was decoded
        without it, that is no measure of either kind of step.
        """
        in_vain = not plan.has_drafts and any(row.max_draft for row in plan.rows)
        if in_vain or plan is self._caught_up:
            return
        base = self._bucket(len(plan.rows))
        self.costs.add((self._bucket(num_lanes), base if plan.has_drafts else 0), seconds)

    def forget(self, sequence: Sequence) -> None:
        """`sequence` has ended."""
        self._evidence.pop(sequence, None)
        self.proposer.forget(sequence)


def _fill(available: list[int], rates: list[float], num_lanes: int) -> tuple[list[int], float]:
    """Give `num_lanes` to the rows whose next drafted token is likeliest to count; each row's
    length, and the tokens to be expected of the step."""
    lengths = [0] * len(available)
    tokens = float(len(available))
    heap = [(-rate, row) for row, rate in enumerate(rates) if available[row]]
    heapq.heapify(heap)
    while heap and num_lanes:
        chance, row = heap[0]
        tokens -= chance
        lengths[row] += 1
        num_lanes -= 1
        if lengths[row] < available[row]:
            heapq.heapreplace(heap, (chance * rates[row], row))
        else:
            heapq.heappop(heap)
    return lengths, tokens
