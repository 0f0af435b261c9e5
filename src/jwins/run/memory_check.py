"""Whether memory does for what an experiment asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jwins.errors import ConfigError
from jwins.experiment.experiment import Experiment
from jwins.run.memory import memory_free

if TYPE_CHECKING:
    from torch import Tensor

    from jwins.tasks import Task

__all__ = ["check_batch_fits"]

_UNQUESTIONED = 128
"""Batches of so few samples fit wherever their model does, and are not looked into."""


def check_batch_fits(experiment: Experiment, task: Task, at_once: int) -> None:
    """Refuse a batch that memory cannot hold, before the system ends the process for it.

    Counts what is sure to be needed: the numbers of a round's samples, and in a local step the samples and what
    the model keeps of them for its gradient. On a GPU only the former; torch itself says what does not fit.

    Args:
        experiment: with the batch size.
        task: its workload.
        at_once: local steps that are under way at the same time.

    Raises:
        ConfigError: it cannot fit, with the largest that can.
    """
    import torch

    train, nodes = experiment.train, experiment.nodes.count
    free = memory_free()
    if train.batch_size <= _UNQUESTIONED or free is None:
        return
    each = 8.0 * nodes * train.local_steps
    if experiment.run.device == "cpu" or not torch.cuda.is_available():
        each += at_once * _bytes_per_sample(task)
    if train.batch_size * each > free:
        problem = (
            f"needs at least {train.batch_size * each / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are "
            f"free; use at most {int(free / each):,}"
        )
        raise ConfigError("train.batch_size", train.batch_size, problem)


def _bytes_per_sample(task: Task) -> float:
    """Of a training step: a sample, and all that the model keeps of it between forward and backward pass."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    from jwins.tasks import Batch

    batch = Batch(task.train.inputs[:2], task.train.targets[:2])
    with torch.random.fork_rng(devices=[]):
        model = task.model()
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
