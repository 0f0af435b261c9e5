"""One node's rounds as a sans-I/O state machine: events in, commands out, ``now`` is an argument.

A driver (the simulator, or a process with sockets) runs the commands and feeds the results back as events. The
node itself never trains, sends, waits, reads a clock or touches another node, so the same code runs in
every engine, and drivers may call different nodes' ``handle`` from several threads.

    start() --> Train --> TRAINING --Trained--> [share] --> Send --> WAITING
                             ^                                          |
                             |                     all expected frames, or the deadline
                             |                                          v
                             +--- Train <-- RequestKeyframe? Evaluate? Checkpoint? <-- [merge]
                                                                        |
                                        DONE <-- last round, or Stop ---+      FAILED <-- diverged

A node waits for the frames of all neighbours of the round that are up. A neighbour that is missing at the
deadline leaves its weight with the node. Frames of later rounds are kept until their round; frames of earlier
rounds go to the next merge with weight 0, for algorithms that remember their peers.

A neighbour without this node's replica (a new one, one that returned or one that asks) gets the keyframe, or
all increments since the replica that it still has, *in place of* the next update. An additional keyframe could
arrive after an update that builds on it, in every round, and the neighbour would never catch up. In place of
the update, it is the frame that the neighbour waits for.

Members may change while nodes run. The topology then has another graph from some round on, with a higher
roster version, and a node may learn of it late. Every frame states the roster version of its round. If two
neighbours use different versions, both give the other's frame weight 0, so that mixing weights stay doubly
stochastic.

In an asynchronous run a node does not wait: with y the model that it shared in round r,

    share y --> train y to z --> merge y with the newest frames that came meanwhile, to m --> share m + (z - y)

The merge of round r thus takes place at the end of the next training, whose change is added to its result. Each
update is compared with the model that the node had shared before it came, so a late update does not undo the
training since. Two neighbours merge each other about as often as the slower of them completes a round, which
nearly preserves the mean over the nodes. After its last share a node waits for a frame of each neighbour, but
no longer than its last round took. Source of the overlap: J. Wang, H. Liang, G. Joshi, "Overlap Local-SGD",
ICASSP 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from jwins.errors import UsageError
from jwins.rng import RoundContext
from jwins.scenario import Attack
from jwins.sharing.attacks import attacked, deviation
from jwins.sharing.base import Sharing
from jwins.sharing.calls import (
    call_for_peer,
    call_init,
    call_keyframe,
    call_merge,
    call_share,
    check_state_types,
    method_name,
)
from jwins.sharing.outer import Nesterov
from jwins.sharing.own_scale import OwnScale, scale_of
from jwins.sharing.update import Quantized, Received, Sampled, Update, largest_magnitude
from jwins.topology.graph import Topology
from jwins.topology.participation import Participation
from jwins.wire.frame import ROSTER_VERSIONS, Frame, FrameHeader, KeyframeRequest, Packed, Wire

MAX_ROUNDS_AHEAD = 64
"""Frames further ahead than this are refused. In a static graph without deadlines a neighbour is at most one
round ahead; in a graph that is drawn again each round, about a diameter. This limits the memory that a peer can
use."""

INBOX_BYTES = 256 * 2**20
"""``Rules.inbox_bytes`` between machines."""
FREE_FRAMES = 3
"""Frames of a sender that may always wait for a merge: of two rounds, and a late one."""
BYTES_PER_VALUE = 16
"""Memory of a position, a value and their decoded form."""

EARLY_FRAMES = 6
"""Further rounds that a neighbour may be ahead if neighbours change from round to round: the diameter of the
union of such graphs."""
FRAMES_OF_STRANGERS = 2
"""Frames that may wait although their sender is not a neighbour: a newer roster may make it one, from this
round or the next."""

MAX_PARAMETER = 1e30
"""Parameters beyond this have diverged, even if they are finite. They are far from any real model, and so near
the largest float32, 3.4e38, that differences, wavelet coefficients or bfloat16 roundings soon overflow."""

MAX_MAGNITUDE_RATIO = 1e6
"""``Rules.max_magnitude_ratio`` between machines. Honest models never differ by this factor, whatever training
and transforms did in between. A damaged number usually does."""


MAX_GROWTH = 1e3
"""``Rules.max_growth`` between machines. Honest neighbours' values grow about as this node's model grows by its
own training. A factor of ten between partitions is usual, a factor of a thousand is not."""

INFLATION = 100.0
"""No honest node exceeds the limit of ``Rules.max_growth`` by this factor, even if another node has inflated
its model, because it merges nothing beyond the limit."""


@dataclass(frozen=True, slots=True)
class Staleness:
    """Rule for the weights of updates in an asynchronous run.

    Attributes:
        largest: updates of a higher staleness get weight 0.
        power: the weight of an update of staleness s is divided by (1 + s) to this power. Source: C. Xie, S.
            Koyejo, I. Gupta, "Asynchronous Federated Optimization", 2019, whose polynomial weight this is.
    """

    largest: int
    power: float = 0.0

    def factor(self, staleness: int) -> float:
        """Return the factor of a mixing weight.

        >>> Staleness(largest=8, power=0.5).factor(3), Staleness(largest=2).factor(3)
        (0.5, 0.0)
        """
        return 0.0 if staleness > self.largest else float((1 + staleness) ** -self.power)


@dataclass(frozen=True, slots=True)
class Rules:
    """Common rules of all nodes of a run.

    Attributes:
        sharing: the sharing algorithm.
        wire: encoder of messages; its ``dim`` is the algorithm's ``update_dim``.
        topology: neighbours and mixing weights of every round.
        rounds: number of rounds, including those of consensus.
        seed: seed of the experiment.
        evaluate_at: numbers of completed rounds at which a node requests an evaluation.
        checkpoint_every: interval of rounds at which a node requests a checkpoint; 0 for never.
        deadline_s: time to wait for neighbours after the node has sent its frame; None for no limit.
        consensus_rounds: number of rounds at the end that share the merged model without training.
        max_magnitude_ratio: frames are refused if a value exceeds this multiple of the node's own largest
            parameter, or of 1 if that is larger.
        inbox_frames: largest number of frames of one sender that wait for a merge.
        inbox_bytes: limit on their decoded size, from the fourth frame on; infinite between nodes that trust
            each other, where ``inbox_frames`` does not apply either.
        rounds_ahead: number of rounds that a frame may be ahead of the node; later frames are refused.
        max_growth: frames are also refused if a value exceeds this multiple of the node's own scale, which
            others cannot raise (see :class:`~jwins.sharing.own_scale.OwnScale`).
        project: applied in place to merged parameters, e.g. ``Layout.project_``; None for nothing to do.
        participation: the nodes that take part in a round, as in ``topology``; None for all.
        attacks: attack of each attacker, by node; attackers are left out of evaluations.
        outer: step on the change of a round before it is shared; None to share the trained model.
        change_factor: factor of the change by training, of each node for which it is not 1.
        staleness: weights of updates in an asynchronous run, whose nodes do not wait for each other; None for
            rounds in which they wait.
    """

    sharing: Sharing[Any]
    wire: Wire
    topology: Topology
    rounds: int
    seed: int
    evaluate_at: frozenset[int] = frozenset()
    checkpoint_every: int = 0
    deadline_s: float | None = None
    project: Callable[[Tensor], Tensor] | None = None
    consensus_rounds: int = 0
    max_magnitude_ratio: float = math.inf
    inbox_frames: int = MAX_ROUNDS_AHEAD + 1
    inbox_bytes: float = math.inf
    rounds_ahead: int = MAX_ROUNDS_AHEAD
    max_growth: float = math.inf
    participation: Participation | None = None
    attacks: Mapping[int, Attack] = field(default_factory=dict)
    outer: Nesterov | None = None
    staleness: Staleness | None = None
    change_factor: Mapping[int, float] = field(default_factory=dict)

    def among_strangers(self, max_magnitude_ratio: float, *, changing: bool) -> Rules:
        """Return the rules between machines, where a frame may contain anything.

        A neighbour may send frames of several rounds at once: those that it keeps for a restart of this node.
        """
        frames = min(
            self.checkpoint_every + FREE_FRAMES + (EARLY_FRAMES if changing else 0), MAX_ROUNDS_AHEAD + 1
        )
        if self.asynchronous:
            frames = MAX_ROUNDS_AHEAD + 1
        return replace(
            self,
            deadline_s=None,
            max_magnitude_ratio=max_magnitude_ratio,
            inbox_frames=frames,
            inbox_bytes=INBOX_BYTES,
            rounds_ahead=frames - 1,
            max_growth=MAX_GROWTH,
        )

    @property
    def asynchronous(self) -> bool:
        """Return whether nodes do not wait for each other."""
        return self.staleness is not None

    @property
    def training_rounds(self) -> int:
        """Return the number of rounds that train before they share."""
        return self.rounds - self.consensus_rounds

    def trains(self, node: int, round: int) -> bool:
        """Return whether a node trains in a round, before it shares."""
        takes_part = self.participation is None or node in self.participation.active(round)
        return takes_part and round < self.training_rounds


class Phase(StrEnum):
    """Phase of a node."""

    NEW = "new"
    TRAINING = "training"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"


# --- Events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """Local training of ``round`` has ended; ``params`` (P,) float32 is the result.

    The node keeps the tensor, and so may its algorithm: the driver must not write into it again.
    """

    round: int
    params: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FrameReceived:
    """``frame`` arrived and was decoded."""

    frame: Frame


@dataclass(frozen=True, slots=True)
class PeerUp:
    """``peer`` is up, and takes part from ``round`` on."""

    peer: int
    round: int = 0


@dataclass(frozen=True, slots=True)
class PeerLost:
    """``peer`` is down; the node expects nothing of it until a :class:`PeerUp`."""

    peer: int


@dataclass(frozen=True, slots=True)
class KeyframeRequested:
    """A peer in ``round`` lacks the newest replica of this node; it has that of ``replica_round``, or none."""

    peer: int
    round: int = 0
    replica_round: int | None = None


@dataclass(frozen=True, slots=True)
class RosterChanged:
    """``peers`` are up, and all others are down; new ones take part from ``round`` on."""

    peers: frozenset[int]
    round: int = 0


@dataclass(frozen=True, slots=True)
class Rejoin:
    """Rejoin after a crash: continue with the state before the crash, in the others' ``round``.

    Earlier frames are dropped, and neighbours count as having lost their replica of this node. A round that was
    shared but not merged ends without received updates, as at a deadline.

    Attributes:
        round: first round in which the node takes part again.
        params: (P,) float32, another node's model to begin with; None for its own.
        keep_newer: keep frames of that round and later, which arrived since.
    """

    round: int
    params: Tensor | None = None
    keep_newer: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """Passage of time, requested by :class:`WakeAt`."""


@dataclass(frozen=True, slots=True)
class TimedOut:
    """End of waiting in ``round``: the node merges the received updates, as at a deadline."""

    round: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End after the merge that the node waits for, or at once if it waits for none."""


