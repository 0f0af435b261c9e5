"""A model from a neighbour, for a peer that comes later or begins otherwise than the others."""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jwins.errors import CodecError, PeerError
from jwins.net.journal import Journal, plain
from jwins.net.transport_interface import (
    Connected,
    Disconnected,
    LinkEvent,
    LinkReport,
    MessageReceived,
    Transport,
)
from jwins.sharing.update import Update
from jwins.wire.codec import codec
from jwins.wire.frame import DIGEST_BYTES, Bye, Frame, Hello, Message, Wire

__all__ = [
    "BOOTSTRAPPED",
    "STATE_REQUEST",
    "StateTransfer",
    "StateRequest",
    "Replayed",
    "bootstrap",
    "mismatch",
    "state_wire",
    "pack_state",
]

BOOTSTRAPPED = b""
"""What a peer states in place of the hash of its initial parameters if they are a neighbour's."""

STATE_REQUEST = ("wants", "model")
"""What a Hello says among its versions, by which a peer asks for the model of its round or a later one."""

_ASK_AGAIN_S = 5.0
_AWAY_S = 15.0
"""A provider whose connection broke is waited for so long: longer than the pause between two attempts."""


@dataclass(frozen=True, slots=True, eq=False)
class StateTransfer:
    """What a neighbour gave.

    Attributes:
        provider: who.
        round: the provider's.
        params: (P,) float32.
        x0: what the node says of its initial parameters.
    """

    provider: int
    round: int
    params: Tensor
    x0: bytes


@dataclass(frozen=True, slots=True)
class StateRequest:
    """Who asks for a model.

    Attributes:
        node: its number.
        from_round: a member from this round on: the model is of it, or of a later one.
        size: P.
        wire: of the experiment.
        x0: hash of the common initial parameters, or :data:`BOOTSTRAPPED`.
        agreed: what else peers must have in common, by name.
    """

    node: int
    from_round: int
    size: int
    wire: Wire
    x0: bytes
    agreed: Mapping[str, str] = field(default_factory=dict)

    @property
    def hello(self) -> Hello:
        """Asks for the model."""
        versions = {**self.agreed, STATE_REQUEST[0]: STATE_REQUEST[1]}
        return Hello(self.node, self.from_round, self.size, self.wire.codec.name, versions, self.x0)


def mismatch(theirs: Hello, ours: Hello, agreed: Mapping[str, str]) -> str:
    """Why a peer cannot take part, or "".

    Args:
        theirs: what it says first.
        ours: what this node says.
        agreed: what else must be the same, by name.
    """
    if theirs.dim != ours.dim:
        return f"its model has {theirs.dim} parameters that are exchanged, this one {ours.dim}"
    if theirs.codec != ours.codec:
        return f"it encodes with {plain(theirs.codec)}, this node with {ours.codec}"
    for what, here in agreed.items():
        if (there := theirs.versions.get(what, "")) != here:
            return f"its {what} is {plain(there) or 'not known'}, here it is {here}"
    if BOOTSTRAPPED not in (theirs.x0, ours.x0) and theirs.x0 != ours.x0:
        return (
            f"its initial parameters differ (hash {theirs.x0.hex()[:16]}, here {ours.x0.hex()[:16]}); its "
            f"versions: {dict(sorted(theirs.versions.items()))}"
        )
    return ""


def state_wire(digest: bytes, size: int) -> Wire:
    """How models travel: as raw frames of a digest of their own, so that no update is ever taken for one.

    Args:
        digest: of the experiment.
        size: P.
    """
    own = hashlib.blake2b(digest + b"model", digest_size=DIGEST_BYTES).digest()
    return Wire(codec("raw"), own, size)


def pack_state(wire: Wire, sender: int, round: int, params: Tensor) -> bytes:
    """A model as a message; ``params`` (P,) float32."""
    return wire.pack(Frame(sender, round, Update(len(params), None, params), keyframe=True)).data


def bootstrap(
    transport: Transport,
    providers: Sequence[int],
    request: StateRequest,
    *,
    timeout_s: float,
    names: Sequence[str],
    journal: Journal,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Transport, StateTransfer | None]:
    """Start a transport, and ask one neighbour after the other for its model, until one gives it.

    A provider that is not in the round yet says so from time to time, and is waited for.

    Args:
        transport: reaches the others; closed if nobody gives a model.
        providers: whom to ask, in order; the next one when the one before does not answer in time, goes away
            and is not back soon, or does not fit.
        request: of the joiner.
        timeout_s: how long to wait for each, since it was heard last.
        names: of all peers.
        journal: told what happens.
        stop: asked every second whether to give up.

    Returns:
        The transport as the driver is to use it, and what was given; None if asked to stop.

    Raises:
        PeerError: none of them gave it.
        UsageError: the transport cannot listen.
    """
    answers: dict[str, str] = {}
    transport.start()
    try:
        asking = _Bootstrap(transport, request, timeout_s, stop)
        for provider in providers:
            journal.info("requesting state", peer=names[provider], from_round=request.from_round)
            found = asking.of(provider)
            if isinstance(found, Frame):
                journal.info("bootstrapped", peer=names[provider], round=found.round)
                transfer = StateTransfer(provider, found.round, found.update.dense_values(), request.x0)
                return Replayed(transport, asking.heard()), transfer
            if stop():
                transport.close(0.0)
                return transport, None
            journal.warning("no state", peer=names[provider], reason=found)
            answers[names[provider]] = found
    except BaseException:
        transport.close(0.0)
        raise
    transport.close(0.0)
    told = "; ".join(f"{name} {reason}" for name, reason in answers.items())
    raise PeerError(f"none of {', '.join(answers)} gave its model: {told}")


