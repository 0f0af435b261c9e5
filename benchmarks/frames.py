"""Bytes of the closed loop's frames against the entropy of their symbols, early and late in training.

Sixteen nodes train as in experiments/rate-distortion, with the defaults of the closed loop. In the first five
rounds and the last five, every frame's section of values is held against the entropy of its own symbols: of the
histogram of all, and of that of each wavelet subband. Neither counts telling the histogram, and the section has
its step and its lengths, too; with contexts of neighbouring symbols it may still be the shorter one. A row sums
over all frames. Digits come with the package; for the others name their folders. From the root:

    python -m benchmarks.frames [--movielens FOLDER] [--cifar10 FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

import jwins
from benchmarks.entropy import conditional_bytes, entropy_bytes
from benchmarks.report import table
from jwins.rng import RoundContext
from jwins.sharing import ClosedLoop, closed_loop
from jwins.sharing.closed_loop import ClosedLoopState
from jwins.sharing.update import Quantized, Update
from jwins.wire import codec

NODES = 16
SPAN = 5  # rounds, at either end
_ADDING = threading.Lock()  # nodes share on different threads
SHARDS = {"kind": "shards", "shards_per_node": 2}


@dataclass(frozen=True)
class Workload:
    """Experiment of a case, and its rounds."""

    name: str
    partition: dict[str, Any]
    rounds: int
    local_steps: int
    batch_size: int
    lr: float


WORKLOADS = (
    Workload("digits", SHARDS, 200, 3, 8, 0.5),
    Workload("movielens", {"kind": "by_key"}, 100, 10, 16, 1.0),
    Workload("cifar10", SHARDS, 60, 3, 8, 0.01),
)


@dataclass
class Sums:
    """Over all frames of some rounds; all but the two counts are bytes."""

    symbols: int = 0
    zeros: int = 0
    sent: int = 0
    entropy: float = 0.0
    by_subband: float = 0.0

    def add(self, update: Update) -> None:
        """One frame's values."""
        values = update.values
        assert isinstance(values, Quantized)
        symbols = values.symbols.numpy()
        sent = codec("pco").encode(update).values_bytes
        entropy, by_subband = entropy_bytes(symbols), conditional_bytes(symbols, values.runs)
        with _ADDING:
            self.symbols += len(symbols)
            self.zeros += int((symbols == 0).sum())
            self.sent += sent
            self.entropy += entropy
            self.by_subband += by_subband

    def row(self) -> list[str]:
        """As it is printed."""
        return [
            f"{self.symbols:,}",
            f"{self.zeros / self.symbols:.1%}",
            f"{8 * self.sent / self.symbols:.3f}",
            f"{self.sent:,}",
            f"{self.entropy:,.0f}",
            f"{self.sent / self.entropy - 1:+.1%}",
            f"{self.by_subband:,.0f}",
            f"{self.sent / self.by_subband - 1:+.1%}",
        ]


@dataclass(frozen=True)
class Watched(ClosedLoop):
    """The closed loop, and what its frames come to at either end of a run."""

    rounds: int
    early: Sums = field(default_factory=Sums, repr=False)
    late: Sums = field(default_factory=Sums, repr=False)

    def share(
        self, state: ClosedLoopState, params: Tensor, ctx: RoundContext
    ) -> tuple[Update, ClosedLoopState]:
        """As the closed loop's."""
        update, state = super().share(state, params, ctx)
        if ctx.round < SPAN:
            self.early.add(update)
        elif ctx.round >= self.rounds - SPAN:
            self.late.add(update)
        return update, state


def rows(workload: Workload, data: Path | None) -> list[list[str]]:
    """Early and late."""
    loop = closed_loop()
    watched = Watched(**{of.name: getattr(loop, of.name) for of in fields(loop)}, rounds=workload.rounds)
    with tempfile.TemporaryDirectory() as folder:
        jwins.simulate(
            jwins.Experiment(
                name="frames",
                task={"name": workload.name, "partition": workload.partition}
                | ({} if data is None else {"data": data}),
                nodes={"count": NODES},
                topology={"kind": "regular", "degree": 4},
                sharing=watched,
                train={
                    "local_steps": workload.local_steps,
                    "batch_size": workload.batch_size,
                    "optimizer": {"kind": "sgd", "lr": workload.lr},
                },
                run={
                    "rounds": workload.rounds,
                    "eval_every": workload.rounds,
                    "eval_samples": 100,
                    "checkpoint_every": workload.rounds,
                    "folder": Path(folder) / "run",
                },
            )
        )
    last = workload.rounds
    return [
        [f"{workload.name}, rounds 1 to {SPAN}", *watched.early.row()],
        [f"{workload.name}, rounds {last - SPAN + 1} to {last}", *watched.late.row()],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--movielens", type=Path, help="folder with ratings.csv")
    parser.add_argument("--cifar10", type=Path, help="folder with the parquet files of uoft-cs/cifar10")
    given = vars(parser.parse_args())
    found = []
    for workload in WORKLOADS:
        data = given.get(workload.name)
        if data is not None or workload.name == "digits":
            found += rows(workload, data)
    columns = "frames", "symbols", "zeros", "bits", "bytes", "entropy", "excess", "by subband", "excess"
    print(table(columns, found))


if __name__ == "__main__":
    main()
