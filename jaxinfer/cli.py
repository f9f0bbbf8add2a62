"""The `jaxinfer` command: generate, chat, eval and profile; cli_commands.py has the flags.

Exit status: 0 done, 1 some prompts failed, 2 bad arguments or files, 3 the engine failed,
130 interrupted.
"""

import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from jaxinfer import evaluate
from jaxinfer.cli_commands import REGISTRY, Chat, Command, Eval, Generate, Profile
from jaxinfer.config import EngineConfig
from jaxinfer.errors import (
    CapacityError,
    EngineDeadError,
    InvalidRequestError,
    JaxInferError,
    NumericalError,
)
from jaxinfer.llm import LLM
from jaxinfer.profiling import analysis, reader, record, report, timeline
from jaxinfer.request import RequestOutput
from jaxinfer.sampling_params import SamplingParams, reject_unknown

MAX_LINE_BYTES = 2_000_000
"""Longest line of a prompt file."""
_CHAT_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


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
            registry=REGISTRY,
        )
    except JaxInferError as error:  # an option's value that its dataclass refuses
        return _complain(error, 2)
    try:
        if isinstance(command, Profile):
            return _profile(command)
        if isinstance(command, Eval):
            return _eval(command)
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


def _open(config: EngineConfig, first_prompts: list[str] | None = None) -> LLM:
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return LLM(first_prompts=first_prompts or (), **options)


# -- generate
# ---------------------------------------------------------------------------------------


def _generate(command: Generate) -> int:
    prompts = _read_prompts(command)
    params = command.sampling.params()
    wants_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
    if wants_logprobs and command.output_format != "jsonl":
        raise InvalidRequestError("log-probs need --output-format jsonl")
    if command.profile is not None:
        record.prepare(command.profile)
    if command.timeline is not None:
        timeline.check(command.timeline)
    with _open(command.engine, prompts) as llm:
        if command.profile is not None:
            llm.warmup()  # a trace of compiling says little, and much of it
        with record.trace(command.profile):
            outputs = _outputs(llm, command, prompts, params)
        if command.timeline is not None:
            llm.write_timeline(command.timeline)
    if command.profile is not None:
        path = command.profile
        print(
            f"trace: {reader.newest(path)}; read it with: jaxinfer profile {path}", file=sys.stderr
        )
    failed = 0
    for index, output in enumerate(outputs):
        failed += output.error is not None
        if command.output_format == "jsonl":
            print(json.dumps(_as_json(index, output), ensure_ascii=False))
        else:
            _print_text(index, output)
    return 1 if failed else 0


def _outputs(
    llm: LLM, command: Generate, prompts: list[str], params: SamplingParams
) -> list[RequestOutput]:
    """What is to be printed; a single text is printed as it is made."""
    if len(prompts) > 1 or command.output_format != "text" or params.n > 1:
        return llm.generate(prompts, params)
    for text in _stream_text(llm, prompts[0], params):
        print(text, end="", flush=True)
    print()
    return []


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
        wanted = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise InvalidRequestError(f"{where}: not {wanted} ({error}); save it as {wanted}") from None
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
        raise InvalidRequestError(f"standard input: not UTF-8 ({error}); convert it") from None


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


# -- eval
# -------------------------------------------------------------------------------------------

_FLOAT = ("quantization", "quantization_group_size", "quantize_lm_head", "kv_cache_dtype")
"""Options of the engine that a float model has at their defaults."""


def _eval(command: Eval) -> int:
    config, reference = _eval_engines(command)
    texts = [_read_text(path) for path in command.text]
    num_top = 0 if reference is None else config.max_logprobs
    if num_top == 0 and reference is not None:
        raise InvalidRequestError(
            "a comparison needs --max-logprobs of at least 1", param="max_logprobs"
        )

    def scores(engine: EngineConfig) -> evaluate.Scores:
        with _open(engine) as llm:
            return evaluate.score(
                llm,
                texts,
                window=command.window,
                stride=command.stride,
                max_tokens=command.max_tokens_scored,
                num_top=num_top,
                progress=engine.verbose,
            )

    measured = scores(config)
    result: dict[str, Any] = {"texts": [str(path) for path in command.text]}
    result |= evaluate.summary(measured)
    if reference is not None:
        result |= evaluate.compare(measured, scores(reference))
    print(json.dumps(result) if command.json else evaluate.render(result))
    return 0


def _eval_engines(command: Eval) -> tuple[EngineConfig, EngineConfig | None]:
    """The engine to measure, and the float one to compare with."""
    if not command.text:
        raise InvalidRequestError("no text: jaxinfer eval --text FILE [FILE ...]", param="text")
    config = command.engine
    if command.source is not None and config.model is not None:
        raise InvalidRequestError("give the model as an argument or with --model, not both")
    if config.speculative_config is not None:
        raise InvalidRequestError(
            "speculative_config has no meaning in eval, which generates nothing; leave it out",
            param="speculative_config",
        )
    config = dataclasses.replace(config, model=command.source or config.model)
    if not command.compare and command.reference is None:
        return config, None
    plain = {f.name: f.default for f in dataclasses.fields(config) if f.name in _FLOAT}
    reference = dataclasses.replace(config, model=command.reference or config.model, **plain)
    if reference == config:
        raise InvalidRequestError(
            "--compare would compare the model with itself: give an option that quantises it, or "
            "--reference with the float model that it was made from",
            param="compare",
        )
    return config, reference


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{path}: not UTF-8 ({error}); save it as UTF-8", param="text"
        ) from None


# -- profile
# ----------------------------------------------------------------------------------------


def _profile(command: Profile) -> int:
    if command.top < 1:
        raise InvalidRequestError(f"--top must be at least 1; got {command.top}", param="top")
    profile = analysis.analyse(reader.load(command.trace), command.bucket)
    if command.json:
        print(json.dumps(report.document(profile)))
    else:
        print(report.render(profile, command.top))
    return 0
