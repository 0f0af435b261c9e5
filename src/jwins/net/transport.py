"""Authenticated connections between the members of a roster: one for each pair of members.

The event loop runs in its own thread. Native code of the training that holds the interpreter for a minute
only delays it: the operating system continues to acknowledge data, peers tolerate silence of less than
``Limits.dead_s``, and time in which this process itself stood still does not count as silence of others.

A pair agrees on one connection as follows. Both sides may dial, and each connection begins with a `Hello` in
both directions. The side with the lower id then sends `Go` on one of them, and refuses the others. No message
is sent before `Go`, so none is lost if both sides dial at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import selectors
import socket
import threading
from collections.abc import Collection, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from jwins.errors import UsageError
from jwins.net.connections import Connections
from jwins.net.dialler import Dialler
from jwins.net.limits import Limits
from jwins.net.listener import Listener
from jwins.net.roster import Member, Roster
from jwins.net.sockets import keep_from_children, listening_sockets
from jwins.net.tls import Contexts
from jwins.net.transport_core import ENTRY_BYTES, TransportCore
from jwins.net.transport_interface import LinkEvent, LinkReport, MessageReceived
from jwins.net.transport_state import PeerState, Queued

log = logging.getLogger("jwins.net")

FAREWELL_S = 1.0

GREETING_BYTES: Final = 4096


class TlsTransport:
    """The :class:`~jwins.net.transport_interface.Transport` between machines: TLS 1.3 with certificates on both
    sides.

    Args:
        key_file: private key of this node's certificate in the roster.
        greeting: at most 4096 bytes for every connecting member, such as the digest of the experiment.
        listen: host:port to listen on. None for the port of the roster's address: on all interfaces, or on
            loopback only if that is its address, or not at all if the node is not reachable.
        dial: members to keep connections with; None for all. Every member may connect.

    Raises:
        ConfigError: key and certificate do not match, or are invalid.
        UsageError: no such member, or a greeting that is too long.
    """

    def __init__(
        self,
        roster: Roster,
        id: int,
        key_file: Path,
        *,
        greeting: bytes = b"",
        limits: Limits | None = None,
        listen: str | None = None,
        dial: Collection[int] | None = None,
    ) -> None:
        if len(greeting) > GREETING_BYTES:
            raise UsageError(f"greeting of {len(greeting)} bytes: at most {GREETING_BYTES} are allowed")
        self.id = id
        self.limits = limits or Limits()
        self._key_file, self._listen, self._wanted = key_file, listen, dial
        contexts = Contexts.of(roster, roster[id], key_file)
        self._selector = selectors.DefaultSelector()
        loop = asyncio.SelectorEventLoop(self._selector)
        loop.set_exception_handler(lambda loop, context: log.debug("loop %s", context.get("message")))
        self._core = TransportCore(id, roster, contexts, greeting, self.limits, loop)
        self._connections = Connections(self._core)
        self._listener = Listener(self._core, self._connections)
        self._dialler = Dialler(self._core, self._connections)
        self._thread = threading.Thread(target=self._run, name=f"jwins-net-{id}", daemon=True)
        self._woken = False
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []

    # --- From any thread ----------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """Return the port that it listens on; 0 for none."""
        return int(self._sockets[0].getsockname()[1]) if self._sockets else 0

    def strangers(self) -> Mapping[str, int]:
        """Return the number of connections that ended before they were authenticated, by reason."""
        with self._core.changed:
            return dict(self._core.strangers)

    def start(self) -> None:
        """Begin to listen and to dial."""
        if self._thread.ident is not None:
            raise UsageError("a transport is started once; make another")
        keep_from_children(self, TlsTransport._open_sockets)
        if self._core.me.reachable or self._listen is not None:
            try:
                self._sockets = listening_sockets(self._core.me.address, self._listen)
            except UsageError:
                self.close()
                raise
        self._thread.start()
        self._call(self._begin())

    def send(self, peer: int, data: bytes, *, beside: bool = False) -> bool:
        """Queue a message; never blocks.

        Raises:
            UsageError: longer than ``limits.message_bytes``.
        """
        size = len(data)
        if size > self.limits.message_bytes:
            raise UsageError(
                f"message of {size} bytes: the limit is {self.limits.message_bytes}; raise limits.message_bytes"
            )
        with self._core.changed:
            state = self._core.peers.get(peer)
            if self._core.closing or state is None or state.link is None:
                return False
            if state.queue and state.queued_bytes + size + ENTRY_BYTES > self.limits.queue_bytes:
                state.refused["send queue full"] += 1
                return False
            state.queue.append(Queued(data, beside))
            state.queued_bytes += size + ENTRY_BYTES
            wake = state.link.wake
        with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
            self._core.loop.call_soon_threadsafe(wake.set)
        return True

    def poll(self, timeout_s: float | None) -> LinkEvent | None:
        """Return the next event."""
        with self._core.changed:
            self._core.changed.wait_for(lambda: self._core.events or self._woken, timeout_s)
            if self._woken or not self._core.events:
                self._woken = False
                return None
            event = self._core.events.take()
            if not isinstance(event, MessageReceived):
                return event
            state = self._core.peers.get(event.peer)
            if state is None:
                return event
            was_full = self._core.is_full(state)
            state.undelivered_bytes -= len(event.data) + ENTRY_BYTES
            state.undelivered_messages -= 1
            room = was_full and not self._core.is_full(state)
        if room:
            with contextlib.suppress(RuntimeError):
                self._core.loop.call_soon_threadsafe(state.room.set)
        return event

    def wake(self) -> None:
        """Make ``poll`` return None at once."""
        with self._core.changed:
            self._woken = True
            self._core.changed.notify_all()

    def close(self, flush_s: float = 5.0) -> None:
        """End all connections. A second call does nothing."""
        with self._core.changed:
            if self._core.closing:
                return
            self._core.closing = True
        if self._thread.ident is None:
            self._core.loop.close()
            return
        self._call(self._end(flush_s))
        self._core.loop.call_soon_threadsafe(self._core.loop.stop)
        self._thread.join()
        self._core.loop.close()
        self.wake()

    def report(self) -> Mapping[int, LinkReport]:
        """Return the state of each peer's connection, by id."""
        with self._core.changed:
            return {
                peer: LinkReport(
                    connected=p.link is not None,
                    address=p.address,
                    greeting=p.greeting,
                    bytes_in=p.bytes_in,
                    bytes_out=p.bytes_out,
                    queued_bytes=p.queued_bytes - ENTRY_BYTES * len(p.queue),
                    connections=p.connections,
                    last_error=p.last_error,
                    refused=dict(p.refused),
                )
                for peer, p in sorted(self._core.peers.items())
            }

    def update(
        self, roster: Roster, *, key_file: Path | None = None, dial: Collection[int] | None = None
    ) -> None:
        """Continue with another roster: cut members that were removed or have another certificate, and dial
        new ones.

        Args:
            roster: the new one; this node is in it.
            key_file: the private key, if it changed.
            dial: members to keep connections with; None for all.

        Raises:
            ConfigError: this node's key and certificate do not match, or are invalid; nothing is changed then.
            UsageError: this node is not in it, or the transport is not running.
        """
        if self._core.closing or not self._thread.is_alive():
            raise UsageError(
                "the transport is not running: start it first, or make another with the new roster"
            )
        member, key_file = roster[self.id], key_file or self._key_file
        contexts = Contexts.of(roster, member, key_file)
        self._call(self._change(roster, member, key_file, contexts, dial))

    def _open_sockets(self) -> Iterator[int]:
        """Return the open sockets without a lock, for :func:`jwins.net.sockets.keep_from_children`."""
        yield from (listening.fileno() for listening in self._sockets)
        if (waits := self._selector.get_map()) is not None:  # those that are being connected are among them
            yield from (key.fd for key in waits.values())
        yield from (
            state.link.channel.fileno() for state in self._core.peers.values() if state.link is not None
        )

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._core.loop).result()

    # --- In the thread of the loop ------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._core.loop)
        self._core.loop.run_forever()

    async def _begin(self) -> None:
        self._accepting = [self._core.spawn(self._listener.accept(listening)) for listening in self._sockets]
        self._core.spawn(self._connections.tick())
        self._take_members()

    async def _change(
        self, roster: Roster, member: Member, key_file: Path, contexts: Contexts, dial: Collection[int] | None
    ) -> None:
        self._core.roster, self._core.me, self._core.contexts = roster, member, contexts
        self._key_file, self._wanted = key_file, dial
        for peer, state in list(self._core.peers.items()):
            link = state.link
            if peer not in roster:
                if link is not None:
                    self._connections.cut(link, "it was removed from the roster")
                if state.dialler is not None:
                    state.dialler.cancel()
                self._forget(peer, state)
                with self._core.changed:
                    del self._core.peers[peer]
            elif link is not None and roster[peer].x509.fingerprint != link.fingerprint:
                self._connections.cut(link, "its certificate in the roster has changed")
                self._forget(peer, state)
        self._take_members()

    def _forget(self, peer: int, state: PeerState) -> None:
        """Drop a peer's messages that were not taken yet, because they are no longer trusted."""
        with self._core.changed:
            self._core.events.drop_messages(peer)
            state.undelivered_bytes = state.undelivered_messages = 0
        state.room.set()

    def _take_members(self) -> None:
        for member in self._core.roster.members:
            if member.id == self.id:
                continue
            state = self._core.peers.get(member.id)
            if state is None:
                state = self._core.new_state()
                with self._core.changed:
                    self._core.peers[member.id] = state
            wanted = self._wanted is None or member.id in self._wanted
            if state.dialler is not None and not (wanted and member.reachable):
                state.dialler.cancel()
                state.dialler = None
            elif state.dialler is None and wanted and member.reachable:
                state.dialler = self._core.spawn(self._dialler.keep_dialling(member.id, state))
            elif wanted and not member.reachable and not self._core.me.reachable:
                self._core.note(
                    member.id, "neither of the two can be dialled: one needs a forwarded port or a tunnel"
                )
            state.dial.set()

    async def _end(self, flush_s: float) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for listening in self._sockets:
            listening.close()
        links = [(state, state.link) for state in self._core.peers.values() if state.link is not None]

        def unsent() -> bool:
            return any(s.link is link and (s.queue or link.channel.unsent_bytes) for s, link in links)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(flush_s):
                while unsent():
                    await asyncio.sleep(0.01)
        for _, link in links:
            link.channel.close("this node ends")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                # Closing a socket with unread bytes in it destroys bytes that the other side has not read yet.
                await asyncio.gather(*(link.ended.wait() for _, link in links))
        for _, link in links:
            self._connections.lose(link, "this node ends")
        self._core.uplink.close()
        tasks = [task for task in self._core.tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, link in links:
            link.channel.abort()  # the connection of a peer that does not read would stay
        await asyncio.sleep(0.05)
