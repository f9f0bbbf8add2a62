"""The engine's loop: plan, build, step, commit, with one step in flight. Host and device meet here.

Engine owns the scheduler, the runner and the steps in flight, and serves any number of callers in
one thread. The requests and what they have produced are in its outbox (outbox.py). `LLM` (llm.py)
is the user's face of it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer.batch import Builder, HostBatch, StepResult
from jaxinfer.bias import BiasRows
from jaxinfer.errors import EngineDeadError, InvalidRequestError, JaxInferError
from jaxinfer.intake import Intake
from jaxinfer.metrics import Metrics, StepStats
from jaxinfer.outbox import Outbox
from jaxinfer.outputs import LogprobReader
from jaxinfer.request import Request, RequestOutput, Sequence, StepPlan
from jaxinfer.runner import Runner
from jaxinfer.sampling_params import RequestOutputKind
from jaxinfer.scheduling.scheduler import Scheduler
from jaxinfer.speculative.speculator import Speculator
from jaxinfer.tokenizer import Tokenizer

# What the engine does shows in a profiler's trace, under names that profiling/events.py knows.
# Where nothing is traced all of a step's take 2 us together.
span = jax.profiler.TraceAnnotation


@dataclass(slots=True)
class _InFlight:
    plan: StepPlan
    batch: HostBatch
    result: StepResult
    stats: StepStats
    first_lane: list[int]
    """Of each row of the plan: where its tokens begin among those of the result."""


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread calls it.

    `overlap`: plan and dispatch the next step before the tokens of the one on the device are known.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        builder: Builder,
        bias: BiasRows,
        intake: Intake,
        tokenizer: Tokenizer | None,
        overlap: bool = True,
        speculator: Speculator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.scheduler = scheduler
        self.runner = runner
        self.runners = [runner]
        """That of a draft model too, where there is one: they compile, warm up and close alike."""
        self.intake = intake
        self.metrics = Metrics()
        self._outbox = Outbox(tokenizer, self.metrics, clock)
        self._tokenizer = tokenizer
        self._builder = builder
        self._bias = bias
        self._depth = 2 if overlap else 1
        self.speculator = speculator
        self._clock = clock
        self._in_flight: deque[_InFlight] = deque()
        self._dead: BaseException | None = None
        self._admitted = False
        """The newest plan took prompts in."""
        self._last_finished: float | None = None
        """When the newest step came back; None where what comes next says nothing of its cost."""

    # -- requests ---------------------------------------------------------------------------------

    def add(
        self,
        prompt: Any,
        params: Any = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        kind: RequestOutputKind | None = None,
        add_special_tokens: bool = True,
        cache_only: bool = False,
    ) -> Request:
        """Queue a request; `step` serves it.

        Raises:
            InvalidRequestError: it cannot be served. CapacityError: it can never fit the page
            pool, or too many wait. The engine is unchanged then.
        """
        self.check_alive()
        request = self.intake.request(
            prompt,
            params,
            request_id=self._outbox.free_id(request_id),
            priority=priority,
            add_special_tokens=add_special_tokens,
            cache_only=cache_only,
        )
        if priority and self.scheduler.config.policy != "priority":
            raise InvalidRequestError(
                f"priority={priority} has no meaning under first come, first served; make the "
                f'engine with scheduling_policy="priority"',
                param="priority",
                value=priority,
            )
        self.scheduler.add(request)
        if not self._outbox.has_requests:
            with span("wake"):  # until now the device had nothing to do
                pass
        self._outbox.open(request, kind or request.params.output_kind)
        return request

    def abort(self, request_id: str) -> bool:
        """End a request at any stage; False where no such request is running or waiting.

        Its last output says finish_reason "abort" and comes with the next `step`.
        """
        self.check_alive()
        if not self.scheduler.abort(request_id):
            return False
        self._outbox.note(request_id)
        return True

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute, to collect or to hand out."""
        return bool(self.scheduler.has_work or self._in_flight or self._outbox.has_news)

    # -- the loop ---------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Advance by one device step: dispatch the next, then collect the oldest in flight.

        Returns what is new, by each request's output kind. A fault of the device ends the engine.

        Raises:
            EngineDeadError: the engine failed, now or before, or is closed.
        """
        self.check_alive()
        number = self.metrics.num_steps
        with self._fatal_faults(), jax.profiler.StepTraceAnnotation("step", step_num=number):
            dispatched = not self._must_wait() and self._dispatch()
            if len(self._in_flight) >= self._depth or (self._in_flight and not dispatched):
                self._collect(self._in_flight.popleft())
            outputs = self._take_outputs()
            if not self._outbox.has_requests:
                # What is still in flight is of requests that have ended.
                outputs += self._collect_all()
                self._last_finished = None
        return outputs

    @contextmanager
    def _fatal_faults(self) -> Iterator[None]:
        """A fault that is not of jaxinfer's own making ends the engine."""
        try:
            yield
        except (JaxInferError, KeyboardInterrupt):
            raise
        except Exception as error:
            self._dead = error
            raise EngineDeadError(
                f"the engine failed in a step: {error}; every request in it is lost, make a new LLM"
            ) from error

    def _must_wait(self) -> bool:
        """Whether the tokens in flight should come back before the next step is made: on a cold
        engine they should not wait for the program that decodes their rows, and drafts of what
        follows them need them.
        """
        if not self._in_flight:
            return False
        plan = self._in_flight[-1].plan
        bucket = self._builder.buckets.decode_bucket(len(plan.rows))
        if not self.runner.is_compiled(bucket):
            return True
        # A step that takes prompts in has no drafts, and where one did the next one may.
        admits = self._admitted and self.scheduler.num_waiting
        return self.speculator is not None and not admits and self.speculator.should_wait(plan)

    def _dispatch(self) -> bool:
        """Plan, build and start a step; whether there was one to start."""
        if len(self._in_flight) >= self._depth:
            return False
        begun = time.perf_counter()
        hits, preemptions = self.scheduler.num_prefix_hits, self.scheduler.num_preemptions
        admissions = self.scheduler.num_admissions
        with span("plan"):
            plan = self.scheduler.plan(self.speculator.lengths if self.speculator else None)
        self._admitted = self.scheduler.num_admissions > admissions
        if plan is None:
            self._note_ended()
            return False
        planned = time.perf_counter()
        try:
            proposed = planned
            if self.speculator is not None and any(row.max_draft for row in plan.rows):
                with span("propose"):
                    self.scheduler.set_drafts(plan, self.speculator.propose(plan))
                proposed = time.perf_counter()
            with span("build"):
                lanes, first_lane = plan.lanes()
                slots, uploads = self._bias.assign(lanes)
                batch = self._builder.build(lanes, slots)
            built = time.perf_counter()
            if not self.runner.is_compiled(batch.bucket):
                self._last_finished = None
            with span("dispatch", bucket=str(batch.bucket)):
                result = self.runner.run(batch, plan.copies, uploads)
        except (JaxInferError, KeyboardInterrupt):
            self._give_up(plan)
            raise
        stats = StepStats(
            bucket=str(batch.bucket),
            num_rows=len(plan.rows),
            num_tokens=lanes.num_tokens,
            num_draft_tokens=lanes.num_tokens - plan.num_tokens,
            pages_used=self.scheduler.pool.num_usable - self.scheduler.pool.num_available,
            cached_tokens=self.scheduler.num_prefix_hits - hits,
            num_preemptions=self.scheduler.num_preemptions - preemptions,
            begun=begun,
            plan_seconds=planned - begun,
            propose_seconds=proposed - planned,
            build_seconds=built - proposed,
            dispatch_seconds=time.perf_counter() - built,
        )
        self._in_flight.append(_InFlight(plan, batch, result, stats, first_lane))
        self._note_ended()
        self.metrics.num_steps += 1
        self.metrics.steps.append(stats)
        return True

    def _give_up(self, plan: StepPlan) -> None:
        """Abort the requests of a plan that never ran, and close its books."""
        self._drain()
        for row in plan.rows:
            request_id = row.sequence.request.request_id
            if self.scheduler.abort(request_id):
                self._outbox.note(request_id)
        self.scheduler.commit(plan, [0] * len(plan.rows))
        self._bias.reset()  # rows that were to be uploaded were not

    def _note_ended(self) -> None:
        """Requests that the scheduler failed have an output to hand out."""
        for request in self.scheduler.take_failed():
            self._outbox.note(request.request_id)

    def _collect(self, done: _InFlight) -> None:
        begun = time.perf_counter()
        with span("wait"):
            tokens = np.asarray(done.result.tokens).tolist()
        finished = time.perf_counter()
        if self.speculator is not None:
            if self._last_finished is not None and done.batch.bucket.decode_only:
                took = finished - self._last_finished
                self.speculator.note_step(done.plan, done.stats.num_tokens, took)
            self._last_finished = finished
        with span("collect"):
            self._commit(done, tokens)
        done.stats.wait_seconds = finished - begun
        done.stats.collect_seconds = time.perf_counter() - finished
        done.stats.finished = finished

    def _commit(self, done: _InFlight, tokens: list[int]) -> None:
        """Give every sequence of a finished step its token."""
        reader = LogprobReader(done.result, self._tokenizer)
        rows = done.plan.rows
        for row, lane in zip(rows, done.first_lane, strict=True):
            if row.sequence.request.params.prompt_logprobs is not None and row.num_new:
                self._outbox.add_prompt_logprobs(row, done.batch.offsets[lane], reader)
        accepted = self._verify(done, tokens)
        drawn: dict[Sequence, list[int]] = {}
        firsts = [tokens[lane] for lane in done.first_lane]
        for sequence, token in self.scheduler.commit(done.plan, firsts, accepted):
            drawn.setdefault(sequence, []).append(token)
        now = self._clock()
        for i, (row, lane) in enumerate(zip(rows, done.first_lane, strict=True)):
            if row.sequence in drawn:
                num_used = self._add_tokens(row.sequence, drawn[row.sequence], lane, reader, now)
                if self.speculator is not None and row.draft:
                    self.speculator.count(row, 1 + len(accepted[i]), num_used)
        for row in rows:  # those that ended without a token: cache_only, errors
            if row.sequence.is_finished:
                self._outbox.note(row.sequence.request.request_id)
        self._note_ended()

    def _verify(self, done: _InFlight, tokens: list[int]) -> dict[int, list[int]]:
        """For each row with a draft, what it emits after its first token."""
        accepted: dict[int, list[int]] = {}
        if self.speculator is None:
            return accepted
        for i, (row, lane) in enumerate(zip(done.plan.rows, done.first_lane, strict=True)):
            if row.draft and not row.sequence.is_finished:
                drawn = tokens[lane : lane + 1 + len(row.draft)]
                accepted[i] = self.speculator.verify(row, drawn)[1:]
        return accepted

    def _add_tokens(
        self, sequence: Sequence, tokens: list[int], lane: int, reader: LogprobReader, now: float
    ) -> int:
        """Hand a sequence's new tokens, the first drawn by `lane`, to its output, which may end it
        with a stop string; how many were taken."""
        count, stop = self._outbox.add_tokens(sequence, tokens, lane, reader, now)
        if stop is not None and sequence.is_finished:  # by a token after it, or by the same
            sequence.finish_reason, sequence.stop_reason = "stop", stop
        elif stop is not None:
            self.scheduler.finish(sequence, "stop", stop)
        return count

    def _take_outputs(self) -> list[RequestOutput]:
        outputs, ended = self._outbox.take()
        for sequence in (s for request in ended for s in request.sequences):
            self._builder.forget(sequence)
            if self.speculator is not None:
                self.speculator.forget(sequence)
        return outputs

    # -- ending -----------------------------------------------------------------------------------

    def abort_all(self) -> None:
        """Abort every request and wait for the device, so that all pages are back."""
        for request_id in self._outbox.request_ids:
            self.abort(request_id)
        self.settle()

    def settle(self) -> list[RequestOutput]:
        """Collect what is in flight without dispatching more; what is new, as `step` returns it."""
        with self._fatal_faults():
            return self._collect_all()

    def _drain(self) -> None:
        while self._in_flight:
            self._collect(self._in_flight.popleft())

    def _collect_all(self) -> list[RequestOutput]:
        self._drain()
        return self._take_outputs()

    @property
    def is_alive(self) -> bool:
        """Whether it can be used: not closed, and met by no fault."""
        return self._dead is None

    def check_alive(self) -> None:
        """Raises EngineDeadError unless `is_alive`."""
        if self._dead is not None:
            raise EngineDeadError(f"this engine has ended ({self._dead}); make a new LLM") from (
                self._dead
            )

    def close(self) -> None:
        """Abort everything and give the device's memory back. Closing twice is fine."""
        if isinstance(self._dead, _Closed):
            return
        if self._dead is None:
            self.abort_all()
        for waiting in self._in_flight:
            jax.block_until_ready(waiting.result)
        self._in_flight.clear()
        self._outbox.clear()
        for runner in self.runners:
            runner.close()
        self._dead = _Closed("it was closed")


class _Closed(Exception):
    """Marks an engine that was closed on purpose."""
