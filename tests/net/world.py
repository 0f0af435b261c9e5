"""A simulated world: sessions with real nodes, simulated time, a seeded network and seeded faults.

A :class:`Schedule` is a list of faults drawn from a seed, or written by hand, and :func:`play` plays it.
Nothing reads a clock or opens a connection, so a seed is always the same run. The invariants are checked after
every event, and at the end that all who are up have found each other again, or have ended.
"""

from __future__ import annotations

import copy
import hashlib
import heapq
import itertools
import random
import struct
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch

from jwins.net import events as ev
from jwins.net.bootstrap import PROVIDE_EVERY, pack_state, state_wire
from jwins.net.handshake import Handshake, pack_greeting
from jwins.net.membership import Change
from jwins.net.neighbour_timeout import SUSPECT_AFTER
from jwins.net.peer_session import INTRODUCED, State
from jwins.net.roster_versions import RosterVersions
from jwins.net.session import Session, SessionSettings
from jwins.net.witnesses import PURPOSE
from jwins.node import (
    MAX_ROUNDS_AHEAD,
    FrameReceived,
    KeyframeRequested,
    Node,
    NodeState,
    Phase,
    Rules,
    Trained,
)
from jwins.sharing import choco, full
from jwins.sharing.replicas import hash_of
from jwins.sharing.update import Update
from jwins.topology import FullyConnected, Graph, Ring, Topology
from jwins.wire.codec import codec
from jwins.wire.frame import (
    NONCE_BYTES,
    Bye,
    Frame,
    FrameHeader,
    Hello,
    Message,
    RoundRequest,
    SignedRound,
    StateRequest,
    Wire,
)

TIMEOUT_S = 4.0
POLL_S = 10.0
DIM = 3
ENDLESS = 1_000_000
HEAL_TIMEOUTS, HEAL_ROUNDS = 20, 100  # after the last fault
HOSTILE_S = 100.0
RESTART_S = 0.5  # an operator starts a process again, at the earliest
HEALED_ROUNDS = 3
MAX_WAKES_PER_S = 4.0
LINES_AT_ONCE = 10
USUAL_REFUSALS = ("received before", "rounds ahead", "rounds old", "wait for a merge", "were decoded")
MAX_QUEUED = 1  # messages for a peer that reads nothing
LOSSES = ("cut", "half_open", "slow")
ROSTERS = ("join", "leave", "new_certificate")
SHORT = {"cut", "kill", "quit", "clock", "late_start", "second_key"}
"""After these alone no frame takes long while its sender is connected and waits for nobody else."""

KINDS = (
    *("delay", "cut", "half_open", "silence", "slow", "pause", "kill", "kill", "full_disk", "clock", "quit"),
    *("second_key", "other_settings", "other_version", "hostile", "hostile", "hostile", "late_start"),
    *("join", "leave", "new_certificate"),
)
RESTARTS = ("kill", "clock", "quit")
"""Only nodes with these have checkpoints."""
ALONE = ("other_settings", "other_version", "hostile")
"""Of these kinds a schedule has one fault at most."""
HOURS = ("late_start", "pause", "silence", "kill", "clock", "quit")
"""These may last for hours."""


