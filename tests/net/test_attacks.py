"""Hostile bytes from outside and from inside the roster; honest members go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attackers import BINARY, PING, UPGRADE, Attacker, client_context, files_of, forge
from members import Node, free_port, roster_of

from jwins.net.limits import CHUNK_BYTES, Limits
from jwins.net.roster import Member, Roster
from jwins.net.transport_interface import Connected, Disconnected
from jwins.run.memory import peak_bytes

MORE_THAN_NORMAL_BYTES = 128 << 20

ALICE, BOB, CAROL = 0, 1, 2

QUICK = Limits(connections_per_s=1000.0, retry_s=0.05)


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Scene:
    """Alice is attacked, Bob is honest, and the attacker has Carol's key."""

    def __init__(self, folder: Path, limits: Limits, roster: Roster | None = None) -> None:
        self.folder = folder
        self.roster = roster or roster_of(folder, 3)
        self.limits = limits
        self.alice = Node(self.roster, ALICE, folder, limits=limits, dial=(BOB,)).started()
        self.bob = self._bob()
        self.alice.until_connected(BOB)
        self.bob.until_connected(ALICE)
        self.opened = self.alice.transport.report()[BOB].connections
        self.carol = files_of(self.roster, folder, CAROL)
        reset_peak()
        self.exchanges = 0
        self.normal_bytes = peak_bytes() if Path("/proc/self/clear_refs").exists() else None

    def _bob(self) -> Node:
        return Node(self.roster, BOB, self.folder, limits=self.limits, dial=(ALICE,)).started()

    @property
    def port(self) -> int:
        return self.alice.transport.port

    def attacker(self, files: tuple[Path, Path] | None = None) -> Attacker:
        return Attacker(self.port, self.carol if files is None else files)

    def insider(self) -> Attacker:
        """Authenticated as Carol."""
        return self.attacker().joined(CAROL, ALICE)

    def counted(self, text: str) -> int:
        """Return how often Alice refused Carol, or a stranger, for a reason with this text."""
        known = self.alice.transport.report()[CAROL].refused
        return sum(
            count
            for counts in (known, self.alice.transport.strangers())
            for reason, count in counts.items()
            if text in reason
        )

    def until_counted(self, text: str, count: int = 1) -> None:
        self.alice.poll_until(lambda: self.counted(text) >= count, f"{text!r} to be counted")

    def check_honest(self) -> None:
        """Bob's connection is the one from before, works both ways, and he can come back on another."""
        assert self.alice.transport.report()[BOB].connections == self.opened
        assert self.bob.transport.report()[ALICE].connected
        self.exchange("still here")
        if self.normal_bytes is not None:
            assert peak_bytes() - self.normal_bytes < MORE_THAN_NORMAL_BYTES
        self.bob.transport.close()
        self.bob = self._bob()
        self.bob.until_connected(ALICE)
        self.exchange("back again")

    def exchange(self, text: str) -> None:
        self.exchanges += 1
        data = f"{text} {self.exchanges}".encode()
        assert self.alice.transport.send(BOB, data)
        assert self.bob.transport.send(ALICE, data)
        self.bob.poll_until(lambda: self.bob.messages(ALICE)[-1:] == [data], "a message of Alice")
        self.alice.poll_until(lambda: self.alice.messages(BOB)[-1:] == [data], "a message of Bob")

    def close(self) -> None:
        self.alice.transport.close(0.5)
        self.bob.transport.close(0.5)


@contextlib.contextmanager
def scene_of(folder: Path, limits: Limits = QUICK, roster: Roster | None = None) -> Iterator[Scene]:
    scene = Scene(folder, limits, roster)
    try:
        yield scene
    finally:
        scene.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with scene_of(tmp_path) as scene:
        yield scene


def nothing_of_carol(scene: Scene) -> bool:
    return not any(event.peer == CAROL for event in scene.alice.events)


