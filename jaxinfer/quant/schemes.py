"""The schemes that LLM(quantization=...) names, and which weights of a model each applies to.

To add one: an entry in SCHEMES, and its name in config.QuantizationName. A weight is quantised if
its rule says which of its axes a matmul sums over. What stays float is said in the printed summary:
norms and biases, which are small and are not in matmuls; the output head, whose errors reach the
logits unaveraged; and the embedding table, whose rows are read one at a time. Where the head is
tied to the table they are one weight, which `head=True` quantises, row by row, for both uses.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from jaxinfer.config import ModelConfig
from jaxinfer.errors import ConfigError
from jaxinfer.params import Rule, expand
from jaxinfer.quant.arrays import QuantArray
from pallas_kernels.quant_matmul import Format

Formats = tuple[tuple[str, Format], ...]
"""(path of a leaf, its format) for every quantised leaf; hashable, as all that is static."""

GROUP_SIZES = (128, 64, 32)
"""Those that are tried where none is asked for, the largest first."""
_HEADS = ("embed", "lm_head")


@dataclass(frozen=True)
class Scheme:
    """`layers` is the format of the layers' matrices, `head` that of the output head where it is
    quantised too: never less than 8 bits. `about` is for people. `down` is that of the MLP's output
    where it is another. `balanced`: see models/balance.py."""

    name: str
    layers: Format
    head: Format
    about: str
    down: Format | None = None
    balanced: bool = False

    @property
    def has_groups(self) -> bool:
        return self.layers.group_size is not None


_INT8 = Format("int8")
_W8A8 = Format("int8", activations="int8")
# Inputs of `down` are products, with rare large elements in any channel: in 8 bits they cost more
# than all else does together. The head's errors reach the logits as they are. Both times the weight
# is read once for both digits.
_W8A16 = Format("int8", activations="int16")
_FP8 = Format("float8_e4m3fn", activations="float8_e4m3fn")

SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            Scheme(
                "int8",
                _W8A8,
                _W8A16,
                "int8 weights, a scale for each output; int8 activations, int16 into down and the "
                "head, a scale for each token; balanced",
                down=_W8A16,
                balanced=True,
            ),
            Scheme(
                "int8_weight_only",
                _INT8,
                _INT8,
                "int8 weights, a scale for each output; float activations",
            ),
            Scheme(
                "int4",
                Format("int4", group_size=GROUP_SIZES[0]),
                _INT8,
                "int4 weights, a scale for each group; float activations",
            ),
            Scheme(
                "int4_asymmetric",
                Format("int4", group_size=GROUP_SIZES[0], zero_points=True),
                _INT8,
                "int4 weights, a scale and a zero point for each group; float activations",
            ),
            Scheme(
                "fp8",
                _FP8,
                _FP8,
                "e4m3 weights, a scale for each output; e4m3 activations, a scale for each token",
            ),
        )
    }
)


def choose(
    name: str,
    rules: Sequence[Rule],
    config: ModelConfig,
    *,
    group_size: int | None = None,
    head: bool = False,
) -> Formats:
    """The format of every weight that scheme `name` quantises.

    `group_size` None takes the largest of GROUP_SIZES that divides the inputs of every matrix.
    Raises ConfigError: an unknown scheme, a group size that does not divide or has no meaning.
    """
    if name not in SCHEMES:
        raise ConfigError(
            f"quantization must be one of {', '.join(SCHEMES)}, or None; got {name!r}",
            field="quantization",
        )
    scheme = SCHEMES[name]
    layers = [r for r in expand(rules, config.num_layers) if _is_matrix(r, config)]
    format = scheme.layers
    if scheme.has_groups:
        sizes = [_num_inputs(rule, config) for rule in layers if rule.path not in _HEADS]
        format = replace(format, group_size=_group_size(name, sizes, group_size))
    elif group_size is not None:
        raise ConfigError(
            f"quantization_group_size={group_size} has no meaning with quantization={name!r}, "
            f"which has no groups; leave it out, or use int4",
            field="quantization_group_size",
        )
    chosen = []
    for rule in layers:
        if rule.path in _HEADS and not head:
            continue
        used = scheme.head if rule.path in _HEADS else format
        if scheme.down is not None and rule.path.endswith("/down"):
            used = scheme.down
        try:
            QuantArray.of_shape(rule.shape(config), rule.contracted, used)
        except ValueError as error:
            raise ConfigError(
                f"quantization={name!r} cannot hold {rule.path}: {error}", field="quantization"
            ) from None
        chosen.append((rule.path, used))
    return tuple(chosen)


def is_balanced(name: str | None) -> bool:
    """Whether weights are balanced before they are rounded as `name` says."""
    return name is not None and name in SCHEMES and SCHEMES[name].balanced


def _is_matrix(rule: Rule, config: ModelConfig) -> bool:
    """Whether a matmul multiplies by the weight; by the embedding, if it is the head as well."""
    return bool(rule.contracted) and (rule.path != "embed" or config.tie_embeddings)


def _num_inputs(rule: Rule, config: ModelConfig) -> int:
    shape = rule.shape(config)
    return math.prod(shape[axis] for axis in rule.contracted)


def _group_size(name: str, sizes: Iterable[int], asked: int | None) -> int:
    """`asked`, or the largest of GROUP_SIZES that fits matrices with these numbers of inputs."""
    sizes = sorted(set(sizes))
    common = math.gcd(*sizes)
    fitting = [size for size in range(2, common + 1, 2) if common % size == 0]
    for size in (asked,) if asked is not None else GROUP_SIZES:
        if size in fitting:
            return size
    what = "quantization_group_size must be an even number that divides"
    if asked is None:
        what = f"none of the group sizes {', '.join(map(str, GROUP_SIZES))} divides"
    shown = ", ".join(map(str, fitting[-6:])) or "none"
    raise ConfigError(
        f"quantization={name!r}: {what} the inputs of every matrix ({', '.join(map(str, sizes))})"
        f"{'' if asked is None else f'; got {asked!r}'}. Sizes that do: {shown}; pass one as "
        f"quantization_group_size, or use int8_weight_only",
        field="quantization_group_size",
    )


def describe(
    name: str, formats: Formats, rules: Sequence[Rule], config: ModelConfig, dtype: str
) -> str:
    """Which weights are quantised, and how, and which stay float; one line for each kind."""
    used = dict(formats)
    lines = [f"quantisation: {name} ({SCHEMES[name].about})"]
    lines += by_kind({p: format_text(f) for p, f in used.items()}, rules, config, dtype)
    if is_balanced(name):
        lines.append(
            "  balanced: large channels of what norms give are made smaller, and the rows of q, k, "
            "v, gate and up that meet them larger by as much"
        )
    if not any(path in _HEADS for path in used):
        what = "embed, which is the head too," if config.tie_embeddings else "lm_head"
        lines.append(f"  {what} stays float; quantize_lm_head=True quantises it")
    return "\n".join(lines)


def by_kind(
    kinds: Mapping[str, str], rules: Sequence[Rule], config: ModelConfig, dtype: str
) -> list[str]:
    """A line for each kind of weight, with the leaves that are of it; `kinds` says it of the
    quantised ones, by path, all others are of their rule's dtype or `dtype`."""
    leaves: dict[str, list[str]] = {}
    for rule in rules:
        paths = [each.path for each in expand([rule], config.num_layers)]
        of_rule = [kinds.get(path, rule.dtype or dtype) for path in paths]
        for kind in dict.fromkeys(of_rule):
            count = of_rule.count(kind)
            some = "" if count == len(paths) else f" ({count} of {len(paths)})"
            leaves.setdefault(kind, []).append(rule.path + some)
    return [f"  {kind}: {', '.join(found)}" for kind, found in leaves.items()]


def format_text(format: Format) -> str:
    """A format in a few words."""
    words = format.dtype
    if format.group_size is not None:
        words += f" in groups of {format.group_size}"
    if format.zero_points:
        words += " with zero points"
    return words if format.activations == "float" else f"{words} x {format.activations}"
