"""Checks that memory suffices for an experiment."""

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
"""Batches up to this number of samples fit if the model does, and are not checked."""


def check_batch_fits(experiment: Experiment, task: Task, at_once: int) -> None:
    """Refuse a batch that memory cannot hold, before the system ends the process for it.

    It counts the memory that is certainly needed: the indices of a round's samples, and in a local step the
    samples and the model's activations for the gradient. On a GPU it counts only the indices; torch reports
    the rest.

    Args:
        experiment: the experiment.
        task: its task.
        at_once: number of simultaneous local steps.

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
