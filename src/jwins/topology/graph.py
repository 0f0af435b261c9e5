"""Neighbours of a round and their mixing weights.

A topology is a frozen object that returns a :class:`Graph` for every round, as a pure function of its
arguments and the round. Every topology is built from the number of nodes and the experiment's seed,
even if it draws nothing, so that all are built alike. The other arguments are the keys of the
``[topology]`` table.

Undirected graphs mix with Metropolis-Hastings weights, ``W_ij = 1 / (1 + max(deg i, deg j))``, and the
rest stays on the node: W is symmetric and doubly stochastic. Source: Xiao, Boyd, Kim, "Distributed average
consensus with least-mean-square deviation", J. Parallel Distrib. Comput. 67(1), 2007.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from jwins.errors import ConfigError, UsageError, error_text
from jwins.rng import EVERY_ROUND


@dataclass(frozen=True)
class Graph:
    """The graph of one round.

    Attributes:
        num_nodes: N.
        senders: the senders of each node: ``senders[i][j]`` is the mixing weight W_ij that node i
            gives to the update of node j. In increasing order of j, without i itself.
        recipients: the recipients of each node, in increasing order.
        roster_version: version of the members' roster; nodes of different versions in a round do not mix.

    >>> Graph.metropolis_hastings(3, [(0, 1), (1, 2)]).senders[0]
    {1: 0.3333333333333333}
    """

    num_nodes: int
    senders: tuple[Mapping[int, float], ...]
    recipients: tuple[tuple[int, ...], ...]
    roster_version: int = 0

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Return all (sender, receiver) pairs, increasing; an undirected edge appears in both directions."""
        return tuple((i, j) for i, row in enumerate(self.recipients) for j in row)

    def matrix(self) -> npt.NDArray[np.float64]:
        """Return the mixing matrix W, (N, N) float64, with the nodes' own weights on the diagonal."""
        W = np.zeros((self.num_nodes, self.num_nodes))
        for i, row in enumerate(self.senders):
            for j, weight in row.items():
                W[i, j] = weight
            W[i, i] = 1.0 - sum(row.values())
        return W

    @staticmethod
    def metropolis_hastings(num_nodes: int, edges: Iterable[tuple[int, int]]) -> Graph:
        """Return the undirected graph with these edges and Metropolis-Hastings weights.

        Args:
            num_nodes: N, at least 1.
            edges: pairs of different nodes in range(N), in any order; a pair that is listed twice counts once.

        Raises:
            UsageError: a node out of range, or an edge from a node to itself.
        """
        neighbours: list[set[int]] = [set() for _ in range(num_nodes)]
        for i, j in edges:
            if i == j or not (0 <= i < num_nodes and 0 <= j < num_nodes):
                raise UsageError(f"edge ({i}, {j}): expected two different nodes of 0 to {num_nodes - 1}")
            neighbours[i].add(j)
            neighbours[j].add(i)
        degrees = [len(row) for row in neighbours]
        recipients = tuple(tuple(sorted(row)) for row in neighbours)
        senders = tuple(
            {j: 1.0 / (1.0 + max(degree, degrees[j])) for j in row}
            for degree, row in zip(degrees, recipients, strict=True)
        )
        return Graph(num_nodes, senders, recipients)


