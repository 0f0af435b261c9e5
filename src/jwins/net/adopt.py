"""A model from a neighbour, for a peer that comes later or begins otherwise than the others."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jwins.errors import CodecError, PeerError
from jwins.net.journal import Journal
from jwins.net.link import Connected, Delivered, Disconnected, LinkEvent, LinkReport, Network
from jwins.update import Update
from jwins.wire.codec import codec
from jwins.wire.frame import DIGEST_BYTES, Frame, Hello, Wire

__all__ = ["ADOPTED", "WANTS_MODEL", "Adopted", "Replayed", "adopt", "model_wire", "pack_model"]

ADOPTED = b""
"""The hash of the initial parameters that a peer states if it adopted a neighbour's."""

WANTS_MODEL = ("wants", "model")
"""What a Hello says among its versions, by which a peer asks for the model."""

_ASK_AGAIN_S = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Adopted:
    """What a neighbour gave.

    Attributes:
        donor: who.
        round: the donor's.
        params: (P,) float32.
        events: what the network told meanwhile, for whoever uses it next.
    """

    donor: int
    round: int
    params: Tensor
    events: tuple[LinkEvent, ...]


def model_wire(digest: bytes, size: int) -> Wire:
    """How models travel: as raw frames of a digest of their own, so that no update is ever taken for one.

    Args:
        digest: of the experiment.
        size: P.
    """
    own = hashlib.blake2b(digest + b"model", digest_size=DIGEST_BYTES).digest()
    return Wire(codec("raw"), own, size)


def pack_model(wire: Wire, sender: int, round: int, params: Tensor) -> bytes:
    """A model as a message; ``params`` (P,) float32."""
    return wire.pack(Frame(sender, round, Update(len(params), None, params), key=True)).data


def adopt(
    network: Network,
    donors: Sequence[int],
    hello: Hello,
    wire: Wire,
    digest_wire: Wire,
    *,
    timeout_s: float,
    names: Sequence[str],
    journal: Journal,
) -> Adopted:
    """Ask one neighbour after the other for its model, until one gives it.

    Args:
        network: that was started.
        donors: whom to ask, in order; the next one when the one before does not answer in time or goes away.
        hello: what to say; asks for the model.
        wire: of models.
        digest_wire: of the experiment, for the Hello.
        timeout_s: how long to wait for each.
        names: of all peers.
        journal: told what happens.

    Raises:
        PeerError: none of them gave it.
    """
    others: list[LinkEvent] = []
    connected: set[int] = set()
    question = digest_wire.pack(hello).data
    for donor in donors:
        until, ask_at, was_there = time.monotonic() + timeout_s, 0.0, False
        while (now := time.monotonic()) < until:
            if donor in connected and now >= ask_at:
                was_there = network.send(donor, question) or was_there
                ask_at = now + _ASK_AGAIN_S
            event = network.poll(min(1.0, until - now))
            if isinstance(event, Delivered) and event.peer == donor:
                found = _model(event.data, donor, wire)
                if found is not None:
                    journal.info("adopted", peer=names[donor], round=found.round)
                    return Adopted(donor, found.round, found.update.dense_values(), tuple(others))
            if event is not None:
                others.append(event)
            if isinstance(event, Connected):
                connected.add(event.peer)
            elif isinstance(event, Disconnected):
                connected.discard(event.peer)
                if event.peer == donor and was_there:
                    break
        journal.warning("no model", peer=names[donor])
    asked = ", ".join(names[donor] for donor in donors)
    raise PeerError(f"none of {asked} gave its model within {timeout_s:.0f} s each; are they running?")


def _model(data: bytes, donor: int, wire: Wire) -> Frame | None:
    try:
        found = wire.unpack(data)
    except CodecError:  # something else that the donor says
        return None
    if not isinstance(found, Frame) or found.sender != donor or found.update.positions is not None:
        return None
    values = found.update.values
    whole = isinstance(values, Tensor) and values.dtype == torch.float32 and len(values) == wire.dim
    return found if whole and found.update.is_finite() else None


class Replayed:
    """A network that was started before, of which some events were taken out and come first.

    Args:
        network: that was started.
        events: in their order.
    """

    def __init__(self, network: Network, events: Sequence[LinkEvent]) -> None:
        self._network, self._first = network, deque(events)

    def start(self) -> None:
        """It was."""

    def send(self, peer: int, data: bytes) -> bool:
        """See :meth:`jwins.net.link.Network.send`."""
        return self._network.send(peer, data)

    def poll(self, timeout_s: float | None) -> LinkEvent | None:
        """See :meth:`jwins.net.link.Network.poll`."""
        return self._first.popleft() if self._first else self._network.poll(timeout_s)

    def wake(self) -> None:
        """See :meth:`jwins.net.link.Network.wake`."""
        self._network.wake()

    def close(self, flush_s: float = 5.0) -> None:
        """See :meth:`jwins.net.link.Network.close`."""
        self._network.close(flush_s)

    def report(self) -> Mapping[int, LinkReport]:
        """See :meth:`jwins.net.link.Network.report`."""
        return self._network.report()
