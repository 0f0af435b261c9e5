"""Full sharing, random-k, top-k and JWINS: algorithms that send values of the model itself.

They differ in three choices only:

    =========  ==================  ==============================  =========================
    algorithm  domain              positions                       number sent
    =========  ==================  ==============================  =========================
    full       parameters          all                             all
    random-k   parameters          drawn from a seed on the wire   a fixed fraction
    top-k      parameters          largest change                  a fixed fraction
    JWINS      wavelet coeffs      largest change since last sent  a fraction drawn per round
    =========  ==================  ==============================  =========================

JWINS, as in Dhasade et al., "Get More for Less in Decentralized Learning Systems", ICDCS 2023, doi
10.1109/ICDCS57875.2023.00067, with T the wavelet transform, y the parameters after local training and r the
reference of the score:

    score      = T(y) - r
    k          = round(alpha * C), alpha drawn by each node for itself
    positions  = top-k of |score|
    send         T(y)[positions]
    r[positions] <- new reference of the score, by the score rule
    x          = y + T^-1( sum_j W_ij (T(y_j) - T(y_i)) at the positions that j sent )
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from jwins.errors import ConfigError, UsageError
from jwins.ops.select import count_of, largest_k, overwritten
from jwins.ops.wavelet import Wavelet
from jwins.rng import RoundContext
from jwins.sharing.base import (
    Cutoff,
    Precision,
    Quantizer,
    Sharing,
    Vectors,
    check_quantizer,
    mix,
    place,
    quantize,
)
from jwins.sharing.cutoff import FixedCutoff, RandomCutoff
from jwins.sharing.robust import RobustMerge
from jwins.sharing.update import Received, Sampled, Update, dense_of
from jwins.validation import FRACTION

ScoreRule = Literal["since_sent", "reference", "training_only"]
"""Reference that a coefficient's score is measured from (y after training, x at the round's start):

- ``since_sent``: T(y) - r, r = T(y) of the round in which the coefficient was last sent.
- ``reference``: T(y) - r, r = T(x) at the *start* of that round. The authors' public code computes this.
- ``training_only``: the sum of T(y) - T(x) over the rounds since then; changes by merging do not count.

In all three, r starts at T of the initial parameters, or the sum at 0. Sending everything resets all of r, or
all sums.
"""


# --- Full sharing and random-k: no memory ---------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class OwnState:
    """State of an algorithm without memory, within a round.

    Attributes:
        own: (P,) float32, between share and merge the node's parameters as its neighbours see them; else None.
    """

    own: Tensor | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Full(Sharing[OwnState]):
    """D-PSGD: every node sends all of its parameters in every round.

    Source: Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?", NeurIPS 2017.

    Attributes:
        values: quantizer of the sent parameters, or "float32" or "bfloat16".
        robust: a merge that withstands attackers, in place of the weighted mean; None for D-PSGD.

    >>> full()
    Full(values='float32')
    """

    values: Precision | Quantizer = "float32"
    robust: RobustMerge | None = None
    asynchronous: ClassVar[bool] = True
    state_types: ClassVar[tuple[type, ...]] = (OwnState,)

    def __post_init__(self) -> None:
        check_quantizer(self.values)
        if self.robust is not None and not callable(self.robust):
            raise ConfigError("sharing.robust", self.robust, "expected a merge, such as TrimmedMean()")

    def __repr__(self) -> str:
        robust = "" if self.robust is None else f", robust={self.robust!r}"
        return f"{type(self).__qualname__}(values={self.values!r}{robust})"

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state and of an exchange."""
        if self.robust is not None:
            return Vectors(0, 4 + 4 * neighbours)
        return Vectors(0, 2 + neighbours if self.values == "float32" else 3 + 2 * neighbours)

    def init(self, params: Tensor) -> OwnState:
        """Return the empty state: there is no memory."""
        return OwnState()

    def share(self, state: OwnState, params: Tensor, ctx: RoundContext) -> tuple[Update, OwnState]:
        """Send all parameters."""
        values = quantize(self.values, params, (len(params),), ctx)
        return Update(len(params), None, values), OwnState(dense_of(values))

    def merge(
        self, state: OwnState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, OwnState]:
        """Return ``x = y + sum_j W_ij (y_j - y_i)``, or the robust merge."""
        if self.robust is None:
            return _merge_params(state, params, received)
        own = params if state.own is None else state.own
        counted = [item for item in received if item.weight != 0.0]
        others = [item.update.dense_values() for item in counted]
        before = own._version
        merged: Any = self.robust(own, others, [item.weight for item in counted])
        if own._version != before or not isinstance(merged, Tensor) or merged.shape != own.shape:
            problem = f"changed its arguments in place, or returned no tensor of shape {tuple(own.shape)}"
            raise UsageError(f"the robust merge {type(self.robust).__name__} {problem}")
        return params + (merged - own), replace(state, own=None)


