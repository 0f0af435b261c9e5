"""Connections: choosing one per pair of nodes, reading and writing on it, and ending it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from jwins.errors import PeerError
from jwins.net.channel import (
    Begin,
    Channel,
    ChannelHello,
    Control,
    Go,
    KeyInUse,
    PeerRefused,
    Ping,
    Pong,
)
from jwins.net.limits import CHUNK_BYTES
from jwins.net.tls import in_words
from jwins.net.transport_core import ENTRY_BYTES, TransportCore
from jwins.net.transport_interface import Connected, Disconnected, KeyUsedElsewhere, MessageReceived
from jwins.net.transport_state import Link, PeerState, size_of
from jwins.net.uplink_scheduler import LONG_BYTES

log = logging.getLogger("jwins.net")

TICK_S = 0.5
MAX_TICK_S = 2.0
"""Maximum time that counts as silence of the others if this process stood still."""

TWIN_S = 2.0
"""Time in which the connection of another process with the same key must show that it is alive."""

STABLE_S = 10.0
"""A connection that lasted longer resets the pause between attempts to connect."""

KEY_IN_USE = "another process with the key of this node is connected; a node runs once"

MIN_LOOK_S, MAX_LOOK_S = 0.001, 0.02
"""Interval between two checks whether a message has left."""

_Work: TypeAlias = Callable[[Link, PeerState], Coroutine[Any, Any, None]]


class Connections:
    """Authenticated connections of a transport. All methods run in the thread of its event loop."""

    def __init__(self, core: TransportCore) -> None:
        self._core = core

    async def tick(self) -> None:
        """Check all connections every ``TICK_S`` seconds."""
        before = self._core.loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            now = self._core.loop.time()
            self._core.awake_s += min(now - before, MAX_TICK_S)
            beat = self._core.limits.heartbeat_s
            for state in list(self._core.peers.values()):
                if (link := state.link) is not None:
                    self._watch(link, state, int(now / beat) != int(before / beat))
            before = now

    def _watch(self, link: Link, state: PeerState, beat: bool) -> None:
        now = self._core.awake_s
        if not link.reading:
            link.last_received = now  # this side does not read
        if link.writing_since is not None and now - link.writing_since > self._core.limits.dead_s:
            self.cut(link, f"it has read nothing for {self._core.limits.dead_s:.0f} s")
        elif now - link.last_received > self._core.limits.dead_s:
            self.cut(link, f"it sent nothing for {self._core.limits.dead_s:.0f} s")
        else:
            if beat:
                link.ping_due = True
                self._nudge(link)
            if self._core.is_silent(link):
                state.dial.set()

    async def admit(self, hello: ChannelHello, state: PeerState, address: str) -> None:
        """Raise an error unless a new connection may replace the present one.

        Raises:
            PeerRefused: the present connection stays.
        """
        while (link := state.link) is not None:
            if link.instance == hello.instance:
                if self._core.id < hello.id and not self._core.is_silent(link):
                    raise PeerRefused("connected already")
                return
            before = link.received  # restarted, or started twice
            link.ping_due = True
            self._nudge(link)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TWIN_S):
                    while state.link is link and link.received == before:
                        await asyncio.sleep(TWIN_S / 40)
            if link.received != before:
                link.channel.write(KeyInUse(address[:128]))
                raise PeerRefused(KEY_IN_USE)
            if state.link is link:
                return

    def attach(
        self, peer: int, state: PeerState, channel: Channel, hello: ChannelHello, fingerprint: str, address: str
    ) -> None:
        """Use a new connection with a peer in place of an existing one."""
        if (
            self._core.closing
            or self._core.peers.get(peer) is not state
            or self._core.roster[peer].x509.fingerprint != fingerprint
        ):
            channel.abort()  # the roster changed during the handshake
            return
        if state.link is not None:
            self.cut(state.link, "a new connection took its place")
        link = Link(peer, channel, hello.instance, fingerprint, self._core.awake_s, self._core.awake_s)
        state.connections += 1
        if self._core.may_log("connected", peer):
            log.info("connected peer=%d address=%s", peer, address)
        with self._core.changed:
            state.link, state.address, state.greeting = link, address, hello.greeting
            self._core.emit(Connected(peer, hello.greeting))
        if self._core.id < peer:
            channel.write(Go())
        link.tasks = [self._core.spawn(self._live(link, state, work)) for work in (self._receive, self._send)]

    async def _live(self, link: Link, state: PeerState, work: _Work) -> None:
        try:
            await work(link, state)
        except PeerRefused as error:
            self._core.count(link.peer, str(error))
            link.channel.close(str(error), refused=True)
            self.lose(link, str(error))
        except (PeerError, OSError, EOFError) as error:
            self.lose(link, in_words(error))
        except Exception as error:  # an error here must not leave a connection without a reader
            log.exception("failed peer=%d", link.peer)
            self.lose(link, in_words(error))

    def cut(self, link: Link, reason: str) -> None:
        """End a connection, and send the reason."""
        link.channel.close(reason, refused=True)
        self.lose(link, reason)
        link.channel.abort()

    def lose(self, link: Link, reason: str) -> None:
        """Record that a connection is gone."""
        state = self._core.peers.get(link.peer)
        link.channel.end()
        for task in link.tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if state is None or state.link is not link:
            return
        reason = "this node ends" if self._core.closing else reason
        self._core.note(link.peer, reason)
        if self._core.may_log("disconnected", link.peer):
            log.info("disconnected peer=%d reason=%r", link.peer, reason)
        with self._core.changed:
            state.link = None
            state.stable = self._core.awake_s - link.opened > STABLE_S
            state.queue.clear()
            state.queued_bytes = 0
            self._core.emit(Disconnected(link.peer, reason))
        link.ended.set()
        state.dial.set()

    async def _receive(self, link: Link, state: PeerState) -> None:
        assembled = io.BytesIO()
        missing: int | None = None
        while True:
            while self._core.is_full(state):
                state.room.clear()
                if self._core.is_full(state):
                    await state.room.wait()
            link.reading = True
            found = await link.channel.receive()
            link.last_received = self._core.awake_s
            link.received += 1
            if isinstance(found, Begin):
                if missing is not None:
                    raise PeerRefused("a message began before the last one ended")
                if found.size > self._core.limits.message_bytes:
                    raise PeerRefused(
                        f"a message longer than {self._core.limits.message_bytes} bytes was announced"
                    )
                missing = found.size
            elif isinstance(found, Ping):
                link.pong_due = found.token
                self._nudge(link)
            elif isinstance(found, Pong):
                pass  # that it came is enough
            elif isinstance(found, KeyInUse) and not link.warned:
                link.warned = True
                self._core.add_event(
                    KeyUsedElsewhere(link.peer, f"refused at {found.address}, as this one is connected")
                )
            elif isinstance(found, Control):
                raise PeerRefused(f"an unexpected {type(found).__name__}")
            elif missing is None or not 0 < len(found) <= missing:
                raise PeerRefused("a piece that belongs to no message")
            else:
                assembled.write(found)
                missing -= len(found)
            if missing == 0:
                data = assembled.getvalue()  # its own buffer, not a copy, as long as nothing more is written
                assembled, missing = io.BytesIO(), None
                self._deliver(link, state, data)
                del data
            link.reading = False
            await state.rates.spend(size_of(found), self._core.loop.time())

    def _deliver(self, link: Link, state: PeerState, data: bytes) -> None:
        with self._core.changed:
            state.bytes_in += len(data)
            state.undelivered_bytes += len(data) + ENTRY_BYTES
            state.undelivered_messages += 1
            self._core.emit(MessageReceived(link.peer, data))

    async def _send(self, link: Link, state: PeerState) -> None:
        while True:
            link.wake.clear()
            link.writing_since = self._core.awake_s
            self._write_keep_alives(link)
            await link.channel.drained()
            link.writing_since = None
            if not state.queue:
                await link.wake.wait()
                continue
            if len(state.queue[0].data) < LONG_BYTES or state.queue[0].beside:
                await self._write_message(link, state)
                continue
            link.in_line = True
            async with self._core.uplink.turn(link.channel):
                link.in_line = False
                await self._write_message(link, state)
                await self._gone(link)

    async def _write_message(self, link: Link, state: PeerState) -> None:
        data = state.queue[0].data
        link.channel.write(Begin(len(data)))
        view = memoryview(data)
        for start in range(0, len(data), CHUNK_BYTES):
            self._write_keep_alives(link)
            link.writing_since = self._core.awake_s
            await link.channel.write_piece(view[start : start + CHUNK_BYTES])
            link.writing_since = None
        with self._core.changed:
            state.queue.popleft()
            state.queued_bytes -= len(data) + ENTRY_BYTES
            state.bytes_out += len(data)

    async def _gone(self, link: Link) -> None:
        """Wait until the written bytes have left this machine."""
        pause, most = MIN_LOOK_S, -1
        while link.channel.waiting_bytes:
            if (arrived := link.channel.arrived_bytes) > most:
                most, link.writing_since = arrived, self._core.awake_s
            self._write_keep_alives(link)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_LOOK_S)
        link.writing_since = None

    def _nudge(self, link: Link) -> None:
        """Have due keep-alives written, even while the sending task waits for its turn on the uplink."""
        if link.in_line and not link.channel.unsent_bytes:
            self._write_keep_alives(link)
        else:
            link.wake.set()

    def _write_keep_alives(self, link: Link) -> None:
        if link.ping_due:
            link.ping_due = False
            link.pings += 1
            link.channel.write(Ping(link.pings))
        if link.pong_due is not None:
            link.channel.write(Pong(link.pong_due))
            link.pong_due = None
