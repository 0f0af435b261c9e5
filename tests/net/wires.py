"""A network in memory, with faults as a test likes them, and nodes that run on it, each on a thread."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worlds import DIGEST, simulator, start_row, trainer

from jwins.engines.node_group import NodeGroup
from jwins.engines.recorder import Recorder
from jwins.net.driver import NodeOutcome, RealTimeDriver
from jwins.net.transport_interface import Connected, Disconnected, LinkEvent, LinkReport, MessageReceived
from jwins.node import Rules
from jwins.run_folder.rows import EvalRow
from jwins.sharing import Sharing, full
from jwins.topology import Ring, Topology
from jwins.wire.codec import codec
from jwins.wire.frame import Wire

Fate = Callable[[int, int, bytes], float | None]
"""(sender, receiver, message) -> seconds until it arrives, or None if it never does."""


class Wires:
    """Connects nodes of one process.

    Attributes:
        fate: what happens to each message; may be changed at any time.
        flushed: by node, for how long it would still have sent what was queued when it closed.
    """

    def __init__(self) -> None:
        self.fate: Fate = lambda sender, receiver, data: 0.0
        self.flushed: dict[int, float] = {}
        self._ends: dict[int, End] = {}
        self._cut: set[frozenset[int]] = set()
        self._lock = threading.RLock()
        self._due: list[tuple[float, int, int, int, LinkEvent]] = []
        self._order = itertools.count()
        self._changed = threading.Condition(self._lock)
        self._open = True
        threading.Thread(target=self._deliver, daemon=True).start()

    def end(self, node: int) -> End:
        return End(self, node)

    def join(self, end: End) -> None:
        with self._lock:
            for other, there in self._ends.items():
                if frozenset({other, end.node}) not in self._cut:
                    there.events.put(Connected(end.node))
                    end.events.put(Connected(other))
            self._ends[end.node] = end

    def leave(self, end: End) -> None:
        """Close the connections of a node; unless it was killed, after its messages that are under way."""
        with self._lock:
            if self._ends.get(end.node) is not end:
                return
            del self._ends[end.node]
            for other, there in self._ends.items():
                if frozenset({other, end.node}) in self._cut:
                    continue
                last = [at for at, _, *pair, _ in self._due if pair == [end.node, other]]
                if last and not end.killed:
                    self._put_later(max(last), end.node, other, Disconnected(end.node, "closed"))
                else:
                    there.events.put(Disconnected(end.node, "closed"))

    def cut(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Break these connections, and let none be opened."""
        with self._lock:
            for a, b in pairs:
                self._cut.add(frozenset({a, b}))
                if a in self._ends and b in self._ends:
                    self._ends[a].events.put(Disconnected(b, "cut"))
                    self._ends[b].events.put(Disconnected(a, "cut"))

    def mend(self) -> None:
        """All connections that were cut are open again."""
        with self._lock:
            for a, b in map(sorted, self._cut):
                if a in self._ends and b in self._ends:
                    self._ends[a].events.put(Connected(b))
                    self._ends[b].events.put(Connected(a))
            self._cut.clear()

    def send(self, sender: int, receiver: int, data: bytes) -> bool:
        with self._lock:
            if receiver not in self._ends or frozenset({sender, receiver}) in self._cut:
                return False
            after = self.fate(sender, receiver, data)
            if after is not None and after <= 0.0:
                self._ends[receiver].events.put(MessageReceived(sender, data))
            elif after is not None:
                self._put_later(time.monotonic() + after, sender, receiver, MessageReceived(sender, data))
            return True

    def _put_later(self, at: float, sender: int, receiver: int, event: LinkEvent) -> None:
        heapq.heappush(self._due, (at, next(self._order), sender, receiver, event))
        self._changed.notify()

    def inject(self, sender: int, receiver: int, data: bytes) -> None:
        """Bytes that ``sender`` did not say, over its connection."""
        with self._lock:
            if receiver in self._ends:
                self._ends[receiver].events.put(MessageReceived(sender, data))

    def close(self) -> None:
        with self._lock:
            self._open = False
            self._changed.notify()

    def _deliver(self) -> None:
        with self._lock:
            while self._open:
                now = time.monotonic()
                while self._due and self._due[0][0] <= now:
                    _, _, sender, receiver, event = heapq.heappop(self._due)
                    again = isinstance(event, Disconnected) and sender in self._ends
                    if receiver in self._ends and not again:
                        self._ends[receiver].events.put(event)
                self._changed.wait(max(0.0, self._due[0][0] - time.monotonic()) if self._due else None)


