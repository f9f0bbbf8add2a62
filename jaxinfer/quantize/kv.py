"""Static scales of an fp8 KV cache: one for a layer's keys, one for its values.

A scale is the largest magnitude that the calibration text gives / 448, the largest e4m3 number, as
compressed-tensors has it. The weights go to the new folder as they are stored, quantised or not.
"""

import re

import numpy as np

from jaxinfer.quantize.calibrate import Statistics
from jaxinfer.weights import ModelSource
from jaxinfer.weights.safetensors import INDEX_NAME, QUANTISED, open_file, open_sharded

LARGEST = 448.0
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SCALES = (".k_scale", ".v_scale")

Tensors = dict[str, np.ndarray]


def scales(key_name: str, statistics: Statistics) -> Tensors:
    """k_scale and v_scale float32 [1] of the layer whose key projection is `key_name`."""
    attention = key_name.removesuffix(".weight").rpartition(".")[0]
    found = (statistics.largest_k, statistics.largest_v)
    return {
        attention + name: np.maximum(
            np.asarray(largest, np.float32).reshape(1) / np.float32(LARGEST),
            np.finfo(np.float32).tiny,
        )
        for name, largest in zip(_SCALES, found, strict=True)
    }


def stored(source: ModelSource, layer: int | None) -> Tensors:
    """The tensors of a layer, or (None) of none, of a quantised checkpoint, as they are stored.

    Scales of the KV cache that it had are left out.
    """
    index = source.path / INDEX_NAME
    if index.exists() and not (source.path / "model.safetensors").exists():
        reader = open_sharded(index, QUANTISED)
    else:
        reader = open_file(min(source.path.glob("*.safetensors")), QUANTISED)
    wanted = None if layer is None else str(layer)
    out = {}
    for name in reader.infos:
        match = _LAYER.search(name)
        if (match and match[1]) == wanted and not name.endswith(_SCALES):
            out[name] = np.array(reader.read(name))
    return out
