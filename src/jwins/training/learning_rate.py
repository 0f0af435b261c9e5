"""Schedules of the learning rate over the local steps of a whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from jwins.errors import ConfigError
from jwins.validation import RATE

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class LearningRateSchedule:
    """Factor on the learning rate at each local step, counted over all rounds of a node.

    With T steps, W of them for warming up, and f the last fraction, step t has the factor::

        (t + 1) / W                                     t < W
        1                                               constant
        1 - (1 - f) p                                   linear, p = (t - W) / (T - W)
        f + (1 - f) (1 + cos(pi p)) / 2                 cosine

    The factor depends on the number of the step alone. So it is the same after a restart from a checkpoint, and
    a node that missed rounds has the same factor as the others.

    Attributes:
        kind: the shape after warming up.
        total_steps: T, at least 1.
        warmup_steps: W, from 0 to T - 1.
        final_fraction: f, in [0, 1]; not used by ``constant``.

    Raises:
        ConfigError: out of range, at ``train.schedule``.

    >>> cosine = LearningRateSchedule("cosine", total_steps=100, warmup_steps=10, final_fraction=0.1)
    >>> [round(cosine.factor(step), 3) for step in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.55, 0.1]
    """

    kind: Shape
    total_steps: int
    warmup_steps: int = 0
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Shape):
            raise ConfigError("train.schedule.kind", self.kind, f"expected one of {', '.join(get_args(Shape))}")
        if not 0 <= self.warmup_steps < self.total_steps:
            problem = (
                f"the run has {self.total_steps} local steps (run.rounds * train.local_steps); "
                f"expected fewer of them to warm up"
            )
            raise ConfigError("train.schedule.warmup_steps", self.warmup_steps, problem)
        RATE.check("train.schedule.final_fraction", self.final_fraction)

    def factor(self, step: int) -> float:
        """Return the factor at a step, counted from 0; after the last step, the final one."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        passed = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        if self.kind == "linear":
            return 1.0 - (1.0 - self.final_fraction) * passed
        if self.kind == "cosine":
            return self.final_fraction + (1.0 - self.final_fraction) * (1.0 + math.cos(math.pi * passed)) / 2.0
        return 1.0
