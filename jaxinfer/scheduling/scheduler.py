"""Scheduler: continuous batching over a pool of pages. `plan` the next step, `commit` what it drew.

One step may be in flight: plan N+1 may be made before commit N, and then takes the tokens that the
host does not know yet from the device (`Row.fed_from`). Pages of a sequence that ended go back only
when no uncommitted plan has it. Preemption is by recompute: who gives way loses its pages, keeps
its tokens, and is prefilled again later. The parts: `Planner` chooses, `Roster` knows who is where.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict

import numpy as np

from jaxinfer.config import SchedulerConfig
from jaxinfer.errors import CapacityError, InvalidRequestError, NumericalError
from jaxinfer.request import Request, Row, Sequence, Status, StepPlan
from jaxinfer.scheduling.invariants import check_roster
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.scheduling.planner import DraftLengths, Planner
from jaxinfer.scheduling.queue import Entry
from jaxinfer.scheduling.roster import Roster

NOT_FINITE = -1
"""In place of a token: the row's logits had a NaN or an infinity."""
NO_TOKEN_ALLOWED = -2
"""In place of a token: bans left no token of the vocabulary."""


class Scheduler:
    """Serves requests from one page pool. Not thread-safe; every call is host work only."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.config = config
        self.pool = pool
        self._roster = Roster(config, pool, clock)
        self.cache = self._roster.cache
        """None where prefix caching is off."""
        self._planner = Planner(self._roster)

    # -- what is there --------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Some sequence has not ended, or some plan is not committed."""
        return bool(self._roster.requests or self._roster.outstanding)

    @property
    def num_running(self) -> int:
        self._roster.sweep()
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        return len(self._roster.waiting) + self._roster.num_held

    @property
    def num_outstanding(self) -> int:
        """Plans made and not yet committed: 0, 1 or 2."""
        return len(self._roster.outstanding)

    @property
    def num_preemptions(self) -> int:
        """Sequences that gave way, since the start."""
        return self._roster.counters.num_preemptions

    @property
    def num_admissions(self) -> int:
        """Sequences that began to run, since the start."""
        return self._roster.counters.num_admissions

    @property
    def num_prefix_hits(self) -> int:
        """Prompt tokens whose pages were there already, since the start."""
        return self._roster.counters.num_prefix_hits

    def metrics(self) -> dict[str, int]:
        """Counters since the start and how many sequences run and wait now."""
        return {
            **asdict(self._roster.counters),
            "num_evictions": self.cache.num_evictions if self.cache else 0,
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
        }

    def take_failed(self) -> list[Request]:
        """Requests that `plan` or `commit` failed since the last call; each has its `error`."""
        failed, self._roster.failed = self._roster.failed, []
        return failed

    # -- coming and going -----------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue the samples of `request`.

        Raises:
            CapacityError: it can never fit the page pool, or the queue is full.
            InvalidRequestError: its id is in use.
        """
        num_samples = 1 if request.cache_only else request.params.n
        prompt_len = len(request.prompt_token_ids)
        limit = min(prompt_len + request.max_tokens, self.config.max_model_len)
        if request.request_id in self._roster.requests:
            raise InvalidRequestError(
                f"request_id {request.request_id!r} is in use by a request that has not ended; "
                f"ids must be unique",
                param="request_id",
                value=request.request_id,
            )
        if prompt_len < 1 or prompt_len > limit or (prompt_len == limit and not request.cache_only):
            raise InvalidRequestError(
                f"a prompt must have 1..{self.config.max_model_len - 1} tokens and leave room for "
                f"one more (max_model_len={self.config.max_model_len}, "
                f"max_tokens={request.max_tokens}); got {prompt_len}",
                param="prompt",
                value=prompt_len,
            )
        self._check_fits(request, max(prompt_len, limit - 1))
        if self.num_waiting + num_samples > self.config.max_num_waiting:
            raise CapacityError(
                f"the queue is full: {self.num_waiting} sequences wait and the request has "
                f"{num_samples} (max_num_waiting={self.config.max_num_waiting}); try again later",
                need=num_samples,
                have=self.config.max_num_waiting - self.num_waiting,
            )
        priority = request.priority if self.config.policy == "priority" else 0
        entries = []
        for index in range(num_samples):
            sequence = Sequence(request, index, list(request.prompt_token_ids))
            entries.append(Entry(sequence, (priority, request.arrival, index), limit))
        request.sequences = [entry.sequence for entry in entries]
        self._roster.requests[request.request_id] = entries
        self._roster.waiting.push(entries[0])
        if num_samples > 1:
            self._roster.held[request] = entries[1:]
            self._roster.num_held += num_samples - 1

    def _check_fits(self, request: Request, num_tokens: int) -> None:
        # The last token of a sequence is never fed back and needs no K/V: num_tokens omits it.
        need = self.pool.num_pages_for(num_tokens)
        have = self.pool.num_usable
        if self.cache is not None and self.cache.num_pinned:
            have -= self.cache.num_pinned
            if request.params.prompt_logprobs is None:
                nodes = self.cache.match(
                    request.prompt_token_ids, request.cache_salt, self._roster.clock()
                )
                have += sum(node.is_pinned for node in nodes)
        if need > have:
            raise CapacityError(
                f"request {request.request_id!r} needs {need} pages for {num_tokens} tokens; the "
                f"pool has {have} that are not pinned, of {self.pool.page_size} tokens each: "
                "lower max_tokens, shorten the prompt or give the KV cache more memory",
                need=need,
                have=have,
            )

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End `sequence`; does nothing if it has ended."""
        for entry in self._roster.requests.get(sequence.request.request_id, ()):
            if entry.sequence is sequence:
                self._roster.end(entry, reason, stop_reason)

    def abort(self, request_id: str) -> bool:
        """End every sequence of the request with exactly this id; False if there is none."""
        entries = self._roster.requests.get(request_id)
        for entry in entries or ():
            self._roster.end(entry, "abort")
        return entries is not None

    def fail(self, request: Request, error: Exception) -> None:
        """End every sequence of `request` that has not ended, because of `error`."""
        entries = self._roster.requests.get(request.request_id)
        if entries and entries[0].sequence.request is request:
            self._roster.fail(request, error)

    # -- prompt caching -------------------------------------------------------------------------

    def pin(self, tokens: Seq[int], salt: str, ttl: float | None, pin: bool) -> int:
        """Pin the cached pages of `tokens`, set their time to live (see `PrefixCache.pin`)."""
        return self.cache.pin(tokens, salt, ttl, pin, self._roster.clock()) if self.cache else 0

    def unpin(self, tokens: Seq[int], salt: str) -> int:
        """Take back pins (see `PrefixCache.unpin`)."""
        return self.cache.unpin(tokens, salt) if self.cache else 0

    def reset_prefix_cache(self) -> None:
        """Forget all prefixes, pins included; what runs now adds nothing to the new cache."""
        if self.cache is not None:
            self.cache.reset()

    # -- the two verbs --------------------------------------------------------------------------

    def plan(self, draft_lengths: DraftLengths | None = None) -> StepPlan | None:
        """The next step, or None: nothing can run now.

        None while a plan is outstanding means: commit that one, then call again. `draft_lengths`
        is asked in steps that may have drafted tokens; rows for which it said more than 0 have
        `max_draft`, and `set_drafts` must follow.
        """
        if len(self._roster.outstanding) > 1:
            raise RuntimeError("plan() with two uncommitted plans; commit the older one first")
        return self._planner.plan(draft_lengths)

    def set_drafts(self, plan: StepPlan, drafts: Seq[Seq[int]]) -> None:
        """Take the drafted tokens of each row of `plan`, the newest, and give back pages that they
        do not need. Tokens beyond a row's `max_draft` are cut off."""
        if not self._roster.outstanding or self._roster.outstanding[-1].plan is not plan:
            raise RuntimeError("set_drafts() of a plan that is not the newest outstanding one")
        for row, draft in zip(plan.rows, drafts, strict=True):
            row.draft = tuple(draft[: row.max_draft])
            if row.max_draft:
                row.pages = self._trim(row.sequence, row.kv_len + len(row.draft))

    def _trim(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Give back the pages of `sequence` that its first `num_tokens` do not need; the others."""
        num_pages = self.pool.num_pages_for(num_tokens)
        rest = sequence.pages[num_pages:]
        if rest:
            sequence.pages = sequence.pages[:num_pages]
            self.pool.decref(reversed(rest))
        return sequence.pages

    def commit(
        self,
        plan: StepPlan,
        tokens: Seq[int] | np.ndarray,
        accepted: Mapping[int, Seq[int]] | None = None,
    ) -> list[tuple[Sequence, int]]:
        """Take the results of `plan`, the oldest that is outstanding.

        `tokens[i]` is what `plan.rows[i]` drew: NOT_FINITE where the row's logits were not finite
        (to be looked at in rows that do not sample too, so that no bad page is cached),
        NO_TOKEN_ALLOWED where everything was banned; any value >= 0 where the row does not sample.
        `accepted[i]`, for rows with a draft, are the tokens drawn after that one, up to the first
        that is not the drafted one: K/V of all but the last of a row's tokens are right, the rest
        is rolled back by not counting as computed.
        Returns the tokens of sequences that had not ended before, in the order of the rows; some
        end with theirs. Requests that fail here are in `take_failed`.
        """
        roster = self._roster
        if not roster.outstanding or roster.outstanding[0].plan is not plan:
            raise RuntimeError("commit() of a plan that is not the oldest outstanding one")
        done = roster.outstanding[0]
        values: list[int] = tokens.tolist() if isinstance(tokens, np.ndarray) else list(tokens)
        if len(values) < len(done.entries):
            raise RuntimeError(f"commit() of {len(done.entries)} rows with {len(values)} tokens")
        roster.outstanding.popleft()
        roster.counters.num_steps += 1
        if done.retired:
            roster.pool.decref(done.retired)
        drawn: list[tuple[Sequence, int]] = []
        page_size = roster.pool.page_size
        for i, (entry, row, token) in enumerate(zip(done.entries, plan.rows, values, strict=False)):
            entry.num_outstanding -= 1
            sequence = row.sequence
            if sequence.status is Status.FINISHED:
                if not entry.num_outstanding:
                    roster.release(entry)
                continue
            if token < 0 and (token == NOT_FINITE or row.samples):
                roster.fail(sequence.request, _row_error(sequence, token))
                roster.failed.append(sequence.request)
                continue
            sequence.num_committed = row.start + row.num_new
            if row.draft:
                drawn += self._commit_draft(entry, row, [token, *(accepted or {}).get(i, ())])
                continue
            if sequence.num_committed >= (entry.num_chained + 1) * page_size:
                self._cache_full_pages(entry)
            if row.samples:
                sequence.num_in_flight -= 1
                sequence.tokens.append(token)
                drawn.append((sequence, token))
                self._check_stop(entry, token)
            elif sequence.num_committed == len(sequence.tokens):
                roster.end(entry, "length")  # cache_only: all others sample at their end
        return drawn

    def _commit_draft(
        self, entry: Entry, row: Row, tokens: list[int]
    ) -> Iterator[tuple[Sequence, int]]:
        """Append what a row with a draft drew, until its sequence ends; `commit` a draft's row."""
        sequence = entry.sequence
        sequence.num_in_flight -= 1
        for token in tokens:
            if token < 0:
                break  # left to the next step: a stop string in what came before may end it first
            # K/V of the tokens so far are right: cached before this one may end the sequence.
            sequence.num_computed = sequence.num_committed = len(sequence.tokens)
            if sequence.num_committed >= (entry.num_chained + 1) * self.pool.page_size:
                self._cache_full_pages(entry)
            sequence.tokens.append(token)
            yield sequence, token
            self._check_stop(entry, token)
            if sequence.is_finished:
                return
        self._trim(sequence, sequence.num_computed)

    def _cache_full_pages(self, entry: Entry) -> None:
        """Enter the full committed pages of `entry` into the prefix cache."""
        roster, cache, sequence = self._roster, self.cache, entry.sequence
        if cache is None or entry.epoch != cache.epoch:
            return
        request, size = sequence.request, roster.pool.page_size
        while (entry.num_chained + 1) * size <= sequence.num_committed:
            if entry.node is not None and not entry.node.is_alive:
                return  # its prefix expired
            index = entry.num_chained
            page = sequence.pages[index]
            entry.node, is_new = cache.insert(
                entry.node,
                tuple(sequence.tokens[index * size : (index + 1) * size]),
                page,
                request.cache_salt,
            )
            entry.num_chained += 1
            if is_new:
                request.num_cache_creation_tokens += size
            elif entry.node.page != page:
                # Two sequences computed the same page at once: share one, the other goes free.
                roster.pool.incref((entry.node.page,))
                sequence.pages = [*sequence.pages]
                sequence.pages[index] = entry.node.page
                roster.retire(entry, page)

    def _check_stop(self, entry: Entry, token: int) -> None:
        sequence = entry.sequence
        request = sequence.request
        num_tokens = len(sequence.tokens)
        if token in request.stop_ids and (
            num_tokens - len(request.prompt_token_ids) >= request.params.min_tokens
        ):
            listed = request.params.stop_token_ids or ()
            self._roster.end(entry, "stop", token if token in listed else None)
        elif num_tokens >= entry.limit:
            self._roster.end(entry, "length")

    def check_invariants(self) -> None:
        """Raise AssertionError if pages, sequences, queues and cache disagree."""
        check_roster(self._roster)


def _row_error(sequence: Sequence, token: int) -> Exception:
    name = f"request {sequence.request.request_id!r}"
    at = f"at token {len(sequence.tokens)}"
    if token == NOT_FINITE:
        return NumericalError(
            f"{name}: the model gave NaN or infinite logits {at}; the weights or the dtype "
            "overflow on this input"
        )
    if token == NO_TOKEN_ALLOWED:
        return InvalidRequestError(
            f"{name}: no token is allowed {at}: allowed_token_ids, bad_words, logit_bias and "
            "min_tokens together ban the whole vocabulary; relax one of them",
            param="allowed_token_ids",
        )
    return RuntimeError(f"{name}: the step returned {token} {at}, which is no token id")
