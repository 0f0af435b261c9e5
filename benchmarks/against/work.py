"""The work that all contestants do: a GN-LeNet's local steps on each node's own images. Imports torch alone."""

from __future__ import annotations

import argparse
import ctypes
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS, BATCH, LEARNING_RATE = 3, 8, 0.01


@dataclass(frozen=True)
class Work:
    """Arguments of a contestant's process.

    Attributes:
        inputs: (n, 3, 32, 32) uint8, images of all nodes.
        targets: (n,) int64.
        nodes: number of nodes; node i has the images i, i + nodes, i + 2 nodes and so on.
        rounds: number of rounds.
    """

    inputs: Tensor
    targets: Tensor
    nodes: int
    rounds: int

    def of(self, node: int) -> tuple[Tensor, Tensor]:
        """Return a node's images in channels-last memory, and its targets."""
        inputs = self.inputs[node :: self.nodes].contiguous(memory_format=torch.channels_last)
        return inputs, self.targets[node :: self.nodes].contiguous()


def parsed(words: list[str] | None = None) -> Work:
    """Return the work of the command line: folder, nodes, rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("nodes", type=int)
    parser.add_argument("rounds", type=int)
    given = parser.parse_args(words)
    arrays = (torch.from_numpy(np.load(given.folder / f"{name}.npy")) for name in ("inputs", "targets"))
    torch.set_num_threads(1)
    return Work(*arrays, given.nodes, given.rounds)


def model() -> nn.Module:
    """Make the GN-LeNet of :class:`jwins.tasks.cifar10.Cifar10`."""
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 5, padding=2), nn.GroupNorm(2, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 5, padding=2), nn.GroupNorm(2, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.GroupNorm(2, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 10)),
    )


def batches(count: int) -> Iterator[Tensor]:
    """Return the numbers of a node's images in random batches, over and over."""
    return itertools.cycle(torch.randperm(count).split(BATCH)[: count // BATCH])


def loss(of: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a batch of images."""
    return functional.cross_entropy(of(inputs.float() / 127.5 - 1.0), targets)


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks, as jwins does; without, activations cost a quarter more."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-3, 2**30), mallopt(-1, 2**30)


def main() -> None:
    """The floor: a model and an optimizer for each node, trained by two threads, which exchange nothing."""
    work = parsed()
    keep_freed_memory()
    data = [work.of(node) for node in range(work.nodes)]
    models = [model() for _ in data]
    optimizers = [torch.optim.SGD(of.parameters(), lr=LEARNING_RATE) for of in models]
    streams = [batches(len(targets)) for _, targets in data]

    def train(node: int) -> None:
        torch.set_num_threads(1)
        inputs, targets = data[node]
        for _ in range(STEPS):
            at = next(streams[node])
            loss(models[node], inputs[at], targets[at]).backward()
            optimizers[node].step()
            optimizers[node].zero_grad()

    with ThreadPoolExecutor(2) as pool:
        for _ in range(work.rounds):
            list(pool.map(train, range(work.nodes)))


if __name__ == "__main__":
    main()
