"""Guarantees for honest members: whole messages, in order, on one connection that is restored after a break."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attackers import forge
from members import DEADLINE_S, NAMES, Node, forked, free_port, member, roster_of

from jwins.errors import ConfigError, UsageError
from jwins.net import channel, uplink_scheduler
from jwins.net.limits import Limits
from jwins.net.listener import Listener
from jwins.net.roster import Member, Roster
from jwins.net.sockets import listening_sockets
from jwins.net.transport import TlsTransport
from jwins.net.transport_interface import Connected, Disconnected, KeyUsedElsewhere, MessageReceived

QUICK = Limits(retry_s=0.05, connections_per_s=100.0)

Make = Callable[..., Node]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Starts nodes, and closes them at the end."""
    nodes: list[Node] = []

    def make(roster: Roster, id: int, **more: object) -> Node:
        node = Node(roster, id, tmp_path, **{"limits": QUICK, **more})  # type: ignore[arg-type]
        nodes.append(node)
        return node.started()

    yield make
    for node in nodes:
        node.transport.close(0.5)


@pytest.fixture
def roster(tmp_path: Path) -> Roster:
    return roster_of(tmp_path, 2)


@pytest.fixture
def pair(make: Make, roster: Roster) -> tuple[Node, Node]:
    alice, bob = make(roster, 0), make(roster, 1)
    alice.until_connected(1)
    bob.until_connected(0)
    return alice, bob


def test_messages_arrive_whole_and_in_order(pair: tuple[Node, Node]) -> None:
    alice, bob = pair
    sizes = [0, 1, 1000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20, 5, 0]
    messages = [os.urandom(size) for size in sizes]
    for message in messages:
        assert alice.transport.send(1, message)
        assert bob.transport.send(0, message[::-1])
    bob.poll_until(lambda: len(bob.messages(0)) == len(messages), "all messages of Alice")
    alice.poll_until(lambda: len(alice.messages(1)) == len(messages), "all messages of Bob")
    assert bob.messages(0) == messages
    assert alice.messages(1) == [message[::-1] for message in messages]
    total = sum(sizes)
    alice.poll_until(lambda: alice.transport.report()[1].queued_bytes == 0, "an empty queue")
    report = alice.transport.report()[1]
    assert (report.bytes_in, report.bytes_out, report.refused) == (total, total, {})


def test_hundred_megabytes_pass(pair: tuple[Node, Node]) -> None:
    alice, bob = pair
    message = os.urandom(1 << 20) * 100
    assert alice.transport.send(1, message)
    bob.poll_until(lambda: len(bob.messages(0)) == 1, "the message", 120)
    assert bob.messages(0) == [message]


