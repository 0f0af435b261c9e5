"""Bootstrap: a model from a member for a node that joins later or cannot begin with the common start."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jwins.errors import CodecError
from jwins.net import events as ev
from jwins.net.early_frames import decode
from jwins.net.peer_session import State
from jwins.node import MAX_ROUNDS_AHEAD
from jwins.sharing.own_scale import scale_of
from jwins.sharing.update import Update
from jwins.wire.codec import codec
from jwins.wire.frame import DIGEST_BYTES, Frame, Packed, StateRequest, Wire

if TYPE_CHECKING:
    from jwins.net.session import Session

PROVIDE_EVERY = 16
"""A member receives at most one model in this number of rounds, over all of its connections."""

ASK_AGAIN_S = 5.0
AWAY_S = 15.0
"""Time limit for a provider whose connection broke, longer than the pause between two attempts."""
LAST_AWAY_FACTOR = 4.0
"""Factor on this limit for the last provider, because nobody else can be asked."""


def state_wire(digest: bytes, size: int) -> Wire:
    """Return the wire format of models: raw frames with a separate digest, so that no update is mistaken for
    one.

    Args:
        digest: digest of the experiment.
        size: P.
    """
    own = hashlib.blake2b(digest + b"model", digest_size=DIGEST_BYTES).digest()
    return Wire(codec("raw"), own, size)


def pack_state(wire: Wire, sender: int, round: int, params: Tensor) -> Packed:
    """Encode a model, ``params`` (P,) float32, as a message."""
    return wire.pack(Frame(sender, round, Update(len(params), None, params), keyframe=True))


class Joiner:
    """Request for a model, to one member after the other until one of them sends it.

    A provider that has not reached the round yet sends Hellos, and the joiner waits for it. The joiner asks the
    next one if a provider does not answer in time, disconnects for long, ends, or is incompatible. One that
    disconnected is asked once more, after all others.

    Args:
        session: session of the node that needs a model.
        providers: members to ask, in order.
        from_round: earliest round of the model.
        shown: the round that a quorum showed to a node that has begun, which limits the model's round; None if
            the node has not begun yet.

    Attributes:
        at_start: whether the node has not begun yet.
    """

    def __init__(
        self, session: Session, providers: tuple[int, ...], from_round: int, *, shown: int | None
    ) -> None:
        self._session, self._from_round, self._shown = session, from_round, shown
        self.at_start, self._since = shown is None, session.now
        self._left = list(providers)
        self._all = tuple(providers)
        wire = session.node.rules.wire
        self._wire = state_wire(wire.digest, session.handshake.dim)
        self._request = wire.pack(StateRequest(session.node.id, from_round))
        self._answers: dict[int, str] = {}
        self._asked_again: set[int] = set()
        self._claimed: list[int] = []
        self._too_late: set[int] = set()
        self._pending: Frame | None = None
        self._current: int | None = None
        self._until = self._ask_at = self._away_from = 0.0

    @property
    def _timeout_s(self) -> float:
        return 20.0 * self._session.settings.timeout_s

    @property
    def wait_until(self) -> float:
        """Return the time of the next review, on the session's clock."""
        if self._pending is not None:
            return float("inf")
        return self._session.now + max(
            0.001, min(self._until, self._ask_at, self._back_by) - self._session.awake
        )

    @property
    def _back_by(self) -> float:
        max_away_s = min(AWAY_S, self._timeout_s / 4) * (1 if self._left else LAST_AWAY_FACTOR)
        return self._away_from + max_away_s if self._away_from else float("inf")

    def review(self) -> None:
        """Ask a provider, repeat the request or ask the next; begin with a received model when possible."""
        session = self._session
        if self._pending is not None:
            if session.node.waiting_for is not None or session.rounds.held is not None:
                self.take_pending()
            return
        if not self.at_start and not session.fresh:
            session.joiner = None  # the node has merged meanwhile
            return
        if self._current is None and not self._next():
            return
        assert self._current is not None
        if session.awake >= min(self._until, self._back_by):
            away = session.awake >= self._back_by
            problem = (
                "disconnected" if away else f"did not answer within {self._timeout_s:.0f} s; is it running?"
            )
            if away and self._current not in self._asked_again:
                self._asked_again.add(self._current)
                self._left.append(self._current)
            self._give_up(problem)
        elif session.awake >= self._ask_at:
            self._ask()

    def take_pending(self) -> bool:
        """Continue with the received model and return True, unless the node is past its round."""
        session, pending = self._session, self._pending
        if pending is None:
            return False
        session.joiner = None
        if session.node.round >= pending.round or not session.fresh:
            return False
        session.fresh = False
        session.began_in(pending.round)
        session.waiting.rejoin(pending.round, pending.update.dense_values())
        return True

    def _next(self) -> bool:
        session = self._session
        while self._left and session.peers[self._left[0]].state is State.INCOMPATIBLE:
            peer = self._left.pop(0)
            self._answers[peer] = f"is incompatible: {session.peers[peer].mismatch}"
        if not self._left:
            answers = "; ".join(f"{{{peer}}} {problem}" for peer, problem in self._answers.items())
            names = ", ".join(f"{{{peer}}}" for peer in self._all)
            self._end_without(f"none of {names} sent its model: {answers}")
            return False
        self._current = self._left.pop(0)
        self._until, self._away_from = session.awake + self._timeout_s, 0.0
        if self._current in self._asked_again:
            self.on_disconnected(self._current)  # still, unless it is back
        session.log("info", "requesting state", peer=self._current, from_round=self._from_round)
        self._ask()
        return True

    def _end_without(self, reason: str) -> None:
        """End without a model.

        A node that has begun goes on if it needed one only because of one of several neighbours, or if a model
        was of a later round than the quorum showed: the quorum may have changed since.
        """
        session = self._session
        session.joiner = None
        neighbours = session.node.rules.topology.at(session.node.round).senders[session.node.id]
        if not self.at_start and (self._too_late or len(self._all) == 1 < len(neighbours)):
            session.log("error", "no model", reason=reason)
            session.witnesses.forget()
            for peer in set(self._all) - self._too_late:
                session.peers[peer].settled = False
            return
        session.leaving = True
        session.out.append(ev.Failed(reason))

    def _ask(self) -> None:
        session, current = self._session, self._current
        self._ask_at = session.awake + min(ASK_AGAIN_S, self._timeout_s / 4)
        if current is not None and session.peers[current].connected:
            session.outbox.transmit(current, self._request, "control")

    def _give_up(self, problem: str) -> None:
        assert self._current is not None
        self._session.log("warning", "no model", peer=self._current, reason=problem)
        self._answers[self._current] = problem
        self._current = None
        self.review()

    def on_connected(self, peer: int) -> None:
        """Handle a new connection."""
        if peer == self._current:
            self._away_from, self._ask_at = 0.0, self._session.awake

    def on_disconnected(self, peer: int) -> None:
        """Handle the end of a connection."""
        is_away = not self._session.peers[peer].connected
        if peer == self._current and is_away and not self._away_from:
            self._away_from = self._session.awake or 1e-9

    def on_hello(self, peer: int) -> None:
        """Handle a Hello of the provider, which may not have reached the round yet."""
        if peer == self._current:
            self._until = self._session.awake + self._timeout_s

    def on_refused(self, peer: int, problem: str) -> None:
        """Handle a peer that ends or is incompatible."""
        if peer == self._current:
            self._give_up(problem)

    def on_message(self, peer: int, data: bytes) -> bool:
        """Handle a message if it is a model; return whether it is one."""
        try:
            header = self._wire.peek(data)
        except CodecError:  # something else
            return False
        if header is None or peer != self._current or header.sender != peer:
            self._session.refuse(peer, "a model that was not requested")
            return True
        try:
            found = decode(lambda: self._wire.unpack(data))
        except CodecError as error:
            self._on_bad_model(peer, str(error))
            return True
        assert isinstance(found, Frame)
        if problem := self._objection(found):
            self._on_bad_model(peer, problem)
        else:
            self._take(peer, found)
        return True

    def _on_bad_model(self, peer: int, problem: str) -> None:
        self._session.refuse(peer, f"a model that cannot be used: {problem}")
        self._give_up(f"sent a model that cannot be used: {problem}")

    def _objection(self, found: Frame) -> str:
        values, rules = found.update.values, self._session.node.rules
        if (
            found.update.positions is not None
            or not isinstance(values, Tensor)
            or values.dtype != torch.float32
        ):
            return "it is incomplete"
        if not self._from_round <= found.round < rules.rounds:
            return f"it is of round {found.round}"
        if problem := self._implausible(found.round):
            return problem
        own, largest = scale_of(self._session.node.params), found.update.largest()
        if not (math.isfinite(largest) and largest <= rules.max_magnitude_ratio * own):
            return f"it contains a value of {largest:.3g}"
        return ""

    def _implausible(self, round: int) -> str:
        """Return why a round is implausible, or "".

        A node that has not begun has nothing to compare with but other providers.
        """
        if self._shown is not None:
            latest = self._shown + self._session.rounds.times.possible_rounds(self._session.now - self._since)
            if round <= latest:
                return ""
            assert self._current is not None
            self._too_late.add(self._current)
            return f"it is of round {round}, and others were in round {self._shown}"
        peers = self._session.peers.items()
        known = [at.round for peer, at in peers if peer != self._current and at.greeted]
        most = max([*known, *self._claimed, self._from_round], default=0)
        if not self._left or not known or round <= most + MAX_ROUNDS_AHEAD:
            return ""
        self._claimed.append(round)
        return f"it is of round {round}, and no other member is known to be beyond round {most}"

    def _take(self, peer: int, found: Frame) -> None:
        session = self._session
        session.log("info", "bootstrapped", peer=peer, round=found.round)
        if not self.at_start:
            self._pending = found
            self.review()
            return
        session.joiner, session.fresh = None, False
        session.begin(found.round, found.update.dense_values())
        for other, known in session.peers.items():
            if known.connected and known.state is not State.INCOMPATIBLE:
                session.outbox.send_hello(other)