@dataclass(frozen=True, slots=True)
class RandomK(Sharing[OwnState]):
    """Random sampling: in each round a node sends a new random subset of its parameters, and its seed.

    Attributes:
        fraction: fraction of the parameters to send, in (0, 1].
        values: quantizer of the sent parameters, or "float32" or "bfloat16".

    >>> random_k(0.2)
    RandomK(fraction=0.2, values='float32')
    """

    fraction: float
    values: Precision | Quantizer = "float32"
    asynchronous: ClassVar[bool] = True
    state_types: ClassVar[tuple[type, ...]] = (OwnState,)

    def __post_init__(self) -> None:
        FRACTION.check("sharing.fraction", self.fraction)
        check_quantizer(self.values)

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state and of an exchange."""
        return Vectors(0, 5 + 3 * self.fraction * (1 + neighbours), self.fraction)

    def init(self, params: Tensor) -> OwnState:
        """Return the empty state: there is no memory."""
        return OwnState()

    def share(self, state: OwnState, params: Tensor, ctx: RoundContext) -> tuple[Update, OwnState]:
        """Send ``round(fraction * P)`` parameters at positions drawn from the update's seed."""
        dim = len(params)
        count = count_of(self.fraction, dim)
        if count == dim:
            values = quantize(self.values, params, (dim,), ctx)
            return Update(dim, None, values), OwnState(dense_of(values))
        sampled = Sampled(int(ctx.rng("positions").integers(2**64, dtype="uint64")), count)
        positions = sampled.positions(dim).to(params.device)
        values = quantize(self.values, params.index_select(0, positions), (count,), ctx)
        return Update(dim, sampled, values), OwnState(place(params, positions, dense_of(values)))

    def merge(
        self, state: OwnState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, OwnState]:
        """Merge as full sharing does; values that a neighbour did not send count as the receiver's own."""
        return _merge_params(state, params, received)


# --- Top-k and JWINS: scores accumulate ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ScoreState:
    """State of JWINS, each (C,) float32 or None where the score rule does not need it.

    Attributes:
        since: reference r of the scores, or the sum of changes for ``training_only``.
        start: T(x), the coefficients at the start of the round.
        own: T(y) as the neighbours receive it; only between share and merge.
    """

    since: Tensor | None
    start: Tensor | None
    own: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Jwins(Sharing[ScoreState]):
    """JWINS and its ablations; the algorithm is in the module's docstring.

    Attributes:
        cutoff: fraction of coefficients to send, drawn per node and round.
        transform: the wavelet transform, or None to work on the parameters themselves.
        score: see :data:`ScoreRule`.
        accumulate: False scores by the current round's training alone, T(y) - T(x).
        dense_above: at this fraction and above, all coefficients are sent and no positions.
        values: quantizer of the sent coefficients, or its name.
    """

    cutoff: Cutoff
    transform: Wavelet | None
    score: ScoreRule = "reference"
    accumulate: bool = True
    dense_above: float = 0.5
    values: Precision | Quantizer = "float32"
    asynchronous: ClassVar[bool] = True
    state_types: ClassVar[tuple[type, ...]] = (ScoreState,)

    def __post_init__(self) -> None:
        if self.score not in get_args(ScoreRule):
            raise ConfigError("sharing.score", self.score, f"expected one of {', '.join(get_args(ScoreRule))}")
        if not self.dense_above > 0.0:
            raise ConfigError("sharing.dense_above", self.dense_above, "expected a fraction above 0")
        check_quantizer(self.values)

    def update_dim(self, num_params: int) -> int:
        """Return C, the number of coefficients."""
        return num_params if self.transform is None else self.transform.size(num_params)

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state and of an exchange."""
        start = self.transform is not None and not (self.accumulate and self.score == "since_sent")
        return Vectors(self.accumulate + start, 5 + 1.5 * neighbours)

    def init(self, params: Tensor) -> ScoreState:
        """Return r = T(x_0): scores start at zero."""
        start = self._kept(params)
        if not self.accumulate:
            return ScoreState(None, start)
        if self.score == "since_sent":
            return ScoreState(start, None)
        if self.score == "reference":
            return ScoreState(start, start)
        return ScoreState(torch.zeros_like(start), start)

    def share(self, state: ScoreState, params: Tensor, ctx: RoundContext) -> tuple[Update, ScoreState]:
        """Send the coefficients that changed most since they were last sent."""
        own = self._forward(params)
        size = len(own)
        fraction = _fraction_of(self.cutoff, ctx)
        count = size if fraction >= self.dense_above else count_of(fraction, size)
        score = self._score(state, own)
        positions = None if count == size else largest_k(score, count)
        subbands = self._subbands(positions, count, len(params))
        values = quantize(
            self.values, own if positions is None else own.index_select(0, positions), subbands, ctx
        )
        if self.values != "float32":
            own = place(own, positions, dense_of(values))
        since = self._restart(state, score, own, positions)
        return Update(size, positions, values), ScoreState(since, state.start, own)

    def merge(
        self, state: ScoreState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, ScoreState]:
        """Mix the received coefficients, and transform the change back."""
        own = self._forward(params) if state.own is None else state.own
        merged = self._inverse(mix(own, received), len(params)).add_(params)
        start = None if state.start is None else self._forward(merged)
        return merged, ScoreState(state.since, start)

    def projected(self, state: ScoreState, params: Tensor) -> ScoreState:
        """Compute T(x) of ``params``, from which the next round starts."""
        return state if state.start is None else replace(state, start=self._kept(params))

    def _forward(self, params: Tensor) -> Tensor:
        return params if self.transform is None else self.transform.forward(params)

    def _inverse(self, change: Tensor, num_params: int) -> Tensor:
        return change if self.transform is None else self.transform.inverse(change, num_params)

    def _kept(self, params: Tensor) -> Tensor:
        """Return T(params), never ``params`` itself, which belongs to the caller."""
        return params.clone() if self.transform is None else self.transform.forward(params)

    def _subbands(self, positions: Tensor | None, count: int, num_params: int) -> tuple[int, ...]:
        """Count the chosen coefficients in each subband. Quantizers that are given by name do not need it."""
        if self.transform is None or isinstance(self.values, str):
            return (count,)
        return self.transform.subband_counts(positions, num_params)

    def _score(self, state: ScoreState, own: Tensor) -> Tensor:
        """Return the change of each coefficient, (C,); its sign does not matter."""
        if state.since is None:
            assert state.start is not None
            return own - state.start
        if self.score == "training_only":
            assert state.start is not None
            return state.since + (own - state.start)
        return own - state.since

    def _restart(
        self, state: ScoreState, score: Tensor, own: Tensor, positions: Tensor | None
    ) -> Tensor | None:
        """Return the reference of the next round's scores, after ``positions`` were sent."""
        if state.since is None:
            return None
        if self.score == "since_sent":
            return _overwrite(state.since, positions, own)
        assert state.start is not None
        if self.score == "reference":
            return _overwrite(state.since, positions, state.start)
        return _overwrite(score, positions, torch.zeros_like(score))


