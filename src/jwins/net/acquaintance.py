"""What a node knows of one peer, and what it keeps to tell it again."""

from __future__ import annotations

from dataclasses import dataclass, field

from jwins.engines.traffic_counter import Purpose
from jwins.wire.frame import Packed

__all__ = ["Acquaintance", "Kept"]

_KEPT_BYTES = 64 * 2**20
_LEAST_KEPT = 2


@dataclass(slots=True)
class Kept:
    """A frame for a peer, which may have to be sent again.

    Attributes:
        packed: the frame.
        purpose: as in the traffic counter.
        sent: whether the connection that is open has taken it.
        counted: whether its bytes were counted; each sending counts.
    """

    packed: Packed
    purpose: Purpose
    sent: bool = False
    counted: bool = True


@dataclass(slots=True)
class Acquaintance:
    """What a node knows of one peer.

    Attributes:
        connected: a connection is open.
        met: its Hello on this connection was accepted, so that frames may be sent.
        ever_met: a Hello of it was accepted at some time.
        suspected: it is no longer waited for.
        left: it said Bye.
        unfit: why it cannot take part, "" if it can.
        round: the highest that it spoke of.
        timed_out: rounds in a row in which it timed out.
        refused: messages of it that were not accepted.
        asks_back: it said Hello while it was suspected, and is not let back in yet.
        pause: rounds between the last time that its Hello alone let it back in and the next; 1 if it was in
            time for a round since.
        back_from: the round of this node from which on its Hello lets it back in.
        requested_from: it waits for the model of this round or a later one; None if it does not.
        provided_in: the round in which it was sent the model on this connection, or None.
        asks_again: it said Hello on a connection on which it was met, and is not sent frames again yet.
        again_in: the round of this node in which it was last sent frames again for that, or None.
        told_in: the round of this node in which the peer, far behind, was last told where this node is.
        joins_at: the round from which it is a member, if it came while nodes ran.
        kept: frames for it by round, increasing.
        seen: (round, keyframe) of its frames that were taken in.
    """

    connected: bool = False
    met: bool = False
    ever_met: bool = False
    suspected: bool = False
    left: bool = False
    unfit: str = ""
    round: int = 0
    timed_out: int = 0
    refused: int = 0
    asks_back: bool = False
    pause: int = 1
    back_from: int = 0
    requested_from: int | None = None
    provided_in: int | None = None
    asks_again: bool = False
    again_in: int | None = None
    told_in: int | None = None
    joins_at: int | None = None
    kept: dict[int, Kept] = field(default_factory=dict)
    seen: set[tuple[int, bool]] = field(default_factory=set)

    @property
    def is_awaited(self) -> bool:
        """Whether it takes part, as far as is known, and has not said that it ends.

        One that there are frames for was met, if not by this process.
        """
        return (self.ever_met or bool(self.kept)) and not (self.left or self.suspected or self.unfit)

    def keep(self, round: int, kept: Kept, most: int) -> None:
        """Add a frame, and forget the oldest beyond ``most`` or beyond 64 MB; at least two are kept."""
        self.kept.pop(round, None)
        self.kept[round] = kept
        while len(self.kept) > _LEAST_KEPT and (
            len(self.kept) > most or sum(k.packed.size_bytes for k in self.kept.values()) > _KEPT_BYTES
        ):
            del self.kept[min(self.kept)]

    def again_from(self, round: int) -> None:
        """The peer is in this round: what is from then on is sent again, and nothing older.

        What is older stays: killed before its next checkpoint, the peer repeats rounds before this one.
        """
        for at, kept in self.kept.items():
            if at < round:
                kept.sent = True
            elif kept.sent:
                kept.sent = kept.counted = False

    def unsent(self) -> list[Kept]:
        """Frames that the open connection has not taken, in order."""
        return [kept for _, kept in sorted(self.kept.items()) if not kept.sent]

    def lost_connection(self) -> None:
        """The connection is gone."""
        self.connected = self.met = self.asks_again = False
        self.again_in = None
        self.provided_in = None  # what was under way to it is lost
