"""Peers in loops of one's own over real TLS: restarts, other settings, waits and hostile members.

    python -m benchmarks.peers [--only restart,scratch,settings,wait,hostile,launch] [--times 20] [--seconds 20]
    python -m benchmarks.peers --only memory [--millions 1,11] [--members 2] [--checkpoints]

``restart``, ``scratch`` and ``settings`` are tried ``--times`` times, each with other times in between.
``wait`` is CPU seconds and polls of a peer that waits for a minute. ``hostile`` has a victim and an honest
neighbour of a million parameters, each a process, and a third member that attacks for ``--seconds``: memory,
rounds and bytes of the log beside those with a third member that is silent. ``launch`` is CPU seconds of all
processes of ``jwins launch digits`` with eight nodes, until all have begun and until the end of one round.
``memory`` is memory and CPU seconds of one of some peers, each a process, in multiples of the model and beside
what the peer states at its start; the user's own model is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

import jwins
from benchmarks.report import table
from jwins.engines.memory import ExchangeMemory
from jwins.errors import JwinsError, PeerError
from jwins.net.bootstrap import pack_state, state_wire
from jwins.net.handshake import BOOTSTRAPPED, pack_greeting
from jwins.net.peer_settings import digest_of_run, hash_of_layout, settings_of_run
from jwins.net.roster import Member, Roster, write_roster
from jwins.net.transport import TlsTransport
from jwins.net.transport_interface import Connected, MessageReceived
from jwins.rng import RoundContext
from jwins.run.launch import free_ports
from jwins.run.memory import peak_bytes
from jwins.sharing import Sharing, closed_loop, full
from jwins.sharing.update import Received, Update
from jwins.training.allocator import trim_freed_memory
from jwins.training.layout import Layout
from jwins.wire.codec import codec
from jwins.wire.frame import Bye, Frame, Hello, StateRequest, Wire, max_frame_bytes

NAMES = ("alice", "bob", "mallory", "dave", "erin")
FORK = get_context("fork")
TRAIN_S, TIMEOUT_S = 0.02, 1.0


def roster_in(folder: Path, count: int) -> Roster:
    folder.mkdir()
    places = [f"127.0.0.1:{port}" for port in free_ports(count)]
    roster = Roster(members=tuple(Member.new(i, NAMES[i], places[i], folder) for i in range(count)))
    write_roster(roster, folder / "roster.toml")
    return roster


def model(width: int = 10) -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(width, width)


def peer(run: Path, number: int, own: nn.Module, **options: Any) -> jwins.Peer:
    key = run / f"{NAMES[number]}.key"
    return jwins.Peer(own, roster=run / "roster.toml", key=key, **{"sharing": full(), **options})


@torch.no_grad()
def train_(own: nn.Module) -> None:
    """Move all parameters towards 5."""
    for param in own.parameters():
        param += 0.1 * (5.0 - param)
    time.sleep(TRAIN_S)


def least(own: nn.Module) -> float:
    return min(float(param.detach().min()) for param in own.parameters())


class Loop(threading.Thread):
    """Trains and exchanges until ``rounds``, or until the end of the run is near."""

    def __init__(self, own: jwins.Peer, rounds: int) -> None:
        super().__init__(daemon=True)
        self.peer, self.count = own, rounds
        self.reports: list[jwins.net.peer.Exchanged] = []
        self.least: list[float] = []
        self.over = False

    def run(self) -> None:
        for _ in self.peer.rounds(self.count):
            if self.over:
                return
            train_(self.peer.model)
            self.reports.append(self.peer.exchange())
            self.least.append(least(self.peer.model))


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.01)


# --- Restarts and settings --------------------------------------------------------------------------------


def restarted(folder: Path, draws: random.Random, *, keeps: bool) -> str:
    """One of two peers ends after 3 to 8 rounds and returns when the other has made 26 to 40.

    Returns:
        A text on what went wrong, or "".
    """
    roster_in(folder, 2)
    place = {"folder": folder / "alice"} if keeps else {}
    bob = Loop(peer(folder, 1, model()), 10_000)
    with peer(folder, 0, model(), **place) as first:
        bob.start()
        ended = Loop(first, draws.randint(3, 8))
        ended.run()
    back_at = draws.randint(26, 40)
    until(lambda: bob.peer.round >= back_at)
    time.sleep(draws.uniform(0.0, 1.0))
    before, behind = len(bob.least), ended.peer.round
    with peer(folder, 0, model(), **place) as second:
        again = Loop(second, 10_000)
        while len(again.reports) < 12:
            train_(second.model)
            again.reports.append(second.exchange())
        apart = abs(second.round - bob.peer.round)
    bob.over = True
    bob.join(60.0)
    bob.peer.close()
    skipped = [0, *(report.skipped_rounds for report in again.reports)]
    took = [later > sooner for sooner, later in itertools.pairwise(skipped)]  # the others' round, and no merge
    alone = sum(not report.merged_with and not took[i] for i, report in enumerate(again.reports))
    lost = 0.0 if keeps else bob.least[before - 1] - min(bob.least[before:])  # a model from scratch is no model
    if alone > 1 or apart > 2 or not again.reports[-1].skipped_rounds or lost > 0.5:
        return (
            f"{alone} of 12 rounds alone, {apart} rounds apart, from round {behind}, the model lost {lost:.2f}"
        )
    return ""


SETTINGS: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
    ({"sharing": jwins.sharing.jwins()}, {"sharing": closed_loop()}, "sharing"),
    ({"codec": "pco"}, {"codec": "raw"}, "codec"),
    ({"sharing": closed_loop(step_ratio=3.0)}, {"sharing": closed_loop(step_ratio=2.0)}, "step_ratio"),
)


def refused(folder: Path, draws: random.Random) -> str:
    """Two peers with another setting each; return what went wrong."""
    roster_in(folder, 2)
    one, other, name = draws.choice(SETTINGS)
    failures: dict[int, str] = {}

    def take_part(number: int, options: dict[str, Any]) -> None:
        with peer(folder, number, model(), **options) as own:
            begun = time.monotonic()
            try:
                while time.monotonic() < begun + 30.0:
                    own.exchange()
            except PeerError as error:
                failures[number] = str(error)

    threads = [threading.Thread(target=take_part, args=(i, o)) for i, o in enumerate((one, other))]
    for thread in threads:
        thread.start()
        time.sleep(draws.uniform(0.0, 2.0))
    for thread in threads:
        thread.join(60.0)
    named = [number for number, told in failures.items() if name in told and "here it is" in told]
    return "" if len(named) == 2 else f"{name}: {failures}"


def repeated(what: str, times: range, play: Callable[[Path, random.Random], str], folder: Path) -> None:
    good = 0
    begun = time.process_time()
    for number in times:
        try:
            problem = play(folder / f"{what}-{number}", random.Random(number))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        good += not problem
        if problem:
            print(f"{what} {number}: {problem}", flush=True)
    each_s = (time.process_time() - begun) / len(times)
    print(f"{what}: {good} of {len(times)}, {each_s:.1f} CPU s each", flush=True)


def wait(folder: Path, seconds: float) -> None:
    """Alice has shared; bob is connected and late, and the third never starts."""
    roster_in(folder, 3)
    with peer(folder, 0, model()) as alice, peer(folder, 1, model()):
        polls = itertools.count()
        poll = alice._transport.poll

        def counted(timeout_s: float | None) -> Any:
            next(polls)
            return poll(timeout_s)

        alice._transport.poll = counted  # type: ignore[method-assign]

        def exchange() -> None:
            with contextlib.suppress(JwinsError):  # the peer is closed meanwhile
                alice.exchange()

        threading.Thread(target=exchange, daemon=True).start()
        time.sleep(3.0)
        cpu, count = time.process_time(), next(polls)
        time.sleep(seconds)
        spent, count = time.process_time() - cpu, next(polls) - count
        print(
            f"wait: {60 * spent / seconds:.2f} CPU seconds per minute of two peers, "
            f"{count / seconds:.1f} polls a second, round {alice.round}",
            flush=True,
        )


def cpu_of(session: int) -> float:
    """CPU seconds of the processes of a session, with children that have ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15])) if int(fields[3]) == session else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def launched(folder: Path) -> None:
    """Eight nodes of digits for a round."""
    settings = ["nodes.count=8", "run.rounds=1", f"run.folder={folder / 'run'}"]
    command = [sys.executable, "-m", "jwins", "launch", "digits", "--quiet"]
    command += [word for text in settings for word in ("--set", text)]
    folder.mkdir()
    begun = newest = 0.0
    with subprocess.Popen(command, start_new_session=True) as process:
        while process.poll() is None:
            newest = max(newest, cpu_of(process.pid))
            logs = [path.read_text() for path in (folder / "run").glob("nodes/*/log.jsonl")]
            if not begun and len(logs) == 8 and all("started" in log for log in logs):
                begun = newest
            time.sleep(0.02)
    print(f"launch: {begun:.1f} CPU s until 8 nodes had begun, {newest:.1f} to the end of a round", flush=True)


