"""The real-time driver: one node of a run, driven by real time and a transport.

The same node group as under the simulated driver holds the node; here its commands are carried out for real.
Training runs on a thread of its own, so that frames are decoded and peers are answered while it lasts.

Who is there. On every connection both sides first say Hello: their round, and what must be the same on both.
A node keeps its newest frames for each neighbour, and sends those of the peer's round and later again when
the peer says Hello. So a connection that breaks, and a process that is killed and restarted from its
checkpoint within the others' timeout, lose nothing: the node repeats its rounds, gets the same frames, and
sends the same.

Who is not. A neighbour that has timed out (:class:`~jwins.net.neighbour_timeout.NeighbourTimeout`) keeps its
mixing weight with the node. One that has timed out and is not connected, or has timed out three rounds in a
row, is suspect and no longer waited for until it is heard of again; one that says Hello again and again and is
in time for no round is let back in ever more seldom. A node that finds more than half of its peers further
ahead than they keep frames for takes their round, with the parameters and the scores that it has, and says
Hello anew.

Who belongs. The roster may change while nodes run (:mod:`jwins.net.membership`): whoever was removed is cut at
once and not waited for, and whoever joins is waited for from the round on that the roster names.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jwins.engines import node_group
from jwins.engines.eval_reduce import EvalResult, average, reduce_results
from jwins.engines.node_group import (
    Envelope,
    MessageArrived,
    NodeGroup,
    NodeGroupEvent,
    ScheduledEvent,
    TrainingDone,
)
from jwins.engines.recorder import Recorder
from jwins.engines.traffic_counter import Purpose, TrafficCounter
from jwins.errors import CodecError, ConfigError, UsageError
from jwins.net.bootstrap import STATE_REQUEST, StateTransfer, mismatch, pack_state, state_wire
from jwins.net.journal import Journal
from jwins.net.membership import Change
from jwins.net.neighbour_timeout import NeighbourTimeout
from jwins.net.peer_session import BufferedFrame, PeerSession
from jwins.net.transport_interface import Connected, Disconnected, LinkEvent, MessageReceived, Transport
from jwins.net.worker import Worker
from jwins.node import (
    MAX_ROUNDS_AHEAD,
    Checkpoint,
    Command,
    Evaluate,
    Finished,
    FrameRefused,
    PeerLost,
    PeerUp,
    Rejoin,
    RequestKeyframe,
    Send,
    Tick,
    TimedOut,
    Train,
    WakeAt,
)
from jwins.run_folder.rows import EndRow, EvalRow, Row, StartRow, Traffic, TrafficSplit
from jwins.wire.frame import MAX_NAME_CHARS, MAX_VERSIONS, Bye, Frame, Hello, KeyframeRequest, Packed

__all__ = ["NodeEvaluation", "RealTimeDriver", "WallOutcome", "WallProgress", "hash_of_parameters"]

_FIRST_WORD_S = 5.0
"""A node says for whom it waits after so many seconds, and then each time that twice as many have passed."""
_SOON_S = 1.0
_MAX_POLL_S = 1.0
"""So often at least the driver asks whether it should stop and tries again to send what did not fit a queue."""


@dataclass(frozen=True, slots=True, eq=False)
class WallState:
    """The driver's part of a checkpoint."""

    now: float
    x0: bytes
    edges: Mapping[tuple[int, int], tuple[int, ...]]
    send_buffer: Mapping[int, Mapping[int, BufferedFrame]]
    suspect: frozenset[int]
    refused: Mapping[int, int]


STATE_TYPES: tuple[type, ...] = (*node_group.STATE_TYPES, BufferedFrame, WallState)


