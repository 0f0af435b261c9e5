"""Optimizers by name, and their state for many nodes."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.training.learning_rate import LearningRateSchedule
from jwins.training.quasi_global import QuasiGlobal
from jwins.validation import MOMENTUM, NORM

OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
}
"""Elementwise optimizers by name: each number of a vector is updated independently, so nodes can be stacked."""

_IMPLEMENTATION_OPTIONS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})

_SCALAR_START = {"step": 0.0, "mu_product": 1.0}  # torch's scalars per parameter before the first step


@dataclass(frozen=True)
class Optimizer:
    """Optimizer of the nodes, from ``torch.optim``.

    Attributes:
        kind: a name in :data:`OPTIMIZERS`.
        options: arguments of the optimizer by torch's names, e.g. ``{"lr": 0.05, "momentum": 0.9}``.
        state: ``keep``: each node keeps its momenta from round to round; ``reset``: each round starts without
            them.
        quasi_global: factor of a quasi-global momentum, for ``sgd`` with ``momentum`` only: local steps start
            from a momentum of the merged models, see :class:`~jwins.training.quasi_global.QuasiGlobal`. None
            for a momentum of the node's own steps.
        weight_decay_on: ``all`` parameters, or ``matrices``: all except those of fewer than two dimensions,
            such as biases and the scales of norms.
        clip_norm: largest norm of a step's gradient, over all parameters together; a longer gradient is scaled
            down to it. None for no limit.
        schedule: schedule of the learning rate; None to leave it as it is.

    Raises:
        ConfigError: an unknown name, or a value that torch does not accept, at ``train.optimizer.<key>``; a
            quasi-global momentum without ``sgd``, momentum, a kept state or a constant learning rate above 0;
            ``matrices`` without weight decay.

    >>> Optimizer("sgd", {"lr": 0.05, "momentum": 0.9})
    Optimizer(kind='sgd', options={'lr': 0.05, 'momentum': 0.9}, state='keep', quasi_global=None, \
weight_decay_on='all', clip_norm=None, schedule=None)
    >>> Optimizer("sgd", {"rate": 0.05})
    Traceback (most recent call last):
    ...
    jwins.errors.ConfigError: train.optimizer.rate = 0.05: unknown option of sgd; expected one of \
