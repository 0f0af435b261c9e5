"""Stateless: wavelet coefficients themselves, dithered, quantized, entropy coded; nothing to lose or to heal.

For graphs that change and links that lose frames. With x_0 the common initial parameters, y the parameters
after local training, z a pseudo-random dither that sender and receivers draw from the same seed:

    v_i = (round(T(y_i - x_0) / step + z) - z) step
    x_i = y_i + T^-1( sum_j W_ij (v_j - v_i) )            own = "sent"
    x_i = y_i + T^-1( sum_j W_ij (v_j - T(y_i - x_0)) )   own = "exact"

The error v - T(y - x_0) is uniform in half a step to either side and independent of the coefficients
(Schuchman, 1964), so what is merged is right on average. docs/rate-distortion.md says more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from jwins.ops.quantize import to_dithered
from jwins.ops.wavelet import Wavelet
from jwins.rng import RoundContext
from jwins.sharing.base import Own, Sharing, check_own, mix
from jwins.sharing.rate import Pace, StepRule, step_rule
from jwins.update import Quantized, Received, Update, dither

__all__ = ["Stateless", "StatelessState", "stateless"]


@dataclass(frozen=True, slots=True, eq=False)
class StatelessState:
    """What a node remembers, none of it about its neighbours.

    Attributes:
        origin: (P,) float32, the initial parameters, which all nodes have in common.
        start: (P,) float32, the parameters at the start of the round.
        pace: of rate control.
        own: (C,) what the node compares with what it hears; only between share and merge.
    """

    origin: Tensor
    start: Tensor
    pace: Pace = field(default_factory=Pace)
    own: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Stateless(Sharing[StatelessState]):
    """Dithered coefficients; see the module's docstring for the algorithm.

    Attributes:
        rule: of the step.
        transform: the wavelet transform, or None to work on the parameters themselves.
        own: see :data:`jwins.sharing.base.Own`.
    """

    rule: StepRule
    transform: Wavelet | None
    own: Own = "exact"
    needs_common_start: ClassVar[bool] = True
    state_types: ClassVar[tuple[type, ...]] = (StatelessState, Pace)

    def __post_init__(self) -> None:
        check_own(self.own)

    def update_dim(self, num_params: int) -> int:
        """C, the number of coefficients."""
        return num_params if self.transform is None else self.transform.size(num_params)

    def init(self, params: Tensor) -> StatelessState:
        """The common initial parameters are what changes are measured from."""
        kept = params.clone()
        return StatelessState(kept, kept)

    def share(self, state: StatelessState, params: Tensor, ctx: RoundContext) -> tuple[Update, StatelessState]:
        """All coefficients, in steps."""
        coefficients = self._forward(params - state.origin)
        bands = (len(params),) if self.transform is None else self.transform.subbands(len(params))
        pace = self.rule.next(state.pace, params - state.start, coefficients, bands, ctx)
        seed = int(ctx.rng("dither").integers(2**64, dtype="uint64"))
        noise = dither(seed, len(coefficients)).to(coefficients.device)
        levels = to_dithered(coefficients / pace.step, noise)
        values = Quantized(levels.cpu(), torch.full((len(bands),), pace.step), bands, seed)
        update = Update(len(levels), None, values)
        own = update.dense_values().to(params.device) if self.own == "sent" else coefficients
        return update, replace(state, pace=pace, own=own)

    def merge(
        self, state: StatelessState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, StatelessState]:
        """Mix the coefficients that were heard, and transform the change back."""
        own = self._forward(params - state.origin) if state.own is None else state.own
        change = mix(own, received)
        merged = params + (change if self.transform is None else self.transform.inverse(change, len(params)))
        return merged, replace(state, start=merged.clone(), own=None)

    def projected(self, state: StatelessState, params: Tensor) -> StatelessState:
        """Finds the start of the round again."""
        return replace(state, start=params.clone())

    def _forward(self, moved: Tensor) -> Tensor:
        return moved if self.transform is None else self.transform.forward(moved)


def stateless(
    step: float | None = None,
    budget: float | None = None,
    budget_bytes: int | None = None,
    *,
    budget_seconds: float | None = None,
    link_mbps: float | None = None,
    ratio: float = 8.0,
    own: Own = "exact",
    wavelet: str | None = "sym2",
    levels: int = 4,
    mode: Literal["symmetric", "periodization"] = "periodization",
) -> Stateless:
    """Dithered quantization of the coefficients themselves.

    At most one of ``step`` and the budgets is given; with none, the step is ``ratio`` times
    the root mean square of what a node's training changes in a round.

    Args:
        step: of the quantizer, fixed.
        budget: bits per parameter and round that each frame to a neighbour may have; the step adapts.
        budget_bytes: the same in bytes per round.
        budget_seconds: the same in seconds per round, which all neighbours' frames together take on the link.
        link_mbps: what the node can send, Mbit/s; goes with ``budget_seconds``.
        ratio: of the step to the root mean square of a round's change, where nothing else is given.
        own: "exact" or "sent"; see :data:`jwins.sharing.base.Own`.
        wavelet: any discrete wavelet PyWavelets knows, or None (or "none") for no transform.
        levels: of the transform, at least 1.
        mode: boundary handling of the transform.

    Raises:
        ConfigError: an argument is out of range, or several say how much is sent.
    """
    transform = None if wavelet is None or wavelet == "none" else Wavelet(wavelet, levels, mode)
    return Stateless(step_rule(step, budget, budget_bytes, ratio, budget_seconds, link_mbps), transform, own)
