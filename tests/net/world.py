"""A simulated world: sessions with real nodes, simulated time, a seeded network and seeded faults.

A :class:`Schedule` is a list of faults drawn from a seed, or written by hand, and :func:`play` plays it.
Nothing reads a clock or opens a connection, so a seed is always the same run. What must hold is checked after
every event, and at the end that all who are up have found each other again.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from jwins.net import events as ev
from jwins.net.handshake import Handshake, pack_greeting
from jwins.net.peer_session import PeerSession, State
from jwins.net.session import Session, SessionSettings
from jwins.node import FrameReceived, KeyframeRequested, Node, NodeState, Phase, Rules, Trained
from jwins.sharing import choco, full
from jwins.sharing.update import Update
from jwins.topology import FullyConnected, Graph, Ring
from jwins.wire.codec import codec
from jwins.wire.frame import Bye, Frame, FrameHeader, Hello, Message, StateRequest, Wire

TIMEOUT_S = 4.0
MAX_STEP_S = 20.0
POLL_S = 10.0
DIM = 3
ENDLESS = 1_000_000
HEAL_S = 900.0
HEALED_ROUNDS = 3
MAX_WAKES_PER_S = 4.0

KINDS = (
    *("cut", "half_open", "silence", "slow", "pause", "kill", "full_disk", "new_certificate"),
    *("other_settings", "hostile", "late_start"),
)


@dataclass(frozen=True, order=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        at: when, in simulated seconds.
        kind: one of :data:`KINDS`.
        node: to whom.
        other: the other end, for faults of a connection.
        seconds: for how long.
        how: of ``kill``: the checkpoint it restarts from, newest, older or none; of ``hostile``: what it does.
    """

    at: float
    kind: str
    node: int
    other: int = 0
    seconds: float = 0.0
    how: str = ""


@dataclass(frozen=True)
class Schedule:
    """What a world is made of; printed, it is a script that makes the same."""

    seed: int
    nodes: int = 3
    ring: bool = False
    sharing: str = "full"
    train_s: tuple[float, ...] = (1.0, 1.0, 1.0)
    faults: tuple[Fault, ...] = ()

    @staticmethod
    def drawn(seed: int) -> Schedule:
        """The schedule of a seed."""
        draws = random.Random(seed)
        nodes = draws.choice((2, 3, 3, 4))
        usual = draws.choice((0.2, 1.0, 2.0))
        train_s = tuple(usual * draws.choice((1.0, 1.0, 1.0, 1.3, 3.0)) for _ in range(nodes))
        faults = tuple(sorted(_fault(draws, nodes) for _ in range(draws.choice((1, 1, 2, 2, 3, 4)))))
        if sum(fault.kind in ("hostile", "other_settings") for fault in faults) > 1:
            faults = tuple(f for f in faults if f.kind not in ("hostile", "other_settings"))
        sharing = draws.choice(("full", "full", "full", "choco"))
        return Schedule(seed, nodes, draws.random() < 0.3, sharing, train_s, faults)

    def script(self) -> str:
        """As Python."""
        lines = "".join(f"\n        {fault!r}," for fault in self.faults)
        return (
            f"Schedule(\n    seed={self.seed}, nodes={self.nodes}, ring={self.ring},\n"
            f"    sharing={self.sharing!r},\n"
            f"    train_s={self.train_s},\n    faults=({lines}\n    ),\n)"
        )


def _fault(draws: random.Random, nodes: int) -> Fault:
    kind = draws.choice(KINDS)
    node, other = draws.sample(range(nodes), 2)
    at = round(draws.uniform(0.0, 15.0), 2)
    seconds = round(draws.choice((0.1, 1.0, 3.0, 8.0, 20.0, 60.0)) * draws.uniform(0.5, 1.5), 2)
    how = ""
    if kind == "kill":
        how = draws.choice(("newest", "newest", "older", "none"))
    elif kind == "hostile":
        how = draws.choice(tuple(HOSTILE))
        at = 0.0
    elif kind in ("late_start", "other_settings"):
        at = 0.0
        seconds *= draws.choice((1.0, 1.0, 6.0)) if kind == "late_start" else 1.0
    return Fault(at, kind, node, other, seconds, how)


# --- A node -----------------------------------------------------------------------------------------------


