"""A node group in another process: an actor of a Ray cluster, and its proxy in the driver's process.

The driver's side has only the sizes of a frame. The bytes stay with the actor whose node sent it. For receivers
at other actors they go through Ray's object store, in one object for all frames that a step sends to a machine.
So each frame goes at most once to each machine. Both sides discard a frame when the driver has delivered it to
the last of its receivers.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Concatenate, ParamSpec, TypeVar, cast
from uuid import uuid4
from weakref import finalize

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from jwins.engines.evaluation_results import AverageModel, EvalResult, PartialSum
from jwins.engines.node_group import (
    STATE_TYPES,
    Envelope,
    MessageArrived,
    NodeGroup,
    NodeGroupState,
    ScheduledEvent,
)
from jwins.engines.ray.cluster import Demand
from jwins.errors import ActorLostError, JwinsError, UsageError
from jwins.node import Command, RequestKeyframe, Rules, Send
from jwins.run_folder import checkpoint
from jwins.run_folder.checkpoint import Dumped
from jwins.training.allocator import keep_freed_memory
from jwins.wire.frame import Packed

P = ParamSpec("P")
T = TypeVar("T")

FrameKey = tuple[int, int]
"""Key of a frame: the number of the node group that packed it, and its number there."""

_FROM_CHECKPOINT = -1
"""Number of node group for frames that were under way when a checkpoint was taken."""

_RESERVE_TIMEOUT_S = 120.0
"""Time limit for waiting for cores that others use."""

_MAX_FILES_PER_CALL = 64


@dataclass(frozen=True, slots=True)
class FrameSizes:
    """Description of a frame for the driver."""

    serial: int
    size_bytes: int
    positions_bytes: int
    values_bytes: int


Bundle = Mapping[int, tuple[bytes, int, int]]
"""Frames of one step for one machine, in the object store: by serial number the fields of :class:`Packed`."""


@dataclass(frozen=True, slots=True)
class NewFrame:
    """A frame that an actor's nodes have not received before.

    Attributes:
        source: index of its bundle; None for a frame of this actor; or its bytes.
    """

    key: FrameKey
    sender: int
    source: int | Packed | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of an actor's call.

    Attributes:
        commands: commands of its nodes, by event; frames in them are :class:`FrameSizes`.
        bundles: a :data:`Bundle` in the object store, by machine.
        stored_bytes: bytes of frames in these bundles.
    """

    commands: list[list[Command]]
    bundles: Mapping[str, Any]
    stored_bytes: int


# --- In the actor -------------------------------------------------------------------------------------------


