"""BEER and MoTEF: gradient tracking with compressed differences, to remove D-PSGD's bias on unlike data.

A round's training changes the parameters from x to y. This change takes the place of the negative gradient. A
node and its neighbours hold the same replicas h of x and g of the tracker v, all 0 at first:

    d  = y - x
    m' = (1 - momentum) m + momentum d          d itself in the first round
    v += m' - m                                 m' itself in the first round
    h += top-k(x - h),  g += top-k(v - g)       at i and at each neighbour that receives them
    x += v + gamma sum_j W_ij (h_j - h_i)
    v += gamma sum_j W_ij (g_j - g_i)

The mean of v over the nodes always equals that of m. With ``momentum = 1`` this is BEER; below 1 it is MoTEF,
which needs no large batches. A node that receives nothing keeps its trained parameters y. An update has one
vector of 2 P entries, x before v. The largest entries of each half are sent.

Sources: H. Zhao, B. Li, Z. Li, P. Richtárik, Y. Chi, "BEER: Fast O(1/T) Rate for Decentralized Nonconvex
Optimization with Communication Compression", NeurIPS 2022, algorithm 1; R. Islamov, Y. Gao, S. U. Stich,
"Towards Faster Decentralized Stochastic Optimization with Communication Compression", 2024, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from jwins.ops.select import count_of, largest_k
from jwins.rng import RoundContext
from jwins.sharing.base import Precision, Quantizer, Vectors, check_quantizer, quantize
from jwins.sharing.replicas import OnReplicas, Replica, added, follow, hash_of
from jwins.sharing.update import Received, Update
from jwins.validation import FRACTION, GAMMA


@dataclass(frozen=True, slots=True, eq=False)
class BeerState:
    """State of BEER.

    Attributes:
        start: (P,) float32, the parameters at the start of the round.
        x_hat: (2 P,) float32, this node's own replicas h and g, as its neighbours hold them.
        change: (P,) float32, m; None before the first round.
        tracker: (P,) float32, v; None before the first round.
        shared: the round of this node's last share, or None.
        replicas: replicas of the neighbours, by node.
        stale_peers: neighbours whose keyframe is needed.
    """

    start: Tensor
    x_hat: Tensor
    change: Tensor | None = None
    tracker: Tensor | None = None
    shared: int | None = None
    replicas: Mapping[int, Replica] = field(default_factory=dict)
    stale_peers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Beer(OnReplicas[BeerState]):
    """BEER with a top-k compressor, or MoTEF with ``momentum`` below 1. The module's docstring has the
    algorithm.

    Attributes:
        fraction: fraction of the parameters, and of the tracker, to send, in (0, 1].
        gamma: consensus step size, in (0, 1]; smaller for smaller fractions.
        momentum: weight of the newest change against the mean of earlier ones, in (0, 1].
        values: quantizer of the sent differences, or "float32" or "bfloat16".

    Raises:
        ConfigError: an argument is out of range.
    """

    fraction: float
    gamma: float
    momentum: float = 1.0
    values: Precision | Quantizer = "float32"
    state_types: ClassVar[tuple[type, ...]] = (BeerState, Replica)

    def __post_init__(self) -> None:
        FRACTION.check("sharing.fraction", self.fraction)
        GAMMA.check("sharing.gamma", self.gamma)
        FRACTION.check("sharing.momentum", self.momentum)
        check_quantizer(self.values)

    def update_dim(self, num_params: int) -> int:
        """Return 2 P, for parameters and tracker."""
        return 2 * num_params

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state and of an exchange."""
        return Vectors(2 + neighbours, 4 + 2 * neighbours)

    def init(self, params: Tensor) -> BeerState:
        """Return replicas of 0, which need no message."""
        return BeerState(params.clone(), torch.zeros_like(params).repeat(2))

    def share(self, state: BeerState, params: Tensor, ctx: RoundContext) -> tuple[Update, BeerState]:
        """Send the largest differences between the round's start, the tracker and this node's replicas."""
        trained, dim = params - state.start, len(params)
        if state.change is None or state.tracker is None:
            change = tracker = trained
        else:
            change = torch.lerp(state.change, trained, self.momentum)
            tracker = state.tracker + (change - state.change)
        difference = torch.cat([state.start, tracker]) - state.x_hat
        count = count_of(self.fraction, dim)
        positions = None
        if count < dim:
            halves = (largest_k(difference[:dim], count), largest_k(difference[dim:], count) + dim)
            positions = torch.cat(halves)
        chosen = difference if positions is None else difference.index_select(0, positions)
        values = quantize(self.values, chosen, (count, count), ctx)
        x_hat = added(state.x_hat, positions, values)
        update = Update(2 * dim, positions, values, base=state.shared, check=hash_of(x_hat))
        return update, replace(state, x_hat=x_hat, change=change, tracker=tracker, shared=ctx.round)

    def merge(
        self, state: BeerState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, BeerState]:
        """Take one step along the tracker, and one gossip step of both vectors with the received updates."""
        followed = follow(state.replicas, state.stale_peers, received, ctx.weights, like=state.x_hat)
        merged, tracker = params.clone(), state.tracker
        if followed.received_weights and tracker is not None:
            mixed = followed.pull(state.x_hat, self.gamma)
            merged += (tracker - (params - state.start)) + mixed[: len(params)]
            tracker = tracker + mixed[len(params) :]
        return merged, replace(
            state,
            start=merged,
            tracker=tracker,
            replicas=followed.replicas,
            stale_peers=followed.stale_peers,
        )

    def projected(self, state: BeerState, params: Tensor) -> BeerState:
        """Take ``params`` as the start of the round."""
        return replace(state, start=params.clone())


beer = Beer
"""Constructor under its name in ``sharing.kind``."""
