"""jwins on the same work: ``python -m benchmarks.against.ours SHARING FOLDER NODES ROUNDS``."""

from __future__ import annotations

import sys
import tempfile

import jwins
from benchmarks.against import work
from jwins.tasks.base import Dataset
from jwins.tasks.cifar10 import Cifar10
from jwins.training.allocator import keep_freed_memory


class Images(Cifar10):
    """CIFAR-10 from memory, with a test set of eight images, because nothing is to be evaluated."""

    def __init__(self, given: work.Work) -> None:
        self.name = "images"
        self.train = Dataset(given.inputs, given.targets)
        self.test = Dataset(given.inputs[:8], given.targets[:8])


def main() -> None:
    given = work.parsed(sys.argv[2:])
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        jwins.simulate(
            jwins.Experiment(
                name="against",
                task={"own": Images(given)},
                nodes={"count": given.nodes},
                topology={"kind": "regular", "degree": 4},
                sharing={"kind": sys.argv[1]},
                train={
                    "local_steps": work.STEPS,
                    "batch_size": work.BATCH,
                    "optimizer": {"kind": "sgd", "lr": work.LEARNING_RATE},
                },
                run={
                    "rounds": given.rounds,
                    "eval_every": given.rounds,
                    "checkpoint_every": given.rounds,
                    "threads": 2,
                    "device": "cpu",
                    "folder": f"{folder}/run",
                },
            )
        )


if __name__ == "__main__":
    main()
