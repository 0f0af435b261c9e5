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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from jwins.errors import UsageError
from jwins.node.commands import (
    Checkpoint,
    Command,
    Evaluate,
    Finished,
    RequestKeyframe,
    Send,
    Train,
    WakeAt,
)
from jwins.node.events import (
    Event,
    FrameReceived,
    KeyframeRequested,
    PeerLost,
    PeerUp,
    Rejoin,
    RosterChanged,
    Stop,
    Tick,
    TimedOut,
    Trained,
)
from jwins.node.inbox import Inbox, roster_version
from jwins.node.rules import Rules
from jwins.node.state import STATE_TYPES, NodeState, Phase
from jwins.rng import RoundContext
from jwins.sharing.attacks import attacked, deviation
from jwins.sharing.calls import (
    call_for_peer,
    call_init,
    call_keyframe,
    call_merge,
    call_share,
    check_state_types,
    method_name,
)
from jwins.sharing.own_scale import OwnScale
from jwins.sharing.update import Quantized, Received, Update, largest_magnitude
from jwins.wire.frame import Frame, FrameHeader, KeyframeRequest, Packed

MAX_PARAMETER = 1e30
"""Parameters beyond this have diverged, even if they are finite. They are far from any real model, and so near
the largest float32, 3.4e38, that differences, wavelet coefficients or bfloat16 roundings soon overflow."""


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
        self._inbox: Inbox
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
        if self._inbox.scale is not None:
            self._inbox.scale = OwnScale(params)
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
            dict(self._inbox.frames),
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
        scale = OwnScale(state.params) if math.isfinite(self.rules.max_growth) else None
        self._inbox = Inbox(self.id, self.rules, self.update_dim, state.inbox, scale)
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

    @property
    def model(self) -> Tensor:
        """Return the newest merged model, (P,) float32, or the initial one."""
        return self.params if self._merged is None else self._merged

    @property
    def inbox(self) -> Mapping[tuple[int, int], Frame]:
        """Return the frames that wait for a merge, by (sender, round)."""
        return self._inbox.frames

    def objection(self, frame: Frame | FrameHeader) -> str | None:
        """Return why a frame cannot be accepted, by its header, or None."""
        return self._inbox.objection(frame, self.round)

    def max_frames(self, frame: Frame | FrameHeader) -> int:
        """Return the largest number of this sender's frames that may wait for a merge."""
        return self._inbox.max_frames(frame)

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
        if self._inbox.scale is not None:
            self._inbox.scale.trained(self.params, trained)
        if self.rules.asynchronous and self._outgoing is not None:
            trained = self._merge_previous(trained - self.params)
        start = trained if self._attack is None else self.params  # only an attacker's vector is kept meanwhile
        self.params = trained
        if _diverged(trained):
            return self._fail("parameters are not finite after local training")
        update, self.state = self._share(start, self._context())
        if not _is_finite(update):
            return self._fail(f"{method_name(self._sharing, 'share')} returned a value that is not finite")
        if self._inbox.scale is not None:
            self._inbox.scale.shared(self.params, update.largest())
        self._shared = self.round
        return Frame(self.id, self.round, update, roster_version=roster_version(self.rules, self.round))

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
        if (refused := self._inbox.refused(event.frame, self.round, self.params)) is not None:
            return [refused]
        self._inbox.add(event.frame)
        return self._merge_if_ready(now)

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
        kept = self._inbox.frames.items() if event.keep_newer else ()
        self._inbox.frames = {name: frame for name, frame in kept if name[1] >= event.round}
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
        at, inbox = self.round, self._inbox.frames
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
        asynchronous, version = self.rules.asynchronous, roster_version(self.rules, self.round)
        due = self._inbox.take(self.round)
        newest = {frame.sender: frame.round for frame in due} if asynchronous else {}
        received = []
        for frame in due:
            j, r, weight = frame.sender, frame.round, 0.0
            if r == newest.get(j, self.round) and frame.roster_version == version:
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

    def _takes_part(self, peer: int) -> bool:
        """Return whether frames are exchanged with ``peer`` in this round."""
        return peer not in self._down and self._expected_from.get(peer, 0) <= self.round

    def _own_update(self, peer: int) -> Update:
        return call_for_peer(self._sharing, self.state, peer, self._context(), self.update_dim)

    def _send_own(self, peer: int, update: Update) -> Send:
        """Send ``peer`` the update of :meth:`Sharing.for_peer`."""
        frame = Frame(self.id, self.round, update, roster_version=roster_version(self.rules, self.round))
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
        version = roster_version(self.rules, self._shared)
        frame = Frame(self.id, self._shared, keyframe, keyframe=True, roster_version=version)
        return Send(to, self._shared, self.rules.wire.pack(frame), keyframe=True)


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
