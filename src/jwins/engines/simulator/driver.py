"""The simulated driver: all nodes of a run on a virtual clock.

The nodes are those of every engine (:class:`~jwins.node.Node`). One event queue drives one node group, or
several that share the nodes. Local training takes the time of :class:`Compute`, sending the time of
:class:`Links`, and everything else none. Real time has no effect. Every frame is encoded, its bytes are counted
once per recipient, and each node group decodes it once for all its nodes.

Two properties make it fast without changing any result:

- Training depends only on the parameters at command time. So all outstanding trainings run as one batch when
  the first of them is due. With stacked nodes, those of each stack run as one batch.
- An action of a node at time t affects no other node before t + latency, and not the node itself before its
  next training has ended. So all events within that window can be handled at once, different nodes on different
  threads, and their commands are then carried out in order of time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from jwins.engines import node_group
from jwins.engines.callbacks import MeasuredModels
from jwins.engines.evaluation_results import average, reduce_results
from jwins.engines.gc_tuning import raised_gc_threshold
from jwins.engines.node_group import (
    Envelope,
    MessageArrived,
    NodeGroupLike,
    ScheduledEvent,
    TrainingDone,
    timed,
)
from jwins.engines.recorder import Recorder
from jwins.engines.simulator.barrier import Barrier, Members
from jwins.engines.simulator.fault_script import FaultScript
from jwins.engines.simulator.network import Flow, SimulatedNetwork, UplinkState
from jwins.engines.simulator.queue import EventQueue, NodeEvent, QueueItem, QueueState, TransferDone
from jwins.engines.stop_rule import StopRule
from jwins.engines.traffic_counter import TrafficCounter
from jwins.errors import ConfigError, JwinsError, ResumeError, UsageError
from jwins.node import (
    Checkpoint,
    Command,
    Evaluate,
    Finished,
    FrameRefused,
    PeerLost,
    PeerUp,
    Rejoin,
    RequestKeyframe,
    RosterChanged,
    Rules,
    Send,
    Tick,
    Train,
    WakeAt,
)
from jwins.run_folder.rows import EndRow, EvalRow, Row, StartRow, Traffic, TrafficSplit
from jwins.scenario import Compute, Faults, Links, check_scenario
from jwins.wire.frame import Packed

CallAll = Callable[[Sequence[Callable[[], Any]]], list[Any]]
"""Function that calls some node groups, once each, and returns their results in the same order."""


class StalledError(JwinsError):
    """Nodes wait for frames that will never come, and there is no deadline."""


@dataclass(frozen=True, slots=True)
class RoundCompletion:
    """Time at which a node completed an evaluated round, and the bytes that it had sent by then.

    Attributes:
        time: virtual seconds.
        sent: bytes by kind, in the order of :attr:`TrafficSplit.KINDS`.
    """

    time: float
    sent: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedDriverState:
    """The driver's state in a checkpoint.

    Attributes:
        now: virtual seconds.
        envelopes: number of messages sent so far.
        joined: the round in which each node last returned; 0 if it was never down.
        rounds: completed rounds of each node.
        fired: numbers of the faults that have happened.
        untrained: the round of each node whose training has not run yet.
        completions: the nodes that wait for an evaluation, by completed rounds.
        votes: the nodes that have requested a checkpoint, by completed rounds.
        edges: bytes by kind of each directed edge.
        refused: (receiver, sender, round, reason) of each frame that was not accepted.
        median: in an asynchronous run, number of rounds that more than half of the live nodes have completed.
    """

    now: float
    envelopes: int
    queue: QueueState
    uplinks: tuple[UplinkState, ...]
    crashed: frozenset[int]
    joined: tuple[int, ...]
    rounds: tuple[int, ...]
    fired: frozenset[int]
    untrained: Mapping[int, int]
    completions: Mapping[int, Mapping[int, RoundCompletion]]
    votes: Mapping[int, frozenset[int]]
    edges: Mapping[tuple[int, int], tuple[int, ...]]
    refused: tuple[tuple[int, int, int, str], ...]
    median: int = -1


STATE_TYPES: tuple[type, ...] = (
    *node_group.STATE_TYPES,
    *(MessageArrived, Flow, RoundCompletion, Envelope, PeerLost, NodeEvent, QueueState),
    *(SimulatedDriverState, Tick, TrainingDone, TransferDone, UplinkState),
)


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a running simulation.

    Attributes:
        round: rounds completed by every live node; in an asynchronous run, by more than half of them.
        rounds: number of rounds of the whole run.
        time_s: virtual seconds.
        bytes_total: bytes sent so far by all nodes.
        row: the newest evaluation, if it is new.
    """

    round: int
    rounds: int
    time_s: float
    bytes_total: int
    row: EvalRow | None = None

    def __repr__(self) -> str:
        row = "" if self.row is None else f", {self.row.means_text()}"
        return f"<Progress round {self.round} of {self.rounds}, {self.time_s:.4g} s, {self.bytes_total} B{row}>"


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Measurements of a simulation.

    Attributes:
        status: ``finished``, ``stopped`` (by the stop rule), ``diverged``, ``interrupted``, or ``stalled`` if
            all nodes went down.
        rows: all rows of the run, including those before an interruption.
        params: (N, P) float32 final parameters; None if interrupted.
        refused: (receiver, sender, round, reason) of each frame that a node did not accept.
    """

    status: str
    rows: list[Row]
    params: Tensor | None
    refused: list[tuple[int, int, int, str]]
    traffic: list[Traffic]


class SimulatedDriver:
    """Driver of one experiment on a virtual clock. Use it once.

    Args:
        groups: node groups with the nodes 0 to N - 1, each once.
        start: the first row of the log.
        recorder: recorder of measurements; None keeps them in memory.
        on_progress: called after every step of the driver.
        stop: called after every step; True ends the run with a checkpoint.
        stop_rule: rule that may end the run early, by its evaluations; None for no such rule.
        on_evaluation: called with each new evaluation and its models; None for nothing.
        startup_s: real seconds before the start, for the last row.
        call_all: calls several node groups; by default one after the other.

    Raises:
        ConfigError: links, faults or the topology do not fit the nodes.
        UsageError: the node groups do not hold every node once.
    """

    def __init__(
        self,
        groups: Sequence[NodeGroupLike],
        *,
        start: StartRow,
        links: Links | None = None,
        compute: Compute | None = None,
        faults: Faults | None = None,
        recorder: Recorder | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
        stop_rule: StopRule | None = None,
        on_evaluation: Callable[[EvalRow, MeasuredModels], None] | None = None,
        startup_s: float = 0.0,
        call_all: CallAll | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self._call_all: CallAll = call_all or (lambda calls: [call() for call in calls])
        self.rules = rules = groups[0].rules
        self.recorder = recorder or Recorder(None)
        self.on_progress = on_progress
        self._group_of = {node: group for group in groups for node in group.nodes}
        self._start, self._stop, self._stop_rule = start, stop, stop_rule
        self._on_evaluation = on_evaluation
        self._links, self._compute = links or Links(), compute or Compute()
        n = self.num_nodes = len(self._group_of)
        _check(groups, rules, self._links, self._compute, faults or Faults())
        self._faults = FaultScript(faults or Faults())
        self.window_s = self._lookahead()
        self._now = 0.0
        self._queue = EventQueue()
        self.network = SimulatedNetwork(self._links, n, self._queue, in_order=rules.asynchronous)
        self._traffic = TrafficCounter()
        self._envelopes = 0
        self._members = Members(n)
        self._rounds = [0] * n
        self._live_at = Counter({0: n})  # number of live nodes by completed rounds
        self._median = -1
        self._untrained: dict[int, int] = {}
        self._completions: Barrier[RoundCompletion] = Barrier(self._members)
        self._votes: Barrier[None] = Barrier(self._members)
        self._refused: list[tuple[int, int, int, str]] = []
        self._rows_shown = 0
        self._failure: Finished | None = None
        self._stopped: EvalRow | None = None
        self._checkpoint_due: int | None = None
        self._wall_s = {"start-up": startup_s, "checkpoints": 0.0, "total": 0.0}

    def _lookahead(self) -> float:
        """Return the seconds within which no action can affect any node; see the module's docstring."""
        if self._faults:
            return 0.0
        deadline_s = self.rules.deadline_s
        fewest = min(min(group.local_steps.values()) for group in self.groups)
        local_steps = 1 if self.rules.consensus_rounds else fewest
        least = min(self._links.latency_ms * 1e-3, self._compute.min_seconds(local_steps))
        return least if deadline_s is None else min(least, deadline_s)

    # --- Running ------------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> Outcome:
        """Simulate to the end, to divergence or until ``stop`` returns True.

        Args:
            resume: continue from the newest checkpoint of the recorder's folder, which may have another number
                of node groups.

        Raises:
            ResumeError: no checkpoint to resume.
            StalledError: nodes would wait forever.
            OSError: e.g. a full disk; the newest checkpoint is intact and can be resumed.
        """
        try:
            with timed(self._wall_s, "total"), raised_gc_threshold(self.num_nodes):
                self._begin(resume)
                while self._queue and self._failure is None and not self._stop():
                    self._step()
                    if self._checkpoint_due is not None:
                        self._save(self._checkpoint_due)
                    self._report()
                if self._queue and self._failure is None:
                    self._save(self._min_round())
                    return self._outcome("interrupted", None)
                if self._failure is None:
                    self._check_not_stalled()
            return self._end()
        finally:
            self.recorder.close()
            for group in self.groups:
                group.close()

    def _begin(self, resume: bool) -> None:
        if resume:
            types = (*STATE_TYPES, *self.rules.sharing.state_types)
            state, nodes = self.recorder.resume(types, self.rules.rounds)
            self._check_not_stopped()
            self._call_all([partial(group.restore, nodes) for group in self.groups])
            self._restore(state)
            return
        self.recorder.begin(self._start)
        started = self._call_all([partial(group.start, 0.0) for group in self.groups])
        commands = {node: found for of in started for node, found in of.items()}
        for node in sorted(commands):
            self._carry_out(node, commands[node], 0.0)

    def _check_not_stopped(self) -> None:
        """Refuse to continue a run that the present rule would have ended earlier."""
        for count, row in enumerate(self.recorder.rows, start=1):
            if isinstance(row, EvalRow) and (reason := self._reason_to_stop(self.recorder.rows[:count])):
                raise ResumeError(
                    f"run.stop: would have ended this run after {row.round} rounds ({reason}); change it, "
                    f"remove it, or run in another folder"
                )

    def _reason_to_stop(self, rows: Sequence[Row]) -> str:
        return "" if self._stop_rule is None else self._stop_rule.reason(rows)

    def _step(self) -> None:
        """Handle all events of one window, then carry out the nodes' commands in order of time."""
        window = self._queue.pop_window(self.window_s)
        outstanding: dict[int, int] = {}
        if any(isinstance(item, NodeEvent) and isinstance(item.event, TrainingDone) for _, item in window):
            outstanding, self._untrained = self._untrained, {}
        due: dict[int, ScheduledEvent] = {
            index: item.at(at)
            for index, (at, item) in enumerate(window)
            if isinstance(item, NodeEvent) and item.node not in self._members.down
        }
        commands = self._handle(due, outstanding)
        for index, (at, item) in enumerate(window):
            self._now = at
            if isinstance(item, TransferDone):
                self.network.advance(item, at)
            else:
                self._carry_out(item.node, commands.get(index, []), at)

    def _handle(self, due: Mapping[int, ScheduledEvent], train: Mapping[int, int]) -> dict[int, list[Command]]:
        """Return the nodes' commands by the number of the event; ``train`` are outstanding trainings."""
        indices: dict[NodeGroupLike, list[int]] = {}
        for index, item in due.items():
            indices.setdefault(self._group_of[item.node], []).append(index)
        rounds: dict[NodeGroupLike, dict[int, int]] = {}
        for node in sorted(train):
            rounds.setdefault(self._group_of[node], {})[node] = train[node]
        busy = [group for group in self.groups if group in indices or group in rounds]
        found = self._call_all(
            [
                partial(group.handle, [due[index] for index in indices.get(group, [])], rounds.get(group, {}))
                for group in busy
            ]
        )
        return {
            index: commands
            for group, of in zip(busy, found, strict=True)
            for index, commands in zip(indices.get(group, []), of, strict=True)
        }

    # --- Commands of nodes -------------------------------------------------------------------------------

    def _carry_out(self, node: int, commands: Sequence[Command], now: float) -> None:
        for command in commands:
            if node in self._members.down:
                return
            match command:
                case Train(round):
                    self._on_train(node, round, now)
                case Send():
                    self._on_send(node, command, now)
                case RequestKeyframe(to, packed):
                    self._traffic.count(node, (to,), packed, "control")
                    self.network.send(now, self._envelope(node, packed), (to,), {})
                case Evaluate() | Checkpoint() if self.rules.asynchronous:
                    pass  # they follow from the median round
                case Evaluate(round):
                    self._completions.report(round, node, self._completion(node, now))
                    self._evaluate_if_complete(round)
                case Checkpoint(round):
                    self._votes.report(round, node, None)
                    self._count_votes(round)
                case WakeAt(at):
                    self._queue.push(at, NodeEvent(node, Tick()))
                case FrameRefused(sender, round, reason):
                    self._refused.append((node, sender, round, reason))
                case Finished(status, round):
                    self._completed(node, round)
                    if status == "diverged":
                        self._failure = self._failure or command

    def _completed(self, node: int, round: int) -> None:
        self._leave_round(node)
        self._rounds[node] = round
        self._live_at[round] += 1
        if self.rules.asynchronous:
            self._advance_median()

    def _leave_round(self, node: int) -> None:
        at = self._rounds[node]
        self._live_at[at] -= 1
        if not self._live_at[at]:
            del self._live_at[at]  # thousands of empty rounds would be summed in each step

    def _completion(self, node: int, now: float) -> RoundCompletion:
        return RoundCompletion(now, tuple(self._traffic.sent(node).by_kind().values()))

    def _advance_median(self) -> None:
        """Evaluate and save an asynchronous run as soon as more than half of the live nodes are far enough.

        An evaluation uses the present models of all live nodes, in whatever round they are. That of the last
        round ends the run.
        """
        rules = self.rules
        while not self._members.all_down and self._failure is None:
            beyond = sum(count for at, count in self._live_at.items() if at > self._median)
            if 2 * beyond <= self.num_nodes - len(self._members.down):
                return
            self._median += 1
            if self._median in rules.evaluate_at:
                self._evaluate(
                    self._median, {node: self._completion(node, self._now) for node in self._members.up}
                )
            if rules.checkpoint_every and 0 < self._median < rules.rounds:
                due = self._median % rules.checkpoint_every == 0
                self._checkpoint_due = self._median if due else self._checkpoint_due

    def _on_train(self, node: int, round: int, now: float) -> None:
        self._completed(node, round)
        for fault in self._faults.on_train(node, round, self._members.down):
            if fault.kind == "crash":
                self._crash(node, now)
                return
            self._rejoin(fault.node, round, now)
        self._untrained[node] = round
        # A round of consensus takes the time of one step, so that the order of events is well defined.
        trained = self._group_of[node].local_steps[node]
        local_steps = trained if round < self.rules.training_rounds else 1
        due = now + self._compute.seconds(self.rules.seed, node, round, local_steps)
        self._queue.push(due, NodeEvent(node, TrainingDone(round)))

    def _on_send(self, node: int, command: Send, now: float) -> None:
        receivers = command.in_turn(node) if self._links.sending == "in_turn" else command.to
        self._traffic.count(node, receivers, command.packed, "keyframe" if command.keyframe else "update")
        frame_faults = {} if command.keyframe else self._faults.on_send(node, command.round, receivers)
        self.network.send(now, self._envelope(node, command.packed), receivers, frame_faults)

    def _envelope(self, sender: int, packed: Packed) -> Envelope:
        self._envelopes += 1
        return Envelope(self._envelopes, sender, packed)

    # --- Faults -------------------------------------------------------------------------------------------

    def _crash(self, node: int, now: float) -> None:
        self._members.down.add(node)
        self._leave_round(node)
        self._untrained.pop(node, None)
        self.network.uplinks[node].clear(now)
        for peer in range(self.num_nodes):
            if peer != node and peer not in self._members.down:
                self._queue.push(now + self._links.latency_ms * 1e-3, NodeEvent(peer, PeerLost(node)))
        if self.rules.asynchronous:
            self._advance_median()
        for completed in sorted(self._completions.reports):
            self._evaluate_if_complete(completed)
        for completed in sorted(self._votes.reports):  # all remaining nodes may have requested a checkpoint
            self._count_votes(completed)

    def _count_votes(self, round: int) -> None:
        if not self._members.all_down and self._votes.take(round) is not None:
            # After the last round there is nothing to resume, and a longer run continues from before it.
            self._checkpoint_due = round if round < self.rules.rounds else None

    def _rejoin(self, node: int, round: int, now: float) -> None:
        """Announce a node to all others before it trains, so that they expect it from ``round`` on.

        In an asynchronous run it continues in its own round.
        """
        at = self._rounds[node] if self.rules.asynchronous else round

        def goes_on(item: QueueItem) -> bool:
            if isinstance(item, TransferDone):
                return True
            if isinstance(item.event, PeerLost):
                return node not in (item.node, item.event.peer)
            return item.node != node

        self._queue.keep(goes_on)
        self._members.rejoin(node, at)
        self._live_at[self._rounds[node]] += 1
        live = self._members.up
        self._deliver(ScheduledEvent(node, now, RosterChanged(live - {node}, at)))
        for peer in sorted(live - {node}):
            self._deliver(ScheduledEvent(peer, now, PeerUp(node, at)))
        self._deliver(ScheduledEvent(node, now, Rejoin(at)))

    def _deliver(self, due: ScheduledEvent) -> None:
        (commands,) = self._group_of[due.node].handle([due])
        self._carry_out(due.node, commands, due.time)

    # --- Measuring ----------------------------------------------------------------------------------------

    def _evaluate_if_complete(self, round: int) -> None:
        completions = self._completions.take(round) if self._stopped is None else None
        if completions is not None:
            self._evaluate(round, completions)

    def _evaluate(self, round: int, completions: Mapping[int, RoundCompletion]) -> None:
        asynchronous = self.rules.asynchronous
        honest = sorted(completions.keys() - self.rules.attacks.keys())
        if not honest:  # all others are down
            return
        present = honest if asynchronous else ()
        found = self._call_all([partial(group.sums, round, present) for group in self.groups])
        buffers = {node: own for _, every in found for node, own in every.items()}
        mean = average([sums for sums, _ in found], len(honest), buffers)
        tester = self._group_of[honest[0]]
        keep = asynchronous or self._stop_rule is not None or self._on_evaluation is not None
        results = self._call_all(
            [
                partial(group.measure, round, mean, test_average=group is tester, keep=keep)
                for group in self.groups
            ]
        )
        # Count all bytes of nodes that are down or returned later: no byte is subtracted.
        sent = [
            TrafficSplit(*completions[node].sent) if node in completions else self._traffic.sent(node)
            for node in range(self.num_nodes)
        ]
        row = reduce_results(
            results,
            round=round,
            time_s=max(completion.time for completion in completions.values()),
            nodes=honest,
            traffic=sum(sent, TrafficSplit()),
            samples=tester.num_samples(round),
            consensus_rounds=max(0, round - self.rules.training_rounds),
        )
        self.recorder.append(row)
        if self._on_evaluation is not None:
            models = MeasuredModels(tuple(row.nodes), lambda node: self._group_of[node].measured_file(node))
            self._on_evaluation(row, models)
            models.end()
        if self._failure is not None:
            return
        if round < self.rules.rounds and (reason := self._reason_to_stop(self.recorder.rows)):
            self._stopped, self._failure = row, Finished("stopped", round, reason)
        elif round == self.rules.rounds and asynchronous:
            self._stopped, self._failure = row, Finished("finished", round)

    def _report(self) -> None:
        if self.on_progress is None:
            return
        row = self.recorder.newest(self._rows_shown)
        self._rows_shown = len(self.recorder.rows)
        sent = self._traffic.total_bytes()
        self.on_progress(Progress(self._min_round(), self.rules.rounds, self._now, sent, row))

    def _min_round(self) -> int:
        """Return the number of rounds completed by every live node, or by the last one that went down.

        In an asynchronous run it is the median round.
        """
        if self.rules.asynchronous:
            return max(self._median, 0)
        return min(self._live_at, default=max(self._rounds))

    def _check_not_stalled(self) -> None:
        waiting: dict[int, tuple[int, tuple[int, ...]]] = {}
        for group in self.groups:
            waiting |= group.stalled([node for node in group.nodes if node not in self._members.down])
        if waiting:
            node = min(waiting)
            at, senders = waiting[node]
            raise StalledError(
                f"{len(waiting)} nodes would wait forever: node {node} in round {at} for frames of "
                f"{', '.join(map(str, senders))}; set run.deadline_s to continue without them"
            )

    # --- End and resuming -------------------------------------------------------------------------

    def _end(self) -> Outcome:
        failure = self._failure or self._all_down() or Finished("finished", self._min_round())
        if self._stopped is not None:
            self._call_all([group.end_with_measured for group in self.groups])
        ended_at = self._now if self._stopped is None else self._stopped.time_s
        end = EndRow(failure.status, failure.round, ended_at, failure.reason, "", self._seconds())
        params = self.recorder.finish(self.groups, end, self._traffic.edges())
        return self._outcome(failure.status, params)

    def _all_down(self) -> Finished | None:
        if not self._members.all_down:
            return None
        at, sent = max(self._rounds), self._traffic.total_bytes()
        reason = f"all {self.num_nodes} nodes are down, the last one since round {at}; {sent} bytes were sent"
        return Finished("stalled", at, reason)

    def _seconds(self) -> dict[str, float]:
        """Return real seconds by activity; start-up is first, and the total without start-up is last."""
        spent = {"start-up": self._wall_s["start-up"]}
        for group in self.groups:
            for activity, seconds in group.wall_s.items():
                spent[activity] = spent.get(activity, 0.0) + seconds
        spent |= {name: self._wall_s[name] for name in ("checkpoints", "total")}
        return {activity: round(seconds, 3) for activity, seconds in spent.items()}

    def _outcome(self, status: str, params: Tensor | None) -> Outcome:
        return Outcome(status, self.recorder.rows, params, self._refused, self._traffic.edges())

    def _save(self, round: int) -> None:
        self._checkpoint_due = None
        if self.recorder.folder is None:
            return
        with timed(self._wall_s, "checkpoints"):
            arriving = [i.event for i in self._queue.items() if isinstance(i, NodeEvent)]
            under_way = [e.envelope for e in arriving if isinstance(e, MessageArrived)] + list(
                self.network.envelopes()
            )
            results = self._call_all([partial(group.snapshot, under_way) for group in self.groups])
            sent: dict[NodeGroupLike, dict[int, Envelope]] = {group: {} for group in self.groups}
            for envelope in under_way:
                sent[self._group_of[envelope.sender]][envelope.number] = envelope
            full = {p.number: p for group, own in sent.items() for p in group.with_bytes(list(own.values()))}
            self.recorder.save(round, _with_envelopes(self._snapshot(), lambda p: full[p.number]), results)

    def _snapshot(self) -> SimulatedDriverState:
        return SimulatedDriverState(
            now=self._now,
            envelopes=self._envelopes,
            queue=self._queue.snapshot(),
            uplinks=tuple(uplink.snapshot() for uplink in self.network.uplinks),
            crashed=frozenset(self._members.down),
            joined=tuple(self._members.joined),
            rounds=tuple(self._rounds),
            fired=frozenset(self._faults.fired),
            untrained=dict(self._untrained),
            completions={at: dict(completions) for at, completions in self._completions.reports.items()},
            votes={at: frozenset(votes) for at, votes in self._votes.reports.items()},
            edges=self._traffic.snapshot(),
            refused=tuple(self._refused),
            median=self._median,
        )

    def _restore(self, state: SimulatedDriverState) -> None:
        envelopes: dict[int, Envelope] = {}

        def one(envelope: Envelope) -> Envelope:
            """Restore one envelope for all receivers, so that it is decoded once."""
            if envelope.number not in envelopes:
                packed = self.rules.wire.renewed(envelope.packed)
                envelopes[envelope.number] = replace(envelope, packed=packed)
            return envelopes[envelope.number]

        state = _with_envelopes(state, one)
        self._now, self._envelopes = state.now, state.envelopes
        self._queue.restore(state.queue)
        for uplink, saved in zip(self.network.uplinks, state.uplinks, strict=True):
            uplink.restore(saved)
        self._members.restore(state.crashed, state.joined)
        self._rounds = list(state.rounds)
        self._live_at = Counter(self._rounds[node] for node in self._members.up)
        self._faults.fired = set(state.fired)
        self._untrained = dict(state.untrained)
        self._completions.reports = {at: dict(completions) for at, completions in state.completions.items()}
        self._votes.reports = {at: dict.fromkeys(votes) for at, votes in state.votes.items()}
        self._traffic = TrafficCounter(state.edges)
        self._refused = list(state.refused)
        self._median = state.median