@dataclass(frozen=True, order=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        at: when, in simulated seconds.
        kind: one of :data:`KINDS`.
        node: to whom.
        other: the other end, for faults of a connection; of a change of members: the node whose file is late;
            of ``kill``: the number of commands that it still carries out.
        seconds: for how long.
        how: of ``kill``: the checkpoint it restarts from, newest, older or none; of ``clock``: where its wall
            clock jumps while it is down; of ``silence``: whether the connection breaks after it; of ``slow``:
            whether no message for it fits the queue any more; of ``join``: which model it begins with; of
            ``hostile``: what it does.
    """

    at: float
    kind: str
    node: int
    other: int = 0
    seconds: float = 0.0
    how: str = ""


@dataclass(frozen=True)
class Schedule:
    """Ingredients of a world; its printed form is a script that makes an equal one.

    Attributes:
        seed: of the network's delays.
        nodes: their number, with one that joins.
        ring: whether they form a ring; else each is a neighbour of each.
        sharing: the algorithm.
        train_s: seconds of a training, by node.
        faults: in order of time.
        rounds: after which a node has finished.
    """

    seed: int
    nodes: int = 3
    ring: bool = False
    sharing: str = "full"
    train_s: tuple[float, ...] = (1.0, 1.0, 1.0)
    faults: tuple[Fault, ...] = ()
    rounds: int = ENDLESS

    @staticmethod
    def drawn(seed: int) -> Schedule:
        """The schedule of a seed."""
        draws = random.Random(seed)
        nodes = draws.choice((2, 3, 3, 4))
        drawn = sorted(_fault(draws, nodes) for _ in range(draws.choice((1, 1, 2, 2, 3, 4))))
        first = next((fault for fault in drawn if fault.kind in ALONE), None)
        drawn = [fault for fault in drawn if fault is first or fault.kind not in ALONE]
        usual = 2.0 if max(fault.seconds for fault in drawn) > 15.0 else draws.choice((0.5, 1.0, 2.0))
        if draws.random() < 0.02:  # few rounds pass during a long fault
            nodes, usual, drawn = 2, 40.0, [_long(draws)]
        elif draws.random() < 0.05:  # short losses of connections alone
            drawn = sorted(_short_loss(draws, nodes) for _ in range(3))
        faults, nodes = _with_members(drawn, nodes)
        alike = usual > 2.0 or {fault.kind for fault in faults} <= set(LOSSES)
        factors = (1.0, 1.0, 1.0, 1.3, 1.3 if alike else 3.0)
        train_s = tuple(usual * draws.choice(factors) for _ in range(nodes))
        sharing = draws.choice(("full", "full", "full", "choco"))
        rounds = draws.choice((1, 5, 10, 20)) if draws.random() < 0.25 else ENDLESS
        if rounds < ENDLESS and any(fault.kind in ROSTERS for fault in faults):
            rounds = 30
        return Schedule(seed, nodes, draws.random() < 0.3, sharing, train_s, faults, rounds)

    def script(self) -> str:
        """As Python."""
        lines = "".join(f"\n        {fault!r}," for fault in self.faults)
        return (
            f"Schedule(\n    seed={self.seed}, nodes={self.nodes}, ring={self.ring},\n"
            f"    sharing={self.sharing!r}, rounds={self.rounds},\n"
            f"    train_s={self.train_s},\n    faults=({lines}\n    ),\n)"
        )


def _short_loss(draws: random.Random, nodes: int) -> Fault:
    node, other = draws.sample(range(nodes), 2)
    kind = draws.choice(LOSSES)
    return Fault(round(draws.uniform(0.0, 6.0), 2), kind, node, other, 0.5, _way(draws, kind))


def _long(draws: random.Random) -> Fault:
    kind = draws.choice(HOURS)
    at = 0.0 if kind == "late_start" else 100.0
    return Fault(at, kind, 1, 0, round(draws.uniform(3600.0, 9000.0)), _way(draws, kind))


def _with_members(drawn: list[Fault], nodes: int) -> tuple[tuple[Fault, ...], int]:
    """Number joiners after the others, and leave two of the first members."""
    if any(fault.kind == "leave" for fault in drawn):
        nodes += 1
    count, faults, gone = nodes, [], set[int]()
    for fault in drawn:
        if fault.kind == "join":
            fault, count = replace(fault, node=count), count + 1
        elif fault.kind == "leave":
            if fault.node in gone or len(gone) >= nodes - 2:
                continue
            gone.add(fault.node)
        faults.append(fault)
    return tuple(faults), count


def _fault(draws: random.Random, nodes: int) -> Fault:
    kind = draws.choice(KINDS)
    node, other = draws.sample(range(nodes), 2)
    at = round(draws.uniform(0.0, 6.0), 2)
    seconds = round(draws.choice((0.1, 1.0, 3.0, 8.0, 15.0, 30.0)) * draws.uniform(0.5, 1.5), 2)
    if kind in ("late_start", "other_settings", "other_version", "hostile"):
        at = 0.0
        seconds *= draws.choice((1.0, 1.0, 5.0)) if kind == "late_start" else 1.0
    return Fault(at, kind, node, other, seconds, _way(draws, kind))


def _way(draws: random.Random, kind: str) -> str:
    ways: dict[str, tuple[str, ...]] = {
        "kill": ("newest", "newest", "older", "none"),
        "clock": ("ahead", "back"),
        "silence": ("", "breaks"),
        "slow": ("", "with a full queue"),
        "join": ("bootstraps", "bootstraps", "begins as the first"),
        "hostile": tuple(HOSTILE),
    }
    return draws.choice(ways.get(kind, ("",)))


# --- A node -----------------------------------------------------------------------------------------------


class ToyNode:
    """The node that a session drives, without an engine around it.

    Args:
        node: the node.
        shared: hashes of the replicas that it had of itself, by round.
    """

    def __init__(self, node: Node, shared: dict[int, set[int]] | None = None) -> None:
        self.node, self.shared = node, {} if shared is None else shared
        self.id, self.rules = node.id, node.rules
        self._step = torch.full((DIM,), 0.01 * (1 + node.id))

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
            trained = torch.add(self._step, self.node.params, alpha=0.9)
            commands = self.node.handle(Trained(event.round, trained), now)
            if self.rules.sharing.remembers_peers:
                self.shared.setdefault(event.round, set()).add(hash_of(self.node.state.x_hat))
            return commands
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


class ToyWire:
    """A wire that decodes equal bytes once."""

    def __init__(self, wire: Wire) -> None:
        self.codec, self.digest, self.dim = wire.codec, wire.digest, wire.dim
        self.pack, self.renewed = wire.pack, wire.renewed
        self.peek, self.unpack = lru_cache(64)(wire.peek), lru_cache(64)(wire.unpack)


@dataclass(frozen=True)
class ToySignatures:
    """Signatures that only their node can make: a hostile member here uses no key but its own."""

    node: int
    process: int
    members: Callable[[], Collection[int]]

    @property
    def nonce(self) -> bytes:
        return self.process.to_bytes(NONCE_BYTES, "little")

    def sign(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self.node.to_bytes(4, "little")).digest()

    def verify(self, node: int, data: bytes, signature: bytes) -> bool:
        return node in self.members() and signature == replace(self, node=node).sign(data)


def signed_round(
    key: ToySignatures,
    sender: int,
    at: int,
    member: int,
    asker: int,
    nonce: bytes,
    *,
    digest: bytes = b"testtest",
    roster_version: int = 0,
) -> SignedRound:
    """A round signed with any key, for any asker, experiment and roster."""
    text = PURPOSE + digest + struct.pack("<IIII", roster_version, member, at, asker) + nonce
    return SignedRound(sender, at, member, asker, key.sign(text))


@dataclass(frozen=True)
class Fixed:
    """A topology of one graph, which is asked for some times in every event."""

    num_nodes: int
    graph: Graph

    def at(self, round: int) -> Graph:
        return self.graph


@dataclass(frozen=True)
class Roster:
    """Contents of a roster file that an operator distributes to all machines.

    Attributes:
        version: its version.
        from_round: the round from which it is in effect.
        members: numbers of the members.
        departed: numbers of former members.
        certified: versions with a new certificate, by member.
    """

    version: int
    from_round: int
    members: tuple[int, ...]
    departed: frozenset[int] = frozenset()
    certified: tuple[tuple[int, int], ...] = ()

    def certificate(self, node: int) -> int:
        """The version from which a member's certificate is."""
        return max((version for member, version in self.certified if member == node), default=0)


@dataclass(slots=True)
class Process:
    """A process of a node; killed, another takes its place.

    Attributes:
        rosters: that it has read, with the rounds from which it uses them.
        failed: why it handles no more events, or "".
        lingers_until: when it ends at the latest, if its run is over.
        counted_before: bytes that its checkpoint had counted.
        transmitted: bytes that connections took.
        delivered: bytes that arrived.
        provided_in: rounds in which it sent its model, by receiver.
        lines: of its log, by event and peer.
        restored: whether it began with a checkpoint.
        dies: a kill under way, and the number of commands that it has carried out since.
        has_begun, round, skipped_rounds: as they were after the event before.
        waits_from: when it sent its newest frame.
        tries_again: whether it will soon try to send again.
    """

    session: Session
    toy: ToyNode
    born: int
    rosters: list[Roster]
    links: set[int] = field(default_factory=set)
    paused_until: float = 0.0
    disk_full_until: float = 0.0
    waiting: deque[Any] = field(default_factory=deque)
    wake_at: float = float("inf")
    failed: str = ""
    has_model: bool = False
    training: int | None = None
    lingers_until: float = float("inf")
    counted_before: int = 0
    transmitted: int = 0
    delivered: int = 0
    provided_in: dict[int, int] = field(default_factory=dict)
    lines: Counter[tuple[str, object]] = field(default_factory=Counter)
    restored: bool = False
    dies: Fault | None = None
    carried_out: int = 0
    has_begun: bool = False
    round: int = 0
    skipped_rounds: int = 0
    waits_from: float = 0.0
    tries_again: bool = False

    def version_at(self, at: int) -> int:
        """The version of the roster that is in effect in a round."""
        found = (roster.version for roster in reversed(self.rosters) if roster.from_round <= at)
        return next(found, self.rosters[0].version)


class ViolationError(AssertionError):
    """Something that must hold does not."""


@dataclass(slots=True)
class Tally:
    """Counts of what was played."""

    events: int = 0
    rounds: int = 0
    partial: int = 0
    ended: int = 0
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
        self.delayed_until: dict[tuple[int, int], float] = {}
        self.under_way: Counter[tuple[int, int]] = Counter()
        self.slow_until = [0.0] * n
        self.full_until = [0.0] * n
        self.misfits: dict[int, str] = {}
        self.hostile: dict[int, str] = {}
        self.forged: set[bytes] = set()
        self.ended: dict[int, str] = {}
        self.said: list[set[str]] = [set() for _ in range(n)]
        self.cuts: list[dict[int, str]] = [{} for _ in range(n)]
        self.clock_s = [0.0] * n
        self.poll_s = max(POLL_S, 2 * max(schedule.train_s))
        self.sent: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        self.shared: list[dict[int, set[int]]] = [{} for _ in range(n)]
        self.furthest = [0] * n
        self.weights: dict[tuple[int, int, int], tuple[float, int | None]] = {}
        self.merges: list[dict[int, frozenset[int]]] = [{} for _ in range(n)]
        self.calm_from = [ENDLESS] * n  # the first round that was merged after the last fault
        self.wakes = [0] * n
        self.reports: list[list[tuple[float, str, dict[str, Any]]]] = [[] for _ in range(n)]
        self.quiet_from = 0.0
        self.joins = {fault.node: fault.how for fault in schedule.faults if fault.kind == "join"}
        members = tuple(node for node in range(n) if node not in self.joins)
        self.roster = Roster(0, 0, members)
        self.files = [self.roster] * n
        self.kept: list[list[Roster]] = [[self.roster] for _ in range(n)]
        self.restarts = {fault.node for fault in schedule.faults if fault.kind in RESTARTS}
        self.changes = any(fault.kind in ROSTERS for fault in schedule.faults)
        self.since: dict[int, int] = {}
        algorithm: Any = {"full": full(), "choco": choco(1.0, 0.5)}[schedule.sharing]
        wire: Any = ToyWire(Wire(codec("raw"), b"testtest", DIM))
        fixed = Fixed(n, self._build(n).at(0))
        rules = Rules(algorithm, wire, fixed, schedule.rounds, 1, checkpoint_every=1)
        self.rules = rules.among_strangers(1e6, changing=False)
        self._begin()

    def _build(self, count: int) -> Topology:
        return (Ring if self.schedule.ring and count > 2 else FullyConnected)(num_nodes=count, seed=1)

    # --- Time ---------------------------------------------------------------------------------------------

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time, next(self._order), action))

    @torch.no_grad()
    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        seen = None
        while self._queue and self._queue[0][0] <= until:
            counts = (self.tally.rounds, len(self.ended), self.processes.count(None))
            if counts != seen and done():
                break
            seen = counts
            self.now, _, action = heapq.heappop(self._queue)
            self.tally.events += 1
            action()
        self.now = max(self.now, until if not done() else self.now)

    def _begin(self) -> None:
        n, starts = self.schedule.nodes, [0.05 * i for i in range(self.schedule.nodes)]
        for fault in self.schedule.faults:
            self.tally.faults[f"{fault.kind}, {fault.how}" if fault.how else fault.kind] += 1
            if fault.kind == "late_start":
                starts[fault.node] += fault.seconds
                self.quiet_from = max(self.quiet_from, starts[fault.node])
            elif fault.kind in ("other_settings", "other_version"):
                self.misfits[fault.node] = fault.kind
            elif fault.kind == "hostile":
                self.hostile[fault.node] = fault.how
            else:
                self.at(fault.at, partial(play_fault, self, fault))
                back_s = max(fault.seconds, RESTART_S) if fault.kind == "quit" else fault.seconds
                self.quiet_from = max(self.quiet_from, fault.at + back_s)
        for node in range(n):
            if node in self.joins:
                continue
            if node in self.hostile:
                self.at(starts[node], Hostile(self, node).begin)
            else:
                self.at(starts[node], partial(self.start, node, "none"))

    # --- Processes ----------------------------------------------------------------------------------------

    def start(self, node: int, checkpoint: str) -> None:
        if self.processes[node] is not None or node in self.ended:
            return
        saved = self.checkpoints[node]
        if not saved or checkpoint == "none":  # without a folder it knows what its file says
            self.kept[node] = [self.files[node]]
        if node not in self.files[node].members:
            if node not in self.joins:
                self.ended[node] = "removed"
            return
        rules = replace(self.rules, topology=self._topology_of(node)) if self.changes else self.rules
        toy = ToyNode(Node(node, torch.zeros(DIM), rules), self.shared[node])
        other = self.misfits.get(node) == "other_settings"
        greeting = pack_greeting(b"another!" if other else b"testtest", {"codec": "other" if other else "raw"})
        if self.misfits.get(node) == "other_version":
            greeting = greeting.replace(b'"wire format":"', b'"wire format":"1')
        handshake = Handshake(DIM, "raw", b"x0", greeting=greeting)
        settings = SessionSettings(
            TIMEOUT_S,
            handshake,
            max_step_s=2 * self.poll_s,
            cut=self.cuts[node],
            signatures=ToySignatures(node, next(self._numbers), lambda: self._members(node)),
        )
        roster = self.kept[node][-1]
        if (since := self.since.get(node)) is not None:
            asks = not saved and self.joins[node] == "bootstraps"
            others = tuple(member for member in roster.members if member != node) if asks else ()
            settings = replace(settings, joins_at=since, bootstrap_from=others, from_round=since)
        session = Session(toy, settings, self.now)
        process = self.processes[node] = Process(session, toy, next(self._numbers), [*self.kept[node]])
        chosen = None
        if saved and checkpoint == "newest":
            chosen = saved[-1]
        elif saved and checkpoint == "older":
            chosen = saved[max(0, len(saved) - 4)]
        if chosen is not None:
            toy.node.restore(chosen[0])
            session.restore(chosen[1], max(0.0, self.now + self.clock_s[node] - chosen[1].saved_at))
            process.has_model = not chosen[1].fresh
            frames = [frame for kept in chosen[1].send_buffer.values() for frame in kept.values()]
            # Each counts when it is made.
            not_sent = sum(frame.packed.size_bytes for frame in frames if frame.counted and not frame.sent)
            process.counted_before = session.traffic.total_bytes() - not_sent
        else:
            saved.clear()
        self.merges[node] = {}
        self.calm_from[node] = ENDLESS
        process.restored, process.waits_from = chosen is not None, self.now
        self.do(node, session.start(self.now, resumed=process.restored))
        process.round, process.skipped_rounds = toy.round, session.skipped_rounds
        process.has_begun = session.has_begun
        self.furthest[node] = max(self.furthest[node], toy.round)
        if self.changes:
            self._look(node, begins=True)
        for other in range(self.schedule.nodes):
            if other != node:
                self._dial_soon(node, other)
        self._poll(node, process.born)

    def _members(self, node: int) -> tuple[int, ...]:
        """The members of the newest roster that a process has read."""
        process = self.processes[node]
        return (self.files[node] if process is None else process.rosters[-1]).members

    def _topology_of(self, node: int) -> Topology:
        versions = RosterVersions(self.schedule.nodes, self._build)
        for roster in self.kept[node]:
            versions.add(roster.version, roster.from_round, roster.members)
        return versions

    def give_roster(self, node: int, roster: Roster) -> None:
        """A roster reaches a machine."""
        if roster.version > self.files[node].version:
            self.files[node] = roster
            self._look(node)

    def _look(self, node: int, *, begins: bool = False) -> None:
        """A process reads its file, as :class:`jwins.net.membership.Membership` does."""
        process = self.processes[node]
        if process is None or process.failed or process.session.end is not None:
            return
        if self.now < process.paused_until:
            self.at(process.paused_until, partial(self._look, node))
            return
        old, new = process.rosters[-1], self.files[node]
        known = {*old.members} - self.since.keys() if begins else {*old.members}
        joined = frozenset({*new.members} - known)
        removed = frozenset({*old.members, *(new.departed if begins else ())} - {*new.members})
        if new.version == old.version and not joined and not removed:
            return
        is_new = new.version > old.version
        from_round = max(new.from_round, process.toy.round + 1 if is_new else 0)
        if node in new.members and is_new:
            versions = process.toy.rules.topology
            assert isinstance(versions, RosterVersions)
            versions.add(new.version, from_round, new.members)
            process.rosters.append(replace(new, from_round=from_round))
            if self.now >= process.disk_full_until:
                self.kept[node].append(process.rosters[-1])
        self.feed(node, ev.MembersChanged(Change(new.version, from_round, joined, removed)))
        for peer in list(process.links):
            stays = all(new.certificate(end) == old.certificate(end) for end in (node, peer))
            if peer in removed or not stays:
                self.drop(node, peer, "another roster")
        if node in removed:
            self.leave(node, "removed", self.now)

    def leave(self, node: int, reason: str, back_at: float) -> None:
        """An operator ends a process, or its own roster does."""
        process = self.processes[node]
        if process is None or process.failed or process.session.end is not None:
            return
        process.paused_until = 0.0
        if process.session.has_begun:
            process.session.stop_training()
            if process.training is not None:
                self.feed(node, ev.TrainingDone(process.training))
            if self.processes[node] is not process:
                return  # killed meanwhile
            if not process.failed and process.session.end is None:
                self._save(node, process)
        if process.session.end is None:
            self.said[node].add(reason)
            self.do(node, process.session.leave(reason, self.now))
            process.failed = reason
            self.at(self.now + 0.2, partial(self.kill, node))
        if reason == "removed":
            self.ended[node] = reason
        else:
            self.at(max(back_at, self.now + RESTART_S), partial(self.start, node, "newest"))

    def die(self, node: int, fault: Fault) -> None:
        """A process is killed, and started again later."""
        self.kill(node)
        self.quiet_from = max(self.quiet_from, self.now + fault.seconds)
        if node not in self.hostile:
            self.at(self.now + fault.seconds, partial(self.start, node, fault.how))

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
            self.at(self.now + self.poll_s, lambda: self._poll(node, born))

    def feed(self, node: int, event: Any) -> None:
        """Something happens to a process; if it stands still, later."""
        process = self.processes[node]
        if process is None or process.failed:
            return
        if self.now < process.paused_until:
            process.waiting.append(event)
            return
        if isinstance(event, ev.MessageReceived):
            process.delivered += len(event.data)
        elif isinstance(event, ev.TrainingDone):
            process.waits_from = self.now
        self.do(node, process.session.handle(event, self.now))
        check(self, node)
        if process.session.end is not None:
            self._linger(node, process)

    def _linger(self, node: int, process: Process) -> None:
        """The run of a node is over: it stays for those who may need its last frames, as the driver does."""
        if process.lingers_until == float("inf"):
            process.lingers_until = self.now + TIMEOUT_S
            self.at(process.lingers_until, partial(self.feed, node, ev.TimePassed()))
            self.ended[node] = process.session.end.status if process.session.end else ""
            self.tally.ended += 1
        stays = any(known.may_come_back for known in process.session.peers.values())
        if not process.failed and (not stays or self.now >= process.lingers_until):
            process.failed = "is over"
            self.at(self.now + 0.2, lambda: self.kill(node) if self.processes[node] is process else None)

    def do(self, node: int, commands: list[Any]) -> None:
        """Carry out what a session commands, as the driver does."""
        process = self.processes[node]
        assert process is not None
        todo = deque(commands)
        while todo:
            if process.dies is not None and process.carried_out >= process.dies.other:
                self.die(node, process.dies)
                return
            process.carried_out += process.dies is not None
            command = todo.popleft()
            match command:
                case ev.Transmit(peer, data, label, round):
                    if peer in process.links and self._has_room(node, peer):
                        process.transmitted += len(data)
                        if label == "frame":
                            self.sent[node, peer].add(round)
                            if self.hostile.get(node) == "no frames":
                                continue
                        self._carry(node, peer, data)
                        if label == "state":
                            check_model_sent(process, node, peer)
                    else:
                        todo.extend(process.session.handle(ev.NotQueued(peer, label, round), self.now))
                        self._try_later(node, process)
                case ev.StartTraining(round):
                    self._train(node, round, process)
                case ev.SaveCheckpoint():
                    self._save(node, process)
                case ev.LogLine(_, event, fields):
                    process.has_model = process.has_model or event == "bootstrapped"
                    process.lines[event, fields.get("peer")] += 1
                    if event == "rejoining" and not process.has_model:
                        raise ViolationError(f"node {node} takes the round of others with a model from scratch")
                    self.reports[node].append((self.now, event, dict(fields)))
                    if event == "refused":
                        check_refusal(self, node, fields)
                    if event == "bye":
                        check_farewell(self, node, fields)
                case ev.KeepCut(peer, reason):
                    if peer not in self.hostile:
                        raise ViolationError(f"node {node} cut off node {peer}: {reason}")
                    self.cuts[node] = {**self.cuts[node], peer: reason}
                case ev.Failed(reason):
                    process.failed = reason
                    if self.ended:  # a joiner, or one that begins again
                        self.ended[node] = "too late"
                        self.at(self.now + 0.2, partial(self.kill, node))
                case ev.Ended(status, _, reason):
                    self.said[node].add(status)
                    if self.schedule.rounds == ENDLESS and status == "finished" and node not in self.hostile:
                        raise ViolationError(f"node {node} jumped to the end of the run")
                    if status != "finished":
                        process.failed = f"{status} {reason}"
        until = process.session.wait_until
        if until < process.wake_at - 1e-9 or process.wake_at <= self.now:
            process.wake_at = until
            if until < float("inf"):
                self.at(max(until, self.now), lambda: self._wake(node, process))

    def _try_later(self, node: int, process: Process) -> None:
        def again() -> None:
            process.tries_again = False
            if self.processes[node] is process:
                self.feed(node, ev.TimePassed())

        if not process.tries_again:
            process.tries_again = True
            self.at(self.now + 1.0, again)

    def _wake(self, node: int, process: Process) -> None:
        if self.processes[node] is process and self.now >= process.wake_at - 1e-9:
            self.wakes[node] += 1
            process.wake_at = float("inf")
            self.feed(node, ev.TimePassed())

    def _train(self, node: int, round: int, process: Process) -> None:
        seconds = self.schedule.train_s[node] * self.draws.uniform(0.9, 1.1)
        if self.hostile.get(node) == "just in time":
            seconds += 0.9 * TIMEOUT_S
        process.training = round

        def over() -> None:
            if self.processes[node] is process and process.training == round:
                process.training = None
                self.feed(node, ev.TrainingDone(round))

        self.at(self.now + seconds, over)

    def _save(self, node: int, process: Process) -> None:
        if node in self.restarts and self.now >= process.disk_full_until:
            wall_s = self.now + self.clock_s[node]
            state = process.session.snapshot(self.now, wall_s)
            for frames in state.send_buffer.values():
                frames |= {at: copy.copy(frame) for at, frame in frames.items()}
            self.checkpoints[node].append((process.toy.node.snapshot(), state))
            del self.checkpoints[node][:-5]

    # --- Connections --------------------------------------------------------------------------------------

    def _carry(self, sender: int, receiver: int, data: bytes) -> None:
        """TCP: what is sent arrives in order, or the connection breaks."""
        if self.hostile.get(sender) == "silent":
            return
        number = self.connections.get(_pair(sender, receiver))
        way = (sender, receiver)
        if "other_version" in (self.misfits.get(sender), self.misfits.get(receiver)):
            data = data[:4] + bytes([data[4] + 1]) + data[5:]
        latency = self.draws.choice((0.01, 0.02, 0.05))
        if self.now < self.delayed_until.get(_pair(sender, receiver), 0.0):
            latency = self.draws.uniform(0.2, 1.5 * TIMEOUT_S)
        time = max(self.arrives.get(way, 0.0), self.now + latency, self.silent_until.get(way, 0.0))
        time = max(time, self.slow_until[receiver])
        self.arrives[way] = time
        self.under_way[way] += 1

        def arrive() -> None:
            process = self.processes[receiver]
            open_now = self.connections.get(_pair(sender, receiver))
            if number is None or open_now != number or process is None:
                return  # without a number it was sent into a connection that had ended at the other side
            self.under_way[way] -= 1
            if sender in process.links:
                before = process.session.peers[sender].refused
                self.feed(receiver, ev.MessageReceived(sender, data))
                if sender in self.hostile:
                    check_refused(self, receiver, process, sender, data, before)

        self.at(time, arrive)

    def _has_room(self, sender: int, receiver: int) -> bool:
        if self.now < self.full_until[receiver]:
            return False
        return self.now >= self.slow_until[receiver] or self.under_way[sender, receiver] < MAX_QUEUED

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
        if self.changes and not self._may_connect(node, other):
            self._dial_soon(node, other)
            return
        if self.now < self.cut_until.get(pair, 0.0) or any(self.now < e.paused_until for e in ends if e):
            self._dial_soon(node, other)
            return
        self.connections[pair] = next(self._numbers)
        self.arrives[node, other] = self.arrives[other, node] = self.now
        self.under_way[node, other] = self.under_way[other, node] = 0
        for end, peer in ((node, other), (other, node)):
            process = self.processes[end]
            if process is None:
                continue  # killed meanwhile
            if peer in process.links:
                process.links.discard(peer)
                self.feed(end, ev.Disconnected(peer, "a new connection took its place"))
            process.links.add(peer)
        for end, peer in ((node, other), (other, node)):
            process = self.processes[peer]
            greeting = b"" if process is None else process.session.handshake.greeting
            self.feed(end, ev.Connected(peer, greeting))
        if self.processes[node] is not ends[0] or self.processes[other] is not ends[1]:
            self.drop(node, other, "killed meanwhile")

    def _may_connect(self, node: int, other: int) -> bool:
        rosters = [process.rosters[-1] for process in (self.processes[node], self.processes[other]) if process]
        return all(
            end in roster.members and roster.certificate(end) == rosters[0].certificate(end)
            for roster in rosters
            for end in (node, other)
        )


