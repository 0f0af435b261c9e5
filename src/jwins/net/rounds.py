"""The node of a session: its events and commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jwins.net import events as ev
from jwins.net.peer_session import State
from jwins.node import (
    MAX_ROUNDS_AHEAD,
    Checkpoint,
    Evaluate,
    Finished,
    FrameRefused,
    Rejoin,
    RequestKeyframe,
    Send,
    Train,
    WakeAt,
)

if TYPE_CHECKING:
    from jwins.net.session import Session

PROBE_EVERY = 8
"""Interval in rounds between Hellos to a connected peer that the node does not wait for."""

MAX_INFLATED = 3
"""Number of frames with inflated values after which a peer is cut; a single one may be damage."""

PACE_FACTOR = 100.0
"""Largest plausible speed of others relative to this node; later rounds are not believed. A node that is slower
than this trains alone."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """Report of a round's merge.

    Attributes:
        merged_with: neighbours that had a weight in the merge.
        without: the other neighbours of the round, each with the reason: ``timed out``, ``ahead``,
            ``other roster``, ``nothing new`` in an asynchronous run, or the state of its session.
    """

    merged_with: tuple[int, ...]
    without: Mapping[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class RoundTimes:
    """Duration of this node's rounds, and the number of rounds that others can have completed.

    Attributes:
        training_s: smoothed seconds awake of a training.
        round_s: smoothed seconds awake of a round.
    """

    training_s: float = 0.0
    round_s: float = 0.0
    trained_from: float = 0.0
    merged_at: float = 0.0

    def trained(self, awake: float) -> None:
        """Record the end of a training."""
        self.training_s = _smoothed(self.training_s, awake - self.trained_from)

    def merged(self, awake: float) -> None:
        """Record the end of a round."""
        self.round_s = _smoothed(self.round_s, awake - self.merged_at)
        self.merged_at = awake

    def possible_rounds(self, seconds: float) -> float:
        """Return how many rounds others can have completed in a time; inf before this node's first training."""
        round_s = self.round_s or self.training_s
        return MAX_ROUNDS_AHEAD + PACE_FACTOR * seconds / round_s if round_s else float("inf")


def _smoothed(before: float, seconds: float) -> float:
    return before + (seconds - before) / 8 if before else max(seconds, 1e-6)


@dataclass(slots=True)
class Shared:
    """Times at which the node sent its frames, in seconds awake, by round."""

    at: dict[int, float] = field(default_factory=dict)

    def add(self, round: int, awake: float) -> None:
        """Keep the time of one frame."""
        self.at[round] = awake
        self.at.pop(round - MAX_ROUNDS_AHEAD, None)


