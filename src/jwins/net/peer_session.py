"""The session with one peer: its state, the table of transitions, and the frames that may be sent again.

A peer is always in one :class:`State`. Every event is a :class:`Signal`, and :data:`TRANSITIONS` has the next
state. A signal that the table does not list for a state is an error of the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from jwins.engines.traffic_counter import Purpose
from jwins.errors import UsageError
from jwins.net.early_frames import EarlyFrames
from jwins.net.neighbour_timeout import NeighbourTimeout
from jwins.wire.frame import Packed

MAX_BUFFER_BYTES = 64 * 2**20
MIN_BUFFERED_FRAMES = 2


class State(StrEnum):
    """State of the session with a peer."""

    CONNECTING = "connecting"
    """No Hello accepted since this process began. The wait is long, because people start nodes one by one."""
    ACTIVE = "active"
    """A Hello was accepted on the open connection. The node waits for the peer until its timeout."""
    BEHIND = "behind"
    """As ACTIVE, but in a round whose frames are no longer kept, so that the peer must rejoin."""
    SLOW = "slow"
    """Connected, but the peer timed out three times in a row, or returned too often. The node does not wait."""
    LOST = "lost"
    """Disconnected. The node waits for the peer until its timeout."""
    SUSPECT = "suspect"
    """Disconnected and timed out. The node does not wait for the peer."""
    INCOMPATIBLE = "incompatible"
    """Other settings, another model or another start; or cut off, because the peer inflated its values."""
    LEFT = "left"
    """The peer has sent a Bye."""
    REMOVED = "removed"
    """The peer is no longer in the roster."""


class Signal(StrEnum):
    """Event of a session."""

    HELLO = "Hello"
    HELLO_BEHIND = "Hello of a round long past"
    HELLO_AGAIN = "Hello too soon after the last readmission"
    MISMATCH = "other settings"
    ON_TIME = "frame on time"
    TIMEOUT = "timeout"
    TIMEOUTS = "third timeout in a row"
    READMITTED = "back-off over"
    DISCONNECTED = "disconnected"
    BYE = "Bye"
    REMOVED = "removed from the roster"


_ARRIVES = {
    Signal.HELLO: State.ACTIVE,
    Signal.HELLO_BEHIND: State.BEHIND,
    Signal.MISMATCH: State.INCOMPATIBLE,
    Signal.REMOVED: State.REMOVED,
}
_GOES = {
    Signal.MISMATCH: State.INCOMPATIBLE,
    Signal.BYE: State.LEFT,
    Signal.REMOVED: State.REMOVED,
}

# State -> signal -> next state. The node waits for peers in CONNECTING, ACTIVE, BEHIND and LOST. Frames go to
# those in ACTIVE, BEHIND and SLOW. In a state without a connection, DISCONNECTED is the end of a connection on
# which no Hello was accepted.
TRANSITIONS: dict[State, dict[Signal, State]] = {
    State.CONNECTING: {
        **_ARRIVES,
        Signal.TIMEOUT: State.SUSPECT,
        Signal.DISCONNECTED: State.CONNECTING,
    },
    State.ACTIVE: {
        **_GOES,
        Signal.HELLO: State.ACTIVE,
        Signal.HELLO_BEHIND: State.BEHIND,
        Signal.ON_TIME: State.ACTIVE,
        Signal.TIMEOUT: State.ACTIVE,
        Signal.TIMEOUTS: State.SLOW,
        Signal.DISCONNECTED: State.LOST,
    },
    State.BEHIND: {
        **_GOES,
        Signal.HELLO: State.ACTIVE,
        Signal.HELLO_BEHIND: State.BEHIND,
        Signal.ON_TIME: State.ACTIVE,
        Signal.TIMEOUT: State.BEHIND,
        Signal.TIMEOUTS: State.SLOW,
        Signal.DISCONNECTED: State.LOST,
    },
    State.SLOW: {
        **_GOES,
        Signal.HELLO_AGAIN: State.SLOW,
        Signal.ON_TIME: State.ACTIVE,
        Signal.READMITTED: State.ACTIVE,
        Signal.DISCONNECTED: State.SUSPECT,
    },
    State.LOST: {
        **_ARRIVES,
        Signal.TIMEOUT: State.SUSPECT,
        Signal.DISCONNECTED: State.LOST,
    },
    State.SUSPECT: {
        **_ARRIVES,
        Signal.HELLO_AGAIN: State.SLOW,
        Signal.DISCONNECTED: State.SUSPECT,
    },
    State.INCOMPATIBLE: {
        Signal.DISCONNECTED: State.SUSPECT,
        Signal.REMOVED: State.REMOVED,
    },
    State.LEFT: {
        **_ARRIVES,
        Signal.HELLO_AGAIN: State.SLOW,
        Signal.DISCONNECTED: State.LEFT,
    },
    State.REMOVED: {
        Signal.DISCONNECTED: State.REMOVED,
        Signal.REMOVED: State.REMOVED,
    },
}

AWAITED = frozenset({State.CONNECTING, State.ACTIVE, State.BEHIND, State.LOST})
"""States in which a node waits for the peer."""

INTRODUCED = frozenset({State.ACTIVE, State.BEHIND, State.SLOW})
"""States in which a Hello was accepted on the open connection, so that frames may be sent."""


@dataclass(slots=True)
class BufferedFrame:
    """A frame for a peer, which may have to be sent again.

    Attributes:
        sent: whether the open connection has taken it.
        counted: whether the bytes of this sending are counted already; every sending counts.
    """

    packed: Packed
    purpose: Purpose
    sent: bool = False
    counted: bool = True


@dataclass(slots=True)
class SendBuffer:
    """The newest frames for one peer, by round."""

    frames: dict[int, BufferedFrame] = field(default_factory=dict)

    def add(self, round: int, frame: BufferedFrame, max_rounds: int) -> None:
        """Add a frame, and forget the oldest beyond ``max_rounds`` or beyond 64 MB; at least two are kept."""
        self.frames.pop(round, None)
        self.frames[round] = frame
        size_bytes = sum(k.packed.size_bytes for k in self.frames.values())
        while len(self.frames) > MIN_BUFFERED_FRAMES and (
            len(self.frames) > max_rounds or size_bytes > MAX_BUFFER_BYTES
        ):
            size_bytes -= self.frames.pop(min(self.frames)).packed.size_bytes

    def retransmit_from(self, round: int) -> None:
        """Mark frames of ``round`` and later for retransmission.

        Older frames are kept: a peer that is killed before its next checkpoint repeats earlier rounds.
        """
        for at, frame in self.frames.items():
            if at < round:
                frame.sent = True
            elif frame.sent:
                frame.sent = frame.counted = False

    def unsent(self) -> list[tuple[int, BufferedFrame]]:
        """Return frames that the open connection has not taken, by increasing round."""
        return [(at, frame) for at, frame in sorted(self.frames.items()) if not frame.sent]


@dataclass(slots=True)
class PeerSession:
    """State of a node's session with one peer.

    Attributes:
        timeout: timeout from the response times of its frames.
        connected: whether a connection is open, introduced or not.
        ever_connected: whether its Hello was ever accepted, by this process or before its checkpoint.
        greeted: whether a Hello was accepted on the open connection.
        bye_received: whether the peer has sent a Bye on it.
        settled: whether the peer states that it has merged since it last rejoined; otherwise its round does not
            show that this node is behind.
        round: the newest round that the peer has named.
        ahead_from: the first round whose frames the peer can still send, if it is later than this node's.
        skipped_until: the round from which on the node waits for the peer again, because earlier frames cannot
            come.
        synced: whether messages arrive in the order of rounds; not between a repeated Hello and its answer.
        present_from: time since which the peer was connected without interruption, in seconds awake, or None.
        timeouts: number of rounds in a row in which the peer timed out.
        timed_out_in: the newest round of this node in which the peer timed out, or None.
        merged_in: the newest round of this node whose merge had an update of the peer; before, the round in
            which this process began, or -1.
        merged_at: when that was, on the session's clock; before, when this process or its checkpoint began.
        mismatch: why it cannot take part, or "".
        inflated: number of its frames with values that no honest node has.
        cut: why nothing is exchanged with it any more, or "".
        wants_readmission: whether it has sent a Hello or a late frame before it may be readmitted.
        backoff: rounds until its next readmission; doubles with each, and is 1 again when a frame is on time.
        readmit_from: the round of this node from which on it is readmitted.
        requested_from: the peer waits for a model of this round or a later one; None if it waits for none.
        provided_in: the round in which the peer was last sent a model, or None.
        resend_due: the first round whose frames the peer has requested again, or None.
        resent_in: the round of this node in which it was last sent frames again, or None.
        hello_due: whether a Hello could not be queued.
        hello_sent_in: the round of this node in which a peer that is far behind was last sent a Hello.
        joined_later: whether it came while nodes ran, so that it may need a model.
        joins_at: the round from which it is a member, if that was still to come when this node knew of it.
        seen: (round, keyframe) of its frames that were accepted.
        early: those of ``seen`` that are of later rounds.
        decoded_in: the round of this node in which a frame of the peer was last decoded.
        decoded: number of its frames decoded in that round: those on time, and late ones.
    """

    timeout: NeighbourTimeout
    state: State = State.CONNECTING
    connected: bool = False
    ever_connected: bool = False
    greeted: bool = False
    bye_received: bool = False
    settled: bool = True
    round: int = 0
    ahead_from: int | None = None
    skipped_until: int = 0
    synced: bool = True
    present_from: float | None = None
    timeouts: int = 0
    timed_out_in: int | None = None
    merged_in: int = -1
    merged_at: float = 0.0
    timed_out: int = 0
    refused: int = 0
    mismatch: str = ""
    inflated: int = 0
    cut: str = ""
    wants_readmission: bool = False
    backoff: int = 1
    readmit_from: int = 0
    requested_from: int | None = None
    provided_in: int | None = None
    resend_due: int | None = None
    resent_in: int | None = None
    hello_due: bool = False
    hello_sent_in: int | None = None
    joined_later: bool = False
    joins_at: int | None = None
    buffer: SendBuffer = field(default_factory=SendBuffer)
    seen: set[tuple[int, bool]] = field(default_factory=set)
    early: EarlyFrames = field(default_factory=EarlyFrames)
    decoded_in: int = -1
    decoded: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def is_awaited(self) -> bool:
        """Return whether the node waits for the peer."""
        return self.state in AWAITED

    @property
    def is_introduced(self) -> bool:
        """Return whether frames may be sent to it."""
        return self.state in INTRODUCED

    @property
    def may_come_back(self) -> bool:
        """Return whether it may still take part and need this node's frames."""
        return self.state in (State.ACTIVE, State.BEHIND, State.LOST) or (
            self.state is State.CONNECTING and bool(self.buffer.frames)
        )

    def apply(self, signal: Signal) -> bool:
        """Go to the next state; return whether the node starts or stops waiting for the peer.

        Raises:
            UsageError: the table has no such signal in this state.
        """
        before = self.is_awaited
        next_state = TRANSITIONS[self.state].get(signal)
        if next_state is None:
            raise UsageError(f"peer session: {signal.name} while {self.state.value}")
        self.state = next_state
        return before != self.is_awaited

    def opened(self) -> None:
        """Record a new connection, on which no message has arrived yet."""
        self.connected, self.greeted, self.bye_received, self.synced = True, False, False, True
        self.ahead_from, self.mismatch = None, ""

    def lost(self) -> None:
        """Record the loss of the connection."""
        self.connected = self.greeted = self.wants_readmission = self.hello_due = False
        self.ahead_from, self.present_from, self.resend_due, self.resent_in = None, None, None, None
        self.requested_from = None
        self.synced = True
