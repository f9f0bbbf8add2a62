"""The `jaxinfer` command: generate and chat, with every engine and sampling option as a flag.

Exit status: 0 done, 1 some prompts failed, 2 bad arguments or files, 3 the engine failed,
130 interrupted.
"""

import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxinfer.config import EngineConfig
from jaxinfer.errors import (
    CapacityError,
    EngineDeadError,
    InvalidRequestError,
    JaxInferError,
    NumericalError,
)
from jaxinfer.llm import LLM
from jaxinfer.request import RequestOutput
from jaxinfer.sampling_params import SamplingParams, reject_unknown

MAX_LINE_BYTES = 2_000_000
"""Longest line of a prompt file."""
_CHAT_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; vLLM's names. Unlike the Python API, the default is greedy."""

    max_tokens: int | None = 128
    """Most tokens to generate; None: fill the context."""
    temperature: float = 0.0
    """0 is greedy; 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Keep the most likely tokens that hold this probability; 1: off."""
    top_k: int = 0
    """Keep this many most likely tokens; 0: off."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one; 0: off."""
    n: int = 1
    """Samples per prompt; needs a temperature."""
    presence_penalty: float = 0.0
    """Subtracted from tokens that were generated already, -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time a token was generated, -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens seen in prompt or output, 0 to 2; 1: off."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that ends the output; may be given several times."""
    stop_token_ids: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Token id that ends the output; may be given several times."""
    min_tokens: int = 0
    """Fewest tokens before the output may end."""
    ignore_eos: bool = False
    """Go on past the end-of-sequence token."""
    logprobs: int | None = None
    """Log-probs of this many tokens at each position (JSON output)."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    bad_words: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text that must not be generated; may be given several times."""

    def params(self) -> SamplingParams:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("stop", "stop_token_ids", "bad_words"):
            values[name] = list(values[name]) or None
        return SamplingParams(**values)


@dataclass(frozen=True, slots=True)
class Generate:
    """Complete prompts.

    Prompts come from the arguments, from a file (--input), or from standard input, one a line. One
    prompt is streamed; several are run as one batch.

        jaxinfer generate "The capital of France is"
        jaxinfer generate --input prompts.txt --output-format jsonl > answers.jsonl
    """

    prompts: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT ...]")
    ] = ()
    """Prompts; none: --input, or standard input."""
    input: Path | None = None
    """File with one prompt a line; with the ending .jsonl one JSON string or {"prompt": ...} a
    line; "-": standard input."""
    output_format: Literal["text", "jsonl"] = "text"
    """Plain text, or one JSON object per prompt, in the prompts' order."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)


@dataclass(frozen=True, slots=True)
class Chat:
    """Talk with the model; the pages of the conversation stay cached between turns."""

    system: str | None = None
    """System message."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(
        default_factory=lambda: Sampling(max_tokens=512)
    )
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
)


_REGISTRY = tyro.constructors.ConstructorRegistry()
"""How flags are read whose types tyro would turn into something else than a flag."""


