"""Which vectors the kernels work on, and tensors as arrays for them."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from torch import Tensor

__all__ = ["KERNELS_FROM", "array", "kernels_pay"]

KERNELS_FROM = 1 << 15
"""Vectors of fewer numbers are left to torch, numpy and PyWavelets.

A process spends a second to load compiled loops, and the first one of a machine twelve seconds to compile them.
With short vectors a run of some hundred rounds does not gain as much.
"""


def kernels_pay(vector: Tensor) -> bool:
    """Whether the kernels work on a vector: one on the CPU that is long enough.

    Libraries work on others, with the same bits on the CPU. Only the length of the last dimension counts, so
    vectors one by one and rows of a matrix take the same path.

    Args:
        vector: (..., n).
    """
    return vector.device.type == "cpu" and vector.shape[-1] >= KERNELS_FROM


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """The memory of a tensor on the CPU, contiguous; a copy only where it is not."""
    return tensor.detach().contiguous().numpy()