class _Bootstrap:
    """Asks for a model, and keeps what the transport tells meanwhile: who is connected, and each one's
    Hello.
    """

    def __init__(
        self,
        transport: Transport,
        request: StateRequest,
        timeout_s: float,
        stop: Callable[[], bool],
    ) -> None:
        self._transport, self._request = transport, request
        self._timeout_s, self._stop = timeout_s, stop
        self._question = request.wire.pack(request.hello).data
        self._models = state_wire(request.wire.digest, request.size)
        self._connected: dict[int, Connected] = {}
        self._hellos: dict[int, MessageReceived] = {}

    def heard(self) -> list[LinkEvent]:
        """Who said Hello, and who is connected."""
        events: list[LinkEvent] = []
        for peer in sorted({*self._connected, *self._hellos}):
            events.append(self._connected.get(peer, Connected(peer)))
            if peer in self._hellos:
                events.append(self._hellos[peer])
            if peer not in self._connected:
                events.append(Disconnected(peer, "went away"))
        return events

    def of(self, provider: int) -> Frame | str:
        """The provider's model, or why there is none."""
        until, back_by, ask_at = time.monotonic() + self._timeout_s, math.inf, 0.0
        asked = False
        while (now := time.monotonic()) < (end := min(until, back_by)) and not self._stop():
            if provider in self._connected and now >= ask_at:
                asked = self._transport.send(provider, self._question) or asked
                ask_at = now + min(_ASK_AGAIN_S, self._timeout_s / 4)
            match self._transport.poll(min(1.0, end - now)):
                case Connected(peer) as event:
                    self._connected[peer] = event
                    if peer == provider:
                        back_by, ask_at = math.inf, 0.0
                case Disconnected(peer):
                    self._connected.pop(peer, None)
                    if peer == provider and asked:
                        back_by = time.monotonic() + min(_AWAY_S, self._timeout_s / 4)
                case MessageReceived(peer, data) as event:
                    if peer == provider and (found := self._model(data, provider)) is not None:
                        return found
                    said = self._said(event)
                    if peer == provider and isinstance(said, Bye):
                        return f"ends: {plain(said.reason)}"
                    if peer == provider and isinstance(said, Hello):
                        if problem := mismatch(said, self._request.hello, self._request.agreed):
                            return f"does not fit: {problem}"
                        until = time.monotonic() + self._timeout_s
        if back_by < math.inf:
            return "went away"
        return f"did not give it within {self._timeout_s:.0f} s; is it running?"

    def _said(self, event: MessageReceived) -> Message | None:
        """What a peer says about itself; of that, the newest is kept."""
        try:
            said = self._request.wire.unpack(event.data)
        except CodecError:
            return None
        if isinstance(said, Hello) and said.sender == event.peer:
            self._hellos[event.peer] = event
        return said

    def _model(self, data: bytes, provider: int) -> Frame | None:
        try:
            found = self._models.unpack(data)
        except CodecError:  # something else that the provider says
            return None
        if not isinstance(found, Frame) or found.sender != provider or found.update.positions is not None:
            return None
        values, wanted = found.update.values, self._request
        whole = isinstance(values, Tensor) and values.dtype == torch.float32 and len(values) == wanted.size
        return found if whole and found.round >= wanted.from_round and found.update.is_finite() else None


class Replayed:
    """A transport that was started before, of which some events were taken out and come first.

    Args:
        transport: that was started.
        events: in their order.
    """

    def __init__(self, transport: Transport, events: Sequence[LinkEvent]) -> None:
        self._transport, self._first = transport, deque(events)

    def start(self) -> None:
        """It was."""

    def send(self, peer: int, data: bytes, *, beside: bool = False) -> bool:
        """See :meth:`jwins.net.transport_interface.Transport.send`."""
        return self._transport.send(peer, data, beside=beside)

    def poll(self, timeout_s: float | None) -> LinkEvent | None:
        """See :meth:`jwins.net.transport_interface.Transport.poll`."""
        return self._first.popleft() if self._first else self._transport.poll(timeout_s)

    def wake(self) -> None:
        """See :meth:`jwins.net.transport_interface.Transport.wake`."""
        self._transport.wake()

    def close(self, flush_s: float = 5.0) -> None:
        """See :meth:`jwins.net.transport_interface.Transport.close`."""
        self._transport.close(flush_s)

    def report(self) -> Mapping[int, LinkReport]:
        """See :meth:`jwins.net.transport_interface.Transport.report`."""
        return self._transport.report()
