"""Speed of local training, against plain PyTorch loops that take the same steps.

Each ratio comes from one run in which the contestants take turns; medians are compared. From the root:

    python benchmarks/training.py [--nodes 96] [--repetitions 5]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from jwins.tasks.base import Dataset, Task
from jwins.training.batches import batch_indices
from jwins.training.model_traits import Batching
from jwins.training.optimizer import Optimizer
from jwins.training.trainer import Trainer

LOCAL_STEPS = 3
BATCH_SIZE = 8
LEARNING_RATE = 0.01
SAMPLES_PER_NODE = 512
POOL = 4096
SEED = 1


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what was compared.
        plain_ms: median of the plain loop for one round of all nodes.
        jwins_ms: median of the trainer for the same.
        ratio: plain / jwins, so above 1 the trainer is faster.
        target: what the ratio has to reach.
    """

    name: str
    plain_ms: float
    jwins_ms: float
    ratio: float
    target: float


class GroupNormLeNet(nn.Module):
    """The CIFAR-10 network of the paper: 89,834 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
        self.norm1 = nn.GroupNorm(2, 32)
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.norm2 = nn.GroupNorm(2, 32)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.norm3 = nn.GroupNorm(2, 64)
        self.fc = nn.Linear(64 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.norm1(self.conv1(x))), 2)
        x = functional.max_pool2d(functional.relu(self.norm2(self.conv2(x))), 2)
        x = functional.max_pool2d(functional.relu(self.norm3(self.conv3(x))), 2)
        return self.fc(x.flatten(1))


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Synthetic(Task):
    """Random samples of ten classes, for any model."""

    name = "synthetic"

    def __init__(self, build: Callable[[], nn.Module], shape: Sequence[int], num_samples: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self._build = build
        self.train = Dataset(
            torch.randn(num_samples, *shape, generator=generator),
            torch.randint(10, (num_samples,), generator=generator),
        )
        self.test = Dataset(self.train.inputs[:64], self.train.targets[:64])

    def model(self) -> nn.Module:
        return self._build()


def synthetic_parts(num_nodes: int) -> list[np.ndarray]:
    """Samples of each node, from a pool that all share: speed does not depend on who owns what."""
    generator = np.random.default_rng(SEED)
    return [np.sort(generator.choice(POOL, SAMPLES_PER_NODE, replace=False)) for _ in range(num_nodes)]


class PlainLoop:
    """Train without this package: a module and an optimizer per node, one node after another."""

    def __init__(
        self, task: Task, parts: Sequence[np.ndarray], *, workers: int, intra_op: int, rounds: int
    ) -> None:
        self._task, self._intra_op = task, intra_op
        # Drawn beforehand: shuffling is not what is compared, and counts for the trainer only.
        self._batches = [
            [
                torch.from_numpy(
                    batch_indices(
                        part,
                        seed=SEED,
                        node=node,
                        round=number,
                        local_steps=LOCAL_STEPS,
                        batch_size=BATCH_SIZE,
                    )
                )
                for number in range(rounds)
            ]
            for node, part in enumerate(parts)
        ]
        torch.manual_seed(SEED)
        self._models = [task.model() for _ in parts]
        self._optimizers = [torch.optim.SGD(model.parameters(), lr=LEARNING_RATE) for model in self._models]
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None

    def round(self, number: int) -> None:
        torch.set_num_threads(self._intra_op)
        nodes = range(len(self._models))
        if self._pool is None:
            for node in nodes:
                self._train(node, number)
        else:
            list(self._pool.map(lambda node: self._train(node, number), nodes))
        torch.set_num_threads(1)

    def _train(self, node: int, number: int) -> None:
        model, optimizer = self._models[node], self._optimizers[node]
        index = self._batches[node][number]
        for step in range(LOCAL_STEPS):
            inputs, targets = self._task.train.inputs[index[step]], self._task.train.targets[index[step]]
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def alternate(contestants: Mapping[str, Callable[[int], object]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns; the first turn warms up and is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        names = list(contestants)
        for name in names if repetition % 2 else reversed(names):
            start = time.perf_counter()
            contestants[name](repetition)
            if repetition:
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def make_trainer(task: Task, parts: Sequence[np.ndarray], *, batching: Batching, threads: int) -> Trainer:
    return Trainer(
        task,
        parts,
        seed=SEED,
        local_steps=LOCAL_STEPS,
        batch_size=BATCH_SIZE,
        optimizer=Optimizer("sgd", {"lr": LEARNING_RATE}),
        batching=batching,
        device="cpu",
        threads=threads,
    )


def loop_rows(num_nodes: int = 96, repetitions: int = 5) -> list[Row]:
    """Local training of the GN-LeNet in a loop, two threads on both sides."""
    parts = synthetic_parts(num_nodes)
    task = Synthetic(GroupNormLeNet, (3, 32, 32), POOL)
    trainer = make_trainer(task, parts, batching="loop", threads=2)
    plain = {
        "two intra-op threads": PlainLoop(task, parts, workers=1, intra_op=2, rounds=repetitions + 1),
        "two workers": PlainLoop(task, parts, workers=2, intra_op=1, rounds=repetitions + 1),
    }
    medians = alternate(
        {
            "jwins": lambda r: trainer.train(dict.fromkeys(range(num_nodes), r)),
            **{name: loop.round for name, loop in plain.items()},
        },
        repetitions,
    )
    trainer.close()
    for loop in plain.values():
        loop.close()
    return [
        Row(
            f"GN-LeNet (89,834), {num_nodes} nodes, against a plain loop with {name}",
            medians[name],
            medians["jwins"],
            medians[name] / medians["jwins"],
            1 / 1.1,
        )
        for name in plain
    ]


def stacked_rows(num_nodes: int = 96, repetitions: int = 15) -> list[Row]:
    """Stacked training of two MLPs against a plain loop on one thread."""
    rows = []
    for widths, target in (((784, 64, 10), 2.5), ((64, 64, 10), 8.0)):
        parts = synthetic_parts(num_nodes)
        task = Synthetic(lambda widths=widths: mlp(*widths), widths[:1], POOL)
        trainer = make_trainer(task, parts, batching="stacked", threads=2)
        plain = PlainLoop(task, parts, workers=1, intra_op=1, rounds=repetitions + 1)
        medians = alternate(
            {
                "jwins": lambda r, trainer=trainer: trainer.train(dict.fromkeys(range(num_nodes), r)),
                "plain": plain.round,
            },
            repetitions,
        )
        trainer.close()
        rows.append(
            Row(
                f"MLP ({trainer.layout.size:,}), {num_nodes} nodes, stacked against a plain loop on one thread",
                medians["plain"],
                medians["jwins"],
                medians["plain"] / medians["jwins"],
                target,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    print(
        f"{LOCAL_STEPS} local steps, batch {BATCH_SIZE}; medians of {arguments.repetitions} alternating rounds"
    )
    for row in loop_rows(arguments.nodes, arguments.repetitions) + stacked_rows(
        arguments.nodes, 3 * arguments.repetitions
    ):
        print(
            f"{row.name}: plain {row.plain_ms:.1f} ms, jwins {row.jwins_ms:.1f} ms, "
            f"ratio {row.ratio:.2f} (target {row.target:.2f})"
        )


if __name__ == "__main__":
    main()
