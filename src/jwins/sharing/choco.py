"""CHOCO-SGD: compressed differences to a public replica that all neighbours keep.

Every node i has a replica x_hat_i that its neighbours hold too. Per round, after local training to x:

    q_i      = top-k(x_i - x_hat_i)
    x_hat_i += q_i                       at i and at each neighbour that hears q_i
    x_i     += gamma * sum_j W_ij (x_hat_j - x_hat_i)

Source: Koloskova, Stich, Jaggi, "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed
Communication", ICML 2019, algorithm 2; Koloskova et al., ICLR 2020.

A neighbour that missed one q has a wrong replica from then on. So an update names the round it builds upon and
a hash of the replica it leads to, and a receiver for which either does not fit asks for a key: the whole
replica. Replicas cost degree * P * 4 bytes of memory per node.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from jwins.errors import ConfigError, UsageError
from jwins.ops.select import count_of, largest_k
from jwins.rng import RoundContext
from jwins.sharing.base import Precision, Sharing, check_fraction, check_precision, rounded
from jwins.update import Received, Update

__all__ = ["Choco", "ChocoState", "Replica", "choco"]


@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """What a node holds of another: x_hat (P,) float32 after the other's update of ``round``."""

    x_hat: Tensor
    round: int


@dataclass(frozen=True, slots=True, eq=False)
class ChocoState:
    """What CHOCO-SGD remembers.

    Attributes:
        x_hat: (P,) float32, this node's own replica, as its neighbours hold it.
        shared: the round of this node's last share, or None.
        replicas: of the neighbours, by node.
        missing: neighbours whose key is needed.
    """

    x_hat: Tensor
    shared: int | None = None
    replicas: Mapping[int, Replica] = field(default_factory=dict)
    missing: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Choco(Sharing[ChocoState]):
    """CHOCO-SGD with a top-k compressor; see the module's docstring for the algorithm.

    Attributes:
        fraction: of the parameters to send, in (0, 1].
        gamma: consensus step size, in (0, 1].
        values: precision in which differences are sent.
    """

    fraction: float
    gamma: float
    values: Precision = "float32"
    remembers_peers: ClassVar[bool] = True
    state_types: ClassVar[tuple[type, ...]] = (ChocoState, Replica)

    def __post_init__(self) -> None:
        check_fraction("sharing.fraction", self.fraction)
        if not 0.0 < self.gamma <= 1.0:
            raise ConfigError("sharing.gamma", self.gamma, "expected a consensus step size in (0, 1]")
        check_precision(self.values)

    def init(self, params: Tensor) -> ChocoState:
        """All replicas start at 0, which needs no message."""
        return ChocoState(torch.zeros_like(params))

    def share(self, state: ChocoState, params: Tensor, ctx: RoundContext) -> tuple[Update, ChocoState]:
        """The largest differences to the own replica."""
        dim = len(params)
        difference = params - state.x_hat
        count = count_of(self.fraction, dim)
        positions = None if count == dim else largest_k(difference, count)
        values = rounded(difference if positions is None else difference[positions], self.values)
        x_hat = _add(state.x_hat, positions, values)
        update = Update(dim, positions, values, base=state.shared, check=_hash(x_hat))
        return update, replace(state, x_hat=x_hat, shared=ctx.round)

    def merge(
        self, state: ChocoState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, ChocoState]:
        """Bring the replicas up to date, then one gossip step on those that were heard in this round."""
        replicas = {j: r for j, r in state.replicas.items() if j in ctx.weights}
        missing = {j for j in state.missing if j in ctx.weights}
        heard: dict[int, float] = {}
        for item in received:
            j, update = item.sender, item.update
            held = replicas.get(j)
            if held is not None and item.round <= held.round:
                continue  # already known from a key
            replica = self._follow(held, item, params)
            if replica is None:
                replicas.pop(j, None)
                missing.add(j)
                continue
            replicas[j] = replica
            if update.base is None:
                missing.discard(j)
            if item.weight > 0.0:
                heard[j] = item.weight
        change = torch.zeros_like(params)
        for j in sorted(heard):
            if j not in missing:
                change.add_(replicas[j].x_hat - state.x_hat, alpha=heard[j])
        kept = {j: r for j, r in replicas.items() if j in ctx.weights}
        return (
            params + self.gamma * change,
            replace(state, replicas=kept, missing=frozenset(missing & ctx.weights.keys())),
        )

    def key(self, state: ChocoState, ctx: RoundContext) -> Update:
        """The own replica, without the zeros where that is shorter."""
        if state.shared is None:
            raise UsageError(f"node {ctx.node} has shared nothing yet, so its first update is its key")
        nonzero = torch.nonzero(state.x_hat).squeeze(-1)
        sparse = 2 * len(nonzero) < len(state.x_hat)
        positions = nonzero if sparse else None
        values = state.x_hat[nonzero] if sparse else state.x_hat
        return Update(len(state.x_hat), positions, values, base=None, check=_hash(state.x_hat))

    def missing(self, state: ChocoState) -> frozenset[int]:
        """Neighbours whose replica was lost by a gap or a hash that does not fit."""
        return state.missing

    @staticmethod
    def _follow(held: Replica | None, item: Received, params: Tensor) -> Replica | None:
        """The sender's replica after ``item``, or None if it cannot be known."""
        update = item.update
        if update.base is None:
            before = torch.zeros_like(params)
        elif held is not None and held.round == update.base:
            before = held.x_hat
        else:
            return None
        positions = update.indices()
        x_hat = _add(
            before,
            None if positions is None else positions.to(params.device),
            update.dense_values().to(params.device),
        )
        if update.check is not None and _hash(x_hat) != update.check:
            return None
        return Replica(x_hat, item.round)


def _add(vector: Tensor, positions: Tensor | None, values: Tensor) -> Tensor:
    """``vector`` (P,) plus ``values`` at ``positions``; the same arithmetic at sender and receiver."""
    values = values.to(torch.float32)
    return vector + values if positions is None else vector.index_add(0, positions, values)


def _hash(vector: Tensor) -> int:
    """CRC-32 of a vector's little-endian float32 bytes: finds drift, not malice."""
    return zlib.crc32(vector.detach().cpu().numpy().astype("<f4", copy=False).data)


def choco(fraction: float, gamma: float, *, values: Precision = "float32") -> Choco:
    """CHOCO-SGD with top-k.

    Args:
        fraction: of the parameters to send, in (0, 1].
        gamma: consensus step size, in (0, 1]; smaller for smaller fractions.
        values: "float32" or "bfloat16".

    >>> choco(0.2, gamma=0.6)
    Choco(fraction=0.2, gamma=0.6, values='float32')
    """
    return Choco(fraction, gamma, values)