def refused_tls(scene: Scene, files: tuple[Path, Path] | None) -> str:
    """In TLS 1.3 the client learns only from its first read that its certificate was refused."""
    try:
        with Attacker(scene.port, files) as attacker:
            attacker.upgrade()
    except ssl.SSLError as error:
        return str(error.reason)
    except ConnectionError:
        return "closed"
    raise AssertionError("the handshake went through")


# --- Who is it? -------------------------------------------------------------------------------------------


def test_no_certificate(scene: Scene) -> None:
    refused_tls(scene, None)
    scene.until_counted("no certificate")
    scene.check_honest()


def test_a_strangers_certificate(scene: Scene) -> None:
    stranger = forge(scene.folder, "carol", "stranger")[:2]
    refused_tls(scene, stranger)
    scene.until_counted("not in the roster")
    assert nothing_of_carol(scene)
    scene.check_honest()


@pytest.mark.parametrize(
    ("begins", "ends", "reason"), [(-20, -1, "has expired"), (1, 20, "not valid yet")], ids=["expired", "early"]
)
def test_a_certificate_out_of_its_time(tmp_path: Path, begins: int, ends: int, reason: str) -> None:
    from attackers import DAY

    certificate_file, key_file, seen = forge(tmp_path, "carol", "carol", begins=begins * DAY, ends=ends * DAY)
    carol = Member(
        id=CAROL,
        name="carol",
        address=f"127.0.0.1:{free_port()}",
        fingerprint=seen.fingerprint,
        certificate=seen.pem,
    )
    roster = Roster(members=(*roster_of(tmp_path, 2).members, carol))
    with scene_of(tmp_path, roster=roster) as scene:
        refused_tls(scene, (certificate_file, key_file))
        scene.until_counted(reason)
        assert nothing_of_carol(scene)
        scene.check_honest()


def test_the_right_certificate_with_anothers_id(scene: Scene) -> None:
    with scene.attacker() as attacker:
        attacker.upgrade()
        attacker.hello(BOB, ALICE)
        assert "certificate differs from the one" in attacker.reason()
    scene.until_counted("certificate differs from the one")
    assert [e for e in scene.alice.events if isinstance(e, Connected)] in ([], [Connected(BOB)])
    scene.check_honest()


@pytest.mark.parametrize("claimed", [7, ALICE], ids=["unknown", "the victim's own"])
def test_an_id_of_no_other_member(scene: Scene, claimed: int) -> None:
    with scene.attacker() as attacker:
        attacker.upgrade()
        attacker.hello(claimed, ALICE)
        assert "no other member" in attacker.reason()
    scene.check_honest()


def authority(folder: Path) -> Member:
    """Carol, whose certificate says that she may sign others'."""
    _, _, seen = forge(folder, "carol", "carol", ca=True)
    return Member(
        id=CAROL,
        name="carol",
        address=f"127.0.0.1:{free_port()}",
        fingerprint=seen.fingerprint,
        certificate=seen.pem,
    )


def test_a_certificate_for_bob_signed_by_carol(tmp_path: Path) -> None:
    """TLS accepts it, as it chains to a trust anchor: only the fingerprint tells it from Bob's."""
    roster = Roster(members=(*roster_of(tmp_path, 2).members, authority(tmp_path)))
    with scene_of(tmp_path, roster=roster) as scene:
        false_bob = forge(tmp_path, "bob", "false_bob", signed_by=scene.carol)[:2]
        for claimed in (BOB, CAROL):
            with Attacker(scene.port, false_bob) as attacker:
                attacker.upgrade()
                attacker.hello(claimed, ALICE)
                assert "certificate differs from the one" in attacker.reason()
        assert nothing_of_carol(scene)
        scene.check_honest()