class ToyNode:
    """The node that a session drives, without an engine around it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.id, self.rules = node.id, node.rules

    @property
    def round(self) -> int:
        return self.node.round

    @property
    def waiting_for(self) -> tuple[int, ...] | None:
        return self.node.waiting_for if self.node.phase is Phase.WAITING else None

    @property
    def awaited(self) -> tuple[int, ...]:
        return self.node.waiting_for

    @property
    def merged_with(self) -> tuple[int, ...]:
        return self.node.merged_with

    @property
    def params(self) -> torch.Tensor:
        return self.node.params

    def start(self, now: float) -> list[Any]:
        return self.node.start(now)

    def handle(self, event: Any, now: float) -> list[Any]:
        if isinstance(event, ev.TrainingDone):
            step = torch.full((DIM,), 0.01 * (1 + self.id))
            return self.node.handle(Trained(event.round, self.node.params * 0.9 + step), now)
        return self.node.handle(event, now)

    def objection(self, frame: FrameHeader) -> str | None:
        return self.node.objection(frame)

    def max_frames(self, frame: FrameHeader) -> int:
        return self.node.max_frames(frame)

    def read(self, peer: int, data: bytes) -> tuple[Message, Any]:
        message = self.rules.wire.unpack(data)
        if isinstance(message, Frame):
            return message, FrameReceived(message)
        replica_round = getattr(message, "replica_round", None)
        return message, KeyframeRequested(peer, message.round, replica_round)


@dataclass(frozen=True)
class Fixed:
    """A topology of one graph, which is asked for some times in every event."""

    num_nodes: int
    graph: Graph

    def at(self, round: int) -> Graph:
        return self.graph


@dataclass(slots=True)
class Process:
    """A process of a node; killed, another takes its place."""

    session: Session
    toy: ToyNode
    born: int
    links: set[int] = field(default_factory=set)
    paused_until: float = 0.0
    disk_full_until: float = 0.0
    waiting: deque[Any] = field(default_factory=deque)
    wake_at: float = float("inf")
    failed: str = ""
    has_model: bool = False
    checked: int = 0
    shared_at: dict[int, float] = field(default_factory=dict)


class ViolationError(AssertionError):
    """Something that must hold does not."""


@dataclass(slots=True)
class Tally:
    """What was played."""

    events: int = 0
    rounds: int = 0
    partial: int = 0
    faults: Counter[str] = field(default_factory=Counter)


class World:
    """Plays one schedule."""

    def __init__(self, schedule: Schedule, tally: Tally | None = None) -> None:
        self.schedule = schedule
        self.tally = tally or Tally()
        self.draws = random.Random(schedule.seed + 1)
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        n = schedule.nodes
        self.processes: list[Process | None] = [None] * n
        self.checkpoints: list[list[tuple[NodeState, Any]]] = [[] for _ in range(n)]
        self.connections: dict[tuple[int, int], int] = {}
        self._numbers = itertools.count(1)
        self.arrives: dict[tuple[int, int], float] = {}
        self.cut_until: dict[tuple[int, int], float] = {}
        self.silent_until: dict[tuple[int, int], float] = {}
        self.slow_until = [0.0] * n
        self.other_settings: set[int] = set()
        self.hostile: dict[int, str] = {}
        self.weights: dict[tuple[int, int, int], float] = {}
        self.merges: list[dict[int, frozenset[int]]] = [{} for _ in range(n)]
        self.wakes = [0] * n
        self.reports: list[list[tuple[float, str, dict[str, Any]]]] = [[] for _ in range(n)]
        self.quiet_from = 0.0
        kind = Ring if schedule.ring and n > 2 else FullyConnected
        self.topology = Fixed(n, kind(num_nodes=n, seed=1).at(0))
        algorithm: Any = {"full": full(), "choco": choco(0.5, 0.5)}[schedule.sharing]
        wire = Wire(codec("raw"), b"testtest", DIM)
        rules = Rules(algorithm, wire, self.topology, ENDLESS, 1, checkpoint_every=1)
        self.rules = rules.among_strangers(1e6, changing=False)
        self._begin()

    # --- Time ---------------------------------------------------------------------------------------------

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time, next(self._order), action))

    @torch.no_grad()
    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        while self._queue and self._queue[0][0] <= until and not done():
            self.now, _, action = heapq.heappop(self._queue)
            self.tally.events += 1
            action()
        self.now = max(self.now, until if not done() else self.now)

    def _begin(self) -> None:
        n, starts = self.schedule.nodes, [0.05 * i for i in range(self.schedule.nodes)]
        for fault in self.schedule.faults:
            self.tally.faults[fault.kind] += 1
            if fault.kind == "late_start":
                starts[fault.node] += fault.seconds
                self.quiet_from = max(self.quiet_from, starts[fault.node])
            elif fault.kind == "other_settings":
                self.other_settings.add(fault.node)
            elif fault.kind == "hostile":
                self.hostile[fault.node] = fault.how
            else:
                self.at(fault.at, partial(play_fault, self, fault))
                self.quiet_from = max(self.quiet_from, fault.at + fault.seconds)
        for node in range(n):
            if node in self.hostile:
                self.at(starts[node], Hostile(self, node).begin)
            else:
                self.at(starts[node], partial(self.start, node, "none"))

    # --- Processes ----------------------------------------------------------------------------------------

    def start(self, node: int, checkpoint: str) -> None:
        if self.processes[node] is not None:
            return
        toy = ToyNode(Node(node, torch.zeros(DIM), self.rules))
        settings = {"codec": "other" if node in self.other_settings else "raw"}
        digest = b"another!" if node in self.other_settings else b"testtest"
        handshake = Handshake(DIM, "raw", b"x0", greeting=pack_greeting(digest, settings))
        session = Session(toy, SessionSettings(TIMEOUT_S, handshake, max_step_s=MAX_STEP_S), self.now)
        process = self.processes[node] = Process(session, toy, next(self._numbers))
        saved = self.checkpoints[node]
        chosen = None
        if saved and checkpoint == "newest":
            chosen = saved[-1]
        elif saved and checkpoint == "older":
            chosen = saved[max(0, len(saved) - 4)]
        if chosen is not None:
            toy.node.restore(chosen[0])
            session.restore(chosen[1])
            process.has_model = not chosen[1].fresh
        else:
            saved.clear()
        self.merges[node] = {}
        self.do(node, session.start(self.now, resumed=chosen is not None))
        for other in range(self.schedule.nodes):
            if other != node:
                self._dial_soon(node, other)
        self._poll(node, process.born)

    def kill(self, node: int) -> None:
        process, self.processes[node] = self.processes[node], None
        if process is None:
            return
        for other in list(process.links):
            self.drop(node, other, "reset")

    def _poll(self, node: int, born: int) -> None:
        """The driver's loop looks at the clock."""
        process = self.processes[node]
        if process is None or process.born != born:
            return
        if self.now >= process.paused_until:
            self.feed(node, ev.TimePassed())
        process = self.processes[node]
        if process is not None:
            self.at(self.now + POLL_S, lambda: self._poll(node, born))

    def feed(self, node: int, event: Any) -> None:
        """Something happens to a process; if it stands still, later."""
        process = self.processes[node]
        if process is None or process.failed:
            return
        if self.now < process.paused_until:
            process.waiting.append(event)
            return
        self.do(node, process.session.handle(event, self.now))
        check(self, node)

    def do(self, node: int, commands: list[Any]) -> None:
        """Carry out what a session commands, as the driver does."""
        process = self.processes[node]
        assert process is not None
        todo = deque(commands)
        while todo:
            command = todo.popleft()
            match command:
                case ev.Transmit(peer, data, label, round):
                    if peer in process.links:
                        self._carry(node, peer, data)
                    else:
                        todo.extend(process.session.handle(ev.NotQueued(peer, label, round), self.now))
                case ev.StartTraining(round):
                    self._train(node, round, process.born)
                case ev.SaveCheckpoint():
                    self._save(node, process)
                case ev.Report(_, event, fields):
                    process.has_model = process.has_model or event == "bootstrapped"
                    if event == "rejoining" and not process.has_model:
                        raise ViolationError(f"node {node} takes the round of others with a model from scratch")
                    self.reports[node].append((self.now, event, dict(fields)))
                case ev.Failed(reason):
                    process.failed = reason
                case ev.Ended(status, _, reason):
                    process.failed = f"{status} {reason}"
        until = process.session.wait_until
        if until < process.wake_at - 1e-9 or process.wake_at <= self.now:
            process.wake_at = until
            if until < float("inf"):
                self.at(max(until, self.now), lambda: self._wake(node, process))

    def _wake(self, node: int, process: Process) -> None:
        if self.processes[node] is process and self.now >= process.wake_at - 1e-9:
            self.wakes[node] += 1
            process.wake_at = float("inf")
            self.feed(node, ev.TimePassed())

    def _train(self, node: int, round: int, born: int) -> None:
        seconds = self.schedule.train_s[node] * self.draws.uniform(0.9, 1.1)

        def over() -> None:
            process = self.processes[node]
            if process is not None and process.born == born:
                process.shared_at[round] = self.now
                self.feed(node, ev.TrainingDone(round))

        self.at(self.now + seconds, over)

    def _save(self, node: int, process: Process) -> None:
        if self.now >= process.disk_full_until:
            self.checkpoints[node].append((process.toy.node.snapshot(), process.session.snapshot(self.now)))
            del self.checkpoints[node][:-5]

    # --- Connections --------------------------------------------------------------------------------------

    def _carry(self, sender: int, receiver: int, data: bytes) -> None:
        """TCP: what is sent arrives in order, or the connection breaks."""
        number = self.connections.get(_pair(sender, receiver))
        way = (sender, receiver)
        latency = self.draws.choice((0.01, 0.02, 0.05))
        time = max(self.arrives.get(way, 0.0), self.now + latency, self.silent_until.get(way, 0.0))
        time = max(time, self.slow_until[receiver])
        self.arrives[way] = time

        def arrive() -> None:
            process = self.processes[receiver]
            if self.connections.get(_pair(sender, receiver)) != number or process is None:
                return
            if sender in process.links:
                self.feed(receiver, ev.MessageReceived(sender, data))

        self.at(time, arrive)

    def drop(self, node: int, other: int, reason: str, *, half: bool = False) -> None:
        """The connection breaks; ``half``: the other side does not notice for a while."""
        number = self.connections.pop(_pair(node, other), None)
        if number is None:
            return
        for end, at in ((node, 0.0), (other, 30.0 if half else 0.02)):
            process = self.processes[end]
            if process is not None:
                peer = other if end == node else node
                self.at(self.now + at, partial(self._gone, end, peer, process.born, number))
        self._dial_soon(node, other)

    def _gone(self, node: int, peer: int, born: int, number: int) -> None:
        process = self.processes[node]
        if process is None or process.born != born or peer not in process.links:
            return
        if self.connections.get(_pair(node, peer), number) == number:
            process.links.discard(peer)
            self.feed(node, ev.Disconnected(peer, "broken"))

    def _dial_soon(self, node: int, other: int) -> None:
        self.at(self.now + self.draws.uniform(0.1, 1.0), lambda: self._dial(node, other))

    def _dial(self, node: int, other: int) -> None:
        ends = (self.processes[node], self.processes[other])
        pair = _pair(node, other)
        if pair in self.connections or any(end is None or end.failed for end in ends):
            return
        if self.now < self.cut_until.get(pair, 0.0) or any(self.now < e.paused_until for e in ends if e):
            self._dial_soon(node, other)
            return
        self.connections[pair] = next(self._numbers)
        self.arrives[node, other] = self.arrives[other, node] = self.now
        for end, peer in ((node, other), (other, node)):
            process = self.processes[end]
            assert process is not None
            if peer in process.links:
                process.links.discard(peer)
                self.feed(end, ev.Disconnected(peer, "a new connection took its place"))
            process.links.add(peer)
        for end, peer in ((node, other), (other, node)):
            process = self.processes[peer]
            greeting = b"" if process is None else process.session.handshake.greeting
            self.feed(end, ev.Connected(peer, greeting))


