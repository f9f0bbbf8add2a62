"""PackedReader: a quantised safetensors checkpoint, its layers de-quantised one at a time.

Which tensors make up a layer, and what they stand for, jaxinfer/quant alone knows.
"""

from collections.abc import Mapping

import numpy as np

from jaxinfer.params import TensorInfo
from jaxinfer.quant.checkpoint import PackedCheckpoint, open_packed
from jaxinfer.quant.config import CheckpointFormat
from jaxinfer.weights.memory import owned
from jaxinfer.weights.safetensors import SafetensorsReader


class PackedReader:
    """A checkpoint under Hugging Face names and shapes; packed weights [N, K] come as float32.

    `checkpoint` has them as they are packed. Opening checks headers, and raises ModelFormatError
    for tensors that contradict each other or `fmt`.
    """

    def __init__(self, stored: SafetensorsReader, fmt: CheckpointFormat, path: object):
        self._stored = stored
        # A part may be kept for as long as its weight: no view of a file, which may change.
        self.checkpoint: PackedCheckpoint = open_packed(
            stored.infos, fmt, lambda name: owned(stored.read(name)), path
        )
        self.infos: Mapping[str, TensorInfo] = self.checkpoint.infos

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` in its Hugging Face shape and layout; exactly what a packed one means."""
        if name in self.checkpoint.packed:
            return self.checkpoint.read(name).dequantize().T
        return self._stored.read(name)

    def zero_biases(self) -> tuple[str, ...]:
        """Biases of packed layers that are all zeros, and so may be left out.

        Some packers of GPTQ write one for every layer, whether the model has a bias there or not.
        """
        names = (f"{name.removesuffix('weight')}bias" for name in self.checkpoint.packed)
        return tuple(
            name for name in names if name in self.infos and not self._stored.read(name).any()
        )

    def close(self) -> None:
        """Nothing to do: a tensor's mapping goes with its array."""
