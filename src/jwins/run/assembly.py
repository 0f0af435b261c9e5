"""From an experiment to node groups and the driver that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jwins.errors import ConfigError
from jwins.experiment.experiment import Experiment
from jwins.experiment.plugins import ClosedLoopConfig, JwinsConfig, StatelessConfig
from jwins.run.builders import (
    build_partition,
    build_sharing,
    build_task,
    build_topology,
    evaluation_rounds,
    evaluation_samples,
    first_of_last,
    own_evaluation_samples,
)
from jwins.run.memory_check import check_batch_fits
from jwins.run.placement import spread
from jwins.run.provenance import cores, fingerprints, machine, versions
from jwins.run_folder.rows import StartRow
from jwins.tasks import Task

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from jwins.engines.eval_reduce import EvaluationPlan
    from jwins.engines.node_group import NodeGroup, NodeGroupLike
    from jwins.engines.simulator.driver import CallAll, Progress, SimulatedDriver
    from jwins.node import Rules
    from jwins.sharing import Sharing
    from jwins.training.trainer import Trainer

__all__ = [
    "AssembledRun",
    "Components",
    "Place",
    "assemble",
    "build",
    "build_node_group",
    "build_trainer",
    "spread",
]

Place = Callable[["Experiment", "Rules", int], "tuple[Sequence[NodeGroupLike], CallAll]"]
"""Makes node groups remote_nodes, of a resolved experiment, its rules, and the number of nodes that must be on
one node group.

