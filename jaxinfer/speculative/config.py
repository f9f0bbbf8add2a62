"""SpeculativeConfig: the user's `speculative_config`, read and checked."""

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from jaxinfer.errors import ConfigError

MAX_SPECULATIVE_TOKENS = 32
SELF_DRAFTS = ("int8", "int8_weight_only", "int4")
"""Schemes in which the target's own weights can draft."""


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """How tokens are drafted; the keys of `speculative_config` are vLLM's.

    `method` "ngram" continues the text as it went on the last time its newest tokens stood in it:
    at least `prompt_lookup_min` of them, compared up to `prompt_lookup_max`. "draft_model" asks a
    second, smaller model with the same tokenizer, `model` (folder, GGUF file or hub id; "self": the
    target's own weights in `quantization` "int8", "int8_weight_only" or "int4").
    `num_speculative_tokens` is the most that is drafted for a row; fewer, or none, are where more
    would not pay. `disable_by_batch_size`: draft nothing in steps of so many rows or more.
    """

    method: Literal["ngram", "draft_model"]
    num_speculative_tokens: int
    prompt_lookup_min: int = 3
    prompt_lookup_max: int = 8
    model: str | None = None
    quantization: str | None = None
    max_model_len: int | None = None
    disable_by_batch_size: int | None = None

    @classmethod
    def from_dict(cls, given: object) -> "SpeculativeConfig":
        """Read and check a user's dictionary.

        Raises:
            ConfigError: an unknown method or key, a key that the method has no use for, or a value
            out of bounds.
        """
        if not isinstance(given, dict):
            raise _speculative(
                f"must be a dictionary such as {{'method': 'ngram', 'num_speculative_tokens': 4}}; "
                f"got {given!r:.100}"
            )
        method = given.get("method", "draft_model" if "model" in given else None)
        keys = _SPECULATIVE_KEYS.get(method) if isinstance(method, str) else None
        if keys is None:
            raise _speculative(f"method must be one of {list(_SPECULATIVE_KEYS)}; got {method!r}")
        known = ("method", "num_speculative_tokens", *keys, "disable_by_batch_size")
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise _speculative(f"method {method!r} has no key {key!r}; {hint}")
        if "num_speculative_tokens" not in given:
            raise _speculative("needs num_speculative_tokens, 4 say")
        config = cls(**{**given, "method": method})
        for name, high in (
            ("num_speculative_tokens", MAX_SPECULATIVE_TOKENS),
            ("prompt_lookup_min", 64),
            ("prompt_lookup_max", 64),
            ("max_model_len", None),
            ("disable_by_batch_size", None),
        ):
            value = getattr(config, name)
            if value is None and high is None:
                continue
            if type(value) is not int or value < 1 or (high is not None and value > high):
                bound = "" if high is None else f" and <= {high}"
                raise _speculative(f"{name} must be an integer >= 1{bound}; got {value!r}")
        if "prompt_lookup_max" not in given:
            largest = max(config.prompt_lookup_min, config.prompt_lookup_max)
            config = replace(config, prompt_lookup_max=largest)
        elif "prompt_lookup_min" not in given:
            smallest = min(config.prompt_lookup_min, config.prompt_lookup_max)
            config = replace(config, prompt_lookup_min=smallest)
        if config.prompt_lookup_min > config.prompt_lookup_max:
            raise _speculative(
                f"prompt_lookup_min ({config.prompt_lookup_min}) must not exceed prompt_lookup_max "
                f"({config.prompt_lookup_max})"
            )
        if method == "draft_model" and not (isinstance(config.model, str) and config.model):
            raise _speculative(
                "method 'draft_model' needs model: a folder, a GGUF file or a hub id; got "
                f"{config.model!r}"
            )
        if (config.model == "self") != (config.quantization is not None):
            raise _speculative(
                "model 'self' and quantization go together: the draft is the target's own "
                f"weights, quantised ({', '.join(SELF_DRAFTS)}); got model {config.model!r} and "
                f"quantization {config.quantization!r}"
            )
        if config.quantization not in (None, *SELF_DRAFTS):
            raise _speculative(
                f"quantization must be one of {', '.join(SELF_DRAFTS)}; got {config.quantization!r}"
            )
        return config


_SPECULATIVE_KEYS = {
    "ngram": ("prompt_lookup_min", "prompt_lookup_max"),
    "draft_model": ("model", "quantization", "max_model_len"),
}


def _speculative(message: str) -> ConfigError:
    return ConfigError(f"speculative_config {message}", field="speculative_config")
