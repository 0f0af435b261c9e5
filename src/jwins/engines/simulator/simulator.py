"""All nodes in one process, on a virtual clock: the same :class:`~jwins.node.Node` as everywhere, real bytes.

The simulator keeps one event queue. Local training takes the time that :class:`Compute` says, sending takes
the time that :class:`Links` says, and everything else takes none; a stopwatch never enters. Every frame is
really encoded, its bytes are counted once per recipient, and it is decoded once for all of them.

Two things make it fast without changing any result:

- Training depends only on the parameters at command time. So all outstanding trainings run as one batch when
  the first of them is due.
- What a node does at time t reaches no other node before t + latency, and not itself before the next
  training is done. So all events within that window can be handled at once, different nodes on different
  threads, and their commands are then carried out in order of time.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from jwins.engines.simulator.queue import (
    Arrival,
    Flow,
    Item,
    LossNoticed,
    Parcel,
    TickDue,
    TrainedDue,
    Uplink,
    UplinkDue,
)
from jwins.errors import ConfigError, JwinsError, ResumeError
from jwins.node import (
    Checkpoint,
    Command,
    Evaluate,
    Event,
    Finished,
    FrameReceived,
    KeyRequested,
    Node,
    NodeState,
    PeerLost,
    PeerUp,
    Phase,
    Refused,
    RequestKey,
    RosterChanged,
    Send,
    Tick,
    Train,
    Trained,
    WakeAt,
)
from jwins.runfiles import checkpoint
from jwins.runfiles.atomic import write_atomically
from jwins.runfiles.rows import (
    EndRow,
    EvalRow,
    MetricsLog,
    Row,
    Spread,
    StartRow,
    Traffic,
    TrafficSplit,
    read_rows,
)
from jwins.sharing.base import Sharing
from jwins.topology.graph import Topology
from jwins.training.trainer import Trainer
from jwins.update import Quantized, Sampled, Update
from jwins.wire.codec import Codec
from jwins.wire.frame import Frame, KeyRequest, Packed, unpack
from jwins.world import Compute, Faults, Links

__all__ = ["Outcome", "Progress", "Simulator", "StalledError"]

_SERIAL_BELOW = 16_384
"""Below this dimension handing a node's work to a thread costs more than the work."""


