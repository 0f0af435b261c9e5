"""The real-time driver: one node of a run, driven by real time and a transport.

The loop is in :meth:`RealTimeDriver._step`: wait for the transport, pass its events to the
:class:`~jwins.net.session.Session`, and carry out its commands. The session makes all decisions. Training
runs on a separate thread, so that frames are decoded and peers are answered meanwhile.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from torch import Tensor

from jwins.engines import node_group
from jwins.engines.evaluation_results import EvalResult, average, reduce_results
from jwins.engines.memory import ExchangeMemory, memory_free
from jwins.engines.node_group import NodeGroup
from jwins.engines.recorder import Recorder
from jwins.errors import ConfigError, PeerError, UsageError
from jwins.net import events as ev
from jwins.net.cuts import Cuts
from jwins.net.external_training import WithdrawnError
from jwins.net.handshake import Handshake, hash_of_parameters
from jwins.net.hosted_node import HostedNode
from jwins.net.journal import Journal
from jwins.net.membership import Change
from jwins.net.neighbour_timeout import DEFAULT_TIMEOUT_S
from jwins.net.peer_session import BufferedFrame, PeerSession
from jwins.net.session import Session, SessionSettings, SessionState
from jwins.net.transport_interface import Transport
from jwins.net.witnesses import Signatures
from jwins.net.worker import Worker
from jwins.node import Finished
from jwins.run_folder.rows import EndRow, EvalRow, Row, StartRow, Traffic, TrafficSplit

MAX_POLL_S = 1.0
"""Longest wait for the transport; then the driver checks whether to stop, and tries again to send."""

SETTLE_S = 30.0
"""Time limit for running training when the driver must stop."""

STATE_TYPES: tuple[type, ...] = (*node_group.STATE_TYPES, BufferedFrame, SessionState)


@dataclass(frozen=True, slots=True)
class NodeProgress:
    """Progress of a node.

    Attributes:
        round: completed rounds.
        rounds: rounds of the whole run.
        time_s: real seconds since the start of the run, without those in which the process was down.
        bytes_total: sent so far.
        waiting_for: neighbours that the node waits for now.
        waiting_s: seconds of waiting.
        connected: peers whose Hello was accepted.
        suspect: peers that the node does not wait for.
        row: the newest evaluation, if there is a new one.
        roster_version: version of the roster whose graph the node uses in this round.
        skipped_rounds: number of rounds in which the node took no part, because it was behind.
        received_bytes: bytes of all received messages so far, in this process.
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
    skipped_rounds: int = 0
    received_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class NodeEvaluation:
    """Measurements of one node at an evaluation, to be combined with other nodes' later.

    Attributes:
        node: number of the node.
        round: completed rounds.
        time_s: time at which it had completed them.
        sent: bytes sent by then, by kind.
        samples: test samples used.
        result: its measurements.
        params: (P,) float32.
        buffers: local buffers by name.
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
class NodeOutcome:
    """End of a node's run.

    Attributes:
        status: ``finished``, ``diverged``, ``interrupted``, or ``removed`` from the roster.
        round: completed rounds.
        rows: all rows of the node, including those before an interruption.
        params: (P,) float32, the node's parameters.
        refused: number of messages that were not accepted, by peer.
        timed_out: number of rounds in which the peer timed out, by peer.
        traffic: bytes by directed edge.
        skipped_rounds: number of rounds in which the node took no part, because it was behind.
    """

    status: str
    round: int
    rows: list[Row]
    params: Tensor
    refused: Mapping[int, int]
    timed_out: Mapping[int, int]
    traffic: list[Traffic]
    skipped_rounds: int = 0


class RealTimeDriver:
    """Driver of one node of an experiment in real time. Use it once.

    Args:
        group: node group with this node only.
        transport: transport to the others; the driver starts and closes it.
        start: the first row of the log.
        names: names of the nodes, in the order of their numbers.
        agreed: further settings that peers must share, by name; compared in Hello.
        greeting: the transport's greeting to every member; compared when a connection opens.
        x0: the node's identification of its initial parameters; None for their hash.
        bootstrap_from: members that provide the initial model, in the order in which they are asked; empty to
            begin with the node's own model.
        joins_at: first round of a node that joins later; None for a node that takes part from the beginning.
        changes: called after every event with the first round that can still change; returns a change of the
            members, or None; see :meth:`jwins.net.membership.Membership.look`.
        timeout_s: the minimum wait for a neighbour; see
            :class:`~jwins.net.neighbour_timeout.NeighbourTimeout`.
        flush_s: time limit at the end for sending queued messages.
        recorder: recorder of the measurements; None keeps them in memory.
        on_progress: called after every event.
        on_evaluated: called with each evaluation of this node.
        stop: called after every event; True ends the run with a checkpoint.
        farewell: returns the reason of the stop, for the Bye.
        journal: receiver of log lines.

    Raises:
        UsageError: the node group holds several nodes.
        ConfigError: the codec decodes only bytes that its own process encoded.
    """

    def __init__(
        self,
        group: NodeGroup,
        transport: Transport,
        *,
        start: StartRow,
        names: Sequence[str] = (),
        agreed: Mapping[str, str] | None = None,
        greeting: bytes = b"",
        x0: bytes | None = None,
        bootstrap_from: Sequence[int] = (),
        joins_at: int | None = None,
        changes: Callable[[int], Change | None] = lambda next_round: None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        flush_s: float = 5.0,
        recorder: Recorder | None = None,
        on_progress: Callable[[NodeProgress], None] | None = None,
        on_evaluated: Callable[[NodeEvaluation], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
        farewell: Callable[[], str] = lambda: "interrupted",
        journal: Journal | None = None,
        signatures: Signatures | None = None,
    ) -> None:
        if len(group.nodes) != 1:
            raise UsageError(f"RealTimeDriver: a node group of {len(group.nodes)} nodes; expected one")
        self.rules = rules = group.rules
        if not rules.wire.codec.accepts_foreign:
            problem = "decodes only frames of its own process; use another codec between machines"
            raise ConfigError("wire.codec", rules.wire.codec.name, problem)
        self.group, self.transport = group, transport
        (self.node,) = group.nodes
        self.names = names or tuple(f"node-{i}" for i in range(rules.topology.num_nodes))
        self.recorder = recorder or Recorder(None)
        self.journal = journal or Journal(self.names[self.node])
        initial = group.parameters(self.node)
        handshake = Handshake(
            len(initial),
            rules.wire.codec.name,
            hash_of_parameters(initial) if x0 is None else x0,
            dict(start.versions),
            dict(agreed or {}),
            greeting,
        )
        self._cuts = Cuts(self.recorder.folder)
        settings = SessionSettings(
            timeout_s,
            handshake,
            joins_at,
            tuple(bootstrap_from),
            joins_at or 0,
            cut=self._cuts.of(self.names),
            signatures=signatures,
        )
        self.session = Session(HostedNode(group), settings, _now())
        self._start, self._stop, self._farewell = start, stop, farewell
        self._flush_s, self._changes = flush_s, changes
        self._on_progress, self._on_evaluated = on_progress, on_evaluated
        self._removed, self._failure = False, ""
        self._begun, self._before_s, self._ticked = time.monotonic(), 0.0, 0.0
        self._training: tuple[int, Future[None]] | None = None
        self._worker = Worker("jwins-train")
        self._rows_reported = 0

    # --- Looked at from other threads ---------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Return real seconds since the start of the run, without those in which the process was down."""
        return self._before_s + time.monotonic() - self._begun

    @property
    def round(self) -> int:
        """Return the number of rounds that the node has completed."""
        return self.group.round(self.node)

    @property
    def peers(self) -> Mapping[int, PeerSession]:
        """Return the session with each peer, by number."""
        return self.session.peers

    @property
    def timed_out(self) -> dict[int, int]:
        """Return the number of rounds in which each peer timed out."""
        return {peer: known.timed_out for peer, known in self.peers.items()}

    @property
    def sent(self) -> TrafficSplit:
        """Return all bytes that the node has sent."""
        return self.session.traffic.sent(self.node)

    def progress(self, row: EvalRow | None = None) -> NodeProgress:
        """Return the progress of the node."""
        session, peers = self.session, self.peers.items()
        return NodeProgress(
            self.round,
            self.rules.rounds,
            self.now,
            session.traffic.total_bytes(),
            session.missing,
            session.waiting.waited_s,
            tuple(peer for peer, known in peers if known.is_introduced),
            tuple(peer for peer, known in peers if not known.is_awaited),
            row,
            self.rules.topology.at(self.round).roster_version,
            session.skipped_rounds,
            session.received_bytes,
        )

    # --- Running ------------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> NodeOutcome:
        """Run the node until the end, divergence or a request to stop.

        Args:
            resume: continue from the newest checkpoint of the recorder's folder.

        Raises:
            ResumeError: nothing to resume.
            TrainingError: local training failed.
            PeerError: no member sent the model that the node needs.
            UsageError: the transport cannot listen.
            OSError: the log cannot be written.
        """
        farewell = "failed"
        try:
            commands = self._begin(resume)
            self.transport.start()
            self._carry_out(commands)
            while not self._is_over():
                self._step()
            if self._failure:
                raise PeerError(self._failure)
            if (end := self.session.end) is not None:
                self._linger()
                return self._outcome(end.status)
            farewell = "removed" if self._removed else self._farewell()
            if self.session.has_begun and self._settle():
                self._save(self.round)
            return self._outcome("removed" if self._removed else "interrupted")
        finally:
            if self.session.end is None:
                self._carry_out(self.session.leave(farewell, _now()))
            self.transport.close(self._flush_s)
            self._worker.close(wait=self._training is None or self._training[1].done())
            self.recorder.close()
            self.group.close()

    def _is_over(self) -> bool:
        return bool(self.session.end is not None or self._removed or self._failure or self._stop())

    def _begin(self, resume: bool) -> list[ev.Command]:
        if resume:
            types = (*STATE_TYPES, *self.rules.sharing.state_types)
            state, held = self.recorder.resume(types)
            self.group.restore(held)
            self._before_s, self._begun = state.now, time.monotonic()
            self.session.restore(state, max(0.0, time.time() - state.saved_at))
            self.journal.info("resumed", round=self.round)
        else:
            self.recorder.begin(self._start)
            dim = self.session.handshake.dim
            self.journal.info("started", rounds=self.rules.rounds, parameters=dim)
        self._state_memory()
        return self.session.start(_now(), resumed=resume)

    def _state_memory(self) -> None:
        """Log the memory that the exchange will take, and warn if it is not free."""
        dim, at = self.session.handshake.dim, max(self.round, self.session.settings.joins_at or 0)
        needed = ExchangeMemory.of(self.rules.sharing, dim, len(self.rules.topology.at(at).senders[self.node]))
        free = memory_free()
        fields = {"exchange": str(needed)} | ({} if free is None else {"free": f"{free / 1e6:,.1f} MB"})
        self.journal.info("memory", **fields)
        if free is not None and free < needed.steady_bytes + needed.peak_bytes:
            self.journal.warning("memory may not suffice", **fields)

    def _step(self) -> None:
        if (change := self._changes(self.round + 1)) is not None:
            self._removed = self.node in change.removed
            self._deliver(ev.MembersChanged(change))
        due = min(self.session.wait_until, _now() + MAX_POLL_S)
        trained = self._training is not None and self._training[1].done()
        event = self.transport.poll(0.0 if trained else max(0.0, due - _now()))
        if event is not None:
            self._deliver(event)
        if self._training is not None and self._training[1].done():
            self._on_trained()
        now = _now()
        if now >= min(self.session.wait_until, self._ticked + MAX_POLL_S):
            self._ticked = now
            self._deliver(ev.TimePassed())
        self._report_progress()

    def _deliver(self, event: ev.Event) -> None:
        self._carry_out(self.session.handle(event, _now()))

    def _carry_out(self, commands: list[ev.Command]) -> None:
        for command in commands:
            match command:
                case ev.Transmit(peer, data, label, round, beside):
                    if not self.transport.send(peer, data, beside=beside):
                        self._deliver(ev.NotQueued(peer, label, round))
                case ev.StartTraining(round):
                    job = self._worker.submit(self.group.train, {self.node: round})
                    job.add_done_callback(lambda _: self.transport.wake())
                    self._training = (round, job)
                case ev.Measure(round):
                    evaluation = _evaluate(self.group, round, self.now, self.sent, self.recorder)
                    if self._on_evaluated is not None:
                        self._on_evaluated(evaluation)
                case ev.SaveCheckpoint(round):
                    self._save(round)
                case ev.KeepCut(peer, reason):
                    self._keep_cut(peer, reason)
                case ev.LogLine():
                    _write(command, self.journal, self.names)
                case ev.Ended():
                    self._write_end(Finished(command.status, command.round, command.reason))
                case ev.Failed(reason):
                    self._failure = _named(reason, self.names)

    def _on_trained(self) -> None:
        assert self._training is not None
        (trained, job), self._training = self._training, None
        try:
            job.result()
        except WithdrawnError:
            if not self._stop():
                raise
            return
        self._deliver(ev.TrainingDone(trained))

    def _report_progress(self) -> None:
        if self._on_progress is None:
            return
        row = self.recorder.newest(self._rows_reported)
        self._rows_reported = len(self.recorder.rows)
        self._on_progress(self.progress(row))

    # --- The end, and coming back -------------------------------------------------------------------------

    def _settle(self) -> bool:
        """Wait for the training that a checkpoint must contain; return whether a checkpoint is possible."""
        self.session.stop_training()
        if self._training is None:
            return True
        under_way, job = self._training
        if not job.done():
            self.journal.info("waiting for training to end", round=under_way, seconds=SETTLE_S)
        try:
            job.result(SETTLE_S)
        except FutureTimeoutError:
            problem = "training did not end in time; the previous checkpoint is kept"
            self.journal.error("no checkpoint", round=under_way, problem=problem)
            return False
        except WithdrawnError:
            return True
        except Exception as error:
            self.journal.error("training failed", round=under_way, problem=f"{type(error).__name__}: {error}")
            raise
        self._on_trained()
        return True

    def _save(self, round: int) -> None:
        """Write a checkpoint; a full disk prevents the checkpoint but does not end the run."""
        try:
            state = self.session.snapshot(self.now, time.time())
            self.recorder.save(round, state, [self.group.snapshot()])
        except OSError as error:
            self.journal.error("no checkpoint", round=round, problem=error.strerror or str(error))

    def _keep_cut(self, peer: int, reason: str) -> None:
        """Write to the folder that a peer is cut off. If the disk is full, the cut ends with this process."""
        try:
            self._cuts.add(self.names[peer], reason)
        except OSError as error:
            self.journal.error("cut not kept", peer=self.names[peer], problem=error.strerror or str(error))

    def _write_end(self, end: Finished) -> None:
        """Write the end before it is sent: afterwards others may leave, and no round could be repeated."""
        wall_s = {name: round(seconds, 3) for name, seconds in self.group.wall_s.items()}
        row = EndRow(end.status, end.round, self.now, end.reason, "", wall_s)
        self.recorder.finish([self.group], row, self.session.traffic.edges())
        skipped = {"skipped_rounds": self.session.skipped_rounds} if self.session.skipped_rounds else {}
        self.journal.info("ended", status=end.status, round=end.round, reason=end.reason, **skipped)
        self._report_progress()

    def _linger(self) -> None:
        """Stay for peers that are behind and may need this node's last frames again."""
        until = time.monotonic() + self.session.settings.timeout_s
        while not self._stop() and (left := until - time.monotonic()) > 0:
            if not any(known.may_come_back for known in self.peers.values()):
                return
            event = self.transport.poll(min(left, MAX_POLL_S))
            self._deliver(ev.TimePassed() if event is None else event)

    def _outcome(self, status: str) -> NodeOutcome:
        refused = {peer: known.refused for peer, known in self.peers.items()}
        params = self.group.parameters(self.node).clone()
        rows, edges = self.recorder.rows, self.session.traffic.edges()
        skipped = self.session.skipped_rounds
        return NodeOutcome(status, self.round, rows, params, refused, self.timed_out, edges, skipped)


