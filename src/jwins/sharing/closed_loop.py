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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from jwins.ops.arrays import array
from jwins.ops.mixing import mixed_replicas
from jwins.ops.replicas import error, hold_back, nonzero, stepped_
from jwins.ops.wavelet import Wavelet
from jwins.rng import RoundContext
from jwins.sharing.base import Vectors
from jwins.sharing.rate import FixedStep, Pace, RelativeStep, StepRule, step_rule
from jwins.sharing.replicas import OnReplicas, Replica, follow, hash_of
from jwins.sharing.step_grid import FINEST, LIMIT, StepGrid
from jwins.sharing.update import Received, Update
from jwins.validation import DEAD_ZONE, GAMMA, HISTORY, RATE

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
    """

    rule: StepRule
    gamma: float
    dead_zone: float
    residual_rate: float
    transform: Wavelet | None
    history: int
    needs_common_start: ClassVar[bool] = True
    asynchronous: ClassVar[bool] = True
    state_types: ClassVar[tuple[type, ...]] = (ClosedLoopState, Increment, Pace, Replica)

    def __post_init__(self) -> None:
        GAMMA.check("sharing.gamma", self.gamma)
        DEAD_ZONE.check("sharing.dead_zone", self.dead_zone)
        RATE.check("sharing.residual_rate", self.residual_rate)
        HISTORY.check("sharing.history", self.history)

    @property
    def grid(self) -> StepGrid:
        """Return the grid of the replicas' values."""
        fixed = self.rule.step if isinstance(self.rule, FixedStep) else FINEST
        return StepGrid(float(np.float32(fixed)))

    def update_dim(self, num_params: int) -> int:
        """Return C, the number of coefficients."""
        return num_params if self.transform is None else self.transform.size(num_params)

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state and of an exchange; frames have up to four bits per parameter.

        A symbol that an increment keeps takes two numbers. With steps in proportion to the change by training,
        an eighth of all symbols count as kept. Training leaves a few in a hundred, white noise a quarter.
        """
        kept = 0.25 if isinstance(self.rule, RelativeStep) and self.rule.step_ratio >= 2.0 else 1.0
        return Vectors(3 + neighbours + kept * self.history, 6 + 2 * neighbours, 0.125)

    def init(self, params: Tensor) -> ClosedLoopState:
        """Return replicas of the common initial parameters, which need no message."""
        x_hat = torch.zeros(self.update_dim(len(params)), dtype=torch.int32, device=params.device)
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
        symbols, x_hat, unsent = stepped_(
            wanted, coefficients, state.x_hat, grid.unit, threshold, LIMIT // multiple, multiple
        )
        if largest > grid.unit * (LIMIT - 2 * multiple):
            room = (LIMIT - state.x_hat) // multiple, -((LIMIT + state.x_hat) // multiple)
            symbols = torch.minimum(torch.maximum(symbols, room[1]), room[0])
            x_hat = torch.add(state.x_hat, symbols, alpha=multiple)
            unsent = error(coefficients, x_hat, grid.unit)[0]
        increments = state.increments
        if state.shared is not None and self.history:
            latest = sorted(increments)[-(self.history - 1) :] if self.history > 1 else []
            increments = {r: increments[r] for r in latest} | {state.shared: _increment(symbols, multiple)}
        update = Update(
            len(x_hat),
            None,
            grid.of_symbols(symbols, multiple, subbands),
            base=state.shared,
            check=hash_of(x_hat),
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
            grid.advanced,
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
        return Update(
            len(state.x_hat), None, self.grid.quantized(state.x_hat, subbands), check=hash_of(state.x_hat)
        )

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
        return Update(len(state.x_hat), None, values, base=round, check=hash_of(state.x_hat))

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
    )
