"""A task of many parameters and little work, for benchmarks/namespaces.py."""

from __future__ import annotations

import torch
from torch import nn

from jwins.tasks import Dataset, Task


class Wide(Task):
    """Random points for one linear layer: with batches of one, a step costs next to nothing.

    Args:
        width: inputs and classes; there are ``width * (width + 1)`` parameters.
        points: training samples.
    """

    def __init__(self, *, width: int = 1024, points: int = 64) -> None:
        self.name = "wide"
        self.width = width
        self.train = draw(points, width, seed=1)
        self.test = draw(1, width, seed=2)

    def model(self) -> nn.Module:
        """One layer."""
        return nn.Linear(self.width, self.width)


def draw(count: int, width: int, seed: int) -> Dataset:
    """Points and classes that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, width, generator=generator) / width**0.5
    return Dataset(points, torch.randint(width, (count,), generator=generator))
