"""Members of a roster on the loopback interface, made for one test."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from jwins.net.limits import Limits
from jwins.net.roster import Member, Roster
from jwins.net.transport import TlsTransport
from jwins.net.transport_interface import LinkEvent, MessageReceived

DEADLINE_S = 30.0


def _ports() -> Iterator[int]:
    """Ports below those that systems give to outgoing connections, which could take them before they are used.

    Each is given once, and tests that run in several processes have ports of their own.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    each = 12000 // workers
    ports = range(20000 + worker * each, 20000 + (worker + 1) * each)
    yield from random.SystemRandom().sample(ports, each)


_PORTS = _ports()
_BOUND: deque[socket.socket] = deque()
atexit.register(lambda: [sock.close() for sock in _BOUND])


def free_port() -> int:
    """A port that nothing listens on, and that no other test is given.

    A socket stays bound to it, so that no outgoing connection takes it before the test listens: Linux then
    gives the port only to those that bind it with ``SO_REUSEADDR``, as nodes do.
    """
    for port in _PORTS:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            sock.close()
            continue
        _BOUND.append(sock)
        if len(_BOUND) > 100:
            _BOUND.popleft().close()
        return port
    raise AssertionError("no port is free")


def member(folder: Path, id: int, name: str, *, reachable: bool = True) -> Member:
    return Member.new(id, name, f"127.0.0.1:{free_port()}", folder, reachable=reachable)


NAMES = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy")


def roster_of(folder: Path, count: int) -> Roster:
    return Roster(members=tuple(member(folder, i, NAMES[i]) for i in range(count)))


class Node:
    """A transport, and what it has told so far."""

    def __init__(
        self,
        roster: Roster,
        id: int,
        folder: Path,
        *,
        limits: Limits | None = None,
        greeting: bytes = b"",
        dial: tuple[int, ...] | None = None,
    ) -> None:
        key = folder / f"{roster[id].name}.key"
        self.transport = TlsTransport(roster, id, key, limits=limits, greeting=greeting, dial=dial)
        self.events: list[LinkEvent] = []

    def started(self) -> Node:
        self.transport.start()
        return self

    def poll_until(self, wanted: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
        """Take events until the condition holds."""
        end = time.monotonic() + deadline_s
        while not wanted():
            assert time.monotonic() < end, f"waited {deadline_s:.0f} s for {what}; events: {self.events[-5:]}"
            event = self.transport.poll(0.02)
            if event is not None:
                self.events.append(event)

    def until_connected(self, *peers: int) -> None:
        def connected() -> bool:
            report = self.transport.report()
            return all(report[peer].connected for peer in peers)

        self.poll_until(connected, f"a connection with {peers}")

    def messages(self, peer: int) -> list[bytes]:
        return [e.data for e in self.events if isinstance(e, MessageReceived) and e.peer == peer]


@contextlib.contextmanager
def forked(ports: Collection[int]) -> Iterator[int]:
    """A process forked from this one lives as long as the block.

    Yields:
        How many of its sockets listen on these ports, or are connections from or to them.
    """
    mine, its = socket.socketpair()
    with mine, its:
        pid = os.fork()
        if pid == 0:
            try:
                mine.close()
                its.sendall(str(_sockets_at(ports)).encode())
                its.recv(1)
            finally:
                os._exit(0)
        its.close()
        yield int(mine.recv(100))
    os.waitpid(pid, 0)


def _sockets_at(ports: Collection[int]) -> int:
    count, bound = 0, {sock.fileno() for sock in _BOUND}
    for number in set(range(4096)) - bound:
        with contextlib.suppress(OSError):
            sock = socket.socket(fileno=number)
            try:
                places = [sock.getsockname()]
                with contextlib.suppress(OSError):  # it listens
                    places.append(sock.getpeername())
            finally:
                sock.detach()
            count += any(place[1] in ports for place in places if isinstance(place, tuple))
    return count
