"""Choice of vectors for the compiled kernels, and arrays of tensors for them."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from torch import Tensor

KERNELS_FROM = 1 << 15
"""Minimum length of vectors for the kernels. Torch, numpy and PyWavelets handle shorter ones.

A process takes a second to load compiled loops, and the first one on a machine twelve seconds to compile them.
With short vectors a run of some hundred rounds saves less time than that.
"""


def kernels_pay(vector: Tensor) -> bool:
    """Return whether the kernels handle a vector: it must be on the CPU and long enough.

    Libraries handle other vectors, with the same bits on the CPU. Only the length of the last dimension
    counts, so single vectors and rows of a matrix take the same path.

    Args:
        vector: (..., n).
    """
    return vector.device.type == "cpu" and vector.shape[-1] >= KERNELS_FROM


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """Return the contiguous memory of a tensor on the CPU; copy it only if it is not contiguous."""
    return tensor.detach().contiguous().numpy()
