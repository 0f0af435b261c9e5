"""Context of both ways of training: the task on its device, fresh models, seeded generators, worker threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from jwins.errors import ConfigError, JwinsError, UsageError, error_text
from jwins.rng import EVERY_NODE, EVERY_ROUND, torch_generator
from jwins.tasks.base import Batch, Task
from jwins.training.thread_pool import ThreadPool

Device = Literal["cpu", "cuda", "auto"]

Precision = Literal["float32", "bfloat16"]
"""Precision of a model's operations in training; bfloat16 as in torch's autocast. Parameters, gradients,
losses, optimizers and evaluations are float32 either way."""

EVALUATION_BATCH = 256
"""Maximum number of test samples per forward pass, which limits the memory of evaluation."""
EVALUATION_BATCH_CPU = 2**17
"""On the CPU, maximum of numbers in the inputs of a forward pass, so that activations stay in the cache."""


class TrainingError(JwinsError):
    """Training or evaluating a node failed; the message names the node, the round and the stage."""


class TrainingContext:
    """A task prepared for training and evaluation by worker threads.

    The constructor sets the number of torch's intra-op threads to 1, for the rest of the process.

    Args:
        device: device of parameters and data; ``auto`` is CUDA if available.
        threads: maximum number of workers.

    Raises:
        ConfigError: no CUDA device, or one that has no bfloat16.
    """

    def __init__(
        self,
        task: Task,
        *,
        seed: int,
        local_steps: int,
        batch_size: int,
        device: Device,
        threads: int,
        precision: Precision = "float32",
    ) -> None:
        torch.set_num_threads(1)
        self.task = task
        self.device = resolve_device(device)
        self.precision = precision
        _check_precision(precision, self.device)
        self.seed, self.local_steps, self.batch_size = seed, local_steps, batch_size
        self._train = Batch(task.train.inputs.to(self.device), task.train.targets.to(self.device))
        self._test = Batch(task.test.inputs.to(self.device), task.test.targets.to(self.device))
        self.num_test = len(self._test.inputs)
        self.pool = ThreadPool(threads, "jwins-train")

    # --- Models and randomness ----------------------------------------------------------------------------

    def fresh_model(self) -> nn.Module:
        """Make the initial model of all nodes.

        Raises:
            UsageError: the task returns something else.
        """
        with self.preserved_generators():
            self.seed_global("model", EVERY_NODE, EVERY_ROUND)
            model = self.task.model()
        if not isinstance(model, nn.Module):
            raise UsageError(f"task.model() returned {type(model).__name__}: expected a torch.nn.Module")
        return model.to(self.device)

    @contextmanager
    def preserved_generators(self) -> Iterator[None]:
        """Within the block, preserve torch's global generators."""
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield

    def global_state(self) -> list[Tensor]:
        """Return the state of torch's global generators."""
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def seed_global(self, purpose: str, node: int, round: int) -> None:
        """Seed torch's global generators; only within ``preserved_generators`` and on one thread."""
        value = torch_generator(self.seed, purpose, node=node, round=round).initial_seed()
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)

    def generator(self, purpose: str, node: int, round: int) -> torch.Generator:
        """Return the generator of a node in a round for one purpose."""
        return torch_generator(self.seed, purpose, node=node, round=round, device=self.device)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Return the task's loss of a batch, with the model in the precision of training.

        Raises:
            UsageError: it is not a scalar.
        """
        loss = self.task.loss(self._in_precision(model), batch, generator)
        check_scalar(loss)
        return loss

    def _in_precision(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        if self.precision == "float32":
            return model

        def run(inputs: Tensor) -> Tensor:
            # Casts are not kept from one operation to the next: under vmap they would outlive their tensors.
            with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
                outputs: Any = model(inputs)
            return outputs.float() if isinstance(outputs, Tensor) else outputs

        return run

    # --- Data ---------------------------------------------------------------------------------------------

    def gather(self, index: Tensor) -> Batch:
        """Return training samples at positions of any shape, (..., B) int64."""
        flat = index.reshape(-1)  # five times as fast as indexing with a tensor
        inputs, targets = (data.index_select(0, flat) for data in self._train)
        return Batch(
            inputs.view(*index.shape, *inputs.shape[1:]), targets.view(*index.shape, *targets.shape[1:])
        )

    def first_test_samples(self) -> Batch:
        """Return the first two test samples, or fewer if the test set is smaller."""
        return Batch(self._test.inputs[:2], self._test.targets[:2])

    def test_slices(self, count: int) -> list[slice]:
        """Return slices of ``count`` test samples that are evaluated together."""
        size = EVALUATION_BATCH
        if self.device.type == "cpu":
            size = min(size, max(16, EVALUATION_BATCH_CPU // max(1, self._test.inputs[:1].numel())))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def test_batch(self, samples: Tensor | None, rows: slice) -> Batch:
        """Return those test samples in ``rows`` of the positions ``samples`` (m,); None stands for all."""
        at: Any = rows if samples is None else samples[rows]
        return Batch(self._test.inputs[at], self._test.targets[at])

    def metrics_of(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """Return each of the task's metrics per sample.

        Raises:
            UsageError: a metric does not have one number per sample.
        """
        found = dict(self.task.metrics(outputs, targets))
        for name, values in found.items():
            if values.shape != (len(targets),):
                raise UsageError(
                    f"metric {name!r} has shape {tuple(values.shape)}: "
                    f"expected one number per sample, ({len(targets)},)"
                )
        return found

    def transformed(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the metrics that the task reports, from means over the test set.

        Raises:
            UsageError: a metric does not have one number per model.
        """
        return _checked_means(self.task.transform(means), means)


