"""What a node knows of one peer, and what it keeps to tell it again."""

from __future__ import annotations

from dataclasses import dataclass, field

from jwins.engines.traffic_counter import Purpose
from jwins.wire.frame import Packed

__all__ = ["PeerSession", "BufferedFrame"]

_MAX_BUFFER_BYTES = 64 * 2**20
_MIN_BUFFERED_FRAMES = 2


@dataclass(slots=True)
class BufferedFrame:
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
class PeerSession:
    """What a node knows of one peer.

    Attributes:
        connected: a connection is open.
        active: its Hello on this connection was accepted, so that frames may be sent.
        ever_active: a Hello of it was accepted at some time.
        suspect: it is no longer waited for.
        left: it said Bye.
        incompatible: why it cannot take part, "" if it can.
        round: the highest that it spoke of.
        timed_out: rounds in a row in which it timed out.
        refused: messages of it that were not accepted.
        wants_readmission: it said Hello while it was suspect, and is not let back in yet.
        readmission_backoff: in rounds; doubles each time that its Hello alone readmits it, and is 1 again when
            a frame of it is in time.
        readmit_from: the round of this node from which on its Hello lets it back in.
        requested_from: it waits for the model of this round or a later one; None if it does not.
        provided_in: the round in which it was sent the model on this connection, or None.
        retransmit_due: it said Hello on a connection on which it was active, and is not sent frames again yet.
        retransmitted_in: the round of this node in which it was last sent frames again for that, or None.
        hello_sent_in: the round of this node in which the peer, far behind, was last told where this node is.
        joins_at: the round from which it is a member, if it came while nodes ran.
        send_buffer: frames for it by round, increasing.
        seen: (round, keyframe) of its frames that were taken in.
    """

    connected: bool = False
    active: bool = False
    ever_active: bool = False
    suspect: bool = False
    left: bool = False
    incompatible: str = ""
    round: int = 0
    timed_out: int = 0
    refused: int = 0
    wants_readmission: bool = False
    readmission_backoff: int = 1
    readmit_from: int = 0
    requested_from: int | None = None
    provided_in: int | None = None
    retransmit_due: bool = False
    retransmitted_in: int | None = None
    hello_sent_in: int | None = None
    joins_at: int | None = None
    send_buffer: dict[int, BufferedFrame] = field(default_factory=dict)
    seen: set[tuple[int, bool]] = field(default_factory=set)

    @property
    def is_awaited(self) -> bool:
        """Whether it takes part, as far as is known, and has not said that it ends.

        One with frames in its buffer was active, if not in this process.
        """
        return (self.ever_active or bool(self.send_buffer)) and not (
            self.left or self.suspect or self.incompatible
        )

    def buffer(self, round: int, frame: BufferedFrame, max_rounds: int) -> None:
        """Add a frame, and forget the oldest beyond ``max_rounds`` or beyond 64 MB; at least two are kept."""
        self.send_buffer.pop(round, None)
        self.send_buffer[round] = frame
        while len(self.send_buffer) > _MIN_BUFFERED_FRAMES and (
            len(self.send_buffer) > max_rounds
            or sum(k.packed.size_bytes for k in self.send_buffer.values()) > _MAX_BUFFER_BYTES
        ):
            del self.send_buffer[min(self.send_buffer)]

    def retransmit_from(self, round: int) -> None:
        """The peer is in this round: what is from then on is sent again, and nothing older.

        What is older stays: killed before its next checkpoint, the peer repeats rounds before this one.
        """
        for at, kept in self.send_buffer.items():
            if at < round:
                kept.sent = True
            elif kept.sent:
                kept.sent = kept.counted = False

    def unsent(self) -> list[BufferedFrame]:
        """Frames that the open connection has not taken, in order."""
        return [kept for _, kept in sorted(self.send_buffer.items()) if not kept.sent]

    def lost_connection(self) -> None:
        """The connection is gone."""
        self.connected = self.active = self.retransmit_due = False
        self.retransmitted_in = None
        self.provided_in = None  # what was under way to it is lost
