"""Step of a quantizer: fixed, in proportion to what a node learns in a round, or by a budget.

Each node decides for itself, from what it sees of itself. The step that a rule names is a wish: an algorithm
may round it, such as to a power of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.ops.replicas import mean_square
from jwins.rng import RoundContext
from jwins.validation import BITS, BYTES, MBPS, MISSING, SECONDS, STEP, STEP_RATIO

__all__ = ["Budget", "FixedStep", "LinkBudget", "Pace", "RelativeStep", "StepRule", "step_rule"]

_DECAY = 0.9
"""Weight of the past in the running mean square of a round's change: about ten rounds."""
_HORIZON = 20
"""In so many rounds a budget's controller makes up for what was spent too much or too little."""

_NOTHING_YET = 1e-9
"""The step as long as nothing has changed, from which a budget could not tell one that fits."""


@dataclass(frozen=True, slots=True)
class Pace:
    """State of a step rule.

    Attributes:
        step: of the last round; 0 before the first.
        square: running mean square of what training changes in a round.
        balance: bytes that the budget allowed and that were not spent.
    """

    step: float = 0.0
    square: float = 0.0
    balance: float = 0.0


class StepRule(Protocol):
    """A rule for the step. Implementations are frozen, hashable, picklable and printable.

    Attributes:
        steady: whether an algorithm whose steps are powers of two keeps one until the wish is an octave off.
    """

    steady: ClassVar[bool]

    def next(
        self, pace: Pace, trained: Tensor, wanted: Tensor, subbands: tuple[int, ...], ctx: RoundContext
    ) -> Pace:
        """The pace of this round, whose ``step`` is above 0.

        Args:
            pace: of the previous round.
            trained: (P,) what local training has changed.
            wanted: (C,) what is to be quantized.
            subbands: lengths of the subbands of ``wanted``.
            ctx: the round; ``ctx.sent_bytes`` is what the previous update took.
        """
        ...


@dataclass(frozen=True, slots=True)
class FixedStep:
    """The same step in every round.

    Attributes:
        step: in the unit of the coefficients.
    """

    step: float
    steady: ClassVar[bool] = False

    def __post_init__(self) -> None:
        STEP.check("sharing.step", self.step)

    def next(
        self, pace: Pace, trained: Tensor, wanted: Tensor, subbands: tuple[int, ...], ctx: RoundContext
    ) -> Pace:
        """See :meth:`StepRule.next`."""
        return replace(pace, step=self.step)


@dataclass(frozen=True, slots=True)
class RelativeStep:
    """A multiple of the root mean square of what training changes in a round, whatever the task.

    Attributes:
        step_ratio: step over root mean square.
    """

    step_ratio: float
    steady: ClassVar[bool] = False

    def __post_init__(self) -> None:
        STEP_RATIO.check("sharing.step_ratio", self.step_ratio)

    def next(
        self, pace: Pace, trained: Tensor, wanted: Tensor, subbands: tuple[int, ...], ctx: RoundContext
    ) -> Pace:
        """See :meth:`StepRule.next`."""
        square = mean_square(trained)
        if pace.step:
            square = _DECAY * pace.square + (1 - _DECAY) * square
        return replace(pace, step=max(self.step_ratio * math.sqrt(square), STEP.low or 0.0), square=square)


