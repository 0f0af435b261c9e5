"""Choosing coefficients: top-k with a total order, so that every backend chooses the same positions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jwins.errors import UsageError
from jwins.kernels import select as kernels
from jwins.ops.arrays import array, kernels_pay


def count_of(fraction: float, size: int) -> int:
    """Return ``round(fraction * size)``, the number of coefficients of a fraction.

    Args:
        fraction: in [0, 1].
        size: number of coefficients.

    >>> count_of(0.2, 328)
    66
    """
    if not 0.0 <= fraction <= 1.0:
        raise UsageError(f"fraction = {fraction}: expected a fraction in [0, 1]")
    return round(fraction * size)


def largest_k(score: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest ``|score|``, increasing; ties go to the lower position.

    torch.topk does not define the order of ties, but every engine must choose the same positions. So the
    function finds the k-th largest magnitude, takes all larger ones, and then equal ones from the lowest
    position on.

    Args:
        score: (n,) float32, finite, on any device.
        k: number of positions, 0 <= k <= n.

    Returns:
        (k,) int64, strictly increasing, on the device of ``score``.

    Raises:
        UsageError: k out of range, or a score is not finite.

    >>> largest_k(torch.tensor([1.0, -3.0, 2.0]), 2)
    tensor([1, 2])
    >>> largest_k(torch.tensor([2.0, -2.0, 2.0]), 2)
    tensor([0, 1])
    """
    n = len(score)
    if not 0 <= k <= n:
        raise UsageError(f"k = {k}: expected 0 <= k <= {n}")
    if kernels_pay(score):
        positions = np.empty(max(k, 1) + 1, dtype=np.int64)
        if n and not kernels.largest_k(_bits(score), positions):
            raise UsageError("a score is not finite")
        return torch.from_numpy(positions[:k])
    if score.device.type == "cpu":
        return _largest_of_few(np.abs(score.detach().numpy()), k)
    magnitude = score.detach().abs()
    if not bool(torch.isfinite(magnitude).all()):
        raise UsageError("a score is not finite")
    if k == 0 or k == n:
        return torch.arange(k, device=score.device)
    smallest = torch.topk(magnitude, k, sorted=True).values[-1]
    chosen = magnitude > smallest
    ties = torch.nonzero(magnitude == smallest).squeeze(-1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return torch.nonzero(chosen).squeeze(-1)


def overwritten(vector: Tensor, positions: Tensor, source: Tensor) -> Tensor:
    """Return ``vector`` (C,) with the entries of ``source`` (C,) at ``positions`` (k,), which are in range."""
    if not kernels_pay(vector):
        return vector.index_copy(0, positions, source.index_select(0, positions))
    after = vector.clone()
    kernels.copy_some(array(source), array(positions), array(after))
    return after


def _largest_of_few(magnitude: npt.NDArray[np.float32], k: int) -> Tensor:
    if len(magnitude) and not np.isfinite(magnitude.max()):  # max() propagates NaN
        raise UsageError("a score is not finite")
    if k in (0, len(magnitude)):
        return torch.arange(k, device="cpu")
    smallest = np.partition(magnitude, len(magnitude) - k)[len(magnitude) - k]
    chosen = magnitude > smallest
    missing = k - int(np.count_nonzero(chosen))
    chosen[np.flatnonzero(magnitude == smallest)[:missing]] = True
    return torch.from_numpy(np.flatnonzero(chosen))


def _bits(score: Tensor) -> npt.NDArray[np.uint32]:
    return score.detach().to(torch.float32).contiguous().numpy().view(np.uint32)
