"""Authenticated connections between the members of a roster: one for each pair of members.

The event loop runs in its own thread. Native code of the training that holds the interpreter for a minute
only delays it: the operating system continues to acknowledge data, peers tolerate silence of less than
``Limits.dead_s``, and time in which this process itself stood still does not count as silence of others.

A pair agrees on one connection as follows. Both sides may dial, and each connection begins with a `Hello` in
both directions. The side with the lower id then sends `Go` on one of them, and refuses the others. Nothing else
is sent before, so no message is lost if two connections meet.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import secrets
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from jwins.errors import PeerError, UsageError
from jwins.net.channel import (
    VERSION,
    Begin,
    Channel,
    ChannelHello,
    Control,
    Go,
    KeyInUse,
    PeerRefused,
    Ping,
    Pong,
    Sunk,
)
from jwins.net.dial import READER_BYTES, SHUTDOWN_S, dial
from jwins.net.limits import CHUNK_BYTES, Bucket, Limits
from jwins.net.log_limits import LogLimits
from jwins.net.roster import Member, Roster
from jwins.net.sockets import keep_from_children, listening_sockets
from jwins.net.tls import Contexts, in_words, presented_fingerprint
from jwins.net.transport_interface import (
    Connected,
    Disconnected,
    KeyUsedElsewhere,
    LinkEvent,
    LinkReport,
    MessageReceived,
)
from jwins.net.transport_state import Link, PeerState, Queued, Rates, Turns, size_of, tally
from jwins.net.uplink_scheduler import LONG_BYTES, UplinkScheduler

__all__ = ["TlsTransport"]

log = logging.getLogger("jwins.net")

TICK_S = 0.5
MAX_TICK_S = 2.0
"""Maximum part of a standstill of this process that counts as silence of the others."""

TWIN_S = 2.0
"""Time in which the connection of another process with the same key must show that it is alive."""

STABLE_S = 10.0
"""Duration of a connection that ends the doubling of pauses between attempts."""

ENTRY_BYTES = 256
"""Bytes of memory of a waiting message beside its content."""

FAREWELL_S = 1.0

PROBE_BYTES = 64 << 20
PROBE_S = 30.0

GREETING_BYTES: Final = 4096

CONNECTIONS_AT_ONCE = 10.0
MEASUREMENTS_AT_ONCE = 5.0

KEY_IN_USE = "another process with the key of this node is connected; a node runs once"

MIN_LOOK_S, MAX_LOOK_S = 0.001, 0.02
"""Interval between checks whether a message has left."""


_Work: TypeAlias = Callable[[Link, PeerState], Coroutine[Any, Any, None]]


class TlsTransport:
    """The :class:`~jwins.net.transport_interface.Transport` between machines: TLS 1.3 with certificates on both
    sides.

    Args:
        roster: who takes part.
        id: id of this node.
        key_file: private key of this node's certificate in the roster.
        greeting: at most 4096 bytes for everyone who connects, such as the digest of the experiment.
        limits: limits for peers.
        listen: host:port to listen on, if not the port of the roster's address on all interfaces (on loopback
            alone, where the address is of it). Without it, a node that is not reachable does not listen.
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
        self._me = roster[id]
        self._roster, self._key_file = roster, key_file
        self._contexts = Contexts.of(roster, self._me, key_file)
        self._greeting, self._listen, self._wanted = greeting, listen, dial
        self._instance = secrets.token_hex(16)
        self._selector = selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._loop.set_exception_handler(lambda loop, context: log.debug("loop %s", context.get("message")))
        self._thread = threading.Thread(target=self._run, name=f"jwins-net-{id}", daemon=True)
        self._changed = threading.Condition()
        self._events = Turns()
        self._uplink = UplinkScheduler()
        self._woken = False
        self._peers: dict[int, PeerState] = {}
        self._self: PeerState | None = None
        self._strangers: Counter[str] = Counter()
        self._log_limits = LogLimits()
        self._pending: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._awake_s = 0.0
        self._closing = False
        self._draws = secrets.SystemRandom()

    # --- From any thread ----------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """Return the port that it listens on; 0 for none."""
        return int(self._sockets[0].getsockname()[1]) if self._sockets else 0

    @property
    def round_trips_s(self) -> Mapping[int, float]:
        """Return the round trip of the last keep-alive of each connected peer."""
        with self._changed:
            peers = self._peers.items()
            return {peer: p.round_trip_s for peer, p in peers if p.link and p.round_trip_s is not None}

    def strangers(self) -> Mapping[str, int]:
        """Return the number of connections that ended before they were authenticated, by reason."""
        with self._changed:
            return dict(self._strangers)

    def start(self) -> None:
        """Begin to listen and to dial."""
        if self._thread.ident is not None:
            raise UsageError("a transport is started once; make another")
        keep_from_children(self, TlsTransport._open_sockets)
        if self._me.reachable or self._listen is not None:
            try:
                self._sockets = listening_sockets(self._me.address, self._listen)
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
        with self._changed:
            state = self._peers.get(peer)
            if self._closing or state is None or state.link is None:
                return False
            if state.queue and state.queued_bytes + size + ENTRY_BYTES > self.limits.queue_bytes:
                state.refused["send queue full"] += 1
                return False
            state.queue.append(Queued(data, beside))
            state.queued_bytes += size + ENTRY_BYTES
            wake = state.link.wake
        with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
            self._loop.call_soon_threadsafe(wake.set)
        return True

    def poll(self, timeout_s: float | None) -> LinkEvent | None:
        """Return the next event."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._woken, timeout_s)
            if self._woken or not self._events:
                self._woken = False
                return None
            event = self._events.take()
            if not isinstance(event, MessageReceived):
                return event
            state = self._peers.get(event.peer)
            if state is None:
                return event
            was_full = self._is_full(state)
            state.undelivered_bytes -= len(event.data) + ENTRY_BYTES
            state.undelivered_messages -= 1
            room = was_full and not self._is_full(state)
        if room:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(state.room.set)
        return event

    def wake(self) -> None:
        """Make ``poll`` return None at once."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self, flush_s: float = 5.0) -> None:
        """End all connections. A second call does nothing."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
        if self._thread.ident is None:
            self._loop.close()
            return
        self._call(self._end(flush_s))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.wake()

    def report(self) -> Mapping[int, LinkReport]:
        """Return the state of each peer's connection, by id."""
        with self._changed:
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
                for peer, p in sorted(self._peers.items())
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
        if self._closing or not self._thread.is_alive():
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
        yield from (state.link.channel.fileno() for state in self._peers.values() if state.link is not None)

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- In the thread of the loop ------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _begin(self) -> None:
        self._accepting = [self._spawn(self._accept(listening)) for listening in self._sockets]
        self._spawn(self._tick())
        self._take_members()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _change(
        self, roster: Roster, member: Member, key_file: Path, contexts: Contexts, dial: Collection[int] | None
    ) -> None:
        self._roster, self._me, self._key_file, self._contexts = roster, member, key_file, contexts
        self._wanted = dial
        for peer, state in list(self._peers.items()):
            link = state.link
            if peer not in roster:
                if link is not None:
                    self._cut(link, "it was removed from the roster")
                if state.dialler is not None:
                    state.dialler.cancel()
                self._forget(peer, state)
                with self._changed:
                    del self._peers[peer]
            elif link is not None and roster[peer].x509.fingerprint != link.fingerprint:
                self._cut(link, "its certificate in the roster has changed")
                self._forget(peer, state)
        self._take_members()

    def _forget(self, peer: int, state: PeerState) -> None:
        """Drop a peer's messages that were not taken yet, because they are no longer trusted."""
        with self._changed:
            self._events.drop_messages(peer)
            state.undelivered_bytes = state.undelivered_messages = 0
        state.room.set()

    def _take_members(self) -> None:
        for member in self._roster.members:
            if member.id == self.id:
                continue
            state = self._peers.get(member.id)
            if state is None:
                state = self._new_state()
                with self._changed:
                    self._peers[member.id] = state
            wanted = self._wanted is None or member.id in self._wanted
            if state.dialler is not None and not (wanted and member.reachable):
                state.dialler.cancel()
                state.dialler = None
            elif state.dialler is None and wanted and member.reachable:
                state.dialler = self._spawn(self._keep_dialling(member.id, state))
            elif wanted and not member.reachable and not self._me.reachable:
                self._note(
                    member.id, "neither of the two can be dialled: one needs a forwarded port or a tunnel"
                )
            state.dial.set()

    async def _tick(self) -> None:
        before = self._loop.time()
        while True:
            await asyncio.sleep(TICK_S)
            now = self._loop.time()
            self._awake_s += min(now - before, MAX_TICK_S)
            beat = self.limits.heartbeat_s
            for state in list(self._peers.values()):
                if (link := state.link) is not None:
                    self._watch(link, state, int(now / beat) != int(before / beat))
            before = now

    def _watch(self, link: Link, state: PeerState, beat: bool) -> None:
        now = self._awake_s
        if not link.reading:
            link.heard = now  # it is we who do not listen
        if link.writing_since is not None and now - link.writing_since > self.limits.dead_s:
            self._cut(link, f"it has read nothing for {self.limits.dead_s:.0f} s")
        elif now - link.heard > self.limits.dead_s:
            self._cut(link, f"it sent nothing for {self.limits.dead_s:.0f} s")
        else:
            if beat:
                link.ping_due = True
                self._nudge(link)
            if self._is_silent(link):
                state.dial.set()

    # --- Being dialled ------------------------------------------------------------------------------------

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                sock, address = await self._loop.sock_accept(listening)
            except OSError as error:  # such as too many open files: wait for some to close
                self._count_stranger(f"not accepted: {error.strerror}", "")
                await asyncio.sleep(0.1)
                continue
            host = str(address[0])
            if (
                self._pending.total() >= self.limits.pending
                or self._pending[host] >= self.limits.pending_per_address
            ):
                sock.close()
                self._count_stranger("too many connections at once", host)
                continue
            self._pending[host] += 1
            self._spawn(self._answer(sock, host, f"{host}:{address[1]}"))

    async def _answer(self, sock: socket.socket, host: str, address: str) -> None:
        writer: asyncio.StreamWriter | None = None
        channel: Channel | None = None
        state: PeerState | None = None
        try:
            async with asyncio.timeout(self.limits.handshake_s):
                reader = asyncio.StreamReader(limit=READER_BYTES)
                protocol = asyncio.StreamReaderProtocol(reader)
                transport, _ = await self._loop.connect_accepted_socket(
                    lambda: protocol,
                    sock,
                    ssl=self._contexts.server,
                    ssl_handshake_timeout=self.limits.handshake_s,
                    ssl_shutdown_timeout=SHUTDOWN_S,
                )
                writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
                channel = await Channel.answer(reader, writer)
                hello = await channel.control(ChannelHello)
                fingerprint = presented_fingerprint(channel.ssl_object)
                self._identify(hello, fingerprint)
                state = self._state_of_self() if hello.id == self.id else self._peers[hello.id]
                if not hello.probe:
                    self._may_connect(state)
                    await self._admit(hello, state, address)
                elif state.probed:
                    raise PeerRefused("it runs a measurement already")
                elif state.measurements.take(1, self._loop.time()) > 0:
                    raise PeerRefused("it measures too often")
                channel.write(self._hello(hello.id))
                if not hello.probe and self.id > hello.id:
                    await channel.control(Go)
        except (PeerError, OSError, EOFError) as error:
            words = "not authenticated in time" if isinstance(error, TimeoutError) else in_words(error)
            if isinstance(error, PeerRefused) and channel is not None:
                channel.close(words, refused=True)
            if state is None:
                self._count_stranger(words, address)
            elif isinstance(error, PeerRefused):
                self._count(hello.id, words)
            if writer is not None:
                writer.close()
            return
        except BaseException as error:
            if isinstance(error, Exception):
                log.exception("failed address=%s", address)
            if writer is not None:
                writer.transport.abort()
            raise
        finally:
            self._pending[host] -= 1
            if self._pending[host] <= 0:
                del self._pending[host]
        if hello.probe:
            await self._serve_probe(channel, state)
        else:
            self._attach(hello.id, state, channel, hello, fingerprint, address)

    def _identify(self, hello: ChannelHello, fingerprint: str) -> None:
        if hello.version != VERSION:
            raise PeerRefused(
                f"it speaks another version of the protocol ({hello.version} there, {VERSION} here)"
            )
        if hello.id not in self._roster or (hello.id == self.id and not hello.probe):
            raise PeerRefused("the id that it claims belongs to no other member of the roster here")
        if fingerprint != self._roster[hello.id].x509.fingerprint:
            raise PeerRefused(
                "its certificate differs from the one in the roster here for the id that it claims"
            )
        if hello.to != self.id:
            raise PeerRefused(
                f"it looks for another node; an address in a roster is wrong ({hello.to} there, {self.id} here)"
            )

    def _state_of_self(self) -> PeerState:
        """Answer `jwins doctor` on this machine, which asks with this node's key what the node runs."""
        self._self = self._self or self._new_state()
        return self._self

    def _new_state(self) -> PeerState:
        now = self._loop.time()
        return PeerState(
            Bucket.full(self.limits.connections_per_s, CONNECTIONS_AT_ONCE, now),
            Bucket.full(self.limits.measurements_per_s, MEASUREMENTS_AT_ONCE, now),
            Rates.of(self.limits, now),
        )

    def _may_connect(self, state: PeerState) -> None:
        if self._closing:
            raise PeerRefused("this node is ending")
        if state.arrivals.take(1, self._loop.time()) > 0:
            raise PeerRefused("it connects too often")

    def _hello(self, peer: int) -> ChannelHello:
        return ChannelHello(VERSION, self.id, peer, self._instance, False, self._greeting, time.time())

    async def _admit(self, hello: ChannelHello, state: PeerState, address: str) -> None:
        """Return if a new connection is allowed beside a present one; else refuse it."""
        while (link := state.link) is not None:
            if link.instance == hello.instance:
                if self.id < hello.id and not self._is_silent(link):
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

    async def _serve_probe(self, channel: Channel, state: PeerState) -> None:
        """Answer a measuring peer: keep-alives, and the number of bytes that arrived."""
        left, expected, got = PROBE_BYTES, 0, 0
        state.probed = True
        try:
            async with asyncio.timeout(PROBE_S):
                while True:
                    found = await channel.receive()
                    if isinstance(found, Ping):
                        channel.write(Pong(found.token))
                    elif isinstance(found, Begin) and got == expected and found.size <= left:
                        expected, got = found.size, 0
                    elif not isinstance(found, Control) and got + len(found) <= expected:
                        got += len(found)
                        left -= len(found)
                        if got == expected:
                            channel.write(Sunk(got))
                    else:
                        return
                    await channel.drained()
                    await state.rates.spend(size_of(found), self._loop.time())
        except (PeerError, OSError):
            pass
        finally:
            state.probed = False
            channel.end()

    # --- Dialling -----------------------------------------------------------------------------------------

    async def _keep_dialling(self, peer: int, state: PeerState) -> None:
        """Connect whenever there is no connection, or only a silent one."""
        limits = self.limits
        both_dial = self.id > peer and self._me.reachable
        pause = limits.retry_s * (4 if both_dial else 1)  # lets the other side send first
        while True:
            await state.dial.wait()
            if state.stable:
                state.stable, pause = False, limits.retry_s
            await asyncio.sleep(pause * self._draws.uniform(0.5, 1.5))
            state.dial.clear()
            if state.link is not None and not self._is_silent(state.link):
                continue
            pause = min(2 * pause, limits.max_retry_s)
            try:
                await self._dial(peer, state)
            except Exception as error:
                if not isinstance(error, PeerError | OSError | EOFError):
                    log.exception("failed peer=%d", peer)
                if state.link is None:
                    if (words := in_words(error)) != state.last_error:
                        if self._may_log("cannot connect", peer):
                            log.info("cannot connect peer=%d reason=%r", peer, words)
                        if KEY_IN_USE in words:
                            self._tell(
                                KeyUsedElsewhere(
                                    peer, "it is connected with the other process, and refuses this one"
                                )
                            )
                    self._note(peer, words)
                    state.dial.set()

    def _tell(self, event: LinkEvent) -> None:
        with self._changed:
            self._emit(event)

    def _is_silent(self, link: Link) -> bool:
        return self._awake_s - link.heard > self.limits.silent_s

    async def _dial(self, peer: int, state: PeerState) -> None:
        member = self._roster[peer]
        channel: Channel | None = None
        try:
            async with asyncio.timeout(self.limits.handshake_s):
                channel, fingerprint = await dial(member, self._contexts, self.limits.handshake_s)
                channel.write(self._hello(peer))
                hello = await channel.control(ChannelHello)
                if (hello.version, hello.id, hello.to) != (VERSION, peer, self.id):
                    raise PeerRefused(f"its Hello is of node {hello.id}, protocol {hello.version}")
                if self.id < peer:
                    await self._admit(hello, state, member.address)
                else:
                    await channel.control(Go)
        except BaseException as error:
            if channel is not None:
                if isinstance(error, PeerRefused):
                    channel.close(str(error), refused=True)
                channel.end()
            raise
        self._attach(peer, state, channel, hello, fingerprint, member.address)

    # --- A connection's life ------------------------------------------------------------------------------

    def _attach(
        self, peer: int, state: PeerState, channel: Channel, hello: ChannelHello, fingerprint: str, address: str
    ) -> None:
        if (
            self._closing
            or self._peers.get(peer) is not state
            or self._roster[peer].x509.fingerprint != fingerprint
        ):
            channel.abort()  # the roster changed during the handshake
            return
        if state.link is not None:
            self._cut(state.link, "a new connection took its place")
        link = Link(peer, channel, hello.instance, fingerprint, self._awake_s, self._awake_s)
        state.connections += 1
        if self._may_log("connected", peer):
            log.info("connected peer=%d address=%s", peer, address)
        with self._changed:
            state.link, state.address, state.greeting = link, address, hello.greeting
            self._emit(Connected(peer, hello.greeting))
        if self.id < peer:
            channel.write(Go())
        link.tasks = [self._spawn(self._live(link, state, work)) for work in (self._receive, self._send)]

    async def _live(self, link: Link, state: PeerState, work: _Work) -> None:
        try:
            await work(link, state)
        except PeerRefused as error:
            self._count(link.peer, str(error))
            link.channel.close(str(error), refused=True)
            self._lose(link, str(error))
        except (PeerError, OSError, EOFError) as error:
            self._lose(link, in_words(error))
        except Exception as error:  # an error here must not leave a connection without a reader
            log.exception("failed peer=%d", link.peer)
            self._lose(link, in_words(error))

    def _cut(self, link: Link, reason: str) -> None:
        link.channel.close(reason, refused=True)
        self._lose(link, reason)
        link.channel.abort()

    def _lose(self, link: Link, reason: str) -> None:
        state = self._peers.get(link.peer)
        link.channel.end()
        for task in link.tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if state is None or state.link is not link:
            return
        reason = "this node ends" if self._closing else reason
        self._note(link.peer, reason)
        if self._may_log("disconnected", link.peer):
            log.info("disconnected peer=%d reason=%r", link.peer, reason)
        with self._changed:
            state.link = None
            state.stable = self._awake_s - link.opened > STABLE_S
            state.queue.clear()
            state.queued_bytes = 0
            self._emit(Disconnected(link.peer, reason))
        link.ended.set()
        state.dial.set()

    def _emit(self, event: LinkEvent) -> None:
        self._events.add(event)
        self._changed.notify()

    async def _receive(self, link: Link, state: PeerState) -> None:
        assembled = io.BytesIO()
        missing: int | None = None
        while True:
            while self._is_full(state):
                state.room.clear()
                if self._is_full(state):
                    await state.room.wait()
            link.reading = True
            found = await link.channel.receive()
            link.heard = self._awake_s
            link.received += 1
            if isinstance(found, Begin):
                if missing is not None:
                    raise PeerRefused("a message began before the last one ended")
                if found.size > self.limits.message_bytes:
                    raise PeerRefused(f"a message longer than {self.limits.message_bytes} bytes was announced")
                missing = found.size
            elif isinstance(found, Ping):
                link.pong_due = found.token
                self._nudge(link)
            elif isinstance(found, Pong):
                if found.token == link.pings:
                    state.round_trip_s = self._loop.time() - link.pinged
            elif isinstance(found, KeyInUse) and not link.warned:
                link.warned = True
                self._tell(KeyUsedElsewhere(link.peer, f"refused at {found.address}, as this one is connected"))
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
            await state.rates.spend(size_of(found), self._loop.time())

    def _is_full(self, state: PeerState) -> bool:
        """Return whether too much of the peer waits to be taken, so that nothing more is read from it."""
        limits = self.limits
        too_many = state.undelivered_messages >= limits.undelivered_messages
        return too_many or state.undelivered_bytes > limits.undelivered_bytes

    def _deliver(self, link: Link, state: PeerState, data: bytes) -> None:
        with self._changed:
            state.bytes_in += len(data)
            state.undelivered_bytes += len(data) + ENTRY_BYTES
            state.undelivered_messages += 1
            self._emit(MessageReceived(link.peer, data))

    async def _send(self, link: Link, state: PeerState) -> None:
        while True:
            link.wake.clear()
            link.writing_since = self._awake_s
            self._write_signs(link)
            await link.channel.drained()
            link.writing_since = None
            if not state.queue:
                await link.wake.wait()
                continue
            if len(state.queue[0].data) < LONG_BYTES or state.queue[0].beside:
                await self._write_message(link, state)
                continue
            link.in_line = True
            async with self._uplink.turn(link.channel):
                link.in_line = False
                await self._write_message(link, state)
                await self._gone(link)

    async def _write_message(self, link: Link, state: PeerState) -> None:
        data = state.queue[0].data
        link.channel.write(Begin(len(data)))
        view = memoryview(data)
        for start in range(0, len(data), CHUNK_BYTES):
            self._write_signs(link)
            link.writing_since = self._awake_s
            await link.channel.write_piece(view[start : start + CHUNK_BYTES])
            link.writing_since = None
        with self._changed:
            state.queue.popleft()
            state.queued_bytes -= len(data) + ENTRY_BYTES
            state.bytes_out += len(data)

    async def _gone(self, link: Link) -> None:
        """Wait until the written bytes have left this machine."""
        pause, most = MIN_LOOK_S, -1
        while link.channel.waiting_bytes:
            if (arrived := link.channel.arrived_bytes) > most:
                most, link.writing_since = arrived, self._awake_s
            self._write_signs(link)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_LOOK_S)
        link.writing_since = None

    def _nudge(self, link: Link) -> None:
        """Request a keep-alive, unless the peer does not read."""
        if link.in_line and not link.channel.unsent_bytes:
            self._write_signs(link)
        else:
            link.wake.set()

    def _write_signs(self, link: Link) -> None:
        if link.ping_due:
            link.ping_due = False
            link.pings, link.pinged = link.pings + 1, self._loop.time()
            link.channel.write(Ping(link.pings))
        if link.pong_due is not None:
            link.channel.write(Pong(link.pong_due))
            link.pong_due = None

    # --- The end ------------------------------------------------------------------------------------------

    async def _end(self, flush_s: float) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for listening in self._sockets:
            listening.close()
        links = [(state, state.link) for state in self._peers.values() if state.link is not None]

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
            self._lose(link, "this node ends")
        self._uplink.close()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, link in links:
            link.channel.abort()  # the connection of a peer that does not read would stay
        await asyncio.sleep(0.05)

    # --- Errors ----------------------------------------------------------------------------------

    def _note(self, peer: int, error: str) -> None:
        if (state := self._peers.get(peer)) is not None:
            with self._changed:
                state.last_error = error

    def _count(self, peer: int, reason: str) -> None:
        self._note(peer, reason)
        if (state := self._peers.get(peer)) is not None:
            with self._changed:
                kind = tally(state.refused, reason)
            self._warn(f"peer={peer}", kind, reason, state.refused[kind])

    def _count_stranger(self, reason: str, address: str) -> None:
        with self._changed:
            kind = tally(self._strangers, reason)
        self._warn("stranger", kind, f"{reason}; last from {address}", self._strangers[kind])

    def _warn(self, who: str, kind: str, reason: str, count: int) -> None:
        if self._may_log(kind, who):
            log.warning("refused %s reason=%r count=%d", who, reason, count)

    def _may_log(self, event: str, who: object) -> bool:
        """Return whether one more line of this kind may be logged, because an attack must not fill the log."""
        return self._log_limits.take(event, who, self._loop.time()) is not None
