"""Sockets: listening, the operating system's state of a connection, and protection from child processes."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from jwins.errors import UsageError
from jwins.net.roster import split_address

T = TypeVar("T")

BACKLOG = 512

_SIOCOUTQNSD = 0x894B  # of linux/sockios.h
_BYTES_ACKED_AT = 120  # tcpi_bytes_acked in struct tcp_info of linux/tcp.h


def listening_sockets(address: str, listen: str | None) -> list[socket.socket]:
    """Open listening sockets, one for each version of IP.

    Args:
        address: host:port that the others dial. The sockets listen on all interfaces, because behind a router
            this machine has another address, and many machines resolve their own name to a loopback address.
            If the address itself is a loopback address, they listen only there.
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
        remedy = (
            "is the node running already? if not, choose another port and change the roster on every machine"
        )
        raise UsageError(f"cannot listen on {listen or address}: {error.strerror}; {remedy}") from None
    return sockets


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def not_sent(sock: socket.socket | None) -> int:
    """Return the bytes that the operating system has not sent yet; 0 if it does not report them."""
    if sys.platform == "linux" and sock is not None:
        import fcntl

        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            (found,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), _SIOCOUTQNSD, bytes(4)))
            return int(found)
    return 0


def acknowledged(sock: socket.socket | None) -> int | None:
    """Return the bytes that the other side has acknowledged; None if the system does not report them."""
    if sys.platform == "linux" and sock is not None:
        with contextlib.suppress(OSError, ValueError, struct.error):  # closed meanwhile, or an old kernel
            about = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED_AT + 8)
            return int(struct.unpack_from("Q", about, _BYTES_ACKED_AT)[0])
    return None


# --- Processes forked from this one -----------------------------------------------------------------------

_OWNERS: WeakKeyDictionary[Any, Callable[[Any], Iterable[int]]] = WeakKeyDictionary()


def keep_from_children(owner: T, numbers: Callable[[T], Iterable[int]]) -> None:
    """Close an object's sockets in processes that are forked from this one, such as workers of a DataLoader.

    Otherwise a port stays in use and a connection open as long as the last of them lives.

    Args:
        owner: owner of the sockets; not kept alive.
        numbers: returns the file descriptors of its open sockets. Called in the child, so it must not take a
            lock: a thread that exists only in the parent may hold it.
    """
    _OWNERS[owner] = numbers


def _let_go() -> None:
    """Close the sockets without a message, because the connection is the parent's."""
    every = [number for owner, numbers in list(_OWNERS.items()) for number in numbers(owner)]
    _OWNERS.clear()
    if not every:
        return
    # The child has copies of the objects, which will close these numbers. So the numbers must stay in use.
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in every:
        with contextlib.suppress(OSError, ValueError):  # closed
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                os.dup2(nothing, number, inheritable=False)
    os.close(nothing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
