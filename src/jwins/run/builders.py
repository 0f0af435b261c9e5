"""Builders of the objects that an experiment names."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jwins.errors import ConfigError
from jwins.experiment.error_messages import nearest
from jwins.experiment.experiment import Experiment
from jwins.experiment.plugins import (
    NoiseConfig,
    PartitionTable,
    RotationConfig,
    SharingTable,
    TopologyTable,
)
from jwins.run_folder.atomic import write_atomically

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from jwins.engines.stop_rule import StopRule
    from jwins.sharing import Sharing
    from jwins.tasks import Task
    from jwins.tasks.local_data import LocalChange
    from jwins.topology.graph import Topology
    from jwins.training.privacy import Privacy


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


def build_topology(experiment: Experiment, *, of_all: bool = False) -> Topology:
    """Build the topology of an experiment.

    Args:
        experiment: the experiment.
        of_all: whether to ignore ``nodes.participation``, as if all nodes took part in every round.

    Raises:
        ConfigError: no such graph exists.
    """
    from jwins.topology.graph import CheckedTopology
    from jwins.topology.participation import Participation

    config, nodes = experiment.topology, experiment.nodes
    topology = (
        config.build(num_nodes=nodes.count, seed=experiment.run.seed)
        if isinstance(config, TopologyTable)
        else config
    )
    if not type(topology).__module__.startswith("jwins."):
        if topology.num_nodes != nodes.count:
            raise ConfigError("topology", topology.num_nodes, f"expected nodes.count = {nodes.count} nodes")
        topology = CheckedTopology(topology, experiment.run.rounds + experiment.run.consensus_rounds)
    if nodes.participation == 1.0 or of_all:
        return topology
    senders = topology.at(0).senders
    if any(senders[j].get(i) != weight for i, row in enumerate(senders) for j, weight in row.items()):
        problem = (
            "this topology has asymmetric mixing weights; with participation its weights would no longer be "
        )
        problem += "doubly stochastic; remove nodes.participation, or use another topology"
        raise ConfigError("nodes.participation", nodes.participation, problem)
    return Participation(topology, nodes.participation, experiment.run.seed)


def build_sharing(experiment: Experiment) -> Sharing[Any]:
    """Build the sharing algorithm of an experiment.

    Raises:
        ConfigError: no such wavelet.
    """
    config = experiment.sharing
    return config.build() if isinstance(config, SharingTable) else config


def build_stop_rule(experiment: Experiment, task: Task) -> StopRule | None:
    """Build the rule by which a run may end early; None without ``run.stop``.

    Raises:
        ConfigError: the task does not say which direction of the metric is better.
    """
    from jwins.engines.stop_rule import StopRule

    config = experiment.run.stop
    if config is None:
        return None
    known = type(task).directions()
    direction = known.get(config.metric.removeprefix("own_"))
    if direction is None:
        problem = (
            f"the task declares a direction for {', '.join(known)} only{nearest(config.metric, known)}; for "
        )
        problem += f"another, write better = {{{config.metric!r}: 'lower'}} (or 'higher') in its class"
        raise ConfigError("run.stop.metric", config.metric, problem)
    return StopRule(config.metric, direction == "lower", config.target, config.patience)


def advice(experiment: Experiment) -> list[str]:
    """Return advice on settings that work, but hardly as the user wants.

    Raises:
        ConfigError: no such wavelet, or the topology has another number of nodes.
    """
    notes = []
    if experiment.train.privacy is not None:
        notes.append(
            "train.privacy: noise is drawn from run.seed; epsilon holds against those who do not know it"
        )
    if not (experiment.topology_changes and build_sharing(experiment).remembers_peers):
        return notes
    topology = build_topology(experiment)
    if topology.at(0) == topology.at(1):
        return notes  # an object of the user
    kind = getattr(experiment.sharing, "kind", type(experiment.sharing).__name__)
    return [
        *notes,
        f"neighbours change from round to round, and sharing.kind = {kind!r} keeps replicas of them: "
        "each new neighbour is sent the whole replica, which is most of the bytes. Where bytes count, "
        "take sharing.kind = 'stateless' or 'jwins', or a topology that stays",
    ]


def build_partition(experiment: Experiment, task: Task) -> list[npt.NDArray[np.int64]]:
    """Return the training samples of each node, increasing.

    Raises:
        ConfigError: no such partitioner, it cannot divide these samples, or a user's partitioner
            breaks the rules.
    """
    from jwins.rng import stream
    from jwins.tasks.base import partition_labels_of
    from jwins.tasks.partition import checked_split

    config = experiment.task.partition
    partition = config.build() if isinstance(config, PartitionTable) else config
    return checked_split(
        partition,
        num_samples=len(task.train),
        num_nodes=experiment.nodes.count,
        labels=partition_labels_of(task),
        keys=None if task.train.keys is None else task.train.keys.copy(),
        rng=stream(experiment.run.seed, "partition"),
    )


def local_steps(experiment: Experiment, partition: Sequence[npt.NDArray[np.int64]]) -> list[int]:
    """Return the optimizer steps of each node between two rounds."""
    train = experiment.train
    if train.balanced:
        assert isinstance(train.local_steps, int)
        compute = replace(experiment.compute.build(), jitter=0.0)
        each_s = [compute.seconds(experiment.run.seed, node, 0, 1) for node in range(len(partition))]
        time_s = train.local_steps * statistics.median(each_s)
        return [max(1, math.floor(time_s / step_s + 1e-9)) for step_s in each_s]
    if train.local_epochs is None:
        steps = train.local_steps
        return list(steps) if isinstance(steps, tuple) else [steps] * len(partition)
    # 0.1 passes over 240 samples are 3 steps of 8, although 0.1 * 240 / 8 may round to more than 3.
    each = (train.local_epochs * len(own) / train.batch_size for own in partition)
    return [max(1, math.ceil(steps - 1e-9)) for steps in each]


def change_factors(experiment: Experiment, partition: Sequence[npt.NDArray[np.int64]]) -> dict[int, float]:
    """Return the factor of each node's change by which nodes with fewer local steps count alike.

    Source: J. Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization", NeurIPS 2020 (FedNova), for plain SGD.
    """
    if not experiment.train.balanced:
        return {}
    steps = local_steps(experiment, partition)
    mean = sum(steps) / len(steps)
    return {node: mean / own for node, own in enumerate(steps) if own != mean}


def build_privacy(
    experiment: Experiment, partition: Mapping[int, npt.NDArray[np.int64]], steps: Sequence[int]
) -> Privacy | None:
    """Return the differential privacy of these nodes' training; None without ``train.privacy``.

    Raises:
        ConfigError: opacus is not installed, or no noise keeps the budget.
    """
    from jwins.topology.participation import Participation
    from jwins.training.privacy import Privacy, noise_for, opacus, sampling_rate

    config, batch_size = experiment.train.privacy, experiment.train.batch_size
    if config is None:
        return None
    opacus()  # it counts what is spent, however much noise there is
    samples = {node: len(own) for node, own in partition.items()}
    if config.noise_multiplier is not None:
        noise = dict.fromkeys(samples, config.noise_multiplier)
    else:
        assert config.epsilon is not None
        topology, rounds = build_topology(experiment), experiment.run.rounds
        trained: Mapping[int, int] = dict.fromkeys(samples, rounds)
        if isinstance(topology, Participation):
            trained = Counter(node for at in range(rounds) for node in topology.active(at))
        noise = {
            node: noise_for(
                config.epsilon, sampling_rate(count, batch_size), trained[node] * steps[node], config.delta
            )
            for node, count in samples.items()
        }
    return Privacy(config.clip_norm, noise, samples, batch_size, config.delta)


def local_changes(experiment: Experiment, task: Task) -> dict[int, LocalChange]:
    """Return the changes of the samples of single nodes, by node.

    Raises:
        ConfigError: the task's samples have no labels, or are no images.
    """
    from jwins.tasks.base import labels_of
    from jwins.tasks.local_data import Changes, FlippedLabels, NoisyLabels

    config, seed, count = experiment.task, experiment.run.seed, experiment.nodes.count
    flipping = {node for node, attack in experiment.attacks().items() if attack.kind == "label_flip"}
    found: dict[int, list[LocalChange]] = {node: [] for node in range(count)}
    labels = labels_of(task.train) if flipping or config.label_noise else None
    for path, value in (
        ("faults.form", "label_flip" if flipping else ""),
        ("task.label_noise", config.label_noise),
    ):
        if value and labels is None:
            raise ConfigError(path, value, "the task's targets are not labels; remove this setting")
    if labels is not None:
        classes = int(labels.max()) + 1
        for node in range(count):
            if node in flipping:
                found[node].append(FlippedLabels(classes))
            if classes > 1 and (noise := config.label_noise * _place(node, count)):
                found[node].append(NoisyLabels(classes, noise, seed, node))
    if config.feature_shift is not None:
        for node in range(1, count):
            found[node].append(_shift(experiment, task, node))
    return {node: Changes(tuple(changes)) for node, changes in found.items() if changes}


def _place(node: int, count: int) -> float:
    """Return 0 for the first node, 1 for the last, and evenly spaced numbers for the others."""
    return node / (count - 1) if count > 1 else 0.0


def _shift(experiment: Experiment, task: Task, node: int) -> LocalChange:
    import torch

    from jwins.tasks.local_data import NoisyInputs, RotatedImages

    config, inputs = experiment.task.feature_shift, task.train.inputs
    place = _place(node, experiment.nodes.count)
    number = inputs.is_floating_point() or inputs.dtype == torch.uint8
    if isinstance(config, RotationConfig):
        if inputs.ndim < 3 or not number:
            problem = f"inputs of shape {tuple(inputs.shape)} and type {inputs.dtype} are not images; remove it"
            raise ConfigError("task.feature_shift.kind", "rotation", problem)
        return RotatedImages(config.degrees * place)
    assert isinstance(config, NoiseConfig)
    if not number:
        raise ConfigError(
            "task.feature_shift.kind", "noise", f"inputs are of type {inputs.dtype}; leave it out"
        )
    return NoisyInputs(config.sd * place * float(inputs.float().std()), experiment.run.seed, node)


_MAX_LABELS = 1000
"""Maximum number of labels that count as classes for a figure."""


def partition_counts(task: Task, partition: Sequence[npt.NDArray[np.int64]]) -> dict[str, Any]:
    """Return the content of ``partition.json``: samples of each node, by class if there are classes.

    Returns:
        ``samples`` (one number per node) and, for up to 1,000 classes, ``labels`` and ``counts`` (per node, one
        number per label).
    """
    import numpy as np

    from jwins.tasks.base import partition_labels_of

    found: dict[str, Any] = {"samples": [len(own) for own in partition]}
    labels = partition_labels_of(task)
    if labels is not None:
        values = np.unique(labels)
        if len(values) <= _MAX_LABELS:
            found["labels"] = values.tolist()
            found["counts"] = [
                np.bincount(np.searchsorted(values, labels[own]), minlength=len(values)).tolist()
                for own in partition
            ]
    return found


def write_partition(folder: Path, task: Task, partition: Sequence[npt.NDArray[np.int64]]) -> None:
    """Write each node's number of samples by class, and the node of each sample. Existing files are kept."""
    import numpy as np
    from safetensors.numpy import save

    if not (path := folder / "partition.json").is_file():
        write_atomically(path, (json.dumps(partition_counts(task, partition)) + "\n").encode())
    if not (path := folder / "partition.safetensors").is_file():
        holder = np.full(len(task.train), -1, dtype=np.min_scalar_type(-len(partition)))
        for node, own in enumerate(partition):
            holder[own] = node
        write_atomically(path, save({"node": holder}))


