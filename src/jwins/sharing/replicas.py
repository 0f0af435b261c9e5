"""Replicas: what a node holds of its neighbours, followed from one of their updates to the next.

A node whose updates are increments has a replica of itself, and each neighbour that receives every update has
the same one, bit for bit. One that missed an update has a wrong replica from then on. So an update names the
round it builds upon (``Update.base``) and a hash of the replica it leads to (``Update.check``); where either
does not fit, the sender is one of ``stale_peers``, and its keyframe is asked for: the whole replica, which
stands alone. Replicas cost degree * C * 4 bytes of memory per node, be they float32 or the integers of
:mod:`jwins.sharing.step_grid`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jwins.sharing.update import Quantized, Received, Update, dense_of

__all__ = ["Followed", "Replica", "added", "follow", "hash_of", "keyframe_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """Replica of another node.

    Attributes:
        x_hat: (C,) float32, or int32 steps of a grid.
        round: of the other's update that it is right after.
    """

    x_hat: Tensor
    round: int


@dataclass(frozen=True, slots=True, eq=False)
class Followed:
    """Replicas of the neighbours after a round.

    Attributes:
        replicas: by node; those of neighbours of the round only. One of a neighbour in ``stale_peers`` is
            right, but older than the neighbour's last update.
        stale_peers: neighbours of whom updates were missed, or who must send their keyframe.
        received_weights: mixing weights of the neighbours whose update came in this round and whose replica is
            right, by node in increasing order.
    """

    replicas: Mapping[int, Replica]
    stale_peers: frozenset[int]
    received_weights: Mapping[int, float] = field(default_factory=dict)


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
    """Brings replicas up to date with what was received.

    Args:
        replicas: by node, before the round.
        stale_peers: nodes whose keyframe was needed before the round.
        received: every update since the last merge, late ones too, sorted by (sender, round).
        neighbours: of the round; everyone else is forgotten.
        like: (C,), of the kind and on the device that replicas are.
        advance: from a replica and an update to the replica afterwards, or None if the update cannot be one;
            left out: float32 values are added.
        keep_old: whether a replica whose sender's later update was missed is kept, because its sender may send
            what was missed again; otherwise only a keyframe helps, and the replica is dropped.
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
    """The sender's replica after ``item``, or None if it cannot be known."""
    update = item.update
    if update.base is None:
        x_hat = torch.zeros_like(like)
    elif before is not None and before.round == update.base:
        x_hat = before.x_hat
    else:
        return None
    after = advance(x_hat, update)
    if after is None or (update.check is not None and hash_of(after) != update.check):
        return None
    return Replica(after, item.round)


def _add(x_hat: Tensor, update: Update) -> Tensor:
    positions = update.indices()
    return added(
        x_hat,
        None if positions is None else positions.to(x_hat.device),
        update.dense_values().to(x_hat.device),
    )


def added(x_hat: Tensor, positions: Tensor | None, values: Tensor | Quantized) -> Tensor:
    """``x_hat`` (C,) plus ``values`` (k,) at ``positions``; the same arithmetic at sender and receivers."""
    change = dense_of(values)
    return x_hat + change if positions is None else x_hat.index_add(0, positions, change)


def keyframe_of(x_hat: Tensor) -> Update:
    """A replica (C,) as an update that stands alone, without its zeros where that is shorter."""
    nonzero = torch.nonzero(x_hat).squeeze(-1)
    sparse = 2 * len(nonzero) < len(x_hat)
    positions = nonzero if sparse else None
    values = x_hat[nonzero] if sparse else x_hat
    return Update(len(x_hat), positions, values, base=None, check=hash_of(x_hat))


def hash_of(x_hat: Tensor) -> int:
    """CRC-32 of a vector's bytes, little-endian float32 or int32: finds drift, not malice."""
    array = x_hat.detach().cpu().numpy()
    return zlib.crc32(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
