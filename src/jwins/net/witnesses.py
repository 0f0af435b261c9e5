"""Signed rounds: members that are not neighbours show a node that it is behind.

Members side by side on a ring that fell behind together have one neighbour each that is ahead, and one alone
could lie. So a node asks this neighbour, which passes the request on to its own neighbours. They sign their
rounds, and the neighbour passes the signatures back: it cannot forge them. A signature covers a nonce of the
asker's process, so that it shows nothing to another process or in a later run.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from jwins.net.peer_session import State
from jwins.wire.frame import MAX_SIGNATURE_BYTES, Message, RoundRequest, SignedRound

if TYPE_CHECKING:
    from jwins.net.session import Session

PURPOSE = b"jwins: a member states its round\0"
"""Beginning of all signed bytes, so that no signature of a round can be taken for one of TLS."""

SKEW = 2
"""Rounds by which a neighbour's neighbour is ahead at most while all wait for each other."""

MAX_SIGNED = 16
"""Number of neighbours that a request is passed on to, of answers to it, and of askers that a neighbour may
request for within :data:`ANSWER_EVERY_S`."""

ANSWER_EVERY_S = 1.0
"""Interval in which a neighbour is answered once for each asker."""

_SIGNED = struct.Struct("<IIII")


class Signatures(Protocol):
    """Signatures with the keys of the members' certificates."""

    @property
    def nonce(self) -> bytes:
        """Return :data:`~jwins.wire.frame.NONCE_BYTES` random bytes of this process."""

    def sign(self, data: bytes) -> bytes:
        """Return this node's signature, or b"" without a key."""

    def verify(self, node: int, data: bytes, signature: bytes) -> bool:
        """Return whether a node, a member of the newest roster, has signed ``data``."""


