"""Small worlds for the simulator's tests: least squares on a few points per node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jwins.engines.evaluation_results import EvaluationPlan
from jwins.engines.node_group import NodeGroup
from jwins.engines.recorder import Recorder
from jwins.engines.simulator import Outcome, SimulatedDriver
from jwins.node import Rules, Staleness
from jwins.run.placement import spread
from jwins.run_folder.rows import EndRow, EvalRow, StartRow
from jwins.sharing import Nesterov, Sharing, full
from jwins.tasks.base import Dataset, Task
from jwins.topology import Ring, Topology
from jwins.topology.participation import Participation
from jwins.training.optimizer import Optimizer
from jwins.training.trainer import Trainer
from jwins.wire.codec import codec
from jwins.wire.frame import Wire

DIGEST = b"testtest"


class Lines(Task):
    """Classify points by which of two directions they lie in."""

    name = "lines"

    def __init__(self, hidden: int = 8, batch_norm: bool = False, poison: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(96, 6, generator=generator)
        targets = (inputs @ torch.randn(6, 3, generator=generator)).argmax(dim=1)
        self.train = Dataset(inputs[:64], targets[:64])
        self.test = Dataset(inputs[64:], targets[64:])
        self.hidden, self.batch_norm = hidden, batch_norm

    def model(self) -> nn.Module:
        middle: list[nn.Module] = [nn.BatchNorm1d(self.hidden)] if self.batch_norm else []
        return nn.Sequential(nn.Linear(6, self.hidden), *middle, nn.ReLU(), nn.Linear(self.hidden, 3))


def trainer(
    num_nodes: int = 4,
    task: Task | None = None,
    lr: float = 0.1,
    optimizer: Optimizer | None = None,
    held: Sequence[int] | None = None,
    **options: Any,
) -> Trainer:
    task = task or Lines()
    parts = {i: np.arange(i, len(task.train), num_nodes) for i in (range(num_nodes) if held is None else held)}
    options = {"batching": "loop", "local_steps": 2, "batch_size": 4, "num_nodes": num_nodes, **options}
    return Trainer(task, parts, seed=1, optimizer=optimizer or Optimizer("sgd", {"lr": lr}), **options)


def start_row(num_nodes: int = 4) -> StartRow:
    return StartRow("test", DIGEST.hex(), 1, num_nodes, 0, 2.0, {}, {}, {}, "loop")


def simulator(
    num_nodes: int = 4,
    *,
    groups: int = 1,
    sharing: Sharing[Any] | None = None,
    topology: Topology | None = None,
    rounds: int = 6,
    train: dict[str, Any] | None = None,
    folder: Path | None = None,
    tests: EvaluationPlan | None = None,
    threads: int = 1,
    deadline_s: float | None = None,
    checkpoint_every: int = 0,
    eval_at: Iterable[int] | None = None,
    consensus_rounds: int = 0,
    outer: Nesterov | None = None,
    staleness: Staleness | None = None,
    change_factor: Mapping[int, float] | None = None,
    **options: Any,
) -> SimulatedDriver:
    """A simulator, with the nodes spread over so many node groups."""
    sharing, train = sharing or full(), train or {}
    trainers = [trainer(num_nodes, **train)]
    if groups > 1:
        spreads = spread(num_nodes, groups, trainers[0].chunk)
        trainers = [trainer(num_nodes, held=nodes, **train) for nodes in spreads]
    layout = trainers[0].layout
    wire = Wire(codec(options.pop("codec", "raw")), DIGEST, sharing.update_dim(layout.size))
    rules = Rules(
        sharing,
        wire,
        topology or Ring(num_nodes=num_nodes, seed=1),
        rounds=rounds,
        seed=1,
        evaluate_at=frozenset(range(rounds + 1) if eval_at is None else eval_at),
        checkpoint_every=checkpoint_every,
        deadline_s=deadline_s,
        project=layout.project_ if layout.has_variances else None,
        consensus_rounds=consensus_rounds,
        participation=topology if isinstance(topology, Participation) else None,
        outer=outer,
        staleness=staleness,
        change_factor=change_factor or {},
    )
    return SimulatedDriver(
        [NodeGroup(own, rules, tests=tests, threads=threads) for own in trainers],
        start=start_row(num_nodes),
        recorder=Recorder(folder),
        **options,
    )


def evals(outcome: Outcome) -> list[EvalRow]:
    return [row for row in outcome.rows if isinstance(row, EvalRow)]


def end(outcome: Outcome) -> EndRow:
    row = outcome.rows[-1]
    assert isinstance(row, EndRow)
    return row


def state_of(simulator: SimulatedDriver, node: int) -> Any:
    """Return the state of a node's algorithm."""
    (group,) = [group for group in simulator.groups if node in group.nodes]
    return group.machine(node).state
