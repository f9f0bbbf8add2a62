"""What a request has produced so far: text, tokens, log-probs. Turns it into RequestOutputs."""

from dataclasses import dataclass, field

import numpy as np

from jaxinfer.batch import StepResult
from jaxinfer.detokenizer import Detokenizer
from jaxinfer.request import CompletionOutput, Logprob, Request, RequestOutput, Row, Sequence
from jaxinfer.sampling_params import RequestOutputKind
from jaxinfer.tokenizer import Tokenizer


class LogprobReader:
    """Brings the log-prob arrays of one step to the host, each at most once and only if asked
    for."""

    def __init__(self, result: StepResult, tokenizer: Tokenizer | None):
        self._result = result
        self._tokenizer = tokenizer
        self._arrays: dict[str, np.ndarray] = {}

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = np.asarray(getattr(self._result, name))
        return self._arrays[name]

    def _entry(self, prefix: str, at: int, token: int, count: int) -> dict[int, Logprob]:
        """The chosen token first, then the `count` best (-1: all that were computed)."""
        ids = self._array(f"{prefix}top_ids")[at]
        values = self._array(f"{prefix}top_logprobs")[at]
        count = len(ids) if count < 0 else count
        chosen = Logprob(
            float(self._array(f"{prefix}logprobs")[at]),
            int(self._array(f"{prefix}ranks")[at]),
            self._text(token),
        )
        entry = {token: chosen}
        for rank, (other, value) in enumerate(zip(ids[:count], values[:count], strict=True), 1):
            if int(other) != token:
                entry[int(other)] = Logprob(float(value), rank, self._text(int(other)))
        return entry

    def _text(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token)

    def sampled(self, row_index: int, token: int, count: int) -> dict[int, Logprob]:
        return self._entry("", row_index, token, count)

    def prompt(self, row: Row, offset: int, count: int) -> list[tuple[int, dict[int, Logprob]]]:
        """[(prompt position, entry)] for the prompt tokens that follow this row's tokens."""
        ids = row.sequence.request.prompt_token_ids
        last = min(row.kv_len, len(ids) - 1)
        return [
            (p + 1, self._entry("prompt_", offset + p - row.start, ids[p + 1], count))
            for p in range(row.start, last)
        ]


@dataclass(slots=True)
class SampleState:
    """One sample's output so far. `num_sent` tokens, and the end, were already in a DELTA
    output."""

    sequence: Sequence
    detokenizer: Detokenizer | None
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None
    token_ids: list[int] = field(default_factory=list)
    num_sent: int = 0
    end_sent: bool = False

    @property
    def has_news(self) -> bool:
        is_new_end = self.sequence.is_finished and not self.end_sent
        return is_new_end or self.num_sent < len(self.token_ids)

    def push(self, token: int, *, is_stop_token: bool, keep_stop: bool) -> str | None:
        """Append a token; the stop string that it completed, if any.

        The text of a stop token is left out unless include_stop_str_in_output.
        """
        self.token_ids.append(token)
        if self.detokenizer is None or (is_stop_token and not keep_stop):
            return None
        self.detokenizer.push([token])
        return self.detokenizer.stopped_by

    def output(self, delta: bool) -> CompletionOutput:
        if self.sequence.is_finished and self.detokenizer is not None:
            self.detokenizer.flush()
        start = self.num_sent if delta else 0
        self.num_sent, self.end_sent = len(self.token_ids), self.sequence.is_finished
        sent = self.detokenizer.delta() if self.detokenizer and delta else ""
        text = sent if delta else (self.detokenizer.text if self.detokenizer else "")
        return CompletionOutput(
            index=self.sequence.index,
            text=text,
            token_ids=self.token_ids[start:],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[start:],
            finish_reason=self.sequence.finish_reason,
            stop_reason=self.sequence.stop_reason,
        )


class RequestState:
    """All samples of a request, and what of it was already handed out."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, kind: RequestOutputKind):
        self.request = request
        self.kind = kind
        params = request.params
        wants = params.logprobs is not None
        self.samples = [
            SampleState(
                sequence=sequence,
                detokenizer=_detokenizer(request, tokenizer),
                logprobs=[] if wants else None,
                cumulative_logprob=0.0 if wants else None,
            )
            for sequence in request.sequences
        ]
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None for _ in request.prompt_token_ids]
        self.sent_prompt = False

    def add_prompt_logprobs(self, row: Row, offset: int, reader: LogprobReader) -> None:
        count = self.request.params.prompt_logprobs
        if self.prompt_logprobs is None or count is None or row.sequence.index:
            return
        for position, entry in reader.prompt(row, offset, count):
            self.prompt_logprobs[position] = entry

    def add_tokens(
        self, sequence: Sequence, tokens: list[int], lane: int, reader: LogprobReader
    ) -> tuple[int, str | None]:
        """Record tokens drawn by `lane` and those after it, up to one that completes a stop string;
        how many, and that string. A stop token, if any, is the last."""
        for i, token in enumerate(tokens):
            ends = i + 1 == len(tokens) and sequence.finish_reason == "stop"
            stop = self._add_token(sequence, token, lane + i, reader, is_stop_token=ends)
            if stop is not None:
                return i + 1, stop
        return len(tokens), None

    def _add_token(
        self,
        sequence: Sequence,
        token: int,
        lane: int,
        reader: LogprobReader,
        *,
        is_stop_token: bool,
    ) -> str | None:
        """Record a token, drawn by `lane` of the step; the stop string it completed, if any."""
        sample = self.samples[sequence.index]
        params = self.request.params
        if sample.logprobs is not None and params.logprobs is not None:
            entry = reader.sampled(lane, token, params.logprobs)
            sample.logprobs.append(entry)
            sample.cumulative_logprob = (sample.cumulative_logprob or 0.0) + entry[token].logprob
        return sample.push(
            token,
            is_stop_token=is_stop_token,
            keep_stop=params.include_stop_str_in_output,
        )

    def output(self) -> RequestOutput | None:
        """What to hand out now, by the request's output kind; None where there is nothing new."""
        finished = self.request.is_finished
        if self.kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        delta = self.kind is RequestOutputKind.DELTA
        samples = [s for s in self.samples if not delta or s.has_news]
        prompt_logprobs = None if delta and self.sent_prompt else self.prompt_logprobs
        self.sent_prompt = True
        request = self.request
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[s.output(delta) for s in samples],
            finished=finished,
            prompt_logprobs=prompt_logprobs,
            metrics=request.metrics,
            num_cached_tokens=request.num_cached_tokens,
            num_cache_creation_tokens=request.num_cache_creation_tokens,
            error=request.error,
        )


def _detokenizer(request: Request, tokenizer: Tokenizer | None) -> Detokenizer | None:
    params = request.params
    if tokenizer is None or not params.detokenize:
        return None
    return Detokenizer(
        tokenizer,
        request.prompt_token_ids,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
        stop=list(params.stop or ()),
        include_stop_str_in_output=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
    )


def failed_output(request_id: str, prompt: object, error: Exception) -> RequestOutput:
    """The output of a request that was refused before it became one."""
    from_ids = isinstance(prompt, list) and all(type(t) is int for t in prompt)
    return RequestOutput(
        request_id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=list(prompt) if isinstance(prompt, list) and from_ids else [],
        outputs=[CompletionOutput(0, "", [], finish_reason="error")],
        finished=True,
        error=error,
    )
