"""`quantization_config` of a config.json -> `CheckpointFormat`: how the weights are packed.

Only what changes a weight's meaning is read; how the checkpoint was made (damping, calibration)
is not. Whatever this engine could not load exactly is refused here, before a tensor is looked at.
"""

from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

Layout = Literal[
    "gemm", "gptq", "gptq_v2", "pack-quantized", "int-quantized", "float-quantized", "fp8"
]
METHODS = ("awq", "gptq", "compressed-tensors", "fp8")
SUPPORTED = (
    "awq (4 bits, gemm packing), gptq (2, 3, 4 or 8 bits), compressed-tensors (int8, int4 or int8 "
    "pack-quantized, fp8 e4m3), fp8 (e4m3, one scale for a block or tensor)"
)
GPTQ_BITS = (2, 3, 4, 8)
PACKED_BITS = (4, 8)
_E4M3 = ("e4m3", "float8_e4m3fn")


class ConfigFields(Protocol):
    """The typed access to a table of config.json that is needed here (weights.fields.Fields)."""

    @property
    def values(self) -> Any: ...
    def fail(self, name: str, rule: str) -> NoReturn: ...
    def integer(self, name: str, default: Any = ..., minimum: int = ...) -> Any: ...
    def boolean(self, name: str, default: bool) -> bool: ...
    def text(self, name: str, default: Any = ...) -> Any: ...
    def table(self, name: str) -> "ConfigFields | None": ...
    def texts(self, name: str) -> list[str] | None: ...


@dataclass(frozen=True)
class Activations:
    """How the checkpoint's author quantised a layer's input; `dynamic`: scales found at run time.

    The weights do not depend on it. Static scales are tensors named `input_scale`.
    """

    kind: Literal["int", "float"]
    bits: int
    dynamic: bool

    def describe(self) -> str:
        """Such as "int8"."""
        return f"{'fp' if self.kind == 'float' else 'int'}{self.bits}"


@dataclass(frozen=True)
class CheckpointFormat:
    """How every quantised matrix of a checkpoint is stored.

    `group_size` inputs share a scale; None: all of an output's (one scale per output). `tensor`:
    one scale for the matrix. `block`: (outputs, inputs) that share one, as in the file's [N, K].
    `act_order`: rows are in groups by `g_idx`. `ignored` are the names or patterns of modules that
    were left in float, as written; which tensors are packed, the file itself tells. `symmetric`:
    the configuration says that no zero point moves, which the tensors must then bear out.
    """

    method: str
    layout: Layout
    bits: int
    group_size: int | None = None
    tensor: bool = False
    block: tuple[int, int] | None = None
    symmetric: bool = False
    act_order: bool = False
    activations: Activations | None = None
    ignored: tuple[str, ...] = ()

    def describe(self) -> str:
        """The format in a few words, such as "AWQ 4 bit, group 128"."""
        if self.method == "compressed-tensors":
            kind = "fp" if self.layout == "float-quantized" else "int"
            text = f"{self.method} {kind}{self.bits} ({self.layout})"
        else:
            text = "fp8" if self.method == "fp8" else f"{self.method.upper()} {self.bits} bit"
        if self.block is not None:
            text += f", blocks {self.block[0]}x{self.block[1]}"
        elif self.group_size is not None:
            text += f", group {self.group_size}"
        else:
            text += ", one scale per tensor" if self.tensor else ", one scale per output"
        return f"{text}, act-order" if self.act_order else text


def checkpoint_format(config: ConfigFields) -> CheckpointFormat | None:
    """The format that config.json's fields describe; None where the weights are not quantised.

    Raises ConfigError, naming the field, its value and what is supported.
    """
    name = "quantization_config"
    if config.values.get(name) is None and config.values.get("compression_config") is not None:
        name = "compression_config"  # what compressed-tensors wrote at first
    fields = config.table(name)
    if fields is None:
        return None
    method = fields.text("quant_method")
    if method not in METHODS:
        fields.fail("quant_method", f"one of these: {SUPPORTED}")
    readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors, "fp8": _fp8}
    return readers[method](fields)


