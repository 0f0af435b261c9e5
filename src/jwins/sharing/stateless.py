"""Stateless: quantized, entropy-coded wavelet coefficients of the model itself, without replicas.

The algorithm is for graphs that change and links that lose frames: a node has no memory of its neighbours. Let
x_0 be the common initial parameters, y the parameters after local training and c = T(y - x_0). At node i:

    v_i = round((c_i + r_i) / step) step,  r_i <- c_i + r_i - v_i     rounding = "carry", at first r_i = 0
    v_i = (round(c_i / step + z) - z) step                            rounding = "dither"
    x_i = y_i + T^-1( sum_j W_ij (v_j - c_i) )                        self_term = "exact"
    x_i = y_i + T^-1( sum_j W_ij (v_j - v_i) )                        self_term = "sent", with a dither only

With "carry", the rounding error is carried over to the next round, as in DeepSqueeze and in sigma-delta
modulation. The errors of a round cancel those of the round before: if all updates arrive, their sum stays
within half a step. With "dither", sender and receivers draw z from the same seed. The error v - c is uniform
within half a step, unbiased and independent of the coefficients (Schuchman, 1964), but errors accumulate, and
small coefficients take more bits. See docs/explanation/closed-loop.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeAlias, get_args

from torch import Tensor

from jwins.errors import ConfigError
from jwins.ops.quantize import to_dithered, to_nearest
from jwins.ops.wavelet import Wavelet
from jwins.rng import RoundContext
from jwins.sharing.base import SelfTerm, Sharing, Vectors, mix
from jwins.sharing.rate import Budget, Pace, StepRule, step_rule
from jwins.sharing.update import Quantized, Received, Update, dither, one_scale

Rounding: TypeAlias = Literal["carry", "dither"]
"""Treatment of rounding errors: carried over to the next round, or made independent by a dither."""

_DEFAULT = Budget(bits=1.6, free_bytes=64)
"""Default budget in bits per parameter: a twentieth of float32."""


@dataclass(frozen=True, slots=True, eq=False)
class StatelessState:
    """State of a node, without any memory of its neighbours.

    Attributes:
        origin: (P,) float32, the common initial parameters of all nodes.
        start: (P,) float32, the parameters at the start of the round.
        pace: state of the rate control.
        self_term: (C,) own values to compare with received ones; only between share and merge.
        residual: (C,) float32, rounding error that is carried over; None for 0.
    """

    origin: Tensor
    start: Tensor
    pace: Pace = field(default_factory=Pace)
    self_term: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Stateless(Sharing[StatelessState]):
    """Quantized coefficients; see the module's docstring for the algorithm.

    Attributes:
        rule: rule for the step.
        transform: the wavelet transform, or None to work on the parameters themselves.
        self_term: see :data:`jwins.sharing.base.SelfTerm`. "sent" requires a dither: a node that moves by its
            own rounding error and also carries it over would correct it twice, which grows without bound.
        rounding: see :data:`Rounding`.
    """

    rule: StepRule
    transform: Wavelet | None
    self_term: SelfTerm = "exact"
    rounding: Rounding = "carry"
    needs_common_start: ClassVar[bool] = True
    asynchronous: ClassVar[bool] = True
    state_types: ClassVar[tuple[type, ...]] = (StatelessState, Pace)

    def __post_init__(self) -> None:
        if self.self_term not in get_args(SelfTerm):
            raise ConfigError("sharing.self_term", self.self_term, "expected 'sent' or 'exact'")
        if self.rounding not in get_args(Rounding):
            raise ConfigError("sharing.rounding", self.rounding, "expected 'carry' or 'dither'")
        if self.rounding == "carry" and self.self_term == "sent":
            raise ConfigError("sharing.self_term", self.self_term, "expected 'exact', or rounding = 'dither'")

    def update_dim(self, num_params: int) -> int:
        """Return C, the number of coefficients."""
        return num_params if self.transform is None else self.transform.size(num_params)

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state and of an exchange."""
        return Vectors(2 if self.rounding == "carry" else 1, 8 + 2 * neighbours, 0.25)

    def init(self, params: Tensor) -> StatelessState:
        """Return a state that measures changes from the common initial parameters."""
        kept = params.clone()
        return StatelessState(kept, kept)

    def share(self, state: StatelessState, params: Tensor, ctx: RoundContext) -> tuple[Update, StatelessState]:
        """Send all coefficients, in steps."""
        coefficients = self._forward(params - state.origin)
        subbands = (len(params),) if self.transform is None else self.transform.subbands(len(params))
        wanted = coefficients if state.residual is None else coefficients + state.residual
        pace = self.rule.next(state.pace, params - state.start, wanted, subbands, ctx)
        seed = None
        if self.rounding == "carry":
            symbols = to_nearest(wanted / pace.step)
        else:
            seed = int(ctx.rng("dither").integers(2**64, dtype="uint64"))
            symbols = to_dithered(wanted / pace.step, dither(seed, len(wanted)).to(wanted.device))
        values = Quantized(symbols.cpu(), one_scale(pace.step, subbands), subbands, seed)
        update = Update(len(symbols), None, values)
        self_term, residual = coefficients, state.residual
        if self.self_term == "sent":
            self_term = update.dense_values().to(params.device)
        if self.rounding == "carry" and ctx.weights:  # an update that no node receives cancels no earlier error
            residual = wanted - update.dense_values().to(params.device)
        return update, replace(state, pace=pace, self_term=self_term, residual=residual)

    def merge(
        self, state: StatelessState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, StatelessState]:
        """Mix the received coefficients, and transform the change back."""
        self_term = self._forward(params - state.origin) if state.self_term is None else state.self_term
        change = mix(self_term, received)
        merged = change if self.transform is None else self.transform.inverse(change, len(params))
        merged.add_(params)
        return merged, replace(state, start=merged, self_term=None)

    def projected(self, state: StatelessState, params: Tensor) -> StatelessState:
        """Take ``params`` as the start of the round."""
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
    step_ratio: float | None = None,
    self_term: SelfTerm = "exact",
    rounding: Rounding = "carry",
    wavelet: str | None = "sym2",
    levels: int = 4,
    mode: Literal["symmetric", "periodization"] = "periodization",
) -> Stateless:
    """Return the stateless algorithm: quantized coefficients of the model itself.

    Give at most one of ``step``, the budgets and ``step_ratio``. With none, the budget is 1.6 bits and 64
    bytes more.

    Args:
        step: fixed step of the quantizer.
        budget: bits per parameter of a frame to a neighbour, on average over rounds; the step adapts.
        budget_bytes: the same budget in bytes of a frame.
        budget_seconds: the same budget in seconds for a round's frames to all neighbours on the link.
        link_mbps: rate of the node's link, Mbit/s; required with ``budget_seconds``.
        step_ratio: ratio of the step to the root mean square of a round's change by training.
        self_term: "exact" or "sent"; see :data:`jwins.sharing.base.SelfTerm`. "sent" needs ``rounding =
            "dither"``.
        rounding: "carry" or "dither"; see :data:`Rounding`.
        wavelet: any discrete wavelet of PyWavelets, or None (or "none") for no transform.
        levels: depth of the transform, 0 (none) to 24.
        mode: boundary handling of the transform.

    Raises:
        ConfigError: an argument is out of range, or several of the step, the budgets and the ratio are given.
    """
    transform = None if wavelet is None or wavelet == "none" else Wavelet(wavelet, levels, mode)
    if all(given is None for given in (step, budget, budget_bytes, budget_seconds, link_mbps, step_ratio)):
        return Stateless(_DEFAULT, transform, self_term, rounding)
    rule = step_rule(step, budget, budget_bytes, step_ratio, budget_seconds, link_mbps)
    return Stateless(rule, transform, self_term, rounding)