def _with_envelopes(
    state: SimulatedDriverState, change: Callable[[Envelope], Envelope]
) -> SimulatedDriverState:
    """Replace each envelope of an item by ``change``'s result."""

    def with_changed(item: QueueItem) -> QueueItem:
        if isinstance(item, NodeEvent) and isinstance(item.event, MessageArrived):
            return replace(item, event=MessageArrived(change(item.event.envelope)))
        return item

    entries = tuple((at, order, with_changed(item)) for at, order, item in state.queue.entries)
    uplinks = tuple(
        replace(up, flows=tuple(replace(flow, envelope=change(flow.envelope)) for flow in up.flows))
        for up in state.uplinks
    )
    return replace(state, queue=replace(state.queue, entries=entries), uplinks=uplinks)


def _check(
    groups: Sequence[NodeGroupLike], rules: Rules, links: Links, compute: Compute, faults: Faults
) -> None:
    held = sorted(node for group in groups for node in group.nodes)
    n = len(held)
    if held != list(range(n)):
        raise UsageError(f"the node groups hold nodes {held}: expected each of 0 to {n - 1} once")
    if rules.topology.num_nodes != n:
        raise ConfigError("topology", rules.topology.num_nodes, f"expected nodes.count = {n} nodes")
    if len(groups) > 1 and not rules.wire.codec.accepts_foreign:
        problem = "decodes only frames of its own process; use another codec, or one node group"
        raise ConfigError("wire.codec", rules.wire.codec.name, problem)
    check_scenario(
        num_nodes=n,
        rounds=rules.rounds,
        links=links,
        compute=compute,
        faults=faults,
        deadline_s=rules.deadline_s,
        waits=not rules.asynchronous,
    )