def _awq(fields: ConfigFields) -> CheckpointFormat:
    version = fields.text("version", fields.text("format", "gemm"))
    name = "version" if fields.values.get("version") is not None else "format"
    if version.lower() != "gemm":
        fields.fail(name, "gemm, the only AWQ packing that is supported; convert it to gemm")
    bits_name = "w_bit" if "w_bit" in fields.values else "bits"
    if fields.integer(bits_name) != 4:
        fields.fail(bits_name, "4: AWQ's gemm packing has 4 bits")
    size_name = "q_group_size" if "q_group_size" in fields.values else "group_size"
    return CheckpointFormat(
        "awq",
        "gemm",
        bits=4,
        group_size=_group_size(fields, size_name),
        ignored=tuple(fields.texts("modules_to_not_convert") or ()),
    )


def _gptq(fields: ConfigFields) -> CheckpointFormat:
    bits = fields.integer("bits")
    if bits not in GPTQ_BITS:
        fields.fail("bits", "2, 3, 4 or 8, the widths of GPTQ that are supported")
    name = "format" if fields.values.get("checkpoint_format") is None else "checkpoint_format"
    layout = fields.text(name, "gptq").lower()
    if layout not in ("gptq", "gptq_v2"):
        fields.fail(name, "gptq or gptq_v2; save the checkpoint in one of them")
    if fields.boolean("is_marlin_format", False):
        fields.fail("is_marlin_format", "false; save the checkpoint as gptq or gptq_v2")
    if fields.text("pack_dtype", "int32") != "int32":
        fields.fail("pack_dtype", "int32")
    _refuse(fields, "rotation", "absent: rotated weights are not supported")
    return CheckpointFormat(
        "gptq",
        layout,
        bits=bits,
        group_size=_group_size(fields, "group_size"),
        symmetric=fields.boolean("sym", False),
        act_order=fields.boolean("desc_act", False),
        ignored=(*(fields.texts("modules_to_not_convert") or ()), *_skipped_modules(fields)),
    )


def _skipped_modules(fields: ConfigFields) -> list[str]:
    """Patterns that GPTQModel's `dynamic` skips ("-:"); any other rule of it mixes precisions."""
    dynamic = fields.table("dynamic")
    rules = {} if dynamic is None else dynamic.values
    for pattern, override in rules.items():
        if not pattern.startswith("-:") and override != {}:
            fields.fail(
                "dynamic",
                'without rules that change bits or groups of some modules (only "-:" rules, which '
                "skip them): mixed precision is not supported; quantise with one setting",
            )
    return [pattern.removeprefix("-:") for pattern in rules if pattern.startswith("-:")]


def _fp8(fields: ConfigFields) -> CheckpointFormat:
    for name in ("fmt", "expert_dtype"):
        if fields.text(name, "fp8") not in ("fp8", *_E4M3):
            fields.fail(name, "e4m3, the only fp8 format that is supported")
    activations = fields.text("activation_scheme", "dynamic")
    if activations not in ("dynamic", "static"):
        fields.fail("activation_scheme", "dynamic or static")
    name = "modules_to_not_convert"
    block = _block(fields, "weight_block_size")
    return CheckpointFormat(
        "fp8",
        "fp8",
        bits=8,
        tensor=block is None,
        block=block,
        symmetric=True,
        activations=Activations("float", 8, activations == "dynamic"),
        ignored=tuple(fields.texts(name) or fields.texts("ignored_layers") or ()),
    )


def _compressed_tensors(fields: ConfigFields) -> CheckpointFormat | None:
    """None where only scales of the KV cache are stored, beside float weights."""
    _refuse(fields, "transform_config", "absent: rotated weights are not supported")
    sparsity = fields.table("sparsity_config")
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        sparsity.fail("format", "dense: sparse checkpoints are not supported")
    groups = fields.table("config_groups")
    if groups is not None and not groups.values and fields.table("kv_cache_scheme") is not None:
        return None
    if groups is None or not groups.values:
        fields.fail("config_groups", "an object with one group")
    schemes = [_scheme(fields, groups, name) for name in groups.values]
    if any(scheme != schemes[0] for scheme in schemes):
        fields.fail(
            "config_groups",
            "groups that are all quantised alike: mixed precision is not supported; quantise with "
            "one setting",
        )
    return schemes[0]


