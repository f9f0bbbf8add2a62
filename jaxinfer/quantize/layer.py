"""One layer's matrices to `PackedWeight`s, by one of the methods; host arrays in and out.

A layer is {leaf: array} in Hugging Face's layout, the leaf a rule's path within the layer
("attn/q"); matrices are float32 [N, K].
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.params import Rule
from jaxinfer.quant.packed import PackedWeight
from jaxinfer.quantize import awq, gptq
from jaxinfer.quantize.calibrate import Seen
from jaxinfer.quantize.grid import Grid, Rounded, output_error, round_to_nearest, split
from jaxinfer.quantize.settings import INPUTS, Settings

Tensors = dict[str, np.ndarray]
_MAKERS = {"attn/q": "attn_norm/scale", "attn/o": "attn/v", "mlp/up": "mlp_norm/scale"}
_MAKERS |= {"mlp/down": "mlp/up"}
"""What makes the inputs of the matrices, and takes their scales: a norm's gain, a matrix's rows."""


@dataclass(frozen=True)
class Packed:
    """`floats` are the leaves that stay float and were changed; `errors` the outputs' relative
    errors, by the leaf that names the inputs: (of the method, of rounding to nearest)."""

    weights: dict[str, PackedWeight]
    floats: Tensors
    errors: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Scales:
    """What AWQ did to a layer, by leaf: matrix columns were multiplied by `inputs` [K], and what
    makes them (rows of a matrix, a gain, a bias) divided by `outputs` [N]."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def undone(self, leaf: str, matrix: np.ndarray) -> np.ndarray:
        """What `matrix` [N, K] amounts to in the layer as it was."""
        matrix = matrix / self.inputs[leaf] if leaf in self.inputs else matrix
        return matrix * self.outputs[leaf][:, None] if leaf in self.outputs else matrix


def quantise(
    tensors: Mapping[str, np.ndarray],
    rules: Mapping[str, Rule],
    config: ModelConfig,
    settings: Settings,
    seen: Mapping[str, Seen],
) -> Packed:
    """Quantise the matrices of INPUTS; `rules` by leaf. `seen` is empty for rtn alone."""
    original = {leaf: array.astype(np.float32) for leaf, array in tensors.items()}
    folded, scales = dict(original), Scales({}, {})
    if settings.method == "awq":
        folded, scales = fold(original, rules, config, settings.grid, seen)
    weights: dict[str, PackedWeight] = {}
    errors = {}
    for leaves in INPUTS:
        hessian = seen[leaves[0]].hessian if seen else None
        rounded = _round(folded, leaves, hessian, scales, settings)
        names = [rules[leaf].name.removesuffix(".weight") for leaf in leaves]
        sizes = [len(folded[leaf]) for leaf in leaves]
        packed = dict(zip(leaves, split(rounded, names, sizes, settings.grid), strict=True))
        weights |= packed
        if hessian is not None:
            matrix = _stacked(original, leaves)
            nearest = np.asarray(round_to_nearest(matrix, settings.grid).values())
            chosen = [scales.undone(leaf, packed[leaf].dequantize().T) for leaf in leaves]
            errors[leaves[0]] = (
                float(output_error(np.concatenate(chosen) - matrix, matrix, hessian)),
                float(output_error(nearest - matrix, matrix, hessian)),
            )
    floats = {
        leaf: array
        for leaf, array in folded.items()
        if leaf not in weights and array is not original[leaf]
    }
    return Packed(weights, floats, errors)


def _round(
    tensors: Tensors,
    leaves: tuple[str, ...],
    hessian: jax.Array | None,
    scales: Scales,
    settings: Settings,
) -> Rounded:
    """The matrices `leaves`, stacked, on the grid."""
    grid, matrix = settings.grid, _stacked(tensors, leaves)
    if hessian is None:
        return round_to_nearest(matrix, grid)
    if settings.method == "gptq":
        names = ", ".join(leaves)
        return gptq.quantise(matrix, hessian, grid, names, act_order=settings.act_order)
    scale = scales.inputs[leaves[0]]
    hessian = hessian / np.outer(scale, scale)
    # Queries and keys are not clipped, as AWQ's authors have it: their products are what counts.
    kept = sum(len(tensors[leaf]) for leaf in leaves if leaf in ("attn/q", "attn/k"))
    clipped = np.asarray(awq.clipped(matrix[kept:], hessian, grid))
    return round_to_nearest(np.concatenate([matrix[:kept], clipped]), grid)


def fold(
    tensors: Tensors,
    rules: Mapping[str, Rule],
    config: ModelConfig,
    grid: Grid,
    seen: Mapping[str, Seen],
) -> tuple[Tensors, Scales]:
    """The layer with AWQ's scales moved into it: what it computes is the same.

    A norm that is stored as w and applied as 1 + w is kept so. Query heads that share a KV head
    share the scales of its outputs.
    """
    tensors, scales = dict(tensors), Scales({}, {})
    for leaves in INPUTS:
        first, maker = leaves[0], _MAKERS[leaves[0]]
        magnitudes = np.asarray(seen[first].magnitudes)
        if first == "attn/o":
            magnitudes = np.repeat(_by_group(magnitudes, config).mean(axis=1), _group(config), 0)
        matrix = _stacked(tensors, leaves)
        hessian = seen[first].hessian
        scale = np.asarray(awq.best_scales(matrix, hessian, magnitudes.reshape(-1), grid))
        for leaf in leaves:
            tensors[leaf] = tensors[leaf] * scale
            scales.inputs[leaf] = scale
        if maker.endswith("norm/scale"):
            offset = rules[maker].transform(np.zeros(1, np.float32), config)
            tensors[maker] = (tensors[maker] + offset) / scale - offset
            continue
        made = _by_group(scale, config)[:, 0].reshape(-1) if first == "attn/o" else scale
        scales.outputs[maker] = made
        tensors[maker] = tensors[maker] / made[:, None]
        if f"{maker}_bias" in tensors:
            tensors[f"{maker}_bias"] = tensors[f"{maker}_bias"] / made
    return tensors, scales


def _group(config: ModelConfig) -> int:
    return config.num_heads // config.num_kv_heads


def _by_group(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """[N*H] -> [K, G, H], the query heads of a KV head side by side."""
    return array.reshape(config.num_kv_heads, _group(config), config.head_dim)


def _stacked(tensors: Mapping[str, np.ndarray], leaves: tuple[str, ...]) -> np.ndarray:
    """Matrices with the same inputs as one [N, K]: a row's rounding does not depend on others."""
    return np.concatenate([tensors[leaf] for leaf in leaves])
