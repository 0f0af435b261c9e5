"""Events of a node: what its driver reports to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from jwins.wire.frame import Frame


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """Local training of ``round`` has ended; ``params`` (P,) float32 is the result.

    The node keeps the tensor, and so may its algorithm: the driver must not write into it again.
    """

    round: int
    params: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FrameReceived:
    """``frame`` arrived and was decoded."""

    frame: Frame


@dataclass(frozen=True, slots=True)
class PeerUp:
    """``peer`` is up, and takes part from ``round`` on."""

    peer: int
    round: int = 0


@dataclass(frozen=True, slots=True)
class PeerLost:
    """``peer`` is down; the node expects nothing of it until a :class:`PeerUp`."""

    peer: int


@dataclass(frozen=True, slots=True)
class KeyframeRequested:
    """A peer in ``round`` lacks the newest replica of this node; it has that of ``replica_round``, or none."""

    peer: int
    round: int = 0
    replica_round: int | None = None


@dataclass(frozen=True, slots=True)
class RosterChanged:
    """``peers`` are up, and all others are down; new ones take part from ``round`` on."""

    peers: frozenset[int]
    round: int = 0


@dataclass(frozen=True, slots=True)
class Rejoin:
    """Rejoin after a crash: continue with the state before the crash, in the others' ``round``.

    Earlier frames are dropped, and neighbours count as having lost their replica of this node. A round that was
    shared but not merged ends without received updates, as at a deadline.

    Attributes:
        round: first round in which the node takes part again.
        params: (P,) float32, another node's model to begin with; None for its own.
        keep_newer: keep frames of that round and later, which arrived since.
    """

    round: int
    params: Tensor | None = None
    keep_newer: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """Passage of time, requested by :class:`WakeAt`."""


@dataclass(frozen=True, slots=True)
class TimedOut:
    """End of waiting in ``round``: the node merges the received updates, as at a deadline."""

    round: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End after the merge that the node waits for, or at once if it waits for none."""


Event = (
    Trained
    | FrameReceived
    | PeerUp
    | PeerLost
    | KeyframeRequested
    | RosterChanged
    | Rejoin
    | Tick
    | TimedOut
    | Stop
)