def _pair(a: int, b: int) -> tuple[int, int]:
    return (min(a, b), max(a, b))


# --- Faults -----------------------------------------------------------------------------------------------


def play_fault(world: World, fault: Fault) -> None:
    """Let it happen."""
    node, other, until = fault.node, fault.other, world.now + fault.seconds
    process = world.processes[node]
    match fault.kind:
        case "delay":
            world.delayed_until[_pair(node, other)] = until
        case "cut":
            world.cut_until[_pair(node, other)] = until
            world.drop(node, other, "cut")
        case "half_open":
            world.drop(node, other, "half open", half=True)
        case "silence":
            world.silent_until[node, other] = until
            if fault.how == "breaks":
                world.at(until - 0.001, lambda: world.drop(node, other, "silent"))
        case "slow":
            world.slow_until[node] = until
            world.full_until[node] = until if fault.how else 0.0
        case "pause" if process is not None:
            process.paused_until = until
            world.at(until, lambda: _resume(world, node, process))
        case "kill" if process is not None and fault.other:
            process.dies = fault
        case "kill":
            world.die(node, fault)
        case "full_disk" if process is not None:
            process.disk_full_until = until
        case "clock":
            world.kill(node)
            world.clock_s[node] += 1e5 if fault.how == "ahead" else -1e5
            world.at(until, lambda: world.start(node, "newest"))
        case "quit":
            world.leave(node, "interrupted", until)
        case "second_key" if process is not None and not process.failed:
            world.feed(node, ev.KeyUsedElsewhere(other, "at another address"))
            told = any(event == "key in use" for _, event, _ in world.reports[node])
            lives = world.processes[node] is process  # it may have been killed between two commands
            if lives and world.now >= process.paused_until and not told:
                raise ViolationError(f"node {node} did not report that its key is in use")
        case "join" | "leave" | "new_certificate":
            _change_members(world, fault)