class NodeGroupActor:
    """Actor with a node group. Calls arrive one at a time."""

    def __init__(self) -> None:
        keep_freed_memory()
        self._group: NodeGroup
        self._number = 0
        self._serials = itertools.count()
        self._own: dict[int, Packed] = {}
        self._envelopes: dict[FrameKey, Envelope] = {}
        self._machine_of: dict[int, str] = {}

    def machine(self) -> str:
        """Return the machine of this actor."""
        return str(ray.get_runtime_context().get_node_id())

    def begin(
        self, make: Callable[[], NodeGroup], number: int, machine_of: Mapping[int, str]
    ) -> dict[int, int]:
        """Build the node group; return the optimizer steps of its nodes per round."""
        self._group, self._number = make(), number
        self._machine_of = dict(machine_of)
        return dict(self._group.local_steps)

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the node group."""
        return getattr(self._group, method)(*args, **options)

    def handle(
        self,
        due: Sequence[tuple[int, float, Any]],
        train: Mapping[int, int],
        new_frames: Sequence[NewFrame],
        forgotten: Sequence[FrameKey],
        *bundles: Bundle,
    ) -> StepResult:
        """Deliver events to nodes, as :meth:`NodeGroup.handle` does.

        Args:
            due: node, time and event; the event of an arriving frame is its key.
            train: as in :meth:`NodeGroup.handle`.
            new_frames: frames among these that are new here.
            forgotten: frames that no node will receive again.
            bundles: bundles with new frames.
        """
        for key in forgotten:
            self._envelopes.pop(key, None)
            if key[0] == self._number:
                self._own.pop(key[1], None)
        for one in new_frames:
            if isinstance(one.source, Packed):
                packed = one.source
            elif one.source is None:
                packed = self._own[one.key[1]]
            else:
                packed = Packed(*bundles[one.source][one.key[1]])
            self._envelopes[one.key] = Envelope(one.key[1], one.sender, packed)
        events = [
            ScheduledEvent(
                node, time, MessageArrived(self._envelopes[event]) if isinstance(event, tuple) else event
            )
            for node, time, event in due
        ]
        return self._step(self._group.handle(events, train))

    def _step(self, commands: list[list[Command]]) -> StepResult:
        leaving: dict[str, dict[int, tuple[bytes, int, int]]] = {}

        def without_bytes(command: Command) -> Command:
            if not isinstance(command, Send | RequestKeyframe):
                return command
            packed, serial = command.packed, next(self._serials)
            self._own[serial] = packed
            receivers = command.to if isinstance(command, Send) else (command.to,)
            for machine in {self._machine_of[node] for node in receivers if node in self._machine_of}:
                fields = packed.data, packed.positions_bytes, packed.values_bytes
                leaving.setdefault(machine, {})[serial] = fields
            sizes = FrameSizes(serial, packed.size_bytes, packed.positions_bytes, packed.values_bytes)
            return replace(command, packed=cast(Packed, sizes))

        plain = [[without_bytes(command) for command in of] for of in commands]
        stored = sum(len(data) for frames in leaving.values() for data, _, _ in frames.values())
        return StepResult(plain, {machine: ray.put(frames) for machine, frames in leaving.items()}, stored)

    def packed(self, serials: Sequence[int]) -> list[Packed]:
        """Return frames of these nodes that are under way."""
        return [self._own[serial] for serial in serials]

    def parameters(self) -> npt.NDArray[np.float32]:
        """Return the parameters of all nodes here, (n, P)."""
        return np.stack([self._group.parameters(node).numpy() for node in self._group.nodes])

    def model_files(self, nodes: Sequence[int]) -> list[bytes]:
        """Return the models of all nodes here as safetensors files."""
        return [self._group.model_file(node) for node in nodes]

    def wall_s(self) -> dict[str, float]:
        """Return real seconds of this actor, by activity."""
        return self._group.wall_s

    def snapshot(self) -> bytes:
        """Return the node group's shard of a checkpoint, as bytes."""
        return checkpoint.dump(self._group.snapshot())

    def restore(self, state: bytes) -> None:
        """Continue from the result of :meth:`snapshot`, here or elsewhere."""
        types = (*STATE_TYPES, *self._group.rules.sharing.state_types)
        self._group.restore(checkpoint.load(state, types))


# --- In the driver's process --------------------------------------------------------------------------------


class RemoteFrame:
    """Stand-in for a :class:`~jwins.wire.frame.Packed` whose bytes are at an actor.

    Attributes:
        home: node group of the sender.
        serial: number of the frame at that node group.
        bundles: the object that brings the frame to a machine, by machine.
        known: node groups that have the frame.
    """

    __slots__ = ("bundles", "home", "known", "positions_bytes", "serial", "size_bytes", "values_bytes")

    def __init__(self, home: RemoteNodeGroup, sizes: FrameSizes, bundles: Mapping[str, Any]) -> None:
        self.home, self.serial, self.bundles = home, sizes.serial, bundles
        self.size_bytes = sizes.size_bytes
        self.positions_bytes, self.values_bytes = sizes.positions_bytes, sizes.values_bytes
        self.known: list[RemoteNodeGroup] = []

    @property
    def header_bytes(self) -> int:
        """Return the bytes of everything but positions and values."""
        return self.size_bytes - self.positions_bytes - self.values_bytes

    @property
    def key(self) -> FrameKey:
        """Return the key by which actors find the frame."""
        return self.home.number, self.serial

    def __del__(self) -> None:
        for group in {self.home, *self.known}:
            group.forget(self.key)


