"""Where a node listens, and what the operating system says of a connection."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys

from jwins.errors import UsageError
from jwins.net.roster import split_address

__all__ = ["acknowledged", "listening_sockets", "not_sent"]

BACKLOG = 512

_SIOCOUTQNSD = 0x894B  # of linux/sockios.h
_BYTES_ACKED_AT = 120  # tcpi_bytes_acked in struct tcp_info of linux/tcp.h


def listening_sockets(address: str, listen: str | None) -> list[socket.socket]:
    """Sockets that listen, one for each version of IP.

    Args:
        address: host:port at which the others dial. All interfaces are listened on, because behind a router
            this machine has another address, and many a machine resolves its own name to a loopback address.
            Only if the address is itself of loopback, no other interface is listened on.
        listen: host:port to listen on instead.

    Raises:
        UsageError: the port is in use, or may not be used.
    """
    host, port = split_address("address" if listen is None else "listen", listen or address)
    where = host if listen is not None or _is_loopback(host) else None
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(where, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, place in dict.fromkeys(found):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError:  # a system without IPv6
                continue
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(place)
            sock.listen(BACKLOG)
            sock.setblocking(False)
    except OSError as error:
        for sock in sockets:
            sock.close()
        remedy = "is the node running already? otherwise choose another port, and change the roster everywhere"
        raise UsageError(f"cannot listen on {listen or address}: {error.strerror}; {remedy}") from None
    return sockets


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def not_sent(sock: socket.socket | None) -> int:
    """Bytes that the operating system was given and has not sent once; 0 where it does not say."""
    if sys.platform == "linux" and sock is not None:
        import fcntl

        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            (found,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), _SIOCOUTQNSD, bytes(4)))
            return int(found)
    return 0


def acknowledged(sock: socket.socket | None) -> int | None:
    """Bytes that the other side has acknowledged so far; None where the operating system does not say."""
    if sys.platform == "linux" and sock is not None:
        with contextlib.suppress(OSError, ValueError, struct.error):  # closed meanwhile, or an old kernel
            about = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED_AT + 8)
            return int(struct.unpack_from("Q", about, _BYTES_ACKED_AT)[0])
    return None