class Provider:
    """Sender of this node's model to members that may have it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._wire: Wire | None = None

    def on_request(self, peer: int, from_round: int) -> None:
        """Handle a request for the model of a round, or of a later one."""
        session, known = self._session, self._session.peers[peer]
        if session.end is not None:
            session.outbox.transmit(peer, session.outbox.bye(session.end.status), "control")
            return
        if session.joiner is not None:
            return  # this node has no model itself
        if not self._may_have(peer):
            session.refuse(peer, "requests a model that it may not have")
            return
        known.requested_from = from_round
        self.provide(peer)
        if known.requested_from is not None:
            session.outbox.send_hello(peer, answer=True)  # this node runs, but has not reached that round

    def _may_have(self, peer: int) -> bool:
        session = self._session
        if session.settings.may_provide is not None:
            return session.settings.may_provide(peer)
        graph = session.node.rules.topology.at(session.node.round)
        neighbours = {*graph.senders[session.node.id], *graph.recipients[session.node.id]}
        return peer in neighbours or session.peers[peer].joined_later

    def provide(self, peer: int) -> None:
        """Send the model to a waiting peer, in pieces between this node's own messages."""
        session, known, at = self._session, self._session.peers[peer], self._session.node.round
        if known.requested_from is None or at < known.requested_from or not known.connected:
            return
        if known.provided_in is not None and at < known.provided_in + PROVIDE_EVERY:
            return
        known.requested_from, known.provided_in = None, at
        if self._wire is None:
            self._wire = state_wire(session.node.rules.wire.digest, session.handshake.dim)
        session.outbox.transmit(
            peer, pack_state(self._wire, session.node.id, at, session.node.params), "state", beside=True
        )
        session.log("info", "sent state", peer=peer, round=at)
