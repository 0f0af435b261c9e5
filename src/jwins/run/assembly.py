"""Node groups and driver of an experiment."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jwins.engines.callbacks import MeasuredModels
from jwins.engines.evaluation_results import EvaluationPlan
from jwins.engines.node_group import NodeGroup, NodeGroupLike
from jwins.engines.recorder import Recorder
from jwins.engines.sharing_check import check_sharing, is_own
from jwins.engines.simulator.driver import CallAll, Progress, SimulatedDriver
from jwins.errors import ConfigError
from jwins.experiment.experiment import Experiment
from jwins.experiment.plugins import ClosedLoopConfig, JwinsConfig, StatelessConfig
from jwins.node import Rules
from jwins.run.builders import (
    build_partition,
    build_privacy,
    build_sharing,
    build_stop_rule,
    build_task,
    build_topology,
    change_factors,
    local_changes,
    local_steps,
)
from jwins.run.evaluation_plan import evaluation_plan, evaluation_rounds
from jwins.run.memory import check_batch_fits
from jwins.run.provenance import cores, fingerprints, machine, versions
from jwins.run_folder.rows import EvalRow, StartRow
from jwins.sharing import Sharing
from jwins.sharing.base import NOT_ASYNCHRONOUS
from jwins.sharing.calls import call_for_model
from jwins.tasks import Task
from jwins.tasks.local_data import with_local_data
from jwins.topology.graph import Topology
from jwins.topology.participation import Participation
from jwins.training.optimizer import Optimizer
from jwins.training.stacked import MIN_STACK, chunk_nodes
from jwins.training.trainer import Trainer
from jwins.wire.codec import codec
from jwins.wire.frame import Wire

Place = Callable[[Experiment, Rules, int], tuple[Sequence[NodeGroupLike], CallAll]]
"""Function that makes node groups in other processes.

