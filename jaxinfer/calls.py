"""Calls: how one call of `LLM` drives the engine, from its prompts to its outputs.

Prompts go in as there is room, the engine is stepped until they have ended, and a call that is left
early takes its requests with it. Several may go on at once: the mailbox keeps their outputs apart.
"""

import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from jaxinfer.engine import Engine
from jaxinfer.errors import InvalidRequestError, JaxInferError
from jaxinfer.intake import per_prompt, split_prompts
from jaxinfer.interrupts import deferred_interrupt
from jaxinfer.mailbox import Mailbox
from jaxinfer.outputs import failed_output
from jaxinfer.request import Request, RequestOutput
from jaxinfer.sampling_params import RequestOutputKind, SamplingParams


class Calls:
    """Runs calls on one engine. `LLM` has the contracts of each, and their errors."""

    def __init__(self, engine: Engine, mail: Mailbox, max_num_waiting: int):
        self._engine = engine
        self._mail = mail
        self._max_num_waiting = max_num_waiting
        self._num_ids = 0

    def new_id(self) -> str:
        """An id for a request that its caller gave none."""
        self._num_ids += 1
        return f"generate-{self._num_ids}"

    # -- whole outputs ----------------------------------------------------------------------------

    def generate(
        self, prompts: Any, sampling_params: Any, priority: Any, *, special: bool, show: bool
    ) -> list[RequestOutput]:
        """`LLM.generate`; `special`: with BOS and the like, `show`: with a progress bar."""
        prompts, single = split_prompts(prompts)
        params = per_prompt(sampling_params, len(prompts), "sampling_params")
        priorities = per_prompt(0 if priority is None else priority, len(prompts), "priority")
        if not isinstance(sampling_params, (SamplingParams, list, tuple, type(None))):
            raise InvalidRequestError(
                f"sampling_params must be SamplingParams or a list of them; got "
                f"{type(sampling_params).__name__}",
                param="sampling_params",
            )
        results: list[RequestOutput | None] = [None] * len(prompts)
        live: dict[str, int] = {}
        bar = tqdm(total=len(prompts), desc="generating", unit="req", disable=not show)
        next_prompt = 0
        num_generated, begun = 0, time.perf_counter()
        try:
            while next_prompt < len(prompts) or live:
                while next_prompt < len(prompts) and self._has_room(params[next_prompt]):
                    i = next_prompt
                    next_prompt += 1
                    with deferred_interrupt():
                        added = self._try_add(prompts[i], params[i], priorities[i], special, single)
                        if isinstance(added, Request):
                            live[added.request_id] = i
                    if isinstance(added, RequestOutput):
                        results[i] = added
                        bar.update()
                if not live:
                    continue
                for output in self._mail.step(live):
                    results[live.pop(output.request_id)] = output
                    num_generated += sum(len(o.token_ids) for o in output.outputs)
                    rate = num_generated / (time.perf_counter() - begun)
                    bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
                    bar.update()
        finally:
            bar.close()
            self._mail.drop(set(live))
        outputs = [r for r in results if r is not None]
        if single and outputs[0].error is not None:
            raise outputs[0].error
        return outputs

    def _has_room(self, params: Any) -> bool:
        wanted = params.n if isinstance(params, SamplingParams) else 1
        waiting = self._engine.scheduler.num_waiting
        return not waiting or waiting + wanted <= self._max_num_waiting

    def _try_add(
        self, prompt: Any, params: Any, priority: Any, special: bool, single: bool
    ) -> Request | RequestOutput:
        """The queued request, or the output that says why this one prompt is refused."""
        try:
            if isinstance(prompt, JaxInferError):
                raise prompt
            return self._engine.add(
                prompt,
                params,
                request_id=self.new_id(),
                priority=priority,
                kind=RequestOutputKind.FINAL_ONLY,
                add_special_tokens=special,
            )
        except ValueError as error:
            if single:
                raise
            return failed_output(self.new_id(), prompt, error)

    def compute(self, prompt: Any) -> tuple[Request, RequestOutput]:
        """Compute the pages of a prompt and generate nothing; raises what it fails with."""
        request = self._engine.add(
            prompt,
            SamplingParams(max_tokens=1),
            request_id=self.new_id(),
            kind=RequestOutputKind.FINAL_ONLY,
            cache_only=True,
        )
        live = {request.request_id}
        output = None
        try:
            while live:
                for output in self._mail.step(live):
                    live.discard(output.request_id)
        finally:
            self._mail.drop(live)
        if request.error is not None:
            raise request.error
        if output is None:
            raise AssertionError("a finished request has an output")
        return request, output

    # -- outputs as they are made -----------------------------------------------------------------

    def stream(self, prompts: Any, sampling_params: Any, priority: Any) -> Iterator[RequestOutput]:
        """`LLM.stream`; what is wrong with the arguments is raised here, not by the iterator."""
        prompts, _ = split_prompts(prompts)
        params = per_prompt(sampling_params, len(prompts), "sampling_params")
        priorities = per_prompt(priority or 0, len(prompts), "priority")
        self._num_ids += 1
        return self._stream(prompts, params, priorities, f"stream-{self._num_ids}-")

    def _stream(
        self, prompts: list, params: list, priorities: list, prefix: str
    ) -> Iterator[RequestOutput]:
        live: set[str] = set()
        try:
            for i, prompt in enumerate(prompts):
                request_id = f"{prefix}{i}"
                live.add(request_id)
                try:
                    self._engine.add(
                        prompt,
                        params[i],
                        request_id=request_id,
                        priority=priorities[i],
                        kind=RequestOutputKind.DELTA,
                    )
                except ValueError as error:
                    if len(prompts) == 1:
                        raise
                    live.discard(request_id)
                    yield failed_output(request_id, prompt, error)
            while live:
                for output in self._mail.step(live):
                    if output.finished:
                        live.discard(output.request_id)
                    yield output
        finally:
            self._mail.drop(live)
