"""The nodes that one process holds: state machines, training, decoding, evaluation and snapshots.

A *driver* feeds node groups with events: it decides which event happens to which node and when, and carries out
the nodes' commands. Plain data cross this interface:

- in: each :class:`ScheduledEvent` of a node, with messages as :class:`Envelope` references;
- out: the commands of :mod:`jwins.node`, which hold numbers and encoded bytes.

A driver touches no tensor. A node group has no clock and no way to reach another node. So a driver can drive
node groups in other processes, and the same node group serves the simulated driver and the real-time one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save
from torch import Tensor

from jwins.engines.evaluation_results import (
    AverageModel,
    EvalResult,
    EvaluationPlan,
    EvaluationSamples,
    PartialSum,
    squared_distance,
    tree_sums,
)
from jwins.errors import UsageError
from jwins.node import (
    STATE_TYPES as NODE_TYPES,
)
from jwins.node import (
    Command,
    Evaluate,
    Event,
    Finished,
    FrameReceived,
    KeyframeRequested,
    Node,
    NodeState,
    PeerLost,
    PeerUp,
    Phase,
    Rejoin,
    RosterChanged,
    Rules,
    Stop,
    Tick,
    TimedOut,
    Train,
    Trained,
)
from jwins.training.evaluation import EvalRequest
from jwins.training.node_store import LocalState
from jwins.training.thread_pool import ThreadPool
from jwins.training.trainer import Trainer
from jwins.wire.codec import Raw
from jwins.wire.frame import Frame, KeyframeRequest, Message, Packed

if TYPE_CHECKING:
    from jwins.engines.ray.node_group import RemoteNodeGroup

SERIAL_BELOW = 16_384
"""Below this dimension, passing a node's work to a thread takes longer than the work."""
ENCODE_APART_FROM = 2048
"""From this dimension on, compressing an update takes several times as long as passing it to a thread."""
DECODE_APART_FROM = 8192
"""The same for decompressing it."""

# --- The interface between driver and node group ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Envelope:
    """A message under way, which a driver passes on without decoding it.

    Attributes:
        number: number of the message, unique in a run.
        packed: its bytes, and their count by kind; shared by all receivers.
    """

    number: int
    sender: int
    packed: Packed


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """The duration of local training of ``round`` has passed; the node group trains now at the latest."""

    round: int


@dataclass(frozen=True, slots=True)
class MessageArrived:
    """The message of ``envelope`` reaches the node."""

    envelope: Envelope


NodeGroupEvent = (
    TrainingDone | MessageArrived | PeerUp | PeerLost | RosterChanged | Rejoin | Tick | TimedOut | Stop
)


@dataclass(frozen=True, slots=True)
class ScheduledEvent:
    """An event of a node at a time.

    Attributes:
        time: seconds on the clock.
    """

    node: int
    time: float
    event: NodeGroupEvent


# --- Checkpoints --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class WaitingModel:
    """One node's model after a number of rounds, until it is measured.

    Attributes:
        params: (P,) float32.
        buffers: its local buffers by name.
        loss: mean training loss of its last round; None before the first.
    """

    params: Tensor
    buffers: Mapping[str, Tensor]
    loss: float | None


@dataclass(frozen=True, slots=True, eq=False)
class NodeSnapshot:
    """State of one node in a node group.

    Attributes:
        trained: (P,) float32, result of a training that the node has not received yet; else None.
        models: its models that wait for an evaluation, by completed rounds.
        present: in an asynchronous run, its model at the start of the round.
    """

    node: NodeState
    local: LocalState
    trained: Tensor | None
    loss: float | None
    models: Mapping[int, WaitingModel]
    present: WaitingModel | None = None


@dataclass(frozen=True, slots=True, eq=False)
class NodeGroupState:
    """A node group's shard of a checkpoint, by node: any node group that holds one of the nodes can continue
    with it.

    Attributes:
        messages: decoded messages under way, by number, if only the process that encoded them can decode them.
    """

    nodes: Mapping[int, NodeSnapshot]
    messages: Mapping[int, Frame | KeyframeRequest] = field(default_factory=dict)


STATE_TYPES: tuple[type, ...] = (
    *NODE_TYPES,
    NodeSnapshot,
    NodeGroupState,
    KeyframeRequest,
    LocalState,
    WaitingModel,
)
"""Types in a node group's shard of a checkpoint, besides the ``state_types`` of its algorithm."""


# --- The node group -----------------------------------------------------------------------------------------


