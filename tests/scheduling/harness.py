"""A scheduler, an echo device and a clock, and what must come out of them."""

import random
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

from jaxinfer.config import SchedulerConfig
from jaxinfer.errors import CapacityError, InvalidRequestError, NumericalError
from jaxinfer.request import Request, Row, Sequence, StepPlan
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.scheduling.scheduler import NO_TOKEN_ALLOWED, Scheduler
from jaxinfer.speculative.verify import emitted
from tests.echo import EchoDevice, reference

VOCAB = 5
MAX_DRAFT = 6


@dataclass
class Pending:
    """A plan on the device: what each lane drew, and the first lane of each row."""

    plan: StepPlan
    tokens: list[int]
    first_lane: list[int]

    def drawn(self, i: int) -> list[int]:
        """By row i: its own draw, then that after each drafted token."""
        first = self.first_lane[i]
        return self.tokens[first : first + 1 + len(self.plan.rows[i].draft)]


class Harness:
    """Drives a Scheduler as an engine does, with up to two plans outstanding, and checks it.

    `drafts` decides what is drafted, at which it is right now and then; None: nothing is.
    """

    def __init__(
        self,
        num_pages: int = 32,
        page_size: int = 4,
        drafts: random.Random | None = None,
        **config: Any,
    ):
        defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 32}
        self.now = 0.0
        self.pool = PagePool(num_pages, page_size)
        self.config = SchedulerConfig(**{**defaults, **config})
        self.scheduler = Scheduler(self.config, self.pool, clock=lambda: self.now)
        self.device = EchoDevice(self.pool, VOCAB)
        self.requests: list[Request] = []
        self.pending: deque[Pending] = deque()
        self.drafts = drafts
        self.num_accepted = 0
        self.num_rejected = 0
        self.banned: set[str] = set()
        self.ended: dict[Sequence, str] = {}

    def add(self, prompt: list[int], **fields: Any) -> Request:
        """Queue a request; fields of SamplingParams and of Request by name."""
        names = set(SamplingParams.__dataclass_fields__) - {"max_tokens"}
        params = SamplingParams(**{k: v for k, v in fields.items() if k in names})
        rest = {"max_tokens": 4, **{k: v for k, v in fields.items() if k not in names}}
        stop_ids = frozenset(rest.pop("eos", ())) | frozenset(params.stop_token_ids or ())
        number = len(self.requests)
        request = Request(
            str(number), list(prompt), params, stop_ids=stop_ids, arrival=number, **rest
        )
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(self._draft_lengths if self.drafts else None)
        if plan is not None:
            for row in plan.rows:
                request = row.sequence.request
                assert row.num_generated + row.max_draft < request.max_tokens or not row.samples
                assert row.kv_len + row.max_draft < self.config.max_model_len, "a row for nothing"
                assert row.samples or not row.max_draft
            if any(row.max_draft for row in plan.rows):
                self.check()
                self.scheduler.set_drafts(plan, [self._draft(row) for row in plan.rows])
            lanes, first_lane = plan.lanes()
            self.pending.append(Pending(plan, self.device.run(lanes), first_lane))
        self.check()
        return plan

    def _draft_lengths(self, sequences: list[Sequence]) -> list[int]:
        assert self.drafts is not None
        return [self.drafts.choice([0, 1, 2, 4, MAX_DRAFT]) for _ in sequences]

    def _draft(self, row: Row) -> list[int]:
        """The true continuation, with an error in it or none; of any length, nonsense included."""
        assert self.drafts is not None
        length = self.drafts.choice([0, row.max_draft, row.max_draft, MAX_DRAFT + 2])
        draft = reference(row.sequence.tokens, length, VOCAB, row.sequence.index)
        if length and self.drafts.random() < 0.7:
            draft[self.drafts.randrange(length)] = self.drafts.randrange(VOCAB + 1)
        return draft

    def commit(self) -> None:
        done = self.pending.popleft()
        plan = done.plan
        firsts = [done.drawn(i)[0] for i in range(len(plan.rows))]
        accepted = {}
        for i, row in enumerate(plan.rows):
            drawn = done.drawn(i)
            if row.sequence.request.request_id in self.banned and row.samples:
                # Of a row with a draft only what comes after drafted tokens, which is the rarer.
                first = 1 if row.draft else 0
                drawn[first:] = [t if t < 0 else NO_TOKEN_ALLOWED for t in drawn[first:]]
                firsts[i] = drawn[0]
            if row.draft:
                accepted[i] = emitted(row.draft, drawn)[1:]
                self.num_accepted += len(accepted[i])
                self.num_rejected += len(row.draft) - len(accepted[i])
        news: defaultdict[Sequence, list[int]] = defaultdict(list)
        for sequence, token in self.scheduler.commit(plan, firsts, accepted):
            assert sequence not in self.ended, "a token for a sequence that has ended"
            news[sequence].append(token)
        for sequence, tokens in news.items():
            assert sequence.tokens[-len(tokens) :] == tokens
        self.check()

    def step(self) -> None:
        """One step with nothing left in flight."""
        while self.pending:
            self.commit()
        if self.plan() is not None:
            self.commit()

    def advance(self, overlap: bool = True) -> None:
        """Plan the next step while one is in flight; now and then wait for it, to draft."""
        waits = self.pending and self.drafts is not None and self.drafts.random() < 0.5
        planned = len(self.pending) < 2 and not waits and self.plan()
        if self.pending and (not overlap or not planned or len(self.pending) == 2):
            self.commit()

    def drain(self, overlap: bool = False, max_steps: int = 3000) -> None:
        """Run until everything has ended."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.advance(overlap)
        raise AssertionError(f"work is left after {max_steps} steps")

    # -- what must hold ---------------------------------------------------------------------------

    def check(self) -> None:
        """What must hold after every call."""
        self.scheduler.check_invariants()
        self._check_cached_content()
        self._check_pages_in_flight()
        for request in self.scheduler.take_failed():
            assert request.error is not None and request.is_finished
        for request in self.requests:
            for sequence in request.sequences:
                if sequence.is_finished and sequence not in self.ended:
                    self.ended[sequence] = str(sequence.finish_reason)
                    self._check_ended(request, sequence)
                assert self.ended.get(sequence) == sequence.finish_reason, "it ended twice"

    def _check_cached_content(self) -> None:
        salts: dict[int, str] = {}
        for node in self.scheduler.cache.nodes() if self.scheduler.cache else ():
            assert tuple(self.device.pages[node.page]) == node.tokens, "a page is not its key"
            salts[node.page] = node.salt
        for request in self.requests:
            for sequence in request.sequences:
                for page in sequence.pages:
                    salt = salts.setdefault(page, request.cache_salt)
                    assert salt == request.cache_salt, "a page is shared across salts"

    def _check_pages_in_flight(self) -> None:
        """No page of a plan that is not committed is free; the device may not have used it yet.

        A page that was copied is left out: the copy comes before all that is planned later.
        """
        copied = {source for done in self.pending for source, _ in done.plan.copies}
        for done in self.pending:
            for row in done.plan.rows:
                for page in row.pages:
                    assert page in copied or self.pool.refcount(page), f"page {page} went too early"

    def _check_ended(self, request: Request, sequence: Sequence) -> None:
        tokens, reason, stop = self.expected(request, sequence.index)
        generated = sequence.tokens[sequence.prompt_len :]
        assert generated == tokens[: len(generated)], "the tokens are not the request's own"
        if sequence.finish_reason in ("abort", "stop string"):
            return
        if sequence.finish_reason == "error":
            self._check_error(request)
            return
        assert sequence.finish_reason == reason and sequence.stop_reason == stop
        assert generated == tokens, "it ended early or late"

    def _check_error(self, request: Request) -> None:
        error = request.error
        if isinstance(error, NumericalError):
            assert any(name == request.request_id for name, _ in self.device.poisoned)
        elif isinstance(error, CapacityError):
            assert self.scheduler.cache and self.scheduler.cache.num_pinned
        else:
            assert isinstance(error, InvalidRequestError) and request.request_id in self.banned

    def expected(self, request: Request, index: int) -> tuple[list[int], str, int | None]:
        """Generated tokens, finish_reason and stop_reason of a sample that nothing disturbs."""
        if request.cache_only:
            return [], "length", None
        prompt = request.prompt_token_ids
        limit = min(request.max_tokens, self.config.max_model_len - len(prompt))
        tokens = reference(prompt, limit, VOCAB, index)
        for count, token in enumerate(tokens, 1):
            if token in request.stop_ids and count >= request.params.min_tokens:
                listed = request.params.stop_token_ids or []
                return tokens[:count], "stop", token if token in listed else None
        return tokens, "length", None

    def check_drained(self) -> None:
        """Nothing is left, and after a reset every page is free."""
        cache, pool = self.scheduler.cache, self.pool
        assert not self.scheduler.has_work and not self.pending
        assert len(self.ended) == sum(len(request.sequences) for request in self.requests)
        assert pool.num_free + (cache.num_cached if cache else 0) == pool.num_usable
        self.scheduler.reset_prefix_cache()
        self.scheduler.check_invariants()
        assert pool.num_free == pool.num_usable


def shape(plan: StepPlan) -> list[tuple[str, int, int, int, bool]]:
    """(request id, sample, start, num_new, samples) of each row."""
    return [
        (r.sequence.request.request_id, r.sequence.index, r.start, r.num_new, r.samples)
        for r in plan.rows
    ]


def ids(plan: StepPlan) -> list[str]:
    """The request id of each row."""
    return [row.sequence.request.request_id for row in plan.rows]