class RemoteNodeGroup:
    """Proxy of a node group that is an actor elsewhere.

    Args:
        actor: handle of a :class:`NodeGroupActor`.
        nodes: nodes of the node group, increasing.
        local_steps: optimizer steps per round, by node.
    """

    def __init__(
        self,
        actor: Any,
        number: int,
        machine: str,
        nodes: Sequence[int],
        rules: Rules,
        local_steps: Mapping[int, int],
    ) -> None:
        self._actor = actor
        self.number, self.machine = number, machine
        self.nodes, self.rules, self.local_steps = tuple(nodes), rules, local_steps
        self.forgotten: list[FrameKey] = []
        self.stored_bytes = 0
        self._inline: set[int] = set()
        self._rows: dict[int, Tensor] = {}
        self._files: dict[int, bytes] = {}

    # --- Rounds ---------------------------------------------------------------------------------------------

    def start(self, now: float) -> dict[int, list[Command]]:
        """Begin round 0."""
        return self._of_group(NodeGroup.start, now)

    def handle(
        self, due: Sequence[ScheduledEvent], train: Mapping[int, int] | None = None
    ) -> list[list[Command]]:
        """Deliver events to the nodes."""
        events: list[tuple[int, float, Any]] = []
        new_frames: list[NewFrame] = []
        bundles: dict[Any, int] = {}
        for item in due:
            event: Any = item.event
            if isinstance(event, MessageArrived):
                event = self._key_of(event.envelope, new_frames, bundles)
            events.append((item.node, item.time, event))
        forgotten, self.forgotten = self.forgotten, []
        step: StepResult = self._call("handle", events, train or {}, new_frames, forgotten, *bundles)
        self.stored_bytes += step.stored_bytes
        return [[self._with_remote(command, step.bundles) for command in of] for of in step.commands]

    def _key_of(self, envelope: Envelope, new_frames: list[NewFrame], bundles: dict[Any, int]) -> FrameKey:
        packed: Any = envelope.packed
        if not isinstance(packed, RemoteFrame):  # was under way when a checkpoint was taken
            key = (_FROM_CHECKPOINT, envelope.number)
            if envelope.number not in self._inline:
                self._inline.add(envelope.number)
                new_frames.append(NewFrame(key, envelope.sender, packed))
                finalize(envelope, self.forget, key)
            return key
        if self not in packed.known:
            packed.known.append(self)
            source = None
            if packed.home is not self:
                source = bundles.setdefault(packed.bundles[self.machine], len(bundles))
            new_frames.append(NewFrame(packed.key, envelope.sender, source))
        return packed.key

    def forget(self, key: FrameKey) -> None:
        """Discard a frame; the actor learns of it with its next call."""
        self.forgotten.append(key)

    def _with_remote(self, command: Command, bundles: Mapping[str, Any]) -> Command:
        if not isinstance(command, Send | RequestKeyframe):
            return command
        return replace(
            command, packed=cast(Packed, RemoteFrame(self, cast(FrameSizes, command.packed), bundles))
        )

    def with_bytes(self, envelopes: Sequence[Envelope]) -> list[Envelope]:
        """Return the same envelopes of these nodes with their bytes, for a checkpoint."""
        remote = [envelope for envelope in envelopes if isinstance(cast(Any, envelope.packed), RemoteFrame)]
        if not remote:
            return list(envelopes)
        found = self._call("packed", [cast(Any, envelope.packed).serial for envelope in remote])
        full = {
            envelope: replace(envelope, packed=packed) for envelope, packed in zip(remote, found, strict=True)
        }
        return [full.get(envelope, envelope) for envelope in envelopes]

    # --- Measuring ------------------------------------------------------------------------------------------

    def num_samples(self, round: int) -> int:
        """Return the number of common test samples of the evaluation after ``round`` completed rounds."""
        return self._of_group(NodeGroup.num_samples, round)

    def sums(
        self, round: int, present: Collection[int] = ()
    ) -> tuple[list[PartialSum], dict[int, Mapping[str, Tensor]]]:
        """Return the contributions of the waiting models to the average."""
        return self._of_group(NodeGroup.sums, round, present)

    def measure(
        self, round: int, average: AverageModel, *, test_average: bool, keep: bool = False
    ) -> EvalResult:
        """Test the models that wait for an evaluation."""
        return self._of_group(NodeGroup.measure, round, average, test_average=test_average, keep=keep)

    def end_with_measured(self) -> None:
        """Make the models of the last evaluation the final ones."""
        self._of_group(NodeGroup.end_with_measured)

    def measured_file(self, node: int) -> bytes:
        """Return a node's model at the last evaluation as a safetensors file."""
        return self._of_group(NodeGroup.measured_file, node)

    # --- End and resuming -----------------------------------------------------------------------------------

    @property
    def wall_s(self) -> dict[str, float]:
        """Return the actor's real seconds, by activity."""
        spent: dict[str, float] = self._call("wall_s")
        return spent

    def stalled(self, nodes: Sequence[int]) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Return the waiting nodes among these."""
        return self._of_group(NodeGroup.stalled, nodes)

    def parameters(self, node: int) -> Tensor:
        """Return a node's parameters at the end, (P,) float32."""
        if not self._rows:
            rows = torch.from_numpy(np.array(self._call("parameters")))
            self._rows = dict(zip(self.nodes, rows, strict=True))
        return self._rows[node]

    def model_file(self, node: int) -> bytes:
        """Return a node's model as a safetensors file. Call it once for each node, in their order."""
        if node not in self._files:
            place = self.nodes.index(node)
            some = self.nodes[place : place + _MAX_FILES_PER_CALL]
            self._files = dict(zip(some, self._call("model_files", some), strict=True))
        return self._files[node]

    def snapshot(self, under_way: Sequence[Envelope] = ()) -> Dumped:
        """Return the actor's shard of a checkpoint, as bytes."""
        return Dumped(self._call("snapshot"))

    def restore(self, state: NodeGroupState) -> None:
        """Continue from a snapshot that contains these nodes, and perhaps others."""
        own = NodeGroupState({node: state.nodes[node] for node in self.nodes if node in state.nodes})
        self._call("restore", checkpoint.dump(own))

    def close(self) -> None:
        """Do nothing: the code that made the actor ends it."""

    def _of_group(
        self, method: Callable[Concatenate[NodeGroup, P], T], *args: P.args, **options: P.kwargs
    ) -> T:
        found: T = self._call("call", method.__name__, *args, **options)
        return found

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        who = f"actor {self.number} with {len(self.nodes)} nodes from {self.nodes[0]}"
        return _got(getattr(self._actor, method).remote(*args, **options), who)