Event = (
    Trained
    | FrameReceived
    | PeerUp
    | PeerLost
    | KeyframeRequested
    | RosterChanged
    | Rejoin
    | Tick
    | TimedOut
    | Stop
)


# --- Commands -----------------------------------------------------------------------------------------------
# Numbers and bytes, no tensors: a command refers to the model in ``Node.params`` at that time.


@dataclass(frozen=True, slots=True)
class Train:
    """Train ``round`` from the node's parameters, then report :class:`Trained`."""

    round: int


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    """Send the same bytes to each of ``to``.

    Attributes:
        to: receivers, increasing.
        round: round of the update.
        packed: the frame.
        keyframe: whether it carries a keyframe in place of the round's update.
    """

    to: tuple[int, ...]
    round: int
    packed: Packed
    keyframe: bool

    def in_turn(self, node: int) -> tuple[int, ...]:
        """Return the receivers in the order in which ``node`` sends to one at a time.

        Receivers with a higher number are first, then the others from 0. So no node is last for all neighbours.

        >>> Send((1, 3, 8), round=0, packed=Packed(b"", 0, 0), keyframe=False).in_turn(node=2)
        (3, 8, 1)
        """
        return tuple(sorted(self.to, key=lambda receiver: (receiver < node, receiver)))


@dataclass(frozen=True, slots=True, eq=False)
class RequestKeyframe:
    """Send ``packed``, a request for its keyframe, to ``to``."""

    to: int
    packed: Packed


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Measure the node's parameters, its model after ``round`` completed rounds."""

    round: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Request for a checkpoint: ``round`` rounds are complete."""

    round: int


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send a :class:`Tick` at ``time`` (seconds, on the clock of ``now``) or later."""

    time: float


