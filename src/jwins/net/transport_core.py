"""State that reader, writer, listener and dialler of a transport share, and their common functions."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from jwins.net.channel import VERSION, ChannelHello
from jwins.net.limits import Bucket, Limits
from jwins.net.log_limits import LogLimits
from jwins.net.roster import Member, Roster
from jwins.net.tls import Contexts
from jwins.net.transport_interface import LinkEvent
from jwins.net.transport_state import Link, PeerState, Rates, Turns, tally
from jwins.net.uplink_scheduler import UplinkScheduler

log = logging.getLogger("jwins.net")

ENTRY_BYTES = 256
"""Bytes that a waiting message costs beside its content."""

CONNECTIONS_AT_ONCE = 10.0
MEASUREMENTS_AT_ONCE = 5.0


class TransportCore:
    """State of a transport, for the thread of its event loop only, except for fields that ``changed`` guards.

    Args:
        greeting: greeting for connecting members.
        loop: runs all connections.

    Attributes:
        instance: random number of this process.
        changed: guards events, peers and counts, which other threads read, too.
        events: events that wait for ``poll``.
        uplink: gives long messages their turns.
        peers: all other members, by number.
        strangers: connections that ended before they were authenticated, by reason.
        log_limits: limits of log lines that others can cause.
        pending: connections that are not authenticated yet, by address.
        awake_s: seconds for which this process was awake.
        draws: generator for pauses between attempts.
    """

    def __init__(
        self,
        id: int,
        roster: Roster,
        contexts: Contexts,
        greeting: bytes,
        limits: Limits,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.id, self.roster, self.contexts = id, roster, contexts
        self.me: Member = roster[id]
        self.greeting, self.limits, self.loop = greeting, limits, loop
        self.instance = secrets.token_hex(16)
        self.changed = threading.Condition()
        self.events = Turns()
        self.uplink = UplinkScheduler()
        self.peers: dict[int, PeerState] = {}
        self.strangers: Counter[str] = Counter()
        self.log_limits = LogLimits()
        self.pending: Counter[str] = Counter()
        self.tasks: set[asyncio.Task[None]] = set()
        self.awake_s = 0.0
        self.closing = False
        self.draws = secrets.SystemRandom()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run ``work`` as a task that is cancelled at the end."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def new_state(self) -> PeerState:
        """Return the state of a member before its first connection."""
        now = self.loop.time()
        return PeerState(
            Bucket.full(self.limits.connections_per_s, CONNECTIONS_AT_ONCE, now),
            Bucket.full(self.limits.measurements_per_s, MEASUREMENTS_AT_ONCE, now),
            Rates.of(self.limits, now),
        )

    def hello(self, peer: int) -> ChannelHello:
        """Return this node's first message to a peer."""
        return ChannelHello(VERSION, self.id, peer, self.instance, False, self.greeting, time.time())

    def add_event(self, event: LinkEvent) -> None:
        """Add an event."""
        with self.changed:
            self.emit(event)

    def emit(self, event: LinkEvent) -> None:
        """Add an event, with ``changed`` held."""
        self.events.add(event)
        self.changed.notify()

    def is_silent(self, link: Link) -> bool:
        """Return whether no byte has arrived on a connection within the limit."""
        return self.awake_s - link.last_received > self.limits.silent_s

    def is_full(self, state: PeerState) -> bool:
        """Return whether too much of the peer waits to be taken, so that nothing more is read from it."""
        limits = self.limits
        too_many = state.undelivered_messages >= limits.undelivered_messages
        return too_many or state.undelivered_bytes > limits.undelivered_bytes

    def note(self, peer: int, error: str) -> None:
        """Record why there is no connection with a peer."""
        if (state := self.peers.get(peer)) is not None:
            with self.changed:
                state.last_error = error

    def count(self, peer: int, reason: str) -> None:
        """Count that something of a member was refused."""
        self.note(peer, reason)
        if (state := self.peers.get(peer)) is not None:
            with self.changed:
                kind = tally(state.refused, reason)
            self._warn(f"peer={peer}", kind, reason, state.refused[kind])

    def count_stranger(self, reason: str, address: str) -> None:
        """Count that a peer was refused that is not authenticated."""
        with self.changed:
            kind = tally(self.strangers, reason)
        self._warn("stranger", kind, f"{reason}; last from {address}", self.strangers[kind])

    def _warn(self, who: str, kind: str, reason: str, count: int) -> None:
        if self.may_log(kind, who):
            log.warning("refused %s reason=%r count=%d", who, reason, count)

    def may_log(self, event: str, who: object) -> bool:
        """Return whether one more line of this kind may be logged, because an attack must not fill the log."""
        return self.log_limits.take(event, who, self.loop.time()) is not None
