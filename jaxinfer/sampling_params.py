"""SamplingParams: how to choose tokens, validated when it is made. Standard library only."""

import copy
import difflib
import enum
import math
from dataclasses import dataclass
from typing import Any

from jaxinfer.errors import InvalidRequestError

MAX_N = 16_384
"""vLLM's bound on samples per prompt. An engine's own bound (`LLM(max_n=...)`) is usually lower."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1_024
GREEDY_EPS = 1e-5
"""A temperature below this is greedy, as in vLLM: dividing by it would overflow float32."""
MIN_TEMPERATURE = 0.01
"""Temperatures in [GREEDY_EPS, MIN_TEMPERATURE) are raised to this, as in vLLM."""
MAX_TEMPERATURE = (2 - 2**-23) * 2.0**127
"""The largest float32: above it the device would see infinity."""

_NOT_YET = {
    "structured_outputs": "structured outputs are not available yet",
    "guided_decoding": "structured outputs are not available yet",
    "logits_processors": "custom logits processors are not available yet",
    "best_of": "best_of was removed from vLLM; use n",
    "use_beam_search": "beam search is not available yet",
    "extra_args": "extra_args has no meaning here",
    "thinking_token_budget": "thinking_token_budget is not available yet",
    "repetition_detection": "repetition_detection is not available yet",
    "logprob_token_ids": "logprob_token_ids is not available yet; logprobs=k is",
    "flat_logprobs": "flat_logprobs is not available yet; logprobs=k gives one dict per token",
}


class RequestOutputKind(enum.Enum):
    """What each streamed RequestOutput holds: all so far, what is new, or one output at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def reject_unknown(kind: str, given: Any, known: Any) -> None:
    """Raise InvalidRequestError naming the first key of `given` that is not in `known`."""
    known = list(known)
    for name in given:
        if name in known:
            continue
        if name in _NOT_YET:
            raise InvalidRequestError(f"{kind}: {name}: {_NOT_YET[name]}", param=name)
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise InvalidRequestError(f"{kind} has no field {name!r}; {hint}", param=str(name))


def _invalid(name: str, value: object, allowed: str) -> InvalidRequestError:
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        shown = f"an integer of {int(value).bit_length()} bits" if type(value) is int else "?"
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    return InvalidRequestError(f"{name} must be {allowed}; got {shown}", param=name, value=value)


def check_int(name: str, value: object, low: int, high: int | None, note: str = "") -> int:
    """`value` as an int in [low, high]; bool and float are refused even where they compare
    equal."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(name, value, f"an integer{note}")
    if value < low or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"in {low}..{high}"
        raise _invalid(name, value, f"an integer {bounds}{note}")
    return value


def check_float(
    name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False
) -> float:
    """`value` as a finite float in [low, high], or (low, high] where `open_low`."""
    bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _invalid(name, value, f"a number in {bounds}")
    try:
        number = float(value)
    except OverflowError:
        raise _invalid(name, value, f"a number in {bounds}") from None
    if not math.isfinite(number) or number < low or number > high or (open_low and number == low):
        raise _invalid(name, value, f"a finite number in {bounds}")
    return number


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _invalid(name, value, "True or False")
    return value


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens for a request: vLLM's fields, meanings and defaults.

    Every field is validated when the object is made, and applied: per row inside the jitted
    step, or (stop strings, text and output options) on the host.
    Ranges that depend on the model (vocabulary, context) are checked when the request is added.
    The order is: penalties, logit_bias, bans (allowed_token_ids, bad_words, min_tokens),
    temperature, top_k, top_p, min_p. Log-probs are of the raw logits, before any of these.

    Raises:
        InvalidRequestError: (a ValueError) a field is unknown, of the wrong type or out of range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None

    def __new__(cls, *args: object, **fields: object) -> "SamplingParams":
        if args:
            raise InvalidRequestError(
                f"SamplingParams takes keyword arguments only; got {args[0]!r} by position"
            )
        reject_unknown("SamplingParams", fields, cls.__dataclass_fields__)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_stops()
        self._check_token_lists()
        if self.n > 1 and self.is_greedy:
            raise InvalidRequestError(
                f"n must be 1 with temperature 0 (greedy samples are all equal); got n={self.n}",
                param="n",
                value=self.n,
            )

    def _check_numbers(self) -> None:
        check_int("n", self.n, 1, MAX_N)
        for name in ("presence_penalty", "frequency_penalty"):
            setattr(self, name, check_float(name, getattr(self, name), -2.0, 2.0))
        self.repetition_penalty = check_float(
            "repetition_penalty", self.repetition_penalty, 0.0, 2.0, open_low=True
        )
        self.temperature = check_float("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if GREEDY_EPS <= self.temperature < MIN_TEMPERATURE:
            self.temperature = MIN_TEMPERATURE
        self.top_p = check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        self.min_p = check_float("min_p", self.min_p, 0.0, 1.0)
        check_int("top_k", self.top_k, -1, None, " (0 or -1: off)")
        self.top_k = max(self.top_k, 0)
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1)
            self.seed = None if self.seed == -1 else self.seed
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1, None)
        check_int("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _invalid("min_tokens", self.min_tokens, f"<= max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), -1, None, " (-1: the whole vocabulary)")
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            check_bool(name, getattr(self, name))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise _invalid("output_kind", self.output_kind, "a RequestOutputKind")

    def _check_stops(self) -> None:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if stops is None:
            stops = []
        if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) for s in stops):
            raise _invalid("stop", self.stop, "a string or a list of strings")
        if len(stops) > MAX_STOP_STRINGS:
            raise _invalid("stop", stops, f"at most {MAX_STOP_STRINGS} strings")
        for text in stops:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise _invalid("stop", text, f"strings of 1..{MAX_STOP_CHARS} characters")
        if stops and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True", param="stop")
        self.stop = list(stops)

    def _check_token_lists(self) -> None:
        if self.stop_token_ids is None:
            self.stop_token_ids = []
        for name in ("stop_token_ids", "allowed_token_ids"):
            ids = getattr(self, name)
            if ids is None:
                continue
            if not isinstance(ids, (list, tuple)):
                raise _invalid(name, ids, "a list of token ids")
            setattr(self, name, [check_int(f"{name}[{i}]", t, 0, None) for i, t in enumerate(ids)])
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise _invalid("allowed_token_ids", [], "None or a list with at least one token id")
        if self.bad_words is not None:
            words = self.bad_words
            if not isinstance(words, (list, tuple)) or not all(
                isinstance(w, str) and w for w in words
            ):
                raise _invalid("bad_words", words, "a list of non-empty strings")
            self.bad_words = list(words)
        if self.logit_bias is not None:
            self.logit_bias = self._checked_bias(self.logit_bias)

    @staticmethod
    def _checked_bias(bias: object) -> dict[int, float]:
        if not isinstance(bias, dict):
            raise _invalid("logit_bias", bias, "a dict of token id to bias")
        if len(bias) > MAX_LOGIT_BIAS:
            raise _invalid("logit_bias", f"{len(bias)} entries", f"at most {MAX_LOGIT_BIAS} ids")
        checked = {}
        for token, value in bias.items():
            check_int("logit_bias key", token, 0, None)
            checked[token] = check_float(f"logit_bias[{token}]", value, -100.0, 100.0)
        return checked

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPS

    def clone(self) -> "SamplingParams":
        """An independent copy."""
        return copy.deepcopy(self)
