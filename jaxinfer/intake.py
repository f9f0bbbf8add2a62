"""Intake: a user's prompt and SamplingParams become a Request, or an error that names what is
wrong.

Everything that reaches the device is checked here, because JAX clamps a bad index instead of
raising.
"""

import dataclasses
import hashlib
import numbers
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxinfer.errors import InvalidRequestError
from jaxinfer.request import Request, RequestMetrics
from jaxinfer.sampling_params import SamplingParams, check_int, reject_unknown
from jaxinfer.tokenizer import Tokenizer

MAX_SALT_CHARS = 1_024
_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_UNSUPPORTED_KEYS = ("multi_modal_data", "mm_processor_kwargs", "prompt_embeds", "token_type_ids")


def split_prompts(prompts: Any) -> tuple[list[Any], bool]:
    """(list of prompts, whether just one was given): a str, a dict and a list of ints are one
    prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts], True
    if not isinstance(prompts, (list, tuple)):
        raise InvalidRequestError(
            f"prompts must be a string, token ids, a prompt dictionary or a list of these; got "
            f"{type(prompts).__name__}",
            param="prompts",
        )
    if not prompts:
        raise InvalidRequestError("prompts is an empty list; give at least one", param="prompts")
    if isinstance(prompts[0], numbers.Number):
        return [list(prompts)], True
    return list(prompts), False


def per_prompt(value: Any, count: int, name: str) -> list[Any]:
    """`value` for each prompt: one for all, or a list with one for each."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(
            f"{name} has {len(value)} entries for {count} prompts; give one for all or one each",
            param=name,
        )
    return list(value)


