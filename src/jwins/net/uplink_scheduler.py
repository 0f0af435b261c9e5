"""Scheduler of long messages, which leave one after another if the node's uplink is the bottleneck.

Sent together, all of a round's frames arrive when the last one does. Sent in turn, the last arrives at the same
time and the others earlier, so neighbours whose own frames are short continue sooner.

A connection may be slow for another reason: the other side does not read, or its downlink is slow. So a message
that leaves at much less than this node's best rate does not keep the next one waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

LONG_BYTES = 1 << 16
"""Shorter messages are sent at once."""

WINDOW_S = 0.25
"""Window of rate measurements."""

FAST = 0.3
"""Fraction of the best rate above which a message uses the whole uplink."""

FORGETTING = 0.99
"""Decay of the best rate per window, because links change."""

LONGEST_S = 10.0
"""Maximum wait for another message."""


class Sink(Protocol):
    """Protocol of a destination of messages."""

    @property
    def arrived_bytes(self) -> int:
        """Return the number of written bytes that have arrived."""
        ...


@dataclass(slots=True, eq=False)
class _Sending:
    sink: Sink
    began: float = 0.0
    arrived: int = 0
    slow: bool = False


class UplinkScheduler:
    """Scheduler of long messages in one event loop."""

    def __init__(self) -> None:
        self._under_way: set[_Sending] = set()
        self._waiting: deque[tuple[asyncio.Future[None], _Sending]] = deque()
        self._best = 0.0
        self._ended_bytes = 0
        self._watcher: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def turn(self, sink: Sink) -> AsyncIterator[None]:
        """Wait for a turn, which lasts as long as the block: until the message has left."""
        sending = _Sending(sink)
        try:
            if self._waiting or self._is_taken():
                admitted = asyncio.get_running_loop().create_future()
                self._waiting.append((admitted, sending))
                await admitted
            else:
                self._begin(sending)
            yield
        finally:
            if sending in self._under_way:
                self._under_way.discard(sending)
                self._ended_bytes += sink.arrived_bytes - sending.arrived
            self._admit()

    def close(self) -> None:
        """Stop the measurements."""
        if self._watcher is not None:
            self._watcher.cancel()

    def _is_taken(self) -> bool:
        return any(not sending.slow for sending in self._under_way)

    def _begin(self, sending: _Sending) -> None:
        loop = asyncio.get_running_loop()
        sending.began, sending.arrived = loop.time(), sending.sink.arrived_bytes
        self._under_way.add(sending)
        if self._watcher is None:
            self._ended_bytes = 0
            self._watcher = loop.create_task(self._watch())

    def _admit(self) -> None:
        """Begin the next message, unless one is under way for which it should wait."""
        while self._waiting and not self._is_taken():
            admitted, sending = self._waiting.popleft()
            if not admitted.done():
                self._begin(sending)
                admitted.set_result(None)

    async def _watch(self) -> None:
        """Find out which messages are slow, as long as there are any."""
        loop = asyncio.get_running_loop()
        try:
            while self._under_way:
                since = loop.time()
                await asyncio.sleep(WINDOW_S)
                self._judge(since, loop.time())
        finally:
            self._watcher = None

    def _judge(self, since: float, now: float) -> None:
        moved = {}
        for sending in self._under_way:
            arrived = sending.sink.arrived_bytes
            moved[sending] = arrived - sending.arrived
            sending.arrived = arrived
        total, self._ended_bytes = self._ended_bytes + sum(moved.values()), 0
        self._best = max(total / (now - since), FORGETTING * self._best)
        enough = FAST * self._best * (now - since) / max(1, len(moved))
        for sending, size in moved.items():
            if sending.began <= since and (size <= enough or now - sending.began > LONGEST_S):
                sending.slow = True
        self._admit()
