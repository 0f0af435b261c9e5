"""Robust merges, which limit the influence of attackers among the neighbours, for full sharing.

With y_i the node's own model, y_j those of its n neighbours, and b the number of neighbours that may attack:

    clipped gossip   x_i = y_i + sum_j W_ij clip(y_j - y_i, tau),  clip(z, tau) = z min(1, tau / |z|)
    trimmed mean     of each parameter, the mean of y_i and all y_j without the b lowest and the b highest
    median           of each parameter, the median of y_i and all y_j

Clipped gossip preserves the mean over honest nodes where it does not clip. The other two use no mixing weights
and do not preserve the mean. If nodes hold different data, they cost accuracy even without attackers.

Sources: He, Karimireddy, Jaggi, "Byzantine-Robust Decentralized Learning via ClippedGossip", arXiv 2202.01545,
2022; Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jwins.validation import Within

RADIUS = Within("a distance", 0, open_low=True)
ATTACKERS = Within("a whole number of neighbours", 1)


class RobustMerge(Protocol):
    """Protocol of a merge of whole models. Implementations are frozen, picklable and printable."""

    def __call__(self, own: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return the merged model.

        Args:
            own: (P,) float32, the node's own model as its neighbours receive it; must not be changed.
            others: (P,) float32 each, those of the neighbours whose updates arrived; must not be changed.
            weights: mixing weight of each of them.
        """
        ...


@dataclass(frozen=True, slots=True)
class ClippedGossip:
    """Mix as full sharing does, with every difference clipped to a radius.

    Attributes:
        radius: largest distance that counts; None takes the distance of the (n - b)-th nearest of n neighbours.
        attackers: b, the number of neighbours that may attack.

    >>> merge = ClippedGossip(radius=1.0)
    >>> merge(torch.tensor([0.0]), [torch.tensor([0.5]), torch.tensor([100.0])], [0.25, 0.25])
    tensor([0.3750])
    """

    radius: float | None = None
    attackers: int = 1

    def __post_init__(self) -> None:
        if self.radius is not None:
            RADIUS.check("sharing.robust.radius", self.radius)
        ATTACKERS.check_whole("sharing.robust.attackers", self.attackers)

    def __call__(self, own: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return the merged model."""
        differences = [other.double() - own for other in others]
        distances = [float(difference.norm()) for difference in differences]
        change = torch.zeros_like(own, dtype=torch.float64)
        for difference, distance, weight in zip(differences, distances, weights, strict=True):
            radius = self._radius(distances) if self.radius is None else self.radius
            change.add_(difference, alpha=weight * (min(1.0, radius / distance) if distance > 0.0 else 0.0))
        return (own + change).to(own.dtype)

    def _radius(self, distances: Sequence[float]) -> float:
        count = len(distances) - self.attackers
        return sorted(distances)[count - 1] if count > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """Mean of each parameter without its lowest and highest values.

    Attributes:
        attackers: b, number of values left out on either side, or fewer so that at least one remains.

    >>> merge = TrimmedMean(attackers=1)
    >>> merge(torch.tensor([1.0]), [torch.tensor([2.0]), torch.tensor([99.0])], [0.25, 0.25])
    tensor([2.])
    """

    attackers: int = 1

    def __post_init__(self) -> None:
        ATTACKERS.check_whole("sharing.robust.attackers", self.attackers)

    def __call__(self, own: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return the merged model."""
        ordered = torch.stack([own, *others]).sort(dim=0).values
        cut = min(self.attackers, (len(ordered) - 1) // 2)
        return ordered[cut : len(ordered) - cut].mean(dim=0)


@dataclass(frozen=True, slots=True)
class CoordinateMedian:
    """Median of each parameter; of an even number of values the mean of the middle two.

    >>> merge = CoordinateMedian()
    >>> merge(torch.tensor([1.0]), [torch.tensor([3.0]), torch.tensor([-9.0])], [0.25, 0.25])
    tensor([1.])
    """

    def __call__(self, own: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return the merged model."""
        ordered = torch.stack([own, *others]).sort(dim=0).values
        high = len(ordered) // 2
        low = (len(ordered) - 1) // 2
        return ordered[high] if low == high else 0.5 * ordered[low] + 0.5 * ordered[high]


ROBUST_MERGES: Mapping[str, type[ClippedGossip | TrimmedMean | CoordinateMedian]] = {
    "clipped_gossip": ClippedGossip,
    "trimmed_mean": TrimmedMean,
    "median": CoordinateMedian,
}
"""Merges by ``sharing.robust.kind``."""
