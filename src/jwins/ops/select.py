"""Choosing coefficients: top-k with a total order, so that every backend chooses the same positions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jwins.errors import UsageError

__all__ = ["count_of", "largest_k"]


def count_of(fraction: float, size: int) -> int:
    """``round(fraction * size)``, the number of coefficients a fraction stands for.

    Args:
        fraction: in [0, 1].
        size: how many there are.

    >>> count_of(0.2, 328)
    66
    """
    if not 0.0 <= fraction <= 1.0:
        raise UsageError(f"fraction = {fraction}: expected a fraction in [0, 1]")
    return round(fraction * size)


def largest_k(score: Tensor, k: int) -> Tensor:
    """Positions of the k largest ``|score|``, increasing; ties go to the lower position.

    torch.topk leaves the order of ties open, and every engine must choose the same positions. So the k-th
    largest magnitude is found first (a partition, not a sort), everything above it is taken, and equals
    are filled in from the lowest position.

    Args:
        score: (n,) float32, finite, on any device.
        k: how many to keep, 0 <= k <= n.

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
    if score.device.type == "cpu":
        # numpy's partition of plain floats is vectorised and several times faster than torch.topk here.
        magnitude = np.abs(score.detach().numpy())
        if n and not np.isfinite(magnitude.max()):  # max() propagates NaN
            raise UsageError("a score is not finite")
        if k == 0 or k == n:
            return torch.arange(k, device="cpu")
        # Weights that no batch touched have the score 0, and a partition is many times slower on equal numbers.
        positive = magnitude if np.all(magnitude) else magnitude[magnitude > 0]
        smallest = np.partition(positive, len(positive) - k)[len(positive) - k] if k <= len(positive) else 0.0
        above = magnitude > smallest
        missing = k - int(np.count_nonzero(above))
        above[np.flatnonzero(magnitude == smallest)[:missing]] = True
        return torch.from_numpy(np.flatnonzero(above))
    magnitude_t = score.detach().abs()
    if not bool(torch.isfinite(magnitude_t).all()):
        raise UsageError("a score is not finite")
    if k == 0 or k == n:
        return torch.arange(k, device=score.device)
    smallest_t = torch.topk(magnitude_t, k, sorted=True).values[-1]
    chosen = magnitude_t > smallest_t
    ties = torch.nonzero(magnitude_t == smallest_t).squeeze(-1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return torch.nonzero(chosen).squeeze(-1)