def test_bobs_address_is_answered_with_a_certificate_signed_by_carol(tmp_path: Path) -> None:
    roster = Roster(members=(*roster_of(tmp_path, 2).members, authority(tmp_path)))
    false_bob = forge(tmp_path, "bob", "false_bob", signed_by=files_of(roster, tmp_path, CAROL))[:2]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*false_bob)
    said: list[bytes] = []

    def answer(listening: socket.socket) -> None:
        sock, _ = listening.accept()
        with context.wrap_socket(sock, server_side=True) as tls, contextlib.suppress(OSError):
            said.append(tls.recv(1))

    with socket.create_server(roster[BOB].host_and_port) as listening:
        impostor = threading.Thread(target=answer, args=(listening,))
        impostor.start()
        alice = Node(roster, ALICE, tmp_path, dial=(BOB,)).started()
        try:
            alice.poll_until(
                lambda: "is not bob's" in alice.transport.report()[BOB].last_error,
                "the impostor to be found out",
            )
        finally:
            impostor.join(10)
            alice.transport.close()
    assert said in ([], [b""]), "not a byte is said to an impostor"
    assert not alice.events


def test_tls_1_2(scene: Scene) -> None:
    context = client_context(scene.carol)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Attacker(scene.port, None, context)
    scene.until_counted("does not speak TLS 1.3")
    scene.check_honest()


@pytest.mark.parametrize("first", [UPGRADE.format(more="").encode(), b"\x00" * 600], ids=["upgrade", "zeros"])
def test_plaintext(scene: Scene, first: bytes) -> None:
    with socket.create_connection(("127.0.0.1", scene.port), timeout=10) as sock:
        sock.sendall(first)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := sock.recv(4096):
                answer += data
    assert b"HTTP" not in answer
    scene.until_counted("it does not speak TLS")
    scene.check_honest()


