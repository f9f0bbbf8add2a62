"""From `PackedWeight` to the tensors that checkpoints keep: the inverse of the readers in quant/.

Sources: AutoAWQ (`WQLinear_GEMM`), AutoGPTQ, https://github.com/vllm-project/compressed-tensors
"""

import ml_dtypes
import numpy as np

from jaxinfer.quant.awq import ORDER
from jaxinfer.quant.packed import WORD_BITS, PackedWeight

Tensors = dict[str, np.ndarray]


def store(weight: PackedWeight, layout: str) -> Tensors:
    """The tensors of one linear layer, by the last word of their names."""
    if layout == "gemm":
        return _awq(weight)
    return _gptq(weight) if layout == "gptq" else _compressed_tensors(weight, layout)


def _awq(weight: PackedWeight) -> Tensors:
    def interleaved(table: np.ndarray) -> np.ndarray:
        moved = table.reshape(len(table), -1, len(ORDER))[:, :, list(ORDER)]
        return _words(moved.reshape(table.shape), 4)

    return {
        "qweight": interleaved(_unsigned(weight.values, weight.bits)),
        "qzeros": interleaved(_zeros(weight)),
        "scales": _scales(weight),
    }


def _gptq(weight: PackedWeight) -> Tensors:
    """Layout 1: zero points less one. Groups are written even where they are in order."""
    groups = weight.g_idx
    if groups is None:
        groups = np.arange(weight.shape[0], dtype=np.int32) // weight.group_size
    values = _unsigned(weight.values, weight.bits)
    return {
        "qweight": np.ascontiguousarray(_words(values.T, weight.bits).T),
        "qzeros": _words(_zeros(weight) - np.uint8(1), weight.bits),
        "scales": _scales(weight),
        "g_idx": groups.astype(np.int32),
    }


def _compressed_tensors(weight: PackedWeight, layout: str) -> Tensors:
    outputs_first = np.ascontiguousarray(weight.values.T)
    parts = {"weight_scale": np.ascontiguousarray(_scales(weight).T)}
    if layout == "int-quantized":
        parts["weight"] = outputs_first
        if weight.zeros is not None:
            parts["weight_zero_point"] = np.ascontiguousarray(weight.zeros.T)
        return parts
    parts["weight_packed"] = _words(_unsigned(outputs_first, weight.bits), weight.bits)
    parts["weight_shape"] = np.array(outputs_first.shape, np.int64)
    if weight.zeros is not None:
        parts["weight_zero_point"] = np.ascontiguousarray(_words(_zeros(weight), weight.bits).T)
    return parts


def _words(integers: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [R, C] -> int32 [R, ceil(C * bits / 32)], the first integer in the lowest bits."""
    per_word = WORD_BITS // bits
    padded = np.pad(integers, ((0, 0), (0, -integers.shape[1] % per_word)))
    fields = padded.reshape(len(integers), -1, per_word).astype(np.uint32)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    return np.bitwise_or.reduce(fields << shifts, axis=2).view(np.int32)


def _unsigned(values: np.ndarray, bits: int) -> np.ndarray:
    """int8 in [-2**(bits-1), 2**(bits-1)) -> uint8 from 0."""
    return (values.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)


def _zeros(weight: PackedWeight) -> np.ndarray:
    """Zero points [G, N], uint8 from 0."""
    zeros = np.zeros_like(weight.scales, np.int8) if weight.zeros is None else weight.zeros
    return _unsigned(zeros, weight.bits)


def _scales(weight: PackedWeight) -> np.ndarray:
    """Scales [G, N] in the dtype that they were chosen in."""
    names = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    return weight.scales.astype(names[weight.scale_dtype])