class Rounds:
    """Driver of a session's node."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.merged: dict[int, MergeReport] = {}
        self.times = RoundTimes()
        self.shared = Shared()
        self.merged_at = session.now
        self.held: int | None = (
            None  # a round whose training has ended, and that may begin with a model of others
        )

    def deliver(self, event: Any) -> None:
        """Deliver an event to the node, and carry out its commands."""
        before = self._session.node.round
        commands = self._session.node.handle(event, self._session.now)
        if self._session.node.round == before + 1 and not isinstance(event, Rejoin):
            self._on_merged(before)
        self.carry_out(commands)

    def carry_out(self, commands: list[Any]) -> None:
        """Carry out the node's commands."""
        for command in commands:
            match command:
                case Train(round):
                    self._on_train(round)
                case Send():
                    self._session.outbox.on_send(command)
                case RequestKeyframe(to, packed):
                    if self._session.peers[to].is_introduced:
                        self._session.outbox.transmit(to, packed, "control")
                case Evaluate(round):
                    self._session.out.append(ev.Measure(round))
                case Checkpoint(round):
                    self._session.out.append(ev.SaveCheckpoint(round))
                case WakeAt(at):
                    self._session.waiting.ticks = sorted([*self._session.waiting.ticks, at])
                case FrameRefused(sender, round, reason, inflated):
                    self._session.refuse(sender, f"frame of round {round}: {reason}")
                    if inflated:
                        self._on_inflated(sender, reason)
                case Finished():
                    self.finish(command)

    def _on_inflated(self, peer: int, reason: str) -> None:
        known = self._session.peers[peer]
        known.inflated += 1
        if known.inflated >= MAX_INFLATED and not known.cut:
            self._session.cut(peer, f"inflates its values: {reason}")

    def _on_train(self, round: int) -> None:
        self._session.waiting.wait = None
        if self._session.joiner is not None and self._session.joiner.take_pending():
            return
        if self._session.leaving:
            return  # after a restart the node begins with this training
        for peer in self._session.peers:
            self._send_due(peer, round)
        for peer in self._session.peers:
            self._session.arrivals.take_early(peer)
        self._session.training = True
        self.times.trained_from = self._session.awake
        self._session.out.append(ev.StartTraining(round))

    def _send_due(self, peer: int, round: int) -> None:
        """Send a peer the model, frames and Hello that are due in the round that begins."""
        known = self._session.peers[peer]
        self._session.provider.provide(peer)
        self._session.outbox.resend(peer)
        if known.is_introduced and known.joins_at == round + self._session.node.rules.rounds_ahead:
            # Its first frame, which was refused if it came before, can be kept now.
            self._session.outbox.send_hello(peer)
        if known.state is State.SLOW and round % PROBE_EVERY == 0:
            # Two peers that are SLOW for each other send no frames; the answer to this Hello ends that.
            self._session.outbox.send_hello(peer)
        if known.state is State.SLOW and known.wants_readmission and round >= known.readmit_from:
            self._session.arrivals.readmit(peer)
            self._session.outbox.send_hello(peer)

    def on_trained(self, round: int) -> None:
        """Handle the end of training: the node shares."""
        self._session.training = False
        if self._session.leaving and round != self._session.node.round:
            return
        if self._session.node.rules.asynchronous and (
            self._session.joiner is not None or self._session.waiting.may_be_late
        ):
            self.held = round
            return
        self.times.trained(self._session.awake)
        self.shared.add(round, self._session.awake)
        self.deliver(ev.TrainingDone(round))

    def take_held(self) -> int | None:
        """Return the round whose training was held back, and forget it; None if the node is past it."""
        held, self.held = self.held, None
        return held if held == self._session.node.round else None

    def _on_merged(self, round: int) -> None:
        """Handle a complete round."""
        merged_with, rules = self._session.node.merged_with, self._session.node.rules
        neighbours = rules.topology.at(round).senders[self._session.node.id]
        without = {peer: self._why_without(peer, round) for peer in neighbours if peer not in merged_with}
        self.merged[round] = MergeReport(merged_with, without)
        self.merged.pop(round - MAX_ROUNDS_AHEAD, None)
        self.times.merged(self._session.awake)
        for peer in merged_with:
            known = self._session.peers[peer]
            known.merged_in, known.merged_at, known.skipped_until = round, self._session.now, 0
            # A synchronous peer that is far beyond its frame shows that this node is behind.
            if rules.asynchronous or known.round <= round + self._session.keeps:
                self._session.settled, self._session.fresh, self.merged_at = True, False, self._session.now
        silent = not rules.asynchronous or self._session.now > self.merged_at + self._session.settings.timeout_s
        if neighbours and not merged_with and silent:
            self._session.log("warning", "merged with nobody", round=round, without=without)

    def _why_without(self, peer: int, round: int) -> str:
        known = self._session.peers[peer]
        if not known.is_awaited:
            return known.state.value
        if known.timed_out_in == round:
            return "timed out"
        if self._session.node.rules.asynchronous:
            return "nothing new"
        return "ahead" if known.skipped_until > round else "other roster"

    def finish(self, end: Finished) -> None:
        """Record the end before the Bye is sent: others may then leave, so no round could be repeated."""
        self._session.end, self._session.waiting.wait = end, None
        packed = self._session.outbox.bye(end.status)
        peers = self._session.peers.items()
        # A peer that has ended may wait for this node's Bye.
        recipients = [peer for peer, known in peers if known.is_introduced or known.state is State.LEFT]
        for peer in recipients:
            if self._session.peers[peer].is_introduced:
                self._session.outbox.flush(peer)
            self._session.traffic.count(self._session.node.id, (peer,), packed, "control")
        self._session.out.append(ev.Ended(end.status, end.round, end.reason))
        self._session.out += [ev.Transmit(peer, packed.data, "control") for peer in recipients]