def _got(reference: Any, who: str) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, JwinsError):
            raise error.cause from None
        if not isinstance(error.cause, ray.exceptions.RayError):
            raise
        raise ActorLostError(f"{who}: lost data that another actor had sent ({_line(error.cause)})") from None
    except ray.exceptions.RayError as error:
        raise ActorLostError(f"{who} is lost ({_line(error)})") from None


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


@contextlib.contextmanager
def start_actors(
    makes: Sequence[tuple[Sequence[int], Callable[[], NodeGroup]]],
    rules: Rules,
    *,
    demand: Demand,
    name: str,
) -> Iterator[list[RemoteNodeGroup]]:
    """Start node groups on the machines of the cluster, until the end of the block.

    Args:
        makes: for each node group its nodes, increasing, and the function that builds it there.
        rules: common rules of all nodes of the run.
        demand: demand of each node group.
        name: name of the run, for the dashboard.

    Raises:
        UsageError: others use the cluster for too long.
        ActorLostError: an actor is lost at the start.
        JwinsError: raised by building a node group.
    """
    wanted = {"CPU": demand.cores, "memory": int(demand.memory_bytes)} | ({"GPU": 1} if demand.gpus else {})
    reserved = placement_group([wanted] * len(makes), strategy="SPREAD")
    remote = ray.remote(max_restarts=0)(NodeGroupActor)
    actors: list[Any] = []
    try:
        if not reserved.wait(_RESERVE_TIMEOUT_S):
            raise UsageError(
                f"the cluster is busy: no room for {len(makes)} actors of {demand} each within "
                f"{_RESERVE_TIMEOUT_S:.0f} s; `ray status` shows its use"
            )
        for number, (nodes, _) in enumerate(makes):
            place = PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=number)
            title = f"jwins {name}: actor {number}, {len(nodes)} nodes from {nodes[0]} ({uuid4().hex[:8]})"
            actors.append(remote.options(name=title, scheduling_strategy=place, **demand.resources).remote())
        machines = [_got(actor.machine.remote(), f"actor {k}") for k, actor in enumerate(actors)]
        begun = []
        for number, (_, make) in enumerate(makes):
            others = {node: machines[k] for k, (of, _) in enumerate(makes) if k != number for node in of}
            begun.append(actors[number].begin.remote(make, number, others))
        steps = [_got(reference, f"actor {number}") for number, reference in enumerate(begun)]
        yield [
            RemoteNodeGroup(actors[k], k, machines[k], nodes, rules, steps[k])
            for k, (nodes, _) in enumerate(makes)
        ]
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(reserved)
