"""Memory: the need of a run, the largest batch that fits, and the peak of this process."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from jwins.engines.memory import ExchangeMemory, memory_free
from jwins.errors import ConfigError
from jwins.experiment.experiment import Experiment
from jwins.run.builders import build_sharing, build_task, build_topology
from jwins.tasks import Task
from jwins.tasks.base import Batch, with_own_buffers

_PROCESS_BYTES = 700e6
"""Python, torch and the working memory of training and evaluation; 350 to 600 MB measured."""

_VECTORS = 4
"""Vectors of float32 per node beside those of its exchange: trainer's row, gradient, evaluated models."""


def memory_needed(experiments: Sequence[Experiment], actors: int = 1) -> float:
    """Return the bytes that the largest of some runs may take, estimated rather too high.

    It counts the data twice, and for each node the vectors of training, of momenta (two per parameter for all
    optimizers but plain SGD, and copies of them for a checkpoint) and of an exchange. One decoded update and
    one replica per node are enough, because they serve all neighbours in a process. Actors also send their
    state for a checkpoint.

    Args:
        experiments: experiments of the runs.
        actors: processes that share the nodes of a run; the result is for each of them.

    Raises:
        DataError: a task's data are missing.
    """
    from jwins.sharing.replicas import OnReplicas

    tasks: dict[str, tuple[float, int]] = {}
    largest = 0.0
    for experiment in experiments:
        config = experiment.task
        key = json.dumps(config.model_dump(mode="json", exclude={"partition"})) + repr(config.own)
        if key not in tasks:
            task = build_task(experiment)
            dim, frozen = trained_parameters(task)
            tensors = [task.train.inputs, task.train.targets, task.test.inputs, task.test.targets, *frozen]
            tasks[key] = (float(sum(t.numel() * t.element_size() for t in tensors)), dim)
        data_bytes, dim = tasks[key]
        optimizer = experiment.train.optimizer
        plain = optimizer.kind == "sgd" and not optimizer.options.get("momentum")
        vectors = _VECTORS + (0 if plain else 4) + (0 if experiment.train.outer is None else 4)
        sharing = build_sharing(experiment)
        exchange = ExchangeMemory.of(sharing, dim, 1)
        peak = exchange.peak_bytes
        one_replica = actors == 1 and isinstance(sharing, OnReplicas)
        if sharing.remembers_peers and not one_replica:  # a graph of many nodes takes long to draw
            exchange = exchange_of(experiment, dim)
        steady = exchange.steady_bytes * (1 if actors == 1 else 2)
        nodes = -(-experiment.nodes.count // actors)
        largest = max(
            largest, _PROCESS_BYTES + 2.0 * data_bytes + nodes * (4.0 * dim * vectors + steady + peak)
        )
    return largest


def trained_parameters(task: Task) -> tuple[int, list[Tensor]]:
    """Return the number of trained parameters of a task's model, and its frozen parameters."""
    with torch.random.fork_rng(devices=[]):
        parameters = list(task.model().parameters())
    frozen: list[Tensor] = [parameter for parameter in parameters if not parameter.requires_grad]
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad), frozen


def exchange_of(experiment: Experiment, dim: int) -> ExchangeMemory:
    """Return the memory that an exchange takes at the node with the most neighbours in the first round."""
    senders = build_topology(experiment, of_all=True).at(0).senders
    return ExchangeMemory.of(build_sharing(experiment), dim, max(map(len, senders)))


_UNQUESTIONED = 128
"""Batches up to this number of samples fit if the model does, and are not checked."""


def check_batch_fits(experiment: Experiment, task: Task, at_once: int) -> None:
    """Refuse a batch that memory cannot hold, before the system ends the process for it.

    It counts the memory that is certainly needed: the indices of a round's samples, and in a local step the
    samples and the model's activations for the gradient. On a GPU it counts only the indices; torch reports
    the rest.

    Raises:
        ConfigError: the batch cannot fit; the message has the largest size that can.
    """
    train, nodes = experiment.train, experiment.nodes.count
    free = memory_free()
    if train.batch_size <= _UNQUESTIONED or free is None:
        return
    steps = max(train.local_steps) if isinstance(train.local_steps, tuple) else train.local_steps
    each = 8.0 * nodes * steps
    if experiment.run.device == "cpu" or not torch.cuda.is_available():
        each += at_once * _bytes_per_sample(task)
    if train.batch_size * each > free:
        problem = (
            f"needs at least {train.batch_size * each / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are "
            f"free; use at most {int(free / each):,}"
        )
        raise ConfigError("train.batch_size", train.batch_size, problem)


def _bytes_per_sample(task: Task) -> float:
    """Return the bytes per sample of a training step: the sample, and the model's activations for it."""
    batch = Batch(task.train.inputs[:2].clone(), task.train.targets[:2].clone())
    with torch.random.fork_rng(devices=[]):
        model = with_own_buffers(task.model())
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            task.loss(model, batch, torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        kept.pop(parameter.data_ptr(), None)
    samples = sum(tensor.numel() * tensor.element_size() for tensor in batch)
    return (samples + sum(kept.values())) / len(batch.inputs)


def peak_bytes() -> int:
    """Return the peak of resident memory of this process.

    On Linux it is not ``ru_maxrss``, which also counts the parent's memory at the start of the process.
    """
    import resource

    with contextlib.suppress(OSError):
        for row in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if row.startswith("VmHWM:"):
                return 1024 * int(row.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