def _change_members(world: World, fault: Fault) -> None:
    """An operator writes a new roster, which reaches each machine at another time."""
    old, node = world.roster, fault.node
    rounds = [process.toy.round for process in world.processes if process is not None]
    from_round = max(max(rounds, default=0) + world.draws.choice((1, 3, 10)), old.from_round + 1)
    if from_round >= world.schedule.rounds - 5:  # too late, as `jwins roster` says
        if fault.kind == "join":
            world.ended[node] = "too late"
        return
    version, members, departed, certified = old.version + 1, old.members, old.departed, old.certified
    match fault.kind:
        case "join":
            members, world.since[node] = (*members, node), from_round
        case "leave":
            members, departed = tuple(member for member in members if member != node), departed | {node}
        case _:
            certified = (*certified, (node, version))
    world.roster = Roster(version, from_round, members, departed, certified)
    for member in range(world.schedule.nodes):
        slow_s = min(fault.seconds, 20.0) if member == fault.other else 0.0
        arrives = world.now + world.draws.uniform(0.0, 2.0) + slow_s
        world.at(arrives, partial(world.give_roster, member, world.roster))
    if fault.kind == "join":
        world.files[node] = world.roster
        world.at(world.now + world.draws.choice((0.5, 10.0)), partial(world.start, node, "none"))


