"""LLM: the class that users call. Argument and output names are vLLM's.

It holds the contracts; how a call drives the engine is in calls.py.
"""

import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from jaxinfer import setup
from jaxinfer.calls import Calls
from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError, InvalidRequestError
from jaxinfer.intake import split_prompts
from jaxinfer.mailbox import Mailbox
from jaxinfer.profiling import timeline
from jaxinfer.request import RequestOutput
from jaxinfer.runner import COMPILES
from jaxinfer.sampling_params import SamplingParams, check_bool, check_float
from jaxinfer.tokenizer import Tokenizer


class LLM:
    """A language model, its pages and its scheduler.

        with LLM() as llm:
            print(llm.generate("The capital of France is")[0].outputs[0].text)

    Args:
        model: a safetensors directory, a GGUF file, a Hugging Face hub id, or None for the embedded
            SmolLM2-135M-Instruct.
        tokenizer: directory or hub id; None for the model's own.
        first_prompts: what will be asked first, as `generate` takes it: the programs for it are
            compiled, or loaded from the compile cache, while the weights load. Nothing is
            generated.
        **options: the fields of EngineConfig, with vLLM's names: dtype, max_model_len,
            max_num_seqs, max_num_batched_tokens, page_size, num_pages, kv_cache_memory_bytes,
            gpu_memory_utilization, enable_prefix_caching, scheduling_policy, seed, strict, ...

    Raises:
        ConfigError, ModelFormatError, TokenizerError, CapacityError: ValueErrors that say what
            to do.

    `llm.config` is the effective configuration, `llm.memory_plan` where the memory goes. Not
    thread-safe.
    """

    def __init__(
        self,
        model: str | None = None,
        tokenizer: str | None = None,
        *,
        first_prompts: Any = (),
        **options: Any,
    ):
        config = EngineConfig(
            model=None if model is None else str(model),
            tokenizer=None if tokenizer is None else str(tokenizer),
            **options,
        )
        parts = setup.assemble(config, split_prompts(first_prompts)[0] if first_prompts else ())
        self.config = parts.config
        self.model = parts.model
        self.memory_plan = parts.plan
        self.engine = parts.engine
        self._tokenizer = parts.tokenizer
        self._verbose = setup.is_verbose(config)
        self._mail = Mailbox(parts.engine)
        self._calls = Calls(parts.engine, self._mail, parts.config.max_num_waiting)
        self._queued: set[str] = set()

    # -- generating -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        priority: int | list[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs in the prompts' order.

        Args:
            prompts: a string, a list of token ids, a dictionary ({"prompt": str} or
                {"prompt_token_ids": [int]}, either with "cache_salt"), or a list of these.
            sampling_params: one for all, or one per prompt; None: SamplingParams().
            use_tqdm: show a progress bar; None: if standard error is a terminal.
            priority: lower is served first under scheduling_policy="priority".

        Raises:
            InvalidRequestError: the one prompt cannot be served. In a list, a bad prompt fails
                alone: its RequestOutput has `error` set and finish_reason "error".
        """
        return self._calls.generate(
            prompts, sampling_params, priority, special=True, show=self._shows(use_tqdm)
        )

    def chat(
        self,
        messages: list,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict] | None = None,
        chat_template_kwargs: dict | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation ([{"role": ..., "content": ...}, ...]) or a list of them.

        The model's chat template makes the prompt; the pages of earlier turns are reused.

        Raises:
            InvalidRequestError: as `generate`; or the messages are malformed, or there is no
                template.
        """
        if not isinstance(messages, (list, tuple)) or not messages:
            raise InvalidRequestError(
                "messages must be a non-empty list of {'role', 'content'} dictionaries, or of "
                "lists of them",
                param="messages",
            )
        single = not isinstance(messages[0], (list, tuple))
        prompts: list[Any] = []
        for conversation in [messages] if single else messages:
            try:
                prompts.append(
                    self.chat_prompt(
                        conversation,
                        chat_template=chat_template,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=continue_final_message,
                        tools=tools,
                        chat_template_kwargs=chat_template_kwargs,
                        cache_salt=cache_salt,
                    )
                )
            except InvalidRequestError as error:
                if single:
                    raise
                prompts.append(error)
        chosen = prompts[0] if single else prompts
        return self._calls.generate(
            chosen, sampling_params, None, special=False, show=self._shows(use_tqdm)
        )

    def chat_prompt(
        self, messages: list, *, cache_salt: str | None = None, **template_options: Any
    ) -> dict:
        """The prompt dictionary that `chat` generates from: text and token ids of a
        conversation."""
        tokenizer = self.get_tokenizer()
        text = tokenizer.apply_chat_template(messages, **template_options)
        ids = tokenizer.encode(text, add_special_tokens=False)
        prompt = {"prompt": text, "prompt_token_ids": ids}
        return prompt if cache_salt is None else {**prompt, "cache_salt": cache_salt}

    def stream(
        self,
        prompts: Any,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        priority: int | list[int] | None = None,
    ) -> Iterator[RequestOutput]:
        """Yield what is new (text, token ids) of each prompt as it is made.

        `request_id` tells the prompts of a list apart: the position in the list as a string,
        prefixed with "stream-<n>-". Closing the iterator aborts what is not finished. As in
        `generate`, a bad prompt in a list fails alone, with `error` set; a single one raises.
        """
        return self._calls.stream(prompts, sampling_params, priority)

    # -- lower level ------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
    ) -> None:
        """Queue a request for `step`."""
        self.engine.add(prompt, sampling_params, request_id=request_id, priority=priority)
        self._queued.add(request_id)

    def step(self) -> list[RequestOutput]:
        """One engine step; what is new of the requests of `add_request`, by their output_kind."""
        outputs = self._mail.step(self._queued, always=True)
        self._queued -= {o.request_id for o in outputs if o.finished}
        return outputs

    def has_unfinished_requests(self) -> bool:
        """Whether `step` still has something to say about the requests of `add_request`."""
        return bool(self._queued)

    def abort(self, request_id: str | list[str]) -> None:
        """End requests at any stage; ids that are not running or waiting are ignored."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            self.engine.abort(one)

    # -- prompt caching ---------------------------------------------------------------------------

    def cache_prompt(
        self, prompt: Any, *, ttl: float | None = None, pin: bool = False
    ) -> RequestOutput:
        """Compute a prompt's pages now, so that later prompts which begin with it start from there.

        Args:
            prompt: as in `generate`; its whole pages are kept, the tokens of the last, partly
                filled page are not.
            ttl: seconds after their last use at which the pages expire; None: never.
            pin: keep the pages whatever else wants memory, until `unpin_prompt`, their ttl, or
                `reset_prefix_cache`. Without it they go, least recently used first, as all others.

        Returns:
            RequestOutput with num_cached_tokens (already there) and num_cache_creation_tokens
            (new).

        Raises:
            InvalidRequestError: prefix caching is off, or the prompt or ttl is not valid.
        """
        if not self.config.enable_prefix_caching:
            raise InvalidRequestError(
                "cache_prompt needs enable_prefix_caching=True", param="enable_prefix_caching"
            )
        if ttl is not None:
            ttl = check_float("ttl", ttl, 0.0, open_low=True)
        check_bool("pin", pin)
        request, output = self._calls.compute(prompt)
        self.engine.scheduler.pin(request.prompt_token_ids, request.cache_salt, ttl=ttl, pin=pin)
        return output

    def unpin_prompt(self, prompt: Any) -> None:
        """Let the pages of a pinned prompt be evicted again; a prompt that is not cached is
        ignored."""
        self.engine.check_alive()
        request = self.engine.intake.request(
            prompt, SamplingParams(max_tokens=1), request_id=self._calls.new_id(), cache_only=True
        )
        self.engine.scheduler.unpin(request.prompt_token_ids, request.cache_salt)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix, pinned ones too. Requests that run keep the pages they
        use."""
        self.engine.check_alive()
        self.engine.scheduler.reset_prefix_cache()
        return True

    # -- the rest ---------------------------------------------------------------------------------

    def warmup(self, *, use_tqdm: bool | None = None) -> float:
        """Compile every program the engine can need; seconds it took. `strict` counts from here."""
        self.engine.check_alive()
        show = self._shows(use_tqdm)
        runners = self.engine.runners
        count = sum(runner.num_programs for runner in runners)
        hits = COMPILES.cache_hits
        with tqdm(total=count, desc="compiling", unit="prog", disable=not show) as bar:

            def note(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update()

            seconds = sum(runner.warmup(note) for runner in runners)
        if show:
            print(
                f"{count} programs ready in {seconds:.1f} s, "
                f"{COMPILES.cache_hits - hits} from the compile cache",
                file=sys.stderr,
            )
        return seconds

    def _shows(self, use_tqdm: bool | None) -> bool:
        return self._verbose if use_tqdm is None else use_tqdm

    @property
    def params(self) -> dict:
        """The model's weights, for `jaxinfer.generate` and the like; they live while the engine
        does."""
        return self.engine.runner.params

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ConfigError where skip_tokenizer_init left it out."""
        if self._tokenizer is None:
            raise ConfigError(
                "this engine has no tokenizer; make the LLM without skip_tokenizer_init=True"
            )
        return self._tokenizer

    def get_metrics(self) -> dict[str, float | int]:
        """Counters since the start; times in seconds, percentiles over the last few thousand; what
        the pages take and hold."""
        speculator = self.engine.speculator
        return {
            **self.engine.metrics.summary(),
            **self.engine.scheduler.metrics(),
            **(speculator.metrics() if speculator else {}),
            "kv_cache_bytes": self.memory_plan.pages,
            "kv_cache_tokens": self.memory_plan.num_tokens,
            "num_compiles": COMPILES.compiles,
            "num_compile_cache_hits": COMPILES.cache_hits,
            "num_compiles_after_warmup": sum(
                runner.compiles_after_warmup for runner in self.engine.runners
            ),
        }

    def write_timeline(self, path: Any) -> None:
        """Write what the last few thousand steps did: `path` ends in .json (a Chrome trace, for
        Perfetto) or .png. Raises ConfigError where it cannot be written."""
        timeline.write(path, self.engine.metrics.steps)

    def close(self) -> None:
        """End every request and give the memory back. The object cannot be used afterwards."""
        self.engine.close()
        self._mail.clear()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
