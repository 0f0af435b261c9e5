"""Samples of single nodes: changed copies of their share of the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from jwins.rng import stream
from jwins.tasks.base import Dataset, Task


class LocalChange(Protocol):
    """Protocol of a change of one node's samples; a pure function."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the same shapes and types; the arguments must not be changed."""
        ...


@dataclass(frozen=True, slots=True)
class FlippedLabels:
    """Label c becomes C - 1 - c."""

    num_labels: int

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the changed inputs and targets."""
        return inputs, self.num_labels - 1 - targets


@dataclass(frozen=True, slots=True)
class NoisyLabels:
    """Some labels are replaced by one of the other labels, each as likely as any other."""

    num_labels: int
    fraction: float
    seed: int
    node: int

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the changed inputs and targets."""
        rng = stream(self.seed, "label noise", node=self.node)
        chosen = torch.from_numpy(rng.permutation(len(targets))[: round(self.fraction * len(targets))])
        by = torch.from_numpy(rng.integers(1, self.num_labels, len(chosen))).to(targets.dtype)
        noisy = targets.clone()
        noisy[chosen] = (targets[chosen] + by) % self.num_labels
        return inputs, noisy


@dataclass(frozen=True, slots=True)
class RotatedImages:
    """Images (n, H, W) or (n, C, H, W) are rotated about their centre, by bilinear interpolation.

    Corners that no pixel reaches are 0.
    """

    degrees: float

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the changed inputs and targets."""
        images = inputs.float().reshape(len(inputs), -1, *inputs.shape[-2:])
        height, width = images.shape[-2:]
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        # In units of half a side, so that pixels of oblong images stay square.
        turn = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
        grid = functional.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        rotated = functional.grid_sample(images, grid, align_corners=False)
        return _as(rotated.reshape(inputs.shape), inputs), targets


@dataclass(frozen=True, slots=True)
class NoisyInputs:
    """Addition of Gaussian noise to inputs."""

    sd: float
    seed: int
    node: int

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the changed inputs and targets."""
        noise = stream(self.seed, "input noise", node=self.node).standard_normal(inputs.shape, dtype=np.float32)
        return _as(inputs.float() + self.sd * torch.from_numpy(noise), inputs), targets


@dataclass(frozen=True, slots=True)
class Changes:
    """Several changes, one after the other."""

    each: tuple[LocalChange, ...]

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the changed inputs and targets."""
        for change in self.each:
            inputs, targets = change(inputs, targets)
        return inputs, targets


def _as(values: Tensor, like: Tensor) -> Tensor:
    """Convert values to the type of ``like``; bytes are rounded and limited to the range of ``like``."""
    if like.is_floating_point():
        return values.to(like.dtype)
    return values.round().clamp(float(like.min()), float(like.max())).to(like.dtype)


def with_local_data(
    task: Task, partition: Mapping[int, npt.NDArray[np.int64]], changes: Mapping[int, LocalChange]
) -> tuple[Task, dict[int, npt.NDArray[np.int64]]]:
    """Append changed copies of some nodes' samples to the training data of a copy of the task.

    Args:
        task: the task; not changed.
        partition: training samples of the nodes that are held here.
        changes: changes by node; those of nodes that are not held here have no effect.

    Returns:
        A copy of the task that shares everything but ``train``, and for each node the samples to train on, in
        the order of the samples that they replace.
    """
    moved = dict(partition)
    changed = sorted(changes.keys() & moved.keys())
    if not changed:
        return task, moved
    inputs, targets, size = [task.train.inputs], [task.train.targets], len(task.train)
    for node in changed:
        own = torch.from_numpy(np.asarray(moved[node], dtype=np.int64))
        found = changes[node](task.train.inputs[own], task.train.targets[own])
        inputs.append(found[0])
        targets.append(found[1])
        moved[node] = np.arange(size, size + len(own))
        size += len(own)
    local = copy.copy(task)
    local.train = Dataset(torch.cat(inputs), torch.cat(targets))
    return local, moved