def _resume(world: World, node: int, process: Process) -> None:
    if world.processes[node] is not process or world.now < process.paused_until:
        return
    waiting, process.waiting = process.waiting, deque()
    for event in waiting:
        world.feed(node, event)
    world.feed(node, ev.TimePassed())


# --- Invariants -------------------------------------------------------------------------------------------


def check(world: World, node: int) -> None:
    """Check the invariants that hold after every event."""
    process = world.processes[node]
    if process is None or process.failed:
        return
    session, toy = process.session, process.toy
    if session.wait_until <= world.now and session.end is None:
        raise ViolationError(
            f"node {node} asks to be woken at {session.wait_until:.3f}, and it is {world.now:.3f}"
        )
    if world.now > 30.0 and world.wakes[node] > MAX_WAKES_PER_S * world.now:
        raise ViolationError(f"node {node} woke {world.wakes[node]} times in {world.now:.0f} s")
    if (sent := session.traffic.total_bytes() - process.counted_before) < process.transmitted:
        raise ViolationError(f"node {node} sent {process.transmitted} bytes and counted {sent}")
    if session.received_bytes != process.delivered:
        raise ViolationError(
            f"node {node} received {process.delivered} bytes, counted {session.received_bytes}"
        )
    for peer in world.cuts[node]:
        if (state := session.peers[peer].state) in INTRODUCED:
            raise ViolationError(f"node {node} has cut node {peer} off and holds it for {state.value}")
    if world.hostile or toy.round != process.round:
        _check_buffers(world, node, process)
    if toy.round != process.round or session.skipped_rounds != process.skipped_rounds:
        _check_rounds(world, node, process)


