"""Host memory for weights: aligned, so that a CPU device takes it over, and never a mapped file."""

import numpy as np
from numpy.typing import DTypeLike

ALIGNMENT = 64
"""Bytes; a CPU device copies an array that begins at another address."""


def aligned(size: int, dtype: DTypeLike) -> np.ndarray:
    """`size` elements, not set."""
    itemsize = np.dtype(dtype).itemsize
    memory = np.empty(size * itemsize + ALIGNMENT, np.uint8)
    skipped = -memory.ctypes.data % ALIGNMENT
    return memory[skipped : skipped + size * itemsize].view(dtype)


def owned(array: np.ndarray) -> np.ndarray:
    """`array`, or a copy where it is a mapped file's memory, laid out as a device would keep it.

    A CPU device takes over such an array without a copy, `may_alias=False` or not; the weights
    would then change with the file.
    """
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if owner.flags.owndata or not array.flags.c_contiguous:
        return array
    copy = aligned(array.size, array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