class Witnesses:
    """Members that are shown to be ahead of this node, and answers to the requests of others.

    Attributes:
        rounds: the newest signed round of each member, since this node last took over the round of others.
    """

    def __init__(self, session: Session, signatures: Signatures | None) -> None:
        self._session, self._signatures = session, signatures
        self.rounds: dict[int, int] = {}
        self._ask_at: dict[int, float] = {}
        self._answered: dict[int, set[int]] = {}
        self._answer_again_at = 0.0
        self._nonces = {} if signatures is None else {session.node.id: signatures.nonce}
        self._due: Counter[tuple[int, int]] = Counter()

    def ahead(self) -> dict[int, int]:
        """Return members that this node lost, and the latest rounds in which their neighbours may be."""
        near, peers = self._session.node.round + SKEW, self._session.peers
        return {
            member: at + SKEW
            for member, at in self.rounds.items()
            if at > near and peers[member].state is not State.REMOVED and not peers[member].cut
        }

    def ask(self, peers: Iterable[int]) -> None:
        """Ask neighbours that have been ahead for a timeout for the signed rounds of their neighbours."""
        session, signatures = self._session, self._signatures
        next_s = session.awake + session.settings.timeout_s + ANSWER_EVERY_S
        for peer in peers if signatures is not None else ():
            far = session.peers[peer].round > session.node.round + SKEW
            if far and session.awake >= self._ask_at.setdefault(peer, next_s):
                self._ask_at[peer] = next_s
                self._request(peer, session.node.id, MAX_SIGNED)

    def forget(self) -> None:
        """Forget all signed rounds, because the node takes over the round of others."""
        self.rounds.clear()
        self._ask_at.clear()

    def on_message(self, peer: int, message: Message) -> None:
        """Handle a request for signed rounds, or a signed round; ignore any other message."""
        if isinstance(message, RoundRequest):
            self._on_request(peer, message)
        elif isinstance(message, SignedRound):
            self._on_signed(peer, message)

    def _on_request(self, peer: int, request: RoundRequest) -> None:
        """Pass a neighbour's own request on, or answer one that it has passed on."""
        session, asker, now = self._session, request.asker, self._session.awake
        if now >= self._answer_again_at:
            self._answered, self._answer_again_at = {}, now + ANSWER_EVERY_S
        answered = self._answered.setdefault(peer, set())
        if asker in answered or len(answered) >= MAX_SIGNED:
            session.refuse(peer, "requests signed rounds too often", quietly=True)
            return
        answered.add(asker)
        if session.node.rules.asynchronous or asker not in session.peers or not self._may_ask(peer, request):
            session.refuse(peer, f"requests signed rounds for node {asker}, and may not", quietly=True)
        elif session.has_begun and session.end is None:
            if asker == peer:
                self._pass_on(request)
            else:
                self._sign(peer, request)

    def _may_ask(self, peer: int, request: RoundRequest) -> bool:
        """Return whether a peer is a neighbour in this round, or in its own if graphs change."""
        here = self._session.node
        at = min(request.round, here.rules.rounds - 1)
        return peer in self._neighbours(here.id) or peer in self._neighbours(here.id, at)

    def _pass_on(self, request: RoundRequest) -> None:
        session, asker = self._session, request.asker
        session.outbox.send_hello(asker, answer=True)
        self._nonces[asker] = request.nonce
        ahead = [
            peer
            for peer in sorted(self._neighbours(session.node.id) - {asker})
            if session.peers[peer].is_introduced and session.peers[peer].round > request.round + SKEW
        ]
        for peer in ahead[:MAX_SIGNED]:
            self._request(peer, asker, 1)

    def _request(self, peer: int, asker: int, answers: int) -> None:
        node = self._session.node
        self._due[asker, peer] = min(self._due[asker, peer] + answers, 2 * MAX_SIGNED)
        self._send(peer, RoundRequest(node.id, node.round, asker, self._nonces[asker]))

    def _sign(self, peer: int, request: RoundRequest) -> None:
        """Sign this node's round, unless it is that of others: a node that has just jumped is no witness."""
        session, at = self._session, self._session.node.round
        if self._signatures is None or session.fresh or not session.settled:
            return
        signature = self._signatures.sign(self._text(session.node.id, at, request.asker, request.nonce))
        if 0 < len(signature) <= MAX_SIGNATURE_BYTES:
            self._send(peer, SignedRound(session.node.id, at, session.node.id, request.asker, signature))

    def _on_signed(self, peer: int, signed: SignedRound) -> None:
        """Keep a signed round that this node has requested, or pass it on to the node that has."""
        session, member, asker, here = self._session, signed.member, signed.asker, self._session.node.id
        wanted = member not in (peer, here) if asker == here else member == peer
        if not wanted or not self._due[asker, peer]:
            session.refuse(peer, f"sends a signed round of node {member} that was not requested")
            return
        self._due[asker, peer] -= 1
        if not self._is_valid(signed):
            session.refuse(peer, f"sends a signed round of node {member} that is not valid here")
        elif asker == here:
            self.rounds[member] = max(signed.round, self.rounds.get(member, 0))
        elif session.peers[asker].is_introduced:
            self._send(asker, replace(signed, sender=here))

    def _is_valid(self, signed: SignedRound) -> bool:
        session, member = self._session, signed.member
        known = session.peers.get(member)
        if known is None or known.state is State.REMOVED or known.cut or self._signatures is None:
            return False
        if signed.round > session.node.rules.rounds or not session.waiting.is_possible(member, signed.round):
            return False
        text = self._text(member, signed.round, signed.asker, self._nonces[signed.asker])
        return self._signatures.verify(member, text, signed.signature)

    def _text(self, member: int, round: int, asker: int, nonce: bytes) -> bytes:
        rules = self._session.node.rules
        version = rules.topology.at(round).roster_version
        return PURPOSE + rules.wire.digest + _SIGNED.pack(version, member, round, asker) + nonce

    def _neighbours(self, node: int, round: int | None = None) -> set[int]:
        session = self._session
        graph = session.node.rules.topology.at(session.node.round if round is None else round)
        return {*graph.senders[node], *graph.recipients[node]}

    def _send(self, peer: int, message: RoundRequest | SignedRound) -> None:
        self._session.outbox.transmit(peer, self._session.node.rules.wire.pack(message), "control")