class End:
    """One node's :class:`~jwins.net.transport_interface.Transport`."""

    def __init__(self, wires: Wires, node: int) -> None:
        self.wires, self.node = wires, node
        self.events: queue.SimpleQueue[LinkEvent | None] = queue.SimpleQueue()
        self.killed = False

    def kill(self) -> None:
        """The node ends at once: nothing it does from now on is seen by anybody."""
        self.killed = True
        self.wires.leave(self)
        self.wake()

    def start(self) -> None:
        self.wires.join(self)

    def send(self, peer: int, data: bytes, *, beside: bool = False) -> bool:
        return not self.killed and self.wires.send(self.node, peer, data)

    def poll(self, timeout_s: float | None) -> LinkEvent | None:
        try:
            event = self.events.get(timeout=timeout_s)
        except queue.Empty:
            event = None
        if self.killed:
            raise Killed
        return event

    def wake(self) -> None:
        self.events.put(None)

    def close(self, flush_s: float = 5.0) -> None:
        self.wires.flushed[self.node] = flush_s
        self.wires.leave(self)

    def report(self) -> Mapping[int, LinkReport]:
        return {}


class Killed(BaseException):
    """End a node on a thread like kill -9: without a Bye."""


@dataclass
class World:
    """Nodes of a small experiment, for the wall clock and for the simulator."""

    num_nodes: int = 4
    sharing: Sharing[Any] = field(default_factory=full)
    topology: Topology | None = None
    rounds: int = 6
    codec: str = "raw"
    checkpoint_every: int = 1
    timeout_s: float = 20.0
    train: dict[str, Any] = field(default_factory=dict)
    eval_at: frozenset[int] | None = None

    @property
    def graph(self) -> Topology:
        return self.topology or Ring(num_nodes=self.num_nodes, seed=1)

    def group(self, node: int) -> NodeGroup:
        own = trainer(self.num_nodes, held=[node], **self.train)
        return NodeGroup(own, self.rules(own.layout))

    def rules(self, layout: Any) -> Rules:
        return Rules(
            self.sharing,
            Wire(codec(self.codec), DIGEST, self.sharing.update_dim(layout.size)),
            self.graph,
            rounds=self.rounds,
            seed=1,
            evaluate_at=frozenset(range(self.rounds + 1)) if self.eval_at is None else self.eval_at,
            checkpoint_every=self.checkpoint_every,
            project=layout.project_ if layout.has_variances else None,
        )

    def driver(self, node: int, wires: Wires, folder: Path | None = None, **options: Any) -> RealTimeDriver:
        options = {"timeout_s": self.timeout_s, **options}
        recorder = Recorder(folder)
        return RealTimeDriver(
            options.pop("group", None) or self.group(node),
            options.pop("transport", None) or wires.end(node),
            start=start_row(self.num_nodes),
            recorder=recorder,
            **options,
        )

    def drivers(self, wires: Wires, folder: Path | None = None, **options: Any) -> list[RealTimeDriver]:
        """All of them before any runs: models come from torch's global generator, which nodes share here."""
        places = {i: None if folder is None else folder / str(i) for i in range(self.num_nodes)}
        return [self.driver(i, wires, places[i], **options) for i in range(self.num_nodes)]

    def simulate(self) -> Any:
        return simulator(
            self.num_nodes,
            sharing=self.sharing,
            topology=self.graph,
            rounds=self.rounds,
            train=self.train,
            codec=self.codec,
        ).run()


class Running:
    """Drivers on threads."""

    def __init__(self) -> None:
        self.outcomes: dict[int, NodeOutcome] = {}
        self.failures: dict[int, BaseException] = {}
        self._threads: dict[int, threading.Thread] = {}

    def start(self, node: int, driver: RealTimeDriver, *, resume: bool = False) -> None:
        def work() -> None:
            try:
                self.outcomes[node] = driver.run(resume=resume)
            except BaseException as error:
                self.failures[node] = error

        self._threads[node] = thread = threading.Thread(target=work, daemon=True)
        thread.start()

    def wait_until(self, holds: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        until = time.monotonic() + timeout_s
        while not holds():
            assert not [f for f in self.failures.values() if not isinstance(f, Killed)], self.failures
            assert time.monotonic() < until, f"waited {timeout_s} s for {what}"
            time.sleep(0.005)

    def join(self, node: int, timeout_s: float = 60.0) -> None:
        self._threads[node].join(timeout_s)
        assert not self._threads[node].is_alive(), f"node {node} hangs"

    def join_all(self, timeout_s: float = 60.0) -> dict[int, NodeOutcome]:
        until = time.monotonic() + timeout_s
        for node in self._threads:
            self.join(node, max(0.1, until - time.monotonic()))
        for node, failure in self.failures.items():
            if not isinstance(failure, Killed):
                raise AssertionError(f"node {node} failed") from failure
        return self.outcomes


def accuracy(outcome: NodeOutcome) -> float:
    row = [row for row in outcome.rows if isinstance(row, EvalRow)][-1]
    (value,) = row.per_node["accuracy"]
    assert value is not None
    return value


def run_all(world: World, wires: Wires, **options: Any) -> dict[int, NodeOutcome]:
    running = Running()
    for node, driver in enumerate(world.drivers(wires, **options)):
        running.start(node, driver)
    return running.join_all()