def _check_buffers(world: World, node: int, process: Process) -> None:
    most, every = world.rules.inbox_frames, process.toy.node.inbox
    inbox = [(sender, at) for sender, at in every if at != process.toy.round]  # besides the awaited one
    if early := [at for _, at in every if at > process.toy.round]:
        raise ViolationError(f"node {node} decoded frames of rounds {early} before their time")
    if len(inbox) > most and max((by_sender := Counter(sender for sender, _ in inbox)).values()) > most:
        raise ViolationError(f"node {node} keeps {by_sender} frames")
    for peer in process.rosters[-1].departed - {node}:
        known = process.session.peers[peer]
        if known.state is not State.REMOVED or known.buffer.frames or len(known.early):
            raise ViolationError(f"node {node} keeps frames of node {peer}, which is {known.state.value}")
    for known in process.session.peers.values():
        if len(known.early) > most:
            raise ViolationError(f"node {node} keeps too many early frames")
        if len(known.buffer.frames) > process.session.keeps:
            raise ViolationError(f"node {node} keeps {len(known.buffer.frames)} frames to send again")
        if len(known.seen) > 2 * (MAX_ROUNDS_AHEAD + most + 1):
            raise ViolationError(f"node {node} remembers {len(known.seen)} names of frames")


def _check_rounds(world: World, node: int, process: Process) -> None:
    """Each round is merged and reported, or skipped and counted."""
    session, now = process.session, process.toy.round
    merged = [at for at in range(process.round, now) if at in session.rounds.merged]
    for at in merged:
        world.merges[node][at] = frozenset(session.rounds.merged[at].merged_with)
        world.merges[node].pop(at - 50, None)
        if world.now > world.quiet_from:
            world.calm_from[node] = min(world.calm_from[node], at)
        process.has_model = process.has_model or not session.fresh
        world.tally.rounds += 1
        _check_merge(world, node, at, process)
        _check_log(world, node, process)
    skipped, jumped = session.skipped_rounds - process.skipped_rounds, now - process.round - len(merged)
    if process.has_begun and skipped != jumped:
        raise ViolationError(
            f"node {node} went from round {process.round} to {now}, merged {merged} and skipped {skipped}"
        )
    process.round, process.skipped_rounds, process.has_begun = now, session.skipped_rounds, session.has_begun
    world.furthest[node] = max(world.furthest[node], now)


def _check_merge(world: World, node: int, at: int, process: Process) -> None:
    graph = process.toy.rules.topology.at(at)
    senders = graph.senders[node]
    if graph.roster_version != process.version_at(at):
        raise ViolationError(f"node {node} used version {graph.roster_version} of the roster in round {at}")
    merged_with, without = world.merges[node][at], process.session.rounds.merged[at].without
    if {*merged_with, *without} != senders.keys() or merged_with & without.keys():
        raise ViolationError(f"node {node} reports {merged_with} and {without} of {set(senders)}")
    for peer in merged_with:
        # One that began without a folder knows the newest roster only, and uses it in earlier rounds as well.
        assumed = graph.roster_version if process.rosters[0].from_round > at else None
        world.weights[at, node, peer] = senders[peer], assumed
        back, theirs = world.weights.get((at, peer, node), (senders[peer], assumed))
        if back != senders[peer] and assumed == theirs:
            raise ViolationError(f"round {at}: nodes {node} and {peer} mix with {senders[peer]} and {back}")
        if peer not in world.hostile and at not in world.sent[peer, node]:
            raise ViolationError(f"node {node} merged with node {peer}, which sent nothing in round {at}")
    _check_replicas(world, node, at, process)
    for peer, reason in without.items():
        world.tally.partial += 1
        if peer not in world.hostile and not _is_excused(world, node, at, peer, reason):
            raise ViolationError(
                f"node {node} completed round {at} at {world.now:.2f} without node {peer} ({reason}), which is "
                f"{process.session.peers[peer].state.value}, in round {_round_of(world, peer)}"
            )
    told = any(event == "merged with nobody" for _, event, _ in world.reports[node])
    if senders and not merged_with and not told:
        raise ViolationError(f"node {node} merged with nobody in round {at} and did not report it")


def _check_replicas(world: World, node: int, at: int, process: Process) -> None:
    """A replica is equal to the one that its node has itself."""
    if world.schedule.sharing == "full":
        return
    state = process.toy.node.state
    for peer in world.merges[node][at]:
        replica = state.replicas.get(peer)
        if replica is None or peer in world.hostile:
            continue
        if hash_of(replica.x_hat) not in world.shared[peer].get(replica.round, ()):
            raise ViolationError(f"node {node} has a replica of node {peer} that it never had")


def _check_log(world: World, node: int, process: Process) -> None:
    for (event, peer), lines in process.lines.items():
        if lines > LINES_AT_ONCE + 1 + world.now / 60:
            raise ViolationError(
                f"node {node} logged {event} of node {peer} {lines} times in {world.now:.0f} s"
            )


def check_farewell(world: World, node: int, fields: Mapping[str, Any]) -> None:
    """A Bye has the true reason."""
    peer, reason = fields["peer"], fields["reason"]
    if peer not in world.hostile and reason not in world.said[peer]:
        raise ViolationError(
            f"node {node} read the reason {reason!r} of node {peer}, which said {world.said[peer]}"
        )


