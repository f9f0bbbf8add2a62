"""Weights kept as their checkpoint stores them: which can be, and the QuantArrays they become.

A checkpoint packs a tensor as a matrix [N, K]; the model's rules say which leaves that tensor
gives, and so which outputs of the matrix are the rows of each leaf's. Integers are moved and
repacked, never rounded, and no float copy of a weight is made.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.params import Rule, TensorInfo, by_tensor
from jaxinfer.quant.arrays import Kept, QuantArray
from jaxinfer.quant.config import CheckpointFormat
from jaxinfer.quant.gguf_blocks import KINDS
from jaxinfer.quant.packed import PackedWeight, signed
from jaxinfer.quant.schemes import Formats, by_kind, format_text
from pallas_kernels.quant_matmul import Format, pack_int4

_ACTIVATIONS: Mapping[tuple[str, int], Literal["int8", "float8_e4m3fn"]] = {
    ("int", 8): "int8",
    ("float", 8): "float8_e4m3fn",
}


class PackedTensors(Protocol):
    """What a reader tells of the tensors that its checkpoint packs, by Hugging Face name."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        """(N, K) of the packed matrix; None where the tensor is not packed."""
        ...

    def kept(self, name: str) -> Kept | str:
        """How the packed matrix can be held, or why it cannot."""
        ...

    def read_packed(self, name: str) -> PackedWeight:
        """The packed matrix. ModelFormatError for a damaged one."""
        ...

    def arrange(self, name: str, array: np.ndarray) -> np.ndarray:
        """An array over the packed matrix, [N, K], as the Hugging Face tensor has it."""
        ...


@dataclass(frozen=True)
class Plan:
    """`formats` of the leaves that are kept, and by reason the tensors that cannot be."""

    formats: Formats
    refused: dict[str, list[str]]


def of_checkpoint(fmt: CheckpointFormat, num_inputs: int, g_idx: np.ndarray | None) -> Kept | str:
    """How a matrix of a safetensors checkpoint is held, or why it cannot be.

    Activations are quantised where the checkpoint's author did so, if weights and activations have
    one dtype and the weights no groups; elsewhere they stay float.
    """
    if fmt.layout in ("fp8", "float-quantized"):
        dtype = "float8_e4m3fn"
    else:
        dtype = "int8" if fmt.bits == 8 else "int4"
    zero_points = dtype != "float8_e4m3fn" and not fmt.symmetric
    group = fmt.group_size if fmt.block is None else fmt.block[1]
    if zero_points and group is None:
        group = num_inputs
    if g_idx is not None and (np.bincount(g_idx) != group).any():
        return "its groups (g_idx) are of unequal size"
    theirs = fmt.activations
    activations = None if theirs is None else _ACTIVATIONS.get((theirs.kind, theirs.bits))
    if activations is None or activations != dtype or group is not None:
        activations = "float"
    try:
        format = Format(dtype, group, zero_points, activations)
    except ValueError as error:
        return str(error)
    return Kept(format, permuted=g_idx is not None)


def of_block(kind: str) -> Kept | str:
    """How a matrix of GGUF type `kind` is held, or why it cannot be."""
    if kind not in KINDS:
        return f"type {kind} (kept are {', '.join(KINDS)})"
    block = KINDS[kind]
    format = Format("int4" if block.bits == 4 else "int8", block.group_size)
    return Kept(format, offsets=block.has_offsets)


def plan(tensors: PackedTensors, rules: Sequence[Rule], config: ModelConfig) -> Plan:
    """Which leaves are kept; `assemble` reports tensors that are missing or of another shape."""
    formats, refused = [], {}
    for name, tensor_rules in by_tensor(tensors.infos, rules, config)[0].items():
        if tensors.packed_shape(name) is None or not all(r.contracted for r in tensor_rules):
            continue
        held = tensors.kept(name)
        if isinstance(held, Kept):
            held = _fitting(tensors, name, tensor_rules, config, held)
        if isinstance(held, str):
            refused.setdefault(held, []).append(name)
        elif held is not None:
            formats += [(rule.path, held) for rule in tensor_rules]
    return Plan(tuple(formats), refused)


def _fitting(
    tensors: PackedTensors, name: str, tensor_rules: Sequence[Rule], config: ModelConfig, held: Kept
) -> Kept | str | None:
    """`held`, why a leaf cannot be held so, or None where the tensor's shape is not the rules'."""
    for rule in tensor_rules:
        shape = rule.shape(config)
        try:
            order = output_order(tensors, name, rule, config)
            if math.prod(shape) != len(order) * math.prod(shape[axis] for axis in rule.contracted):
                return None
        except ValueError:
            return None
        try:
            QuantArray.of_shape(shape, rule.contracted, held)
        except ValueError as error:
            return str(error)
    return held


def output_order(tensors: PackedTensors, name: str, rule: Rule, config: ModelConfig) -> np.ndarray:
    """The output of the packed matrix that is each row of the leaf's matrix, int32 [rows].

    Found by sending the numbers of outputs and inputs through the transforms in place of weights;
    they are views without memory, but where a transform copies. Raises ValueError for a tensor of
    another shape than the rule's.
    """
    packed_shape = tensors.packed_shape(name)
    if packed_shape is None:
        raise AssertionError(f"{name} is not packed")
    num_outputs, num_inputs = packed_shape
    numbers = (
        np.arange(num_outputs, dtype=np.int32)[:, None],
        np.arange(num_inputs, dtype=np.int32),
    )
    places = []
    for number in numbers:
        leaf = rule.transform(tensors.arrange(name, np.broadcast_to(number, packed_shape)), config)
        kept = [axis for axis in range(leaf.ndim) if axis not in rule.contracted]
        num_columns = math.prod(leaf.shape[axis] for axis in rule.contracted)
        places.append(leaf.transpose(*kept, *rule.contracted).reshape(-1, num_columns))
    outputs, inputs = places
    if not (_rows_are_equal(inputs) and np.array_equal(inputs[0], numbers[1])):
        raise AssertionError(f"{rule.path}: a matrix of {name} whose inputs are in another order")
    if not _rows_are_equal(outputs.T):
        raise AssertionError(f"{rule.path}: a row of it is no output of {name}")
    return outputs[:, 0].copy()


def _rows_are_equal(array: np.ndarray) -> bool:
    return array.strides[0] == 0 or bool((array == array[:1]).all())


def hold(weight: PackedWeight, outputs: np.ndarray, leaf: QuantArray) -> QuantArray:
    """NumPy arrays of `leaf`'s shapes for the matrix with output outputs[i] of `weight` at row i.

    It stands for the very floats of `weight.dequantize()`. Unsigned values (GGUF's with offsets)
    are stored less 2**(bits-1), which the offsets make up for: one more rounding to float32, where
    a scale is so much smaller than its offset that the sum of both has more than 24 bits. The
    arrays are never memory of the checkpoint's files.
    """
    format = leaf.format
    values, offsets = weight.values.T[outputs], None
    scales = weight.scales[:, outputs // weight.columns].T
    if weight.offsets is not None:
        offsets = weight.offsets[:, outputs].T
    if values.dtype == np.uint8:
        middle = np.float32(1 << (weight.bits - 1))
        values = signed(values, weight.bits)
        offsets = scales * middle + (np.float32(0) if offsets is None else offsets)
    permutation = None
    if weight.g_idx is not None:
        permutation = np.argsort(weight.g_idx, kind="stable").astype(np.int32)
        values = values[:, permutation]
    zeros = None
    if weight.zeros is not None:
        zeros = np.ascontiguousarray(weight.zeros[:, outputs].T)
    elif format.zero_points:
        zeros = np.zeros(scales.shape, np.int8)
    if format.dtype == "int4":
        values = pack_int4(values, format.group_size or values.shape[1])
    return QuantArray(
        np.ascontiguousarray(values),
        np.ascontiguousarray(scales if format.group_size else scales[:, 0]),
        zeros,
        format,
        leaf.shape,
        leaf.contracted,
        None if offsets is None else np.ascontiguousarray(offsets),
        permutation,
    )


def describe(
    heading: str, formats: Formats, rules: Sequence[Rule], config: ModelConfig, dtype: str
) -> str:
    """`heading`, and for every kind of weight which leaves are of it; one line for each kind."""
    used: dict[str, Any] = dict(formats)
    kinds = {path: _kind(held) for path, held in used.items()}
    return "\n".join([heading, *by_kind(kinds, rules, config, dtype)])


def _kind(held: Kept) -> str:
    text = format_text(held.format)
    if held.offsets:
        text += " with offsets"
    return f"{text}, inputs permuted" if held.permuted else text
