"""Dialling: keep a connection with each peer that can be reached, or keep trying."""

from __future__ import annotations

import asyncio
import logging

from jwins.errors import PeerError
from jwins.net.channel import VERSION, Channel, ChannelHello, Go, PeerRefused
from jwins.net.connections import KEY_IN_USE, Connections
from jwins.net.dial import dial
from jwins.net.tls import in_words
from jwins.net.transport_core import TransportCore
from jwins.net.transport_interface import KeyUsedElsewhere
from jwins.net.transport_state import PeerState

log = logging.getLogger("jwins.net")


class Dialler:
    """Connects with peers, in the thread of the event loop."""

    def __init__(self, core: TransportCore, connections: Connections) -> None:
        self._core, self._connections = core, connections

    async def keep_dialling(self, peer: int, state: PeerState) -> None:
        """Connect whenever there is no connection, or only a silent one."""
        limits = self._core.limits
        both_dial = self._core.id > peer and self._core.me.reachable
        pause = limits.retry_s * (4 if both_dial else 1)  # lets the other side dial first
        while True:
            await state.dial.wait()
            if state.stable:
                state.stable, pause = False, limits.retry_s
            await asyncio.sleep(pause * self._core.draws.uniform(0.5, 1.5))
            state.dial.clear()
            if state.link is not None and not self._core.is_silent(state.link):
                continue
            pause = min(2 * pause, limits.max_retry_s)
            try:
                await self._dial(peer, state)
            except Exception as error:
                if not isinstance(error, PeerError | OSError | EOFError):
                    log.exception("failed peer=%d", peer)
                if state.link is None:
                    if (words := in_words(error)) != state.last_error:
                        if self._core.may_log("cannot connect", peer):
                            log.info("cannot connect peer=%d reason=%r", peer, words)
                        if KEY_IN_USE in words:
                            self._core.add_event(
                                KeyUsedElsewhere(
                                    peer, "it is connected with the other process, and refuses this one"
                                )
                            )
                    self._core.note(peer, words)
                    state.dial.set()

    async def _dial(self, peer: int, state: PeerState) -> None:
        member = self._core.roster[peer]
        channel: Channel | None = None
        try:
            async with asyncio.timeout(self._core.limits.handshake_s):
                channel, fingerprint = await dial(member, self._core.contexts, self._core.limits.handshake_s)
                channel.write(self._core.hello(peer))
                hello = await channel.control(ChannelHello)
                if (hello.version, hello.id, hello.to) != (VERSION, peer, self._core.id):
                    raise PeerRefused(f"its Hello is of node {hello.id}, protocol {hello.version}")
                if self._core.id < peer:
                    await self._connections.admit(hello, state, member.address)
                else:
                    await channel.control(Go)
        except BaseException as error:
            if channel is not None:
                if isinstance(error, PeerRefused):
                    channel.close(str(error), refused=True)
                channel.end()
            raise
        self._connections.attach(peer, state, channel, hello, fingerprint, member.address)
