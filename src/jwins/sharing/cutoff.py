"""Cut-offs: the fraction of its coefficients that a node sends in a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jwins.errors import ConfigError
from jwins.rng import RoundContext
from jwins.sharing.base import Cutoff
from jwins.validation import FRACTION

PAPER_FRACTIONS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 1.0)
"""The paper's fractions, 34 % on average; a node draws one of them uniformly in each round."""


@dataclass(frozen=True, slots=True)
class FixedCutoff:
    """The same fraction in every round.

    Attributes:
        fraction: fraction of the coefficients to send, in (0, 1].
    """

    fraction: float

    def __post_init__(self) -> None:
        FRACTION.check("sharing.cutoff.fraction", self.fraction)

    def __call__(self, ctx: RoundContext) -> float:
        """Return the fraction to send."""
        return self.fraction


@dataclass(frozen=True, slots=True)
class RandomCutoff:
    """A fraction that each node draws uniformly from a list in each round.

    The paper's randomized cut-off: a node sends all coefficients in some rounds, and the network's load
    is spread over the rounds.

    Attributes:
        fractions: each in (0, 1]; one that is listed twice is drawn twice as often.
    """

    fractions: tuple[float, ...] = PAPER_FRACTIONS

    def __post_init__(self) -> None:
        object.__setattr__(self, "fractions", tuple(self.fractions))
        if not self.fractions:
            raise ConfigError("sharing.cutoff.fractions", [], "expected at least one fraction in (0, 1]")
        for index, fraction in enumerate(self.fractions):
            FRACTION.check(f"sharing.cutoff.fractions[{index}]", fraction)

    def __call__(self, ctx: RoundContext) -> float:
        """Return the fraction to send."""
        return self.fractions[int(ctx.rng("cutoff").integers(len(self.fractions)))]


CUTOFFS: Mapping[str, Callable[..., Cutoff]] = {"random": RandomCutoff, "fixed": FixedCutoff}
"""Cut-offs by their name in ``sharing.cutoff.kind``."""