# --- Hostile members --------------------------------------------------------------------------------------

WIDTH = 999  # 999,000 parameters
VICTIM, HONEST, HOSTILE, JOINER = range(4)


def member(pipe: Any, folder: Path, number: int, options: dict[str, Any]) -> None:
    """A process of an honest member, which answers each line with where it is."""
    stderr = os.open(folder / f"{NAMES[number]}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stderr, 2)
    own = model(WIDTH)
    with peer(folder, number, own, folder=folder / NAMES[number], timeout_s=TIMEOUT_S, **options) as here:
        loop = Loop(here, 1_000_000)
        loop.start()
        while pipe.recv():
            known = here._driver.peers[HOSTILE]
            place = folder / NAMES[number]
            logs = [*place.glob("log.jsonl*"), folder / f"{NAMES[number]}.err"]
            pipe.send(
                {
                    "round": here.round,
                    "peak": peak_bytes() / 1e6,
                    "cpu": time.process_time(),
                    "log": sum(path.stat().st_size for path in logs),
                    "skipped": here._driver.session.skipped_rounds,
                    "refused": known.refused,
                    "state": known.state.value,
                    "largest": max(float(param.detach().abs().max()) for param in own.parameters()),
                    "alive": loop.is_alive(),
                }
            )
        loop.over = True
        loop.join(30.0)
    os._exit(0)


class Mallory:
    """A member with a valid key, which sends what it likes to the victim and the honest one."""

    def __init__(self, folder: Path, roster: Roster) -> None:
        self.folder, self.roster = folder, roster
        layout = Layout.of(model(WIDTH), "local", convert=True)
        self.dim, self.layout = layout.size, hash_of_layout(layout)
        self.digest = digest_of_run(roster, full(), "pco", None)
        self.greeting = pack_greeting(self.digest, settings_of_run(roster, full(), "pco", None))
        self.wire = Wire(codec("pco"), self.digest, self.dim)
        self.models = self.asked = self.count = 0
        self.victim: dict[str, Any] = {}
        self.connect()

    def connect(self) -> None:
        self.transport = TlsTransport(
            self.roster,
            HOSTILE,
            self.folder / f"{NAMES[HOSTILE]}.key",
            greeting=self.greeting,
            limits=jwins.net.limits.Limits.of_messages(max_frame_bytes(self.dim)),
        )
        self.transport.start()
        self.connected: set[int] = set()

    def take(self) -> list[int]:
        """Read what the others send; return who asks for a model."""
        asks = []
        while (event := self.transport.poll(0.0)) is not None:
            if isinstance(event, Connected):
                self.connected.add(event.peer)
                self.say(self.hello(self.victim.get("round", 0)), event.peer)
            elif isinstance(event, MessageReceived):
                with contextlib.suppress(JwinsError):
                    state_wire(self.digest, self.dim).peek(event.data)
                    self.models += 1
                with contextlib.suppress(JwinsError):
                    if isinstance(self.wire.unpack(event.data), StateRequest):
                        asks.append(event.peer)
        return asks

    def hello(self, round: int) -> Hello:
        return Hello(HOSTILE, round, self.dim, "pco", {"layout": self.layout}, BOOTSTRAPPED, round)

    def frame(self, round: int, value: float) -> Frame:
        return Frame(HOSTILE, round, Update(self.dim, None, torch.full((self.dim,), value)))

    def say(self, message: Any, *peers: int) -> None:
        data = message if isinstance(message, bytes) else self.wire.pack(message).data
        for to in peers or self.connected:
            self.transport.send(to, data)

    def model(self, round: int, value: float) -> bytes:
        params = torch.full((self.dim,), value)
        return pack_state(state_wire(self.digest, self.dim), HOSTILE, round, params).data


def early_frames(m: Mallory, at: int) -> None:
    if m.count % 10 == 0:
        for ahead in range(1, 66):
            m.say(m.frame(at + ahead, 0.0))


def asks_and_reconnects(m: Mallory, at: int) -> None:
    m.say(StateRequest(HOSTILE, 0))
    m.asked += 1
    if m.count % 40 == 39:
        m.transport.close(0.0)
        m.connect()


def floods_bye(m: Mallory, at: int) -> None:
    for _ in range(100):
        m.say(Bye(HOSTILE, at, "x" * 200))


def just_in_time(m: Mallory, at: int) -> None:
    time.sleep(0.9 * TIMEOUT_S)
    m.say(m.frame(at, 5.0))


def bad_models(m: Mallory, at: int) -> None:
    for to in m.take():
        m.asked += 1
        for of_round, value in ((2**32 - 1, 0.0), (at, 1e38), (at, float("nan"))):
            m.say(m.model(of_round, value), to)


ATTACKS: dict[str, Callable[[Mallory, int], None]] = {
    "silent": lambda m, at: None,
    "65 early frames, twice a second": early_frames,
    "Hello of round 2**32 - 1": lambda m, at: m.say(m.hello(2**32 - 1)),
    "asks for models, reconnects": asks_and_reconnects,
    "2,000 Byes a second": floods_bye,
    "answers at 0.9 of the timeout": just_in_time,
    "inflates its values": lambda m, at: m.say(m.frame(at, min(1e30, 2.0 ** (m.count / 3)))),
    "bad models for a joiner": bad_models,
}


def attacked(folder: Path, name: str, seconds: float) -> list[object]:
    """Play one attack; return a row of the table."""
    roster = roster_in(folder, 4 if name == "bad models for a joiner" else 3)
    pipes: dict[int, Any] = {}

    def begin(number: int, **options: Any) -> None:
        pipes[number], theirs = FORK.Pipe()
        FORK.Process(target=member, args=(theirs, folder, number, options), daemon=True).start()

    def ask(number: int) -> dict[str, Any]:
        pipes[number].send(True)
        if not pipes[number].poll(120.0):
            raise TimeoutError(f"{NAMES[number]} does not answer")
        found: dict[str, Any] = pipes[number].recv()
        return found

    begin(VICTIM)
    time.sleep(1.5)
    begin(HONEST)
    late = len(roster.members) > 3
    if late:  # forked before this process has threads
        begin(JOINER, bootstrap_from=[NAMES[HOSTILE], NAMES[VICTIM]])
    hostile = Mallory(folder, roster)
    until(lambda: bool(hostile.take()) or VICTIM in hostile.connected, 120.0)
    play = ATTACKS[name]
    if name not in ("bad models for a joiner", "Hello of round 2**32 - 1"):
        with contextlib.suppress(TimeoutError):  # a silent member is no longer waited for
            until(lambda: hostile.take() is not None and ask(VICTIM)["state"] == "slow")
    before = ask(VICTIM)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not late:
            hostile.take()
        hostile.victim = ask(VICTIM)
        play(hostile, hostile.victim["round"])
        hostile.count += 1
        time.sleep(0.05)
    after, honest = ask(VICTIM), ask(HONEST)
    joined = ask(JOINER) if late else None
    hostile.transport.close(0.0)
    for pipe in pipes.values():
        pipe.send(False)
    note = f"{after['state']}, {after['refused']:,} refused"
    if hostile.asked:
        note += f", {hostile.models} models for {hostile.asked} requests"
    if joined is not None:
        note += f", joiner in round {joined['round']}"
    return [
        name,
        f"{(after['round'] - before['round']) / seconds:.1f}",
        f"{after['peak'] - before['peak']:.0f}",
        f"{(after['log'] - before['log']) / 1e3:.1f}",
        f"{(after['cpu'] - before['cpu']) / seconds:.2f}",
        f"{after['largest']:.3g}",
        f"{after['skipped']}/{honest['skipped']}",
        "both" if after["alive"] and honest["alive"] else "ENDED",
        note,
    ]


def hostile(folder: Path, seconds: float, only: str) -> None:
    columns = [
        "",
        "rounds/s",
        "MB more",
        "log kB",
        "CPU s/s",
        "largest",
        "skipped",
        "go on",
        "the hostile one is",
    ]
    rows = []
    for name in ATTACKS:
        if only not in name:
            continue
        ours, theirs = FORK.Pipe()
        place = folder / f"hostile-{len(rows)}"
        process = FORK.Process(target=lambda n=name, p=place, t=theirs: t.send(attacked(p, n, seconds)))
        process.start()
        while process.is_alive() and not ours.poll(1.0):
            pass
        rows.append(ours.recv() if ours.poll() else [name, *[""] * 6, "FAILED", ""])
        process.join(30.0)
        process.kill()
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(columns, rows), flush=True)


