"""Authenticated connections to members."""

from __future__ import annotations

import asyncio

from jwins.errors import PeerError
from jwins.net.channel import Channel
from jwins.net.roster import Member
from jwins.net.tls import Contexts, presented_fingerprint

READER_BYTES = 1 << 17

SHUTDOWN_S = 1.0
"""Limit for the end of TLS."""


async def dial(member: Member, contexts: Contexts, timeout_s: float) -> tuple[Channel, str]:
    """Connect to a member, and check its certificate.

    Returns:
        The connection, without messages yet, and the fingerprint at its other end.

    Raises:
        PeerError: another certificate than the roster's, or not this protocol.
        OSError: no connection, or no TLS.
    """
    host, port = member.host_and_port
    reader, writer = await asyncio.open_connection(
        host,
        port,
        ssl=contexts.client,
        server_hostname="",
        limit=READER_BYTES,
        ssl_handshake_timeout=timeout_s,
        ssl_shutdown_timeout=SHUTDOWN_S,
    )
    try:
        fingerprint = presented_fingerprint(writer.get_extra_info("ssl_object"))
        if fingerprint != member.x509.fingerprint:
            raise PeerError(
                f"the certificate at {member.address} is not {member.name}'s: its fingerprint is {fingerprint} "
                f"and in the roster {member.x509.fingerprint}"
            )
        return await Channel.dial(reader, writer, member.address), fingerprint
    except (ConnectionResetError, BrokenPipeError):  # the alert with the reason is often lost
        writer.transport.abort()
        raise PeerError(
            "it ended the connection when it saw our certificate: its roster has another one, or none"
        ) from None
    except BaseException:
        writer.transport.abort()
        raise
