"""Choice of vectors for the compiled kernels, and arrays of tensors for them."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from torch import Tensor

KERNELS_FROM = 1 << 15
"""Length of vectors from which the kernels handle them at once."""
LOADED_KERNELS_FROM = 1 << 10
"""Length from which they do so when :data:`LOAD_AFTER` numbers have been handled without them."""
LOAD_AFTER = 1 << 25
"""Numbers of shorter vectors that torch, numpy and PyWavelets handle first, in this process.

A process takes a second to load compiled loops, and the first one on a machine twelve seconds to compile them.
A short run saves less than that; a long one loses at most as much again before it begins to save.
"""
_handled = 0


def kernels_pay(vector: Tensor) -> bool:
    """Return whether the kernels handle a vector: it must be on the CPU and long enough.

    Libraries handle other vectors, with the same bits on the CPU. Only the length of the last dimension
    counts, so single vectors and rows of a matrix take the same path.

    Args:
        vector: (..., n).
    """
    global _handled
    length = vector.shape[-1]
    if vector.device.type != "cpu" or length < min(KERNELS_FROM, LOADED_KERNELS_FROM):
        return False
    if length >= KERNELS_FROM or _handled >= LOAD_AFTER:
        return True
    _handled += vector.numel()
    return False


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """Return the contiguous memory of a tensor on the CPU; copy it only if it is not contiguous."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor if tensor.is_contiguous() else tensor.contiguous()).numpy()