# --- Memory -----------------------------------------------------------------------------------------------

EXCHANGES = 6


def resident_bytes(field: str = "VmRSS") -> int:
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(row.split()[1]) for row in rows if row.startswith(field))


@torch.no_grad()
def jitter_(own: nn.Module) -> None:
    """Train without memory for it."""
    for param in own.parameters():
        for piece in param.view(-1).split(1 << 16):
            piece.add_(torch.randn(len(piece)), alpha=0.01)


def measured_peer(pipe: Any, folder: Path, number: int, name: str, width: int, checkpoints: bool) -> None:
    sharing = MEASURED[name]()
    params = torch.randn(1 << 17)
    wire, state = Wire(codec("pco"), bytes(8), sharing.update_dim(len(params))), sharing.init(params)
    for at in range(10):  # loads compiled kernels and libraries
        ctx = RoundContext(1, 0, at, {1: 0.5})
        update, state = sharing.share(state, params + 0.01 * torch.randn(len(params)), ctx)
        frame = wire.unpack(wire.pack(Frame(0, at, update)).data)
        assert isinstance(frame, Frame)
        params, state = sharing.merge(state, params, [Received(1, at, 0.5, frame.update)], ctx)
    del params, state, update, frame
    torch.manual_seed(1)
    own = nn.Linear(width, width, bias=False)
    size = 4 * width * width
    trim_freed_memory()
    before = resident_bytes()
    place = {"folder": folder / NAMES[number]} if checkpoints else {}
    steady, cpu = [], []
    with peer(folder, number, own, sharing=sharing, **place) as here:
        for _ in here.rounds(EXCHANGES):
            jitter_(own)
            begun = time.process_time()
            here.exchange()
            cpu.append(time.process_time() - begun)
            time.sleep(1.0)  # until all threads are idle
            trim_freed_memory()
            steady.append((resident_bytes() - before) / size)
        pipe.send((cpu[-1], steady[-1], (peak_bytes() - before) / size))
        pipe.recv()
    os._exit(0)