Its arguments are a resolved experiment, its rules, and the number of nodes that must be on one node group. It
returns the node groups, and the function that calls several of them at once.
"""


@dataclass(frozen=True)
class Components:
    """Components of an experiment that every engine needs, for the nodes that one process holds.

    Attributes:
        experiment: experiment with the chosen ``train.batching`` and ``run.device``.
        partition: training samples of each node.
        trainer: trainer of the nodes in this process.
    """

    experiment: Experiment
    task: Task
    partition: Sequence[npt.NDArray[np.int64]]
    trainer: Trainer
    rules: Rules
    tests: EvaluationPlan
    start: StartRow

    def node_group(self) -> NodeGroup:
        """Make the node group of the nodes in this process."""
        return NodeGroup(self.trainer, self.rules, tests=self.tests, threads=_threads(self.experiment))


@dataclass(frozen=True)
class AssembledRun(Components):
    """Parts of an experiment, and its driver, ready to run."""

    driver: SimulatedDriver


def assemble(
    experiment: Experiment, *, nodes: Sequence[int] | None = None, remote_nodes: bool = False
) -> Components:
    """Build the components of an experiment except the driver.

    Args:
        experiment: the experiment.
        nodes: only these, in whole chunks of those that train in one stack; None for all.
        remote_nodes: whether other processes hold the nodes. This process then has only a few, to find out how
            they train.

    Raises:
        ConfigError: the experiment cannot be built as written.
        DataError: data are missing.
    """
    sharing, topology = build_sharing(experiment), build_topology(experiment)
    task = build_task(experiment)
    partition = build_partition(experiment, task)
    tests = evaluation_plan(experiment, task, partition)

    check_batch_fits(experiment, task, at_once=1)  # making a trainer takes one step
    if remote_nodes:  # the fewest nodes that train in the same way as all of them, to find out this way
        trainer = build_trainer(experiment, task, partition, range(min(MIN_STACK, len(partition))), chunk=1)
    else:
        trainer = build_trainer(experiment, task, partition, nodes)
    check_batch_fits(experiment, task, at_once=min(trainer.threads * trainer.chunk, len(trainer.nodes)))
    resolved = experiment.changed({"run": {"device": trainer.device.type, "folder": experiment.folder}})
    if experiment.train.batching == "auto":
        resolved = resolved.changed({"train": {"batching": trainer.batching}})
    dim = trainer.layout.size
    _check_padding(experiment, sharing, dim)
    sharing = call_for_model(sharing, tuple(slot.shape for slot in trainer.layout.slots))
    if is_own(sharing):
        check_sharing(sharing, trainer.initial(), topology, experiment.run.seed)
    start = StartRow(
        name=experiment.name,
        digest=experiment.digest().hex(),
        seed=experiment.run.seed,
        num_nodes=experiment.nodes.count,
        dim=dim,
        neighbours_mean=sum(map(len, topology.at(0).recipients)) / experiment.nodes.count,
        versions=versions(),
        machine=machine(trainer.device),
        fingerprints=fingerprints(
            resolved, task, partition, [trainer.initial(), *trainer.frozen.values()], tests.samples.common
        ),
        batching=trainer.batching + (f" ({trainer.reason})" if trainer.reason else ""),
        better=dict(type(task).directions().items() - Task.directions().items()),
    )
    rules = _rules(experiment, sharing, topology, trainer, change_factors(experiment, partition))
    return Components(resolved, task, partition, trainer, rules, tests, start)


def build(
    experiment: Experiment,
    *,
    folder: Path | None = None,
    place: Place | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_evaluation: Callable[[EvalRow, MeasuredModels], None] | None = None,
    started: float | None = None,
) -> AssembledRun:
    """Build all components of an experiment.

    Args:
        experiment: the experiment.
        folder: folder of the run; None keeps everything in memory.
        place: makes several node groups, as in other processes, with the same results; None for one.
        on_progress: called after every step of the driver.
        stop: called after every step; True ends the run with a checkpoint.
        on_evaluation: called with each new evaluation and its models; None for nothing.
        started: real time at the start, on ``time.perf_counter``; None if it does not count.

    Raises:
        ConfigError: the experiment cannot be built as written.
        DataError: data are missing.
    """
    components = assemble(experiment, remote_nodes=place is not None)
    call_all: CallAll | None = None
    if place is None:
        held: Sequence[NodeGroupLike] = [components.node_group()]
    else:
        trainer, num_nodes = components.trainer, len(components.partition)
        stacked = trainer.batching == "stacked"
        chunk = chunk_nodes(num_nodes, trainer.layout.size, trainer.device) if stacked else 1
        held, call_all = place(components.experiment, components.rules, chunk)
    driver = SimulatedDriver(
        held,
        start=components.start,
        links=experiment.links.build(),
        compute=experiment.compute.build(),
        faults=experiment.fault_script(),
        recorder=Recorder(folder),
        on_progress=on_progress,
        stop=stop,
        stop_rule=build_stop_rule(components.experiment, components.task),
        on_evaluation=on_evaluation,
        startup_s=0.0 if started is None else time.perf_counter() - started,
        call_all=call_all,
    )
    return AssembledRun(**vars(components), driver=driver)


def build_trainer(
    experiment: Experiment,
    task: Task,
    partition: Sequence[npt.NDArray[np.int64]],
    nodes: Sequence[int] | None = None,
    *,
    chunk: int | None = None,
) -> Trainer:
    """Build the trainer of some of an experiment's nodes.

    Args:
        experiment: the experiment.
        task: its task.
        partition: training samples of each node of the run.
        nodes: nodes of this process; None for all.
        chunk: largest number of nodes in one stack; None for the best number.
    """
    run, train = experiment.run, experiment.train
    optimizer = train.optimizer
    steps = local_steps(experiment, partition)
    # The settings allow different numbers, and refuse "stacked", even if all turn out to be equal.
    by_chance = train.batching == "auto" and train.uneven and len(set(steps)) == 1
    held = {node: partition[node] for node in (range(len(partition)) if nodes is None else nodes)}
    local_task, held = with_local_data(task, held, local_changes(experiment, task))
    return Trainer(
        local_task,
        held,
        num_nodes=experiment.nodes.count,
        seed=run.seed,
        local_steps=steps,
        batch_size=train.batch_size,
        optimizer=Optimizer(
            optimizer.kind,
            optimizer.options,
            train.optimizer_state,
            optimizer.quasi_global,
            optimizer.weight_decay_on,
            train.clip_norm,
            train.schedule.build(run.rounds * max(steps)),
        ),
        buffers=train.buffers,
        batching="loop" if by_chance else train.batching,
        device=run.device,
        threads=_threads(experiment),
        chunk=chunk,
        precision=train.precision,
        privacy=build_privacy(experiment, held, steps),
    )


def _threads(experiment: Experiment) -> int:
    return experiment.run.threads or cores()


def _rules(
    experiment: Experiment,
    sharing: Sharing[Any],
    topology: Topology,
    trainer: Trainer,
    change_factor: Mapping[int, float],
) -> Rules:
    if experiment.run.mode == "async":
        _check_asynchronous(sharing, topology)
    layout = trainer.layout
    return Rules(
        sharing,
        Wire(codec(experiment.wire.codec), experiment.digest(), sharing.update_dim(layout.size)),
        topology,
        rounds=experiment.run.rounds + experiment.run.consensus_rounds,
        consensus_rounds=experiment.run.consensus_rounds,
        seed=experiment.run.seed,
        evaluate_at=evaluation_rounds(experiment),
        checkpoint_every=experiment.run.checkpoint_every,
        deadline_s=experiment.run.deadline_s,
        project=layout.project_ if layout.has_variances else None,
        participation=topology if isinstance(topology, Participation) else None,
        attacks=experiment.attacks(),
        outer=None if experiment.train.outer is None else experiment.train.outer.build(),
        staleness=experiment.run.staleness(),
        change_factor=change_factor,
    )


def _check_asynchronous(sharing: Sharing[Any], topology: Topology) -> None:
    if not getattr(sharing, "asynchronous", False):
        raise ConfigError("run.mode", "async", NOT_ASYNCHRONOUS.format(name=type(sharing).__name__))
    if any(topology.at(0) != topology.at(at) for at in range(1, 4)):
        problem = (
            f"needs the same neighbours in all rounds, and {type(topology).__name__}.at does not return them"
        )
        raise ConfigError("run.mode", "async", problem)


_PADDING_UNNOTICED = 2**16
"""Number of additional coefficients that is negligible even for small models."""


def _check_padding(experiment: Experiment, sharing: Sharing[Any], dim: int) -> None:
    """Refuse levels that multiply memory and bytes, because periodization pads to a multiple of 2^levels."""
    config, size = experiment.sharing, sharing.update_dim(dim)
    if (
        isinstance(config, JwinsConfig | ClosedLoopConfig | StatelessConfig)
        and size > 2 * dim + _PADDING_UNNOTICED
    ):
        problem = (
            f"{config.mode} would make {size:,} coefficients of the model's {dim:,} parameters; "
            f"use at most {dim.bit_length() - 1} levels"
        )
        raise ConfigError("sharing.levels", config.levels, problem)