@dataclass(frozen=True, slots=True)
class WallProgress:
    """What a node tells its audience.

    Attributes:
        round: completed rounds.
        rounds: of the whole run.
        time_s: real seconds since the start of the run, without those in which the process was down.
        bytes_total: sent so far.
        waiting_for: neighbours that the node waits for now.
        waiting_s: for how long.
        connected: peers whose Hello was accepted.
        suspect: peers that are not waited for.
        row: the newest evaluation, if there is a new one.
        roster_version: of the roster by which the node mixes in this round.
    """

    round: int
    rounds: int
    time_s: float
    bytes_total: int
    waiting_for: tuple[int, ...] = ()
    waiting_s: float = 0.0
    connected: tuple[int, ...] = ()
    suspect: tuple[int, ...] = ()
    row: EvalRow | None = None
    roster_version: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class NodeEvaluation:
    """One node at an evaluation: what it takes to put the nodes' measurements together later.

    Attributes:
        node: which.
        round: completed rounds.
        time_s: when it had completed them.
        sent: bytes it had sent by then, by kind.
        samples: test samples used.
        result: what it measured.
        params: (P,) float32.
        buffers: local ones, by name.
    """

    node: int
    round: int
    time_s: float
    sent: tuple[int, ...]
    samples: int
    result: EvalResult
    params: Tensor
    buffers: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class WallOutcome:
    """How a node's run ended.

    Attributes:
        status: ``finished``, ``diverged``, ``interrupted``, or ``removed`` from the roster.
        round: completed rounds.
        rows: all rows of the node, of before an interruption, too.
        params: (P,) float32, the node's parameters.
        refused: by peer, messages that were not accepted.
        timed_out: by peer, rounds that waited for it in vain.
        traffic: bytes by directed edge.
    """

    status: str
    round: int
    rows: list[Row]
    params: Tensor
    refused: Mapping[int, int]
    timed_out: Mapping[int, int]
    traffic: list[Traffic]


@dataclass(slots=True)
class _Wait:
    """The node waits in a round."""

    round: int
    since: float
    next_word: float = _FIRST_WORD_S


def hash_of_parameters(params: Tensor) -> bytes:
    """SHA-256 of a vector's little-endian float32 bytes: by it peers know that they begin alike."""
    return hashlib.sha256(params.detach().cpu().numpy().astype("<f4", copy=False).tobytes()).digest()


