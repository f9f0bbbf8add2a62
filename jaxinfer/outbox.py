"""Outbox: the requests that an engine has, what each has produced, and which have news to hand out.

The engine fills it as steps come back; whose outputs are whose caller's is the mailbox's matter.
"""

from collections.abc import Callable

from jaxinfer.errors import InvalidRequestError
from jaxinfer.metrics import Metrics
from jaxinfer.outputs import LogprobReader, RequestState
from jaxinfer.request import Request, RequestOutput, Row, Sequence
from jaxinfer.sampling_params import RequestOutputKind
from jaxinfer.tokenizer import Tokenizer


class Outbox:
    """Requests by id, from the one that is opened to the output that says it has ended."""

    def __init__(self, tokenizer: Tokenizer | None, metrics: Metrics, clock: Callable[[], float]):
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._clock = clock
        self._states: dict[str, RequestState] = {}
        self._changed: dict[str, None] = {}
        """Ids with something new, in the order in which it came."""
        self._next_id = 0

    def free_id(self, wanted: str | None) -> str:
        """The id of a new request: the one wanted, or the next number. Raises InvalidRequestError
        where it is no id or another's."""
        if wanted is None:
            wanted = str(self._next_id)
            self._next_id += 1
        if not isinstance(wanted, str) or not wanted:
            raise InvalidRequestError(
                f"request_id must be a non-empty string; got {wanted!r:.100}", param="request_id"
            )
        if wanted in self._states:
            raise InvalidRequestError(
                f"request_id {wanted!r:.100} is in use; ids must be unique", param="request_id"
            )
        return wanted

    @property
    def request_ids(self) -> list[str]:
        return list(self._states)

    @property
    def has_requests(self) -> bool:
        return bool(self._states)

    @property
    def has_news(self) -> bool:
        return bool(self._changed)

    def open(self, request: Request, kind: RequestOutputKind) -> None:
        """Take a request in; its id must be new."""
        self._states[request.request_id] = RequestState(request, self._tokenizer, kind)
        self._metrics.prompt_tokens += len(request.prompt_token_ids)

    def note(self, request_id: str) -> None:
        """Something of a request is new, its end perhaps; one that is not held is passed over."""
        if request_id in self._states:
            self._changed[request_id] = None

    def add_prompt_logprobs(self, row: Row, offset: int, reader: LogprobReader) -> None:
        """Record those of a row's tokens, the first of which is token `offset` of the step."""
        state = self._states.get(row.sequence.request.request_id)
        if state is not None:
            state.add_prompt_logprobs(row, offset, reader)

    def add_tokens(
        self, sequence: Sequence, tokens: list[int], lane: int, reader: LogprobReader, now: float
    ) -> tuple[int, str | None]:
        """Record a sequence's new tokens, the first drawn by `lane`, up to one that completes a
        stop string: how many were taken, and that string."""
        request = sequence.request
        state = self._states.get(request.request_id)
        if state is None:
            return 0, None
        self.note(request.request_id)
        count, stop = state.add_tokens(sequence, tokens, lane, reader)
        self._metrics.note_tokens(request, count, now)
        return count, stop

    def take(self) -> tuple[list[RequestOutput], list[Request]]:
        """What is new, by each request's output kind, and the requests that have ended and are
        held no longer."""
        changed, self._changed = self._changed, {}
        outputs: list[RequestOutput] = []
        ended: list[Request] = []
        for request_id in changed:
            state = self._states.get(request_id)
            if state is None:
                continue
            if state.request.is_finished:
                self._close(state.request)
                ended.append(state.request)
            output = state.output()
            if output is not None:
                outputs.append(output)
        return outputs, ended

    def _close(self, request: Request) -> None:
        request.metrics.finished_time = self._clock()
        del self._states[request.request_id]
        self._metrics.forget(request)
        for sequence in request.sequences:
            self._metrics.finished(sequence.finish_reason or "error")

    def clear(self) -> None:
        """Forget every request, with no output."""
        self._states.clear()
        self._changed.clear()
