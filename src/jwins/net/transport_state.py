"""State of a transport for each peer and its connection."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from jwins.net.channel import Channel
from jwins.net.limits import CHUNK_BYTES, Bucket, Limits
from jwins.net.transport_interface import LinkEvent, MessageReceived

MAX_REASONS = 64

CONTROL_SIZE = 64
"""Size at which a control message counts, in bytes per second."""


@dataclass(slots=True, eq=False)
class Link:
    """An open connection. Times are seconds for which this process was awake.

    Attributes:
        instance: random number of the peer's process.
        opened: time at which the connection was accepted.
        last_received: time of the last bytes from the peer.
        received: number of control messages and pieces from the peer.
        reading: False while this side does not read.
        writing_since: time since which written bytes wait for the peer to read them; None if none wait.
        in_line: whether a message waits for messages to other peers.
        ping_due: whether to write a ping next.
        pong_due: token of the pong to write next; only the last ping is answered.
        wake: set when there may be something to write.
        ended: set when the connection is gone.
    """

    peer: int
    channel: Channel
    instance: str
    fingerprint: str
    opened: float
    last_received: float
    received: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    reading: bool = True
    writing_since: float | None = None
    warned: bool = False
    in_line: bool = False
    ping_due: bool = False
    pings: int = 0
    pong_due: int | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Rates:
    """Rate limit for reading from a peer."""

    messages: Bucket
    octets: Bucket | None

    @classmethod
    def of(cls, limits: Limits, now: float) -> Rates:
        """Return the limiter; a burst may have the messages of two seconds."""
        octets = limits.bytes_per_s
        return cls(
            Bucket.full(limits.messages_per_s, 2 * limits.messages_per_s, now),
            None if octets is None else Bucket.full(octets, max(octets, CHUNK_BYTES), now),
        )

    async def spend(self, size: int, now: float) -> None:
        """Wait, after something of this size was received, for as long as the rates demand."""
        wait = self.messages.take(1, now)
        if self.octets is not None:
            wait = max(wait, self.octets.take(size, now))
        if wait > 0:
            await asyncio.sleep(wait)


class Queued(NamedTuple):
    """A message that waits to be sent.

    Attributes:
        beside: whether it and messages to others do not wait for each other.
    """

    data: bytes
    beside: bool


@dataclass(slots=True, eq=False)
class PeerState:
    """State of a peer over all connections. The transport's lock guards the fields that other threads use.

    Attributes:
        arrivals: rate limit of the peer's connections.
        rates: rate limits of reading from it.
        last_error: why there is or was no connection.
        queue: messages to be sent; the first may be under way.
        queued_bytes: memory of them, including overhead.
        undelivered_bytes: memory of messages that wait to be taken.
        undelivered_messages: number of messages that wait to be taken.
        refused: number of refusals by reason.
        stable: whether the last connection lasted long enough to reset the pause between attempts.
        probed: whether the peer measures now.
        room: set when messages were taken.
        dial: set when there may be a reason to dial.
    """

    arrivals: Bucket
    measurements: Bucket
    rates: Rates
    address: str = ""
    greeting: bytes = b""
    last_error: str = ""
    queue: deque[Queued] = field(default_factory=deque)
    queued_bytes: int = 0
    undelivered_bytes: int = 0
    undelivered_messages: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    connections: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    link: Link | None = None
    stable: bool = False
    probed: bool = False
    room: asyncio.Event = field(default_factory=asyncio.Event)
    dial: asyncio.Event = field(default_factory=asyncio.Event)
    dialler: asyncio.Task[None] | None = None


class Turns:
    """Events that wait to be taken: in order of arrival for each peer, and one of each peer in turn.

    So a peer that sends much waits behind its own messages, and does not delay others.
    """

    def __init__(self) -> None:
        self._by_peer: dict[int, deque[LinkEvent]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_peer)

    def add(self, event: LinkEvent) -> None:
        """Append an event to those of its peer."""
        self._by_peer.setdefault(event.peer, deque()).append(event)

    def take(self) -> LinkEvent:
        """Return the next event of the peer whose turn it is; there must be one."""
        peer = next(iter(self._by_peer))
        waiting = self._by_peer.pop(peer)
        event = waiting.popleft()
        if waiting:
            self._by_peer[peer] = waiting
        return event

    def drop_messages(self, peer: int) -> None:
        """Drop the messages of a peer; events of its connections are kept."""
        waiting = self._by_peer.pop(peer, ())
        kept: deque[LinkEvent] = deque(event for event in waiting if not isinstance(event, MessageReceived))
        if kept:
            self._by_peer[peer] = kept


def tally(counts: Counter[str], reason: str) -> str:
    """Count a reason without its variable parts, so that peers cannot make the table grow without limit."""
    kind = reason.partition(" (")[0]
    if kind not in counts and len(counts) >= MAX_REASONS:
        kind = "other reasons"
    counts[kind] += 1
    return kind


def size_of(found: object) -> int:
    """Return the size at which a piece or control message counts."""
    return len(found) if isinstance(found, bytes | bytearray | memoryview) else CONTROL_SIZE