@dataclass(frozen=True, slots=True)
class Budget:
    """A step that is adapted until frames have a given length on average; headers count.

    The first step is the one whose symbols have the entropy of the budget. From then on the step is multiplied
    by the fourth root of what was sent over what may be, in which a surplus or a debt of earlier rounds is
    spread over the next 20.

    Attributes:
        bits: per parameter and round, of each frame to a neighbour; or None.
        size_bytes: of each frame; or None.
        free_bytes: of each frame that do not count, as for a header: small models could send nothing without.
    """

    bits: float | None = None
    size_bytes: int | None = None
    free_bytes: int = 0
    steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.size_bytes is None):
            raise ConfigError(
                "sharing.budget", self.bits, "expected either bits per parameter or bytes per round"
            )
        if self.bits is not None:
            BITS.check("sharing.budget", self.bits)
        if self.size_bytes is not None:
            BYTES.check("sharing.budget_bytes", self.size_bytes)

    def next(
        self, pace: Pace, trained: Tensor, wanted: Tensor, subbands: tuple[int, ...], ctx: RoundContext
    ) -> Pace:
        """See :meth:`StepRule.next`."""
        counted = self.size_bytes if self.size_bytes is not None else (self.bits or 0.0) * len(trained) / 8
        target = counted + self.free_bytes
        largest = float(wanted.abs().max())
        if not ctx.sent_bytes or pace.step <= _NOTHING_YET:
            first = _first_step(wanted, 8 * counted / len(wanted), largest)
            return replace(pace, step=max(first, STEP.low or 0.0))
        balance = min(max(pace.balance + target - ctx.sent_bytes, -_HORIZON * target), _HORIZON * target)
        aim = target * min(max(1 + balance / target / _HORIZON, 0.5), 2.0)
        step = pace.step * min(max(ctx.sent_bytes / aim, 0.25), 4.0) ** 0.25
        # Where even nothing is too much, or everything too little, the step stays where it still matters.
        return replace(
            pace, step=min(max(step, 1e-6 * largest, STEP.low or 0.0), 100 * largest + 1e-6), balance=balance
        )


@dataclass(frozen=True, slots=True)
class LinkBudget:
    """A :class:`Budget` of the bytes that a link carries in so many seconds, for all neighbours together.

    A node sends as many frames as it has senders, which undirected graphs and one-peer ones have it do.

    Attributes:
        seconds: that sending may take in a round.
        mbps: Mbit/s that the node can send.
    """

    seconds: float
    mbps: float
    steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        SECONDS.check("sharing.budget_seconds", self.seconds)
        MBPS.check("sharing.link_mbps", self.mbps)

    def next(
        self, pace: Pace, trained: Tensor, wanted: Tensor, subbands: tuple[int, ...], ctx: RoundContext
    ) -> Pace:
        """See :meth:`StepRule.next`."""
        size = 1e6 / 8 * self.mbps * self.seconds / max(1, len(ctx.weights))
        return Budget(size_bytes=max(1, round(size))).next(pace, trained, wanted, subbands, ctx)


def _first_step(wanted: Tensor, bits: float, largest: float) -> float:
    """The step whose symbols have an entropy of ``bits`` each, within a few per cent, where there is something.

    What did not change at all does not count: where little did, as at the start of a factorization, the budget
    would ask for a step that is far too short for all the rest.
    """
    if largest == 0.0:
        return _NOTHING_YET
    wanted = wanted[wanted != 0]
    low, high = math.log(largest * 1e-6), math.log(2 * largest)
    for _ in range(20):
        middle = (low + high) / 2
        _, counts = torch.unique((wanted / math.exp(middle)).round(), return_counts=True)
        share = counts.double() / len(wanted)
        if float(-(share * share.log2()).sum()) > bits:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def step_rule(
    step: float | None,
    budget: float | None,
    budget_bytes: int | None,
    step_ratio: float | None,
    budget_seconds: float | None = None,
    link_mbps: float | None = None,
    default_step_ratio: float | None = None,
) -> StepRule:
    """The rule that the arguments of an algorithm name; at most one of a step, a budget and a ratio is given.

    ``budget_seconds`` and ``link_mbps`` belong together; ``step_ratio`` counts as given if it is not
    ``default_step_ratio``.

    Raises:
        ConfigError: several are given, or one is out of range.
    """
    given = {"step": step, "budget": budget, "budget_bytes": budget_bytes, "budget_seconds": budget_seconds}
    if step_ratio != default_step_ratio:
        given["step_ratio"] = step_ratio
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        problem = f"{named[0]} sets the rate already; remove one of them"
        raise ConfigError(f"sharing.{named[1]}", given[named[1]], problem)
    if (budget_seconds is None) != (link_mbps is None):
        missing = "link_mbps" if link_mbps is None else "budget_seconds"
        raise ConfigError(f"sharing.{missing}", MISSING, "required: budget_seconds and link_mbps go together")
    if step is not None:
        return FixedStep(step)
    if budget_seconds is not None and link_mbps is not None:
        return LinkBudget(budget_seconds, link_mbps)
    if budget is not None or budget_bytes is not None:
        return Budget(budget, budget_bytes)
    assert step_ratio is not None
    return RelativeStep(step_ratio)