@dataclass(frozen=True, slots=True)
class FrameRefused:
    """A frame was refused, without any effect on the node.

    Attributes:
        sender: sender of the frame.
        round: the sender's round.
        reason: reason as text.
        inflated: whether a value is larger than an honest node sends; it may also be damaged.
    """

    sender: int
    round: int
    reason: str
    inflated: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The node has finished or failed; its parameters are the result.

    Attributes:
        status: ``finished``, ``stopped``, or ``diverged`` if parameters stopped being finite (or grew beyond
            :data:`MAX_PARAMETER`).
        round: completed rounds.
        reason: reason as text, unless it finished.
    """

    status: str
    round: int
    reason: str = ""


Command = Train | Send | RequestKeyframe | Evaluate | Checkpoint | WakeAt | FrameRefused | Finished


@dataclass(frozen=True, slots=True, eq=False)
class NodeState:
    """State of a node in a checkpoint, with which it can continue after a restart; by default, a new one.

    Attributes:
        phase: a :class:`Phase`, as a string.
        round: current round = completed rounds.
        params: (P,) parameters at the start of the round, or after training while waiting.
        sharing: the algorithm's state.
        inbox: frames that wait for a merge, by (sender, round).
        down: peers that are down.
        expected_from: first round of each peer that came up later.
        informed: peers to which this node's latest update or keyframe was sent, so that they have its replica.
        outgoing: the frame of the current round, while waiting.
        shared: round of the last share, or None.
        sent_bytes: length of the previous update's frame.
        deadline: deadline on the clock of ``now``, while waiting, if there is one.
        stopping: whether :class:`Stop` was received.
        replica_rounds: round of this node's replica at each peer that has requested increments.
        answered: round in which each such peer was last sent increments, or a keyframe in their place.
        spread: standard deviation of each parameter over the models that an attacker last received.
        momentum: (P,) of the outer optimizer; None before its first step, or without one.
        merged: (P,) in an asynchronous run, the model after the newest merge; None before it.
        merged_rounds: of each sender in an asynchronous run, this node's round of the newest merge of its
            update, and the round of that update.
        round_began: start of the round in an asynchronous run, on the clock of ``now``.
    """

    phase: str
    round: int
    params: Tensor
    sharing: Any
    inbox: Mapping[tuple[int, int], Frame] = field(default_factory=dict)
    down: frozenset[int] = frozenset()
    expected_from: Mapping[int, int] = field(default_factory=dict)
    informed: frozenset[int] = frozenset()
    outgoing: Packed | None = None
    shared: int | None = None
    sent_bytes: int = 0
    deadline: float | None = None
    stopping: bool = False
    replica_rounds: Mapping[int, int] = field(default_factory=dict)
    answered: Mapping[int, int] = field(default_factory=dict)
    spread: Tensor | None = None
    momentum: Tensor | None = None
    merged: Tensor | None = None
    merged_rounds: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    round_began: float = 0.0


STATE_TYPES: tuple[type, ...] = (NodeState, Frame, Packed, Quantized, Sampled, Update)
"""Types in a node's state in a checkpoint, besides the ``state_types`` of its algorithm."""


