"""Messages to peers: sending, buffering and retransmission."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jwins.engines.traffic_counter import Purpose
from jwins.net import events as ev
from jwins.net.peer_session import BufferedFrame
from jwins.node import Send
from jwins.wire.frame import Bye, Packed

if TYPE_CHECKING:
    from jwins.net.session import Session


class Outbox:
    """Sender of a session, which keeps frames as long as they may be needed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def flush(self, peer: int) -> None:
        """Pass those frames to the transport that the open connection has not taken yet."""
        known = self._session.peers[peer]
        if known.hello_due and known.connected:
            known.hello_due = False
            self.send_hello(peer)
        if not known.is_introduced:
            return
        for at, frame in known.buffer.unsent():
            frame.sent = True
            if not frame.counted:
                frame.counted = True
                self._session.traffic.count(self._session.node.id, (peer,), frame.packed, frame.purpose)
            self._session.out.append(ev.Transmit(peer, frame.packed.data, "frame", at))

    def on_not_queued(self, peer: int, label: str, round: int) -> None:
        """Note that the transport had no room; the next :class:`TimePassed` tries again."""
        known = self._session.peers[peer]
        if label == "frame" and (frame := known.buffer.frames.get(round)) is not None:
            frame.sent = False
        elif label == "hello":
            known.hello_due = known.connected

    def transmit(self, peer: int, packed: Packed, label: str, *, beside: bool = False) -> None:
        """Send a message without buffering it."""
        self._session.traffic.count(
            self._session.node.id, (peer,), packed, "keyframe" if label == "state" else "control"
        )
        self._session.out.append(ev.Transmit(peer, packed.data, label, beside=beside))

    def send_hello(self, peer: int, *, answer: bool = False) -> None:
        """Send a Hello with this node's round. Unless it is an answer, it requests missing frames."""
        known, at = self._session.peers[peer], self._session.node.round
        resend_from = None
        if not answer:
            seen = {of_round for of_round, _ in known.seen}
            resend_from = at
            if self._session.node.rules.asynchronous:
                resend_from = max(seen, default=0)
            while resend_from in seen:
                resend_from += 1
            known.synced = not known.greeted  # until the answer, older frames may still be under way
        hello = self._session.handshake.hello(self._session.node.id, at, resend_from, self._session.settled)
        self.transmit(peer, self._session.node.rules.wire.pack(hello), "hello")

    def bye(self, reason: str) -> Packed:
        """Return this node's Bye, encoded."""
        return self._session.node.rules.wire.pack(Bye(self._session.node.id, self._session.node.round, reason))

    def resend(self, peer: int) -> None:
        """Retransmit frames to a peer that repeats its Hello, but only once per round."""
        known = self._session.peers[peer]
        if known.resend_due is None or known.resent_in == self._session.node.round or not known.is_introduced:
            return
        resend_from, known.resend_due, known.resent_in = known.resend_due, None, self._session.node.round
        self.send_hello(peer, answer=True)
        known.buffer.retransmit_from(resend_from)
        self.flush(peer)

    def on_send(self, command: Send) -> None:
        """Buffer and send a frame of the node."""
        purpose: Purpose = "keyframe" if command.keyframe else "update"
        for peer in command.in_turn(self._session.node.id):
            known = self._session.peers[peer]
            # Without timeouts, a peer may be gone for any time. Only the newest frames are sent to it then.
            counted = known.is_introduced or not self._session.node.rules.asynchronous
            if counted:
                self._session.traffic.count(self._session.node.id, (peer,), command.packed, purpose)
            frame = BufferedFrame(command.packed, purpose, counted=counted)
            known.buffer.add(command.round, frame, self._session.keeps)
            self.flush(peer)