def _pair(a: int, b: int) -> tuple[int, int]:
    return (min(a, b), max(a, b))


# --- Faults -----------------------------------------------------------------------------------------------


def play_fault(world: World, fault: Fault) -> None:
    """Let it happen."""
    node, other, until = fault.node, fault.other, world.now + fault.seconds
    process = world.processes[node]
    match fault.kind:
        case "cut" | "new_certificate":
            world.cut_until[_pair(node, other)] = until if fault.kind == "cut" else world.now + 0.2
            world.drop(node, other, "cut")
        case "half_open":
            world.drop(node, other, "half open", half=True)
        case "silence":
            world.silent_until[node, other] = until
        case "slow":
            world.slow_until[node] = until
        case "pause" if process is not None:
            process.paused_until = until
            world.at(until, lambda: _resume(world, node, process))
        case "kill":
            world.kill(node)
            world.at(until, lambda: world.start(node, fault.how) if node not in world.hostile else None)
        case "full_disk" if process is not None:
            process.disk_full_until = until


def _resume(world: World, node: int, process: Process) -> None:
    if world.processes[node] is not process or world.now < process.paused_until:
        return
    waiting, process.waiting = process.waiting, deque()
    for event in waiting:
        world.feed(node, event)
    world.feed(node, ev.TimePassed())