class Node:
    """One node of a decentralized learning run.

    Args:
        id: this node, in [0, topology.num_nodes).
        params: (P,) float32, the common initial parameters.
        rules: common rules of all nodes of the run.

    Attributes:
        phase: phase of the node.
        round: current round = completed rounds.
        params: (P,) float32, at the start of the round, or after training while waiting; never written into.
        state: state of the algorithm.
        merged_with: neighbours that had a weight in the newest merge.

    Raises:
        UsageError: no such node, or a wire for updates of another length.
    """

    def __init__(self, id: int, params: Tensor, rules: Rules) -> None:
        if not 0 <= id < rules.topology.num_nodes:
            raise UsageError(f"node {id}: the topology has nodes 0 to {rules.topology.num_nodes - 1}")
        self.update_dim = rules.sharing.update_dim(len(params))
        if rules.wire.dim != self.update_dim:
            raise UsageError(
                f"node {id}: its updates have dimension {self.update_dim}, those of the wire {rules.wire.dim}"
            )
        self.id = id
        self.rules = rules
        self._sharing = rules.sharing
        self._topology = rules.topology

        self._attack = rules.attacks.get(id)
        self.merged_with: tuple[int, ...] = ()
        self.state: Any
        self._scale: OwnScale | None
        self._momentum: Tensor | None
        self._merged: Tensor | None
        self.restore(NodeState(Phase.NEW.value, 0, params, call_init(rules.sharing, params)))

    # --- Driving ------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Command]:
        """Begin round 0, or continue after :meth:`restore`: commands that were under way are issued again."""
        self._round_began = now
        if self.phase is Phase.NEW:
            commands: list[Command] = []
            if 0 in self.rules.evaluate_at:
                commands.append(Evaluate(0))
            return commands + self._next_round()
        if self.phase is Phase.TRAINING:
            return [Train(self.round)]
        if self.phase is Phase.FAILED:
            return self._fail("parameters were not finite before the restart")
        if self.phase is Phase.WAITING and self.rules.asynchronous:
            return self._merge_if_ready(now, timed_out=True)
        if self.phase is Phase.WAITING and self._deadline is not None:
            return [WakeAt(self._deadline)]
        return []

    def begin_with(self, params: Tensor) -> None:
        """Take another node's model before the first share, and forget the outer momentum and the merges.

        Args:
            params: (P,) float32; kept, and never written into.
        """
        common = self._sharing.needs_common_start
        self.state = self._sharing.projected(self.state, params) if common else call_init(self._sharing, params)
        self.params = params
        if self._scale is not None:
            self._scale = OwnScale(params)
        self._momentum = self._merged = None
        self._merged_rounds.clear()

    def handle(self, event: Event, now: float) -> list[Command]:
        """Handle one event.

        Args:
            event: the event.
            now: seconds on any clock that does not go backwards; only compared with itself.

        Returns:
            Commands, to be run in this order.

        Raises:
            UsageError: the event is not allowed in the node's phase.
        """
        method = _TRANSITIONS.get((self.phase, type(event)))
        if method is None:
            raise UsageError(
                f"node {self.id}, round {self.round}: {type(event).__name__} while {self.phase.value}"
            )
        return method(self, event, now)

    def snapshot(self) -> NodeState:
        """Return the state for :meth:`restore`.

        Raises:
            UsageError: the algorithm's state has a type that no checkpoint restores.
        """
        where = f"node {self.id}, round {self.round}: {method_name(self._sharing, 'merge')}"
        check_state_types(self._sharing, where, self.state, STATE_TYPES)
        return NodeState(
            self.phase.value,
            self.round,
            self.params,
            self.state,
            dict(self._inbox),
            frozenset(self._down),
            dict(self._expected_from),
            frozenset(self._informed),
            self._outgoing,
            self._shared,
            self._sent_bytes,
            self._deadline,
            self._stopping,
            dict(self._replica_rounds),
            dict(self._answered),
            self._spread,
            self._momentum,
            self._merged,
            dict(self._merged_rounds),
            self._round_began,
        )

    def restore(self, state: NodeState) -> None:
        """Restore the state of :meth:`snapshot`; call :meth:`start` next if its driver is new, too."""
        self.phase = Phase(state.phase)
        self.round = state.round
        self.params = state.params
        self.state = state.sharing
        self._inbox = dict(state.inbox)
        self._down = set(state.down)
        self._expected_from = dict(state.expected_from)
        self._informed = set(state.informed)
        self._outgoing = None if state.outgoing is None else self.rules.wire.renewed(state.outgoing)
        self._shared = state.shared
        self._sent_bytes = state.sent_bytes
        self._deadline = state.deadline
        self._stopping = state.stopping
        self._replica_rounds = dict(state.replica_rounds)
        self._answered = dict(state.answered)
        self._spread = state.spread
        self._momentum = state.momentum
        self._merged = state.merged
        self._merged_rounds = dict(state.merged_rounds)
        self._round_began = state.round_began
        self._scale = OwnScale(state.params) if math.isfinite(self.rules.max_growth) else None

    @property
    def model(self) -> Tensor:
        """Return the newest merged model, (P,) float32, or the initial one."""
        return self.params if self._merged is None else self._merged

    @property
    def inbox(self) -> Mapping[tuple[int, int], Frame]:
        """Return the frames that wait for a merge, by (sender, round)."""
        return self._inbox

    @property
    def waiting_for(self) -> tuple[int, ...]:
        """Return the neighbours whose expected frame of this round is missing."""
        return tuple(self._awaited())

    # --- One method per cell of the transition table ------------------------------------------------------

    def _on_trained(self, event: Trained, now: float) -> list[Command]:
        frame = self.share(event)
        if not isinstance(frame, Frame):
            return frame
        base, packed = frame.update.base, self.rules.wire.pack(frame)
        del frame  # its vectors are not needed in the merge
        return self.send(base, packed, now)

    def share(self, event: Trained) -> Frame | list[Command]:
        """Take over the trained model, and return the frame for :meth:`send`, or the commands of a failure.

        Both together do what :meth:`handle` does for ``event``; the frame can be encoded elsewhere in between.
        """
        if event.round != self.round:
            raise UsageError(f"node {self.id}: trained round {event.round} in round {self.round}")
        trained, outer = event.params, self.rules.outer
        if (factor := self.rules.change_factor.get(self.id)) is not None:
            trained = self.params + factor * (trained - self.params)
        if outer is not None and self.rules.trains(self.id, self.round):
            # self.params is still the model at the start of the round
            trained, self._momentum = outer.step(self.params, trained, self._momentum)
        if self._scale is not None:
            self._scale.trained(self.params, trained)
        if self.rules.asynchronous and self._outgoing is not None:
            trained = self._merge_previous(trained - self.params)
        start = trained if self._attack is None else self.params  # only an attacker's vector is kept meanwhile
        self.params = trained
        if _diverged(trained):
            return self._fail("parameters are not finite after local training")
        update, self.state = self._share(start, self._context())
        if not _is_finite(update):
            return self._fail(f"{method_name(self._sharing, 'share')} returned a value that is not finite")
        if self._scale is not None:
            self._scale.shared(self.params, update.largest())
        self._shared = self.round
        return Frame(self.id, self.round, update, roster_version=self._roster_version(self.round))

    def send(self, base: int | None, packed: Packed, now: float) -> list[Command]:
        """Send the frame of :meth:`share`, encoded as ``packed``, and wait for those of the neighbours.

        Args:
            base: ``base`` of its update.
            packed: the frame.
            now: as for :meth:`handle`.
        """
        self._outgoing = packed
        self._sent_bytes = packed.size_bytes
        stands_alone = base is None
        recipients = [j for j in self._topology.at(self.round).recipients[self.id] if self._takes_part(j)]
        follow = tuple(j for j in recipients if stands_alone or j in self._informed)
        lack = tuple(j for j in recipients if not stands_alone and j not in self._informed)
        commands: list[Command] = []
        if self._sharing.per_peer:
            own = {j: self._own_update(j) for j in follow}
            if not all(map(_is_finite, own.values())):
                return self._fail(
                    f"{method_name(self._sharing, 'for_peer')} returned a value that is not finite"
                )
            commands += [self._send_own(j, update) for j, update in own.items()]
        elif follow:
            commands.append(Send(follow, self.round, packed, keyframe=False))
        commands += self._send_missed(lack)
        self._informed = set(recipients)
        deadline_s = self.rules.deadline_s
        if self.rules.asynchronous:
            deadline_s, self._round_began = now - self._round_began, now
            if self.round + 1 < self.rules.rounds and not self._stopping:
                return commands + self._keyframe_requests() + self._end_round()
        self.phase = Phase.WAITING
        if deadline_s is not None:
            self._deadline = now + deadline_s
            commands.append(WakeAt(self._deadline))
        return commands + self._merge_if_ready(now)

    def _merge_previous(self, change: Tensor) -> Tensor:
        """Merge the model that was shared last, and return the result plus the ``change`` by training since."""
        assert self._shared is not None
        self._merge_received(self._shared)
        after = self.params + change
        return after if self.rules.project is None else self.rules.project(after)

    def _share(self, start: Tensor, ctx: RoundContext) -> tuple[Update, Any]:
        """Return the update to send and the state for the merge; an attacker's update is of a false model."""
        update, state = call_share(self._sharing, self.state, self.params, ctx, self.update_dim)
        if self._attack is None or self.round < self._attack.round:
            return update, state
        false = attacked(self._attack, start, self.params, self._spread, ctx)
        update, after = call_share(self._sharing, self.state, false, ctx, self.update_dim)
        # An attacker merges as an honest node does, unless the state must agree with its neighbours' replicas.
        return update, after if self._sharing.remembers_peers or self._sharing.per_peer else state

    def _on_frame(self, event: FrameReceived, now: float) -> list[Command]:
        frame = event.frame
        reason = self._objection(frame)
        if reason is not None:
            return [FrameRefused(frame.sender, frame.round, reason, self._is_inflated(frame))]
        if self.rules.asynchronous and not self._sharing.remembers_peers:
            frame = self._joined(frame)
        there = self._inbox.get((frame.sender, frame.round))
        # A keyframe replaces an update that did not match.
        if there is None or (frame.keyframe and not there.keyframe):
            self._inbox[frame.sender, frame.round] = frame
        return self._merge_if_ready(now)

    def _joined(self, frame: Frame) -> Frame:
        """Join a frame with the sender's frames that still wait: at each position the newest value counts."""
        for name in sorted(name for name in self._inbox if name[0] == frame.sender):
            waiting = self._inbox.pop(name)
            older, newer = sorted((waiting, frame), key=lambda one: one.round)
            frame = replace(newer, update=newer.update.over(older.update))
        return frame

    def _on_peer_up(self, event: PeerUp, now: float) -> list[Command]:
        self._down.discard(event.peer)
        self._expected_from[event.peer] = 0 if self.rules.asynchronous else event.round
        if not self._takes_part(event.peer):
            return self._merge_if_ready(now)  # the node may have waited for its frame only
        if self._outgoing is None or event.peer in self._informed:
            return []
        if event.peer not in self._topology.at(self.round).recipients[self.id]:
            return []
        self._informed.add(event.peer)
        if self._sharing.remembers_peers:
            return [self._send_keyframe((event.peer,))]
        if self._sharing.per_peer:
            return [self._send_own(event.peer, self._own_update(event.peer))]
        return [Send((event.peer,), self.round, self._outgoing, keyframe=False)]

    def _on_peer_lost(self, event: PeerLost, now: float) -> list[Command]:
        self._down.add(event.peer)
        self._informed.discard(event.peer)
        return self._merge_if_ready(now)

    def _on_roster(self, event: RosterChanged, now: float) -> list[Command]:
        commands: list[Command] = []
        everyone = set(range(self._topology.num_nodes)) - {self.id}
        lost = sorted(everyone - event.peers - self._down)
        for peer in sorted(event.peers & self._down):  # first, so that they count in this round
            commands += self._on_peer_up(PeerUp(peer, max(event.round, self.round)), now)
        for peer in lost:
            commands += self._on_peer_lost(PeerLost(peer), now)
        return commands

    def _on_keyframe_requested(self, event: KeyframeRequested, now: float) -> list[Command]:
        replica_round, answered = event.replica_round, self._answered.get(event.peer, 0)
        if replica_round is not None and self.rules.asynchronous:
            if replica_round < answered:  # the answer is under way or lost; a keyframe helps in both cases
                replica_round = None
        elif replica_round is not None and event.round < answered:
            return []  # the requested frame is under way already
        self._informed.discard(event.peer)
        self._replica_rounds.pop(event.peer, None)
        if replica_round is not None:
            self._replica_rounds[event.peer] = replica_round
        return []

    def _on_tick(self, event: Tick, now: float) -> list[Command]:
        return self._merge_if_ready(now)

    def _on_timed_out(self, event: TimedOut, now: float) -> list[Command]:
        return self._merge_if_ready(now, timed_out=event.round == self.round)

    def _on_stop(self, event: Stop, now: float) -> list[Command]:
        self._stopping = True
        if self.phase is Phase.TRAINING or self.phase is Phase.NEW:
            self.phase = Phase.DONE
            return [Finished("stopped", self.round, "asked to stop")]
        return []

    def _on_rejoin(self, event: Rejoin, now: float) -> list[Command]:
        if not self.round <= event.round < self.rules.rounds:
            raise UsageError(f"node {self.id}: cannot rejoin at round {event.round} from round {self.round}")
        newer = {name: f for name, f in self._inbox.items() if event.keep_newer and name[1] >= event.round}
        self._inbox = newer
        self._informed.clear()
        if self._outgoing is not None:  # no share without a merge: scores would count the training twice
            self._merge([], self._context())
        if event.params is not None:
            self.begin_with(event.params)
        self.round = event.round
        self.phase = Phase.TRAINING
        return [Train(event.round)]

    def _ignore(self, event: Event, now: float) -> list[Command]:
        return []

    # --- The round ----------------------------------------------------------------------------------------

    def _awaited(self) -> Iterator[int]:
        at, inbox = self.round, self._inbox
        senders = self._topology.at(at).senders[self.id]
        if self.rules.asynchronous:
            present = {j for j, _ in inbox}
            return (j for j in senders if j not in present and self._takes_part(j))
        return (j for j in senders if (j, at) not in inbox and self._takes_part(j))

    def _merge_if_ready(self, now: float, timed_out: bool = False) -> list[Command]:
        if self.phase is not Phase.WAITING:
            return []
        timed_out = timed_out or (self._deadline is not None and now >= self._deadline)
        if not timed_out and any(True for _ in self._awaited()):
            return []
        self._merge_received(self.round)
        if _diverged(self.params):
            return self._fail("parameters are not finite after merging")
        return self._keyframe_requests() + self._end_round()

    def _merge_received(self, round: int) -> None:
        """Merge what has come for the model that was shared in ``round``."""
        ctx = self._context(round)
        received = self._due(ctx)
        if self._attack is not None and self._attack.kind == "little":
            self._spread = deviation([item.update.dense_values() for item in received if item.weight > 0.0])
        self._merge(received, ctx)
        self.merged_with = tuple(item.sender for item in received if item.weight > 0.0)
        if self.rules.asynchronous:
            self._merged = self.params

    def _keyframe_requests(self) -> list[Command]:
        return [
            RequestKeyframe(
                j,
                self.rules.wire.pack(
                    KeyframeRequest(self.id, self.round, self._sharing.replica_round(self.state, j))
                ),
            )
            for j in sorted(self._sharing.stale_peers(self.state) - self._down)
        ]

    def _end_round(self) -> list[Command]:
        commands: list[Command] = []
        self.round += 1
        if self.round in self.rules.evaluate_at:
            commands.append(Evaluate(self.round))
        if self.rules.checkpoint_every and self.round % self.rules.checkpoint_every == 0:
            commands.append(Checkpoint(self.round))
        return commands + self._next_round()

    def _due(self, ctx: RoundContext) -> list[Received]:
        """Take the frames that this round merges out of the inbox, by (sender, round), with their weights."""
        asynchronous, roster_version = self.rules.asynchronous, self._roster_version(self.round)
        due = sorted((j, r) for j, r in self._inbox if asynchronous or r <= self.round)
        newest = dict(due) if asynchronous else {}
        received = []
        for j, r in due:
            frame, weight = self._inbox.pop((j, r)), 0.0
            if r == newest.get(j, self.round) and frame.roster_version == roster_version:
                weight = ctx.weights.get(j, 0.0)
                if asynchronous:
                    weight *= self._staleness_factor(j, r)
            received.append(Received(j, r, weight, frame.update))
        return received

    def _staleness_factor(self, sender: int, round: int) -> float:
        """Return the factor of the sender's mixing weight, and remember that its update of ``round`` is merged.

        The staleness is the number of rounds, of this node or of the sender, that have ended between the merges
        of two updates of the sender: the larger one, so that both ends of an edge find about the same.
        """
        assert self.rules.staleness is not None
        mine, theirs = self._merged_rounds.get(sender, (self.round - 1, round - 1))
        self._merged_rounds[sender] = (self.round, round)
        return self.rules.staleness.factor(max(self.round - mine, round - theirs, 1) - 1)

    def _merge(self, received: list[Received], ctx: RoundContext) -> None:
        self.params, self.state = call_merge(self._sharing, self.state, self.params, received, ctx)
        if self.rules.project is not None:
            merged = self.params
            self.params = self.rules.project(merged.clone())
            if not torch.equal(self.params, merged):
                self.state = self._sharing.projected(self.state, self.params)
        self._outgoing, self._deadline = None, None

    def _next_round(self) -> list[Command]:
        if self.round >= self.rules.rounds or self._stopping:
            self.phase = Phase.DONE
            stopped = self.round < self.rules.rounds
            reason = "asked to stop" if stopped else ""
            return [Finished("stopped" if stopped else "finished", self.round, reason)]
        self.phase = Phase.TRAINING
        return [Train(self.round)]

    def _fail(self, reason: str) -> list[Command]:
        self.phase = Phase.FAILED
        where = f"node {self.id}, round {self.round}: {reason}"
        return [Finished("diverged", self.round, where)]

    def _context(self, round: int | None = None) -> RoundContext:
        at = self.round if round is None else round
        weights = self._topology.at(at).senders[self.id]
        return RoundContext(self.rules.seed, self.id, at, weights, self._sent_bytes)

    def _roster_version(self, round: int) -> int:
        """Return the roster version as in frames."""
        return self._topology.at(round).roster_version % ROSTER_VERSIONS

    def _takes_part(self, peer: int) -> bool:
        """Return whether frames are exchanged with ``peer`` in this round."""
        return peer not in self._down and self._expected_from.get(peer, 0) <= self.round

    def _own_update(self, peer: int) -> Update:
        return call_for_peer(self._sharing, self.state, peer, self._context(), self.update_dim)

    def _send_own(self, peer: int, update: Update) -> Send:
        """Send ``peer`` the update of :meth:`Sharing.for_peer`."""
        frame = Frame(self.id, self.round, update, roster_version=self._roster_version(self.round))
        return Send((peer,), self.round, self.rules.wire.pack(frame), keyframe=False)

    def _send_missed(self, lack: tuple[int, ...]) -> list[Command]:
        """Send each peer the increments since its replica if that is known, or else the keyframe."""
        by_round: dict[int | None, list[int]] = {}
        for j in lack:
            by_round.setdefault(self._replica_rounds.pop(j, None), []).append(j)
        commands: list[Command] = []
        for replica_round, peers in by_round.items():
            missed = (
                None
                if replica_round is None
                else self._sharing.delta_since(self.state, replica_round, self._context())
            )
            if replica_round is not None:
                self._answered |= dict.fromkeys(peers, self.round)
            commands.append(self._send_keyframe(tuple(peers), missed))
        return commands

    def _send_keyframe(self, to: tuple[int, ...], missed: Update | None = None) -> Send:
        """Bring ``to`` up to date with this node's last share: by a keyframe, or by the missed increments."""
        assert self._shared is not None
        keyframe = missed or call_keyframe(self._sharing, self.state, self._context(), self.update_dim)
        frame = Frame(
            self.id, self._shared, keyframe, keyframe=True, roster_version=self._roster_version(self._shared)
        )
        return Send(to, self._shared, self.rules.wire.pack(frame), keyframe=True)

    def objection(self, frame: Frame | FrameHeader) -> str | None:
        """Return why a frame cannot be accepted, by its header, or None."""
        if not 0 <= frame.sender < self._topology.num_nodes or frame.sender == self.id:
            return "the sender is not another node of this topology"
        if not 0 <= frame.round < self.rules.rounds:
            return f"the run has {self.rules.rounds} rounds"
        if not self.rules.asynchronous and frame.round > self.round + self.rules.rounds_ahead:
            return f"{frame.round - self.round} rounds ahead; at most {self.rules.rounds_ahead} are kept"
        if not self._is_neighbour(frame) and not self._is_of_another_roster(frame):
            return "the sender is not a neighbour in that round"
        return None

    def max_frames(self, frame: Frame | FrameHeader) -> int:
        """Return the largest number of this sender's frames that may wait for a merge."""
        return self.rules.inbox_frames if self._is_neighbour(frame) else FRAMES_OF_STRANGERS

    def _is_neighbour(self, frame: Frame | FrameHeader) -> bool:
        return frame.sender in self._topology.at(frame.round).senders[self.id]

    def _is_of_another_roster(self, frame: Frame | FrameHeader) -> bool:
        """Return whether the sender's graph may be one that this node does not know yet."""
        return frame.roster_version != self._roster_version(frame.round)

    def _over_budget(self, frame: Frame) -> str | None:
        """Return why no further frame of a sender may wait for a merge, or None."""
        if math.isinf(self.rules.inbox_bytes):
            return None
        if not self.rules.asynchronous and frame.round < self.round - MAX_ROUNDS_AHEAD:
            return f"{self.round - frame.round} rounds old; at most {MAX_ROUNDS_AHEAD} are accepted"
        waiting = [f for (sender, at), f in self._inbox.items() if sender == frame.sender and at != frame.round]
        counts = [f.update.count for f in waiting]
        return over_budget(counts, frame.update.count, self.max_frames(frame), self.rules.inbox_bytes)

    def _objection(self, frame: Frame) -> str | None:
        """Return why a frame cannot be accepted, or None."""
        if (problem := self.objection(frame) or self._over_budget(frame)) is not None:
            return problem
        if frame.update.dim != self.update_dim:
            return f"an update of dimension {frame.update.dim}, not {self.update_dim}"
        if not frame.update.is_finite():
            return "a value is not finite"
        if math.isfinite(self.rules.max_magnitude_ratio):
            own = scale_of(self.params)
            if (largest := frame.update.largest()) > self.rules.max_magnitude_ratio * own:
                return f"a value of {largest:.3g}, where no parameter of this node is beyond {own:.3g}"
        if self._scale is not None and (largest := frame.update.largest()) > self._most():
            return f"a value of {largest:.3g}; by this node's own training none is beyond {self._scale.own:.3g}"
        return None

    def _most(self) -> float:
        return math.inf if self._scale is None else self.rules.max_growth * self._scale.own

    def _is_inflated(self, frame: Frame) -> bool:
        largest = frame.update.largest() if self._scale is not None else 0.0
        return math.isfinite(largest) and largest > INFLATION * self._most()