class Intake:
    """Makes Requests for one engine. `tokenizer` is None where it was skipped: token ids only."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        max_n: int,
        max_logprobs: int,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_model_len = max_model_len
        self.max_n = max_n
        self.max_logprobs = vocab_size if max_logprobs < 0 else max_logprobs
        self.seed = seed
        self.clock = clock
        self._arrivals = 0

    def request(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        request_id: str,
        priority: int = 0,
        add_special_tokens: bool = True,
        cache_only: bool = False,
    ) -> Request:
        """A checked Request.

        Raises:
            InvalidRequestError: the prompt or a parameter cannot be served; names value and remedy.
        """
        if params is None:
            params = SamplingParams()
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(
                f"sampling_params must be SamplingParams; got {type(params).__name__}",
                param="sampling_params",
            )
        # A copy, checked anew: the caller's object may have changed since it was made, and may yet.
        params = dataclasses.replace(params)
        check_int("priority", priority, -(2**31), 2**31 - 1)
        text, ids, salt = self._read(prompt, add_special_tokens)
        max_tokens = 0 if cache_only else self._max_tokens(len(ids), params)
        self._check_length(len(ids), cache_only)
        self._check_params(params)
        stop_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids |= self.eos_token_ids
        bad_token_ids = self._bad_token_ids(params)
        self._arrivals += 1
        return Request(
            request_id=request_id,
            prompt_token_ids=ids,
            params=params,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            bad_token_ids=bad_token_ids,
            bias_key=_bias_key(params, bad_token_ids),
            prompt=text,
            cache_salt=salt,
            priority=priority,
            arrival=self._arrivals,
            seed=self._seed(params),
            cache_only=cache_only,
            metrics=RequestMetrics(self.clock()),
        )

    def _read(self, prompt: Any, add_special_tokens: bool) -> tuple[str | None, list[int], str]:
        """(text, token ids, cache salt) of any of the accepted forms."""
        salt = ""
        text: Any = None
        ids: Any = None
        if isinstance(prompt, Mapping):
            for key in _UNSUPPORTED_KEYS:
                if key in prompt:
                    raise InvalidRequestError(
                        f"prompt[{key!r}] is not supported: text and token ids only", param=key
                    )
            reject_unknown("a prompt dictionary", prompt, _PROMPT_KEYS)
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            salt = self._salt(prompt.get("cache_salt"))
            if text is None and ids is None:
                raise InvalidRequestError(
                    "a prompt dictionary needs 'prompt' or 'prompt_token_ids'", param="prompt"
                )
        elif isinstance(prompt, str):
            text = prompt
        else:
            ids = prompt
        if text is not None and not isinstance(text, str):
            raise InvalidRequestError(
                f"prompt must be a string; got {type(text).__name__}", param="prompt"
            )
        if ids is not None:
            return text, self._check_ids(ids), salt
        if text is None:
            raise InvalidRequestError("the prompt is None; give text or token ids", param="prompt")
        return text, self._encode(text, add_special_tokens), salt

    @staticmethod
    def _salt(salt: Any) -> str:
        if salt is None:
            return ""
        if not isinstance(salt, str) or not 1 <= len(salt) <= MAX_SALT_CHARS:
            raise InvalidRequestError(
                f"cache_salt must be a string of 1..{MAX_SALT_CHARS} characters; got {salt!r:.100}",
                param="cache_salt",
            )
        return salt

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequestError(
                "a text prompt needs a tokenizer, and this engine has skip_tokenizer_init=True; "
                "give token ids",
                param="prompt",
            )
        if not text:
            raise InvalidRequestError(
                "the prompt is empty; give at least one token", param="prompt"
            )
        limit = self.tokenizer.max_chars_for(self.max_model_len)
        if len(text) > limit:
            raise InvalidRequestError(
                f"the prompt has {len(text)} characters, which cannot fit max_model_len="
                f"{self.max_model_len} tokens; shorten it",
                param="prompt",
            )
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not ids:
            raise InvalidRequestError("the prompt has no tokens; give at least one", param="prompt")
        return self._check_ids(ids)

    def _check_ids(self, ids: Any) -> list[int]:
        if not isinstance(ids, (list, tuple)):
            raise InvalidRequestError(
                f"a prompt must be a string, a list of token ids or a prompt dictionary; got "
                f"{type(ids).__name__}",
                param="prompt_token_ids",
            )
        if not ids:
            raise InvalidRequestError(
                "the prompt is empty; give at least one token", param="prompt_token_ids"
            )
        top = self.vocab_size - 1
        for i, token in enumerate(ids):
            # Spelled out, not check_int(): this loop runs for every prompt token.
            if type(token) is not int or not 0 <= token <= top:
                raise InvalidRequestError(
                    f"prompt_token_ids[{i}] must be an integer in 0..{top} (the vocabulary); got "
                    f"{token!r:.100}",
                    param=f"prompt_token_ids[{i}]",
                    value=token,
                )
        return list(ids)

    def _check_length(self, prompt_len: int, cache_only: bool) -> None:
        room = self.max_model_len if cache_only else self.max_model_len - 1
        if prompt_len > room:
            raise InvalidRequestError(
                f"the prompt has {prompt_len} tokens and at least one must be generated, but "
                f"max_model_len is {self.max_model_len}; shorten the prompt or raise max_model_len",
                param="prompt",
                value=prompt_len,
            )

    def _max_tokens(self, prompt_len: int, params: SamplingParams) -> int:
        room = self.max_model_len - prompt_len
        if params.max_tokens is None or room < 1:
            return room
        if params.max_tokens > room:
            raise InvalidRequestError(
                f"prompt ({prompt_len} tokens) + max_tokens ({params.max_tokens}) exceed "
                f"max_model_len ({self.max_model_len}); use max_tokens <= "
                f"{room}, or None to fill the context",
                param="max_tokens",
                value=params.max_tokens,
            )
        return params.max_tokens

    def _check_params(self, params: SamplingParams) -> None:
        """What SamplingParams could not know: the vocabulary and this engine's limits."""
        if params.n > self.max_n:
            raise InvalidRequestError(
                f"n must be in 1..{self.max_n}; got {params.n}; raise LLM(max_n=...) for more",
                param="n",
                value=params.n,
            )
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError(
                "stop strings need a tokenizer, and this engine has none "
                "(skip_tokenizer_init=True); use stop_token_ids",
                param="stop",
            )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            wanted = self.vocab_size if count == -1 else count
            if wanted is not None and wanted > self.max_logprobs:
                raise InvalidRequestError(
                    f"{name} must be in 0..{self.max_logprobs}; got {count}; raise "
                    f"LLM(max_logprobs=...) for more (-1: the whole vocabulary)",
                    param=name,
                    value=count,
                )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(params, name) or ():
                if token >= self.vocab_size:
                    raise InvalidRequestError(
                        f"{name}: token id {token} is outside the vocabulary "
                        f"(0..{self.vocab_size - 1})",
                        param=name,
                        value=token,
                    )

    def _bad_token_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each bad word at the start of a text and after a space, as token ids."""
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise InvalidRequestError(
                "bad_words need a tokenizer, and this engine has none "
                "(skip_tokenizer_init=True); use logit_bias or allowed_token_ids",
                param="bad_words",
            )
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            bare = word.lstrip()
            for text in (bare, " " + bare) if bare else (word,):
                ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
                if ids:
                    found[ids] = None
        return tuple(found)

    def _seed(self, params: SamplingParams) -> int:
        """The request's own seed, or one that only the engine's seed and its arrival decide."""
        if params.seed is not None:
            return params.seed
        mixed = hashlib.blake2b(f"{self.seed}:{self._arrivals}".encode(), digest_size=8)
        return int.from_bytes(mixed.digest(), "little")


def _bias_key(params: SamplingParams, bad_token_ids: tuple[tuple[int, ...], ...]) -> bytes:
    """A digest of the parts of the bias row that do not change while the request runs."""
    single = sorted(ids[0] for ids in bad_token_ids if len(ids) == 1)
    if not params.logit_bias and params.allowed_token_ids is None and not single:
        return b""
    content = repr((sorted((params.logit_bias or {}).items()), params.allowed_token_ids, single))
    return hashlib.sha256(content.encode()).digest()