def _fraction_of(cutoff: Cutoff, ctx: RoundContext) -> float:
    fraction = cutoff(ctx)
    if not isinstance(fraction, Real) or not 0.0 < fraction <= 1.0:
        name = getattr(cutoff, "__qualname__", type(cutoff).__qualname__)
        raise UsageError(f"the cut-off {name} returned {fraction!r}: expected a fraction in (0, 1]")
    return fraction


def _overwrite(vector: Tensor, positions: Tensor | None, source: Tensor) -> Tensor:
    """Return ``vector`` with the entries of ``source`` at ``positions`` (None: all of them)."""
    return source.clone() if positions is None else overwritten(vector, positions, source)


def _merge_params(state: OwnState, params: Tensor, received: Sequence[Received]) -> tuple[Tensor, OwnState]:
    own = params if state.own is None else state.own
    return params + mix(own, received), replace(state, own=None)


# --- Constructors, named in configuration files -----------------------------------------------------------


full = Full
random_k = RandomK


def top_k(fraction: float, *, accumulate: bool = False, values: Precision | Quantizer = "float32") -> Jwins:
    """Send the parameters that changed most: JWINS without wavelet and without a randomized cut-off.

    Args:
        fraction: in (0, 1]. At 1 this is full sharing.
        accumulate: False scores by the current round's training; True by the change since the last sending, as
            JWINS does.
        values: "float32", "bfloat16" or a quantizer.
    """
    return Jwins(FixedCutoff(fraction), None, "reference", accumulate, dense_above=1.0, values=values)


def jwins(
    cutoff: Cutoff | None = None,
    wavelet: str | None = "sym2",
    levels: int = 4,
    mode: Literal["symmetric", "periodization"] = "symmetric",
    score: ScoreRule = "reference",
    accumulate: bool = True,
    dense_above: float = 0.5,
    values: Precision | Quantizer = "float32",
) -> Jwins:
    """Return JWINS with the paper's values as defaults. The default score rule follows from records/score-rule.

    Args:
        cutoff: fraction for each node and round; None is ``RandomCutoff(PAPER_FRACTIONS)``.
        wavelet: any discrete wavelet of PyWavelets, or None (or "none") for no transform.
        levels: depth of the transform, 0 (none) to 24.
        mode: boundary handling; "symmetric" gives a few more coefficients than parameters,
            "periodization" is orthonormal for orthogonal wavelets.
        score: see :data:`ScoreRule`.
        accumulate: False disables the accumulation of scores.
        dense_above: at this fraction and above, everything is sent.
        values: "float32", "bfloat16" or a quantizer.

    Raises:
        ConfigError: an argument is out of range.
    """
    transform = None if wavelet is None or wavelet == "none" else Wavelet(wavelet, levels, mode)
    return Jwins(
        RandomCutoff() if cutoff is None else cutoff, transform, score, accumulate, dense_above, values
    )