Returns them, and what makes calls to several of them at once.
"""


@dataclass(frozen=True)
class AssembledRun:
    """Parts of an assembled experiment.

    Attributes:
        experiment: with ``train.batching`` and ``run.device`` as they were resolved.
        task: the workload.
        partition: for each node, its training samples.
        driver: ready to run.
        start: the first row of its log.
    """

    experiment: Experiment
    task: Task
    partition: Sequence[npt.NDArray[np.int64]]
    driver: SimulatedDriver
    start: StartRow


@dataclass(frozen=True)
class Components:
    """Parts of an experiment that every engine needs, for the nodes that one process holds.

    Attributes:
        experiment: with ``train.batching`` and ``run.device`` as they were resolved.
        task: the workload.
        partition: for each node, its training samples.
        trainers: of each group of nodes that are held here.
        rules: what all nodes have in common.
        tests: which samples evaluations use.
        start: the first row of a log.
    """

    experiment: Experiment
    task: Task
    partition: Sequence[npt.NDArray[np.int64]]
    trainers: Sequence[Trainer]
    rules: Rules
    tests: EvaluationPlan
    start: StartRow

    def node_groups(self) -> list[NodeGroup]:
        """One for each of the trainers."""
        from jwins.engines.node_group import NodeGroup

        threads = _threads(self.experiment)
        return [NodeGroup(own, self.rules, tests=self.tests, threads=threads) for own in self.trainers]


def assemble(
    experiment: Experiment, *, groups: int = 1, nodes: Sequence[int] | None = None, remote_nodes: bool = False
) -> Components:
    """Build what an experiment names, but for the driver.

    Args:
        experiment: what to build.
        groups: number of node groups.
        nodes: only these, in one group; None for all.
        remote_nodes: nodes are held by other processes: here are only a few, to find out how they train.

    Raises:
        ConfigError: the experiment cannot be built as written.
        DataError: data are missing.
    """
    from jwins.engines.sharing_check import check_sharing, is_own

    sharing, topology = build_sharing(experiment), build_topology(experiment)
    task = build_task(experiment)
    partition = build_partition(experiment, task)
    tests = _tests(experiment, task, partition)

    check_batch_fits(experiment, task, at_once=1)  # building a trainer takes one step
    if nodes is not None:
        trainers = [build_trainer(experiment, task, {node: partition[node] for node in nodes})]
    elif remote_nodes:
        trainers = [_probe(experiment, task, partition)]
    else:
        trainers = _trainers(experiment, task, partition, groups)
    trainer = trainers[0]
    check_batch_fits(experiment, task, at_once=min(trainer.threads * trainer.chunk, len(trainer.nodes)))
    resolved = experiment.changed({"run": {"device": trainer.device.type, "folder": experiment.folder}})
    if experiment.train.batching == "auto":
        resolved = resolved.changed({"train": {"batching": trainer.batching}})
    dim = trainer.layout.size
    _check_padding(experiment, sharing, dim)
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
    rules = _rules(experiment, sharing, topology, trainer)
    return Components(resolved, task, partition, trainers, rules, tests, start)


def build(
    experiment: Experiment,
    *,
    folder: Path | None = None,
    groups: int = 1,
    place: Place | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    startup_s: Callable[[], float] = lambda: 0.0,
) -> AssembledRun:
    """Build everything an experiment names.

    Args:
        experiment: what to build.
        folder: where the run is written; None keeps everything in memory.
        groups: number of node groups, all in this process; nothing that is measured depends on it.
        place: makes the node groups in other processes instead; ``groups`` then has no meaning.
        on_progress: told after every step of the driver.
        stop: asked after every step whether to end with a checkpoint.
        startup_s: real seconds since the start, asked when everything is built.

    Raises:
        ConfigError: the experiment cannot be built as written.
        DataError: data are missing.
    """
    from jwins.engines.recorder import Recorder
    from jwins.engines.simulator.driver import SimulatedDriver
    from jwins.training.stacked import chunk_nodes

    components = assemble(experiment, groups=groups, remote_nodes=place is not None)
    call_all: CallAll | None = None
    if place is None:
        held: Sequence[NodeGroupLike] = components.node_groups()
    else:
        trainer, num_nodes = components.trainers[0], len(components.partition)
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
        startup_s=startup_s(),
        call_all=call_all,
    )
    return AssembledRun(components.experiment, components.task, components.partition, driver, components.start)


def build_node_group(experiment: Experiment, nodes: Sequence[int]) -> NodeGroup:
    """The node group of some of an experiment's nodes, in whatever process this is called.

    Args:
        experiment: with ``train.batching`` and ``run.device`` as they were resolved.
        nodes: in whole chunks of those that train in one stack.

    Raises:
        ConfigError: the experiment cannot be built as written.
        DataError: data are missing.
    """
    return assemble(experiment, nodes=nodes).node_groups()[0]


def build_trainer(
    experiment: Experiment,
    task: Task,
    partition: Mapping[int, npt.NDArray[np.int64]],
    *,
    batching: str | None = None,
    chunk: int | None = None,
) -> Trainer:
    """Local training of some of an experiment's nodes.

    Args:
        experiment: which.
        task: its workload.
        partition: training samples of the nodes that are to be held here.
        batching: as it was resolved before; None to resolve it.
        chunk: most nodes in one stack; None for as many as is best.
    """
    from jwins.training.optimizer import Optimizer
    from jwins.training.trainer import Trainer

    run, train = experiment.run, experiment.train
    optimizer = train.optimizer
    return Trainer(
        task,
        partition,
        num_nodes=experiment.nodes.count,
        seed=run.seed,
        local_steps=train.local_steps,
        batch_size=train.batch_size,
        optimizer=Optimizer(
            optimizer.kind,
            optimizer.options,
            train.optimizer_state,
            optimizer.quasi_global,
            optimizer.weight_decay_on,
            train.clip_norm,
            train.schedule.build(run.rounds * train.local_steps),
        ),
        buffers=train.buffers,
        batching=batching or train.batching,  # type: ignore[arg-type]
        device=run.device,
        threads=_threads(experiment),
        chunk=chunk,
        precision=train.precision,
    )


def _trainers(
    experiment: Experiment, task: Task, partition: Sequence[npt.NDArray[np.int64]], groups: int
) -> list[Trainer]:
    probe = build_trainer(experiment, task, dict(enumerate(partition)))
    if groups == 1:
        return [probe]
    return [
        build_trainer(experiment, task, {node: partition[node] for node in nodes}, batching=probe.batching)
        for nodes in spread(len(partition), groups, probe.chunk)
    ]


def _probe(experiment: Experiment, task: Task, partition: Sequence[npt.NDArray[np.int64]]) -> Trainer:
    """Of as few nodes as can train in the same way as all of them: to find out how that is."""
    from jwins.training.stacked import MIN_STACK

    return build_trainer(experiment, task, dict(enumerate(partition[:MIN_STACK])), chunk=1)


def _threads(experiment: Experiment) -> int:
    return experiment.run.threads or cores()


def _rules(experiment: Experiment, sharing: Sharing[Any], topology: Any, trainer: Trainer) -> Rules:
    from jwins.node import Rules
    from jwins.wire.codec import codec
    from jwins.wire.frame import Wire

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
    )


def _tests(experiment: Experiment, task: Task, partition: Sequence[npt.NDArray[np.int64]]) -> EvaluationPlan:
    from jwins.engines.eval_reduce import EvaluationPlan, EvaluationSamples

    common, early = evaluation_samples(experiment, task)
    own, own_early = (
        own_evaluation_samples(experiment, task, partition) if experiment.run.eval_own else (None, None)
    )
    few = experiment.run.eval_samples_early is not None
    return EvaluationPlan(
        EvaluationSamples(common, own),
        EvaluationSamples(early, own_early) if few else None,
        first_of_last(experiment),
    )


_PADDING_UNNOTICED = 2**16
"""So many coefficients more than parameters cost nothing that matters, however small the model."""


def _check_padding(experiment: Experiment, sharing: Sharing[Any], dim: int) -> None:
    """Periodization pads to a multiple of 2^levels: refuse levels that only multiply memory and bytes."""
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
