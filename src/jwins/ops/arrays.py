"""Tensors as arrays for the kernels."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from torch import Tensor

__all__ = ["array", "on_cpu"]


def on_cpu(tensor: Tensor) -> bool:
    """Whether the kernels can work on a tensor; torch works on others."""
    return tensor.device.type == "cpu"


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """The memory of a tensor on the CPU, contiguous; a copy only where it is not."""
    return tensor.detach().contiguous().numpy()