@_REGISTRY.primitive_rule
def _json_object(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[dict] | None:
    """A dictionary (hf_overrides) is one JSON object."""
    if info.type != dict[str, Any] | None:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda args: json.loads(args[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What an old terminal or a broken prompt cannot show is escaped, instead of a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command = tyro.cli(
            Command,  # pyright: ignore[reportArgumentType]
            prog="jaxinfer",
            description="LLM inference on JAX: TPU, GPU and CPU. See `jaxinfer COMMAND --help`.",
            args=argv,
            registry=_REGISTRY,
        )
    except JaxInferError as error:  # an option's value that its dataclass refuses
        return _complain(error, 2)
    try:
        return _generate(command) if isinstance(command, Generate) else _chat(command)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except NumericalError as error:
        return _complain(error, 1)
    except EngineDeadError as error:
        return _complain(error, 3)
    except BrokenPipeError:
        # The reader (head, less) left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (JaxInferError, OSError) as error:
        return _complain(error, 2)


def _complain(error: Exception, status: int) -> int:
    print(f"jaxinfer: error: {error}", file=sys.stderr)
    return status


def _open(config: EngineConfig) -> LLM:
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return LLM(**options)


# -- generate
# ---------------------------------------------------------------------------------------


def _generate(command: Generate) -> int:
    prompts = _read_prompts(command)
    params = command.sampling.params()
    wants_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
    if wants_logprobs and command.output_format != "jsonl":
        raise InvalidRequestError("log-probs need --output-format jsonl")
    with _open(command.engine) as llm:
        if len(prompts) == 1 and command.output_format == "text" and params.n == 1:
            for text in _stream_text(llm, prompts[0], params):
                print(text, end="", flush=True)
            print()
            return 0
        outputs = llm.generate(prompts, params)
    failed = 0
    for index, output in enumerate(outputs):
        failed += output.error is not None
        if command.output_format == "jsonl":
            print(json.dumps(_as_json(index, output), ensure_ascii=False))
        else:
            _print_text(index, output)
    return 1 if failed else 0


def _read_prompts(command: Generate) -> list[str]:
    if command.prompts and command.input is not None:
        raise InvalidRequestError("give prompts as arguments or with --input, not both")
    if command.prompts:
        return list(command.prompts)
    source = command.input or Path("-")
    if str(source) == "-":
        if command.input is None and sys.stdin.isatty():
            raise InvalidRequestError(
                "no prompt: jaxinfer generate 'text', or --input FILE, or pipe them in, one a line"
            )
        lines = sys.stdin.buffer.read().splitlines()
    else:
        lines = source.read_bytes().splitlines()
    is_json = source.suffix == ".jsonl"
    prompts = [
        _read_line(source, n, line, is_json) for n, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise InvalidRequestError(f"{_name(source)} has no prompts; give one a line")
    return prompts


def _name(source: Path) -> str:
    return "standard input" if str(source) == "-" else str(source)


def _read_line(source: Path, number: int, line: bytes, is_json: bool) -> str:
    where = f"{_name(source)}, line {number}"
    if len(line) > MAX_LINE_BYTES:
        raise InvalidRequestError(f"{where}: {len(line)} bytes; at most {MAX_LINE_BYTES}")
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        value = json.loads(text) if is_json else text
    except (ValueError, RecursionError) as error:
        kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise InvalidRequestError(f"{where}: not {kind} ({error})") from None
    if isinstance(value, dict):
        reject_unknown(where, value, ("prompt",))
        value = value.get("prompt")
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where}: needs a string, or an object with a 'prompt' string")
    return value


def _stream_text(llm: LLM, prompt: Any, params: SamplingParams) -> Iterator[str]:
    """Text as it is made; raises what ended the request, if something did."""
    for output in llm.stream(prompt, params):
        if output.error is not None:
            raise output.error
        for sample in output.outputs:
            yield sample.text


def _print_text(index: int, output: RequestOutput) -> None:
    for sample in output.outputs:
        label = f"{index}" if len(output.outputs) == 1 else f"{index}.{sample.index}"
        if output.error is not None:
            print(f"[{label}] error: {output.error}", file=sys.stderr)
        else:
            print(f"[{label}] {output.prompt!r} -> {sample.text!r}")


def _as_json(index: int, output: RequestOutput) -> dict:
    record: dict[str, Any] = {
        "index": index,
        "prompt": output.prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "num_cache_creation_tokens": output.num_cache_creation_tokens,
        "error": None if output.error is None else str(output.error),
        "outputs": [
            {
                "text": sample.text,
                "token_ids": sample.token_ids,
                "finish_reason": sample.finish_reason,
                "stop_reason": sample.stop_reason,
                "cumulative_logprob": sample.cumulative_logprob,
                "logprobs": _logprobs_as_json(sample.logprobs),
            }
            for sample in output.outputs
        ],
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = _logprobs_as_json(output.prompt_logprobs)
    return record


def _logprobs_as_json(entries: list | None) -> list | None:
    if entries is None:
        return None
    return [
        None if entry is None else {str(t): dataclasses.asdict(p) for t, p in entry.items()}
        for entry in entries
    ]


# -- chat
# -------------------------------------------------------------------------------------------


def _chat(command: Chat) -> int:
    params = command.sampling.params()
    if params.n > 1 or params.logprobs is not None or params.prompt_logprobs is not None:
        raise InvalidRequestError("chat gives one answer as text: leave out --n and log-probs")
    start = [] if command.system is None else [{"role": "system", "content": command.system}]
    messages: list[dict[str, str]] = list(start)
    interactive = sys.stdin.isatty()
    failed = False
    with _open(command.engine) as llm:
        if interactive:
            print(_CHAT_HELP, file=sys.stderr)
        while True:
            line = _ask(interactive)
            if line is None or line.strip() == "/exit":
                return 1 if failed and not interactive else 0
            if line.strip() == "/reset":
                messages = list(start)
                continue
            if line.strip() == "/help":
                print(_CHAT_HELP, file=sys.stderr)
                continue
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(llm, messages, params)
            except (InvalidRequestError, CapacityError, NumericalError) as error:
                failed = True
                messages.pop()
                print(f"error: {error}\n/reset starts again", file=sys.stderr)
                continue
            messages.append({"role": "assistant", "content": answer})


def _ask(interactive: bool) -> str | None:
    """The next line typed or piped; None at the end."""
    try:
        return input("> " if interactive else "")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"standard input: not UTF-8 ({error})") from None


def _answer(llm: LLM, messages: list, params: SamplingParams) -> str:
    """Print the answer as it is made; Ctrl-C keeps what there is of it."""
    said: list[str] = []
    stream = _stream_text(llm, llm.chat_prompt(messages), params)
    try:
        for text in stream:
            said.append(text)
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()  # type: ignore[attr-defined]
    print()
    return "".join(said)
