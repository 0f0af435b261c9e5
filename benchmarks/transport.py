"""The transport: a large message between four peers, against TLS alone, and beside training.

Each peer is a process that sends 100 MB to every other and waits for theirs, some times over. TLS alone is
measured before and after, on one connection between two processes: on a machine with two cores it keeps both
busy, so twelve messages cannot take less time than it needs for their bytes. Memory is the most that was
resident during the exchanges beyond what was before, in multiples of the message; a peer keeps its own message
and, until it has all of them, those of the three others.

Beside training: the same work once in a thread of the peer's process and once in a process of its own. What the
first takes longer than the second is what the interpreter lock costs; the rest is the processor's time.
"""

from __future__ import annotations

import argparse
import json
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import table

PEERS = 4
FIRST_PORT = 27420
MESSAGE_BYTES = 100 << 20
ROUNDS = 3
RAW_BYTES = 400 << 20
SMALL_BYTES = 8 << 20
BUSY = ("nothing", "torch, a process", "torch, a thread", "Python, a process", "Python, a thread")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--part", nargs=4, metavar=("KIND", "FOLDER", "ID", "BUSY"), help=argparse.SUPPRESS)
    part = parser.parse_args().part
    if part is not None:
        kind, folder, number, busy = part
        parts = {"peer": peer, "sender": raw_sender, "receiver": raw_receiver, "work": work_alone}
        parts[kind](Path(folder), int(number), busy)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder))


def measure(folder: Path) -> None:
    make_members(folder)
    moved = PEERS * (PEERS - 1) * MESSAGE_BYTES
    before = raw(folder)
    found = exchange(folder, "nothing", MESSAGE_BYTES)
    after = raw(folder)
    print(f"{PEERS} peers, each {MESSAGE_BYTES >> 20} MiB to the {PEERS - 1} others, {ROUNDS} exchanges:")
    rows = []
    for what, alone, ours in (
        ("seconds", before[0] + after[0], statistics.median(found["seconds"])),
        ("processor seconds, all processes", before[1] + after[1], sum(found["processor"]) / ROUNDS),
    ):
        least = alone / 2 * moved / RAW_BYTES
        rows.append([what, f"{ours:.2f}", f"{least:.2f}", f"{ours / least:.2f}"])
    print(table(["of an exchange", "measured", "TLS alone", "ratio"], rows))
    rates = ", ".join(
        f"{RAW_BYTES / 1e6 / seconds:.0f} MB/s {when}"
        for when, (seconds, _) in (("before", before), ("after", after))
    )
    print(f"TLS alone is {moved >> 20} MiB at the rate of one connection: {rates}")
    print(f"peak memory of a peer: {max(found['memory']) / MESSAGE_BYTES:.2f} messages")
    print(f"\nbeside work in the same process, {SMALL_BYTES >> 20} MiB messages:")
    rows = []
    for busy in BUSY:
        part = exchange(folder, busy, SMALL_BYTES)
        rows.append([busy, f"{statistics.median(part['seconds']):.2f}"])
    print(table(["work", "seconds per exchange"], rows))


def make_members(folder: Path) -> None:
    from jwins.net.roster import Member, Roster, write_roster

    members = [
        Member.new(number, f"peer{number}", f"127.0.0.1:{FIRST_PORT + number}", folder)
        for number in range(PEERS)
    ]
    write_roster(Roster(members=tuple(members)), folder / "roster.toml")


def start(kind: str, folder: Path, number: int, busy: str = "nothing") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.transport", "--part", kind, str(folder), str(number), busy]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, list[float]]:
    out, _ = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"a part of the benchmark failed with {process.returncode}")
    found: dict[str, list[float]] = json.loads(out)
    return found


# --- Peers ------------------------------------------------------------------------------------------------


def exchange(folder: Path, busy: str, size: int) -> dict[str, list[float]]:
    (folder / "size").write_text(str(size))
    processes = [start("peer", folder, number, busy) for number in range(PEERS)]
    found = [answer(process) for process in processes]
    return {
        "seconds": [max(times) for times in zip(*(part["seconds"] for part in found), strict=True)],
        "memory": [part["memory"][0] for part in found],
        "processor": [part["processor"][0] for part in found],
    }


