"""Decide how long a node waits for its peers, and when it takes over their round."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from jwins.net.bootstrap import Joiner
from jwins.net.neighbour_timeout import SUSPECT_AFTER
from jwins.net.peer_session import Signal, State
from jwins.node import MAX_ROUNDS_AHEAD, PeerUp, Rejoin, Tick, TimedOut

if TYPE_CHECKING:
    from jwins.net.session import Session

FIRST_NOTICE_S = 5.0
"""Time after which a node logs its awaited peers; it doubles after each log."""

SOON_S = 0.001
"""Minimum interval between two checks of a wait."""


@dataclass(slots=True)
class Wait:
    """A wait of the node in a round; its times are seconds for which this process was awake."""

    round: int
    since: float
    next_notice: float = FIRST_NOTICE_S


def _is_quorum(ahead: Collection[int], expected: Collection[int]) -> bool:
    """Return whether more members are ahead than half the expected neighbours, and two unless only one is."""
    return 2 * len(ahead) > len(expected) and len(ahead) >= min(2, len(expected))


class Waiting:
    """Supervisor of a session's timeouts."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.wait: Wait | None = None
        self.ticks: list[float] = []

    def review(self) -> None:
        """Apply timeouts, and continue when no peer is awaited any more."""
        if self._session.joiner is not None:
            self._session.joiner.review()
        while self.ticks and self.ticks[0] <= self._session.now:
            self.ticks.pop(0)
            self._session.rounds.deliver(Tick())
        if self._session.node.rules.asynchronous:
            self._request_if_fresh()
            return
        while not self._session.holds and self._session.end is None and not self._session.leaving:
            missing = self._session.node.waiting_for
            if missing is None:
                self.wait = None
                return
            if self.wait is None or self.wait.round != self._session.node.round:
                self.wait = Wait(self._session.node.round, self._session.awake)
            before = self._session.node.round
            self._time_out(missing)
            if self._session.node.round == before and not self._rejoin_if_behind():
                missing = self._session.node.waiting_for or ()
                if all(self._is_resolved(peer) for peer in missing):
                    self._merge_partially(missing)
                else:
                    self._notice(missing)
                    return

    def _request_if_fresh(self) -> None:
        """Ask for a model if a node has merged with nobody, and is stale for most neighbours.

        Its own model would be that of a beginner. A training that has ended is held back meanwhile.
        """
        session, staleness = self._session, self._session.node.rules.staleness
        if session.end is not None or session.leaving or staleness is None:
            return
        near = session.node.round + staleness.largest
        if session.fresh and session.joiner is None:
            expected = self._expected_neighbours()
            ahead = [
                peer
                for peer in expected
                if session.peers[peer].is_introduced
                and session.peers[peer].settled
                and session.peers[peer].round > near
            ]
            if _is_quorum(ahead, expected):
                self._request_model(ahead, statistics.median_low(session.peers[peer].round for peer in ahead))
        if session.joiner is None and not self.may_be_late and (held := session.rounds.take_held()) is not None:
            session.rounds.on_trained(held)

    @property
    def may_be_late(self) -> bool:
        """Return whether a node of an asynchronous run has sent nothing, and may find its neighbours far ahead.

        It then waits for their connections, for at most ``timeout_s``.
        """
        session = self._session
        begins = session.fresh and not session.rounds.shared.at and session.awake < session.settings.timeout_s
        connecting = (session.peers[peer].state is State.CONNECTING for peer in self._expected_neighbours())
        return begins and any(connecting)

    def _request_model(self, ahead: list[int], others: int) -> None:
        """Ask members for a model, where ``others`` is the round that a quorum shows."""
        session, at = self._session, self._session.node.round
        session.log("warning", "needs a model", round=at, others=others)
        # Only the neighbours of that round send their model; a newer roster may have given the node others.
        there = session.node.rules.topology.at(others).senders[session.node.id]
        connected = [peer for peer in there if session.peers[peer].is_introduced]
        providers = [peer for peer in ahead if peer in there] or connected or ahead
        # A model of a round so late would be refused.
        providers.sort(key=lambda peer: session.peers[peer].round > others + MAX_ROUNDS_AHEAD)
        session.joiner = Joiner(session, tuple(providers), at + 1, shown=others)
        session.joiner.review()

    def _expected_neighbours(self) -> list[int]:
        """Return the neighbours of this round that may still take part."""
        session, never = self._session, (State.LEFT, State.INCOMPATIBLE, State.REMOVED, State.SUSPECT)
        senders = session.node.rules.topology.at(session.node.round).senders[session.node.id]
        return [peer for peer in senders if session.peers[peer].state not in never]

    def _is_resolved(self, peer: int) -> bool:
        return self._is_ahead(peer) or self._session.peers[peer].timed_out_in == self._session.node.round

    def _time_out(self, missing: tuple[int, ...]) -> None:
        at = self._session.node.round
        for peer in missing:
            known, limit_s = self._session.peers[peer], self.limit_s(peer)
            if self._is_resolved(peer) or self.waited_s < limit_s - SOON_S:
                continue
            known.timeouts += 1
            known.timed_out += 1
            known.timed_out_in = at
            self._session.log("warning", "timed_out", peer=peer, round=at, limit_s=round(limit_s, 3))
            self._session.apply(peer, Signal.TIMEOUTS if self._gives_up(peer) else Signal.TIMEOUT)
            if not known.is_awaited:
                self._session.log("warning", "suspect", peer=peer, connected=known.connected)
            if self._session.node.round != at:
                return

    def _gives_up(self, peer: int) -> bool:
        """Return whether to give up a connected peer, because another neighbour is more reliable.

        That neighbour was merged more recently, or has timed out fewer times in a row. So at least one remains:
        a node that gave up all of its connected neighbours would run ahead of them, ever further, alone.
        """
        session, known = self._session, self._session.peers[peer]
        if not known.is_introduced or known.timeouts < SUSPECT_AFTER:
            return False
        senders = session.node.rules.topology.at(session.node.round).senders[session.node.id]
        others = (session.peers[other] for other in senders if other != peer)
        return any(
            other.is_awaited
            and other.is_introduced
            and (other.merged_in, -other.timeouts) > (known.merged_in, -known.timeouts)
            for other in others
        )

    def _notice(self, missing: tuple[int, ...]) -> None:
        if self.wait is not None and self.waited_s >= self.wait.next_notice:
            self.wait.next_notice = 2 * self.waited_s
            seconds = round(self.waited_s, 3)
            self._session.log(
                "warning", "waiting", round=self._session.node.round, peers=missing, seconds=seconds
            )

    def _merge_partially(self, missing: tuple[int, ...]) -> None:
        """Continue without peers that timed out, and without peers that are ahead until their round."""
        at = self._session.node.round
        for peer in missing:
            known = self._session.peers[peer]
            if self._is_ahead(peer) and known.ahead_from is not None:
                self._session.log("warning", "skipped", peer=peer, round=at, frame=known.ahead_from)
                known.skipped_until = at + 1
                self._session.rounds.deliver(PeerUp(peer, at + 1))
            if self._session.node.round != at:
                return
        self._session.rounds.deliver(TimedOut(at))

    def _rejoin_if_behind(self) -> bool:
        """Take over the others' round if most of the expected neighbours are past this one."""
        at, expected = self._session.node.round, self._expected_neighbours()
        missing = self._session.node.waiting_for or ()
        passed = [peer for peer in expected if peer in missing and self._is_ahead(peer)]
        ahead = [peer for peer in passed if self._is_witness(peer)]
        rounds = {peer: self._session.peers[peer].round for peer in ahead}
        if not _is_quorum(rounds, expected):
            self._session.witnesses.ask(passed)
            rounds = (self._session.witnesses.ahead() if ahead else {}) | rounds
            if not _is_quorum(rounds, expected):
                return False
        target = min(statistics.median_low(rounds.values()), self._session.node.rules.rounds - 1)
        if target <= at:
            return False
        if self._session.fresh:
            self._request_model(ahead, target)
            return True
        self.rejoin(target)
        return True

    def _is_witness(self, peer: int) -> bool:
        known = self._session.peers[peer]
        return known.settled and self.is_possible(peer, known.round)

    def is_possible(self, peer: int, round: int) -> bool:
        """Return whether a member can have reached a round since this node last merged with it.

        It counts from the round of that merge. Counted from this node's own round, each false claim that it
        follows would permit the next.
        """
        session, known = self._session, self._session.peers[peer]
        possible = session.rounds.times.possible_rounds(session.now - known.merged_at)
        return session.fresh or round <= known.merged_in + possible

    def rejoin(self, target: int, params: Tensor | None = None) -> None:
        """Continue in a later round, with a received model or this node's own."""
        at = self._session.node.round
        self._session.log("warning", "rejoining", at=at, others=target)
        self._session.skipped_rounds += target - at
        self._session.settled = False
        self._session.witnesses.forget()
        for known in self._session.peers.values():
            known.seen = {seen for seen in known.seen if seen[0] >= target}
            known.buffer.frames.clear()
            if known.ahead_from is not None and known.ahead_from <= target:
                known.ahead_from = None
        self._session.rounds.deliver(Rejoin(target, params=params, keep_newer=True))
        for peer, known in self._session.peers.items():
            if known.is_awaited:
                known.skipped_until = 0
                self._session.rounds.deliver(PeerUp(peer, target))
            if known.is_introduced:
                self._session.outbox.send_hello(peer)

    def next_time(self) -> float:
        """Return the latest time of the next review."""
        times = list(self.ticks[:1])
        if self._session.joiner is not None:
            times.append(self._session.joiner.wait_until)
        elif self._session.rounds.held is not None:
            left_s = self._session.settings.timeout_s - self._session.awake
            times.append(self._session.now + max(SOON_S, left_s))
        elif self.wait is not None and self._session.end is None:
            left = [self.limit_s(p) - self.waited_s for p in self._session.missing if not self._is_resolved(p)]
            left.append(self.wait.next_notice - self.waited_s)
            times.append(self._session.now + max(SOON_S, min(left)))
        return min(times, default=float("inf"))

    def limit_s(self, peer: int) -> float:
        """Return the timeout for this peer now."""
        session = self._session.peers[peer]
        starts = session.state is State.CONNECTING and session.joins_at is None
        joins = (
            self._session.node.round == self._session.settings.joins_at
        )  # a node that joins may be there before the others
        under_way = not self._session.fresh and any(self._is_ahead(other) for other in self._session.peers)
        if (starts or joins) and not under_way:
            return session.timeout.first_s
        means = [
            self._session.rounds.times.training_s + other.timeout.mean_s
            for at, other in self._session.peers.items()
            if at != peer and other.timeout.mean_s is not None and other.is_introduced
        ]
        return session.timeout.limit_s(means)

    def _is_ahead(self, peer: int) -> bool:
        """Return whether the peer is past this node's round, so that its frame cannot arrive any more."""
        ahead = self._session.peers[peer].ahead_from
        return ahead is not None and ahead > self._session.node.round

    @property
    def waited_s(self) -> float:
        """Return how long the node has waited, in seconds awake."""
        return 0.0 if self.wait is None else self._session.awake - self.wait.since
