"""Tiny checkpoints in published formats, packed from what the formats' sources say.

Nothing of jaxinfer is used: each packer gives a layer's tensors, and the float matrix [N, K] that
they stand for, by the format's own formula.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.helpers import TINY_CONFIG, tiny_weights, write_tiny_model
from tests.quant.stored import NAMES
from tests.weights.builders import entry, raw_safetensors

Tensors = dict[str, np.ndarray]
Packer = Callable[[np.ndarray], tuple[Tensors, np.ndarray]]
GROUP = 16
BLOCK = (16, 32)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)


def nearest(values: np.ndarray) -> np.ndarray:
    """Whole numbers, as integers have them: none is -0.0."""
    return np.round(values) + 0


def words(integers: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers [R, C] -> int32 [R, C * bits / 32], the lowest bits of a word first."""
    shifts = bits * np.arange(32 // bits, dtype=np.uint64)
    fields = integers.astype(np.uint64).reshape(len(integers), -1, 32 // bits) << shifts
    return fields.sum(-1, dtype=np.uint64).astype(np.uint32).view(np.int32)


def grouped(matrix: np.ndarray, bits: int, groups: np.ndarray):
    """[N, K], group of each of K -> (integers [K, N], zeros [G, N], scales [G, N] float16, float).

    Zero points are from 1 to 2**bits - 1, as layout 1 of GPTQ can store them.
    """
    rows, largest = matrix.T, 2**bits - 1
    of_group = [rows[groups == g] for g in range(groups.max() + 1)]
    low = np.stack([np.minimum(some.min(0), 0) for some in of_group])
    high = np.stack([np.maximum(some.max(0), 0) for some in of_group])
    scales = ((high - low) / largest).astype(np.float16)
    step = scales.astype(np.float32)
    zeros = np.clip(nearest(-low / step), 1, largest)
    integers = np.clip(nearest(rows / step[groups]) + zeros[groups], 0, largest)
    return integers, zeros, scales, ((integers - zeros[groups]) * step[groups]).T


def awq(matrix: np.ndarray) -> tuple[Tensors, np.ndarray]:
    integers, zeros, scales, meant = grouped(matrix, 4, np.arange(matrix.shape[1]) // GROUP)

    def interleaved(table: np.ndarray) -> np.ndarray:
        return words(table.reshape(len(table), -1, 8)[:, :, AWQ_ORDER].reshape(table.shape), 4)

    return {
        "qweight": interleaved(integers), "qzeros": interleaved(zeros), "scales": scales
    }, meant  # fmt: skip


def gptq(bits: int, *, act_order: bool) -> Packer:
    def pack(matrix: np.ndarray) -> tuple[Tensors, np.ndarray]:
        groups = np.arange(matrix.shape[1]) // GROUP
        if act_order:
            groups = np.random.default_rng(7).permutation(groups)
        integers, zeros, scales, meant = grouped(matrix, bits, groups)
        return {
            "qweight": np.ascontiguousarray(words(integers.T, bits).T),
            "qzeros": words(zeros - 1, bits),
            "scales": scales,
            "g_idx": groups.astype(np.int32),
            "bias": np.zeros(len(matrix), np.float16),
        }, meant

    return pack


def int4(matrix: np.ndarray) -> tuple[Tensors, np.ndarray]:
    """compressed-tensors, pack-quantized, symmetric: integers from -8 to 7, plus 8."""
    by_group = matrix.reshape(len(matrix), -1, GROUP)
    scales = (np.abs(by_group).max(-1) / 7.5).astype(BF16)
    step = scales.astype(np.float32)[:, :, None]
    integers = np.clip(nearest(by_group / step), -8, 7)
    return {
        "weight_packed": words(integers.reshape(matrix.shape) + 8, 4),
        "weight_scale": scales,
        "weight_shape": np.array(matrix.shape, np.int64),
    }, (integers * step).reshape(matrix.shape)


def int8(matrix: np.ndarray) -> tuple[Tensors, np.ndarray]:
    scales = (np.abs(matrix).max(1, keepdims=True) / 127).astype(np.float32)
    integers = nearest(matrix / scales)
    return {"weight": integers.astype(np.int8), "weight_scale": scales}, integers * scales


def fp8(matrix: np.ndarray) -> tuple[Tensors, np.ndarray]:
    scales = (np.abs(matrix).max(1, keepdims=True) / 448).astype(BF16)
    step = scales.astype(np.float32)
    values = np.clip(matrix / step, -448, 448).astype(FP8)
    return {"weight": values, "weight_scale": scales}, values.astype(np.float32) * step


def fp8_tensor(matrix: np.ndarray) -> tuple[Tensors, np.ndarray]:
    """One scale, and a static scale of the input."""
    scale = np.abs(matrix).max().astype(np.float32) / np.float32(448)
    values = (matrix / scale).astype(FP8)
    parts = {"weight": values, "weight_scale": np.array(scale), "input_scale": np.ones((), "f4")}
    return parts, values.astype(np.float32) * scale


def fp8_blocks(matrix: np.ndarray) -> tuple[Tensors, np.ndarray]:
    """The last block of a row or column may be smaller."""
    height, width = BLOCK
    num_rows, num_columns = matrix.shape
    scales = np.empty((-(-num_rows // height), -(-num_columns // width)), np.float32)
    values, meant = np.empty(matrix.shape, FP8), np.empty(matrix.shape, np.float32)
    for (i, j), _ in np.ndenumerate(scales):
        block = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
        scales[i, j] = np.abs(matrix[block]).max() / 448
        values[block] = (matrix[block] / scales[i, j]).astype(FP8)
        meant[block] = values[block].astype(np.float32) * scales[i, j]
    return {"weight": values, "weight_scale_inv": scales}, meant


def compressed(layout: str, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, "quantization_status": "compressed",
    }  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
CASES: dict[str, tuple[dict[str, Any], Packer, str]] = {
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
        awq,
        "AWQ 4 bit, group 16, de-quantised to float32",
    ),
    "gptq-4": (
        GPTQ,
        gptq(4, act_order=False),
        "GPTQ 4 bit, group 16, de-quantised to float32",
    ),
    "gptq-4-act-order": (
        {**GPTQ, "desc_act": True},
        gptq(4, act_order=True),
        "GPTQ 4 bit, group 16, act-order, de-quantised to float32",
    ),
    "gptq-8": (
        {**GPTQ, "bits": 8},
        gptq(8, act_order=False),
        "GPTQ 8 bit, group 16, de-quantised to float32",
    ),
    "ct-int8": (
        compressed("int-quantized", TOKEN, num_bits=8, type="int", strategy="channel"),
        int8,
        "compressed-tensors int8 (int-quantized), one scale per output, de-quantised to float32; "
        "activations are float32 too, not int8",
    ),
    "ct-int4": (
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
        int4,
        "compressed-tensors int4 (pack-quantized), group 16, de-quantised to float32",
    ),
    "ct-fp8": (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        fp8,
        "compressed-tensors fp8 (float-quantized), one scale per output, de-quantised to float32",
    ),
    "fp8-tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        fp8_tensor,
        "fp8, one scale per tensor, de-quantised to float32; activations are float32 too, not fp8",
    ),
    "fp8-block": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
        fp8_blocks,
        "fp8, blocks 16x32, de-quantised to float32; activations are float32 too, not fp8",
    ),
}
"""By case: quantization_config, the packer, and what a user is told of such weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A tiny Llama: its quantization_config, its tensors, and the float weights they stand for."""

    config: dict[str, Any]
    tensors: Tensors
    floats: Tensors

    def write(self, folder: Path, **changes: Any) -> Path:
        """A whole model folder; `changes` are entries of config.json."""
        changes = {"quantization_config": self.config, **changes}
        write_tiny_model(folder, weights=self.floats, **changes)
        (folder / "model.safetensors").write_bytes(stored(self.tensors))
        return folder


def checkpoint(case: str) -> Checkpoint:
    """The layers' matrices packed; embedding, head and norms in float."""
    config, pack, _ = CASES[case]
    tensors, floats = {}, {}
    for name, array in tiny_weights(TINY_CONFIG).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = floats[name] = array
            continue
        parts, meant = pack(array)
        floats[name] = np.ascontiguousarray(meant, np.float32)
        layer = name.removesuffix(".weight")
        tensors |= {f"{layer}.{part}": value for part, value in parts.items()}
    return Checkpoint(config, tensors, floats)


def stored(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file, of any dtype; the library's own NumPy writer knows no fp8."""
    header, data = {}, b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = entry(NAMES[array.dtype], list(array.shape), len(data), end)
        data += array.tobytes()
    return raw_safetensors(json.dumps(header), data)