def sends(experiment: Experiment, rounds: int) -> int:
    """Return the number of frames times recipients of all nodes, without faults."""
    topology = build_topology(experiment)
    return sum(len(recipients) for r in range(rounds) for recipients in topology.at(r).recipients)


def raw_bytes_per_node(experiment: Experiment, dim: int, rounds: int) -> float:
    """Return the bytes of full sharing of raw float32: 4 per parameter and recipient, mean over nodes."""
    return 4.0 * dim * sends(experiment, rounds) / experiment.nodes.count


def mean_local_steps(tables: Mapping[str, Any]) -> float | None:
    """Return the mean number of local steps of a round over nodes; None if samples, speeds or draws decide it.

    Args:
        tables: an experiment's ``train``, ``nodes`` and ``run``. Samples decide the steps with
            ``local_epochs``, speeds with ``balanced`` and ``mode = "async"``, draws with ``participation``.
    """
    train, nodes, run = (tables.get(name, {}) for name in ("train", "nodes", "run"))
    steps = train.get("local_steps", 3)
    if train.get("local_epochs") is not None or train.get("balanced"):
        return None
    if nodes.get("participation", 1.0) < 1.0 or run.get("mode") == "async":
        return None
    return float(steps) if isinstance(steps, int) else sum(steps) / len(steps)


def bits_per_step(
    sent: float, raw: float, dim: int, rounds: int, steps: float | None
) -> tuple[float, float] | None:
    """Return bits per parameter and local step: sent to one neighbour, and sent and received in all.

    Args:
        sent: bytes that a node sent.
        raw: :func:`raw_bytes_per_node` of the same rounds.
        dim: parameters per model.
        rounds: number of rounds.
        steps: local steps of a round, or None.

    >>> bits_per_step(sent=8000.0, raw=8000.0, dim=100, rounds=10, steps=16.0)  # float32 to two neighbours
    (2.0, 8.0)
    """
    if not steps or not raw:
        return None
    return 32.0 * sent / raw / steps, 16.0 * sent / (dim * rounds * steps)