class CheckedTopology:
    """A user's topology, whose graphs are checked when they are first needed.

    A graph must have a row for each node, list each edge at both ends, and have weights above 0 that sum to at
    most 1 at each node.

    Args:
        topology: the user's topology.
        rounds: rounds of the run, of which the first few are checked at once.

    Raises:
        UsageError: the topology's ``at`` fails, its result is not such a graph, or two calls differ. The method
            ``at`` raises it, too.
    """

    def __init__(self, topology: Topology, rounds: int) -> None:
        self._topology, self.num_nodes = topology, topology.num_nodes
        self._graphs: dict[int, Graph] = {}
        for at in range(min(rounds, _CHECKED_ROUNDS)):
            if self.at(at) != self._checked(at):
                problem = "returned two graphs; draw from jwins.rng.stream(seed, 'name', round=round)"
                raise UsageError(f"{type(topology).__name__}.at({at}) {problem}")

    def at(self, round: int) -> Graph:
        """Return the graph of a round."""
        graph = self._graphs.get(round)
        if graph is None:
            graph = self._checked(round)
            if len(self._graphs) >= _KEPT_GRAPHS:  # more if threads were here with different rounds
                self._graphs.clear()
            self._graphs[round] = graph
        return graph

    def _checked(self, round: int) -> Graph:
        where, num_nodes = f"{type(self._topology).__name__}.at({round})", self.num_nodes
        try:
            graph = self._topology.at(round)
        except Exception as error:
            raise UsageError(f"{where} failed: {error_text(error)}") from error
        if not isinstance(graph, Graph):
            raise UsageError(f"{where} returned a {type(graph).__name__}: expected a jwins.topology.Graph")
        for name, rows in (("senders", graph.senders), ("recipients", graph.recipients)):
            if len(rows) != num_nodes:
                raise UsageError(f"{where}.{name} has {len(rows)} rows: expected {num_nodes}, one per node")
        known = [frozenset(row) for row in graph.recipients]
        for i, row in enumerate(graph.senders):
            for j, weight in row.items():
                if j == i or not 0 <= j < num_nodes or i not in known[j]:
                    problem = "expected another node, which has this one in its recipients"
                    raise UsageError(f"{where}.senders[{i}] names node {j}: {problem}")
                if not 0.0 < weight <= 1.0:
                    raise UsageError(f"{where}.senders[{i}][{j}] = {weight}: expected a weight in (0, 1]")
            if (total := sum(row.values())) > 1.0 + 1e-6:
                problem = "expected at most 1; the rest stays on the node"
                raise UsageError(f"{where}.senders[{i}] has weights of {total:.6g} in all: {problem}")
        for j, others in enumerate(graph.recipients):
            if missing := [i for i in others if not 0 <= i < num_nodes or j not in graph.senders[i]]:
                problem = "expected nodes that have this one in their senders"
                raise UsageError(f"{where}.recipients[{j}] names node {missing[0]}: {problem}")
        return graph


_CHECKED_ROUNDS = 8
_KEPT_GRAPHS = 16


class Topology(Protocol):
    """Protocol of a topology: the graph of each round."""

    @property
    def num_nodes(self) -> int:
        """Return N, the number of nodes."""
        ...

    def at(self, round: int) -> Graph:
        """Return the graph of a round, counted from 0. The same arguments must always give the same graph."""
        ...


_CACHED_GRAPHS = 16
"""Size of the cache. Nodes request a round's graph one by one, and faults may delay some by a few rounds."""


class Undirected(ABC):
    """A topology with undirected edges. Subclasses are frozen dataclasses, by whose fields graphs are cached.

    Attributes:
        num_nodes: N.
        dynamic: whether the graph is drawn again in each round; else it is the same in all rounds.
    """

    num_nodes: int
    dynamic: bool = False

    def __post_init__(self) -> None:
        check_nodes(self.num_nodes)

    def at(self, round: int) -> Graph:
        """Return the graph of ``round``, or the same graph for every round if it is static."""
        check_round(round)
        return _graph(self, round if self.dynamic else EVERY_ROUND)

    @abstractmethod
    def _edges(self, round: int) -> Iterable[tuple[int, int]]: ...


@lru_cache(maxsize=_CACHED_GRAPHS)
def _graph(topology: Undirected, round: int) -> Graph:
    return Graph.metropolis_hastings(topology.num_nodes, topology._edges(round))


def check_round(round: int) -> None:
    """Raise a UsageError for a round before the first."""
    if round < 0:
        raise UsageError(f"round = {round}: rounds count from 0")


def check_nodes(num_nodes: int) -> None:
    """Raise a ConfigError for an experiment without nodes."""
    if num_nodes < 1:
        raise ConfigError("nodes.count", num_nodes, "expected at least 1 node")
