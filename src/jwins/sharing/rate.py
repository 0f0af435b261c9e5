"""Step of a quantizer: fixed, in proportion to the change by training, or set by a budget.

Each node decides from its own measurements. A rule returns the *wanted* step, which an algorithm may round, for
example to a power of two.
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

_DECAY = 0.9
"""Weight of the past in the running mean square of a round's change: about ten rounds."""
_HORIZON = 20
"""Number of rounds over which a budget's controller spreads a surplus or a debt."""

_NOTHING_YET = 1e-9
"""The step of a budget while no value has changed, so that there is no entropy to measure."""


@dataclass(frozen=True, slots=True)
class Pace:
    """State of a step rule.

    Attributes:
        step: step of the last round; 0 before the first.
        square: running mean square of a round's change by training.
        balance: bytes that the budget allowed and the node has not sent.
    """

    step: float = 0.0
    square: float = 0.0
    balance: float = 0.0


class StepRule(Protocol):
    """Protocol of a rule for the step. Implementations are frozen, hashable, picklable and printable.

    Attributes:
        steady: whether an algorithm whose steps are powers of two keeps one until the wanted step differs by a
            factor of two.
    """

    steady: ClassVar[bool]

    def next(
        self, pace: Pace, trained: Tensor, wanted: Tensor, subbands: tuple[int, ...], ctx: RoundContext
    ) -> Pace:
        """Return the pace of this round; its ``step`` is above 0.

        Args:
            pace: pace of the previous round.
            trained: (P,) change by local training.
            wanted: (C,) vector to quantize.
            subbands: lengths of the subbands of ``wanted``.
            ctx: the round; ``ctx.sent_bytes`` is the size of the previous update.
        """
        ...


@dataclass(frozen=True, slots=True)
class FixedStep:
    """The same step in every round.

    Attributes:
        step: step in the unit of the coefficients.
    """

    step: float
    steady: ClassVar[bool] = False

    def __post_init__(self) -> None:
        STEP.check("sharing.step", self.step)

    def next(
        self, pace: Pace, trained: Tensor, wanted: Tensor, subbands: tuple[int, ...], ctx: RoundContext
    ) -> Pace:
        """Return the pace of this round."""
        return replace(pace, step=self.step)


@dataclass(frozen=True, slots=True)
class RelativeStep:
    """A multiple of the root mean square of a round's change by training.

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
        """Return the pace of this round."""
        square = mean_square(trained)
        if pace.step:
            square = _DECAY * pace.square + (1 - _DECAY) * square
        return replace(pace, step=max(self.step_ratio * math.sqrt(square), STEP.low or 0.0), square=square)


@dataclass(frozen=True, slots=True)
class Budget:
    """A step that adapts until frames have a given length on average, header included.

    The first step is the one whose symbols have the entropy of the budget. In later rounds the step is
    multiplied by the fourth root of sent over allowed bytes. The allowed bytes include a surplus or debt of
    earlier rounds, spread over the next 20.

    Attributes:
        bits: bits per parameter of each frame to a neighbour; or None.
        size_bytes: bytes of each frame; or None.
        free_bytes: bytes of each frame that do not count, for the header of small models.
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
        """Return the pace of this round."""
        counted = self.size_bytes if self.size_bytes is not None else (self.bits or 0.0) * len(trained) / 8
        target = counted + self.free_bytes
        largest = float(wanted.abs().max())
        if not ctx.sent_bytes or pace.step <= _NOTHING_YET:
            first = _first_step(wanted, 8 * counted / len(wanted), largest)
            return replace(pace, step=max(first, STEP.low or 0.0))
        balance = min(max(pace.balance + target - ctx.sent_bytes, -_HORIZON * target), _HORIZON * target)
        aim = target * min(max(1 + balance / target / _HORIZON, 0.5), 2.0)
        step = pace.step * min(max(ctx.sent_bytes / aim, 0.25), 4.0) ** 0.25
        # If even an empty frame is too long, or a full one too short, keep the step in the range that has an
        # effect.
        return replace(
            pace, step=min(max(step, 1e-6 * largest, STEP.low or 0.0), 100 * largest + 1e-6), balance=balance
        )


@dataclass(frozen=True, slots=True)
class LinkBudget:
    """A :class:`Budget` of the bytes that a link carries in ``seconds``, for all neighbours together.

    A node is assumed to send to as many nodes as it receives from, as in undirected and one-peer graphs.

    Attributes:
        seconds: allowed time for sending in a round.
        mbps: rate of the node's link, Mbit/s.
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
        """Return the pace of this round."""
        size = 1e6 / 8 * self.mbps * self.seconds / max(1, len(ctx.weights))
        return Budget(size_bytes=max(1, round(size))).next(pace, trained, wanted, subbands, ctx)


def _first_step(wanted: Tensor, bits: float, largest: float) -> float:
    """Return the step whose symbols have an entropy of ``bits`` each, within a few per cent.

    Values that did not change at all do not count. Otherwise, if few values changed, as at the start of a
    factorization, the step would be far too small for them.
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
    """Return the rule for the arguments of an algorithm: at most one of a step, a budget and a ratio.

    ``budget_seconds`` requires ``link_mbps``, and the reverse. ``step_ratio`` counts as given if it is not
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