class NodeGroup:
    """Some nodes of a run, all in this process.

    Args:
        trainer: local training of these nodes.
        threads: Python threads for the nodes' own work (training has its own setting).

    Attributes:
        nodes: their numbers, increasing.
        local_steps: optimizer steps per round, by node.
        wall_s: real seconds spent so far, by activity.
    """

    def __init__(
        self, trainer: Trainer, rules: Rules, *, tests: EvaluationPlan | None = None, threads: int = 1
    ) -> None:
        self.nodes = trainer.nodes
        self.rules = rules
        self.local_steps: Mapping[int, int] = trainer.steps
        self.wall_s = dict.fromkeys(("training", "share and merge", "decoding", "evaluation"), 0.0)
        self.trainer = trainer
        self._tests = tests or EvaluationPlan()
        initial = trainer.initial()
        self._nodes = {node: Node(node, initial, rules) for node in self.nodes}
        self._losses: dict[int, float] = {}
        self._trained: set[int] = set()
        self._untrained: dict[int, dict[int, int]] = {}
        self._waiting: dict[int, dict[int, WaitingModel]] = {}
        self._present: dict[int, WaitingModel] = {}
        self._measured: Mapping[int, WaitingModel] = {}
        self._final: Mapping[int, WaitingModel] = {}
        self._messages: WeakKeyDictionary[Envelope, Frame | KeyframeRequest] = WeakKeyDictionary()
        self._kept: dict[int, Frame | KeyframeRequest] = {}
        self._pool = ThreadPool(threads, "jwins-node")
        self._threads = threads if rules.wire.dim >= SERIAL_BELOW else 1
        # Threads that train also encode. Where fewer train, as stacks do, the others encode meanwhile.
        compresses = rules.wire.codec.name != Raw.name and rules.wire.dim >= ENCODE_APART_FROM
        self._encodes_apart = compresses and trainer.threads < threads

    # --- Rounds ---------------------------------------------------------------------------------------------

    def start(self, now: float) -> dict[int, list[Command]]:
        """Begin round 0, and return each node's commands."""
        found = {}
        for node, machine in self._nodes.items():
            found[node] = machine.start(now)
            self._prepare(node, found[node])
        return found

    def train(self, rounds: Mapping[int, int]) -> None:
        """Train these nodes. Each then has to receive a :class:`TrainingDone`.

        Args:
            rounds: the round of each node that trains, as in its last command.
        """
        self._train(rounds, lambda node: None)

    def handle(
        self, due: Sequence[ScheduledEvent], train: Mapping[int, int] | None = None
    ) -> list[list[Command]]:
        """Deliver events to the nodes; different nodes run on different threads.

        Args:
            due: events in order of time, for nodes of this node group.
            train: the round of each node that may train from now on, as in :meth:`train`. It trains when its
                :class:`TrainingDone` or that of another node of its stack is due. A node continues on the same
                thread as soon as its own training has ended, while its row is still in the cache.

        Returns:
            The node's commands for each event.
        """
        with timed(self.wall_s, "decoding"):
            self._decode([item.event.envelope for item in due if isinstance(item.event, MessageArrived)])
        work: dict[int, list[int]] = {}
        for index, item in enumerate(due):
            work.setdefault(item.node, []).append(index)
        commands: list[list[Command]] = [[] for _ in due]
        encoding: list[tuple[Frame, Callable[[], Packed], list[int]]] = []

        def handle_all(worker: int, indices: list[int]) -> None:
            for at, index in enumerate(indices):
                item = due[index]
                node, event = self._machine(item.node), self._event(item)
                if self._encodes_apart and isinstance(event, Trained) and node.phase is Phase.TRAINING:
                    frame = node.share(event)
                    if isinstance(frame, Frame):  # the node goes on when its frame is encoded
                        packed = self._pool.submit(self.rules.wire.pack, frame)
                        encoding.append((frame, packed, indices[at:]))
                        return
                    commands[index] = frame
                else:
                    commands[index] = node.handle(event, item.time)
                self._prepare(item.node, commands[index])

        if train := self._due_to_train(due, train or {}):
            self._train(train, lambda node: handle_all(0, work.pop(node, [])))
        with timed(self.wall_s, "share and merge"):
            self._pool.run(list(work.values()), handle_all, self._threads)
            for frame, packed, (index, *later) in encoding:
                node = self._machine(frame.sender)
                commands[index] = node.send(frame.update.base, packed(), due[index].time)
                self._prepare(frame.sender, commands[index])
                handle_all(0, later)
        return commands

    def _due_to_train(self, due: Sequence[ScheduledEvent], train: Mapping[int, int]) -> dict[int, int]:
        """Return the rounds of all nodes in whose stacks a training has ended, and keep the others for later.

        Training one node of a stack takes the same time as training all of them.
        """
        for node, at in train.items():
            self._untrained.setdefault(self.trainer.train_batch_of(node), {})[node] = at
        found: dict[int, int] = {}
        for item in due:
            if isinstance(item.event, TrainingDone):
                stack = self.trainer.train_batch_of(item.node)
                if item.node in self._untrained.get(stack, ()):
                    found |= self._untrained.pop(stack)
        return found

    def _train(self, rounds: Mapping[int, int], go_on: Callable[[int], None]) -> None:
        started, elsewhere = time.perf_counter(), []

        def then(node: int, loss: float) -> None:
            begun = time.perf_counter()
            self._losses[node] = loss
            self._trained.add(node)
            go_on(node)
            elsewhere.append(time.perf_counter() - begun)

        trains = self.rules.trains
        self.trainer.train({node: at for node, at in rounds.items() if trains(node, at)}, then)
        for node in (node for node, at in rounds.items() if not trains(node, at)):  # its row does not change
            self._trained.add(node)
            go_on(node)
        spent = time.perf_counter() - started
        other = sum(elsewhere) / self.trainer.threads
        self.wall_s["training"] += spent - other
        self.wall_s["share and merge"] += other

    def _machine(self, node: int) -> Node:
        machine = self._nodes.get(node)
        if machine is None:
            raise UsageError(f"node {node} is not among the {len(self.nodes)} nodes of this node group")
        return machine

    def _event(self, item: ScheduledEvent) -> Event:
        match item.event:
            case TrainingDone(round):
                self._trained.discard(item.node)
                return Trained(round, self.trainer.take_row(item.node))
            case MessageArrived(envelope):
                message = self._messages[envelope]
                if isinstance(message, Frame):
                    return FrameReceived(message)
                return KeyframeRequested(envelope.sender, message.round, message.replica_round)
            case event:
                return event

    def _prepare(self, node: int, commands: Sequence[Command]) -> None:
        """Copy the data that commands refer to, before the node handles another event."""
        for command in commands:
            if isinstance(command, Train):
                self.trainer.load_row_(node, self._nodes[node].params)
            if node in self.rules.attacks:
                continue
            if isinstance(command, Evaluate) and not self.rules.asynchronous:
                self._waiting.setdefault(command.round, {})[node] = self._model_of(node)
            elif isinstance(command, Train | Finished) and self.rules.asynchronous:
                self._present[node] = self._model_of(node)  # before it trains, which changes its buffers

    def _model_of(self, node: int) -> WaitingModel:
        return WaitingModel(self._nodes[node].model, self.trainer.buffers(node), self._losses.get(node))

    def read(self, envelope: Envelope) -> Message:
        """Decode an envelope of another machine before a node sees it.

        Frames and requests are kept for the :class:`MessageArrived` of the same envelope.

        Raises:
            CodecError: the bytes are not a message of this experiment.
        """
        with timed(self.wall_s, "decoding"):
            message = self.rules.wire.unpack(envelope.packed.data)
        if isinstance(message, (Frame, KeyframeRequest)):
            self._messages[envelope] = message
        return message

    def _decode(self, envelopes: Sequence[Envelope]) -> None:
        """Decode once for all receivers here; the result lives as long as the driver has the envelope."""

        def decode(worker: int, envelope: Envelope) -> None:
            message = self._kept.pop(envelope.number, None) or self.rules.wire.unpack(envelope.packed.data)
            assert isinstance(message, (Frame, KeyframeRequest))
            self._messages[envelope] = message

        fresh = [envelope for envelope in dict.fromkeys(envelopes) if envelope not in self._messages]
        self._pool.run(fresh, decode, None if self.rules.wire.dim >= DECODE_APART_FROM else 1)

    # --- Measuring ------------------------------------------------------------------------------------------

    def num_samples(self, round: int) -> int:
        """Return the number of common test samples of the evaluation after ``round`` completed rounds."""
        common = self._tests.of(round).common
        return len(self.trainer.task.test) if common is None else len(common)

    def sums(
        self, round: int, present: Collection[int] = ()
    ) -> tuple[list[PartialSum], dict[int, Mapping[str, Tensor]]]:
        """Return the contributions of the waiting models to the average.

        Args:
            round: completed rounds.
            present: nodes of which the present models are used, in an asynchronous run.

        Returns:
            Sums of parameters, and each node's local buffers.
        """
        for node in self._present.keys() & present:
            self._waiting.setdefault(round, {})[node] = self._present[node]
        models = self._waiting.get(round, {})
        with timed(self.wall_s, "evaluation"):
            leaves = ((node, models[node].params if node in models else None) for node in self.nodes)
            return tree_sums(leaves), {node: model.buffers for node, model in models.items()}

    def measure(
        self, round: int, average: AverageModel, *, test_average: bool, keep: bool = False
    ) -> EvalResult:
        """Test the models that wait for an evaluation, and discard them.

        Args:
            round: completed rounds; after 0 rounds all models are equal, and one is tested for all.
            average: mean of all nodes' models.
            test_average: whether to test it, too.
            keep: whether to keep the models until the next evaluation, for :meth:`measured_file` and
                :meth:`end_with_measured`.
        """
        with timed(self.wall_s, "evaluation"):
            models = self._waiting.pop(round, {})
            if keep:
                self._measured = models
            return self._measure(round, dict(sorted(models.items())), average, test_average)

    def _measure(
        self, round: int, models: Mapping[int, WaitingModel], average: AverageModel, test_average: bool
    ) -> EvalResult:
        nodes, used = list(models), self._tests.of(round)
        device = self.trainer.device
        first = nodes[:1] if round == 0 else nodes
        requests = self._common_requests(round, {node: models[node] for node in first}, used)
        if test_average and round > 0:
            requests.append(EvalRequest(average.params[None].to(device), [-1], [average.buffers], used.common))
        own = {node: used.own[node] for node in nodes if used.own is not None and len(used.own[node])}
        for node, positions in own.items():
            row, buffers = models[node].params[None], [models[node].buffers]
            requests.append(EvalRequest(row, [node], buffers, positions, self._tests.own_early(round, node)))
        scores = self.trainer.evaluate_all(requests)
        common = scores[: len(requests) - len(own) - bool(test_average and round > 0)]
        metrics, early = ({}, {}) if not common else (common[0].all, common[0].some)
        by_node = _spread_to if round == 0 else _listed
        found, early_found = by_node(nodes, metrics), by_node(nodes, early)
        of_average = metrics if round == 0 else scores[len(common)].all if test_average else {}
        own_found: dict[str, dict[int, float]] = {}
        for node, score in zip(own, scores[len(scores) - len(own) :], strict=True):
            for name, values in score.all.items():
                own_found.setdefault(name, {})[node] = float(values[0])
            for name, values in score.some.items():
                early_found.setdefault(f"own_{name}", {})[node] = float(values[0])
        mean = average.params.to(device)
        return EvalResult(
            metrics=found,
            own=own_found,
            early=early_found,
            losses={node: loss for node in nodes if (loss := models[node].loss) is not None},
            squares={node: squared_distance(models[node].params, mean) for node in nodes if round > 0},
            of_average={name: float(v[0]) for name, v in of_average.items()} if test_average else None,
            epsilon=self._epsilon(round, nodes),
        )

    def _epsilon(self, round: int, nodes: Sequence[int]) -> dict[int, float]:
        """Return the epsilon of each node, as if it had trained in all its rounds so far."""
        privacy = self.trainer.privacy
        if privacy is None:
            return {}
        ended = {node: self.round(node) if self.rules.asynchronous else round for node in nodes}
        trained = Counter(node for node in nodes for at in range(ended[node]) if self.rules.trains(node, at))
        return {node: privacy.epsilon(node, self.local_steps[node] * trained[node]) for node in nodes}

    def _common_requests(
        self, round: int, models: Mapping[int, WaitingModel], used: EvaluationSamples
    ) -> list[EvalRequest]:
        if not models:
            return []
        early = self._tests.common_early(round, len(self.trainer.task.test))
        rows = torch.stack([model.params for model in models.values()])
        buffers = [model.buffers for model in models.values()]
        names = list(models) if round > 0 else [0]  # the same draws on every node group that tests the model
        return [EvalRequest(rows, names, buffers, used.common, early, stacked=round > 0)]

    # --- End and resuming -----------------------------------------------------------------------------------

    def stalled(self, nodes: Sequence[int]) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Return the waiting nodes among these, with their round and the missing senders."""
        machines = [self._nodes[node] for node in nodes]
        return {m.id: (m.round, m.waiting_for) for m in machines if m.phase is Phase.WAITING}

    def machine(self, node: int) -> Node:
        """Return the state machine of a node of this process, for inspection."""
        return self._machine(node)

    def round(self, node: int) -> int:
        """Return the number of rounds that a node has completed."""
        return self._nodes[node].round

    def end_with_measured(self) -> None:
        """Use the models of the last evaluation as the final models of the measured nodes.

        When an evaluation is complete, some nodes are already rounds ahead.
        """
        self._final = self._measured

    def parameters(self, node: int) -> Tensor:
        """Return a node's current parameters, or its final ones, (P,) float32 on the CPU."""
        final = self._final.get(node)
        return (self._nodes[node].params if final is None else final.params).cpu()

    def model_file(self, node: int) -> bytes:
        """Return a node's model as a safetensors file for ``load_state_dict``."""
        final = self._final.get(node)
        return self._file_of(
            self.parameters(node), self.trainer.buffers(node) if final is None else final.buffers
        )

    def measured_file(self, node: int) -> bytes:
        """Return a node's model at the last evaluation, if it was kept, as :meth:`model_file` does."""
        model = self._measured[node]
        return self._file_of(model.params.cpu(), model.buffers)

    def _file_of(self, params: Tensor, buffers: Mapping[str, Tensor]) -> bytes:
        tensors = self.trainer.layout.state_dict(params, buffers, self.trainer.frozen)
        return save(dict(tensors))

    def with_bytes(self, envelopes: Sequence[Envelope]) -> Sequence[Envelope]:
        """Return the envelopes unchanged, because their bytes are in this process."""
        return envelopes

    def snapshot(self, under_way: Sequence[Envelope] = ()) -> NodeGroupState:
        """Return the state for :meth:`restore`, here or on other node groups.

        Args:
            under_way: envelopes that the driver will deliver again. If the codec decodes only bytes of its own
                process, the state keeps the decoded messages.
        """
        for rounds in self._untrained.values():
            self.train(rounds)
        self._untrained = {}
        messages = {}
        if not self.rules.wire.codec.accepts_foreign:
            self._decode(under_way)
            messages = {envelope.number: self._messages[envelope] for envelope in under_way}
        return NodeGroupState({node: self._snapshot_of(node) for node in self.nodes}, messages)

    def _snapshot_of(self, node: int) -> NodeSnapshot:
        models = {at: of[node] for at, of in sorted(self._waiting.items()) if node in of}
        return NodeSnapshot(
            self._nodes[node].snapshot(),
            self.trainer.state(node),
            self.trainer.take_row(node) if node in self._trained else None,
            self._losses.get(node),
            models,
            self._present.get(node),
        )

    def restore(self, state: NodeGroupState) -> None:
        """Continue from a snapshot that contains these nodes, and perhaps others, of this process or another.

        Raises:
            UsageError: a node of this node group is not in the snapshot.
        """
        if missing := [node for node in self.nodes if node not in state.nodes]:
            problem = "it is another member's, or was written with another number of nodes"
            raise UsageError(f"the checkpoint has no node {missing[0]}: {problem}")
        self._kept = dict(state.messages)
        for node in self.nodes:
            held = state.nodes[node]
            machine = self._nodes[node]
            machine.restore(held.node)
            self.trainer.load_state_(node, held.local)
            self.trainer.load_row_(node, machine.params if held.trained is None else held.trained)
            if held.trained is not None:
                self._trained.add(node)
            if held.loss is not None:
                self._losses[node] = held.loss
            for at, model in held.models.items():
                self._waiting.setdefault(at, {})[node] = model
            if held.present is not None:
                self._present[node] = held.present

    def close(self) -> None:
        """End the threads."""
        self._pool.close()


@contextmanager
def timed(wall_s: dict[str, float], activity: str) -> Iterator[None]:
    """Add the real seconds of the block to those of an activity."""
    started = time.perf_counter()
    try:
        yield
    finally:
        wall_s[activity] += time.perf_counter() - started


NodeGroupLike: TypeAlias = "NodeGroup | RemoteNodeGroup"
"""A node group of this process, or the proxy of one elsewhere: both have the methods that a driver calls."""


def _listed(nodes: Sequence[int], values: Mapping[str, Tensor]) -> dict[str, dict[int, float]]:
    return {name: dict(zip(nodes, found.tolist(), strict=True)) for name, found in values.items()}


def _spread_to(nodes: Sequence[int], values: Mapping[str, Tensor]) -> dict[str, dict[int, float]]:
    return {name: dict.fromkeys(nodes, float(found[0])) for name, found in values.items()}
