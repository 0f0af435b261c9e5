"""Interface between the real-time driver and a transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A whole message of an authenticated peer.

    Attributes:
        data: the message, as it was given to the sender's :meth:`Transport.send`.
    """

    peer: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Connected:
    """An authenticated connection is open: messages that are sent from now on are queued for this peer.

    Attributes:
        greeting: the peer's greeting to every member, such as the digest of its experiment.
    """

    peer: int
    greeting: bytes = b""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection has ended, and queued messages are lost. The transport dials again by itself.

    Attributes:
        reason: why, in words.
    """

    peer: int
    reason: str


@dataclass(frozen=True, slots=True)
class KeyUsedElsewhere:
    """Another process with the key of this node was seen by a peer; one of the two is refused.

    Attributes:
        peer: id of the node that saw it.
        detail: where, in words.
    """

    peer: int
    detail: str


LinkEvent: TypeAlias = KeyUsedElsewhere | MessageReceived | Connected | Disconnected


@dataclass(frozen=True, slots=True)
class LinkReport:
    """State of the connection with one peer.

    Attributes:
        address: host:port at the other end, "" if there was no connection yet.
        greeting: greeting of the connection that is open, or was open last.
        bytes_in: length of the whole messages received since the start, over all connections.
        bytes_out: length of the messages handed to the operating system since the start, over all connections.
        last_error: why the last connection ended or the last attempt failed, "" if neither happened.
        refused: number of refused messages and connections of this peer, by reason.
    """

    connected: bool = False
    address: str = ""
    greeting: bytes = b""
    bytes_in: int = 0
    bytes_out: int = 0
    queued_bytes: int = 0
    connections: int = 0
    last_error: str = ""
    refused: Mapping[str, int] = field(default_factory=dict)


class Transport(Protocol):
    """Protocol of a transport of messages to peers. Any thread may call all methods except ``poll``."""

    def start(self) -> None:
        """Begin to listen and to dial in the background; returns once listening.

        Raises:
            UsageError: it cannot listen on this node's address.
        """
        ...

    def send(self, peer: int, data: bytes, *, beside: bool = False) -> bool:
        """Queue a message; never blocks.

        Args:
            peer: the receiver.
            data: the message.
            beside: whether it may take long and must not keep messages to others waiting.

        Returns:
            False if the peer is not connected or its queue is full; nothing is queued then.
        """
        ...

    def poll(self, timeout_s: float | None) -> LinkEvent | None:
        """Return the next event: in order of arrival for each peer, and of each peer in turn. Call it from one
        thread.

        Args:
            timeout_s: longest wait for one; None for no limit.

        Returns:
            None if there was none in time, or at a :meth:`wake`.
        """
        ...

    def wake(self) -> None:
        """Make a ``poll`` that waits, or else the next one, return None at once."""
        ...

    def close(self, flush_s: float = 5.0) -> None:
        """End all connections.

        Args:
            flush_s: time limit for sending queued messages.
        """
        ...

    def report(self) -> Mapping[int, LinkReport]:
        """Return the state of each peer's connection, by id."""
        ...
