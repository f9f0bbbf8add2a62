"""What a run is asked for: `Settings`, every None decided, checked against the model beforehand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from jaxinfer.config import ModelConfig
from jaxinfer.errors import ConfigError
from jaxinfer.params import Rule, TensorInfo, expand
from jaxinfer.quant.config import CheckpointFormat
from jaxinfer.quantize.gptq import DAMPING
from jaxinfer.quantize.grid import Grid

METHODS = ("rtn", "awq", "gptq", "kv")
LAYOUTS = {
    ("rtn", 4): ("pack-quantized",),
    ("rtn", 8): ("int-quantized", "pack-quantized"),
    ("awq", 4): ("gemm",),
    ("gptq", 4): ("gptq",),
    ("gptq", 8): ("gptq",),
    ("kv", 8): ("float8",),
}
"""Layouts of the method at these bits, the default first."""
GROUP_SIZES = (128, 64, 32)
"""Those that are tried where none is asked for."""
INPUTS = (("attn/q", "attn/k", "attn/v"), ("attn/o",), ("mlp/up", "mlp/gate"), ("mlp/down",))
"""A layer's matrices, by leaf: those of one tuple have the same inputs, and the first names them"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks; None: decide for me. `group_size` -1: one scale for each output."""

    method: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool | None = None
    layout: str | None = None
    num_sequences: int = 128
    sequence_length: int = 512


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run. `group_size` None: one scale for each output. `dtype` is what the folder's
    config.json will say, and what tensors become that were in blocks of a GGUF file."""

    method: str
    bits: int
    group_size: int | None
    symmetric: bool
    act_order: bool
    layout: str
    num_sequences: int
    sequence_length: int
    dtype: str

    @property
    def calibrated(self) -> bool:
        return self.method != "rtn"

    @property
    def grid(self) -> Grid:
        """Where weights are rounded to: what `layout` can store."""
        # AutoGPTQ stores zero points less one, and has no -1.
        return Grid(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_dtype=self.dtype if self.method == "rtn" else "float16",
            lowest_zero=1 if self.layout == "gptq" else 0,
        )

    def quantization_config(self, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """The entry of config.json, in the words of the format's own library.

        `before` is the one that the model has already: `kv` adds to it.
        """
        size = -1 if self.group_size is None else self.group_size
        if self.method == "awq":
            return {
                "quant_method": "awq",
                "bits": self.bits,
                "group_size": size,
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": None,
            }
        if self.method == "gptq":
            return {
                "quant_method": "gptq",
                "bits": self.bits,
                "group_size": size,
                "desc_act": self.act_order,
                "sym": self.symmetric,
                "damp_percent": DAMPING,
                "static_groups": False,
                "true_sequential": False,
                "lm_head": False,
                "checkpoint_format": "gptq",
            }
        return self._compressed_tensors(before)

    def _compressed_tensors(self, before: Mapping[str, Any] | None) -> dict[str, Any]:
        shared = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
        if self.method == "kv":
            scheme = {"type": "float", "num_bits": 8, "strategy": "tensor"}
            scheme |= {"dynamic": False, "symmetric": True}
            none: dict[str, Any] = {"format": "dense", "config_groups": {}, "ignore": []}
            return {**(before or shared | none), "kv_cache_scheme": scheme}
        grouped = self.group_size is not None
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": self.group_size,
            "dynamic": False,
            "actorder": None,
        }
        group = {"targets": ["Linear"], "weights": weights}
        group |= {"input_activations": None, "output_activations": None}
        return {
            **shared,
            "format": self.layout,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        }


def decide(
    request: Request,
    config: ModelConfig,
    rules: tuple[Rule, ...],
    infos: Mapping[str, TensorInfo],
    quantised: CheckpointFormat | None,
    dtype: str,
) -> Settings:
    """The settings for this model. Raises ConfigError that says what is possible."""
    method = request.method
    if method not in METHODS:
        _fail("method", f"must be one of {', '.join(METHODS)}; got {method!r}")
    bits = request.bits if request.bits is not None else 8 if method == "kv" else 4
    if (method, bits) not in LAYOUTS:
        known = [str(b) for m, b in LAYOUTS if m == method]
        _fail("bits", f"must be {' or '.join(known)} with method {method}; got {bits!r}")
    _check_model(method, config, quantised)
    layouts = LAYOUTS[method, bits]
    if request.layout is not None and request.layout not in layouts:
        _fail("format", f"must be {' or '.join(layouts)} here; got {request.layout!r}")
    if request.act_order is not None and method != "gptq":
        _fail("act_order", f"has no meaning with method {method}: only gptq orders its inputs")
    layout = request.layout or layouts[0]
    settings = Settings(
        method=method,
        bits=bits,
        group_size=None,
        symmetric=method != "awq" if request.symmetric is None else request.symmetric,
        act_order=method == "gptq" if request.act_order is None else request.act_order,
        layout=layout,
        num_sequences=_count(request, "num_sequences", 1),
        sequence_length=_count(request, "sequence_length", 2),
        dtype=dtype,
    )
    if settings.calibrated and settings.sequence_length > config.max_position:
        _fail(
            "sequence_length",
            f"is {settings.sequence_length}, beyond the model's {config.max_position} positions",
        )
    if method == "kv":
        _refuse_weight_options(request)
        return settings
    shapes = _matrices(rules, config, infos)
    return replace(settings, group_size=_group_size(request, settings, shapes))


def _check_model(method: str, config: ModelConfig, quantised: CheckpointFormat | None) -> None:
    if config.architecture == "GPT2LMHeadModel":
        _fail(
            "model",
            "is a GPT-2, whose matrices are stored [inputs, outputs]: no format holds them "
            "quantised. LLM(quantization=...) rounds them while it loads",
        )
    if method != "kv" and quantised is not None:
        _fail(
            "model",
            f"has its weights quantised already ({quantised.describe()}); give the float "
            "checkpoint. Only method kv takes a quantised one",
        )


def _refuse_weight_options(request: Request) -> None:
    for name in ("group_size", "symmetric"):
        if getattr(request, name) is not None:
            _fail(name, "has no meaning with method kv: a layer's keys, and values, have one scale")


def _count(request: Request, name: str, minimum: int) -> int:
    value = getattr(request, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        _fail(name, f"must be an integer >= {minimum}; got {value!r}")
    return value


def _matrices(
    rules: tuple[Rule, ...], config: ModelConfig, infos: Mapping[str, TensorInfo]
) -> dict[str, tuple[int, int]]:
    """(N, K) of the first layer's matrices, by the rule's name; the layers are alike."""
    leaves = {f"layers_0/{leaf}" for leaves in INPUTS for leaf in leaves}
    shapes = {}
    for rule in expand(rules, config.num_layers):
        info = infos.get(stored_name(rule.name, infos))
        if rule.path in leaves and info is not None and len(info.shape) == 2:
            shapes[rule.name] = info.shape
    return shapes


def stored_name(name: str, infos: Mapping[str, TensorInfo]) -> str:
    """`name` as stored: a base model saved alone lacks the leading "model."."""
    bare = name.partition(".")[2]
    return bare if name not in infos and bare in infos else name


def _group_size(
    request: Request, settings: Settings, shapes: Mapping[str, tuple[int, int]]
) -> int | None:
    asked = request.group_size
    if asked is None and settings.bits == 8 and settings.method == "rtn":
        asked = -1
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int)):
        _fail("group_size", f"must be an integer; got {asked!r}")
    _check_words(settings, shapes)
    if asked == -1:
        return None
    if settings.layout == "int-quantized":
        _fail("group_size", f"must be -1 in int-quantized, or use pack-quantized; got {asked!r}")
    inputs = sorted({k for _, k in shapes.values()})
    common = math.gcd(*inputs)
    fitting = [size for size in range(2, common + 1) if common % size == 0]
    for size in GROUP_SIZES if asked is None else (asked,):
        if size in fitting:
            return size
    shown = ", ".join(map(str, fitting[-8:])) or "none"
    what = f"{asked!r} does not divide" if asked is not None else "128, 64 and 32 do not divide"
    _fail(
        "group_size",
        f"{what} the inputs of every matrix ({', '.join(map(str, inputs))}); those that do: "
        f"{shown}; or -1, one scale for each output",
    )


def _check_words(settings: Settings, shapes: Mapping[str, tuple[int, int]]) -> None:
    """GPTQ's and AWQ's integers fill 32-bit words, along the outputs and (GPTQ) the inputs."""
    if settings.method == "rtn":
        return
    per_word = 32 // settings.bits
    for name, (outputs, inputs) in shapes.items():
        if outputs % per_word or (settings.method == "gptq" and inputs % per_word):
            _fail(
                "method",
                f"{settings.method} cannot store {name}, {outputs} outputs by {inputs} inputs: "
                f"they must be multiples of {per_word}; use rtn",
            )


def _fail(field: str, text: str) -> NoReturn:
    raise ConfigError(f"{field} {text}", field=field)
