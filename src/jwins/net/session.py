"""Session of one node with its peers, a state machine without I/O: events in, commands out, ``now`` passed in.

A driver (:mod:`jwins.net.driver` in real time, ``tests/net/world.py`` in simulated time) delivers events of
connections, training and the roster, calls again at :attr:`Session.wait_until` at the latest, and
carries out the commands in order. The session reads no clock, opens no connection and starts no thread.

It drives one :class:`~jwins.node.Node`, which handles rounds and models, and adds the state of the peers:

- On every connection both sides first send a Hello with their round, and with the round from which they need
  frames. The newest frames are kept for each peer and sent again from that round, so that a broken connection,
  or a process that is restarted within the others' timeout, loses nothing. See ``outbox.py`` and
  ``arrivals.py``.
- :data:`~jwins.net.peer_session.TRANSITIONS` decides for which peers the node waits. The mixing weight of a
  neighbour that times out stays with the node, and the merge is partial. See ``waiting.py``.
- Frames of one connection come in the order of rounds. When most of the expected neighbours send frames of
  later rounds only, this node is behind: it takes their round, and a node that has never merged takes a model
  from one of them, too. See ``bootstrap.py``. If too few neighbours are ahead, the node asks them for signed
  rounds of other members. See ``witnesses.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from jwins.engines.traffic_counter import TrafficCounter
from jwins.net import events as ev
from jwins.net.arrivals import Arrivals
from jwins.net.bootstrap import Joiner, Provider
from jwins.net.early_frames import EarlyFrames
from jwins.net.handshake import Handshake
from jwins.net.log_limits import LogLimits
from jwins.net.membership import Change
from jwins.net.neighbour_timeout import MAX_STEP_S, AwakeClock, NeighbourTimeout
from jwins.net.outbox import Outbox
from jwins.net.peer_session import TRANSITIONS, BufferedFrame, PeerSession, Signal, State
from jwins.net.rounds import Rounds
from jwins.net.waiting import Waiting
from jwins.net.witnesses import Signatures, Witnesses
from jwins.node import (
    MAX_ROUNDS_AHEAD,
    Evaluate,
    Finished,
    PeerLost,
    PeerUp,
    Rejoin,
    Rules,
)
from jwins.wire.frame import Bye, FrameHeader, Message


class NodeHandle(Protocol):
    """The node that a session drives."""

    @property
    def id(self) -> int:
        """Return the node's number."""

    @property
    def rules(self) -> Rules:
        """Return the rules, which all nodes of the run share."""

    @property
    def round(self) -> int:
        """Return the number of completed rounds."""

    @property
    def waiting_for(self) -> tuple[int, ...] | None:
        """Return the neighbours whose frame of this round is missing; None while the node does not wait."""

    @property
    def awaited(self) -> tuple[int, ...]:
        """Return the neighbours whose frame of this round is missing, even before the node waits."""

    @property
    def merged_with(self) -> tuple[int, ...]:
        """Return the neighbours that had a weight in the newest merge."""

    @property
    def params(self) -> Tensor:
        """Return the parameters, (P,) float32, on the CPU."""

    def start(self, now: float) -> list[Any]:
        """Begin the node's current round."""

    def handle(self, event: Any, now: float) -> list[Any]:
        """Deliver an event to the node, and return its commands."""

    def objection(self, frame: FrameHeader) -> str | None:
        """Return why the node cannot take a frame, by its header, or None."""

    def max_frames(self, frame: FrameHeader) -> int:
        """Return the largest number of frames like this one that may wait."""

    def read(self, peer: int, data: bytes) -> tuple[Message, Any]:
        """Decode a message, and make the event that delivers it to the node.

        Raises:
            CodecError: it is not a message of this experiment.
            MemoryError: there is too little memory; torch raises a RuntimeError.
        """


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Settings of a session.

    Attributes:
        timeout_s: minimum time to wait for a neighbour.
        handshake: this node's settings, to be compared with the peers'.
        joins_at: the round in which the node begins, if others began before it; None for the first round.
        bootstrap_from: members to request a model from, in this order.
        from_round: earliest round of that model.
        may_provide: returns whether a peer may have this node's model; None permits neighbours and joiners.
        max_step_s: a longer time between two events counts as a standstill of this process.
        cut: why earlier processes cut peers off, by peer.
        signatures: signs and verifies rounds; None, and this node neither gives nor uses signed rounds.
    """

    timeout_s: float
    handshake: Handshake
    joins_at: int | None = None
    bootstrap_from: tuple[int, ...] = ()
    from_round: int = 0
    may_provide: Callable[[int], bool] | None = None
    max_step_s: float = MAX_STEP_S
    cut: Mapping[int, str] = field(default_factory=dict)
    signatures: Signatures | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SessionState:
    """State of a session in a checkpoint.

    Attributes:
        now: real seconds since the start of the run.
        x0: hash of the initial parameters.
        edges: bytes by kind of each directed edge.
        send_buffer: frames by peer and round.
        suspect: peers for which the node did not wait.
        refused: number of messages that were not accepted, by peer.
        ever_connected: peers whose Hello was accepted at some time.
        skipped_rounds: rounds in which the node did not take part.
        fresh: whether the node had not merged with any peer yet.
        round_s: duration of a round.
        saved_at: Unix time, from which the possible progress of others is estimated.
        left: those of ``suspect`` that had said Bye; as this node begins again, they may, too.
        merged: the round of the last merge with each peer, and the seconds since.
    """

    now: float
    x0: bytes
    edges: Mapping[tuple[int, int], tuple[int, ...]]
    send_buffer: Mapping[int, Mapping[int, BufferedFrame]]
    suspect: frozenset[int]
    refused: Mapping[int, int]
    ever_connected: frozenset[int] = frozenset()
    skipped_rounds: int = 0
    fresh: bool = False
    round_s: float = 0.0
    saved_at: float = 0.0
    left: frozenset[int] = frozenset()
    merged: Mapping[int, tuple[int, float]] = field(default_factory=dict)


class Session:
    """The protocol of one node with all of its peers.

    Args:
        node: the node.
        settings: see :class:`SessionSettings`.
        now: seconds on any clock that does not go backwards.

    Attributes:
        peers: by number.
        traffic: bytes sent.
        wait_until: latest time of the next call of :meth:`handle`, on the clock of ``now``.
        end: the node's end, or None.
        rounds: results of the newest rounds.
        waiting: the neighbours that the node waits for, and since when.
        outbox, arrivals: sending, and handling of received messages.
        witnesses: signed rounds of other members.
        joiner: asks for a model, or None.
        fresh: whether the node has not merged with any peer yet.
        settled: whether it has merged since it last took over the round of others.
        skipped_rounds: rounds in which the node did not take part because it was behind.
    """

    def __init__(self, node: NodeHandle, settings: SessionSettings, now: float) -> None:
        self.node, self.settings = node, settings
        count = node.rules.topology.num_nodes
        self.peers = {
            peer: PeerSession(NeighbourTimeout(settings.timeout_s), merged_at=now)
            for peer in range(count)
            if peer != node.id
        }
        self.traffic = TrafficCounter()
        self.handshake = settings.handshake
        self.end: Finished | None = None
        self.skipped_rounds = 0
        self.received_bytes = 0
        self.fresh = True
        self.settled = True
        self.wait_until = float("inf")
        self.now = now
        self._awake = AwakeClock(now, settings.max_step_s)
        self._limits = LogLimits()
        self.training = False
        self.leaving = False
        self.out: list[ev.Command] = []
        self.joiner: Joiner | None = None
        self._may_return: frozenset[int] = frozenset()
        self.outbox, self.arrivals = Outbox(self), Arrivals(self)
        self.waiting, self.rounds = Waiting(self), Rounds(self)
        self.provider, self.witnesses = Provider(self), Witnesses(self, settings.signatures)
        if settings.bootstrap_from:
            self.joiner = Joiner(self, settings.bootstrap_from, settings.from_round, shown=None)

    def start(self, now: float, *, resumed: bool = False) -> list[ev.Command]:
        """Begin the first round, or continue the round that the node was restored to."""
        self._advance(now)
        if resumed and self.node.round >= self.node.rules.rounds:  # killed before the end was written
            self.rounds.finish(Finished("finished", self.node.round))
        elif self.joiner is None:
            self.begin(None if resumed else self.settings.joins_at)
            for peer in sorted(self._may_return):
                self.rounds.deliver(PeerUp(peer, self.node.round))
        for peer, reason in self.settings.cut.items():
            self.cut(peer, reason)
        return self._taken()

    def begin(self, at: int | None = None, params: Tensor | None = None) -> None:
        """Begin in round ``at``, or in the node's own, with a received model or the node's own."""
        commands = self.node.start(self.now)
        if at is not None:
            self.began_in(at)
            commands = [c for c in commands if isinstance(c, Evaluate)]
            commands += self.node.handle(Rejoin(at, params=params, keep_newer=True), self.now)
        self.rounds.carry_out(commands)

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """Handle an event.

        Args:
            event: the event.
            now: seconds, on the clock of the constructor.

        Returns:
            Commands, to be carried out in this order.
        """
        self._advance(now)
        match event:
            case ev.Connected(peer, greeting) if peer in self.peers:
                self.arrivals.on_connected(peer, greeting)
            case ev.Disconnected(peer, reason) if peer in self.peers:
                self.arrivals.on_disconnected(peer, reason)
            case ev.MessageReceived(peer, data) if peer in self.peers:
                self.arrivals.on_message(peer, data)
            case ev.KeyUsedElsewhere(peer, detail):
                self.log("error", "key in use", peer=peer, detail=detail)
            case ev.TrainingDone(round):
                self.rounds.on_trained(round)
            case ev.NotQueued(peer, label, round):
                self.outbox.on_not_queued(peer, label, round)
            case ev.MembersChanged(change):
                self._on_roster(change)
            case ev.TimePassed():
                for peer in self.peers:
                    self.outbox.flush(peer)
            case _:
                self.log("warning", "stranger", peer=getattr(event, "peer", None))
        self.waiting.review()
        return self._taken()

    def _advance(self, now: float) -> None:
        self.now = now
        self._awake.at(now)

    @property
    def awake(self) -> float:
        """Return the seconds for which this process was awake."""
        return self._awake.seconds

    def _taken(self) -> list[ev.Command]:
        out, self.out = self.out, []
        self.wait_until = self.waiting.next_time()
        return out

    @property
    def missing(self) -> tuple[int, ...]:
        """Return the peers that the node waits for."""
        return () if self.holds else self.node.waiting_for or ()

    @property
    def has_begun(self) -> bool:
        """Return whether the node has begun; False while it waits for its first model."""
        return self.joiner is None or not self.joiner.at_start

    @property
    def holds(self) -> bool:
        """Return whether the node waits for a model."""
        return self.joiner is not None

    @property
    def keeps(self) -> int:
        """Return the number of rounds for which frames are kept: back to a checkpoint, and one more."""
        return min(max(2, self.node.rules.checkpoint_every + 1), MAX_ROUNDS_AHEAD)

    def snapshot(self, now_s: float, saved_at: float = 0.0) -> SessionState:
        """Return the state for :meth:`restore`; ``now_s`` are real seconds since the start of the run."""
        every = self.peers.items()
        return SessionState(
            now_s,
            self.handshake.x0,
            self.traffic.snapshot(),
            {peer: dict(known.buffer.frames) for peer, known in every},
            frozenset(peer for peer, known in every if not known.is_awaited),
            {peer: known.refused for peer, known in every},
            frozenset(peer for peer, known in every if known.ever_connected),
            self.skipped_rounds,
            self.fresh,
            self.rounds.times.round_s,
            saved_at,
            frozenset(peer for peer, known in every if known.state is State.LEFT),
            {peer: (known.merged_in, self.now - known.merged_at) for peer, known in every},
        )

    def restore(self, state: SessionState, down_s: float = 0.0) -> None:
        """Continue from a checkpoint, after a time of ``down_s``. Call it before :meth:`start`."""
        self.rounds.times.round_s = state.round_s
        self.rounds.merged_at -= down_s
        # A restarted process may have another model.
        self.handshake = self.handshake.with_x0(state.x0)
        self.traffic = TrafficCounter(state.edges)
        self.skipped_rounds, self.fresh = state.skipped_rounds, state.fresh
        self.joiner = None
        for peer, known in self.peers.items():
            frames = state.send_buffer[peer].items()
            known.buffer.frames = {
                at: BufferedFrame(f.packed, f.purpose, False, f.counted and not f.sent) for at, f in frames
            }
            known.refused = state.refused[peer]
            known.merged_in, since_s = state.merged.get(peer, (self.node.round, 0.0))
            known.merged_at -= since_s + down_s
            known.ever_connected = peer in state.ever_connected
            if peer in state.suspect - state.left:
                known.state = State.SUSPECT
        self._may_return = state.left

    def began_in(self, round: int) -> None:
        """Count the rounds that peers can have reached from the one in which this node began."""
        for known in self.peers.values():
            known.merged_in = round

    def leave(self, reason: str, now: float) -> list[ev.Command]:
        """Send a Bye to all peers, and begin nothing more."""
        self._advance(now)
        self.leaving = True
        packed = self.node.rules.wire.pack(Bye(self.node.id, self.node.round, reason[:200]))
        for peer, known in self.peers.items():
            if known.is_introduced:
                self.outbox.flush(peer)
                self.outbox.transmit(peer, packed, "control")
        return self._taken()

    def stop_training(self) -> None:
        """Begin no more training, because the node will be saved."""
        self.leaving = True

    def _on_roster(self, change: Change) -> None:
        """Handle changed members."""
        for peer in change.joined - {self.node.id}:
            self.peers[peer].joined_later = True
            if change.from_round > self.node.round:
                self.peers[peer].joins_at = change.from_round
        for peer in change.removed - {self.node.id}:
            known = self.peers[peer]
            known.lost()
            known.connected = False
            known.buffer.frames.clear()
            known.early = EarlyFrames()
            self.apply(peer, Signal.REMOVED)

    def apply(self, peer: int, signal: Signal) -> None:
        """Change a peer's state, and tell the node whether to wait for it."""
        known = self.peers[peer]
        if not known.apply(signal):
            return
        if known.is_awaited:
            known.skipped_until = 0
            self.rounds.deliver(PeerUp(peer, self.node.round))
        else:
            self.rounds.deliver(PeerLost(peer))

    def refuse(self, peer: int, reason: str, *, quietly: bool = False) -> None:
        """Count a message that is not accepted."""
        known = self.peers[peer]
        known.refused += 1
        self.log("debug" if quietly else "warning", "refused", peer=peer, reason=reason, times=known.refused)

    def cut(self, peer: int, reason: str) -> None:
        """Exchange nothing more with a peer."""
        known = self.peers[peer]
        known.cut = known.mismatch = reason
        known.early = EarlyFrames()
        self.log("error", "cut", peer=peer, reason=reason)
        self.out.append(ev.KeepCut(peer, reason))
        if Signal.MISMATCH in TRANSITIONS[known.state]:
            self.apply(peer, Signal.MISMATCH)

    def log(self, level: str, event: str, **fields: Any) -> None:
        """Log an event, unless the same event of the same peer was logged too often recently."""
        if (suppressed := self._limits.take(event, fields.get("peer"), self.now)) is None:
            return
        if suppressed:
            fields["suppressed"] = suppressed
        self.out.append(ev.LogLine(level, event, fields))
