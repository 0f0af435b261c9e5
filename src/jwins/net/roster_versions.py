"""The graphs of a run whose members change: for each round those of the roster version in effect."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jwins.topology import Graph, Topology

_REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class _RosterVersion:
    """Members from a round on.

    Attributes:
        from_round: the first round.
        active: the nodes that take part, increasing.
    """

    number: int
    from_round: int
    active: tuple[int, ...]
    topology: Topology

    def graph(self, round: int, num_nodes: int) -> Graph:
        graph = self.topology.at(round)
        if len(self.active) == num_nodes and self.number == graph.roster_version:
            return graph
        senders: list[dict[int, float]] = [{} for _ in range(num_nodes)]
        recipients: list[tuple[int, ...]] = [() for _ in range(num_nodes)]
        for rank, node in enumerate(self.active):
            senders[node] = {self.active[j]: weight for j, weight in graph.senders[rank].items()}
            recipients[node] = tuple(self.active[j] for j in graph.recipients[rank])
        return Graph(num_nodes, tuple(senders), tuple(recipients), self.number)


class RosterVersions:
    """A :class:`~jwins.topology.Topology` in which the members of the roster version in effect take part.

    The members, by rank, are the nodes of a graph of their number. All other nodes have no neighbours.
    The first version that is added covers all rounds before its own, too.

    Args:
        num_nodes: largest number of nodes.
        build: returns the topology for a number of nodes.

    >>> from jwins.topology import FullyConnected
    >>> versions = RosterVersions(3, lambda count: FullyConnected(num_nodes=count, seed=1))
    >>> versions.add(0, 0, [0, 1])
    >>> versions.add(1, 10, [0, 2])
    >>> versions.at(9).edges, versions.at(10).edges
    (((0, 1), (1, 0)), ((0, 2), (2, 0)))
    """

    def __init__(self, num_nodes: int, build: Callable[[int], Topology]) -> None:
        self._num_nodes, self._build = num_nodes, build
        self._every: list[_RosterVersion] = []
        self._graphs: dict[int, Graph] = {}
        self._lock = threading.Lock()  # other threads request graphs, too

    @property
    def num_nodes(self) -> int:
        """Return the largest number of nodes."""
        return self._num_nodes

    @property
    def newest(self) -> int | None:
        """Return the number of the version that was added last."""
        return self._every[-1].number if self._every else None

    def add(self, number: int, from_round: int, active: Sequence[int]) -> None:
        """Add a version after those that were added, with the nodes that take part in it, increasing.

        Raises:
            ConfigError: no such graph of this number of nodes exists.
        """
        added = _RosterVersion(number, from_round, tuple(active), self._build(len(active)))
        with self._lock:
            self._every = [version for version in self._every if version.from_round < from_round] + [added]
            self._graphs.clear()

    def at(self, round: int) -> Graph:
        """Return the graph of ``round``."""
        with self._lock:
            found = self._graphs.get(round)
            if found is None:
                version = next((e for e in reversed(self._every) if e.from_round <= round), self._every[0])
                found = version.graph(round, self._num_nodes)
                while len(self._graphs) >= _REMEMBERED:
                    del self._graphs[next(iter(self._graphs))]
                self._graphs[round] = found
            return found

    def neighbours(self, node: int, round: int) -> frozenset[int]:
        """Return a node's neighbours in the first rounds of the version of ``round`` and of later versions."""
        found: set[int] = set()
        now = max((at for at, version in enumerate(self._every) if version.from_round <= round), default=0)
        for version in self._every[now:]:
            graph = version.graph(version.from_round, self._num_nodes)
            found |= {*graph.senders[node], *graph.recipients[node]}
        return frozenset(found)
