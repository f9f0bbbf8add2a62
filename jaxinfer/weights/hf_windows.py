"""Which layers of a Hugging Face checkpoint attend within a window, as `ModelConfig.windows`."""

from collections.abc import Callable

from jaxinfer.weights.fields import Fields

Windows = tuple[int | None, ...]
LAYER_TYPES = ("full_attention", "sliding_attention")


def no_windows(fields: Fields, num_layers: int, max_position: int) -> Windows:
    """Full attention everywhere (Llama)."""
    del fields, max_position
    return (None,) * num_layers


def mistral_windows(fields: Fields, num_layers: int, max_position: int) -> Windows:
    """One window for all layers (arXiv:2310.06825); null is none, absent is 4096 as in v0.1."""
    if "sliding_window" not in fields.values:
        return (4096 if max_position >= 4096 else None,) * num_layers
    return (_window(fields, max_position),) * num_layers


def typed_windows(period: int | None) -> Callable[[Fields, int, int], Windows]:
    """Windows by `layer_types`; where absent, every layer but each `period`-th has one (Gemma).

    With period None (Qwen) `use_sliding_window` switches them on from layer `max_window_layers`.
    """

    def windows(fields: Fields, num_layers: int, max_position: int) -> Windows:
        types = _layer_types(fields, num_layers)
        fields.integer("sliding_window", None)
        if period is None and not fields.boolean("use_sliding_window", False):
            # transformers drops the window then, whatever layer_types says
            return (None,) * num_layers
        if types is None:
            types = _default_types(fields, period, num_layers)
        if "sliding_attention" not in types:
            return (None,) * num_layers
        if "sliding_window" in fields.values:
            window = _window(fields, max_position)
        else:
            window = 4096 if max_position >= 4096 else None
        return tuple(window if kind == "sliding_attention" else None for kind in types)

    return windows


def _default_types(fields: Fields, period: int | None, num_layers: int) -> list[str]:
    if period is None:
        first = fields.integer("max_window_layers", 28, minimum=0)
        return [LAYER_TYPES[layer >= first] for layer in range(num_layers)]
    every: int = period
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        every = fields.integer(name, every)
    return [LAYER_TYPES[(layer + 1) % every != 0] for layer in range(num_layers)]


def _layer_types(fields: Fields, num_layers: int) -> list[str] | None:
    types = fields.texts("layer_types")
    if types is None:
        return None
    if len(types) != num_layers:
        fields.fail("layer_types", f"a list of {num_layers} (num_hidden_layers), not {len(types)}")
    if unknown := sorted(set(types) - set(LAYER_TYPES)):
        fields.fail("layer_types", f"made of {' and '.join(LAYER_TYPES)}, not {unknown[0]!r}")
    return types


def _window(fields: Fields, max_position: int) -> int | None:
    window = fields.integer("sliding_window", None)
    if window is not None and window > max_position:
        fields.fail(
            "sliding_window",
            f"null or at most the context, max_position_embeddings ({max_position})",
        )
    return window
