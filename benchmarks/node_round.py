"""Cost of a round for one node between machines: its training, and everything that sharing adds.

Five nodes that all hear each other train CIFAR-10's GN-LeNet; of one of them every step is timed: 3 local steps
of 8 images, share, encode once, decode what its four neighbours sent, merge. All on one thread; in a simulation
frames are decoded once for all who hear them. Medians over the rounds.

    python -m benchmarks.node_round [--data FOLDER] [--rounds 60]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.report import machine, table, verdict
from benchmarks.training import POOL, GroupNormLeNet, Synthetic, make_trainer, synthetic_parts
from jwins.rng import RoundContext
from jwins.sharing import Sharing, choco, closed_loop, full, jwins, stateless
from jwins.sharing.update import Received
from jwins.tasks.base import Task
from jwins.tasks.cifar10 import Cifar10
from jwins.wire.codec import codec
from jwins.wire.frame import Frame, Wire

NODES = range(5)
WEIGHT = 1 / len(NODES)
WARM_UP = 5
MOST = 0.25
"""Of the time of training."""
STEPS = ("train", "share", "encode", "decode", "merge")

T = TypeVar("T")


class Stopwatch:
    """Seconds of each step of node 0, round by round."""

    def __init__(self) -> None:
        self.taken: dict[str, list[float]] = defaultdict(list)

    def __call__(self, step: str, node: int, work: Callable[..., T], *arguments: object) -> T:
        started = time.perf_counter()
        done = work(*arguments)
        if node == 0:
            self.taken[step].append(time.perf_counter() - started)
        return done


def measured(task: Task, parts: Sequence[np.ndarray], sharing: Sharing[Any], rounds: int) -> dict[str, float]:
    """Median milliseconds of each step of node 0."""
    trainer = make_trainer(task, parts, batching="loop", threads=1)
    wire = Wire(codec("pco"), b"\0" * 8, sharing.update_dim(trainer.layout.size))
    states = {i: sharing.init(trainer.row(i)) for i in NODES}
    frames = dict.fromkeys(NODES, b"")
    watch = Stopwatch()
    for number in range(WARM_UP + rounds):
        contexts = {
            i: RoundContext(1, i, number, {j: WEIGHT for j in NODES if j != i}, len(frames[i])) for i in NODES
        }
        for i in NODES:
            row, context = trainer.row(i), contexts[i]
            watch("train", i, trainer.train, {i: number})
            update, states[i] = watch("share", i, sharing.share, states[i], row, context)
            frames[i] = watch("encode", i, wire.pack, Frame(i, number, update)).data
        for i in NODES:
            row, context = trainer.row(i), contexts[i]
            heard = watch("decode", i, unpacked, wire, [frames[j] for j in context.weights])
            merged, states[i] = watch("merge", i, sharing.merge, states[i], row, heard, context)
            row.copy_(merged)
    trainer.close()
    return {step: 1e3 * statistics.median(watch.taken[step][WARM_UP:]) for step in STEPS}


def unpacked(wire: Wire, frames: Sequence[bytes]) -> list[Received]:
    """Frames of the neighbours."""
    found = [wire.unpack(frame) for frame in frames]
    return [
        Received(frame.sender, frame.round, WEIGHT, frame.update) for frame in found if isinstance(frame, Frame)
    ]


def cifar10(folder: Path) -> tuple[Task, list[np.ndarray]]:
    """The data set, dealt at random as to 96 nodes."""
    task = Cifar10(data=folder)
    order = np.random.default_rng(1).permutation(len(task.train.targets))
    return task, [np.sort(part) for part in np.array_split(order, 96)[: len(NODES)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the parquet files of uoft-cs/cifar10")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.data:
        task, parts = cifar10(arguments.data)
    else:
        task, parts = Synthetic(GroupNormLeNet, (3, 32, 32), POOL), synthetic_parts(len(NODES))
    algorithms: dict[str, Sharing[Any]] = {
        "closed loop": closed_loop(),
        "stateless": stateless(),
        "JWINS": jwins(),
        "CHOCO-SGD, 20 %": choco(fraction=0.2, gamma=0.6),
        "full sharing": full(),
    }
    print(machine())
    rows = []
    for name, sharing in algorithms.items():
        found = measured(task, parts, sharing, arguments.rounds)
        share = sum(found[step] for step in STEPS[1:]) / found["train"]
        asked = verdict(share, at_most=MOST) if name == "closed loop" else ""
        rows.append([name, *(f"{found[step]:.2f}" for step in STEPS), f"{share:.1%} {asked}".strip()])
    print(table(["sharing", *(f"{step}, ms" for step in STEPS), "all but training against training"], rows))


if __name__ == "__main__":
    main()