class RealTimeDriver:
    """Runs one node of an experiment in real time; used once.

    Args:
        group: holds one node.
        transport: reaches the others; started and closed by the driver.
        start: the first row of the log.
        names: what the nodes are called, in the order of their numbers.
        agreed: what else peers must have in common, by name; compared in Hello.
        transfer: a neighbour's model, with which the node begins in its round; None: all begin alike.
        joins_at: the round in which the node begins, as all others did; None: the first, or ``transfer``'s.
        changes: asked after every event for changes of who takes part, given the first round that they can be
            of; see :meth:`jwins.net.membership.Membership.look`.
        timeout_s: the least time to wait for a neighbour; see
            :class:`~jwins.net.neighbour_timeout.NeighbourTimeout`.
        flush_s: for how long at most, at the end, what is queued is still sent.
        recorder: keeps what is measured; None keeps it in memory.
        on_progress: called after every event.
        on_evaluated: given each evaluation of this node as it is made.
        stop: asked after every event whether to end with a checkpoint.
        journal: told what happens.

    Raises:
        UsageError: the node group holds several nodes.
        ConfigError: the codec decodes only what its own process encoded.
    """

    def __init__(
        self,
        group: NodeGroup,
        transport: Transport,
        *,
        start: StartRow,
        names: Sequence[str] = (),
        agreed: Mapping[str, str] | None = None,
        transfer: StateTransfer | None = None,
        joins_at: int | None = None,
        changes: Callable[[int], Change | None] = lambda next_round: None,
        timeout_s: float = 30.0,
        flush_s: float = 5.0,
        recorder: Recorder | None = None,
        on_progress: Callable[[WallProgress], None] | None = None,
        on_evaluated: Callable[[NodeEvaluation], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
        journal: Journal | None = None,
    ) -> None:
        if len(group.nodes) != 1:
            raise UsageError(f"RealTimeDriver: a node group of {len(group.nodes)} nodes; expected one")
        self.rules = rules = group.rules
        if not rules.wire.codec.accepts_foreign:
            problem = "decodes only what its own process encoded; use another codec between machines"
            raise ConfigError("wire.codec", rules.wire.codec.name, problem)
        self.group, self.transport = group, transport
        (self.node,) = group.nodes
        n = rules.topology.num_nodes
        self.names = names or tuple(f"node-{i}" for i in range(n))
        self.neighbour_timeout, self._flush_s = NeighbourTimeout(timeout_s), flush_s
        self.recorder = recorder or Recorder(None)
        self.journal = journal or Journal(self.names[self.node])
        self.peers = {peer: PeerSession() for peer in range(n) if peer != self.node}
        self.timed_out = dict.fromkeys(self.peers, 0)
        self._agreed = dict(agreed or {})
        self._start, self._stop = start, stop
        self._on_progress, self._on_evaluated = on_progress, on_evaluated
        self._traffic = TrafficCounter()
        initial = group.parameters(self.node)
        self._dim = len(initial)
        self._transfer, self._joins_at = transfer, joins_at
        self._changes = changes
        self._removed = False
        self._x0 = hash_of_parameters(initial) if transfer is None else transfer.x0
        self._state_wire = state_wire(rules.wire.digest, self._dim)
        self._begun = time.monotonic()
        self._before_s = 0.0
        self._envelopes = 0
        self._training: tuple[int, Future[None]] | None = None
        self._worker = Worker("jwins-train")
        self._wait: _Wait | None = None
        self._waits: dict[int, float] = {}
        self._ticks: list[float] = []
        self._end: Finished | None = None
        self._settling = False
        self._told = 0

    @property
    def now(self) -> float:
        """Real seconds since the start of the run, without those in which the process was down."""
        return self._before_s + time.monotonic() - self._begun

    @property
    def round(self) -> int:
        """How many rounds the node has completed."""
        return self.group.round(self.node)

    @property
    def sent(self) -> TrafficSplit:
        """All that the node has sent."""
        return self._traffic.sent(self.node)

    # --- Running ------------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> WallOutcome:
        """Take part until the end, until divergence or until asked to stop.

        Args:
            resume: go on from the newest checkpoint of the recorder's folder.

        Raises:
            ResumeError: nothing to resume.
            TrainingError: local training failed.
            UsageError: the transport cannot listen.
            OSError: the log cannot be written.
        """
        farewell = "failed"
        try:
            commands = self._begin(resume)
            self.transport.start()
            self._carry_out(commands)
            while self._end is None and not self._removed and not self._stop():
                self._step()
            if self._end is None:
                farewell = "removed" if self._removed else "interrupted"
                self._settle()
            if self._end is None:
                self._save(self.round)
                return self._outcome(farewell)
            self._finish(self._end)
            self._linger()
            return self._outcome(self._end.status)
        finally:
            if self._end is None:
                self._say_bye(farewell)
            self.transport.close(self._flush_s)
            self._worker.close()
            self.recorder.close()
            self.group.close()

    def _begin(self, resume: bool) -> list[Command]:
        if resume:
            types = (*STATE_TYPES, *self.rules.sharing.state_types)
            state, held = self.recorder.resume(types)
            self.group.restore(held)
            self._restore(state)
            self.journal.info("resumed", round=self.round)
            if self.round >= self.rules.rounds:  # killed before the end was written
                return [Finished("finished", self.round)]
        else:
            self.recorder.begin(self._start)
            self.journal.info("started", rounds=self.rules.rounds, parameters=self._dim)
        commands = self.group.start(self.now)[self.node]
        begins_at = self._joins_at if self._transfer is None else self._transfer.round
        if begins_at is not None and not resume:
            first = [command for command in commands if isinstance(command, Evaluate)]
            if self._transfer is not None:
                self.group.begin_with(self.node, self._transfer.params)
            (commands,) = self.group.handle([ScheduledEvent(self.node, self.now, Rejoin(begins_at))])
            return first + commands
        return commands

    def _step(self) -> None:
        if (change := self._changes(self.round + 1)) is not None:
            self._on_change(change)
        event = self.transport.poll(self._timeout_s())
        if event is not None:
            self._on_link(event)
        if self._training is not None and self._training[1].done():
            self._on_trained()
        while self._ticks and self._ticks[0] <= self.now:
            self._ticks.pop(0)
            self._tell_node(Tick())
        for peer in self.peers:
            self._flush(peer)
        self._catch_up()
        self._look_at_the_wait()
        self._tell()

    def _timeout_s(self) -> float:
        if self._training is not None and self._training[1].done():
            return 0.0
        due = [*self._ticks[:1], self.now + _MAX_POLL_S]
        if self._wait is not None:
            since = self._wait.since
            due += [since + self.limit_s(peer) for peer in self._missing()]
            due.append(self.now + 0.1 * self.neighbour_timeout.timeout_s)
        return max(0.0, min(due) - self.now)

    # --- What nodes command -------------------------------------------------------------------------------

    def _tell_node(self, event: NodeGroupEvent) -> None:
        (commands,) = self.group.handle([ScheduledEvent(self.node, self.now, event)])
        self._carry_out(commands)

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Train(round):
                    self._on_train(round)
                case Send():
                    self._on_send(command)
                case RequestKeyframe(to, packed):
                    self._say(to, packed)
                case Evaluate(round):
                    self._measure(round)
                case Checkpoint(round):
                    self._save(round)
                case WakeAt(at):
                    self._ticks = sorted([*self._ticks, at])
                case FrameRefused(sender, round, reason):
                    self._refuse(sender, f"frame of round {round}: {reason}")
                case Finished():
                    self._end = command

    def _on_train(self, round: int) -> None:
        if self._settling:
            return  # a restart begins with it
        for peer in self.peers:
            self._do_deferred(peer, round)
        job = self._worker.submit(self.group.train, {self.node: round})
        job.add_done_callback(lambda _: self.transport.wake())
        self._training = (round, job)
        self._wait = None

    def _do_deferred(self, peer: int, round: int) -> None:
        """What a peer waits for until this round begins."""
        known = self.peers[peer]
        self._send_state(peer)
        self._retransmit(peer)
        if known.active and known.joins_at == round + MAX_ROUNDS_AHEAD:
            self._say_hello(peer)  # its first frame, which was refused if it came before, can be kept now
        if known.active and known.wants_readmission and round >= known.readmit_from:
            self._readmit_on_hello(peer, max(known.round, round))
            self._say_hello(peer)

    def _on_trained(self) -> None:
        assert self._training is not None
        (trained, job), self._training = self._training, None
        job.result()
        self._waits[trained] = self.now
        self._waits.pop(trained - MAX_ROUNDS_AHEAD, None)
        self._tell_node(TrainingDone(trained))

    def _on_send(self, command: Send) -> None:
        purpose: Purpose = "keyframe" if command.keyframe else "update"
        for peer in command.in_turn(self.node):
            self._traffic.count(self.node, (peer,), command.packed, purpose)
            most = self._buffer_rounds
            self.peers[peer].buffer(command.round, BufferedFrame(command.packed, purpose), most)
            self._flush(peer)

    @property
    def _buffer_rounds(self) -> int:
        """For how many rounds frames are kept: as far back as a checkpoint, and one more."""
        return min(max(2, self.rules.checkpoint_every + 1), MAX_ROUNDS_AHEAD)

    def _flush(self, peer: int) -> None:
        known = self.peers[peer]
        if not known.active:
            return
        for kept in known.unsent():
            if not self.transport.send(peer, kept.packed.data):
                return
            kept.sent = True
            if not kept.counted:
                kept.counted = True
                self._traffic.count(self.node, (peer,), kept.packed, kept.purpose)

    def _say(self, peer: int, packed: Packed) -> None:
        """A message about the run itself, which is not kept."""
        if self.transport.send(peer, packed.data):
            self._traffic.count(self.node, (peer,), packed, "control")

    # --- What comes from the network ----------------------------------------------------------------------

    def _on_link(self, event: LinkEvent) -> None:
        known = self.peers.get(event.peer)
        if known is None:
            self.journal.warning("stranger", peer=event.peer)
            return
        match event:
            case Connected():
                known.lost_connection()
                known.connected = True
                known.incompatible = ""  # it may have been started anew, and otherwise
                self._say_hello(event.peer)
            case Disconnected(peer, reason):
                known.lost_connection()
                if not known.left:
                    self.journal.info("disconnected", peer=self.names[peer], reason=reason)
            case MessageReceived(peer, data):
                self._on_data(peer, data)

    def _on_data(self, peer: int, data: bytes) -> None:
        self._envelopes += 1
        envelope = Envelope(self._envelopes, peer, Packed(data, 0, 0))
        try:
            message = self.group.read(envelope)
        except CodecError as error:
            self._refuse(peer, str(error))
            return
        known = self.peers[peer]
        if message.sender != peer:
            self._refuse(peer, f"speaks for node {message.sender}")
        elif isinstance(message, Hello):
            self._on_hello(peer, message)
        elif not known.active:
            self._refuse(peer, "said nothing yet that introduces it")
        elif isinstance(message, Bye):
            self._on_bye(peer, message)
        elif isinstance(message, KeyframeRequest):
            self._tell_node(MessageArrived(envelope))
        else:
            self._on_frame(peer, message, envelope)

    def _on_hello(self, peer: int, hello: Hello) -> None:
        known = self.peers[peer]
        if known.incompatible:
            return
        if problem := mismatch(hello, self._hello(), self._agreed):
            known.incompatible, known.suspect = problem, True
            self.journal.error("incompatible peer", peer=self.names[peer], problem=problem)
            self._tell_node(PeerLost(peer))
            return
        if hello.versions.get(STATE_REQUEST[0]) == STATE_REQUEST[1]:
            self._on_state_request(peer, hello.round)
            return
        known.retransmit_due = known.active
        known.active = known.ever_active = True
        known.left = False
        known.round = hello.round
        if known.retransmit_due:
            self._retransmit(peer)
        else:
            self.journal.info("active", peer=self.names[peer], round=hello.round)
            known.retransmit_from(hello.round)
        if known.suspect:
            known.wants_readmission = True
            if self.round >= known.readmit_from:
                self._readmit_on_hello(peer, hello.round)
        self._flush(peer)
        if self._end is not None:
            self._say(peer, self._bye(self._end.status))

    def _retransmit(self, peer: int) -> None:
        """To a peer that repeats its Hello, in one round once: of few bytes, it would have many sent."""
        known = self.peers[peer]
        if not known.retransmit_due or known.retransmitted_in == self.round:
            return
        known.retransmit_due, known.retransmitted_in = False, self.round
        self.journal.info("active", peer=self.names[peer], round=known.round)
        known.retransmit_from(known.round)

    def _on_state_request(self, peer: int, from_round: int) -> None:
        """A peer asks for the model of a round, or of a later one."""
        if self._end is not None:
            self._say(peer, self._bye(self._end.status))
            return
        known = self.peers[peer]
        known.requested_from = from_round
        self._send_state(peer)
        if known.requested_from is not None:
            self._say_hello(peer)  # this node is there, and not in that round yet

    def _send_state(self, peer: int) -> None:
        """To a peer that waits for it; travels in pieces between this node's own messages."""
        known = self.peers[peer]
        if known.requested_from is None or self.round < known.requested_from:
            return
        wanted, known.requested_from = known.requested_from, None  # it asks again if nothing comes
        if known.provided_in is not None and known.provided_in >= wanted:
            return  # over a slow link that model is still under way
        params = self.group.parameters(self.node)
        data = pack_state(self._state_wire, self.node, self.round, params)
        if self.transport.send(peer, data, beside=True):
            known.provided_in = self.round
            self._traffic.count(self.node, (peer,), Packed(data, 0, 0), "keyframe")
            self.journal.info("sent state", peer=self.names[peer], round=self.round)

    def _on_bye(self, peer: int, bye: Bye) -> None:
        known = self.peers[peer]
        self.journal.info("bye", peer=self.names[peer], round=bye.round, reason=bye.reason)
        known.left = known.suspect = True
        known.wants_readmission = False
        self._tell_node(PeerLost(peer))

    def _on_frame(self, peer: int, frame: Frame, envelope: Envelope) -> None:
        known, now_in = self.peers[peer], self.round
        name = (frame.round, frame.keyframe)
        if name in known.seen:
            self._refuse(peer, f"frame of round {frame.round}: came before", quietly=True)
            return
        if frame.round < now_in - MAX_ROUNDS_AHEAD:
            self._refuse(peer, f"frame of round {frame.round}: more than {MAX_ROUNDS_AHEAD} rounds old")
            if known.suspect and known.hello_sent_in != now_in:
                known.hello_sent_in = now_in
                self._say_hello(peer)  # it stood still, and does not know how far the others are
            return
        if frame.round > now_in and peer in self._missing():
            # Frames come in order: the peer went on without this node, and that of this round will not come.
            self.journal.warning("skipped", peer=self.names[peer], round=now_in, frame=frame.round)
            self._tell_node(PeerUp(peer, frame.round))
        refused = known.refused
        self._tell_node(MessageArrived(envelope))
        if known.refused != refused:
            return
        if known.suspect:
            self._readmit(peer, max(frame.round, now_in))
            self._say_hello(peer)
        known.seen = {(at, keyframe) for at, keyframe in known.seen if at >= now_in - MAX_ROUNDS_AHEAD} | {name}
        known.round = max(known.round, frame.round)
        if frame.round in self._waits or frame.round == now_in:
            self.neighbour_timeout.observe(self.now - self._waits.get(frame.round, self.now))
        if frame.round < now_in:
            rounds_late = now_in - frame.round
            self.journal.info("late", peer=self.names[peer], round=frame.round, rounds_late=rounds_late)
        else:
            known.timed_out, known.readmission_backoff, known.readmit_from = 0, 1, 0

    def _refuse(self, peer: int, reason: str, *, quietly: bool = False) -> None:
        """Count, and log ever more seldom: a peer must not fill the disk."""
        known = self.peers[peer]
        known.refused += 1
        if known.refused & (known.refused - 1) == 0:
            say = self.journal.debug if quietly else self.journal.warning
            say("refused", peer=self.names[peer], reason=reason, times=known.refused)

    def _readmit(self, peer: int, round: int) -> None:
        """A peer that was given up is back, and takes part from ``round`` on."""
        known = self.peers[peer]
        known.suspect, known.wants_readmission, known.timed_out = False, False, 0
        self.journal.info("readmitted", peer=self.names[peer], round=round)
        self._tell_node(PeerUp(peer, round))

    def _readmit_on_hello(self, peer: int, round: int) -> None:
        """Because of its Hello alone; unless it is in time for a round, the next time after a longer pause."""
        known = self.peers[peer]
        known.readmission_backoff = min(2 * known.readmission_backoff, MAX_ROUNDS_AHEAD)
        known.readmit_from = self.round + known.readmission_backoff
        self._readmit(peer, round)

    def _hello(self) -> Hello:
        codec = self.rules.wire.codec.name
        versions = _short(self._start.versions, self._agreed)
        return Hello(self.node, self.round, self._dim, codec, versions, self._x0)

    def _say_hello(self, peer: int) -> None:
        self._say(peer, self.rules.wire.pack(self._hello()))

    def _bye(self, reason: str) -> Packed:
        return self.rules.wire.pack(Bye(self.node, self.round, reason))

    def _say_bye(self, reason: str) -> None:
        packed = self._bye(reason)
        for peer, known in self.peers.items():
            if known.active:
                self._flush(peer)
                self._say(peer, packed)

    # --- Waiting ------------------------------------------------------------------------------------------

    def _missing(self) -> tuple[int, ...]:
        """For whom the node waits."""
        stalled = self.group.stalled([self.node])
        return stalled[self.node][1] if stalled else ()

    def limit_s(self, peer: int) -> float:
        """How long this neighbour is waited for now."""
        known = self.peers[peer]
        if self.round == self._joins_at or not (known.ever_active or known.joins_at is not None):
            return (
                self.neighbour_timeout.first_s
            )  # a node that joins may be there before the others are in its round
        return self.neighbour_timeout.limit_s

    def _look_at_the_wait(self) -> None:
        stalled = self.group.stalled([self.node])
        if not stalled:
            self._wait = None
            return
        at, missing = stalled[self.node]
        if self._wait is None or self._wait.round != at:
            self._wait = _Wait(at, self.now)
        waited = self.now - self._wait.since
        if all(waited >= self.limit_s(peer) for peer in missing):
            self._partial_merge(at, missing)
        elif waited >= self._wait.next_word:
            self._wait.next_word = 2 * waited
            names = [self.names[peer] for peer in missing]
            self.journal.warning("waiting", round=at, peers=names, seconds=_to_ms(waited))

    def _partial_merge(self, round: int, missing: tuple[int, ...]) -> None:
        for peer in missing:
            known = self.peers[peer]
            known.timed_out += 1
            self.timed_out[peer] += 1
            name = self.names[peer]
            self.journal.warning("timed_out", peer=name, round=round, limit_s=_to_ms(self.limit_s(peer)))
            if not known.active or known.timed_out >= self.neighbour_timeout.suspect_after:
                known.suspect = True
                self.journal.warning("suspect", peer=name, connected=known.active)
                self._tell_node(PeerLost(peer))
        self._tell_node(TimedOut(round))

    def _on_change(self, change: Change) -> None:
        """Others take part than before."""
        for peer in change.joined:
            self.peers[peer].joins_at = change.from_round
        for peer in change.removed - {self.node}:
            known = self.peers[peer]
            known.lost_connection()
            known.send_buffer.clear()
            known.left = known.suspect = True
            self._tell_node(PeerLost(peer))
        self._removed = self.node in change.removed

    def _catch_up(self) -> None:
        """Take the others' round if they no longer keep the frames of this one."""
        met = [known.round for known in self.peers.values() if known.active and not known.incompatible]
        soon_s = min(
            _SOON_S, 0.1 * self.neighbour_timeout.timeout_s
        )  # by then all who are there have said Hello
        if not met or self._wait is None or self.now - self._wait.since < soon_s:
            return
        theirs = min(statistics.median_low(met), self.rules.rounds - 1)
        if theirs <= self.round + self._buffer_rounds:
            return
        self.journal.warning("rejoining", at=self.round, others=theirs)
        for known in self.peers.values():
            known.seen.clear()
            known.send_buffer.clear()
        self._tell_node(Rejoin(theirs))
        for peer, known in self.peers.items():
            if known.active:
                known.suspect = known.wants_readmission = False
                self._tell_node(PeerUp(peer, min(known.round, theirs)))
                self._say_hello(peer)

    # --- Measuring ----------------------------------------------------------------------------------------

    def _measure(self, round: int) -> None:
        sums, buffers = self.group.sums(round)
        mean = average([sums], 1, buffers)
        at, sent = self.now, self._traffic.sent(self.node)
        result = self.group.measure(round, mean, test_average=round == 0)
        samples = self.group.num_samples(round)
        if self._on_evaluated is not None:
            columns = tuple(sent.by_kind().values())
            evaluation = NodeEvaluation(
                self.node, round, at, columns, samples, result, mean.params, buffers[self.node]
            )
            self._on_evaluated(evaluation)
        self.recorder.append(
            reduce_results([result], round=round, time_s=at, nodes=[self.node], traffic=sent, samples=samples)
        )

    def _tell(self) -> None:
        if self._on_progress is None:
            return
        row = self.recorder.newest(self._told)
        self._told = len(self.recorder.rows)
        self._on_progress(self.progress(row))

    def progress(self, row: EvalRow | None = None) -> WallProgress:
        """Where the node is; any thread may ask."""
        wait = self._wait
        return WallProgress(
            self.round,
            self.rules.rounds,
            self.now,
            self._traffic.total_bytes(),
            self._missing(),
            0.0 if wait is None else self.now - wait.since,
            tuple(peer for peer, known in self.peers.items() if known.active),
            tuple(peer for peer, known in self.peers.items() if known.suspect),
            row,
            self.rules.topology.at(self.round).roster_version,
        )

    # --- The end, and coming back -------------------------------------------------------------------------

    def _settle(self) -> None:
        """Training that is under way ends first, so that its result is in the checkpoint."""
        self._settling = True
        if self._training is not None and self._training[1].exception() is None:
            self._on_trained()

    def _save(self, round: int) -> None:
        """A checkpoint; a full disk costs the checkpoint and not the run."""
        try:
            self.recorder.save(round, self._snapshot(), [self.group.snapshot()])
        except OSError as error:
            self.journal.error("no checkpoint", round=round, problem=error.strerror or str(error))

    def _snapshot(self) -> WallState:
        return WallState(
            self.now,
            self._x0,
            self._traffic.snapshot(),
            {peer: dict(known.send_buffer) for peer, known in self.peers.items()},
            frozenset(peer for peer, known in self.peers.items() if known.suspect),
            {peer: known.refused for peer, known in self.peers.items()},
        )

    def _restore(self, state: WallState) -> None:
        self._before_s, self._begun = state.now, time.monotonic()
        self._x0 = state.x0  # a process may be made again with another model at hand
        self._traffic = TrafficCounter(state.edges)
        for peer, known in self.peers.items():
            known.send_buffer = {
                at: BufferedFrame(k.packed, k.purpose, False, True) for at, k in state.send_buffer[peer].items()
            }
            known.suspect = peer in state.suspect
            known.refused = state.refused[peer]

    def _finish(self, end: Finished) -> None:
        """The end is written before it is said: by then others may leave, and no round can be repeated."""
        bye = self._bye(end.status)
        met = [peer for peer, known in self.peers.items() if known.active]
        for peer in met:
            self._flush(peer)
            self._traffic.count(self.node, (peer,), bye, "control")
        self._write_end(end)
        for peer in met:
            self.transport.send(peer, bye.data)

    def _write_end(self, end: Finished) -> None:
        wall_s = {name: _to_ms(seconds) for name, seconds in self.group.wall_s.items()}
        row = EndRow(end.status, end.round, self.now, end.reason, "", wall_s)
        self.recorder.finish([self.group], row, self._traffic.edges())
        self.journal.info("ended", status=end.status, round=end.round, reason=end.reason)
        self._tell()

    def _linger(self) -> None:
        """Stay for peers that are behind and may have to hear this node's last frames again."""
        until = time.monotonic() + self.neighbour_timeout.timeout_s
        while not self._stop() and (left := until - time.monotonic()) > 0:
            if not any(known.is_awaited for known in self.peers.values()):
                return
            event = self.transport.poll(min(left, _MAX_POLL_S))
            if event is not None:
                self._on_link(event)

    def _outcome(self, status: str) -> WallOutcome:
        refused = {peer: known.refused for peer, known in self.peers.items()}
        params = self.group.parameters(self.node).clone()
        rows, edges = self.recorder.rows, self._traffic.edges()
        return WallOutcome(status, self.round, rows, params, refused, dict(self.timed_out), edges)


def _to_ms(seconds: float) -> float:
    """Seconds to the millisecond."""
    return round(seconds, 3)


def _short(versions: Mapping[str, Any], agreed: Mapping[str, str]) -> dict[str, str]:
    """What is agreed, and versions, as far as a Hello has room for them."""
    every = {**agreed, **{str(name): str(number) for name, number in versions.items()}}
    return {name[:MAX_NAME_CHARS]: text[:MAX_NAME_CHARS] for name, text in list(every.items())[:MAX_VERSIONS]}
