"""Optimizers by name, and their state for many nodes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.training.quasi_global import QuasiGlobal
from jwins.validation import MOMENTUM

__all__ = ["OPTIMIZERS", "Optimizer", "OptimizerState", "optimizer_step"]

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
        options: its arguments by torch's names, e.g. ``{"lr": 0.05, "momentum": 0.9}``.
        state: ``keep``: each node keeps its momenta from round to round; ``reset``: each round starts without.
        quasi_global: factor of a quasi-global momentum, in which case the momentum that local steps start from
            is that of the merged models, see :class:`~jwins.training.quasi_global.QuasiGlobal`; only of ``sgd``
            with ``momentum``. None for a momentum of the node's own steps.

    Raises:
        ConfigError: an unknown name, or a value that torch does not accept, at ``train.optimizer.<key>``; or a
            quasi-global momentum without a momentum of the optimizer.

    >>> Optimizer("sgd", {"lr": 0.05, "momentum": 0.9})
    Optimizer(kind='sgd', options={'lr': 0.05, 'momentum': 0.9}, state='keep', quasi_global=None)
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
                    OPTIMIZERS[self.kind]([torch.zeros(1)], **_torch_options({name: value}))
                except (TypeError, ValueError) as alone:
                    raise ConfigError(f"train.optimizer.{name}", value, str(alone)) from None
            raise ConfigError("train.optimizer", dict(self.options), str(error)) from None
        if self.quasi_global is not None:
            self._check_quasi_global(self.quasi_global)

    def _check_quasi_global(self, factor: float) -> None:
        _check_option("train.optimizer.quasi_global", factor, 0.0)
        MOMENTUM.check("train.optimizer.quasi_global", factor)
        if self.kind != "sgd":
            remedy = 'it is a momentum of sgd; use kind = "sgd" with momentum, or leave quasi_global out'
            raise ConfigError("train.optimizer.quasi_global", factor, f"{self.kind} has none: {remedy}")
        if not self.options.get("momentum"):
            remedy = "quasi_global is what momentum starts from in each round; expected above 0, such as 0.9"
            raise ConfigError("train.optimizer.momentum", self.options.get("momentum", 0), remedy)
        if self.state == "reset":
            remedy = 'quasi_global is a state that is kept; expected "keep", or no quasi_global'
            raise ConfigError("train.optimizer_state", self.state, remedy)
        if self.lr == 0:
            raise ConfigError("train.optimizer.lr", 0, "expected above 0: quasi_global divides by it")

    @property
    def lr(self) -> float:
        """Return the learning rate, or torch's default if it is not given."""
        return float(self.build([torch.zeros(1)]).defaults["lr"])

    def build(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Make the torch optimizer of these tensors."""
        return OPTIMIZERS[self.kind](parameters, **_torch_options(self.options))

    def sample_state(self) -> dict[str, Tensor]:
        """Return torch's state for a parameter of shape (1,) after a step with gradient 0."""
        sample = torch.zeros(1, requires_grad=True)
        sample.grad = torch.zeros(1)
        built = self.build([sample])
        built.step()
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
        optimizer: optimizer of every node.
        rows: number of nodes.
        stride: length of a row, at least P.
        tensors: parameters of the model.
        device: device of the moments.

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


def optimizer_step(built: torch.optim.Optimizer, first: bool) -> None:
    """Take one step. ``first`` is for kept SGD with dampening, whose buffers start at 0."""
    group = built.param_groups[0]
    if not first:
        built.step()
        return
    dampening, group["dampening"] = group["dampening"], 0
    try:
        built.step()
    finally:
        group["dampening"] = dampening