# --- Invariants -------------------------------------------------------------------------------------------


def check(world: World, node: int) -> None:
    """What must hold after every event."""
    process = world.processes[node]
    if process is None or process.failed:
        return
    session = process.session
    if session.wait_until <= world.now and session.end is None:
        raise ViolationError(
            f"node {node} asks to be woken at {session.wait_until:.3f}, and it is {world.now:.3f}"
        )
    if world.now > 30.0 and world.wakes[node] > MAX_WAKES_PER_S * world.now:
        raise ViolationError(f"node {node} woke {world.wakes[node]} times in {world.now:.0f} s")
    by_sender = Counter(sender for sender, _ in process.toy.node.inbox)
    if any(count > world.rules.inbox_frames for count in by_sender.values()):
        raise ViolationError(f"node {node} keeps {by_sender} frames")
    if early := [at for _, at in process.toy.node.inbox if at > process.toy.round]:
        raise ViolationError(f"node {node} decoded frames of rounds {early} before their time")
    if any(len(known.early) > world.rules.inbox_frames for known in session.peers.values()):
        raise ViolationError(f"node {node} keeps too many early frames")
    for at in [at for at in session.rounds.merged if at not in world.merges[node]]:
        world.merges[node][at] = frozenset(session.rounds.merged[at].merged_with)
        world.merges[node].pop(at - 50, None)
        process.has_model = process.has_model or not session.fresh
        world.tally.rounds += 1
        _check_merge(world, node, at, process)


