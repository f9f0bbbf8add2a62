"""PackedReader: a quantised safetensors checkpoint, its layers as they are packed or as floats.

Which tensors make up a layer, and what they stand for, jaxinfer/quant alone knows.
"""

from collections.abc import Mapping

import numpy as np

from jaxinfer.params import TensorInfo
from jaxinfer.quant import kept
from jaxinfer.quant.checkpoint import PackedCheckpoint, open_packed
from jaxinfer.quant.config import CheckpointFormat
from jaxinfer.quant.packed import PackedWeight
from jaxinfer.weights.memory import owned
from jaxinfer.weights.safetensors import SafetensorsReader


class PackedReader:
    """A checkpoint under Hugging Face names and shapes; `read` gives packed weights [N, K] as
    float32, `read_packed` as they are packed: it is a kept.PackedTensors.

    Opening checks headers, and raises ModelFormatError for tensors that contradict each other or
    `fmt`.
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

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        """(N, K) of a packed weight, None for a tensor that is not packed."""
        if name not in self.checkpoint.packed:
            return None
        num_outputs, num_inputs = self.infos[name].shape
        return num_outputs, num_inputs

    def kept(self, name: str) -> kept.Kept | str:
        """How a packed weight can be held, or why it cannot; reads the groups of its inputs."""
        groups = self.checkpoint.group_indices(name)
        return kept.of_checkpoint(self.checkpoint.format, self.infos[name].shape[1], groups)

    def read_packed(self, name: str) -> PackedWeight:
        """A packed weight as it is packed. ModelFormatError for a damaged one."""
        return self.checkpoint.read(name)

    def arrange(self, name: str, array: np.ndarray) -> np.ndarray:
        """`array` [N, K]: Hugging Face's layout is that of the packed matrix."""
        del name
        return array

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