def check_refusal(world: World, node: int, fields: Mapping[str, Any]) -> None:
    """Of a member that keeps to the rules only frames of other rounds, and repeated ones, are refused."""
    peer, reason = fields["peer"], fields["reason"]
    strange = {node, peer} & {*world.hostile, *world.misfits}
    if "may not have" in reason and world.changes and peer not in world.since:
        return  # it was far behind, and asks a neighbour of a former graph
    if "signed round" in reason and (world.changes or world.restarts or "too often" in reason):
        return  # the roster of one is newer, or the asker is a new process; or a request was delayed
    if "a value of" in reason and "inflates" in world.hostile.values():
        return  # it merged such a value, which was not too large for it
    if "no other member is known" in reason and world.hostile:
        return  # the joiner asks the next provider, and then knows which of two claims to believe
    if "from experiment" in reason and any(event == "requesting state" for _, event, _ in world.reports[node]):
        return  # a second model, which comes when the node has one already
    if not strange and not world.said[peer] and not any(usual in reason for usual in USUAL_REFUSALS):
        raise ViolationError(f"node {node} refused what node {peer} sent: {reason}")


def check_model_sent(process: Process, node: int, peer: int) -> None:
    """A member is sent a model once in some rounds."""
    before, at = process.provided_in.get(peer), process.toy.round
    if before is not None and at < before + PROVIDE_EVERY:
        raise ViolationError(f"node {node} sent its model to node {peer} in rounds {before} and {at}")
    process.provided_in[peer] = at


def check_refused(world: World, node: int, process: Process, sender: int, data: bytes, before: int) -> None:
    """A message that cannot be read is counted as refused."""
    known = process.session.peers[sender]
    if process.failed or world.now < process.paused_until or not known.connected:
        return
    if data not in world.forged or known.state is State.REMOVED:
        return
    if world.hostile[sender] == "unfit":
        if known.state not in (State.INCOMPATIBLE, State.LEFT):  # left: it had said Bye before
            raise ViolationError(f"node {node} holds node {sender}, which is unfit, for {known.state.value}")
    elif known.refused == before:
        raise ViolationError(f"node {node} did not count what node {sender} sent as refused")


def _is_excused(world: World, node: int, at: int, peer: int, reason: str) -> bool:
    """Return whether a node may complete a round without a neighbour for this reason."""
    process = world.processes[node]
    assert process is not None
    known = process.session.peers[peer]
    misfit = bool(known.mismatch) or not {node, peer}.isdisjoint(world.misfits)
    match reason:
        case "timed out":
            return world.now - process.waits_from >= TIMEOUT_S - 0.01
        case "ahead":
            return world.furthest[peer] > at
        case "other roster":
            there, assumed = world.processes[peer], process.rosters[0].from_round > at  # see _check_merge
            # The frame of one that was restarted may be of the process before, with another version.
            differ = there is None or peer in world.restarts or there.version_at(at) != process.version_at(at)
            return world.changes and (assumed or differ)
        case State.SUSPECT:
            return known.timed_out > 0 or process.restored or misfit
        case State.SLOW:
            return known.timed_out > 0
        case State.LEFT:
            return bool(world.said[peer])
        case State.INCOMPATIBLE:
            return misfit
        case State.REMOVED:
            return peer in world.files[node].departed  # also if the node was removed with it
    return False


def _check_calm(world: World) -> None:
    """One hostile member makes nobody jump, and a short loss of a connection loses nothing."""
    faults, train_s = world.schedule.faults, world.schedule.train_s
    kinds = {fault.kind for fault in faults if fault.kind not in ("full_disk", "second_key")}
    short = all(fault.seconds <= 1.0 for fault in faults if fault.kind in ("cut", "slow"))
    alike = max(train_s) - min(train_s) < 1.0
    calm = kinds <= set(LOSSES) and short and alike
    for node, process in enumerate(world.processes):
        if process is None or node in world.hostile:
            continue
        skipped = process.session.skipped_rounds
        if kinds == {"hostile"} and world.schedule.nodes > 2:
            (how,) = world.hostile.values()
            delays = how == "silent" or (how in ("no frames", "just in time") and not alike)
            if skipped and not delays:
                raise ViolationError(f"node {node} left out {skipped} rounds")
            _check_pace(world, node, process)
        if calm:
            lost = {peer: known.timed_out for peer, known in process.session.peers.items() if known.timed_out}
            if lost or skipped:
                raise ViolationError(
                    f"node {node} waited in vain, by peer: {lost}, or left out {skipped} rounds"
                )


def _check_pace(world: World, node: int, process: Process) -> None:
    """One hostile member makes the others wait for as long as an absent or a slow one would, not longer."""
    (how,) = world.hostile.values()
    first_s = HEAL_TIMEOUTS * TIMEOUT_S if how == "silent" else SUSPECT_AFTER * TIMEOUT_S
    round_s = 1.2 * max(world.schedule.train_s) + (TIMEOUT_S if how == "just in time" else 0.0)
    alike = max(world.schedule.train_s) - min(world.schedule.train_s) < 1.0
    lost = 3 if alike else 6  # others that are slower are waited for, too
    least = min(world.schedule.rounds, int((world.now - first_s) / round_s) - lost)
    if process.toy.round < least:
        raise ViolationError(f"node {node} is in round {process.toy.round} of {least} at least, beside {how}")


def _check_timeouts(world: World) -> None:
    """Neither start-up nor downtime makes the next wait longer."""
    most_s = TIMEOUT_S + 10 * max(world.schedule.train_s)
    for node, process in enumerate(world.processes):
        for peer, known in process.session.peers.items() if process is not None else ():
            if (limit_s := known.timeout.limit_s()) > most_s:
                raise ViolationError(f"node {node} waits {limit_s:.0f} s for node {peer}, not {most_s:.0f}")


def _round_of(world: World, node: int) -> int | None:
    process = world.processes[node]
    return None if process is None else process.toy.round


def healed(world: World) -> bool:
    """All who are up merged with all of their neighbours in the newest rounds, and are in the same round.

    In a run that ends, all have ended.
    """
    if world.schedule.rounds < ENDLESS:
        there = {node for node, process in enumerate(world.processes) if process is not None}
        return len({*world.ended, *world.hostile}) == world.schedule.nodes and there <= world.hostile.keys()
    failed = {i for i, p in enumerate(world.processes) if p and p.failed}  # see check_end
    up = [i for i, p in enumerate(world.processes) if p and i not in world.hostile and i not in failed]
    well = [i for i in up if i not in world.misfits]
    rounds = [world.processes[i].toy.round for i in well]  # type: ignore[union-attr]
    if not rounds or max(rounds) - min(rounds) > len(rounds):
        return False
    if world.changes and not {*world.roster.members} <= {*well, *world.misfits, *world.hostile, *failed}:
        return False
    for node in well:
        newest = sorted(world.merges[node])[-HEALED_ROUNDS:]
        if (
            len(newest) < HEALED_ROUNDS
            or newest[0] < world.calm_from[node]
            or newest[-1] - newest[0] != HEALED_ROUNDS - 1
        ):
            return False
        process = world.processes[node]
        assert process is not None
        if world.changes and process.rosters[-1].version < world.roster.version:
            return False
        if world.schedule.sharing != "full" and process.toy.node.state.stale_peers & {*well}:
            return False
        topology = process.toy.rules.topology
        for at in newest:
            if {p for p in topology.at(at).senders[node] if p in well} - world.merges[node][at]:
                return False
            if world.changes and at < world.roster.from_round:
                return False
    return True