def _check_merge(world: World, node: int, at: int, process: Process) -> None:
    senders = world.topology.at(at).senders[node]
    merged_with = world.merges[node][at]
    for peer in merged_with:
        world.weights[at, node, peer] = senders[peer]
        back = world.weights.get((at, peer, node))
        if back is not None and back != senders[peer]:
            raise ViolationError(f"round {at}: nodes {node} and {peer} mix with {senders[peer]} and {back}")
    for peer, reason in process.session.rounds.merged[at].without.items():
        world.tally.partial += 1
        known = process.session.peers[peer]
        if peer not in world.hostile and not _is_excused(reason, known):
            raise ViolationError(
                f"node {node} completed round {at} at {world.now:.2f} without node {peer} ({reason}), which is "
                f"{known.state.value}, in round {_round_of(world, peer)}"
            )
    told = any(event == "merged with nobody" for _, event, _ in world.reports[node])
    if senders and not merged_with and not told:
        raise ViolationError(f"node {node} merged with nobody in round {at} and did not report it")


def _is_excused(reason: str, known: PeerSession) -> bool:
    """Whether a node may complete a round without a neighbour for this reason."""
    if reason in (State.SUSPECT, State.SLOW):
        return known.timed_out > 0 or reason == State.SUSPECT or bool(known.mismatch)
    return reason in ("timed out", "ahead", State.LEFT, State.INCOMPATIBLE)


def _round_of(world: World, node: int) -> int | None:
    process = world.processes[node]
    return None if process is None else process.toy.round


def healed(world: World) -> bool:
    """All who are up merged with all of their neighbours in the newest rounds, and are in the same round."""
    up = [i for i, p in enumerate(world.processes) if p is not None and i not in world.hostile]
    well = [i for i in up if i not in world.other_settings]
    rounds = [world.processes[i].toy.round for i in well]  # type: ignore[union-attr]
    if not rounds or max(rounds) - min(rounds) > len(rounds):
        return False
    for node in well:
        newest = sorted(world.merges[node])[-HEALED_ROUNDS:]
        if len(newest) < HEALED_ROUNDS or newest[-1] - newest[0] != HEALED_ROUNDS - 1:
            return False
        for at in newest:
            if {p for p in world.topology.at(at).senders[node] if p in well} - world.merges[node][at]:
                return False
    return True


