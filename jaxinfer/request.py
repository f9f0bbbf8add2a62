"""The host nouns: Request, Sequence, Row, StepPlan, RequestOutput. Standard library only.

A Request is what a user asked for; its `n` samples are Sequences, the unit that the scheduler
moves. A StepPlan says which tokens of which sequences the next device step computes.
"""

import enum
from dataclasses import dataclass, field, replace

from jaxinfer.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of a token under the raw logits, its 1-based rank and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class SpeculationStats:
    """What became of drafted tokens. A draft is one row's drafted tokens in one step.

    `num_emitted_tokens` are the tokens of the steps that verified a draft: those accepted and one
    more each. `num_accepted_tokens_per_pos[i]` counts the drafts whose token i was accepted.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_emitted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_draft_tokens_per_pos: list[int] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float:
        """Accepted of the drafted tokens; 0.0 where there were none."""
        return self.num_accepted_tokens / max(1, self.num_draft_tokens)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per verified draft, the one that a step without a draft gives included."""
        return self.num_emitted_tokens / max(1, self.num_drafts)

    def add(self, num_drafted: int, num_accepted: int, num_emitted: int) -> None:
        """Count one draft. `num_emitted` is less than num_accepted + 1 where the sequence ended."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        self.num_emitted_tokens += num_emitted
        missing = num_drafted - len(self.num_draft_tokens_per_pos)
        self.num_draft_tokens_per_pos += [0] * missing
        self.num_accepted_tokens_per_pos += [0] * missing
        for position in range(num_drafted):
            self.num_draft_tokens_per_pos[position] += 1
            self.num_accepted_tokens_per_pos[position] += position < num_accepted


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds of time.monotonic(); None until the event happened.

    `speculation` counts what speculative decoding did for the request; None where it drafted
    nothing.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    speculation: "SpeculationStats | None" = None


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request, with vLLM's fields.

    `finish_reason` is "stop", "length", "abort", "error" or None while running; `stop_reason` the
    stop token id or stop string that ended it, None for end-of-sequence.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """What `generate`, `chat` and `stream` return, with vLLM's fields.

    `num_cached_tokens`: prompt tokens read from the prefix cache. `num_cache_creation_tokens`:
    tokens (prompt and output, whole pages) that this request added to it. `error`: why the request
    failed, None where it did not; then every output's finish_reason is "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    num_cache_creation_tokens: int = 0
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One prompt to serve. `stop_ids` are the ids that end it (stop_token_ids, and EOS unless
    ignored).

    `bad_token_ids` are `bad_words` tokenised. `max_tokens` is resolved: an int that fits the
    context. `arrival` counts requests of an engine; FCFS and all ties go by it. `cache_only`
    prefills and stops (`llm.cache_prompt`). `bias_key` is a digest of what its bias row
    holds, b"" where it has none.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    bias_key: bytes = b""
    prompt: str | None = None
    cache_salt: str = ""
    priority: int = 0
    arrival: int = 0
    seed: int = 0
    cache_only: bool = False
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))
    sequences: list["Sequence"] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_cache_creation_tokens: int = 0
    error: Exception | None = None

    @property
    def is_finished(self) -> bool:
        return bool(self.sequences) and all(s.is_finished for s in self.sequences)


class Status(enum.Enum):
    """Where a sequence is: WAITING for admission, RUNNING (owns pages), or FINISHED."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request; the scheduler owns and moves it.

    `tokens` are the prompt, then what was generated and is known on the host; `num_in_flight` more
    (one per uncommitted plan that samples it) are still on the device. K/V of tokens
    [0, num_computed) are in `pages`, or are being written by a step in flight; the rest are
    pending. [0, num_committed) are known to be written and finite: only those enter the prefix
    cache.
    """

    request: Request
    index: int
    tokens: list[int]
    status: Status = Status.WAITING
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_committed: int = 0
    num_in_flight: int = 0
    num_preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, those still on the device included."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_pending(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def num_generated(self) -> int:
        """Sampled tokens, those still on the device included."""
        return self.num_tokens - self.prompt_len

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED


@dataclass(slots=True)
class Row:
    """One sequence's share of a step: tokens [start, start + num_new) get K/V.

    `samples`: the last of them is the sequence's last, so a token is drawn. `num_new` is 0 for a
    sample of `n > 1` that draws its first token from the logits of its leader's row (`logits_row`).
    `fed_from`: the row of the step before whose sampled token is this row's last token, which the
    host does not know yet; None when it does. `pages` and `generated` are as of this step.
    `max_draft`: tokens that may be drafted after its own, for which it has pages; `draft`: those
    that were, on a row of a plan; on a lane (`StepPlan.lanes`), the drafted tokens up to its own.
    """

    sequence: Sequence
    start: int
    num_new: int
    samples: bool
    num_generated: int
    pages: list[int]
    fed_from: int | None = None
    logits_row: int | None = None
    max_draft: int = 0
    draft: tuple[int, ...] = ()

    @property
    def kv_len(self) -> int:
        return self.start + self.num_new

    @property
    def has_targets(self) -> bool:
        """Whether log-probs of prompt tokens that follow its own are wanted. Decode programs leave
        them out: the host of a GPU would wait for that branch in every step."""
        sequence = self.sequence
        if sequence is None or sequence.request.params.prompt_logprobs is None:
            return False  # None: the programs for a first prompt are chosen before it is made
        return not sequence.index and self.start + 1 < len(sequence.request.prompt_token_ids)


@dataclass(slots=True)
class StepPlan:
    """What one device step computes: rows with one new token first, then prompt chunks.

    `copies` are page pairs (source, destination) to be copied before the step (copy-on-write).
    """

    step_id: int
    rows: list[Row]
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_new for row in self.rows)

    @property
    def has_drafts(self) -> bool:
        return any(row.draft for row in self.rows)

    def lanes(self) -> tuple["StepPlan", list[int]]:
        """The plan as the device runs it, and the first lane of each row.

        A drafted token is a decode row of its own, at the next position of the same pages: K/V of
        all rows are written before any attends, so each sees the drafted tokens before it, and
        samples with its sequence's parameters. Only a plan of rows with one new token has drafts.
        """
        if not self.has_drafts:
            return self, list(range(len(self.rows)))
        lanes: list[Row] = []
        first = []
        for row in self.rows:
            first.append(len(lanes))
            lanes.append(replace(row, draft=()))
            for j in range(1, len(row.draft) + 1):
                at = {"start": row.start + j, "num_generated": row.num_generated + j}
                lanes.append(replace(row, **at, draft=row.draft[:j]))
        return StepPlan(self.step_id, lanes, self.copies), first
