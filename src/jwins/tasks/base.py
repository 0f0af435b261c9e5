"""Base class of a task: data, a model, a loss and metrics.

A user's own task subclasses :class:`Task`, sets ``train`` and ``test`` and defines ``model``; everything
else has a default for classification. ``docs/how-to/own-task.md`` shows a complete one.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from jwins.errors import ConfigError, UsageError, error_text


class Batch(NamedTuple):
    """Samples of one step, as stored in the data set.

    Attributes:
        inputs: (B, ...) of the data set's type, before :meth:`Task.prepare`.
        targets: (B, ...).
    """

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Dataset:
    """Samples, kept in memory once; nodes have arrays of indices.

    Attributes:
        inputs: (n, ...) of any type; store images as uint8 and convert in :meth:`Task.prepare`.
        targets: (n, ...).
        keys: (n,) int64, the natural owner of each sample (writer, user, role), or None. A tensor is accepted,
            too, and kept as an array.

    Raises:
        UsageError: lengths differ, or a type is wrong.

    >>> len(Dataset(torch.zeros(3, 2), torch.zeros(3)))
    3
    """

    inputs: Tensor
    targets: Tensor
    keys: npt.NDArray[np.int64] | None

    def __init__(
        self, inputs: Tensor, targets: Tensor, keys: npt.NDArray[np.int64] | Tensor | None = None
    ) -> None:
        if isinstance(keys, Tensor):
            keys = keys.detach().cpu().numpy()
        for name, value in (("inputs", inputs), ("targets", targets), ("keys", keys)):
            object.__setattr__(self, name, value)
        for name in ("inputs", "targets"):
            found = getattr(self, name)
            if not isinstance(found, Tensor):
                raise UsageError(
                    f"Dataset.{name} is of type {type(found).__name__}: expected a torch tensor; "
                    f"torch.as_tensor makes one of an array or a list"
                )
        if self.inputs.ndim == 0 or self.targets.ndim == 0 or len(self.inputs) != len(self.targets):
            raise UsageError(
                f"Dataset: inputs of shape {tuple(self.inputs.shape)} and targets of shape "
                f"{tuple(self.targets.shape)}; expected one target per input along the first dimension"
            )
        if self.keys is not None and not isinstance(self.keys, np.ndarray):
            raise UsageError(
                f"Dataset.keys is of type {type(self.keys).__name__}: expected a tensor or an array of int64; "
                f"torch.as_tensor makes one of a list"
            )
        if self.keys is not None and (self.keys.shape != (len(self),) or self.keys.dtype != np.int64):
            raise UsageError(
                f"Dataset.keys: shape {self.keys.shape}, {self.keys.dtype}; expected ({len(self)},) int64, "
                f"the owner of each sample"
            )

    def __len__(self) -> int:
        return len(self.inputs)


def labels_of(samples: Dataset) -> npt.NDArray[np.int64] | None:
    """Return the targets, (n,) int64, if they are one integer per sample; else None."""
    targets = samples.targets
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
        return None
    return targets.numpy().astype(np.int64)


def with_own_buffers(model: nn.Module) -> nn.Module:
    """Give the buffers of a model memory of their own, for a trial; they may be tensors that the task keeps."""
    copies = {id(buffer): buffer.clone() for buffer in model.buffers() if not nn.parameter.is_lazy(buffer)}
    for module in model.modules():
        for name, own in list(module._buffers.items()):
            if id(own) in copies:
                module._buffers[name] = copies[id(own)]
    return model


def partition_labels_of(task: Task) -> npt.NDArray[np.int64] | None:
    """Return ``task.partition_labels()``, an array, a tensor or a list, as (n,) int64; None for no labels.

    Raises:
        UsageError: it fails, or returns anything but one integer per training sample.
    """
    where = f"{type(task).__name__}.partition_labels()"
    try:
        labels = task.partition_labels()
        found = np.zeros(0) if labels is None else np.asarray(labels)
    except Exception as error:
        raise UsageError(f"{where} failed: {error_text(error)}") from error
    if labels is None:
        return None
    if found.dtype.kind not in "biu" or found.shape != (len(task.train),):
        problem = f"{found.dtype} of shape {found.shape}"
        raise UsageError(f"{where} returned {problem}: expected ({len(task.train)},) integers, one per sample")
    return found.astype(np.int64)


class Task(abc.ABC):
    """Base class of a task. Subclasses set ``train`` and ``test`` in ``__init__`` and define :meth:`model`.

    The constructor's argument names are the keys that ``task.options`` may have; an argument ``data``
    receives ``task.data``. Several threads use a task at once, so nothing in it may change after ``__init__``.
    ``prepare``, ``loss`` and ``metrics`` must work under ``torch.func.vmap``; if they do not, nodes are
    trained one by one.

    Attributes:
        name: its name in tables and figures.
        better: better direction of each metric. A subclass lists only metrics that it adds or changes.
        train: samples that are divided among the nodes.
        test: samples on which every node is evaluated.
    """

    name: str = "own task"
    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {"accuracy": "higher", "loss": "lower"}
    train: Dataset
    test: Dataset

    @classmethod
    def directions(cls) -> dict[str, str]:
        """Return the better direction of each metric that the class or one of its bases lists.

        Raises:
            ConfigError: a word other than ``higher`` and ``lower``.
        """
        found: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            listed = vars(base).get("better", {})
            if not isinstance(listed, Mapping):
                problem = "expected a direction for each metric, such as {'error': 'lower'}"
                raise ConfigError(f"{base.__name__}.better", listed, problem)
            found |= listed
        for metric, direction in found.items():
            if direction not in ("higher", "lower"):
                raise ConfigError(f"{cls.__name__}.better[{metric!r}]", direction, "expected higher or lower")
        return found

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """Make a new model, with parameters from torch's global generator, which the caller seeds."""

    def prepare(self, inputs: Tensor) -> Tensor:
        """Convert stored inputs to the model's inputs; by default they are the same.

        Args:
            inputs: (B, ...) as in the data set, e.g. uint8 images.

        Returns:
            (B, ...), e.g. float32 images of mean 0.
        """
        return inputs

    def loss(
        self, model: Callable[[Tensor], Tensor], batch: Batch, generator: torch.Generator | None
    ) -> Tensor:
        """Return the training loss of a batch, by default the mean cross-entropy.

        Args:
            model: maps prepared inputs to outputs. A function, not always a module.
            batch: the samples.
            generator: for random augmentation; None when nodes are trained together.

        Returns:
            A scalar to differentiate.
        """
        return functional.cross_entropy(model(self.prepare(batch.inputs)), batch.targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the metrics of each sample; by default those of classification.

        Args:
            outputs: (n, classes), the model's outputs for prepared inputs.
            targets: (n,) int64.

        Returns:
            (n,) float32 by name. One name must be ``loss``. The means over the test set are reported, or the
            metrics that :meth:`transform` makes of them.
        """
        return {
            "accuracy": (outputs.argmax(dim=-1) == targets).float(),
            "loss": functional.cross_entropy(outputs, targets, reduction="none"),
        }

    def transform(self, means: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the metrics to report, from the means over the whole test set; by default the same.

        Override it for metrics that are not means over samples. F1, for example, is ``2 tp / (2 tp + fp + fn)``
        of the means of three numbers that are 0 or 1 for each sample.

        Args:
            means: means of each metric of :meth:`metrics`, (models,) float64, to be transformed one by one.

        Returns:
            Name to (models,) float64.

        >>> means = {"squared_error": torch.tensor([4.0]), "loss": torch.tensor([0.5])}
        >>> {"rmse": means["squared_error"].sqrt(), "perplexity": means["loss"].exp()}
        {'rmse': tensor([2.]), 'perplexity': tensor([1.6487])}
        """
        return means

    def partition_labels(self) -> npt.NDArray[np.int64] | None:
        """Return the (n,) int64 labels by which ``shards`` and ``dirichlet`` divide the training samples.

        By default these are the targets, if there is one integer per sample. None means no labels.
        """
        return labels_of(self.train)
