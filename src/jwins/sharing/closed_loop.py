"""Closed loop: coarse steps towards a replica that all neighbours keep, in the wavelet domain, entropy coded.

Node i and all its neighbours hold the same vector n_i of whole numbers. With the unit u and the wavelet
transform T, u n_i approximates T(y_i - x_0), where x_0 are the common initial parameters. Per round, after
local training to y:

    d    = T(y_i - x_0) - u n_i            change that the neighbours do not have
    q    = round(d / step), 0 in the dead zone
    n_i += q step / u                      at i and at each neighbour that receives q
    l_i += gamma (sum_j W_ij) e_i                 e = d - q step, the residual
    x_i  = y_i + T^-1( gamma sum_j W_ij (u n_j - u n_i - e_i) + residual_rate l_i )
    l_i *= 1 - residual_rate

Errors of the quantizer do not accumulate in n: they are part of the next d. This is difference coding with the
quantizer inside the prediction loop (DPCM). A node mixes the neighbours' values with its exact model, so that
its own rounding error does not return to it. The difference that this makes to the sum over the nodes is kept
in l and returned slowly, when the errors have averaged out. With residual_rate = 1, without the wavelet and the
entropy coding it is DCD-PSGD (Tang et al., "Communication Compression for Decentralized Training", NeurIPS
2018) and, with gamma, CHOCO-SGD (Koloskova et al., ICML 2019) with another compressor. See
docs/explanation/closed-loop.md.

With a ``rank`` an update also has a low-rank part of each matrix. With whole numbers a_k and b_k,

    n_i += step / (32 u) sum_k a_k b_k'           before q is chosen

T. Vogels, S. P. Karimireddy, M. Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", NeurIPS 2019, send such products alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.ops.arrays import array
from jwins.ops.low_rank import MAX_FACTOR, LowRank
from jwins.ops.mixing import mixed_replicas
from jwins.ops.replicas import error, hold_back, nonzero, stepped_
from jwins.ops.wavelet import Wavelet
from jwins.rng import RoundContext
from jwins.sharing.base import Vectors
from jwins.sharing.rate import FixedStep, Pace, RelativeStep, StepRule, step_rule
from jwins.sharing.replicas import OnReplicas, Replica, follow, hash_of
from jwins.sharing.step_grid import FINEST, LIMIT, StepGrid, within
from jwins.sharing.update import Quantized, Received, Update
from jwins.validation import DEAD_ZONE, GAMMA, HISTORY, RANK, RATE

DEFAULT_STEP_RATIO = 2.0
"""Default ratio of the step to the change by training, if neither a step nor a budget is given."""


@dataclass(frozen=True, slots=True, eq=False)
class Increment:
    """Change of a replica by one share, on the CPU.

    Attributes:
        positions: (k,) int32, strictly increasing; or None for all.
        units: (k,) int32.
    """

    positions: Tensor | None
    units: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ClosedLoopState:
    """State of a node; ``start`` is the vector that ``merge`` returned.

    Attributes:
        origin: (P,) float32, the common initial parameters of all nodes.
        start: (P,) float32, the parameters at the start of the round.
        x_hat: (C,) int32, this node's own replica, as its neighbours hold it.
        shared: the round of this node's last share, or None.
        pace: state of the rate control.
        multiple: the step of the last share, in units; 0 before the first.
        increments: changes of this node's own replica by its latest shares. Each has the round of the share
            before it as its key.
        replicas: replicas of the neighbours, by node.
        stale_peers: neighbours with a missed update.
        residual: (C,) float32, quantization errors that were held back and are still to be returned.
        unsent: (C,) float32, residual of the last share; only between share and merge.
    """

    origin: Tensor
    start: Tensor
    x_hat: Tensor
    shared: int | None = None
    pace: Pace = field(default_factory=Pace)
    multiple: int = 0
    increments: Mapping[int, Increment] = field(default_factory=dict)
    replicas: Mapping[int, Replica] = field(default_factory=dict)
    stale_peers: frozenset[int] = frozenset()
    residual: Tensor | None = None
    unsent: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ClosedLoop(OnReplicas[ClosedLoopState]):
    """The closed loop; see the module's docstring for the algorithm.

    Attributes:
        rule: rule for the step. A fixed step is the unit of replicas. Other steps are rounded to powers of two
            times :data:`jwins.sharing.step_grid.FINEST`. With a budget, a step stays until the wanted step is
            twice or half of it.
        gamma: consensus step size, in (0, 1].
        dead_zone: half-width of the dead zone, in steps.
        residual_rate: fraction of the accumulated residual that is returned per round, in [0, 1].
        transform: the wavelet transform, or None to work on the parameters themselves.
        history: number of latest shares whose increments are kept, for neighbours that missed updates.
        rank: rank of the low-rank part of each matrix; None for none.
        shapes: shapes of the model's tensors, from :meth:`for_model`. Without them, the parameters count as the
            largest square matrix that they fill and a vector with the rest.
    """

    rule: StepRule
    gamma: float
    dead_zone: float
    residual_rate: float
    transform: Wavelet | None
    history: int
    rank: int | None = None
    shapes: tuple[tuple[int, ...], ...] | None = None
    needs_common_start: ClassVar[bool] = True
    asynchronous: ClassVar[bool] = True
    state_types: ClassVar[tuple[type, ...]] = (ClosedLoopState, Increment, Pace, Replica)

    def __post_init__(self) -> None:
        GAMMA.check("sharing.gamma", self.gamma)
        DEAD_ZONE.check("sharing.dead_zone", self.dead_zone)
        RATE.check("sharing.residual_rate", self.residual_rate)
        HISTORY.check("sharing.history", self.history)
        if self.rank is not None:
            RANK.check("sharing.rank", self.rank)
            if self.transform is not None:
                raise ConfigError("sharing.rank", self.rank, "needs wavelet = 'none'")

    @property
    def grid(self) -> StepGrid:
        """Return the grid of the replicas' values."""
        fixed = self.rule.step if isinstance(self.rule, FixedStep) else FINEST
        return StepGrid(float(np.float32(fixed)))

    def for_model(self, shapes: tuple[tuple[int, ...], ...]) -> ClosedLoop:
        """Return the algorithm for tensors of these shapes."""
        return self if self.rank is None else replace(self, shapes=shapes)

    def update_dim(self, num_params: int) -> int:
        """Return the number of coefficients, C, and of the factors of low-rank parts before them."""
        low_rank = self._low_rank(num_params)
        return self._num_coefficients(num_params) + (0 if low_rank is None else low_rank.size)

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state and of an exchange; frames have up to four bits per parameter.

        A symbol that an increment keeps takes two numbers. With steps in proportion to the change by training,
        an eighth of all symbols count as kept. Training leaves a few in a hundred, white noise a quarter.
        """
        few = isinstance(self.rule, RelativeStep) and self.rule.step_ratio >= 2.0 and self.rank is None
        kept = 0.25 if few else 1.0
        return Vectors(3 + neighbours + kept * self.history, 6 + 2 * neighbours, 0.125)

    def init(self, params: Tensor) -> ClosedLoopState:
        """Return replicas of the common initial parameters, which need no message."""
        x_hat = torch.zeros(self._num_coefficients(len(params)), dtype=torch.int32, device=params.device)
        origin = params.clone()
        return ClosedLoopState(origin, start=origin, x_hat=x_hat)

    def share(
        self, state: ClosedLoopState, params: Tensor, ctx: RoundContext
    ) -> tuple[Update, ClosedLoopState]:
        """Quantize the difference between the model and the replica that neighbours hold."""
        grid = self.grid
        coefficients = self._forward(params - state.origin)
        wanted, largest = error(coefficients, state.x_hat, grid.unit)
        subbands = self._subbands(len(params))
        pace = self.rule.next(state.pace, params - state.start, wanted, subbands, ctx)
        multiple, width = self._multiple(state.multiple, pace.step)
        step = grid.unit * multiple
        threshold = max(self.dead_zone * width, 0.5 * step)
        before, factors = state.x_hat, None
        if (low_rank := self._low_rank(len(params))) is not None:
            factors, before = self._with_low_rank(low_rank, wanted, before, multiple)
            wanted = error(coefficients, before, grid.unit)[0]
        symbols, x_hat, unsent = stepped_(
            wanted, coefficients, before, grid.unit, threshold, LIMIT // multiple, multiple
        )
        if largest > grid.unit * (LIMIT - 2 * multiple):
            room = (LIMIT - before) // multiple, -((LIMIT + before) // multiple)
            symbols = torch.minimum(torch.maximum(symbols, room[1]), room[0])
            x_hat = torch.add(before, symbols, alpha=multiple)
            unsent = error(coefficients, x_hat, grid.unit)[0]
        increments = state.increments
        if state.shared is not None and self.history:
            latest = sorted(increments)[-(self.history - 1) :] if self.history > 1 else []
            whole = before is not state.x_hat
            change = Increment(None, (x_hat - state.x_hat).cpu()) if whole else _increment(symbols, multiple)
            increments = {r: increments[r] for r in latest} | {state.shared: change}
        update = self._update(
            grid.of_symbols(symbols, multiple, subbands), x_hat, factors=factors, base=state.shared
        )
        return update, replace(
            state,
            x_hat=x_hat,
            shared=ctx.round,
            pace=pace,
            multiple=multiple,
            increments=increments,
            unsent=unsent if self.residual_rate < 1.0 else None,
        )

    def merge(
        self, state: ClosedLoopState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, ClosedLoopState]:
        """Update the replicas, then take one gossip step with those whose update arrived in this round."""
        grid = self.grid
        followed = follow(
            state.replicas,
            state.stale_peers,
            received,
            ctx.weights,
            state.x_hat,
            self._advanced,
            keep_old=self.history > 0,
        )
        received_weights = followed.received_weights
        change = mixed_replicas(
            state.x_hat,
            [followed.replicas[j].x_hat for j in received_weights],
            [self.gamma * grid.unit * weight for weight in received_weights.values()],
        )
        residual = state.residual
        if state.unsent is not None and received_weights:
            weight = self.gamma * sum(received_weights.values())
            residual = hold_back(change, state.unsent, residual, weight, self.residual_rate)
        merged = change if self.transform is None else self.transform.inverse(change, len(params))
        merged.add_(params)
        return merged, replace(
            state,
            start=merged,
            replicas=followed.replicas,
            stale_peers=followed.stale_peers,
            residual=residual,
            unsent=None,
        )

    def projected(self, state: ClosedLoopState, params: Tensor) -> ClosedLoopState:
        """Take ``params`` as the start of the round."""
        return replace(state, start=params.clone())

    def whole(self, state: ClosedLoopState) -> Update:
        """Return this node's replica in the coarsest step that divides it: exact, and shorter than float32."""
        subbands = self._subbands(len(state.origin))
        return self._update(self.grid.quantized(state.x_hat, subbands), state.x_hat)

    def replica_round(self, state: ClosedLoopState, sender: int) -> int | None:
        """Return the round of this node's replica of ``sender``, or None."""
        replica = state.replicas.get(sender)
        return None if replica is None else replica.round

    def delta_since(self, state: ClosedLoopState, round: int, ctx: RoundContext) -> Update | None:
        """Return all increments since ``round`` as one, or None if they are not kept."""
        if round not in state.increments:
            return None
        change = torch.zeros(len(state.x_hat), dtype=torch.int32, device="cpu")
        for since, increment in state.increments.items():
            if since < round:
                continue
            if increment.positions is None:
                change.add_(increment.units)
            else:
                change.index_add_(0, increment.positions, increment.units)
        values = self.grid.quantized(change, self._subbands(len(state.origin)))
        return self._update(values, state.x_hat, base=round)

    def _update(
        self, values: Quantized, x_hat: Tensor, *, factors: Tensor | None = None, base: int | None = None
    ) -> Update:
        """Return an update of ``values`` (C,) that leads to the replica ``x_hat``, with factors before them.

        An empty run between factors and values keeps the coder from taking the factors for a coarser subband.
        """
        low_rank = self._low_rank(len(x_hat))
        if low_rank is not None:
            if factors is None:
                factors = torch.zeros(low_rank.size, dtype=torch.int32, device="cpu")
            runs = (low_rank.size, 0, *values.runs)
            scales = torch.cat([values.scales[:1], values.scales[:1], values.scales])
            values = Quantized(torch.cat([factors.cpu(), values.symbols]), scales, runs)
        return Update(sum(values.runs), None, values, base=base, check=hash_of(x_hat))

    def _advanced(self, units: Tensor, update: Update) -> Tensor | None:
        """Return a replica (C,) int32 after an update, or None if the update is invalid."""
        low_rank, values = self._low_rank(len(units)), update.values
        if low_rank is None:
            return self.grid.advanced(units, update)
        if not isinstance(values, Quantized) or update.positions is not None:
            return None
        if values.dither is not None or values.offset or len(values.runs) < 3:
            return None
        if (values.runs[0], len(values.symbols)) != (low_rank.size, low_rank.size + len(units)):
            return None
        factors = values.symbols[: low_rank.size]
        if bool(factors.any()):
            multiple = self.grid.multiple_of(float(values.scales[0]))
            product = low_rank.product(factors.to(units.device))
            if product is None or multiple is None or multiple < MAX_FACTOR:
                return None
            units = torch.add(units.to(torch.int64), product, alpha=multiple // MAX_FACTOR)
            if not within(units):
                return None
            units = units.to(torch.int32)
        rest = Quantized(values.symbols[low_rank.size :], values.scales[2:], values.runs[2:])
        return self.grid.advanced(units, Update(len(units), None, rest))

    def _with_low_rank(
        self, low_rank: LowRank, wanted: Tensor, x_hat: Tensor, multiple: int
    ) -> tuple[Tensor, Tensor]:
        """Return the factors of the low-rank part of ``wanted`` (P,), and the replica with it."""
        part = multiple // MAX_FACTOR
        if 0 < part <= LIMIT // (low_rank.rank * MAX_FACTOR**2):
            factors = low_rank.factors(wanted, self.grid.unit * part)
            product = low_rank.product(factors)  # None where a square overflowed
            after = None if product is None else torch.add(x_hat, product, alpha=part)
            if after is not None and within(after):
                return factors, after
        return torch.zeros(low_rank.size, dtype=torch.int32, device=x_hat.device), x_hat

    def _low_rank(self, num_params: int) -> LowRank | None:
        if self.rank is None:
            return None
        square = math.isqrt(num_params)
        return LowRank(self.shapes or ((square, square), (num_params - square * square,)), self.rank)

    def _num_coefficients(self, num_params: int) -> int:
        return num_params if self.transform is None else self.transform.size(num_params)

    def _forward(self, change: Tensor) -> Tensor:
        return change if self.transform is None else self.transform.forward(change)

    def _multiple(self, latest: int, wanted: float) -> tuple[int, float]:
        """Return the step in units, and the step that the dead zone is measured in.

        Switching between two steps resends information, so the step of a steady rule changes only after a
        drift by a factor of two. Until then a longer wanted step makes the dead zone wider.
        """
        if not self.rule.steady:
            return self.grid.multiple(wanted), wanted
        near = latest and 0.5 < wanted / (self.grid.unit * latest) < 2.0
        multiple = latest if near else self.grid.multiple(wanted)
        return multiple, max(wanted, self.grid.unit * multiple)

    def _subbands(self, num_params: int) -> tuple[int, ...]:
        return (num_params,) if self.transform is None else self.transform.subbands(num_params)


def _increment(symbols: Tensor, multiple: int) -> Increment:
    """Return an increment of ``symbols`` (C,), without its zeros if that takes less memory."""
    symbols = symbols.cpu()
    count = int(np.count_nonzero(array(symbols)))
    if len(symbols) >= 2**31 or 2 * count > len(symbols):
        return Increment(None, symbols * multiple)
    positions, units = nonzero(symbols, count)
    return Increment(positions, units.mul_(multiple))


def closed_loop(
    step: float | None = None,
    budget: float | None = None,
    budget_bytes: int | None = None,
    *,
    budget_seconds: float | None = None,
    link_mbps: float | None = None,
    step_ratio: float = DEFAULT_STEP_RATIO,
    gamma: float = 1.0,
    dead_zone: float = 0.8,
    residual_rate: float = 0.1,
    wavelet: str | None = "sym2",
    levels: int = 4,
    mode: Literal["symmetric", "periodization"] = "periodization",
    history: int = 4,
    rank: int | None = None,
) -> ClosedLoop:
    """Return the closed loop: quantized increments on replicas that neighbours keep, in the wavelet domain.

    Give at most one of ``step``, the budgets and ``step_ratio``. With none, ``step_ratio`` is 2.

    Args:
        step: fixed step of the quantizer.
        budget: bits per parameter of a frame to a neighbour, on average over rounds; the step adapts.
        budget_bytes: the same budget in bytes of a frame.
        budget_seconds: the same budget in seconds for a round's frames to all neighbours on the link.
        link_mbps: rate of the node's link, Mbit/s; required with ``budget_seconds``.
        step_ratio: ratio of the step to the root mean square of a round's change by training.
        gamma: consensus step size, in (0, 1].
        dead_zone: half-width of the dead zone in steps; 0.5 is plain rounding.
        residual_rate: fraction of the accumulated residual that is returned per round; 1 is CHOCO-SGD, 0 drops
            the residual.
        wavelet: any discrete wavelet of PyWavelets, or None (or "none") for no transform.
        levels: depth of the transform, 0 (none) to 24.
        mode: boundary handling; "periodization" gives exactly as many coefficients as parameters, padded to
            a multiple of ``2**levels``.
        history: rounds that a neighbour may miss before it needs a keyframe. Each takes 8 bytes per nonzero
            symbol, and at most 4 per parameter.
        rank: rank of the low-rank part that each matrix's change is sent with; None for none. It needs
            ``wavelet=None``.

    Raises:
        ConfigError: an argument is out of range, or several of the step, the budgets and the ratio are given.
    """
    transform = None if wavelet is None or wavelet == "none" else Wavelet(wavelet, levels, mode)
    return ClosedLoop(
        step_rule(step, budget, budget_bytes, step_ratio, budget_seconds, link_mbps, DEFAULT_STEP_RATIO),
        gamma,
        dead_zone,
        residual_rate,
        transform,
        history,
        rank,
    )