lr, momentum, dampening, weight_decay, nesterov, maximize
    """

    kind: str = "sgd"
    options: Mapping[str, Any] = field(default_factory=dict)
    state: Literal["keep", "reset"] = "keep"
    quasi_global: float | None = None
    weight_decay_on: Literal["all", "matrices"] = "all"
    clip_norm: float | None = None
    schedule: LearningRateSchedule | None = None

    def __post_init__(self) -> None:
        if self.kind not in OPTIMIZERS:
            raise ConfigError("train.optimizer.kind", self.kind, f"expected one of {', '.join(OPTIMIZERS)}")
        if self.state not in ("keep", "reset"):
            raise ConfigError("train.optimizer.state", self.state, "expected keep or reset")
        known = {
            name: parameter.default
            for name, parameter in inspect.signature(OPTIMIZERS[self.kind]).parameters.items()
            if name not in _IMPLEMENTATION_OPTIONS
        }
        for name, value in self.options.items():
            path = f"train.optimizer.{name}"
            if name not in known:
                raise ConfigError(
                    path, value, f"unknown option of {self.kind}; expected one of {', '.join(known)}"
                )
            _check_option(path, value, known[name])
        try:
            self.build([torch.zeros(1)])
        except (TypeError, ValueError) as error:
            for name, value in self.options.items():
                try:
                    _built(self.kind, [torch.zeros(1)], {name: value})
                except (TypeError, ValueError) as alone:
                    raise ConfigError(f"train.optimizer.{name}", value, str(alone)) from None
            raise ConfigError("train.optimizer", dict(self.options), str(error)) from None
        if self.clip_norm is not None:
            NORM.check("train.clip_norm", self.clip_norm)
        self._check_weight_decay()
        if self.quasi_global is not None:
            self._check_quasi_global(self.quasi_global)

    def _check_weight_decay(self) -> None:
        path = "train.optimizer.weight_decay_on"
        if self.weight_decay_on not in ("all", "matrices"):
            raise ConfigError(path, self.weight_decay_on, "expected all or matrices")
        if self.weight_decay_on == "matrices" and not self.build([torch.zeros(1)]).defaults["weight_decay"]:
            remedy = "set weight_decay, or leave weight_decay_on out"
            raise ConfigError(path, self.weight_decay_on, f"nothing decays, as weight_decay is 0; {remedy}")

    def _check_quasi_global(self, factor: float) -> None:
        _check_option("train.optimizer.quasi_global", factor, 0.0)
        MOMENTUM.check("train.optimizer.quasi_global", factor)
        if self.kind != "sgd":
            remedy = 'use kind = "sgd" with momentum, or remove quasi_global'
            raise ConfigError(
                "train.optimizer.quasi_global", factor, f"{self.kind} has no quasi-global momentum: {remedy}"
            )
        if not self.options.get("momentum"):
            remedy = "quasi_global needs momentum above 0, such as 0.9"
            raise ConfigError("train.optimizer.momentum", self.options.get("momentum", 0), remedy)
        if self.state == "reset":
            remedy = 'quasi_global keeps a state; use "keep", or remove quasi_global'
            raise ConfigError("train.optimizer_state", self.state, remedy)
        if self.lr == 0:
            raise ConfigError("train.optimizer.lr", 0, "expected above 0: quasi_global divides by it")
        if self.schedule is not None:
            problem = "quasi_global needs one learning rate for all rounds; remove one of the two"
            raise ConfigError("train.schedule.kind", self.schedule.kind, problem)

    @cached_property
    def lr(self) -> float:
        """Return the learning rate, or torch's default if it is not given."""
        return float(self.build([torch.zeros(1)]).defaults["lr"])

    def build(self, parameters: Sequence[Tensor], dims: Sequence[int] | None = None) -> torch.optim.Optimizer:
        """Return the torch optimizer of these tensors.

        Args:
            parameters: parameters of the model, or of many as stacks.
            dims: number of dimensions of each in the model; None for those of ``parameters``.
        """
        if self.weight_decay_on == "all":
            return _built(self.kind, parameters, self.options)
        in_model = [tensor.dim() for tensor in parameters] if dims is None else dims
        pairs = list(zip(parameters, in_model, strict=True))
        groups: list[dict[str, Any]] = [
            {"params": [tensor for tensor, count in pairs if count >= 2]},
            {"params": [tensor for tensor, count in pairs if count < 2], "weight_decay": 0.0},
        ]
        return _built(self.kind, [group for group in groups if group["params"]], self.options)

    def lr_at(self, step: int) -> float | None:
        """Return the learning rate of a local step, counted over all rounds; None for that of the options."""
        return None if self.schedule is None else self.lr * self.schedule.factor(step)

    def sample_state(self) -> dict[str, Tensor]:
        """Return torch's state for a parameter of shape (1,) after a step with gradient 0."""
        sample = torch.zeros(1, requires_grad=True)
        sample.grad = torch.zeros(1)
        built = self.build([sample])
        optimizer_step(built, first=False)
        return {key: value for key, value in built.state[sample].items() if isinstance(value, Tensor)}

    def has_state(self) -> bool:
        """Return whether a step depends on earlier ones."""
        return bool(self.sample_state())


def _check_option(path: str, value: object, default: object) -> None:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(path, value, "expected true or false")
        return
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or len(value) != len(default):
            raise ConfigError(path, value, f"expected {len(default)} numbers, such as {list(default)}")
        for i, entry in enumerate(value):
            _check_option(f"{path}[{i}]", entry, 0.0)
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(path, value, "expected a finite number")


def _torch_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