def check_end(world: World) -> None:
    """What must hold when the last fault is long over."""
    for node, process in enumerate(world.processes):
        if process is None or node in world.hostile:
            continue
        if process.failed:
            if world.hostile and world.schedule.nodes == 2:
                continue  # nobody else is there
            raise ViolationError(f"node {node} ended: {process.failed}")
        for peer in range(world.schedule.nodes):
            there = world.processes[peer]
            if peer not in process.links or there is None or peer in world.hostile:
                continue
            misfit = (peer in world.other_settings) != (node in world.other_settings)
            state = process.session.peers[peer].state
            if misfit and state is not State.INCOMPATIBLE:
                raise ViolationError(f"node {node} holds node {peer} of other settings for {state.value}")
            if misfit and "codec" not in process.session.peers[peer].mismatch:
                raise ViolationError(
                    f"node {node} does not name the setting: {process.session.peers[peer].mismatch!r}"
                )
    if not healed(world) and not world.hostile:  # a hostile one may keep others apart for long, but ends nobody
        rows = [
            (i, p.toy.round, p.toy.waiting_for, {q: s.state.value for q, s in p.session.peers.items()})
            for i, p in enumerate(world.processes)
            if p is not None
        ]
        raise ViolationError(f"not healed {HEAL_S:.0f} s after the last fault: {rows}")


# --- A hostile member -------------------------------------------------------------------------------------

HOSTILE: dict[str, Callable[[Hostile, int], list[Message | bytes]]] = {}


class Hostile:
    """A member that sends what it likes, ten times a second, to everybody."""

    def __init__(self, world: World, node: int) -> None:
        self.world, self.node = world, node
        self.wire = world.rules.wire
        self.count = 0

    def begin(self) -> None:
        self.world.start(self.node, "none")
        process = self.world.processes[self.node]
        assert process is not None
        process.failed = ""
        self.born = process.born
        self._go_on()

    def _go_on(self) -> None:
        process = self.world.processes[self.node]
        if process is None or process.born != self.born:
            return
        self.count += 1
        for peer in list(process.links):
            there = self.world.processes[peer]
            at = 0 if there is None else there.toy.round
            for message in HOSTILE[self.world.hostile[self.node]](self, at):
                data = message if isinstance(message, bytes) else self.wire.pack(message).data
                self.world._carry(self.node, peer, data)
        if self.count < 300:
            self.world.at(self.world.now + 0.1, self._go_on)

    def hello(self, round: int) -> Hello:
        return Hello(self.node, round, DIM, "raw", {}, b"x0", round)

    def frame(self, round: int, value: float = 0.0) -> Frame:
        return Frame(self.node, round, Update(DIM, None, torch.full((DIM,), value)))


HOSTILE |= {
    "garbage": lambda h, at: [b"garbage" * 9, b""],
    "far ahead": lambda h, at: [h.hello(2**32 - 1)],
    "early frames": lambda h, at: [h.frame(at + h.count % 70)],
    "behind": lambda h, at: [h.hello(0)],
    "bye": lambda h, at: [h.hello(at), Bye(h.node, at, "x" * 400)],
    "asks for models": lambda h, at: [StateRequest(h.node, 0)],
    "not a number": lambda h, at: [h.frame(at, float("nan")), h.frame(at, 1e30)],
    "silent": lambda h, at: [],
    "inflates": lambda h, at: [h.frame(at, min(1e30, 1.3**h.count))],
    "keyframes": lambda h, at: [replace(h.frame(at + 1 + h.count % 9), keyframe=True)],
}


# --- Playing ----------------------------------------------------------------------------------------------


def play(schedule: Schedule, tally: Tally | None = None) -> World:
    """Play a schedule.

    Raises:
        ViolationError: something that must hold does not.
    """
    world = World(schedule, tally)
    try:
        world.run(world.quiet_from)
        world.run(world.now + (HEAL_S if not world.hostile else HEAL_S / 9), lambda: healed(world))
        check_end(world)
    except ViolationError:
        raise
    except Exception as error:
        raise ViolationError(f"{type(error).__name__}: {error}") from error
    return world


def shrunk(schedule: Schedule) -> Schedule:
    """A schedule that fails, with no fault that can be left out."""
    for fault in schedule.faults:
        smaller = replace(schedule, faults=tuple(f for f in schedule.faults if f is not fault))
        try:
            play(smaller)
        except ViolationError:
            return shrunk(smaller)
    return schedule
