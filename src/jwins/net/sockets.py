"""Where a node listens."""

from __future__ import annotations

import socket

from jwins.errors import UsageError
from jwins.net.roster import split_address

__all__ = ["listening_sockets"]

BACKLOG = 512


def listening_sockets(address: str, listen: str | None) -> list[socket.socket]:
    """Sockets that listen, one for each version of IP.

    Args:
        address: host:port at which the others dial. If the host is of the loopback interface, that alone is
            listened on, and otherwise all interfaces: behind a router this machine has another address.
        listen: host:port to listen on instead.

    Raises:
        UsageError: the port is in use, or may not be used.
    """
    host, port = split_address("address" if listen is None else "listen", listen or address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        local = listen is not None or all(_is_loopback(str(entry[4][0])) for entry in found)
    except socket.gaierror:  # a name that the others know
        found, local = [], False
    if not local:
        found = socket.getaddrinfo(None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, where in dict.fromkeys(found):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError:  # a system without IPv6
                continue
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(where)
            sock.listen(BACKLOG)
            sock.setblocking(False)
    except OSError as error:
        for sock in sockets:
            sock.close()
        remedy = "is the node running already? otherwise choose another port, and change the roster everywhere"
        raise UsageError(f"cannot listen on {listen or address}: {error.strerror}; {remedy}") from None
    return sockets


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