class OptimizerState:
    """Optimizer state of all nodes: a matrix for each kind of moment, shaped as the parameters.

    Args:
        stride: length of a row, at least P.
        tensors: number of parameter tensors of the model.

    Attributes:
        moments: by torch's name, (rows, stride) float32.
        scalars: torch's counters per parameter by name, (rows, tensors) on the CPU. ``started`` is an addition,
            because torch's SGD omits dampening in its first step.
        quasi_global: used in place of these if momentum is quasi-global; else None.
    """

    def __init__(
        self, optimizer: Optimizer, rows: int, stride: int, tensors: int, device: torch.device
    ) -> None:
        self.moments: dict[str, Tensor] = {}
        self.scalars: dict[str, Tensor] = {}
        self.quasi_global: QuasiGlobal | None = None
        if optimizer.state == "reset":
            return
        if optimizer.quasi_global is not None:
            self.quasi_global = QuasiGlobal(optimizer.quasi_global, optimizer.lr, rows, stride, device)
            return
        start = 0.0
        if optimizer.kind == "adagrad":
            start = float(optimizer.options.get("initial_accumulator_value", 0.0))
        for key, value in optimizer.sample_state().items():
            if value.dim() == 0:
                self.scalars[key] = torch.full((rows, tensors), _SCALAR_START[key], dtype=value.dtype)
            else:
                self.moments[key] = torch.full((rows, stride), start, dtype=torch.float32, device=device)
        if optimizer.kind == "sgd" and optimizer.options.get("dampening", 0) and self.moments:
            self.scalars["started"] = torch.zeros((rows, tensors))

    def all_moments(self) -> Mapping[str, Tensor]:
        """Return the state per parameter, by name, (rows, stride) float32 each."""
        return self.moments if self.quasi_global is None else self.quasi_global.moments

    def all_counters(self) -> Mapping[str, Tensor]:
        """Return the scalar state of each node, by name, (rows, n) each."""
        return self.scalars if self.quasi_global is None else self.quasi_global.counters


def optimizer_step(built: torch.optim.Optimizer, first: bool, lr: float | None = None) -> None:
    """Take one step.

    Args:
        built: an optimizer of torch whose tensors have gradients.
        first: whether it is the first step of a node with kept SGD and dampening, whose buffers then hold
            zeros, where torch would have none.
        lr: the learning rate from now on; None to leave it as it is.
    """
    if lr is not None:
        for group in built.param_groups:
            group["lr"] = lr
    if not first:
        _eager_step(built)
        return
    kept = [group["dampening"] for group in built.param_groups]
    for group in built.param_groups:
        group["dampening"] = 0
    try:
        _eager_step(built)
    finally:
        for group, dampening in zip(built.param_groups, kept, strict=True):
            group["dampening"] = dampening


def _eager_step(built: torch.optim.Optimizer) -> None:
    """Take torch's step without the wrappers for its profiler and for ``torch.compile``."""
    with torch.no_grad():
        inspect.unwrap(type(built).step)(built)


def zero_grad_(built: torch.optim.Optimizer) -> None:
    """Remove all gradients, like torch's method, but without importing ``torch._dynamo``."""
    for group in built.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _built(kind: str, parameters: Any, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    with _without_dynamo():
        return OPTIMIZERS[kind](parameters, **_torch_options(options))


@contextlib.contextmanager
def _without_dynamo() -> Iterator[None]:
    """Build optimizers without importing ``torch._dynamo``, which takes as long as importing torch.

    torch imports it to exclude a method from ``torch.compile``, unless that method is marked as excluded.
    Within the block it is marked, but only if nobody has imported the module.
    """
    method, mark = inspect.unwrap(torch.optim.Optimizer.add_param_group), "__dynamo_disable"
    if "torch._dynamo" in sys.modules:
        yield
        return
    setattr(method, mark, method)
    try:
        yield
    finally:
        vars(method).pop(mark, None)


def clipped(gradients: Mapping[str, Tensor | None], max_norm: float) -> dict[str, Tensor | None]:
    """Scale the gradients of each row down to a norm of at most ``max_norm``, over all parameters together.

    Args:
        gradients: by parameter, (rows, *shape), or None for one without.
        max_norm: above 0.

    Returns:
        The scaled gradients, by parameter, as ``torch.nn.utils.clip_grad_norm_`` would scale each row.
    """
    squares = [
        g.reshape(len(g), math.prod(g.shape[1:])).square().sum(dim=1)
        for g in gradients.values()
        if g is not None
    ]
    if not squares:
        return dict(gradients)
    factor = (max_norm / (torch.stack(squares).sum(dim=0).sqrt() + 1e-6)).clamp(max=1.0)
    return {
        name: None if g is None else g * factor.view(-1, *(1 for _ in g.shape[1:]))
        for name, g in gradients.items()
    }