def test_what_was_recorded_of_bob_and_is_replayed(tmp_path: Path) -> None:
    """Between Bob and Alice sits someone who copies what passes and says it again later."""
    roster = roster_of(tmp_path, 3)
    behind = free_port()
    bobs_view = Roster(
        members=tuple(
            m.model_copy(update={"address": f"127.0.0.1:{behind}"}) if m.id == ALICE else m
            for m in roster.members
        )
    )
    recorded: list[bytes] = []
    pumps: list[threading.Thread] = []

    def pump(source: socket.socket, sink: socket.socket, copy: list[bytes] | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if copy is not None:
                    copy.append(data)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def relay(listening: socket.socket, port: int) -> None:
        with listening.accept()[0] as near, socket.create_connection(("127.0.0.1", port)) as far:
            back = threading.Thread(target=pump, args=(far, near, None))
            back.start()
            pump(near, far, recorded)
            back.join()

    alice = Node(roster, ALICE, tmp_path, dial=(), limits=QUICK).started()
    with socket.create_server(("127.0.0.1", behind)) as listening:
        pumps.append(threading.Thread(target=relay, args=(listening, alice.transport.port)))
        pumps[0].start()
        bob = Node(bobs_view, BOB, tmp_path, dial=(ALICE,)).started()
        try:
            bob.until_connected(ALICE)
            assert bob.transport.send(ALICE, b"the one and only")
            alice.poll_until(lambda: alice.messages(BOB) == [b"the one and only"], "Bob's message")
            bob.transport.close()
            alice.poll_until(lambda: any(isinstance(e, Disconnected) for e in alice.events), "Bob's end")
            pumps[0].join(10)
            assert sum(map(len, recorded)) > 500
            address = ("127.0.0.1", alice.transport.port)
            with contextlib.suppress(OSError), socket.create_connection(address, timeout=10) as sock:
                sock.sendall(b"".join(recorded))
                while sock.recv(65536):
                    pass
            before = len(alice.events)
            alice.poll_until(lambda: sum(alice.transport.strangers().values()) >= 1, "the replay to be refused")
            assert alice.events[before:] == []
            assert alice.messages(BOB) == [b"the one and only"]
        finally:
            bob.transport.close()
            alice.transport.close()


# --- What does it say? ------------------------------------------------------------------------------------


def test_a_frame_that_claims_two_gigabytes(scene: Scene) -> None:
    with scene.insider() as carol:
        carol.frame(BINARY, b"x" * 100, claimed=2 << 30)
        assert "exceeds limit" in carol.reason()
    scene.until_counted("too long")
    scene.check_honest()


@pytest.mark.parametrize("size", [QUICK.message_bytes + 1, 2 << 30, 2**62])
def test_a_message_that_is_announced_too_long(scene: Scene, size: int) -> None:
    with scene.insider() as carol:
        carol.begin(size)
        assert "longer than" in carol.reason()
    scene.until_counted("longer than")
    scene.check_honest()


def test_a_decompression_bomb(scene: Scene) -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = bytes(1 << 20)
    bomb = b"".join(deflate.compress(block) for _ in range(200)) + deflate.flush()
    assert len(bomb) < CHUNK_BYTES
    with scene.attacker() as carol:
        head = carol.upgrade("Sec-WebSocket-Extensions: permessage-deflate\r\n")
        assert "101" in head
        assert "extensions" not in head.lower()
        carol.hello(CAROL, ALICE)
        carol.begin(100 << 20)
        carol.frame(BINARY | 0x40, bomb)
        carol.reason()
    scene.alice.poll_until(lambda: not scene.alice.transport.report()[CAROL].connected, "Carol to be cut")
    assert scene.alice.messages(CAROL) == []
    scene.check_honest()


@pytest.mark.parametrize(
    ("first", "data"),
    [
        pytest.param(PING, b"", id="a ping of the library"),
        pytest.param(0x8A, b"", id="a pong of the library"),
        pytest.param(0x02, b"part", id="a fragment"),
        pytest.param(0x80, b"part", id="a continuation"),
        pytest.param(0x83, b"", id="an unknown opcode"),
        pytest.param(0xC1, b"{}", id="a reserved bit"),
        pytest.param(BINARY, b"data", id="a piece without a message"),
        pytest.param(BINARY, b"", id="an empty piece"),
        pytest.param(0x81, b'{"type":"begin","size":-1}', id="a negative length"),
        pytest.param(0x81, b'{"type":"begin","size":1e400}', id="an infinite length"),
        pytest.param(0x81, b'{"type":"go"}', id="Go out of place"),
        pytest.param(0x81, b'{"type":"sunk","size":1}', id="Sunk out of place"),
        pytest.param(0x81, b'{"type":"other"}', id="an unknown kind"),
        pytest.param(0x81, b"\xff\xfe", id="not UTF-8"),
        pytest.param(0x81, b"[" * 10000, id="deep JSON"),
        pytest.param(0x81, b" " * 20000, id="a long control message"),
    ],
)
def test_what_has_no_place_in_the_protocol(scene: Scene, first: int, data: bytes) -> None:
    with scene.insider() as carol:
        carol.frame(first, data)
        carol.reason()
    scene.alice.poll_until(
        lambda: any(isinstance(e, Disconnected) and e.peer == CAROL for e in scene.alice.events),
        "Carol to be cut",
    )
    assert sum(scene.alice.transport.report()[CAROL].refused.values()) == 1
    assert scene.alice.messages(CAROL) == []
    scene.check_honest()


def test_reasons_do_not_pile_up(scene: Scene) -> None:
    """Names of counters come from this package; no attacker can choose a part of them."""
    for number in range(100, 120):
        with scene.attacker() as carol:
            carol.upgrade()
            carol.hello(CAROL, number)
            carol.reason()
        with scene.attacker() as carol:
            carol.upgrade()
            carol.hello(CAROL, ALICE, version=number)
            carol.reason()
        with scene.insider() as carol:
            carol.text(f'{{"type":"kind {number}"}}')
            carol.reason()
    scene.until_counted("not a control message", 20)
    assert len(scene.alice.transport.report()[CAROL].refused) == 1
    assert len(scene.alice.transport.strangers()) == 2
    scene.check_honest()


def test_two_messages_at_once(scene: Scene) -> None:
    with scene.insider() as carol:
        carol.begin(10)
        carol.begin(10)
        assert "before the last one ended" in carol.reason()
    scene.check_honest()


# --- How much is it? --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_connections_at_once(scene: Scene) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2500:
        if hard < 2500:
            pytest.skip(f"needs 2500 open files, {hard} are allowed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (2500, hard))
    attackers: list[socket.socket] = []
    try:
        for _ in range(1000):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", scene.port))
            attackers.append(sock)
        scene.until_counted("too many connections at once", 1000 - 64)
        scene.exchange("in the middle of it")
        scene.until_counted("not authenticated in time")
        scene.check_honest()
    finally:
        for sock in attackers:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_a_thousand_handshakes_at_once_with_a_members_key(scene: Scene) -> None:
    """Connections that are authenticated replace each other, or are refused."""
    context = client_context(scene.carol)

    def rush() -> None:
        for _ in range(125):
            with (
                contextlib.suppress(OSError, AssertionError),
                Attacker(scene.port, None, context) as carol,
            ):
                carol.joined(CAROL, ALICE)

    threads = [threading.Thread(target=rush) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        scene.exchange("meanwhile")
    scene.check_honest()


@pytest.mark.slow
def test_handshakes_that_never_end(tmp_path: Path) -> None:
    """One says a byte of its TLS greeting now and then, one ends TLS and says nothing, one half a request."""
    with scene_of(tmp_path, Limits(handshake_s=2.0, connections_per_s=1000.0)) as scene:
        stopped = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", scene.port)) as sock:
                sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
                while not stopped.wait(0.2):
                    sock.sendall(b"\x00")

        drips = [threading.Thread(target=drip) for _ in range(4)]
        for thread in drips:
            thread.start()
        with scene.attacker() as silent, scene.attacker() as half, scene.attacker() as late:
            half.sock.sendall(b"GET /jwins HTTP/1.1\r\nHost: ")
            late.upgrade()
            scene.until_counted("not authenticated in time", 7)
            for attacker in (silent, half, late):
                assert attacker.reason() in ("closed", "")
        stopped.set()
        for thread in drips:
            thread.join()
        scene.check_honest()


@pytest.mark.slow
def test_a_peer_that_stops_reading(tmp_path: Path) -> None:
    limits = Limits(queue_bytes=8 << 20, heartbeat_s=0.5, dead_s=3.0, connections_per_s=1000.0)
    with scene_of(tmp_path, limits) as scene, scene.insider() as carol:
        scene.alice.until_connected(CAROL)
        carol.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        data = bytes(1 << 20)
        sent = 0
        while scene.alice.transport.send(CAROL, data):
            sent += 1
            assert sent < 200, "the queue has no end"
        scene.exchange("meanwhile")
        assert scene.alice.transport.report()[CAROL].refused["send queue full"] == 1

        def cut() -> bool:
            with contextlib.suppress(OSError):
                carol.text('{"type":"ping","token":1}')  # it still talks
            return any(isinstance(e, Disconnected) and e.peer == CAROL for e in scene.alice.events)

        scene.alice.poll_until(cut, "Carol to be cut")
        assert "has read nothing" in next(
            e.reason for e in scene.alice.events if isinstance(e, Disconnected) and e.peer == CAROL
        )
        scene.check_honest()


def stuck(send: Callable[[], None], times: int) -> bool:
    """Return whether the victim stops reading before this number of calls."""
    try:
        for _ in range(times):
            send()
    except TimeoutError:
        return True
    return False


@pytest.mark.slow
def test_what_is_not_taken_is_not_read(tmp_path: Path) -> None:
    """Alice is busy: of Carol's flood no more is kept than the limit, one message and what one read brings."""
    limits = Limits(undelivered_bytes=4 << 20, connections_per_s=1000.0, messages_per_s=1e6)
    with scene_of(tmp_path, limits) as scene, scene.insider() as carol:
        scene.alice.until_connected(CAROL)
        carol.sock.settimeout(2.0)
        assert stuck(lambda: carol.message(bytes(1 << 20)), 200)
        report = scene.alice.transport.report()[CAROL]
        assert report.bytes_in <= (4 << 20) + 2 * (1 << 20)
        assert report.connected
        taken = report.bytes_in
        scene.alice.poll_until(
            lambda: scene.alice.transport.report()[CAROL].bytes_in > taken, "reading to go on after polling"
        )
        scene.check_honest()


def test_who_floods_waits_behind_itself_and_keeps_nobody_else_waiting(scene: Scene) -> None:
    """Alice is busy while Carol's messages pile up; Bob's, which comes last, is taken after one of Carol's."""
    with scene.insider() as carol:
        scene.alice.until_connected(CAROL)
        for number in range(500):
            carol.message(b"%d" % number)
        while scene.alice.transport.report()[CAROL].bytes_in < sum(len(b"%d" % n) for n in range(500)):
            time.sleep(0.01)
        assert scene.bob.transport.send(ALICE, b"word")
        while scene.alice.transport.report()[BOB].bytes_in < len(b"word"):
            time.sleep(0.01)
        scene.alice.poll_until(lambda: bool(scene.alice.messages(BOB)), "Bob's word")
        assert scene.alice.messages(BOB) == [b"word"]
        assert len(scene.alice.messages(CAROL)) <= 2
        scene.alice.poll_until(lambda: len(scene.alice.messages(CAROL)) == 500, "the rest")
        assert scene.alice.messages(CAROL) == [b"%d" % number for number in range(500)]
    scene.check_honest()


@pytest.mark.slow
def test_a_flood_of_empty_messages(tmp_path: Path) -> None:
    """The memory of a message beyond its bytes counts, too."""
    limits = Limits(
        undelivered_bytes=1 << 20, undelivered_messages=10**6, connections_per_s=1000.0, messages_per_s=1e6
    )
    with scene_of(tmp_path, limits) as scene, scene.insider() as carol:
        scene.alice.until_connected(CAROL)
        carol.sock.settimeout(2.0)
        begin = b'{"type":"begin","size":0}'
        batch = (bytes([0x81, 0x80 | len(begin)]) + bytes(4) + begin) * 1000
        assert stuck(lambda: carol.sock.sendall(batch), 1000)
        carol.sock.close()
        kept = (1 << 20) // 256
        most = kept + (1 << 17) // 31  # and what one read brings
        scene.alice.poll_until(lambda: len(scene.alice.messages(CAROL)) > kept, "the first messages")
        assert most < 10_000, "a million were sent"
        scene.check_honest()


def test_no_more_messages_wait_than_the_limit(tmp_path: Path) -> None:
    """Alice is busy: Carol's small messages wait on Carol's side, and all arrive in the end."""
    limits = Limits(undelivered_messages=20, connections_per_s=1000.0, messages_per_s=1e6)
    with scene_of(tmp_path, limits) as scene, scene.insider() as carol:
        scene.alice.until_connected(CAROL)
        for number in range(500):
            carol.message(b"%03d" % number)
        while scene.alice.transport.report()[CAROL].bytes_in < 3 * 20:
            time.sleep(0.01)
        assert scene.bob.transport.send(ALICE, b"word")
        while scene.alice.transport.report()[BOB].bytes_in < len(b"word"):
            time.sleep(0.01)
        assert scene.alice.transport.report()[CAROL].bytes_in == 3 * 20
        scene.alice.poll_until(lambda: len(scene.alice.messages(CAROL)) == 500, "the rest")
        assert scene.alice.messages(CAROL) == [b"%03d" % number for number in range(500)]
        scene.check_honest()


@pytest.mark.slow
def test_the_rate_limit(tmp_path: Path) -> None:
    """The rate is an upper limit: what is beyond twice of it, which may come at once, takes its time."""
    rate = 60.0
    with scene_of(tmp_path, Limits(messages_per_s=rate, connections_per_s=1000.0)) as scene:
        with scene.insider() as carol:
            begun = time.monotonic()
            for number in range(150):  # 300 pieces
                carol.message(b"%d" % number)
            scene.alice.poll_until(lambda: len(scene.alice.messages(CAROL)) == 150, "all messages")
            assert time.monotonic() - begun >= (300 - 2 * rate - 2) / rate
            assert scene.alice.messages(CAROL) == [b"%d" % number for number in range(150)]
        scene.check_honest()


@pytest.mark.slow
def test_the_limit_of_bytes(tmp_path: Path) -> None:
    with scene_of(tmp_path, Limits(bytes_per_s=2 << 20, connections_per_s=1000.0)) as scene:
        with scene.insider() as carol:
            begun = time.monotonic()
            for _ in range(6):
                carol.message(bytes(1 << 20))
            scene.alice.poll_until(lambda: len(scene.alice.messages(CAROL)) == 6, "all messages")
            assert time.monotonic() - begun >= (6 - 2 - 1) / 2
        scene.check_honest()


def test_who_connects_too_often_is_refused(tmp_path: Path) -> None:
    with scene_of(tmp_path, Limits(connections_per_s=0.1)) as scene:
        reasons = []
        for _ in range(15):
            with scene.attacker() as carol:
                carol.upgrade()
                carol.hello(CAROL, ALICE)
                if b'"hello"' not in carol.read()[1]:
                    reasons.append("refused")
        assert len(reasons) >= 4
        scene.until_counted("too often", 4)
        scene.check_honest()


@pytest.mark.slow
def test_random_bytes_of_a_member(scene: Scene) -> None:
    """Whatever an authenticated member says, it is cut or ignored, and nothing else happens."""
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(7))
    for number in range(300):
        size = int(generator.integers(1, 400))
        noise = generator.bytes(size)
        with contextlib.suppress(OSError), scene.insider() as carol:
            if number % 3 == 0:
                carol.sock.sendall(noise)
            elif number % 3 == 1:
                carol.frame(0x81, noise)
            else:
                carol.frame(int(generator.integers(0, 256)), noise)
            carol.sock.settimeout(0.05)
            carol.reason()
        scene.alice.poll_until(lambda: True, "nothing")
    assert scene.alice.messages(CAROL) == []
    scene.check_honest()


def test_a_measurement_is_limited_too(scene: Scene) -> None:
    with scene.attacker() as carol:
        carol.upgrade()
        carol.hello(CAROL, ALICE, probe=True)
        carol.read()
        with scene.attacker() as second:
            second.upgrade()
            second.hello(CAROL, ALICE, probe=True)
            assert "runs a measurement already" in second.reason()
        carol.begin(65 << 20)
        assert carol.reason() in ("closed", "")
    assert nothing_of_carol(scene)
    scene.check_honest()


def test_measurements_too_often_are_refused(tmp_path: Path) -> None:
    with scene_of(tmp_path, Limits(connections_per_s=1000.0)) as scene:
        answers = []
        for _ in range(8):
            with scene.attacker() as carol:
                carol.upgrade()
                carol.hello(CAROL, ALICE, probe=True)
                answers.append(b'"hello"' in carol.read()[1])
        assert answers.count(True) <= 6
        scene.until_counted("measures too often", 1)
        scene.check_honest()


# --- What does a node that runs make of it? ---------------------------------------------------------------


@pytest.mark.slow
def test_fuzzed_frames_of_a_member_cost_a_running_node_nothing_that_lasts() -> None:
    """The benchmark, which sends a million, with few; its exit code says whether the victim kept all it had."""
    few = ["--frames", "300", "--limited-frames", "400", "--calm-s", "1"]
    command = [sys.executable, "-m", "benchmarks.attacks", *few]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missed" not in done.stdout
