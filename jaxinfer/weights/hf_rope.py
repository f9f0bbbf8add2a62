"""Rotary embedding of a Hugging Face config.json, in the spelling of transformers 4 and of 5.

Old: `rope_theta`, `rope_scaling` {"type" or "rope_type", ...} and Gemma 3's `rope_local_base_freq`.
New: `rope_parameters`, one table or one per kind of layer.
"""

from dataclasses import replace

from jaxinfer.config import RopeConfig
from jaxinfer.weights.fields import Fields

SUPPORTED_TYPES = ("default", "linear", "llama3")
_LAYER_KINDS = ("full_attention", "sliding_attention")


def rope_of(
    fields: Fields, theta: float, local_theta: float | None
) -> tuple[RopeConfig, RopeConfig | None]:
    """Return (rope, rope_local).

    `theta` is the default base; `local_theta` that of the windowed layers, None for models whose
    layers all rotate alike: rope_local is None for these.
    """
    base = fields.number("rope_theta", theta)
    local_base = None
    if local_theta is not None:
        local_base = fields.number("rope_local_base_freq", local_theta)
    table = fields.table("rope_parameters")
    scaling = fields.table("rope_scaling")
    if table is not None and any(kind in table.values for kind in _LAYER_KINDS):
        return _per_kind(fields, table, scaling, base, local_base)
    rope = _rope(table or scaling, base)
    if table is not None and scaling is not None:
        rope = _rope(scaling, rope.theta)
    return rope, None if local_base is None else RopeConfig(theta=local_base)


def _per_kind(
    fields: Fields,
    table: Fields,
    scaling: Fields | None,
    base: float,
    local_base: float | None,
) -> tuple[RopeConfig, RopeConfig | None]:
    if unknown := sorted(set(table.values) - set(_LAYER_KINDS)):
        fields.fail("rope_parameters", f"keyed by {' and '.join(_LAYER_KINDS)}, not {unknown[0]!r}")
    full, local = (table.table(kind) for kind in _LAYER_KINDS)
    rope = _rope(full, base)
    if scaling is not None:
        rope = replace(_rope(scaling, base), theta=rope.theta)
    rope_local = _rope(local, base if local_base is None else local_base)
    if local_base is not None or rope_local == rope:
        return rope, None if local_base is None else rope_local
    fields.fail("rope_parameters", "the same for all kinds of layers in this architecture")


def _rope(table: Fields | None, theta: float) -> RopeConfig:
    if table is None:
        return RopeConfig(theta=theta)
    theta = table.number("rope_theta", theta)
    name = "rope_type" if "rope_type" in table.values else "type"
    kind = table.text(name, "default")
    if table.number("partial_rotary_factor", 1.0) != 1.0:
        table.fail("partial_rotary_factor", "1: rotary embeddings of part of a head")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in SUPPORTED_TYPES:
        table.fail(name, f"one of {', '.join(SUPPORTED_TYPES)}")
    factor = table.number("factor")
    if factor < 1:
        table.fail("factor", "at least 1")
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=factor)
    low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
    if high <= low:
        table.fail("high_freq_factor", f"greater than low_freq_factor ({low})")
    original = table.integer("original_max_position_embeddings")
    return RopeConfig(theta, "llama3", factor, low, high, original)