def test_a_long_message_waits_until_the_one_before_it_has_left(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile both connections show signs of life, or they would be cut."""
    held = True
    monkeypatch.setattr(channel, "not_sent", lambda sock: int(held))
    monkeypatch.setattr(uplink_scheduler, "WINDOW_S", 1000.0)
    roster = roster_of(tmp_path, 4)
    limits = Limits(retry_s=0.05, heartbeat_s=0.25, dead_s=1.5)
    alice, bob, carol, dave = (make(roster, number, limits=limits) for number in range(4))
    for peer in (1, 2, 3):
        alice.until_connected(peer)
    message = os.urandom(2 * uplink_scheduler.LONG_BYTES)
    for peer in (1, 2):
        assert alice.transport.send(peer, message)
    assert alice.transport.send(3, message, beside=True)
    dave.poll_until(lambda: dave.messages(0) == [message], "what nobody waits for and that waits for nobody")
    until = time.monotonic() + 2 * limits.dead_s
    while time.monotonic() < until:
        for node in (bob, carol):
            if (event := node.transport.poll(0.05)) is not None:
                node.events.append(event)
    first, second = sorted((bob, carol), key=lambda node: len(node.messages(0)), reverse=True)
    assert (first.messages(0), second.messages(0)) == ([message], [])
    held = False
    second.poll_until(lambda: second.messages(0) == [message], "the second message")
    for node in (alice, bob, carol, dave):
        assert not any(isinstance(event, Disconnected) for event in node.events)


def test_events_come_in_order(make: Make, roster: Roster) -> None:
    alice, bob = make(roster, 0, greeting=b"digest A"), make(roster, 1, greeting=b"digest B")
    alice.until_connected(1)
    assert alice.transport.send(1, b"first")
    bob.poll_until(lambda: len(bob.events) == 2, "two events")
    assert bob.events == [Connected(0, b"digest A"), MessageReceived(0, b"first")]
    alice.transport.close()
    bob.poll_until(lambda: len(bob.events) == 3, "the end")
    assert bob.events[2] == Disconnected(0, "it closed the connection: this node ends")
    alice.poll_until(lambda: len(alice.events) == 2, "events after the end")
    assert alice.events == [Connected(1, b"digest B"), Disconnected(1, "this node ends")]
    assert bob.transport.report()[0].greeting == b"digest A"


def test_a_full_mesh_has_one_connection_for_each_pair(make: Make, tmp_path: Path) -> None:
    """Everyone dials everyone at once, and no message that was ever accepted is lost."""
    roster = roster_of(tmp_path, 4)
    nodes = [make(roster, number) for number in range(4)]
    accepted: dict[int, set[int]] = {node.transport.id: set() for node in nodes}

    def all_said() -> bool:
        for node in nodes:
            here = node.transport.id
            for peer in range(4):
                if peer != here and peer not in accepted[here] and node.transport.send(peer, b"%d" % here):
                    accepted[here].add(peer)
            if (event := node.transport.poll(0.0)) is not None:
                node.events.append(event)
        return all(len(node.messages(p)) == 1 for node in nodes for p in range(4) if p != node.transport.id)

    nodes[0].poll_until(all_said, "a message of each to each")
    for node in nodes:
        assert [event for event in node.events if isinstance(event, Disconnected)] == []
        assert {p: r.connections for p, r in node.transport.report().items()} == {
            p: 1 for p in range(4) if p != node.transport.id
        }


@pytest.mark.parametrize("hidden", [0, 1])
def test_only_one_of_two_can_be_dialled(make: Make, tmp_path: Path, hidden: int) -> None:
    roster = Roster(members=tuple(member(tmp_path, i, NAMES[i], reachable=i != hidden) for i in range(2)))
    alice, bob = make(roster, 0), make(roster, 1)
    alice.until_connected(1)
    assert (alice, bob)[hidden].transport.port == 0
    alice.transport.send(1, b"through")
    bob.poll_until(lambda: bob.messages(0) == [b"through"], "a message")


def test_two_that_cannot_be_dialled_say_so(make: Make, tmp_path: Path) -> None:
    roster = Roster(members=tuple(member(tmp_path, i, NAMES[i], reachable=False) for i in range(2)))
    alice = make(roster, 0)
    assert "neither of the two can be dialled" in alice.transport.report()[1].last_error


def test_whom_it_does_not_know_or_is_not_connected_with_gets_nothing(make: Make, roster: Roster) -> None:
    alice = make(roster, 0)
    assert not alice.transport.send(1, b"x")
    assert not alice.transport.send(99, b"x")
    assert not alice.transport.send(0, b"x")
    alice.poll_until(lambda: "nothing listens there" in alice.transport.report()[1].last_error, "the reason")


def test_a_full_queue_refuses(make: Make, roster: Roster) -> None:
    alice = make(roster, 0, limits=Limits(queue_bytes=2 << 20, retry_s=0.05))
    bob = make(roster, 1, limits=Limits(undelivered_bytes=1, retry_s=0.05))
    alice.until_connected(1)
    accepted = 0
    while alice.transport.send(1, bytes([accepted % 256]) * (1 << 20)):
        accepted += 1
        assert accepted < 200
    assert alice.transport.report()[1].queued_bytes <= 2 << 20
    bob.poll_until(lambda: len(bob.messages(0)) == accepted, "all that was accepted")
    assert [message[0] for message in bob.messages(0)] == [number % 256 for number in range(accepted)]
    assert alice.transport.send(1, b"again")


def test_a_message_beyond_the_limit_is_the_callers_mistake(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    with pytest.raises(UsageError, match=r"raise limits\.message_bytes"):
        alice.transport.send(1, bytes(QUICK.message_bytes + 1))


def test_wake_and_timeout(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    while alice.transport.poll(0.05) is not None:
        pass
    assert alice.transport.poll(0.0) is None
    threading.Timer(0.1, alice.transport.wake).start()
    assert alice.transport.poll(None) is None
    alice.transport.wake()
    alice.transport.wake()
    assert alice.transport.poll(None) is None


def test_what_is_queued_is_sent_at_the_end(pair: tuple[Node, Node]) -> None:
    alice, bob = pair
    messages = [bytes([number]) * (4 << 20) for number in range(10)]
    for message in messages:
        assert alice.transport.send(1, message)
    closing = threading.Thread(target=alice.transport.close, args=(DEADLINE_S,))
    closing.start()
    bob.poll_until(lambda: any(isinstance(e, Disconnected) for e in bob.events), "Alice's end")
    closing.join()
    assert bob.messages(0) == messages
    alice.transport.close()
    assert not alice.transport.send(1, b"x")


def test_a_peer_that_restarts_is_connected_again(make: Make, roster: Roster) -> None:
    alice = make(roster, 0)
    for turn in range(3):
        bob = make(roster, 1)
        alice.until_connected(1)
        bob.until_connected(0)
        assert bob.transport.send(0, b"%d" % turn)
        alice.poll_until(lambda turn=turn: alice.messages(1)[-1:] == [b"%d" % turn], "a message")  # type: ignore[misc]
        bob.transport.close()
        alice.poll_until(lambda: not alice.transport.report()[1].connected, "Bob's end")
    assert alice.transport.report()[1].connections == 3


def told_of_its_key(node: Node) -> bool:
    return any(isinstance(event, KeyUsedElsewhere) for event in node.events)


def test_a_node_started_twice(make: Make, roster: Roster, pair: tuple[Node, Node]) -> None:
    """The first goes on; the second is told. When the first is gone, the second takes its place."""
    alice, bob = pair
    twin_roster = Roster(
        members=tuple(
            m.model_copy(update={"address": f"127.0.0.1:{free_port()}"}) if m.id == 1 else m
            for m in roster.members
        )
    )
    twin = make(twin_roster, 1)
    twin.poll_until(lambda: "another process" in twin.transport.report()[0].last_error, "the refusal")
    for one in (twin, bob):  # both machines are told that their key is in use
        one.poll_until(lambda one=one: told_of_its_key(one), "the news")  # type: ignore[misc]
    assert alice.transport.report()[1].connections == 1
    bob.transport.close()
    twin.until_connected(0)


def test_the_lower_one_started_twice(make: Make, roster: Roster, pair: tuple[Node, Node]) -> None:
    alice, bob = pair
    twin_roster = Roster(
        members=tuple(
            m.model_copy(update={"address": f"127.0.0.1:{free_port()}"}) if m.id == 0 else m
            for m in roster.members
        )
    )
    twin = make(twin_roster, 0)
    twin.poll_until(lambda: "another process" in twin.transport.report()[1].last_error, "the refusal")
    for one in (twin, alice):
        one.poll_until(lambda one=one: told_of_its_key(one), "the news")  # type: ignore[misc]
    assert bob.transport.report()[0].connections == 1


def test_a_used_port_is_said(make: Make, roster: Roster, tmp_path: Path) -> None:
    with socket.create_server(roster[0].host_and_port):
        transport = TlsTransport(roster, 0, tmp_path / "alice.key")
        with pytest.raises(UsageError, match="is the node running already"):
            transport.start()


def test_another_listening_address(make: Make, roster: Roster, tmp_path: Path) -> None:
    """As behind a port that a router forwards."""
    port = free_port()
    alice = TlsTransport(roster, 0, tmp_path / "alice.key", listen=f"127.0.0.1:{port}")
    alice.start()
    assert alice.port == port
    alice.close()


@pytest.mark.parametrize("what", ["another's key", "readable", "missing", "expired"])
def test_a_key_that_will_not_do(roster: Roster, tmp_path: Path, what: str) -> None:
    key = tmp_path / "alice.key"
    match what:
        case "another's key":
            key, message = tmp_path / "bob.key", "is not the key of alice's certificate"
        case "readable":
            key.chmod(0o644)
            message = "chmod 600"
        case "missing":
            key, message = tmp_path / "none.key", "jwins keys new"
        case _:
            from attackers import DAY

            _, key, seen = forge(tmp_path, "alice", "old", begins=-9 * DAY, ends=-DAY)
            alice = Member(
                id=0, name="alice", address="127.0.0.1:7420", fingerprint=seen.fingerprint, certificate=seen.pem
            )
            roster, message = Roster(members=(alice,)), "jwins keys renew alice"
    with pytest.raises(ConfigError, match=message):
        TlsTransport(roster, 0, key)


# --- A roster that changes --------------------------------------------------------------------------------


def test_who_is_removed_is_cut_and_who_is_new_is_dialled(make: Make, tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    alice, bob = make(roster, 0), make(roster, 1)
    alice.until_connected(1)
    carol = member(tmp_path, 2, "carol")
    changed = roster.without("bob", from_round=5).with_member(carol, from_round=6)
    alice.transport.update(changed)
    assert 1 not in alice.transport.report()
    assert not alice.transport.send(1, b"x")
    bob.poll_until(
        lambda: Disconnected(0, "it closed the connection: it was removed from the roster") in bob.events,
        "the cut",
    )
    bob.poll_until(lambda: "certificate" in bob.transport.report()[0].last_error, "the refusal of Bob's return")
    third = make(changed, 2)
    alice.until_connected(2)
    third.until_connected(0)
    assert changed.roster_version == 2


def test_a_new_certificate_replaces_the_old_one_at_once(make: Make, tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    alice, bob = make(roster, 0), make(roster, 1)
    alice.until_connected(1)
    _, key, seen = forge(tmp_path, "bob", "bob2")
    entry = roster[1].model_copy(update={"fingerprint": seen.fingerprint, "certificate": seen.pem})
    changed = roster.with_member(entry, replace=True, from_round=3)
    alice.transport.update(changed)
    bob.poll_until(
        lambda: (
            Disconnected(0, "it closed the connection: its certificate in the roster has changed") in bob.events
        ),
        "the cut",
    )
    assert not alice.transport.report()[1].connected
    bob.transport.update(changed, key_file=key)
    alice.until_connected(1)
    assert alice.transport.send(1, b"welcome")
    bob.poll_until(lambda: bob.messages(0) == [b"welcome"], "a message")


def test_only_a_running_transport_takes_a_roster(roster: Roster, tmp_path: Path) -> None:
    alice = Node(roster, 0, tmp_path)
    with pytest.raises(UsageError, match="is not running"):
        alice.transport.update(roster)
    alice.started().transport.close()
    with pytest.raises(UsageError, match="is not running"):
        alice.transport.update(roster)
    with pytest.raises(UsageError, match="started once"):
        alice.transport.start()


def test_what_a_removed_member_sent_is_not_handed_out(make: Make, tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 3)
    alice, bob, carol = (make(roster, number) for number in range(3))
    bob.until_connected(0)
    carol.until_connected(0)
    for node in (bob, carol):
        assert node.transport.send(0, b"of " + roster[node.transport.id].name.encode())
    bob.poll_until(lambda: alice.transport.report()[1].bytes_in == 6, "Bob's message")
    carol.poll_until(lambda: alice.transport.report()[2].bytes_in == 8, "Carol's message")
    alice.transport.update(roster.without("bob"))
    alice.poll_until(lambda: alice.messages(2) == [b"of carol"], "Carol's message")
    assert alice.messages(1) == []


def test_a_roster_without_this_node_is_refused(pair: tuple[Node, Node], roster: Roster) -> None:
    alice, _ = pair
    with pytest.raises(UsageError, match="no member of the roster"):
        alice.transport.update(roster.without("alice"))
    assert alice.transport.report()[1].connected


# --- Standstill -------------------------------------------------------------------------------------------

CHILD = """
import ctypes, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from members import Node, Limits
from jwins.net.roster import read_roster
from jwins.net.limits import Limits
folder, hold_s = Path(sys.argv[2]), float(sys.argv[3])
node = Node(read_roster(folder / "roster.toml"), 1, folder, limits=Limits(retry_s=0.05)).started()
node.until_connected(0)
node.poll_until(lambda: len(node.messages(0)) == 1, "the word to begin")
print("holding", flush=True)
end = time.monotonic() + hold_s
while time.monotonic() < end:
    ctypes.PyDLL(None).sleep(max(1, int(end - time.monotonic())))  # PyDLL keeps the interpreter lock
print("held", flush=True)
node.poll_until(lambda: len(node.messages(0)) == 12, "all messages", 60)
node.transport.send(0, str(sum(map(len, node.messages(0)))).encode())
node.poll_until(lambda: not node.transport.report()[0].connected, "the end", 60)
node.transport.close()
print(node.transport.report()[0].connections, flush=True)
"""


@pytest.mark.slow
def test_a_peer_whose_interpreter_is_held_keeps_its_connection(make: Make, tmp_path: Path) -> None:
    """For so long no thread of its process runs; the 100 MB that were sent meanwhile arrive afterwards."""
    from jwins.net.roster import write_roster

    roster = roster_of(tmp_path, 2)
    write_roster(roster, tmp_path / "roster.toml")
    alice = make(roster, 0, limits=Limits(retry_s=0.05, heartbeat_s=1.0, silent_s=5.0))
    hold_s = 31
    arguments = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path), str(hold_s)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            alice.until_connected(1)
            assert alice.transport.send(1, b"begin")
            assert child.stdout.readline() == "holding\n"
            for _ in range(10):
                assert alice.transport.send(1, bytes(10 << 20))
            assert alice.transport.send(1, b"end")
            alice.poll_until(lambda: len(alice.messages(1)) == 1, "the answer", hold_s + 60)
            assert alice.messages(1) == [str(5 + (100 << 20) + 3).encode()]
            assert alice.transport.report()[1].connections == 1
            alice.transport.close()
            assert child.stdout.read() == "held\n1\n"
            assert child.wait(30) == 0
        finally:
            child.kill()


@pytest.mark.slow
def test_own_standstill_is_not_held_against_others(make: Make, roster: Roster) -> None:
    """This process does nothing for longer than it would wait for another."""
    limits = Limits(retry_s=0.05, heartbeat_s=0.5, silent_s=1.0, dead_s=3.5)
    alice, bob = make(roster, 0, limits=limits), make(roster, 1, limits=limits)
    alice.until_connected(1)
    bob.until_connected(0)
    ctypes.PyDLL(None).sleep(5)
    bob.transport.send(0, b"well slept")
    alice.poll_until(lambda: alice.messages(1) == [b"well slept"], "a message")
    assert [event for event in alice.events if isinstance(event, Disconnected)] == []


@pytest.mark.slow
def test_a_peer_that_is_silent_is_cut(make: Make, tmp_path: Path) -> None:
    """A stopped process neither reads nor ends its connections."""
    from jwins.net.roster import write_roster

    roster = roster_of(tmp_path, 2)
    write_roster(roster, tmp_path / "roster.toml")
    alice = make(
        roster, 0, limits=Limits(retry_s=0.05, heartbeat_s=0.5, silent_s=1.0, dead_s=2.0, handshake_s=1.0)
    )
    arguments = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path), "0"]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            alice.until_connected(1)
            child.send_signal(signal.SIGSTOP)
            alice.poll_until(
                lambda: Disconnected(1, "it sent nothing for 2 s") in alice.events, "the connection to be cut"
            )
            child.send_signal(signal.SIGCONT)
            alice.until_connected(1)
        finally:
            child.kill()


@pytest.mark.slow
def test_a_network_that_parts_and_heals(make: Make, tmp_path: Path) -> None:
    """Between the two sits a relay that passes nothing on for a while, without ending a connection."""
    roster = roster_of(tmp_path, 2)
    limits = Limits(retry_s=0.05, heartbeat_s=0.5, silent_s=1.5, handshake_s=1.0, connections_per_s=100.0)
    relayed = Roster(
        members=tuple(
            m.model_copy(update={"address": f"127.0.0.1:{free_port()}"}) if m.id == 1 else m
            for m in roster.members
        )
    )
    bob = make(roster, 1, limits=limits, dial=())
    with Relay(relayed[1].host_and_port[1], bob.transport.port) as relay:
        alice = make(relayed, 0, limits=limits)
        alice.until_connected(1)
        bob.until_connected(0)
        relay.part()
        assert alice.transport.send(1, b"lost")
        alice.poll_until(lambda: relay.refused >= 1, "another attempt while the old connection is silent")
        assert alice.transport.report()[1].connected
        relay.heal()
        alice.poll_until(lambda: alice.transport.report()[1].connections == 2, "a new connection")
        bob.poll_until(lambda: bob.transport.report()[0].connections == 2, "the same at Bob's")
        assert alice.transport.send(1, b"healed")
        bob.poll_until(lambda: b"healed" in bob.messages(0), "a message")
        alice.transport.close()
        bob.transport.close()


class Relay:
    """Passes TCP on, until it parts; connections from before stay dumb for ever."""

    def __init__(self, port: int, to: int) -> None:
        self.refused = 0
        self._to = to
        self._open = threading.Event()
        self._open.set()
        self._listening = socket.create_server(("127.0.0.1", port))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self._generation = 0
        self._ended = False

    def part(self) -> None:
        self._generation += 1
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        with socket.create_connection(self._listening.getsockname()):
            pass
        self._listening.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()

    def _accept(self) -> None:
        while True:
            near, _ = self._listening.accept()
            self._sockets.append(near)
            if self._ended:
                return
            if not self._open.is_set():
                self.refused += 1
                continue
            far = socket.create_connection(("127.0.0.1", self._to))
            self._sockets.append(far)
            for ends in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=(*ends, self._generation))
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, generation: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if generation == self._generation:
                    sink.sendall(data)


def test_nothing_is_left_after_many_connections(make: Make, roster: Roster) -> None:
    """File descriptors and threads are those of before."""
    alice = make(roster, 0)
    counts = []
    for _ in range(6):
        bob = make(roster, 1)
        alice.until_connected(1)
        bob.transport.close()
        alice.poll_until(lambda: not alice.transport.report()[1].connected, "Bob's end")
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    assert counts[-1][0] <= counts[1][0] + 2
    assert counts[-1][1] <= counts[1][1]


@pytest.mark.parametrize(
    ("address", "alone"),
    [
        ("127.0.0.1", True),
        ("[::1]", True),
        ("localhost", True),
        ("10.1.2.3", False),
        (socket.gethostname(), False),
    ],
)
def test_only_a_loopback_address_is_listened_on_alone(address: str, alone: bool) -> None:
    """A machine often resolves its own name to the loopback interface; others must reach it nevertheless."""
    try:
        sockets = listening_sockets(f"{address}:{free_port()}", None)
    except UsageError:
        if address == "[::1]":
            pytest.skip("no IPv6 here")
        raise
    places = {sock.getsockname()[0] for sock in sockets}
    for sock in sockets:
        sock.close()
    assert places <= ({"127.0.0.1", "::1"} if alone else {"0.0.0.0", "::"})
    assert places


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_has_no_part_in_ports_and_connections(
    make: Make, roster: Roster, pair: tuple[Node, Node]
) -> None:
    """Workers of a DataLoader outlive a peer."""
    alice, bob = pair
    with forked([member.host_and_port[1] for member in roster.members]) as sockets:
        assert sockets == 0
        assert bob.transport.send(0, b"still here")
        alice.poll_until(lambda: alice.messages(1) == [b"still here"], "a message")
        alice.transport.close()
        make(roster, 0).until_connected(1)


def test_a_connection_that_is_accepted_at_the_very_end_is_closed() -> None:
    """Its task is cancelled before it runs at all."""

    async def accept_one() -> bytes:
        core: Any = SimpleNamespace(
            loop=asyncio.get_running_loop(),
            pending=Counter(),
            limits=SimpleNamespace(pending=9, pending_per_address=9),
        )

        def spawn(work: Any) -> asyncio.Task[None]:
            task = core.loop.create_task(work)
            task.cancel()
            return task

        core.spawn = spawn
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setblocking(False)
            accepting = asyncio.create_task(Listener(core, None).accept(listening))  # type: ignore[arg-type]
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            found = await asyncio.wait_for(reader.read(1), 10.0)
            writer.close()
            accepting.cancel()
        return found

    assert asyncio.run(accept_one()) == b""
