"""Checkpoints in memory for the tests: tensors by name, their headers, and the recorded goldens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.params import TensorInfo
from jaxinfer.quant.checkpoint import PackedCheckpoint, open_packed
from jaxinfer.quant.config import CheckpointFormat, checkpoint_format
from jaxinfer.quant.packed import PackedWeight
from jaxinfer.weights.fields import Fields

GOLDENS = Path(__file__).parent / "goldens" / "formats.npz"
DTYPES = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LAYER = "model.layers.0.mlp.up_proj"


def format_of(config: Mapping[str, Any]) -> CheckpointFormat:
    """The format of this `quantization_config`."""
    fmt = checkpoint_format(Fields({"quantization_config": dict(config)}, "config.json"))
    assert fmt is not None
    return fmt


def opened(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> PackedCheckpoint:
    """The checkpoint of these tensors, by full name."""
    infos = {name: TensorInfo(a.shape, NAMES[a.dtype]) for name, a in tensors.items()}
    return open_packed(infos, format_of(config), tensors.__getitem__, "folder")


def read(config: Mapping[str, Any], parts: Mapping[str, np.ndarray]) -> PackedWeight:
    """The one layer LAYER of these parts, unpacked and found consistent."""
    checkpoint = opened(config, {f"{LAYER}.{part}": array for part, array in parts.items()})
    weight = checkpoint.read(f"{LAYER}.weight")
    weight.check_invariants()
    assert checkpoint.infos[f"{LAYER}.weight"].shape == weight.shape[::-1]
    return weight


def goldens() -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]]:
    """By case: quantization_config, the parts of a layer, and the matrix [K, N] they stand for."""
    cases: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], Any]] = {}
    with np.load(GOLDENS) as stored:
        for case, config in json.loads(str(stored["configs"])).items():
            parts = {}
            for key in stored.files:
                if key.startswith(f"{case}/"):
                    part, _, dtype = key.removeprefix(f"{case}/").partition("|")
                    parts[part] = stored[key].view(DTYPES[dtype])
            cases[case] = (config, parts, parts.pop("expected"))
    return cases