MEASURED: dict[str, Callable[[], Sharing[Any]]] = {"closed loop": closed_loop, "JWINS": jwins.sharing.jwins}


def memory(folder: Path, millions: list[float], members: int, checkpoints: bool) -> None:
    columns = ["", "parameters", "CPU s", "stated resident", "measured", "stated peak", "measured"]
    rows: list[list[object]] = []
    for name, count in itertools.product(MEASURED, millions):
        place, width = folder / f"memory-{len(rows)}", round((1e6 * count) ** 0.5)
        roster_in(place, members)
        ends = [FORK.Pipe() for _ in range(members)]
        processes = [
            FORK.Process(target=measured_peer, args=(theirs, place, i, name, width, checkpoints))
            for i, (_, theirs) in enumerate(ends)
        ]
        for process in processes:
            process.start()
        found = [ours.recv() for ours, _ in ends]
        for ours, _ in ends:
            ours.send(None)
        for process in processes:
            process.join()
        cpu, steady, peak = found[0]
        stated = ExchangeMemory.of(MEASURED[name](), width * width, members - 1)
        steady_stated = stated.steady_bytes / stated.model_bytes
        peak_stated = steady_stated + stated.peak_bytes / stated.model_bytes
        numbers = (cpu, steady_stated, steady, peak_stated, peak)
        rows.append([name, f"{width * width:,}", *(f"{number:.1f}" for number in numbers)])
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(columns, rows), flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="restart,scratch,settings,wait,hostile,launch")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="seed of the first time")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each attack")
    parser.add_argument("--attack", default="", help="a part of its name")
    parser.add_argument("--millions", default="1,11", help="parameters of the models of memory")
    parser.add_argument(
        "--members", type=int, default=2, help="peers of memory, each a neighbour of all others"
    )
    parser.add_argument("--checkpoints", action="store_true", help="peers of memory write checkpoints")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, only = Path(name), given.only.split(",")
        sizes = [float(text) for text in given.millions.split(",")]
        times = range(given.first, given.first + given.times)
        parts: dict[str, Callable[[], None]] = {
            "restart": lambda: repeated("restart", times, lambda p, d: restarted(p, d, keeps=True), folder),
            "scratch": lambda: repeated("scratch", times, lambda p, d: restarted(p, d, keeps=False), folder),
            "settings": lambda: repeated("settings", times, refused, folder),
            "wait": lambda: wait(folder / "wait", 60.0),
            "launch": lambda: launched(folder / "launch"),
            "hostile": lambda: hostile(folder, given.seconds, given.attack),
            "memory": lambda: memory(folder, sizes, given.members, given.checkpoints),
        }
        for part in only:
            parts[part]()


if __name__ == "__main__":
    main()
