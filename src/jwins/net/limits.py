"""Limits for peers: sizes, rates, times. Each applies to every peer separately."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from jwins.errors import UsageError

CHUNK_BYTES = 1 << 18
"""Length of the pieces of messages. Keep-alives go between pieces, and a piece fits a cache.
100 MiB took 0.36 s of processor time at both ends together, and 0.40 s in pieces of 1 MiB."""

GREETING_BYTES = 4096
"""Maximum length of a greeting."""

CONTROL_BYTES = 1 << 14
"""Maximum length of a control message."""

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits for peers.

    Attributes:
        message_bytes: longest message; a longer one is refused when it is announced, before any of it is kept.
        queue_bytes: maximum of bytes that wait to be sent to a peer; one message may always wait.
        undelivered_bytes: while more than this of a peer waits for ``poll``, nothing is read from it.
        undelivered_messages: the same for their number, because small ones take far more memory than their
            bytes.
        messages_per_s: maximum rate at which pieces and control messages are read from a peer.
        bytes_per_s: maximum rate at which bytes are read from a peer; None for no limit.
        connections_per_s: largest rate of connections of a peer, with bursts of ten.
        measurements_per_s: largest rate of measurements (`jwins doctor`) of a peer, with bursts of five.
        handshake_s: time limit for the authentication of a connection.
        pending: largest number of connections that are not authenticated yet.
        pending_per_address: largest number of these from one address.
        heartbeat_s: longest interval between messages to a peer.
        silent_s: a peer that is silent for this time is dialled again beside the present connection.
        dead_s: a peer that is silent, or does not read, for this time is cut off. It must be longer than native
            code may block the interpreter of the other side.
        retry_s: time until the second attempt to connect; it doubles with each attempt, and varies by half at
            random.
        max_retry_s: longest time between two attempts.
    """

    message_bytes: int = 128 * MIB
    queue_bytes: int = 256 * MIB
    undelivered_bytes: int = 16 * MIB
    undelivered_messages: int = 1024
    messages_per_s: float = 4000.0
    bytes_per_s: float | None = None
    connections_per_s: float = 1.0
    measurements_per_s: float = 0.1
    handshake_s: float = 5.0
    pending: int = 64
    pending_per_address: int = 16
    heartbeat_s: float = 5.0
    silent_s: float = 20.0
    dead_s: float = 180.0
    retry_s: float = 0.25
    max_retry_s: float = 8.0

    @classmethod
    def of_messages(cls, longest: int) -> Self:
        """Return limits for messages of up to ``longest`` bytes, of which at least two may wait to be sent."""
        return cls(message_bytes=longest, queue_bytes=max(cls().queue_bytes, 2 * longest))

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise UsageError(f"limits.{field.name} = {value}: expected more than 0")
        if self.dead_s < 2 * self.heartbeat_s:
            raise UsageError(
                f"limits.dead_s = {self.dead_s}: expected at least two heartbeats of {self.heartbeat_s} s"
            )


@dataclass(slots=True)
class Bucket:
    """Token bucket; a caller that overdraws waits until the debt is paid.

    Attributes:
        rate: tokens per second.
        capacity: number of tokens in a full bucket.
        tokens: available tokens, negative for a debt.
        at: time of the last change, seconds.

    >>> bucket = Bucket.full(rate=10, capacity=5, now=0.0)
    >>> bucket.take(5, now=0.0), bucket.take(10, now=0.0)
    (0.0, 1.0)
    """

    rate: float
    capacity: float
    tokens: float
    at: float

    @classmethod
    def full(cls, rate: float, capacity: float, now: float) -> Bucket:
        """Return a full bucket."""
        return cls(rate, capacity, capacity, now)

    def take(self, count: float, now: float) -> float:
        """Take tokens, and return the seconds to wait now."""
        self.tokens = min(self.capacity, self.tokens + (now - self.at) * self.rate) - count
        self.at = now
        return max(0.0, -self.tokens / self.rate)