def _scheme(fields: ConfigFields, groups: ConfigFields, name: str) -> CheckpointFormat:
    """The format of one config group."""
    group = groups.table(name)
    weights = None if group is None else group.table("weights")
    if group is None or weights is None:
        groups.fail(name, "an object with weights, as every group needs them")
    _refuse(group, "output_activations", "absent: quantised outputs are not supported")
    layout, kind, bits = _layout(fields, group, weights)
    strategy = _strategy(weights)
    if strategy == "block" and kind != "float":
        weights.fail("strategy", "group, channel or tensor, where the weights are integers")
    return CheckpointFormat(
        "compressed-tensors",
        layout,
        bits=bits,
        group_size=weights.integer("group_size") if strategy == "group" else None,
        tensor=strategy == "tensor",
        block=_block(weights, "block_structure") if strategy == "block" else None,
        symmetric=weights.boolean("symmetric", True),
        act_order=weights.values.get("actorder") in (True, "group", "dynamic"),
        activations=_activations(group),
        ignored=tuple(fields.texts("ignore") or ()),
    )


def _layout(
    fields: ConfigFields, group: ConfigFields, weights: ConfigFields
) -> tuple[Layout, str, int]:
    """(layout, int or float, bits): of the group where it has its own format."""
    owner = group if group.values.get("format") is not None else fields
    layout = owner.text("format")
    known = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    if layout not in known:
        owner.fail(
            "format", f"one of {', '.join(known)}: mixed and other formats are not supported"
        )
    kind = weights.text("type", "int").lower()
    if kind not in ("int", "float"):
        weights.fail("type", "int or float")
    if layout == "naive-quantized":
        layout = "float-quantized" if kind == "float" else "int-quantized"
    if (kind == "float") != (layout == "float-quantized"):
        weights.fail("type", f"{'float' if layout == 'float-quantized' else 'int'} in {layout}")
    bits = weights.integer("num_bits", 8)
    allowed = PACKED_BITS if layout == "pack-quantized" else (8,)
    if bits not in allowed:
        weights.fail("num_bits", f"{' or '.join(map(str, allowed))} in {layout}")
    if kind == "float" and not weights.boolean("symmetric", True):
        weights.fail("symmetric", "true where the weights are fp8")
    return layout, kind, bits


def _strategy(weights: ConfigFields) -> str:
    """group, channel, tensor or block; where it is not written, what group_size implies."""
    size = weights.integer("group_size", None, minimum=-1)
    implied = "tensor" if size is None else "group" if size > 0 else "channel"
    strategy = weights.text("strategy", implied).lower()
    if strategy not in ("group", "channel", "tensor", "block"):
        weights.fail("strategy", "group, channel, tensor or block")
    if strategy == "group" and (size is None or size < 1):
        weights.fail("group_size", "an integer >= 1 where strategy is group")
    if strategy != "group" and size is not None and size > 0:
        weights.fail("group_size", f"absent where strategy is {strategy}")
    return strategy


def _activations(group: ConfigFields) -> Activations | None:
    inputs = group.table("input_activations")
    if inputs is None:
        return None
    kind = inputs.text("type", "int").lower()
    if kind not in ("int", "float"):
        inputs.fail("type", "int or float")
    return Activations(kind, inputs.integer("num_bits", 8), inputs.boolean("dynamic", False))


def _group_size(fields: ConfigFields, name: str) -> int | None:
    """Inputs of a group, None for -1: one scale per output."""
    size = fields.integer(name, minimum=-1)
    if size == 0:
        fields.fail(name, "an integer >= 1, or -1 for one scale per output")
    return None if size == -1 else size


def _block(fields: ConfigFields, name: str) -> tuple[int, int] | None:
    """[outputs, inputs] of a block, None where absent."""
    block = fields.values.get(name)
    if block is None:
        return None
    valid = isinstance(block, list | tuple) and len(block) == 2
    if not valid or not all(type(size) is int and size >= 1 for size in block):
        fields.fail(name, "two integers >= 1, [outputs, inputs]")
    return block[0], block[1]


def _refuse(fields: ConfigFields, name: str, rule: str) -> None:
    """ConfigError where the field says anything at all."""
    if fields.values.get(name) not in (None, False, "", [], {}):
        fields.fail(name, rule)