def over_budget(counts: Sequence[int], count: int, max_frames: int, max_bytes: float) -> str | None:
    """Return why no further frame of ``count`` values may wait beside those of ``counts``, or None."""
    if len(counts) >= max_frames:
        return f"{len(counts)} frames of it wait for a merge; at most {max_frames} may"
    size_bytes = BYTES_PER_VALUE * (sum(counts) + count)
    if len(counts) >= FREE_FRAMES and size_bytes > max_bytes:
        return f"its frames that wait for a merge take {size_bytes} bytes; {max_bytes:.0f} may"
    return None


def _is_finite(update: Update) -> bool:
    """Return whether receivers get finite values; symbols are multiplied only if they might overflow."""
    values = update.values
    if isinstance(values, Quantized) and (not len(values.scales) or float(values.scales.max()) < 2.0**90):
        return True
    return update.is_finite()


def _diverged(params: Tensor) -> bool:
    return not largest_magnitude(params) <= MAX_PARAMETER  # NaN compares as False


# An event that is not in this table is an error of the driver. A finished or failed node ignores events.
_TRANSITIONS: dict[tuple[Phase, type], Callable[[Node, Any, float], list[Command]]] = {
    (Phase.NEW, FrameReceived): Node._on_frame,
    (Phase.NEW, PeerUp): Node._on_peer_up,
    (Phase.NEW, PeerLost): Node._on_peer_lost,
    (Phase.NEW, RosterChanged): Node._on_roster,
    (Phase.NEW, KeyframeRequested): Node._ignore,
    (Phase.NEW, Tick): Node._ignore,
    (Phase.NEW, TimedOut): Node._ignore,
    (Phase.NEW, Stop): Node._on_stop,
    #
    (Phase.TRAINING, Trained): Node._on_trained,
    (Phase.TRAINING, FrameReceived): Node._on_frame,
    (Phase.TRAINING, PeerUp): Node._on_peer_up,
    (Phase.TRAINING, PeerLost): Node._on_peer_lost,
    (Phase.TRAINING, RosterChanged): Node._on_roster,
    (Phase.TRAINING, KeyframeRequested): Node._on_keyframe_requested,
    (Phase.TRAINING, Tick): Node._ignore,
    (Phase.TRAINING, TimedOut): Node._ignore,
    (Phase.TRAINING, Rejoin): Node._on_rejoin,
    (Phase.TRAINING, Stop): Node._on_stop,
    #
    (Phase.WAITING, FrameReceived): Node._on_frame,
    (Phase.WAITING, PeerUp): Node._on_peer_up,
    (Phase.WAITING, PeerLost): Node._on_peer_lost,
    (Phase.WAITING, RosterChanged): Node._on_roster,
    (Phase.WAITING, KeyframeRequested): Node._on_keyframe_requested,
    (Phase.WAITING, Tick): Node._on_tick,
    (Phase.WAITING, TimedOut): Node._on_timed_out,
    (Phase.WAITING, Rejoin): Node._on_rejoin,
    (Phase.WAITING, Stop): Node._on_stop,
    #
    **{
        (phase, event): Node._ignore
        for phase in (Phase.DONE, Phase.FAILED)
        for event in (
            *(Trained, FrameReceived, PeerUp, PeerLost, RosterChanged),
            *(KeyframeRequested, Tick, TimedOut, Stop),
        )
    },
}
