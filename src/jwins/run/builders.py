"""Builders of the objects that an experiment names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jwins.errors import ConfigError
from jwins.experiment.experiment import Experiment
from jwins.experiment.plugins import PartitionTable, SharingTable, TopologyTable
from jwins.experiment.sections import RunConfig

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from jwins.sharing import Sharing
    from jwins.tasks import Task
    from jwins.topology.graph import Topology

__all__ = [
    "advice",
    "build_partition",
    "build_sharing",
    "build_task",
    "build_topology",
    "evaluation_rounds",
    "evaluation_samples",
    "first_of_last",
    "own_evaluation_samples",
    "own_test_samples",
    "partition_counts",
    "raw_bytes_per_node",
]


def build_task(experiment: Experiment) -> Task:
    """Build the task of an experiment.

    Raises:
        ConfigError: no such task, file, class or option.
        DataError: the task's data are missing.
    """
    from jwins.tasks import make_task, own_task

    config = experiment.task
    if config.own is not None:
        return own_task(config.own, config.options, config.data)
    return make_task(config.name, file=config.file, options=config.options, data=config.data)


def build_topology(experiment: Experiment) -> Topology:
    """Build the topology of an experiment.

    Raises:
        ConfigError: no such graph exists.
    """
    config = experiment.topology
    if not isinstance(config, TopologyTable):
        return config
    return config.build(num_nodes=experiment.nodes.count, seed=experiment.run.seed)


def build_sharing(experiment: Experiment) -> Sharing[Any]:
    """Build the sharing algorithm of an experiment.

    Raises:
        ConfigError: no such wavelet.
    """
    config = experiment.sharing
    return config.build() if isinstance(config, SharingTable) else config


def advice(experiment: Experiment) -> list[str]:
    """Return advice on settings that work, but hardly as the user wants.

    Raises:
        ConfigError: no such wavelet, or the topology has another number of nodes.
    """
    if not (experiment.topology_changes and build_sharing(experiment).remembers_peers):
        return []
    topology = build_topology(experiment)
    if topology.at(0) == topology.at(1):
        return []  # an object of the user
    kind = getattr(experiment.sharing, "kind", type(experiment.sharing).__name__)
    return [
        f"neighbours change from round to round, and sharing.kind = {kind!r} keeps replicas of them: "
        "each new neighbour is sent the whole replica, which is most of the bytes. Where bytes count, "
        "take sharing.kind = 'stateless' or 'jwins', or a topology that stays"
    ]


def evaluation_rounds(experiment: Experiment) -> frozenset[int]:
    """Return the numbers of completed rounds with an evaluation, always including 0 and the last one.

    If rounds of consensus follow, the last round of training is included, too.
    """
    run = experiment.run
    last = run.rounds + run.consensus_rounds
    return frozenset({*range(0, run.rounds, run.eval_every), run.rounds, *run.eval_at, last})


def first_of_last(experiment: Experiment) -> int:
    """Return the completed rounds at the first of the last ``run.eval_last`` evaluations before consensus."""
    trained = [at for at in evaluation_rounds(experiment) if at <= experiment.run.rounds]
    return sorted(trained)[-experiment.run.eval_last :][0]


def evaluation_samples(experiment: Experiment, task: Task) -> tuple[Tensor | None, Tensor | None]:
    """Return the test samples of the last evaluations, and of earlier ones; None for all.

    Returns:
        Two vectors of increasing int64; the second is a subset of the first, or the same.

    Raises:
        ConfigError: more samples than the test set has.
    """
    from jwins.rng import stream

    run = experiment.run
    if run.eval_samples == "all" and run.eval_samples_early is None:
        return None, None
    wanted = len(task.test) if run.eval_samples == "all" else run.eval_samples
    if wanted > len(task.test):
        problem = f'the test set has {len(task.test)} samples; write at most as many, or "all"'
        raise ConfigError("run.eval_samples", run.eval_samples, problem)
    drawn = stream(run.seed, "evaluation").choice(len(task.test), wanted, replace=False)
    last, early = _last_and_early(drawn, run)
    return None if run.eval_samples == "all" else last, early


def _last_and_early(drawn: npt.NDArray[np.int64], run: RunConfig) -> tuple[Tensor, Tensor]:
    """Return all of these shuffled test samples, and the first few for early evaluations; both increasing."""
    import torch

    samples = torch.from_numpy(drawn)
    return samples.sort().values, samples[: run.eval_samples_early].sort().values


def build_partition(experiment: Experiment, task: Task) -> list[npt.NDArray[np.int64]]:
    """Return the training samples of each node, increasing.

    Raises:
        ConfigError: no such partitioner, it cannot divide these samples, or a user's partitioner
            breaks the rules.
    """
    from jwins.rng import stream
    from jwins.tasks.partition import checked_split

    config = experiment.task.partition
    partition = config.build() if isinstance(config, PartitionTable) else config
    return checked_split(
        partition,
        num_samples=len(task.train),
        num_nodes=experiment.nodes.count,
        labels=task.partition_labels(),
        keys=task.train.keys,
        rng=stream(experiment.run.seed, "partition"),
    )


def own_test_samples(task: Task, partition: Sequence[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int64]]:
    """Return, for each node, the test samples of the owners of its training samples, increasing.

    Raises:
        ConfigError: the task's samples have no natural owners.
    """
    import numpy as np

    train, test = task.train.keys, task.test.keys
    if train is None or test is None:
        problem = (
            "the task's samples have no natural owner; leave it out, or give task.train and task.test keys"
        )
        raise ConfigError("run.eval_own", True, problem)
    return [np.flatnonzero(np.isin(test, np.unique(train[part]))) for part in partition]


def own_evaluation_samples(
    experiment: Experiment, task: Task, partition: Sequence[npt.NDArray[np.int64]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each node's own test samples at the last evaluations, and at earlier ones; see ``run.eval_own``.

    Raises:
        ConfigError: the task's samples have no natural owners.
    """
    from jwins.rng import stream

    run = experiment.run
    most = None if run.eval_samples == "all" else run.eval_samples
    pairs = [
        _last_and_early(stream(run.seed, "own evaluation", node=node).permutation(own)[:most], run)
        for node, own in enumerate(own_test_samples(task, partition))
    ]
    return [last for last, _ in pairs], [early for _, early in pairs]


_MAX_LABELS = 1000
"""Maximum number of labels that count as classes for a figure."""


def partition_counts(task: Task, partition: Sequence[npt.NDArray[np.int64]]) -> dict[str, Any]:
    """Return the content of ``partition.json``: samples of each node, by class if there are classes.

    Returns:
        ``samples`` (one number per node) and, for up to 1,000 classes, ``labels`` and ``counts`` (per node, one
        number per label).
    """
    import numpy as np

    found: dict[str, Any] = {"samples": [len(part) for part in partition]}
    labels = task.partition_labels()
    if labels is not None:
        values = np.unique(labels)
        if len(values) <= _MAX_LABELS:
            found["labels"] = values.tolist()
            found["counts"] = [
                np.bincount(np.searchsorted(values, labels[part]), minlength=len(values)).tolist()
                for part in partition
            ]
    return found


def raw_bytes_per_node(experiment: Experiment, dim: int, rounds: int) -> float:
    """Return the bytes of full sharing of raw float32: 4 per parameter and recipient, mean over nodes.

    Args:
        experiment: the experiment; its topology matters, its faults do not.
        dim: parameters per model.
        rounds: number of rounds.
    """
    topology = build_topology(experiment)
    sends = sum(len(recipients) for r in range(rounds) for recipients in topology.at(r).recipients)
    return 4.0 * dim * sends / experiment.nodes.count
