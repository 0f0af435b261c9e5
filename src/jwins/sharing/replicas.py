"""Replicas of the neighbours, updated with each of their updates.

A node whose updates are increments has a replica of itself. Each neighbour that receives every update has
the same replica, bit for bit. A neighbour that misses an update has a wrong replica from then on. So an update
names the round that it builds on (``Update.base``) and a hash of the resulting replica (``Update.check``). If
either does not match, the sender becomes one of ``stale_peers``, and is asked for its keyframe: the whole
replica, which stands alone. Replicas take degree * C * 4 bytes of memory per node, as float32 or as the
integers of :mod:`jwins.sharing.step_grid`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from jwins.errors import UsageError
from jwins.rng import RoundContext
from jwins.sharing.base import S, Sharing, Vectors
from jwins.sharing.update import Quantized, Received, Update, dense_of


@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """Replica of another node.

    Attributes:
        x_hat: (C,) float32 values, or int32 multiples of the unit of a
            :class:`~jwins.sharing.step_grid.StepGrid`.
        round: round of the newest update in it.
    """

    x_hat: Tensor
    round: int


@dataclass(frozen=True, slots=True, eq=False)
class Followed:
    """Replicas of the neighbours after a round.

    Attributes:
        replicas: replicas of the round's neighbours, by node. The replica of a neighbour in ``stale_peers`` is
            correct, but older than the neighbour's last update.
        stale_peers: neighbours whose missed increments or keyframe are needed.
        received_weights: mixing weights of the neighbours whose update arrived in this round and whose replica
            is up to date, by node in increasing order.
    """

    replicas: Mapping[int, Replica]
    stale_peers: frozenset[int]
    received_weights: Mapping[int, float] = field(default_factory=dict)

    def pull(self, x_hat: Tensor, gamma: float = 1.0) -> Tensor:
        """Return ``sum_j gamma W_ij (x_hat_j - x_hat)`` over those neighbours.

        Args:
            x_hat: (C,) float32, this node's own replica.
            gamma: factor on the weights.
        """
        change = torch.zeros_like(x_hat)
        for j, weight in self.received_weights.items():
            change.add_(self.replicas[j].x_hat - x_hat, alpha=gamma * weight)
        return change


class OnReplicas(Sharing[S]):
    """Base of the algorithms whose neighbours keep replicas of each other.

    Their states have ``x_hat`` (this node's replica, as its neighbours hold it), ``shared`` (the round of the
    last share, or None) and ``stale_peers``.
    """

    remembers_peers: ClassVar[bool] = True

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of replicas, and of an exchange of updates with up to a third of the values."""
        return Vectors(1 + neighbours, 5 + 2 * neighbours)

    def keyframe(self, state: Any, ctx: RoundContext) -> Update:
        """Return this node's replica as an update that stands alone."""
        if state.shared is None:
            raise UsageError(f"node {ctx.node} has shared nothing yet, so its first update is its keyframe")
        return self.whole(state)

    def whole(self, state: Any) -> Update:
        """Return this node's replica, without its zeros if that is shorter."""
        return keyframe_of(state.x_hat)

    def stale_peers(self, state: Any) -> frozenset[int]:
        """Return the neighbours with a gap in their updates or a wrong hash."""
        found: frozenset[int] = state.stale_peers
        return found


def follow(
    replicas: Mapping[int, Replica],
    stale_peers: Collection[int],
    received: Sequence[Received],
    neighbours: Collection[int],
    like: Tensor,
    advance: Callable[[Tensor, Update], Tensor | None] | None = None,
    *,
    keep_old: bool = False,
) -> Followed:
    """Update replicas with the received updates.

    Args:
        replicas: replicas before the round, by node.
        stale_peers: nodes whose keyframe was needed before the round.
        received: every update since the last merge, late ones too, sorted by (sender, round).
        neighbours: neighbours of the round; replicas of other nodes are dropped.
        like: (C,), with the dtype and the device of replicas.
        advance: returns the replica after an update, or None if the update is invalid. By default float32
            values are added.
        keep_old: whether to keep a replica after a missed update, because its sender may send the missed
            increments again. Otherwise only a keyframe helps, and the replica is dropped.
    """
    current = {j: replica for j, replica in replicas.items() if j in neighbours}
    needed = {j for j in stale_peers if j in neighbours}
    received_weights: dict[int, float] = {}
    for item in received:
        j = item.sender
        before = current.get(j)
        if before is not None and item.round <= before.round:
            continue  # already known from a keyframe
        after = _after(before, item, like, advance or _add)
        if after is None:
            if not keep_old or (before is not None and before.round == item.update.base):  # it has drifted
                current.pop(j, None)
            needed.add(j)
            continue
        current[j] = after
        needed.discard(j)
        if item.weight > 0.0:
            received_weights[j] = item.weight
    return Followed(
        {j: replica for j, replica in current.items() if j in neighbours},
        frozenset(j for j in needed if j in neighbours),
        {j: received_weights[j] for j in sorted(received_weights) if j not in needed},
    )


def _after(
    before: Replica | None,
    item: Received,
    like: Tensor,
    advance: Callable[[Tensor, Update], Tensor | None],
) -> Replica | None:
    """Return the sender's replica after ``item``, or None if it cannot be computed."""
    update = item.update
    if update.base is None:
        x_hat = None
    elif before is not None and before.round == update.base:
        x_hat = before.x_hat
    else:
        return None
    known = update.advanced_from(x_hat)
    if known is not None and known.device == like.device:
        return Replica(known, item.round)
    after = advance(torch.zeros_like(like) if x_hat is None else x_hat, update)
    if after is None or (update.check is not None and hash_of(after) != update.check):
        return None
    update.remember_advanced(x_hat, after)
    return Replica(after, item.round)


def _add(x_hat: Tensor, update: Update) -> Tensor:
    positions = update.indices()
    return added(
        x_hat,
        None if positions is None else positions.to(x_hat.device),
        update.dense_values().to(x_hat.device),
    )


def added(x_hat: Tensor, positions: Tensor | None, values: Tensor | Quantized) -> Tensor:
    """Add ``values`` (k,) at ``positions`` to ``x_hat`` (C,); all nodes use the same arithmetic."""
    change = dense_of(values)
    return x_hat + change if positions is None else x_hat.index_add(0, positions, change)


def keyframe_of(x_hat: Tensor) -> Update:
    """Return a replica (C,) as an update that stands alone, without its zeros if that is shorter."""
    nonzero = torch.nonzero(x_hat).squeeze(-1)
    sparse = 2 * len(nonzero) < len(x_hat)
    positions = nonzero if sparse else None
    values = x_hat[nonzero] if sparse else x_hat
    return Update(len(x_hat), positions, values, base=None, check=hash_of(x_hat))


def hash_of(x_hat: Tensor) -> int:
    """Return the CRC-32 of a vector's bytes, little-endian float32 or int32. It detects drift, not malice."""
    array = x_hat.detach().cpu().numpy()
    return zlib.crc32(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
