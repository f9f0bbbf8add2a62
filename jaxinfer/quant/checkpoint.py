"""`open_packed`: the tensors of a quantised checkpoint, gathered into linear layers.

A layer `x` is stored as `x.qweight`, `x.scales` and so on; here it is seen as `x.weight`, under
its Hugging Face shape [N, K], and read as a `PackedWeight`. Tensors that no format's parts name
(norms, embeddings, biases, layers left in float) are as before.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxinfer.errors import ModelFormatError
from jaxinfer.params import TensorInfo
from jaxinfer.quant import awq, compressed_tensors, fp8_blocks, gptq
from jaxinfer.quant.config import CheckpointFormat
from jaxinfer.quant.packed import PackedWeight, StoredModule, group_indices

logger = logging.getLogger(__name__)

_READERS: dict[str, tuple[Any, Mapping[str, bool]]] = {
    "gemm": (awq, awq.PARTS),
    "gptq": (gptq, gptq.PARTS),
    "gptq_v2": (gptq, gptq.PARTS),
    "pack-quantized": (compressed_tensors, compressed_tensors.PARTS_PACKED),
    "int-quantized": (compressed_tensors, compressed_tensors.PARTS_PLAIN),
    "float-quantized": (compressed_tensors, compressed_tensors.PARTS_PLAIN),
    "fp8": (fp8_blocks, fp8_blocks.PARTS),
}
# static scales of activations and of the KV cache, which weights do not depend on
NOT_WEIGHTS = ("input_scale", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale")
NOT_WEIGHTS += ("input_zero_point", "output_zero_point", "k_zero_point", "v_zero_point")
_PACKED_DTYPES = ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class PackedCheckpoint:
    """A quantised checkpoint whose headers were found consistent.

    `infos` has every weight under its Hugging Face name and shape [N, K]; the dtype of a packed one
    is its method ("awq"). `packed` are the names that `read` takes; every other name is read as
    before. `left_out` are tensors that are no weights (static activation scales).
    """

    format: CheckpointFormat
    infos: Mapping[str, TensorInfo]
    packed: Mapping[str, StoredModule]
    left_out: tuple[str, ...] = field(default=())

    def read(self, name: str) -> PackedWeight:
        """Unpack the weight `name`, one of `packed`; ModelFormatError naming the tensor."""
        return _READERS[self.format.layout][0].read(self.packed[name], self.format)

    def group_indices(self, name: str) -> np.ndarray | None:
        """The group of each input of `name`, int32 [K]; None where they are in order."""
        num_inputs = self.infos[name].shape[1]
        return group_indices(self.packed[name], num_inputs, self.format.group_size)


def open_packed(
    infos: Mapping[str, TensorInfo],
    fmt: CheckpointFormat,
    load: Callable[[str], np.ndarray],
    path: object = None,
) -> PackedCheckpoint:
    """Gather the tensors `infos` by layer and check every header against `fmt`.

    `load` reads a tensor by its stored name, as it is stored; here it is called only for the few
    bytes of `weight_shape`. Raises ModelFormatError for a layer with parts missing, of wrong shape
    or dtype, or stored twice, and if no layer is packed at all.
    """
    reader, parts = _READERS[fmt.layout]
    layers: dict[str, dict[str, TensorInfo]] = {}
    seen: dict[str, TensorInfo] = {}
    left_out = static_scales(infos, path)
    for name, info in infos.items():
        layer, _, part = name.rpartition(".")
        if part in NOT_WEIGHTS:
            continue
        if part in parts and not (part == "weight" and info.dtype not in _PACKED_DTYPES):
            layers.setdefault(layer, {})[part] = info
        else:
            seen[name] = info
    packed = {}
    for layer, found in layers.items():
        stored = StoredModule(layer, found, _loader(layer, load), path)
        if f"{layer}.weight" in seen:
            stored.fail(
                "weight",
                f"is there in float beside {next(iter(found))!r}: which one holds? Save the "
                "checkpoint again",
            )
        for part, needed in parts.items():
            if needed and part not in found:
                stored.fail(
                    part,
                    f"is missing beside {next(iter(found))!r}; download every file of the "
                    "checkpoint",
                )
        num_rows, num_columns = reader.logical_shape(stored, fmt)
        packed[f"{layer}.weight"] = stored
        seen[f"{layer}.weight"] = TensorInfo((num_columns, num_rows), fmt.method)
    if not packed:
        raise ModelFormatError(
            f"{path}: quantization_config says {fmt.method} ({fmt.layout}), but no tensor is "
            f"packed so (none is named *.{next(iter(parts))} with the dtype that it has); remove "
            "quantization_config from config.json if the weights are float",
            path=path,
        )
    return PackedCheckpoint(fmt, seen, packed, left_out)


def static_scales(infos: Mapping[str, TensorInfo], path: object) -> tuple[str, ...]:
    """Tensors that are no weights, but static scales; a warning says that they are left out."""
    names = tuple(name for name in infos if name.rpartition(".")[2] in NOT_WEIGHTS)
    if names:
        logger.warning(
            "%s: %d static scales of activations or of the KV cache are left out (%s, ...): here "
            "neither is quantised with them",
            path,
            len(names),
            names[0],
        )
    return names


def _loader(layer: str, load: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    return lambda part: load(f"{layer}.{part}")
