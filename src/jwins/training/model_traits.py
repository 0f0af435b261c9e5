"""Traits of a model, found by running it once: its random draws, and whether it can be stacked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from jwins.errors import UsageError
from jwins.tasks.base import Batch, with_own_buffers
from jwins.training.batches import Shuffle
from jwins.training.flat_graph import flatten_graph
from jwins.training.layout import Layout
from jwins.training.node_store import aligned_rows
from jwins.training.stacked import MIN_STACK, StackedModel, Step, values_of
from jwins.training.training_context import TrainingContext, wrap_errors
from jwins.training.worker_module import WorkerModule

Batching = Literal["loop", "stacked", "auto"]

STACKED_MAX_PARAMETERS = 100_000
"""``auto`` on CPU: larger models gain little from stacking, if anything."""

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Largest difference of a stacked step from a loop's, relative to the largest number of a tensor: rounding
stays below it, and a mistake does not."""

_SLOW_WHEN_STACKED = (nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """Generators from which a task draws, and whether evaluation changes the model.

    Attributes:
        training: whether training draws from torch's own generator.
        evaluation: whether evaluation draws from torch's own generator.
        loss_generator: whether the loss draws from the generator that is passed to it.
        stateful: whether evaluation changes buffers, so that batches may depend on earlier ones.
    """

    training: bool
    evaluation: bool
    loss_generator: bool
    stateful: bool


def is_slow_stacked(model: nn.Module) -> nn.Module | None:
    """Return the first layer whose stacked kernels are slow on CPU, a convolution or recurrence, if any."""
    return next((module for module in model.modules() if isinstance(module, _SLOW_WHEN_STACKED)), None)


class TraitProbe:
    """Runs steps of fresh models on the first batches of one node.

    Args:
        initial: (P,) float32, the common start.
        buffers: local buffers at the start, by name.
        frozen: parameters that do not train, by name.
        shuffle: a node's stream of samples.
        first: the model that all of these are from.

    Raises:
        UsageError: parameters differ between two models, two models have layers in common, frozen parameters
            change in a step, or a step replaces a parameter.
        TrainingError: the model, the loss or the backward pass fails.
    """

    def __init__(
        self,
        context: TrainingContext,
        layout: Layout,
        initial: Tensor,
        buffers: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        shuffle: Shuffle,
        first: nn.Module,
    ) -> None:
        self._context, self._layout, self._initial = context, layout, initial
        self._buffers, self._frozen, self._shuffle = buffers, frozen, shuffle
        self._model = StackedModel(context, layout)
        self.traits = self._find_traits(first)

    def batching(self, requested: Batching, model: nn.Module) -> tuple[Literal["loop", "stacked"], str]:
        """Return loop or stacked, and the reason if loop; see :class:`~jwins.training.trainer.Trainer`."""
        if requested == "loop":
            return "loop", "loop was requested"
        if requested == "auto" and self._context.device.type == "cpu":
            slow = is_slow_stacked(model)
            if slow is not None:
                return "loop", f"{type(slow).__name__} is faster in a loop on CPU"
            numbers = self._layout.size + sum(tensor.numel() for tensor in self._frozen.values())
            if numbers > STACKED_MAX_PARAMETERS:
                return "loop", f"models of more than {STACKED_MAX_PARAMETERS} parameters gain nothing on CPU"
        problem = self._why_not_stacked()
        return ("loop", f"torch.func cannot stack this model: {problem}") if problem else ("stacked", "")

    def why_not_private(self, model: nn.Module) -> str:
        """Return why the gradient of a batch is not the mean of those of its samples; empty if it is."""
        for name, layer in model.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                problem = "mixes the samples of a batch, so that no gradient is of one sample alone"
                return f"layer {name} ({type(layer).__name__}) {problem}; use GroupNorm or LayerNorm"
        problem = self._why_not_stacked()
        if problem:
            return f"the gradients of single samples need torch.func, which cannot stack this model: {problem}"
        context = self._context
        module = WorkerModule(context.fresh_model(), self._layout)
        batch, generator = self._batch(0, None), context.generator("loss", 0, 0)
        other = self._trial_model()
        before = {name: buffer.clone() for name, buffer in other.named_buffers()}
        with context.preserved_generators():
            whole = float(context.loss(other, batch, generator).detach())
            for name, buffer in other.named_buffers():
                if not torch.equal(before[name], buffer):
                    return f"buffer {name} changes in training, and would leave the node without noise"
            losses, _ = self._model.of_samples(module, self._initial, self._buffers, batch, generator)
        apart = abs(float(losses.mean()) - whole) > _TOLERANCE[context.precision] * abs(whole) + 1e-6
        if apart and not (self.traits.training or self.traits.loss_generator):
            return "the loss of a batch is not the mean of the losses of its samples; change task.loss"
        return ""

    def flat_step(self, chunk: int) -> torch.fx.GraphModule | None:
        """Return the recorded step of a whole chunk; None if it cannot be recorded."""
        if self.traits.loss_generator:  # a generator is not a tensor, so the recording would fix it
            return None
        context = self._context
        module = WorkerModule(context.fresh_model(), self._layout)
        step = self._model.step(module, context.generator("loss", 0, 0))
        example = [*self._batch(0, chunk), *self._rows_at_start(chunk)]
        with context.preserved_generators(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                flat = flatten_graph(step, example)
                # Compare on another batch: the recording must not contain numbers of the first.
                return None if self._differs_from_loop(flat, chunk, 1) else flat
            except Exception:  # some steps cannot be recorded; they keep all their calls
                return None

    def _trial_model(self) -> nn.Module:
        return with_own_buffers(self._context.fresh_model().train())

    def _find_traits(self, first: nn.Module) -> ModelTraits:
        """Run one step and a small evaluation of a new model, and observe their effects."""
        context = self._context
        model = self._trial_model()
        changing = {id(layer) for layer in first.modules() if _changes(layer)}
        if common := next((layer for layer in model.modules() if id(layer) in changing), None):
            problem = "at each call, but every worker trains one of its own; make all layers in model()"
            raise UsageError(f"task.model() returns the same {type(common).__name__} {problem}")
        if not torch.allclose(self._layout.flatten(model), self._initial, rtol=0, atol=0, equal_nan=True):
            problem = "at each call; draw them from torch's own generator, which is seeded before"
            raise UsageError(f"task.model() returns other parameters {problem}")
        self._check_frozen(model, "differs between two calls of model(); draw it from torch's own generator")
        batch, before_step = self._batch(0, None), dict(model.named_parameters())
        generator = context.generator("loss", 0, 0)
        loss_generator = generator.get_state()
        with context.preserved_generators():
            before = context.global_state()
            with wrap_errors(0, 0, "loss"):
                loss = context.loss(model, batch, generator)
            with wrap_errors(0, 0, "backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            between = context.global_state()
            inputs, targets = context.first_test_samples()
            model.eval()
            kept = [buffer.clone() for buffer in model.buffers()]
            if len(inputs):
                with wrap_errors(0, 0, "evaluation"), torch.no_grad():
                    context.metrics_of(model(context.task.prepare(inputs)), targets)
            after = context.global_state()
        self._check_frozen(model, "changes in a step; register it as a buffer in model()")
        after_step = dict(model.named_parameters())
        for name in {**before_step, **after_step}:
            if before_step.get(name) is not after_step.get(name):
                problem = (
                    "is replaced by another object in a step; make all parameters in model(), then "
                    "change only their values"
                )
                raise UsageError(f"parameter {name!r} {problem}")
        buffers = list(model.buffers())
        return ModelTraits(
            training=_differ(before, between),
            evaluation=_differ(between, after),
            loss_generator=not torch.equal(loss_generator, generator.get_state()),
            stateful=len(kept) != len(buffers) or _differ(kept, buffers),
        )

    def _check_frozen(self, model: nn.Module, problem: str) -> None:
        """Refuse a model whose frozen parameters change, or differ from model to model."""
        parameters = dict(model.named_parameters())
        for name, before in self._frozen.items():
            if not torch.allclose(parameters[name], before, rtol=0, atol=0, equal_nan=True):
                raise UsageError(f"parameter {name!r}, whose requires_grad is False, {problem}")

    def _why_not_stacked(self) -> str:
        """Return why a stack of three nodes does not train and evaluate as one node does; empty if it does."""
        context = self._context
        module = WorkerModule(context.fresh_model(), self._layout)
        with context.preserved_generators(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                step = self._model.step(module, context.generator("loss", 0, 0))
                differing = self._differs_from_loop(step, MIN_STACK, 0)
                if differing:
                    return f"{differing} of a step differs from that in a loop"
                module.model.eval()
                with torch.no_grad():
                    inputs, _ = context.first_test_samples()
                    self._model.outputs(module, self._rows_at_start(MIN_STACK), inputs)
            except Exception as error:
                return f"{type(error).__name__}: {_first_line(error)}"
        for warning in caught:
            if "performance drop" in str(warning.message):
                return _first_line(warning.message)
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return ""

    def _differs_from_loop(self, step: Step, rows: int, number: int) -> str:
        """Return the first result of a stacked step that differs from a loop step; empty if the model draws."""
        context = self._context
        with torch.no_grad():
            losses, gradients, buffers = self._model.outcome(
                step(*self._batch(number, rows), *self._rows_at_start(rows))
            )
        if self.traits.training or self.traits.loss_generator:
            return ""
        model = self._trial_model()
        inputs, targets = self._batch(number, 1)
        loss = context.loss(model, Batch(inputs[0], targets[0]), context.generator("loss", 0, 0))
        loss.backward()  # type: ignore[no-untyped-call]
        in_loop = dict(model.named_buffers())
        pairs = [("the loss", losses[0], loss.detach())]
        pairs += [(name, tensor[0], in_loop[name]) for name, tensor in buffers.items()]
        own = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, gradient in gradients.items():
            expected = own[name]
            if (gradient is None) != (expected is None):
                return f"the gradient of {name}"
            if gradient is not None and expected is not None:
                pairs.append((f"the gradient of {name}", gradient[0], expected))
        tolerance = _TOLERANCE[context.precision]
        for name, got, wanted in pairs:
            scale = float(wanted.abs().max()) if wanted.numel() else 0.0
            if not torch.allclose(got, wanted, rtol=0, atol=tolerance * scale + 1e-6, equal_nan=True):
                return name
        return ""

    def _rows_at_start(self, rows: int) -> list[Tensor]:
        """Return tensors of ``rows`` rows at the start of the run, with the memory layout of the real ones."""
        buffers = [tensor.expand(rows, *tensor.shape).clone() for tensor in self._buffers.values()]
        return values_of(self._layout, self._layout.views(aligned_rows(self._initial, rows)), buffers)

    def _batch(self, step: int, rows: int | None) -> Batch:
        """Return the node's batch of a step, for ``rows`` rows; None for one without the dimension of rows."""
        size = self._context.batch_size
        index = torch.from_numpy(self._shuffle.take(step * size, size))
        if rows is not None:
            index = index.expand(rows, -1)
        return self._context.gather(index.to(self._context.device))


def _changes(layer: nn.Module) -> bool:
    """Return whether training changes a layer itself, besides those in it."""
    return bool(layer._buffers) or any(p is not None and p.requires_grad for p in layer._parameters.values())


def _differ(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
