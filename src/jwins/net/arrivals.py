"""Handling of events from peers: connections, Hellos, frames and Byes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jwins.errors import CodecError
from jwins.net.early_frames import decode
from jwins.net.peer_session import Signal, State
from jwins.node import FREE_FRAMES, MAX_ROUNDS_AHEAD, PeerUp
from jwins.wire.frame import Bye, FrameHeader, Hello, KeyframeRequest, Message, StateRequest

if TYPE_CHECKING:
    from jwins.net.session import Session

MAX_REASON_CHARS = 200
"""Maximum length of a peer's text in a line of the log."""


class Arrivals:
    """Handler of the events on a session's connections."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_connected(self, peer: int, greeting: bytes) -> None:
        """Handle a new connection, on which the peer has stated its settings."""
        known = self._session.peers[peer]
        if known.connected:
            self.on_disconnected(peer, "a new connection took its place")
        if known.state is State.REMOVED:
            return
        known.opened()
        if problem := self._session.handshake.greeting_mismatch(greeting):
            self._on_mismatch(peer, problem)
            return
        if self._session.joiner is not None:
            self._session.joiner.on_connected(peer)
        if self._session.joiner is None or not self._session.joiner.at_start:
            self._session.outbox.send_hello(peer)

    def on_disconnected(self, peer: int, reason: str) -> None:
        """Handle the end of a connection."""
        known = self._session.peers[peer]
        known.lost()
        if known.state not in (State.LEFT, State.REMOVED):
            self._session.log("info", "disconnected", peer=peer, reason=reason)
        self._session.apply(peer, Signal.DISCONNECTED)
        if self._session.joiner is not None:
            self._session.joiner.on_disconnected(peer)

    def _on_mismatch(self, peer: int, problem: str) -> None:
        known = self._session.peers[peer]
        known.mismatch = problem
        self._session.log("error", "incompatible peer", peer=peer, problem=problem)
        self._session.apply(peer, Signal.MISMATCH)
        if self._session.joiner is not None:
            self._session.joiner.on_refused(peer, f"is incompatible: {problem}")

    def on_message(self, peer: int, data: bytes) -> None:
        """Handle a message of a peer."""
        known = self._session.peers[peer]
        self._session.received_bytes += len(data)
        if known.state is State.REMOVED or not known.connected:
            return
        if self._session.joiner is not None and self._session.joiner.on_message(peer, data):
            return
        node = self._session.node
        message: Message | FrameHeader
        event: Any = None
        try:
            header = decode(lambda: node.rules.wire.peek(data))
            if header is None:
                message, event = decode(lambda: node.read(peer, data))
            else:  # a frame, which is decoded only when it is due
                message = header
        except CodecError as error:
            self._session.refuse(peer, str(error))
            return
        if message.sender != peer:
            self._session.refuse(peer, f"sends a message in the name of node {message.sender}")
        elif known.state is State.INCOMPATIBLE:
            self._session.refuse(peer, "sends messages although it is incompatible", quietly=True)
        elif isinstance(message, StateRequest):
            self._session.provider.on_request(peer, message.round)
        elif isinstance(message, Hello):
            if known.bye_received:  # a second Bye is ignored, so it could not end a session that begins here
                self._session.refuse(peer, "sends a Hello after its Bye", quietly=True)
            else:
                self._on_hello(peer, message)
        elif isinstance(message, Bye) and (known.is_introduced or self._session.holds):
            self._on_bye(peer, message)
        elif not known.is_introduced:
            self._session.refuse(peer, "sends a message before its Hello")
        elif isinstance(message, KeyframeRequest):
            self._session.rounds.deliver(event)
        elif isinstance(message, FrameHeader):
            self._on_frame(peer, message, data)
        else:
            self._session.witnesses.on_message(peer, message)

    def _on_hello(self, peer: int, hello: Hello) -> None:
        known = self._session.peers[peer]
        if problem := known.cut or self._session.handshake.hello_mismatch(hello):
            self._on_mismatch(peer, problem)
            return
        first, known.greeted, known.ever_connected = not known.greeted, True, True
        known.round, known.settled = hello.round, hello.settled
        if hello.resend_from is None:
            known.synced = True
        rules = self._session.node.rules
        if first:
            if rules.asynchronous:  # later frames are those of an earlier process, which had come further
                known.seen = {seen for seen in known.seen if seen[0] < hello.round}
            self._session.log("info", "active", peer=peer, round=hello.round)
            known.present_from = self._session.awake
            known.buffer.retransmit_from(hello.round if hello.resend_from is None else hello.resend_from)
        elif hello.resend_from is not None:
            known.resend_due = hello.resend_from
        if hello.round > self._session.node.round + rules.rounds_ahead and not rules.asynchronous:
            known.ahead_from = hello.round  # its later frames are refused as too far ahead
        self._apply_hello(peer, hello)
        if self._session.joiner is not None:
            self._session.joiner.on_hello(peer)
        self._session.outbox.resend(peer)
        self._session.outbox.flush(peer)
        if self._session.end is not None:
            self._session.outbox.transmit(peer, self._session.outbox.bye(self._session.end.status), "control")

    def _apply_hello(self, peer: int, hello: Hello) -> None:
        known, at = self._session.peers[peer], self._session.node.round
        if known.state is State.SLOW:
            known.wants_readmission = True
            if at >= known.readmit_from:
                self.readmit(peer)
        elif not known.is_awaited and at < known.readmit_from:
            known.wants_readmission = True
            self._session.apply(peer, Signal.HELLO_AGAIN)
        else:
            if not known.is_awaited and known.state is not State.LEFT:
                known.backoff = min(2 * known.backoff, MAX_ROUNDS_AHEAD)
                known.readmit_from, known.timeouts = at + known.backoff, 0
                self._session.log("info", "readmitted", peer=peer, round=at)
            behind = hello.round < at - self._session.keeps and not self._session.node.rules.asynchronous
            self._session.apply(peer, Signal.HELLO_BEHIND if behind else Signal.HELLO)
            if known.skipped_until > at:
                known.skipped_until = 0
                self._session.rounds.deliver(PeerUp(peer, at))

    def _on_bye(self, peer: int, bye: Bye) -> None:
        known = self._session.peers[peer]
        if known.bye_received:
            return
        known.bye_received = True
        self._session.log("info", "bye", peer=peer, round=bye.round, reason=bye.reason[:MAX_REASON_CHARS])
        if self._session.joiner is not None:
            self._session.joiner.on_refused(peer, f"ends: {bye.reason}")
        if known.is_introduced:
            self._session.apply(peer, Signal.BYE)

    def readmit(self, peer: int) -> None:
        """Wait for a peer again; the back-off until the next readmission doubles unless a frame is on time."""
        known = self._session.peers[peer]
        known.backoff = min(2 * known.backoff, MAX_ROUNDS_AHEAD)
        known.readmit_from = self._session.node.round + known.backoff
        known.wants_readmission, known.timeouts = False, 0
        self._session.log("info", "readmitted", peer=peer, round=self._session.node.round)
        self._session.apply(peer, Signal.READMITTED)

    def _on_frame(self, peer: int, frame: FrameHeader, data: bytes) -> None:
        known, at = self._session.peers[peer], self._session.node.round
        name = (frame.round, frame.keyframe)
        if name in known.seen:
            self._session.refuse(peer, f"frame of round {frame.round}: received before", quietly=True)
            return
        if self._session.node.rules.asynchronous:
            self._on_frame_of_any_round(peer, frame, data)
            return
        if frame.round < at - MAX_ROUNDS_AHEAD:
            self._session.refuse(peer, f"frame of round {frame.round}: more than {MAX_ROUNDS_AHEAD} rounds old")
            self._send_round(peer)
            return
        if frame.round > at + self._session.node.rules.rounds_ahead:
            self._note_ahead(peer, frame.round)
        awaited = peer in self._session.node.awaited
        if not self._accept(peer, frame, data):
            return
        known.seen = {seen for seen in known.seen if seen[0] >= at - MAX_ROUNDS_AHEAD} | {name}
        known.settled = known.settled or frame.round > known.round
        known.round = max(known.round, frame.round)
        self._observe(peer, frame.round)
        if frame.round > at:  # the node accepts or refuses it in its round
            if awaited or peer in self._session.node.awaited:
                self._note_ahead(peer, frame.round)
        elif frame.round == at:
            self._on_time(peer)
            known.ahead_from = None
        else:
            self._session.log("info", "late", peer=peer, round=frame.round, rounds_late=at - frame.round)
            self._on_late(peer)

    def _on_frame_of_any_round(self, peer: int, frame: FrameHeader, data: bytes) -> None:
        """Handle a frame of an asynchronous run, where each is due at once."""
        known = self._session.peers[peer]
        if (problem := self._session.node.objection(frame)) is not None:
            self._session.refuse(peer, f"frame of round {frame.round}: {problem}")
        elif self._hand_over(peer, data, is_late=False):
            oldest = max(frame.round, known.round) - MAX_ROUNDS_AHEAD
            known.seen = {seen for seen in known.seen if seen[0] >= oldest} | {(frame.round, frame.keyframe)}
            known.settled = known.settled or frame.round > known.round
            known.round = max(known.round, frame.round)
            self._on_time(peer)

    def _accept(self, peer: int, frame: FrameHeader, data: bytes) -> bool:
        """Pass a frame of this round or an earlier one to the node, and keep one of a later round encoded."""
        known, node = self._session.peers[peer], self._session.node
        problem, is_ahead = node.objection(frame), frame.round > node.round
        if problem is None and is_ahead:
            problem = known.early.objection(frame, node.max_frames(frame), node.rules.inbox_bytes)
        if problem is not None:
            self._session.refuse(peer, f"frame of round {frame.round}: {problem}", quietly=is_ahead)
            return False
        if is_ahead:
            known.early.add(frame, data)
            return True
        return self._hand_over(peer, data, is_late=frame.round < node.round)

    def take_early(self, peer: int) -> None:
        """Deliver the kept frames of the round that begins."""
        known = self._session.peers[peer]
        for data in known.early.take(self._session.node.round):
            if self._hand_over(peer, data, is_late=False) and known.is_introduced:
                self._on_time(peer)

    def _hand_over(self, peer: int, data: bytes, *, is_late: bool) -> bool:
        """Decode a frame for the node. A few bytes can take long, so the number per round is limited."""
        known, node = self._session.peers[peer], self._session.node
        if known.decoded_in != node.round:
            known.decoded_in, known.decoded = node.round, [0, 0]
        if known.decoded[is_late] >= node.rules.inbox_frames + FREE_FRAMES:
            self._session.refuse(peer, f"{known.decoded[is_late]} of its frames were decoded in this round")
            return False
        known.decoded[is_late] += 1
        try:
            _, event = decode(lambda: node.read(peer, data))
        except CodecError as error:
            self._session.refuse(peer, str(error))
            return False
        refused = known.refused
        self._session.rounds.deliver(event)
        return known.refused == refused

    def _note_ahead(self, peer: int, round: int) -> None:
        """Note that no frames of earlier rounds will arrive, because frames arrive in order."""
        known = self._session.peers[peer]
        if not known.synced:
            return
        if known.ahead_from is None or known.ahead_from <= self._session.node.round:
            known.ahead_from = round
        known.round = max(known.round, round)

    def _on_time(self, peer: int) -> None:
        known = self._session.peers[peer]
        was_awaited = known.is_awaited
        known.timeouts, known.backoff, known.readmit_from = 0, 1, 0
        known.wants_readmission = False
        if known.is_introduced:
            self._session.apply(peer, Signal.ON_TIME)
        if not was_awaited:
            self._session.log("info", "readmitted", peer=peer, round=self._session.node.round)
            self._session.outbox.send_hello(peer)

    def _on_late(self, peer: int) -> None:
        """Handle a late frame. Like a Hello, it shows that the peer is alive."""
        known = self._session.peers[peer]
        if known.state is State.SLOW:
            known.wants_readmission = True
            if self._session.node.round >= known.readmit_from:
                self.readmit(peer)
                self._session.outbox.send_hello(peer)
        if known.state is State.BEHIND:
            self._send_round(peer)

    def _send_round(self, peer: int) -> None:
        """Send this node's round to a peer that is far behind and may not know it."""
        known = self._session.peers[peer]
        if self._session.end is not None:
            return  # the peer has the Bye
        if known.hello_sent_in != self._session.node.round and known.is_introduced:
            known.hello_sent_in = self._session.node.round
            self._session.outbox.send_hello(peer, answer=True)

    def _observe(self, peer: int, round: int) -> None:
        """Record the response time of a frame, if its peer was connected without interruption."""
        known, shared = self._session.peers[peer], self._session.rounds.shared.at.get(round)
        if known.present_from is None or round > self._session.node.round:
            return
        if shared is not None and known.present_from <= shared:
            known.timeout.observe(self._session.awake - shared)
        elif shared is None and round == self._session.node.round:
            known.timeout.observe(0.0)
