"""Incoming connections: accept and authenticate them, then attach them or answer a measurement."""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial

from jwins.errors import PeerError
from jwins.net.channel import VERSION, Begin, Channel, ChannelHello, Control, Go, PeerRefused, Ping, Pong, Sunk
from jwins.net.connections import Connections
from jwins.net.dial import READER_BYTES, SHUTDOWN_S
from jwins.net.tls import in_words, presented_fingerprint
from jwins.net.transport_core import TransportCore
from jwins.net.transport_state import PeerState, size_of

log = logging.getLogger("jwins.net")

PROBE_BYTES = 64 << 20
PROBE_S = 30.0


class Listener:
    """Listener for incoming connections, in the thread of the event loop."""

    def __init__(self, core: TransportCore, connections: Connections) -> None:
        self._core, self._connections = core, connections
        self._self: PeerState | None = None

    async def accept(self, listening: socket.socket) -> None:
        """Accept connections until this is cancelled."""
        while True:
            try:
                sock, address = await self._core.loop.sock_accept(listening)
            except OSError as error:  # such as too many open files: wait for some to close
                self._core.count_stranger(f"not accepted: {error.strerror}", "")
                await asyncio.sleep(0.1)
                continue
            host = str(address[0])
            if (
                self._core.pending.total() >= self._core.limits.pending
                or self._core.pending[host] >= self._core.limits.pending_per_address
            ):
                sock.close()
                self._core.count_stranger("too many connections at once", host)
                continue
            self._core.pending[host] += 1
            task = self._core.spawn(self._answer(sock, host, f"{host}:{address[1]}"))
            task.add_done_callback(partial(_close_if_cancelled, sock))

    async def _answer(self, sock: socket.socket, host: str, address: str) -> None:
        writer: asyncio.StreamWriter | None = None
        channel: Channel | None = None
        state: PeerState | None = None
        try:
            async with asyncio.timeout(self._core.limits.handshake_s):
                reader = asyncio.StreamReader(limit=READER_BYTES)
                protocol = asyncio.StreamReaderProtocol(reader)
                transport, _ = await self._core.loop.connect_accepted_socket(
                    lambda: protocol,
                    sock,
                    ssl=self._core.contexts.server,
                    ssl_handshake_timeout=self._core.limits.handshake_s,
                    ssl_shutdown_timeout=SHUTDOWN_S,
                )
                writer = asyncio.StreamWriter(transport, protocol, reader, self._core.loop)
                channel = await Channel.answer(reader, writer)
                hello = await channel.control(ChannelHello)
                fingerprint = presented_fingerprint(channel.ssl_object)
                self._identify(hello, fingerprint)
                state = self._state_of_self() if hello.id == self._core.id else self._core.peers[hello.id]
                if not hello.probe:
                    self._may_connect(state)
                    await self._connections.admit(hello, state, address)
                elif state.probed:
                    raise PeerRefused("it runs a measurement already")
                elif state.measurements.take(1, self._core.loop.time()) > 0:
                    raise PeerRefused("it measures too often")
                channel.write(self._core.hello(hello.id))
                if not hello.probe and self._core.id > hello.id:
                    await channel.control(Go)
        except (PeerError, OSError, EOFError) as error:
            words = "not authenticated in time" if isinstance(error, TimeoutError) else in_words(error)
            if isinstance(error, PeerRefused) and channel is not None:
                channel.close(words, refused=True)
            if state is None:
                self._core.count_stranger(words, address)
            elif isinstance(error, PeerRefused):
                self._core.count(hello.id, words)
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
            self._core.pending[host] -= 1
            if self._core.pending[host] <= 0:
                del self._core.pending[host]
        if hello.probe:
            await self._serve_probe(channel, state)
        else:
            self._connections.attach(hello.id, state, channel, hello, fingerprint, address)

    def _identify(self, hello: ChannelHello, fingerprint: str) -> None:
        if hello.version != VERSION:
            raise PeerRefused(
                f"it speaks another version of the protocol ({hello.version} there, {VERSION} here)"
            )
        if hello.id not in self._core.roster or (hello.id == self._core.id and not hello.probe):
            raise PeerRefused("it claims an id that no other member of the roster here has")
        if fingerprint != self._core.roster[hello.id].x509.fingerprint:
            raise PeerRefused("its certificate differs from the one that the roster here has for its id")
        if hello.to != self._core.id:
            ids = f"{hello.to} there, {self._core.id} here"
            raise PeerRefused(f"it looks for another node; an address in a roster is wrong ({ids})")

    def _state_of_self(self) -> PeerState:
        """Answer `jwins doctor` on this machine, which asks with this node's own key."""
        self._self = self._self or self._core.new_state()
        return self._self

    def _may_connect(self, state: PeerState) -> None:
        if self._core.closing:
            raise PeerRefused("this node is ending")
        if state.arrivals.take(1, self._core.loop.time()) > 0:
            raise PeerRefused("it connects too often")

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
                    await state.rates.spend(size_of(found), self._core.loop.time())
        except (PeerError, OSError):
            pass
        finally:
            state.probed = False
            channel.end()


def _close_if_cancelled(sock: socket.socket, task: asyncio.Task[None]) -> None:
    """Close the socket of a task that was cancelled, perhaps before it ran at all."""
    if task.cancelled():
        sock.close()