class StalledError(JwinsError):
    """Nodes wait for frames that will never come, and there is no deadline."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One node's model at a round that is evaluated, until all nodes have reached it."""

    params: Tensor
    buffers: Mapping[str, Tensor]
    loss: float | None
    sent: tuple[int, ...]
    time: float


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationSamples:
    """Test samples that an evaluation uses.

    Attributes:
        common: (m,) increasing int64, for all nodes; None for all samples.
        own: for each node, (m_i,) int64, samples of its own; adds the metrics ``own_<name>``, which a node
            without any does not have. None adds nothing.
    """

    common: Tensor | None = None
    own: Sequence[Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SimulatorState:
    """Everything a resumed simulation needs, for checkpoint.py."""

    log_bytes: int
    now: float
    sequence: int
    queue: tuple[tuple[float, int, Item], ...]
    uplinks: tuple[tuple[float, float, int, int, tuple[Flow, ...]], ...]
    nodes: tuple[NodeState, ...]
    crashed: frozenset[int]
    joined: tuple[int, ...]
    fired: frozenset[int]
    pending: Mapping[int, int]
    rows: Mapping[int, Tensor]
    losses: Mapping[int, float]
    samples: Mapping[int, Mapping[int, Sample]]
    votes: Mapping[int, frozenset[int]]
    sent: tuple[tuple[int, ...], ...]
    traffic: Mapping[tuple[int, int], tuple[int, ...]]
    refused: tuple[tuple[int, int, int, str], ...]
    trainer: Any


STATE_TYPES: tuple[type, ...] = (
    Arrival,
    Flow,
    Frame,
    KeyRequest,
    LossNoticed,
    NodeState,
    Packed,
    Parcel,
    Quantized,
    Sample,
    Sampled,
    SimulatorState,
    TickDue,
    TrainedDue,
    Update,
    UplinkDue,
)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a running simulation tells its audience.

    Attributes:
        round: rounds completed by every live node.
        rounds: of the whole run.
        time_s: virtual seconds.
        bytes_total: sent so far, by all nodes.
        row: the newest evaluation, if there is a new one.
    """

    round: int
    rounds: int
    time_s: float
    bytes_total: int
    row: EvalRow | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a simulation measured.

    Attributes:
        status: ``finished``, ``diverged`` or ``interrupted``.
        rows: all rows of the run, of before an interruption, too.
        params: (N, P) float32 final parameters; None if interrupted.
        refused: (receiver, sender, round, reason) of each frame that a node did not accept.
    """

    status: str
    rows: list[Row]
    params: Tensor | None
    refused: list[tuple[int, int, int, str]]


Stored = TypeVar("Stored", Item, Flow)


T = TypeVar("T")


U = TypeVar("U")


class Simulator:
    """Runs one experiment; used once.

    Args:
        trainer: local training of all nodes; its ``num_nodes`` is N.
        sharing: the algorithm.
        codec: how updates become bytes.
        topology: over N nodes.
        rounds: how many.
        seed: of the experiment.
        digest: 8 bytes that identify the experiment.
        start: the first row of the log.
        links: sending times.
        compute: training times.
        faults: what goes wrong.
        eval_at: numbers of completed rounds after which all models are evaluated.
        samples: what to evaluate on.
        early_samples: the same for the evaluations before ``early_before``; the others then say what they find
            on these too (``EvalRow.early``). None for no difference.
        early_before: a number of completed rounds.
        deadline_s: virtual seconds a node waits for its neighbours' frames; None for ever.
        threads: Python threads for the nodes' own work (training has its own setting).
        folder: where metrics, checkpoints and final models go; None keeps everything in memory.
        checkpoint_every: rounds between checkpoints; 0 for none but on Ctrl-C.
        on_progress: called after every step of the clock.
    """

    def __init__(
        self,
        trainer: Trainer,
        sharing: Sharing[Any],
        codec: Codec,
        topology: Topology,
        *,
        rounds: int,
        seed: int,
        digest: bytes,
        start: StartRow,
        links: Links | None = None,
        compute: Compute | None = None,
        faults: Faults | None = None,
        eval_at: Collection[int] = (),
        samples: EvaluationSamples | None = None,
        early_samples: EvaluationSamples | None = None,
        early_before: int = 0,
        deadline_s: float | None = None,
        threads: int = 1,
        folder: Path | None = None,
        checkpoint_every: int = 0,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.trainer = trainer
        self.sharing = sharing
        self.codec = codec
        self.topology = topology
        self.rounds = rounds
        self.seed = seed
        self.digest = digest
        self.start_row = start
        self.links = links or Links()
        self.compute = compute or Compute()
        self.faults = faults or Faults()
        self.samples = samples or EvaluationSamples()
        self.early_samples = early_samples
        self.early_before = early_before if early_samples is not None else 0
        self.deadline_s = deadline_s
        self.folder = folder
        self.on_progress = on_progress
        self.num_nodes = trainer.num_nodes
        self._check()

        initial = trainer.initial()
        self._update_dim = sharing.update_dim(len(initial))
        self._nodes = [
            Node(
                i,
                initial,
                sharing,
                codec,
                topology,
                rounds=rounds,
                seed=seed,
                digest=digest,
                project=trainer.layout.project_,
                evaluate_at=eval_at,
                checkpoint_every=checkpoint_every,
                deadline_s=deadline_s,
            )
            for i in range(self.num_nodes)
        ]
        self._window_s = self._lookahead()
        self._threads = threads if self._update_dim >= _SERIAL_BELOW else 1
        self._pool = ThreadPoolExecutor(self._threads, "node") if self._threads > 1 else None

        self._now = 0.0
        self._sequence = 0
        self._queue: list[tuple[float, int, Item]] = []
        self._uplinks = [Uplink(self.links.bits_per_s(i)) for i in range(self.num_nodes)]
        self._crashed: set[int] = set()
        self._joined = [0] * self.num_nodes
        self._fired: set[int] = set()
        self._pending: dict[int, int] = {}
        self._losses: dict[int, float] = {}
        self._samples: dict[int, dict[int, Sample]] = {}
        self._votes: dict[int, set[int]] = {}
        self._sent = [[0, 0, 0, 0, 0] for _ in range(self.num_nodes)]
        self._traffic: dict[tuple[int, int], list[int]] = {}
        self._refused: list[tuple[int, int, int, str]] = []
        self._rows: list[Row] = []
        self._told = 0
        self._log: MetricsLog | None = None
        self._failure: Finished | None = None
        self._checkpoint_due: int | None = None
        self._interrupted = False
        self._wall: dict[str, float] = dict.fromkeys(
            ("training", "share and merge", "decoding", "evaluation", "checkpoints", "total"), 0.0
        )

    def _check(self) -> None:
        n = self.num_nodes
        if self.topology.num_nodes != n:
            raise ConfigError("topology", self.topology.num_nodes, f"expected {n} nodes, as nodes.count")
        for path, value in (
            ("links.uplink_mbps", self.links.uplink_mbps),
            ("compute.step_ms", self.compute.step_ms),
        ):
            if isinstance(value, tuple) and len(value) != n:
                raise ConfigError(
                    path, f"{len(value)} numbers", f"expected one number, or one for each of {n} nodes"
                )
        self.faults.check(n, self.rounds, self.deadline_s)

    def _lookahead(self) -> float:
        """Within this many seconds, no node's doing can reach itself or another; see the module's docstring."""
        if self.faults.script:
            return 0.0
        least = min(self.links.latency_ms * 1e-3, self.compute.least_seconds(self.trainer.local_steps))
        return least if self.deadline_s is None else min(least, self.deadline_s)

    # --- Running ------------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> Outcome:
        """Simulate to the end, to divergence or to Ctrl-C.

        Args:
            resume: go on from the newest checkpoint in ``folder``.

        Raises:
            ResumeError: nothing to resume.
            StalledError: nodes wait for ever.
            OSError: e.g. a full disk; the newest checkpoint is intact and can be resumed.
        """
        started = time.perf_counter()
        try:
            with self._listening_to_interrupts():
                self._begin(resume)
                while self._queue and self._failure is None and not self._interrupted:
                    self._step()
                    if self._checkpoint_due is not None:
                        self._save(self._checkpoint_due)
                    self._tell()
                if self._interrupted and self._failure is None and self._queue:
                    if self.folder is not None:
                        self._save(self._least_round())
                    return Outcome("interrupted", self._rows, None, self._refused)
                if self._failure is None:
                    self._check_not_stalled()
                self._wall["total"] = time.perf_counter() - started
                return self._end()
        finally:
            if self._log is not None:
                self._log.close()
            if self._pool is not None:
                self._pool.shutdown()

    def _begin(self, resume: bool) -> None:
        path = None if self.folder is None else self.folder / "metrics.jsonl"
        if resume:
            if self.folder is None or path is None:
                raise ConfigError("run.folder", None, "resuming needs the folder of the run")
            types = (*STATE_TYPES, *self.sharing.state_types)
            state, _ = checkpoint.latest(self.folder / "checkpoints", types)
            self._log = MetricsLog(path, keep_bytes=state.log_bytes)
            self._rows = list(read_rows(path))
            self._restore(state)
            return
        if self.folder is not None and path is not None:
            if any((self.folder / "checkpoints").glob("round-*")):
                raise ResumeError(
                    f"{self.folder} holds another run's checkpoints: resume it, or choose another folder"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = MetricsLog(path, keep_bytes=0)
        self._append(self.start_row)
        for node in self._nodes:
            self._carry_out(node.id, node.start(0.0), 0.0)

    def _step(self) -> None:
        """Handle all events of one window, then carry out what the nodes command, in order of time."""
        window: list[tuple[float, int, Item]] = [heapq.heappop(self._queue)]
        end = window[0][0] + self._window_s
        while self._queue and self._queue[0][0] < end:
            window.append(heapq.heappop(self._queue))
        if any(isinstance(item, TrainedDue) and item.node in self._pending for _, _, item in window):
            self._train()
        self._decode(window)
        work: dict[int, list[tuple[int, float, Event]]] = {}
        for index, (at, _, item) in enumerate(window):
            event = self._event(item)
            if event is not None and item.node not in self._crashed:
                work.setdefault(item.node, []).append((index, at, event))
        commands: dict[int, list[Command]] = {}
        with self._timed("share and merge"):
            for results in self._map(self._handle, list(work.items())):
                commands.update(results)
        for index, (at, _, item) in enumerate(window):
            self._now = at
            if isinstance(item, UplinkDue):
                self._on_uplink(item, at)
            else:
                self._carry_out(item.node, commands.get(index, []), at)

    def _handle(self, work: tuple[int, list[tuple[int, float, Event]]]) -> dict[int, list[Command]]:
        node, events = work
        return {index: self._nodes[node].handle(event, at) for index, at, event in events}

    def _event(self, item: Item) -> Event | None:
        match item:
            case TrainedDue(node, round):
                return Trained(round, self.trainer.params[node])
            case Arrival(_, parcel):
                assert parcel.message is not None
                if isinstance(parcel.message, Frame):
                    return FrameReceived(parcel.message)
                return KeyRequested(parcel.sender)
            case TickDue():
                return Tick()
            case LossNoticed(_, peer):
                return PeerLost(peer)
            case UplinkDue():
                return None

    def _train(self) -> None:
        with self._timed("training"):
            self._losses.update(self.trainer.train(self._pending))
        self._pending = {}

    def _decode(self, window: Sequence[tuple[float, int, Item]]) -> None:
        parcels = {id(item.parcel): item.parcel for _, _, item in window if isinstance(item, Arrival)}
        with self._timed("decoding"):
            self._map(self._unpack, [p for p in parcels.values() if p.message is None])

    def _unpack(self, parcel: Parcel) -> None:
        message = unpack(parcel.data, self.codec, self.digest, dim=self._update_dim)
        assert isinstance(message, (Frame, KeyRequest))
        parcel.message = message

    def _map(self, function: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """``function`` of each item, in order; on threads where that pays."""
        if self._pool is None or len(items) < 2:
            return [function(item) for item in items]
        return list(self._pool.map(function, items))

    # --- What nodes command -------------------------------------------------------------------------------

    def _carry_out(self, node: int, commands: Sequence[Command], now: float) -> None:
        for command in commands:
            if node in self._crashed:
                return
            match command:
                case Train(round, params):
                    self._on_train(node, round, params, now)
                case Send(to, round, packed, key):
                    self._on_send(node, to, round, packed, key, now)
                case RequestKey(to, packed):
                    self._count(node, to, 4, len(packed.data))
                    self._transmit(node, to, Parcel(node, packed.data), now)
                case Evaluate(round, params):
                    self._on_evaluate(node, round, params, now)
                case Checkpoint(round):
                    self._votes.setdefault(round, set()).add(node)
                    if self._votes[round] >= self._expected(round):
                        del self._votes[round]
                        self._checkpoint_due = round
                case WakeAt(at):
                    self._push(at, TickDue(node))
                case Refused(sender, round, reason):
                    self._refused.append((node, sender, round, reason))
                case Finished(status="diverged"):
                    self._failure = self._failure or command

    def _on_train(self, node: int, round: int, params: Tensor, now: float) -> None:
        for index, fault in enumerate(self.faults.script):
            if index in self._fired:
                continue
            if fault.kind == "rejoin" and fault.round <= round and fault.node in self._crashed:
                self._fired.add(index)
                self._on_rejoin(fault.node, round, now)
            elif fault.kind == "crash" and fault.node == node and fault.round <= round:
                self._fired.add(index)
                self._on_crash(node, now)
                return
        self.trainer.params[node].copy_(params)
        self._pending[node] = round
        due = now + self.compute.seconds(self.seed, node, round, self.trainer.local_steps)
        self._push(due, TrainedDue(node, round))

    def _on_send(self, node: int, to: Sequence[int], round: int, packed: Packed, key: bool, now: float) -> None:
        parcel = Parcel(node, packed.data)
        for receiver in to:
            if key:
                self._count(node, receiver, 3, len(packed.data))
            else:
                self._count(node, receiver, 0, packed.positions_bytes)
                self._count(node, receiver, 1, packed.values_bytes)
                self._count(node, receiver, 2, packed.header_bytes)
            extra_s, dropped = 0.0, False
            for fault in self.faults.script:
                if (
                    (fault.node, fault.round) == (node, round)
                    and fault.receiver in (None, receiver)
                    and not key
                ):
                    dropped |= fault.kind == "drop"
                    extra_s += fault.seconds if fault.kind == "delay" else 0.0
            self._transmit(node, receiver, parcel, now, extra_s, dropped)

    def _transmit(
        self, node: int, to: int, parcel: Parcel, now: float, extra_s: float = 0.0, dropped: bool = False
    ) -> None:
        uplink = self._uplinks[node]
        uplink.add(now, 8 * len(parcel.data), to, parcel, extra_s, dropped)
        self._push(uplink.next_time(), UplinkDue(node, uplink.version))

    def _on_uplink(self, item: UplinkDue, now: float) -> None:
        uplink = self._uplinks[item.node]
        if item.version != uplink.version:
            return
        for flow in uplink.pop(now):
            if not flow.dropped:
                self._push(now + self.links.latency_ms * 1e-3 + flow.extra_s, Arrival(flow.to, flow.parcel))
        if uplink.flows:
            self._push(uplink.next_time(), UplinkDue(item.node, uplink.version))

    def _count(self, source: int, target: int, column: int, size_bytes: int) -> None:
        self._sent[source][column] += size_bytes
        self._traffic.setdefault((source, target), [0, 0, 0, 0, 0])[column] += size_bytes

    def _push(self, at: float, item: Item) -> None:
        heapq.heappush(self._queue, (at, self._sequence, item))
        self._sequence += 1

    # --- Faults -------------------------------------------------------------------------------------------

    def _on_crash(self, node: int, now: float) -> None:
        self._crashed.add(node)
        self._pending.pop(node, None)
        self._uplinks[node].clear(now)
        for peer in range(self.num_nodes):
            if peer != node and peer not in self._crashed:
                self._push(now + self.links.latency_ms * 1e-3, LossNoticed(peer, node))
        for completed in sorted(self._samples):
            self._evaluate_if_complete(completed)

    def _on_rejoin(self, node: int, round: int, now: float) -> None:
        """The node introduces itself to all others before it trains, so they expect it from ``round`` on."""
        stale = (Arrival, TickDue, TrainedDue)
        self._queue = [
            entry
            for entry in self._queue
            if not (isinstance(entry[2], LossNoticed) and node in (entry[2].peer, entry[2].node))
            and not (isinstance(entry[2], stale) and entry[2].node == node)
        ]
        heapq.heapify(self._queue)
        self._crashed.discard(node)
        self._joined[node] = round
        live = frozenset(range(self.num_nodes)) - self._crashed
        back = self._nodes[node]
        self._carry_out(node, back.handle(RosterChanged(live - {node}, round), now), now)
        for peer in sorted(live - {node}):
            self._carry_out(peer, self._nodes[peer].handle(PeerUp(node, round), now), now)
        self._carry_out(node, back.rejoin(round, now), now)

    def _expected(self, round: int) -> set[int]:
        """Nodes that will complete ``round`` rounds, or have."""
        return {i for i in range(self.num_nodes) if i not in self._crashed and self._joined[i] < max(round, 1)}

    # --- Measuring ----------------------------------------------------------------------------------------

    def _on_evaluate(self, node: int, round: int, params: Tensor, now: float) -> None:
        sample = Sample(
            params, self.trainer.buffers(node), self._losses.get(node), tuple(self._sent[node]), now
        )
        self._samples.setdefault(round, {})[node] = sample
        self._evaluate_if_complete(round)

    def _evaluate_if_complete(self, round: int) -> None:
        samples = self._samples[round]
        if not samples.keys() >= self._expected(round):
            return
        del self._samples[round]
        with self._timed("evaluation"):
            self._append(self._evaluate(round, samples))

    def _evaluate(self, round: int, samples: Mapping[int, Sample]) -> EvalRow:
        nodes = sorted(samples)
        early = self.early_samples
        tested = early if early is not None and round < self.early_before else self.samples
        rows = torch.stack([samples[i].params for i in nodes])
        every_buffers = [samples[i].buffers for i in nodes]
        average = rows.mean(dim=0, dtype=torch.float64).to(torch.float32)
        if round == 0:  # all nodes start from the same model
            one = self.trainer.evaluate(rows[:1], nodes[:1], tested.common)
            values = {name: value.expand(len(nodes)).clone() for name, value in one.items()}
            of_average = {name: float(value[0]) for name, value in one.items()}
            distance = 0.0
        else:
            values = self.trainer.evaluate(rows, nodes, tested.common, buffers=every_buffers)
            at_average = self.trainer.evaluate(
                average[None], [-1], tested.common, buffers=[_mean_buffers(every_buffers)]
            )
            of_average = {name: float(value[0]) for name, value in at_average.items()}
            squares = torch.stack([(row.double() - average).square().sum() for row in rows])
            distance = float(squares.mean().sqrt())
        metrics = {name: _spread(value, of_average[name]) for name, value in values.items()}
        per_node = {name: [_finite(v) for v in value.tolist()] for name, value in values.items()}
        for name, own in self._evaluate_own(tested.own, nodes, rows, every_buffers).items():
            metrics[name] = _spread_of_present(own)
            per_node[name] = [v if v is None else _finite(v) for v in own]
        losses = [loss for i in nodes if (loss := samples[i].loss) is not None]
        # Of nodes that are down or came back later, all they have sent: no byte is taken back.
        counts = [samples[i].sent if i in samples else self._sent[i] for i in range(self.num_nodes)]
        sent = [sum(column) for column in zip(*counts, strict=True)]
        return EvalRow(
            round=round,
            time_s=max(sample.time for sample in samples.values()),
            nodes=nodes,
            metrics=metrics,
            per_node=per_node,
            train_loss=_finite(math.fsum(losses) / len(losses)) if losses and round > 0 else None,
            consensus_distance=distance,
            traffic=TrafficSplit(*sent),
            samples=len(self.trainer.task.test) if tested.common is None else len(tested.common),
            early={} if early is None or early is tested else self._early(early, nodes, rows, every_buffers),
        )

    def _early(
        self,
        early: EvaluationSamples,
        nodes: Sequence[int],
        rows: Tensor,
        buffers: Sequence[Mapping[str, Tensor]],
    ) -> dict[str, float | None]:
        """At a late evaluation, each metric's mean over nodes on the samples of the early ones."""
        common = self.trainer.evaluate(rows, nodes, early.common, buffers=buffers)
        means = {name: _finite(float(value.mean())) for name, value in common.items()}
        own = self._evaluate_own(early.own, nodes, rows, buffers)
        return means | {name: _spread_of_present(values).mean for name, values in own.items()}

    def _evaluate_own(
        self,
        own: Sequence[Tensor] | None,
        nodes: Sequence[int],
        rows: Tensor,
        buffers: Sequence[Mapping[str, Tensor]],
    ) -> dict[str, list[float | None]]:
        """Each node on its own test samples: ``own_<metric>`` to one number per node, None without samples."""
        found: dict[str, list[float | None]] = {}
        if own is None:
            return found
        for index, node in enumerate(nodes):
            if not len(own[node]):
                continue
            values = self.trainer.evaluate(rows[index : index + 1], [node], own[node], buffers=[buffers[index]])
            for name, value in values.items():
                found.setdefault(f"own_{name}", [None] * len(nodes))[index] = float(value[0])
        return found

    def _append(self, row: Row) -> None:
        self._rows.append(row)
        if self._log is not None:
            self._log.append(row)

    def _tell(self) -> None:
        if self.on_progress is None:
            return
        row = self._rows[-1] if len(self._rows) > self._told else None
        self._told = len(self._rows)
        self.on_progress(
            Progress(
                self._least_round(),
                self.rounds,
                self._now,
                sum(map(sum, self._sent)),
                row if isinstance(row, EvalRow) else None,
            )
        )

    def _least_round(self) -> int:
        """Rounds completed by every live node."""
        return min((node.round for node in self._nodes if node.id not in self._crashed), default=self.rounds)

    def _check_not_stalled(self) -> None:
        waiting = [node for node in self._nodes if node.id not in self._crashed and node.phase is Phase.WAITING]
        if waiting:
            node = waiting[0]
            raise StalledError(
                f"{len(waiting)} nodes wait for ever: node {node.id} in round {node.round} for frames of "
                f"{', '.join(map(str, node.waiting_for))}; set run.deadline_s to go on without them"
            )

    # --- The end, and coming back -------------------------------------------------------------------------

    def _end(self) -> Outcome:
        params = torch.stack([node.params for node in self._nodes])
        failure = self._failure
        traffic = [
            Traffic(source, target, TrafficSplit(*columns))
            for (source, target), columns in sorted(self._traffic.items())
        ]
        if self.folder is not None:
            self._write_models(params)
        self._append(
            EndRow(
                status="finished" if failure is None else failure.status,
                round=self._least_round() if failure is None else failure.round,
                time_s=self._now,
                reason="" if failure is None else failure.reason,
                sha256=hashlib.sha256(params.cpu().numpy().astype("<f4", copy=False).tobytes()).hexdigest(),
                traffic=traffic,
                wall_s={name: round(seconds, 3) for name, seconds in self._wall.items()},
            )
        )
        if self._log is not None:
            self._log.sync()
        status = "finished" if failure is None else failure.status
        return Outcome(status, self._rows, params, self._refused)

    def _write_models(self, params: Tensor) -> None:
        assert self.folder is not None
        final = self.folder / "final"
        final.mkdir(parents=True, exist_ok=True)
        for node in range(self.num_nodes):
            tensors = self.trainer.layout.state_dict(
                params[node].cpu(), self.trainer.buffers(node), self.trainer.frozen
            )
            write_atomically(final / f"node-{node}.safetensors", save(dict(tensors)))

    def _save(self, round: int) -> None:
        """Write a checkpoint; the rows it counts on are on the disk before it is."""
        self._checkpoint_due = None
        if self.folder is None:
            return
        with self._timed("checkpoints"):
            assert self._log is not None
            self._log.sync()
            state = SimulatorState(
                log_bytes=self._log.size_bytes,
                now=self._now,
                sequence=self._sequence,
                queue=tuple((at, order, self._stored(item)) for at, order, item in self._queue),
                uplinks=tuple(
                    (u.time, u.served, u.version, u.orders, tuple(self._stored(f) for _, _, f in u.flows))
                    for u in self._uplinks
                ),
                nodes=tuple(node.snapshot() for node in self._nodes),
                crashed=frozenset(self._crashed),
                joined=tuple(self._joined),
                fired=frozenset(self._fired),
                pending=dict(self._pending),
                # Trained already, and not yet reported to the node: the row is the only place of the result.
                rows={
                    item.node: self.trainer.params[item.node]
                    for _, _, item in self._queue
                    if isinstance(item, TrainedDue) and item.node not in self._pending
                },
                losses=dict(self._losses),
                samples={r: dict(samples) for r, samples in self._samples.items()},
                votes={r: frozenset(votes) for r, votes in self._votes.items()},
                sent=tuple(map(tuple, self._sent)),
                traffic={edge: tuple(columns) for edge, columns in self._traffic.items()},
                refused=tuple(self._refused),
                trainer=self.trainer.state(),
            )
            checkpoint.write(self.folder / "checkpoints", round, state)

    def _stored(self, item: Stored) -> Stored:
        """An item as it is saved: with bytes that can be decoded again, or else with what they decode to."""
        if not isinstance(item, (Arrival, Flow)):
            return item
        parcel = item.parcel
        if self.codec.accepts_foreign:
            return replace(item, parcel=Parcel(parcel.sender, parcel.data))
        if parcel.message is None:
            self._unpack(parcel)
        return item

    def _restore(self, state: SimulatorState) -> None:
        self._now = state.now
        self._sequence = state.sequence
        parcels: dict[int, Parcel] = {}

        def shared(parcel: Parcel) -> Parcel:
            """One parcel for all receivers again, so that it is decoded once."""
            return parcels.setdefault(id(parcel.data), parcel)

        self._queue = [
            (at, order, Arrival(item.node, shared(item.parcel)) if isinstance(item, Arrival) else item)
            for at, order, item in state.queue
        ]
        heapq.heapify(self._queue)
        for uplink, (at, served, version, orders, flows) in zip(self._uplinks, state.uplinks, strict=True):
            uplink.time, uplink.served, uplink.version, uplink.orders = at, served, version, orders
            uplink.flows = [(f.finish, f.order, replace(f, parcel=shared(f.parcel))) for f in flows]
            heapq.heapify(uplink.flows)
        device = self.trainer.device
        for node, node_state in zip(self._nodes, state.nodes, strict=True):
            node.restore(node_state)
        self._crashed = set(state.crashed)
        self._joined = list(state.joined)
        self._fired = set(state.fired)
        self._pending = dict(state.pending)
        for i in self._pending:
            self.trainer.params[i].copy_(self._nodes[i].params)
        for i, row in state.rows.items():
            self.trainer.params[i].copy_(row.to(device))
        self._losses = dict(state.losses)
        self._samples = {r: dict(samples) for r, samples in state.samples.items()}
        self._votes = {r: set(votes) for r, votes in state.votes.items()}
        self._sent = [list(columns) for columns in state.sent]
        self._traffic = {edge: list(columns) for edge, columns in state.traffic.items()}
        self._refused = list(state.refused)
        self.trainer.load_state_(state.trainer)

    # --- Small print --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _timed(self, activity: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._wall[activity] += time.perf_counter() - started

    @contextlib.contextmanager
    def _listening_to_interrupts(self) -> Iterator[None]:
        """Ctrl-C ends the run after the current step, with a checkpoint; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_interrupt(number: int, frame: object) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _spread_of_present(values: Sequence[float | None]) -> Spread:
    """Over the nodes that have the metric."""
    present = [v for v in values if v is not None]
    if not present:
        return Spread(None, None, None, None)
    return _spread(torch.tensor(present, dtype=torch.float64), math.nan)


def _spread(values: Tensor, of_average: float) -> Spread:
    return Spread(
        _finite(float(values.mean())),
        _finite(float(values.std(unbiased=False))),
        _finite(float(values.min())),
        _finite(float(values.max())),
        _finite(of_average),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean_buffers(all_buffers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Floating-point buffers averaged over the nodes; of integer ones, the first node's."""
    return {
        name: torch.stack([buffers[name] for buffers in all_buffers]).mean(dim=0)
        if first.is_floating_point()
        else first
        for name, first in all_buffers[0].items()
    }
