"""A task of one's own: which arm of two intertwined spirals does a point belong to?"""

import torch
from torch import Tensor, nn

from jwins.tasks import Dataset, Task


class Spirals(Task):
    """Points in the plane, two classes that no straight line separates."""

    def __init__(self, *, points: int = 4000, noise: float = 0.03) -> None:
        self.name = "spirals"
        self.train = spirals(points, noise, seed=1)
        self.test = spirals(1000, noise, seed=2)

    def model(self) -> nn.Module:
        """Two hidden layers of 64: 4,482 parameters."""
        return nn.Sequential(
            *(nn.Linear(2, 64), nn.Tanh()),
            *(nn.Linear(64, 64), nn.Tanh()),
            nn.Linear(64, 2),
        )

    def prepare(self, inputs: Tensor) -> Tensor:
        """Convert stored inputs to the model's inputs."""
        return 2.0 * inputs


def spirals(n: int, noise: float, seed: int) -> Dataset:
    """Draw n points, half of them on either arm."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(2, (n,), generator=generator)
    radius = torch.rand(n, generator=generator).sqrt()
    angle = 1.5 * torch.pi * radius + torch.pi * arm
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return Dataset(points + noise * torch.randn(n, 2, generator=generator), arm)
