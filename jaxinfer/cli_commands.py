"""The commands of `jaxinfer` and their flags; cli.py carries them out.

A field is a flag, its docstring the help.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxinfer.config import EngineConfig
from jaxinfer.sampling_params import SamplingParams


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
    profile: Path | None = None
    """Folder for an XLA trace of the generation, which `jaxinfer profile` reads and XProf and
    Perfetto open. Everything is compiled first. Keep it short (--max-tokens): a trace takes about
    a megabyte of memory and disk for each step."""
    timeline: Path | None = None
    """File for the timeline of the engine's last few thousand steps: .json opens in Perfetto and
    chrome://tracing, .png is a picture."""
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


@dataclass(frozen=True, slots=True)
class Profile:
    """Report where the time of a recorded trace went.

    Top operations by device time, time by scope (part of a layer, stage of the sampler), the gaps
    in which the device waits for the host, the host's time by phase, and what was compiled: all
    from the trace alone.

        jaxinfer generate "Once upon a time" --max-tokens 16 --profile trace
        jaxinfer profile trace
        jaxinfer profile trace --bucket "decode 1"
    """

    trace: Annotated[Path, tyro.conf.Positional]
    """A folder that was given to --profile (its newest trace is taken), or a .xplane.pb file."""
    top: int = 20
    """How many operations to list."""
    bucket: str | None = None
    """Only steps of this bucket, by the name under "steps": "decode 16", say."""
    json: bool = False
    """Print one JSON document, with every operation, instead of text."""


@dataclass(frozen=True, slots=True)
class Eval:
    """Measure how well a model predicts texts: perplexity, and agreement with the float model.

    The text is read in sliding windows by the engine itself, so the K/V cache's dtype and the
    quantisation count. Each token is scored once; the first token of a text is only context, unless
    the tokenizer puts BOS before texts: then every window begins with BOS, which is never scored.

        jaxinfer eval --text book.txt code.py
        jaxinfer eval MODEL --text book.txt --quantization int4 --compare
        jaxinfer eval AWQ_FOLDER --text book.txt --reference FLOAT_FOLDER
    """

    source: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None
    """As --model: a directory, a GGUF file, a hub id; none: the embedded model."""
    text: tuple[Path, ...] = ()
    """Text files, UTF-8, each read for itself."""
    window: int | None = None
    """Tokens that the model sees at once; None: 1024, or what max_model_len leaves."""
    stride: int | None = None
    """Tokens by which a window moves on, and scores; None: half a window. Smaller: more context for
    each token, more time."""
    max_tokens_scored: int | None = None
    """Stop after so many tokens; None: all."""
    compare: bool = False
    """Run the model without quantisation too, and say how often both choose the same token, how far
    their probabilities are apart (from the --max-logprobs most likely tokens), and the change of
    the perplexity."""
    reference: str | None = None
    """The float model to compare with, where the model's own weights are quantised."""
    json: bool = False
    """Print one JSON object instead of text."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
)


REGISTRY = tyro.constructors.ConstructorRegistry()
"""How flags are read whose types tyro would turn into something else than a flag."""


@REGISTRY.primitive_rule
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