def peer(folder: Path, number: int, busy: str) -> None:
    from jwins.net.limits import Limits
    from jwins.net.roster import read_roster
    from jwins.net.transport import TlsTransport
    from jwins.net.transport_interface import Disconnected, MessageReceived
    from jwins.run.memory import peak_bytes

    roster = read_roster(folder / "roster.toml")
    limits = Limits(undelivered_bytes=2 * MESSAGE_BYTES)
    transport = TlsTransport(roster, number, folder / f"peer{number}.key", limits=limits)
    others = [other for other in range(PEERS) if other != number]
    message = bytes(range(256)) * (int((folder / "size").read_text()) >> 8)
    arrived: dict[int, list[bytes]] = {other: [] for other in others}
    ended: set[int] = set()

    def take() -> None:
        event = transport.poll(1.0)
        if isinstance(event, MessageReceived):
            arrived[event.peer].append(event.data)
        elif isinstance(event, Disconnected):
            ended.add(event.peer)

    transport.start()
    while not all(report.connected for report in transport.report().values()):
        take()
    stop = work_beside(folder, busy)
    seconds = []
    for other in others:  # an exchange of nothing, so that all begin together
        transport.send(other, b"")
    while not all(arrived.values()):
        take()
    before, processor = peak_bytes(), time.process_time()
    for _ in range(ROUNDS):
        for queue in arrived.values():
            queue.pop(0)
        begun = time.perf_counter()
        for other in others:
            transport.send(other, message)
        while not all(arrived.values()):
            take()
        seconds.append(time.perf_counter() - begun)
    processor = time.process_time() - processor
    assert all(queue[0] == message for queue in arrived.values())
    memory = peak_bytes() - before + len(message)  # its own message was there before
    stop()
    for other in others:
        transport.send(other, b"done")
    while not all(queue[-1] == b"done" for queue in arrived.values()):
        take()
    transport.close()
    print(json.dumps({"seconds": seconds, "memory": [memory], "processor": [processor]}))


def work_beside(folder: Path, busy: str) -> Callable[[], None]:
    """Begin what a training does meanwhile; the returned function ends it."""
    kind, _, place = busy.partition(", a ")
    if place == "process":
        process = start("work", folder, 0, kind)
        assert process.stdout is not None
        process.stdout.readline()
        return process.kill
    stop, begun = threading.Event(), threading.Event()
    if place == "thread":
        threading.Thread(target=work, args=(kind, stop, begun.set), daemon=True).start()
        begun.wait()
    return stop.set


def work_alone(folder: Path, number: int, busy: str) -> None:
    work(busy, threading.Event(), lambda: print("begun", flush=True))


def work(kind: str, stop: threading.Event, begun: Callable[[], object]) -> None:
    """Small operations of torch, or Python alone."""
    if kind == "Python":
        begun()
        count = 0
        while not stop.is_set():
            count += 1
        return
    import torch

    torch.set_num_threads(1)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.01)
    begun()
    while not stop.is_set():
        optimizer.zero_grad()
        layers(torch.zeros(32, 64)).square().mean().backward()
        optimizer.step()


# --- TLS alone --------------------------------------------------------------------------------------------


def raw(folder: Path) -> tuple[float, float]:
    """Seconds, and processor seconds of both, that one connection between two processes takes."""
    (folder / "port").unlink(missing_ok=True)
    receiver, sender = start("receiver", folder, 1), start("sender", folder, 0)
    sent, received = answer(sender), answer(receiver)
    return received["seconds"][0], sent["processor"][0] + received["processor"][0]


def raw_context(folder: Path, number: int, side: int) -> ssl.SSLContext:
    from jwins.net.roster import read_roster
    from jwins.net.tls import Contexts

    roster = read_roster(folder / "roster.toml")
    contexts = Contexts.of(roster, roster[number], folder / f"peer{number}.key")
    return contexts.server if side == ssl.PROTOCOL_TLS_SERVER else contexts.client


def raw_receiver(folder: Path, number: int, busy: str) -> None:
    context = raw_context(folder, number, ssl.PROTOCOL_TLS_SERVER)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        (folder / "port.new").write_text(str(listening.getsockname()[1]))
        (folder / "port.new").rename(folder / "port")
        plain, _ = listening.accept()
    with context.wrap_socket(plain, server_side=True) as tls:
        buffer, got = bytearray(1 << 18), 0
        tls.recv_into(buffer, 1)
        begun, processor = time.perf_counter(), time.process_time()
        while got < RAW_BYTES:
            got += tls.recv_into(buffer)
        found = {"seconds": [time.perf_counter() - begun], "processor": [time.process_time() - processor]}
        print(json.dumps(found))


def raw_sender(folder: Path, number: int, busy: str) -> None:
    context = raw_context(folder, number, ssl.PROTOCOL_TLS_CLIENT)
    while not (folder / "port").exists():
        time.sleep(0.01)
    with (
        socket.create_connection(("127.0.0.1", int((folder / "port").read_text()))) as plain,
        context.wrap_socket(plain) as tls,
    ):
        tls.sendall(b"x")
        chunk, processor = bytes(1 << 20), time.process_time()
        for _ in range(RAW_BYTES >> 20):
            tls.sendall(chunk)
    print(json.dumps({"processor": [time.process_time() - processor]}))


if __name__ == "__main__":
    main()