def _now() -> float:
    """Return seconds on a clock that also runs while the machine is suspended, where the system has one.

    Otherwise a node that was suspended would take the round that others reached meanwhile for impossible.
    """
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _evaluate(
    group: NodeGroup, round: int, now: float, sent: TrafficSplit, recorder: Recorder
) -> NodeEvaluation:
    """Measure the model of a group's only node, and record the result."""
    (node,) = group.nodes
    sums, buffers = group.sums(round, group.nodes if group.rules.asynchronous else ())
    mean = average([sums], 1, buffers)
    result = group.measure(round, mean, test_average=round == 0)
    samples = group.num_samples(round)
    row = reduce_results([result], round=round, time_s=now, nodes=[node], traffic=sent, samples=samples)
    recorder.append(row)
    columns = tuple(sent.by_kind().values())
    return NodeEvaluation(node, round, now, columns, samples, result, mean.params, buffers[node])


def _write(line: ev.LogLine, journal: Journal, names: Sequence[str]) -> None:
    """Write a session's log line, with the names of peers in place of their numbers."""
    fields = dict(line.fields)
    if isinstance(peer := fields.get("peer"), int) and peer < len(names):
        fields["peer"] = names[peer]
    if "peers" in fields:
        fields["peers"] = [names[peer] for peer in fields["peers"]]
    if "without" in fields:
        fields["without"] = [f"{names[peer]}: {why}" for peer, why in fields["without"].items()]
    if "reason" in fields:
        fields["reason"] = _named(fields["reason"], names)
    getattr(journal, line.level)(line.event, **fields)


def _named(text: str, names: Sequence[str]) -> str:
    """Replace numbers of peers in braces by their names."""
    return re.sub(r"\{(\d+)\}", lambda found: names[int(found[1])] if int(found[1]) < len(names) else "", text)
