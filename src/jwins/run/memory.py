"""Memory: the need of a run, the free amount, the largest batch that fits, and the peak of this process."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jwins.errors import ConfigError
from jwins.experiment.experiment import Experiment
from jwins.run.builders import build_sharing, build_task, build_topology

if TYPE_CHECKING:
    from torch import Tensor

    from jwins.tasks import Task

_PROCESS_BYTES = 700e6
"""Python, torch and the working memory of training and evaluation; 350 to 600 MB measured."""


_VECTORS = 20
"""Vectors of float32 per node: parameters before and after training, the trainer's row, its gradient, an
algorithm's state, sent and decoded updates, evaluated models; and all of it again for a checkpoint."""


def memory_needed(experiments: Sequence[Experiment], actors: int = 1) -> float:
    """Return the bytes that the largest of some runs may take, estimated rather too high.

    It counts the data once, and N x C numbers for each of about 20 vectors, more with momenta (two per
    parameter for all optimizers but plain SGD) and with replicas of neighbours.

    Args:
        experiments: experiments of the runs.
        actors: processes that share the nodes of a run; the result is for each of them.

    Raises:
        DataError: a task's data are missing.
    """
    import torch

    tasks: dict[str, tuple[float, int]] = {}
    largest = 0.0
    for experiment in experiments:
        config = experiment.task
        key = json.dumps(config.model_dump(mode="json", exclude={"partition"})) + repr(config.own)
        if key not in tasks:
            task = build_task(experiment)
            with torch.random.fork_rng(devices=[]):
                parameters = list(task.model().parameters())
            dim = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            frozen = [parameter for parameter in parameters if not parameter.requires_grad]
            tensors = [task.train.inputs, task.train.targets, task.test.inputs, task.test.targets, *frozen]
            tasks[key] = (float(sum(t.numel() * t.element_size() for t in tensors)), dim)
        data_bytes, dim = tasks[key]
        optimizer = experiment.train.optimizer
        plain = optimizer.kind == "sgd" and not optimizer.options.get("momentum")
        vectors = _VECTORS + (0 if plain else 4) + (0 if experiment.train.outer is None else 4)
        sharing = build_sharing(experiment)
        if sharing.remembers_peers:
            recipients = build_topology(experiment, of_all=True).at(0).recipients
            vectors += 2 * (1 + max(map(len, recipients)))
        nodes = -(-experiment.nodes.count // actors)
        size_bytes = 4.0 * nodes * sharing.update_dim(dim) * vectors
        largest = max(largest, _PROCESS_BYTES + 2.0 * data_bytes + size_bytes)
    return largest


def memory_free() -> float | None:
    """Return the free bytes of the machine, or up to this process's limit; None if unknown."""
    free: list[float] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = Path("/proc/meminfo").read_text(encoding="ascii").split()
        free.append(float(words[words.index("MemAvailable:") + 1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = float((group / "memory.max").read_text(encoding="ascii"))  # "max" is not a number
        used = float((group / "memory.current").read_text(encoding="ascii"))
        counted = (group / "memory.stat").read_text(encoding="ascii").split()
        cache = float(counted[counted.index("inactive_file") + 1]) if "inactive_file" in counted else 0.0
        free.append(limit - used + cache)
    return min(free) if free else None


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
    import torch

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
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    from jwins.tasks.base import Batch, with_own_buffers

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