def _abandoned(world: World) -> set[int]:
    """Return the nodes that ended, all of whose neighbours were hostile, unfit, late, gone or such nodes."""
    late = {fault.node for fault in world.schedule.faults if fault.kind == "late_start"}
    useless = {*world.hostile, *world.misfits, *late, *(peer for peer, said in enumerate(world.said) if said)}
    abandoned: set[int] = set()
    for _ in world.processes:  # each time those whose neighbours were found before
        for node, process in enumerate(world.processes):
            if process is not None and process.failed:
                senders = process.toy.rules.topology.at(process.toy.round).senders[node]
                if {*senders} <= useless | abandoned:
                    abandoned.add(node)
    return abandoned


def check_end(world: World) -> None:
    """Check the invariants that hold long after the last fault."""
    abandoned = _abandoned(world)
    for node, process in enumerate(world.processes):
        if process is None or node in world.hostile:
            continue
        if process.failed:
            if process.failed == "removed" and node not in world.roster.members:
                continue  # its process has not ended yet
            if world.schedule.nodes == 2 or node in abandoned:
                continue  # nobody else is there, or none yet, or none that could send it a model
            raise ViolationError(f"node {node} ended: {process.failed}")
        for peer in range(world.schedule.nodes):
            there = world.processes[peer]
            if peer not in process.links or there is None or peer in world.hostile:
                continue
            misfit = world.misfits.get(peer) or world.misfits.get(node)
            state, problem = process.session.peers[peer].state, process.session.peers[peer].mismatch
            if misfit and state is not State.INCOMPATIBLE:
                raise ViolationError(f"node {node} holds node {peer} of {misfit} for {state.value}")
            if misfit and {"other_settings": "codec", "other_version": "wire format"}[misfit] not in problem:
                raise ViolationError(f"node {node} does not name the setting: {problem!r}")
    if world.schedule.nodes == 2 and {fault.kind for fault in world.schedule.faults} <= SHORT:
        _check_timeouts(world)
    _check_calm(world)
    if not healed(world) and not world.hostile:  # a hostile one may keep others apart for long, but ends nobody
        rows = [
            (i, p.toy.round, p.toy.waiting_for, {q: s.state.value for q, s in p.session.peers.items()})
            for i, p in enumerate(world.processes)
            if p is not None
        ]
        late_s = world.now - world.quiet_from
        raise ViolationError(f"not healed {late_s:.0f} s after the last fault: {rows}, ended {world.ended}")
    if world.schedule.rounds < ENDLESS:
        for node, status in world.ended.items():
            left = status == "removed" and node not in world.roster.members
            if node not in world.hostile and not left and status not in ("finished", "too late"):
                raise ViolationError(f"node {node} ended as {status}")


# --- A hostile member -------------------------------------------------------------------------------------

GARBAGE = (b"garbage" * 9, b"")
FORGED = ("garbage", "names of others", "unfit")
"""All that such a member makes is refused."""
HOSTILE: dict[str, Callable[[Hostile, int], list[Message | bytes]]] = {}


class Hostile:
    """A member that sends what it likes, five times a second, to everybody."""

    def __init__(self, world: World, node: int) -> None:
        self.world, self.node = world, node
        self.wire = world.rules.wire
        self.count = 0

    def begin(self) -> None:
        self.world.start(self.node, "none")
        process = self.world.processes[self.node]
        if process is None:
            return  # removed before
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
                if self.world.hostile[self.node] in FORGED:
                    self.world.forged.add(data)
                self.world._carry(self.node, peer, data)
            if self.world.hostile[self.node] == "asks and reconnects" and self.count % 10 == 0:
                self.world.drop(self.node, peer, "hostile")
        if self.count < 100:
            self.world.at(self.world.now + 0.2, self._go_on)

    def hello(self, round: int) -> Hello:
        return Hello(self.node, round, DIM, "raw", {}, b"x0", round)

    def signed(self, at: int) -> list[Message | bytes]:
        """For each asker its own round, far ahead, and one in the name of another that it signs itself."""
        others = [node for node in range(self.world.schedule.nodes) if node != self.node]
        found: list[Message | bytes] = []
        for asker in others:
            process = self.world.processes[asker]
            signatures = None if process is None else process.session.settings.signatures
            for member in (self.node, others[self.count % len(others)]):
                if signatures is not None:
                    key = ToySignatures(self.node, 0, tuple)
                    found.append(signed_round(key, self.node, at, member, asker, signatures.nonce))
        return found

    def model(self, round: int, value: float) -> bytes:
        return pack_state(state_wire(b"testtest", DIM), self.node, round, torch.full((DIM,), value)).data

    def frame(self, round: int, value: float = 0.0) -> Frame:
        return Frame(self.node, round, Update(DIM, None, torch.full((DIM,), value)))


HOSTILE |= {
    "garbage": lambda h, at: [*GARBAGE],
    "far ahead": lambda h, at: [h.hello(2**32 - 1)],
    "early frames": lambda h, at: [h.frame(at + h.count % 70)],
    "behind": lambda h, at: [h.hello(0)],
    "bye": lambda h, at: [h.hello(at), Bye(h.node, at, "x" * 400)],
    "asks for models": lambda h, at: [StateRequest(h.node, 0)],
    "not a number": lambda h, at: [h.frame(at, float("nan")), h.frame(at, 1e30)],
    "asks and reconnects": lambda h, at: [StateRequest(h.node, 0)],
    "bad models": lambda h, at: [h.model((2**32 - 1, at, h.world.schedule.rounds - 1)[h.count % 3], 1e38)],
    "just in time": lambda h, at: [],
    "silent": lambda h, at: [],
    "no frames": lambda h, at: [],
    "inflates": lambda h, at: [h.frame(at, min(1e30, 1.3**h.count))],
    "unfit": lambda h, at: [replace(h.hello(at), codec="other")],
    "names of others": lambda h, at: [replace(h.frame(at), sender=h.node + 1), replace(h.hello(at), sender=9)],
    "signs rounds": lambda h, at: [
        h.hello(at + 40),
        *h.signed(at + 40),
        *(RoundRequest(h.node, 0, asker, bytes(NONCE_BYTES)) for asker in range(h.world.schedule.nodes)),
    ],
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
        heal_s = HEAL_TIMEOUTS * TIMEOUT_S + HEAL_ROUNDS * max(schedule.train_s)
        heal_s = HOSTILE_S if world.hostile else heal_s
        if schedule.rounds < ENDLESS:
            # A node that returns when the others have ended may wait for one of them after the other.
            heal_s += 2 * schedule.rounds * max(schedule.train_s) + schedule.nodes * HEAL_TIMEOUTS * TIMEOUT_S
        world.run(world.now + heal_s, lambda: healed(world))
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
