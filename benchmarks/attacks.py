"""A flood of fuzzed frames from a member of the roster, against a node that runs: what does it cost the others?

Three members: the victim and an honest neighbour run an experiment on digits as processes over loopback; the
attacker has the third's key. It is authenticated, says Hello as an honest node would, and then sends frames
that were damaged, with length and checksum corrected, so that what is behind the header is reached. Once the
victim's limit of messages is lifted, and once it is as always. The exit
code is 0 if both go on with their rounds, the honest connection and the victim's memory (within 128 MiB) are as
before, and the limit held.

    python -m benchmarks.attacks [--frames 1000000] [--limited-frames 40000] [--calm-s 15]
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz_codec import HEADER_BYTES, damaged, reframed, updates
from benchmarks.report import table, verdict
from jwins.net.handshake import BOOTSTRAPPED
from jwins.net.limits import Limits
from jwins.net.transport import TlsTransport
from jwins.net.transport_interface import Connected
from jwins.wire import Frame, Hello, KeyframeRequest, Wire, codec
from jwins.wire.symbols import decode_symbols, encode_symbols

VICTIM, HONEST, ATTACKER = range(3)
NAMES = ("victim", "honest", "attacker")
FIRST_PORT = 27520
TIMEOUT_S = 0.5
MAX_BYTES = 3000
"""Longer frames are left out of what is damaged: a million must pass in minutes."""
MORE_THAN_NORMAL_BYTES = 128 << 20
ROUND_AT = 12  # docs/reference/wire.md
QUEUED = 2000


def experiment(folder: Path) -> Any:
    import jwins

    return jwins.load("digits").changed(
        {
            "nodes": {"count": 3},
            "topology": {"kind": "fully_connected"},
            "train": {"batching": "loop"},
            "run": {"rounds": 1_000_000, "eval_every": 1_000_000, "threads": 1, "folder": folder / "run"},
        }
    )


def make_members(folder: Path) -> None:
    from jwins.net.roster import Member, Roster, write_roster

    members = [
        Member.new(number, name, f"127.0.0.1:{FIRST_PORT + number}", folder)
        for number, name in enumerate(NAMES)
    ]
    write_roster(Roster(members=tuple(members)), folder / "roster.toml")


# --- The victim and its neighbour -------------------------------------------------------------------------


def node(folder: Path, number: int, lifted: bool) -> None:
    """Run a node until standard input ends; answers each line of it with where it is."""
    from jwins.net.driver import RealTimeDriver
    from jwins.net.roster import read_roster
    from jwins.run.assembly import assemble
    from jwins.run.node import for_real_time

    components = for_real_time(assemble(experiment(folder), nodes=[number]))
    limits = Limits(messages_per_s=1e9) if lifted else Limits()
    roster = read_roster(folder / "roster.toml")
    greeting = components.experiment.digest()
    key = folder / f"{NAMES[number]}.key"
    transport = TlsTransport(roster, number, key, greeting=greeting, limits=limits)
    group = components.node_group()
    over = threading.Event()
    driver = RealTimeDriver(
        group, transport, start=components.start, names=NAMES, timeout_s=TIMEOUT_S, stop=over.is_set
    )

    def answer() -> None:
        for _ in sys.stdin:
            while ATTACKER not in (report := transport.report()):  # it has not started yet
                time.sleep(0.05)
            found = {
                "round": driver.round,
                "refused": driver.peers[ATTACKER].refused if number != ATTACKER else 0,
                "taken_bytes": report[ATTACKER].bytes_in,
                "connections": {NAMES[peer]: there.connections for peer, there in report.items()},
                "memory": {name: memory_bytes(name) for name in ("VmRSS", "VmHWM")},
            }
            print(json.dumps(found), flush=True)
        over.set()

    load_kernels()
    threading.Thread(target=answer, daemon=True).start()
    outcome = driver.run()
    print(json.dumps({"status": outcome.status, "round": outcome.round}), flush=True)


def load_kernels() -> None:
    """Load numba and the kernels that decode quantized symbols, which are no part of what an attack costs."""
    symbols = np.arange(200, dtype=np.int32) % 3
    decode_symbols(memoryview(encode_symbols(symbols, [200])), count=200, runs=[200])


def memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


class Process:
    """A node, and what it says of itself."""

    def __init__(self, folder: Path, number: int, lifted: bool) -> None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.attacks",
            "--node",
            str(folder),
            str(number),
            str(int(lifted)),
        ]
        root = Path(__file__).parents[1]
        with (folder / f"{NAMES[number]}.log").open("ab") as log:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=root
            )

    def ask(self) -> dict[str, Any]:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write("?\n")
        self._popen.stdin.flush()
        found: dict[str, Any] = json.loads(self._popen.stdout.readline())
        return found

    def until_round(self, round: int) -> dict[str, Any]:
        while (found := self.ask())["round"] < round:
            time.sleep(0.1)
        return found

    def end(self) -> str:
        """Return how its run ended."""
        out, _ = self._popen.communicate(timeout=60)
        return str(json.loads(out.splitlines()[-1])["status"])

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()


# --- The attacker -----------------------------------------------------------------------------------------


def inputs(dim: int, digest: bytes) -> list[bytes]:
    """Frames that an honest node could send."""
    messages: list[Any] = [
        *(
            Frame(ATTACKER, 0, update, keyframe=keyframe)
            for update in updates(dim, np.random.default_rng(1))
            for keyframe in (0, 1)
        ),
        Hello(ATTACKER, 0, dim, "pco", {"jwins": "0.1.0"}, BOOTSTRAPPED),
        KeyframeRequest(ATTACKER, 0),
    ]
    wire = Wire(codec("pco"), digest, dim)
    packed = [wire.pack(message).data for message in messages]
    return [data for data in packed if len(data) <= MAX_BYTES]


def fuzzed(some: list[bytes], round: int, rng: np.random.Generator) -> bytes:
    """One of them, damaged, of about the round that the victim is in."""
    data = bytearray(some[int(rng.integers(len(some)))])
    struct.pack_into("<I", data, ROUND_AT, max(0, round + int(rng.integers(-2, 66))))
    return reframed(damaged(bytes(data), some, 0 if rng.random() < 0.1 else HEADER_BYTES, rng))


@dataclass
class Found:
    """Result of a flood."""

    frames: int
    seconds: float
    rounds: int
    refused: int
    grown_bytes: int
    reconnected: int
    status: str


@contextmanager
def attacker(folder: Path, greeting: bytes) -> Iterator[TlsTransport]:
    from jwins.net.roster import read_roster

    roster = read_roster(folder / "roster.toml")
    transport = TlsTransport(roster, ATTACKER, folder / "attacker.key", greeting=greeting, dial=(VICTIM,))
    transport.start()
    try:
        while not isinstance(event := transport.poll(1.0), Connected) or event.peer != VICTIM:
            pass
        yield transport
    finally:
        transport.close(0.0)


def flood(folder: Path, frames: int, lifted: bool, dims: tuple[int, int], digest: bytes) -> Found:
    processes = [Process(folder, number, lifted) for number in (VICTIM, HONEST)]
    victim, honest = processes
    num_params, dim = dims
    some, rng = inputs(dim, digest), np.random.default_rng(7)
    try:
        for process in processes:
            process.until_round(3)  # the absent member is no longer waited for
        with attacker(folder, digest) as transport:
            hello = Hello(ATTACKER, 0, num_params, "pco", {}, BOOTSTRAPPED)
            transport.send(VICTIM, Wire(codec("pco"), digest, dim).pack(hello).data)
            before = victim.ask()
            begun = time.monotonic()
            sent_bytes = transport.report()[VICTIM].bytes_out
            for number in range(frames):
                if number % QUEUED == 0:
                    now = victim.ask()
                    while transport.report()[VICTIM].queued_bytes:
                        taken(transport)
                        time.sleep(0.005)
                data = fuzzed(some, now["round"], rng)
                sent_bytes += len(data)
                if not transport.send(VICTIM, data):
                    raise SystemExit(f"the attacker was cut after {number} frames")
            while (after := victim.ask())["taken_bytes"] < sent_bytes:
                taken(transport)
                time.sleep(0.05)
            seconds = time.monotonic() - begun
            for process in processes:
                process.until_round(after["round"] + 1)  # both go on
        connections = after["connections"]["honest"] + honest.ask()["connections"]["victim"]
        return Found(
            frames,
            seconds,
            after["round"] - before["round"],
            after["refused"] - before["refused"],
            after["memory"]["VmHWM"] - before["memory"]["VmHWM"],
            connections - 2,
            victim.end(),
        )
    finally:
        for process in processes:
            process.kill()


def taken(transport: TlsTransport) -> None:
    """Read what the victim says, so that it is not cut off for not reading."""
    while transport.poll(0.0) is not None:
        pass


def calm(folder: Path, seconds: float) -> float:
    """Rounds per second of the victim without an attack."""
    processes = [Process(folder, number, False) for number in (VICTIM, HONEST)]
    try:
        before = processes[0].until_round(3)["round"]  # the absent member is no longer waited for
        time.sleep(seconds)
        return float(processes[0].ask()["round"] - before) / seconds
    finally:
        for process in processes:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--frames", type=int, default=1_000_000, help="with the limit lifted")
    parser.add_argument("--limited-frames", type=int, default=40_000, help="with the limit as always")
    parser.add_argument("--calm-s", type=float, default=15.0, help="seconds without an attack, to compare with")
    parser.add_argument("--node", nargs=3, metavar=("FOLDER", "NUMBER", "LIFTED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.node is not None:
        folder, number, lifted = given.node
        node(Path(folder), int(number), lifted == "1")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), given.frames, given.limited_frames, given.calm_s)


def measure(folder: Path, frames: int, limited_frames: int, calm_s: float) -> int:
    from jwins.run.assembly import assemble
    from jwins.run.node import for_real_time

    make_members(folder)
    components = for_real_time(assemble(experiment(folder), nodes=[ATTACKER]))
    dims, digest = (components.trainer.layout.size, components.rules.wire.dim), components.rules.wire.digest
    print(f"without an attack: {calm(folder, calm_s):.2f} rounds per second", flush=True)
    rows, passed = [], True
    for what, count, lifted in (("limit lifted", frames, True), ("limit as always", limited_frames, False)):
        found = flood(folder, count, lifted, dims, digest)
        passed &= found.grown_bytes <= MORE_THAN_NORMAL_BYTES
        passed &= found.reconnected == 0 and found.status == "interrupted"
        rows.append(
            [
                what,
                f"{found.frames:,}",
                f"{found.frames / found.seconds:,.0f}",
                f"{found.refused:,}",
                f"{found.rounds / found.seconds:.2f}",
                f"{found.grown_bytes / 1e6:.1f} MB",
                found.reconnected,
                found.status,
            ]
        )
        print(
            f"{what}: {found.seconds:.0f} s; "
            f"memory {verdict(found.grown_bytes, at_most=MORE_THAN_NORMAL_BYTES)}",
            flush=True,
        )
        if not lifted:
            allowed = Limits().messages_per_s / 2  # a frame is announced and then sent
            burst = 2 * Limits().messages_per_s / 2 / found.seconds
            rate = found.frames / found.seconds
            passed &= rate <= allowed + burst
            print(f"{what}: frames per second {verdict(rate, at_most=round(allowed + burst, 1))}")
    columns = ["", "frames", "per second", "refused", "rounds per second", "peak grew", "reconnected", "then"]
    print(table(columns, rows))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