def _checked_means(found: Mapping[str, Any], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the metrics of ``task.transform`` as (models,) float64."""
    (models,) = next(iter(given.values())).shape
    if not isinstance(found, Mapping):
        raise UsageError(f"task.transform returned a {type(found).__name__}: expected metrics by name")
    for name, values in found.items():
        if not isinstance(values, Tensor) or values.shape != (models,):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UsageError(
                f"task.transform: metric {name!r} is {shape}: expected one number per model, ({models},)"
            )
    return {name: values.double() for name, values in found.items()}


def resolve_device(device: Device) -> torch.device:
    """Return the device of training.

    Raises:
        ConfigError: this machine has no such device.
    """
    if device not in ("cpu", "cuda", "auto"):
        raise ConfigError("run.device", device, "expected cpu, cuda or auto")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device", device, "torch sees no CUDA device here; use cpu or auto")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _check_precision(precision: str, device: torch.device) -> None:
    if precision not in get_args(Precision):
        raise ConfigError("train.precision", precision, "expected float32 or bfloat16")
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        problem = "the CUDA device here does not support it; write float32"
        raise ConfigError("train.precision", precision, problem)


def check_scalar(loss: object) -> None:
    """Raise a UsageError unless a task's loss is a tensor with one number."""
    if not isinstance(loss, Tensor):
        raise UsageError(f"task.loss returned {type(loss).__name__}: expected a tensor that holds one number")
    if loss.dim() != 0:
        raise UsageError(f"task.loss has shape {tuple(loss.shape)}: expected a scalar, e.g. its mean")


def training_error(node: object, round: int | None, stage: str, error: Exception) -> TrainingError:
    """Describe an error with its node, round and stage."""
    at = "" if round is None else f", round {round}"
    return TrainingError(f"node {node}{at}, {stage}: {error_text(error)}")


@contextmanager
def wrap_errors(node: object, round: int | None, stage: str) -> Iterator[None]:
    """Within the block, convert errors to a :class:`TrainingError`."""
    try:
        yield
    except Exception as error:
        raise training_error(node, round, stage, error) from error
