"""The kinds of graphs: one frozen class for each."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from jwins.errors import ConfigError
from jwins.rng import stream
from jwins.topology.edge_list import EdgeList
from jwins.topology.finite_time import FiniteTime
from jwins.topology.graph import Graph, Topology, Undirected, check_nodes, check_round

_DRAWS = 200
"""Attempts to draw a connected random graph. Above the threshold of connectivity one or two draws suffice; far
below it no number does."""


@dataclass(frozen=True)
class Ring(Undirected):
    """Each node has the two neighbours ``i - 1`` and ``i + 1`` (modulo N).

    Args:
        num_nodes: N, at least 1.
        seed: not used; the graph is fixed.

    >>> Ring(5).at(0).recipients[0]
    (1, 4)
    """

    num_nodes: int
    seed: int = 0

    def _edges(self, round: int) -> Iterable[tuple[int, int]]:
        return _cycle(range(self.num_nodes))


@dataclass(frozen=True)
class FullyConnected(Undirected):
    """Each node has all others as its neighbours; one round of mixing is an exact average.

    Args:
        num_nodes: N, at least 1. Memory and bytes grow with its square.
        seed: not used; the graph is fixed.
    """

    num_nodes: int
    seed: int = 0

    def _edges(self, round: int) -> Iterable[tuple[int, int]]:
        return ((i, j) for i in range(self.num_nodes) for j in range(i))


@dataclass(frozen=True)
class Star(Undirected):
    """Node 0 is the only neighbour of every other node.

    Args:
        num_nodes: N, at least 1.
        seed: not used; the graph is fixed.
    """

    num_nodes: int
    seed: int = 0

    def _edges(self, round: int) -> Iterable[tuple[int, int]]:
        return ((0, i) for i in range(1, self.num_nodes))


@dataclass(frozen=True)
class Torus(Undirected):
    """A grid that wraps around in both directions; node ``r * columns + c`` is in row r, column c.

    Args:
        num_nodes: N, a product of two numbers of at least 2.
        rows: number of rows, a divisor of N; None takes the most nearly square grid. Along a side of
            2 both directions are the same edge.
        seed: not used; the graph is fixed.

    >>> Torus(12).at(0).recipients[0]
    (1, 3, 4, 8)
    """

    num_nodes: int
    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_nodes(self.num_nodes)
        rows = self._rows()
        if rows < 2 or self.num_nodes % rows or self.num_nodes // rows < 2:
            sides = [r for r in range(2, self.num_nodes // 2 + 1) if self.num_nodes % r == 0]
            remedy = (
                f"use one of {sides}"
                if sides
                else "change nodes.count to a product such as 16 = 4 x 4, or use ring"
            )
            problem = f"{self.num_nodes} nodes do not form a grid with this number of rows; {remedy}"
            raise ConfigError("topology.rows", self.rows, problem)

    def _rows(self) -> int:
        if self.rows is not None:
            return self.rows
        return max(r for r in range(1, math.isqrt(self.num_nodes) + 1) if self.num_nodes % r == 0)

    def _edges(self, round: int) -> Iterable[tuple[int, int]]:
        grid = np.arange(self.num_nodes).reshape(self._rows(), -1).tolist()
        for line in (*grid, *zip(*grid, strict=True)):
            yield from _cycle(line)


@dataclass(frozen=True)
class Regular(Undirected):
    """A random graph in which every node has the same number of neighbours.

    A static graph is connected. A graph that is drawn again each round need not be connected in every round, so
    it mixes even with degree 1, a random matching.

    Args:
        num_nodes: N.
        degree: neighbours of each node, 1 to N - 1; N * degree must be even. A static graph of more
            than two nodes needs at least 2.
        dynamic: draw a new graph each round.
        seed: seed of the draws.

    Raises:
        ConfigError: no such graph exists.

    >>> [len(row) for row in Regular(6, degree=3, seed=1).at(0).recipients]
    [3, 3, 3, 3, 3, 3]
    """

    num_nodes: int
    degree: int = 4
    dynamic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_nodes(self.num_nodes)
        _check_degree(self.degree, self.num_nodes)
        if self.num_nodes * self.degree % 2:
            raise ConfigError(
                "topology.degree",
                self.degree,
                f"nodes x degree = {self.num_nodes} x {self.degree} is odd, and every edge has two ends; "
                f"make one of them even",
            )
        if self.degree == 1 and self.num_nodes > 2 and not self.dynamic:
            problem = "with one neighbour each, nodes form separate pairs; use 2 or more, or dynamic = true"
            raise ConfigError("topology.degree", 1, problem)

    def _edges(self, round: int) -> Iterable[tuple[int, int]]:
        for seed in _seeds(self.seed, round):
            graph = nx.random_regular_graph(self.degree, self.num_nodes, seed=seed)
            if self.dynamic or nx.is_connected(graph):
                return list(graph.edges)
        raise _never_connected("topology.degree", self.degree, "use 3 or more, or a ring")


@dataclass(frozen=True)
class SmallWorld(Undirected):
    """Watts-Strogatz: a ring of ``degree`` nearest neighbours, each edge rewired with some probability.

    Always connected: disconnected draws are repeated. Source: Watts, Strogatz, "Collective dynamics of
    'small-world' networks", Nature 393, 1998.

    Args:
        num_nodes: N.
        degree: neighbours of each node before rewiring, even, 2 to N - 1.
        rewire: probability in [0, 1] that an edge is rewired.
        dynamic: draw a new graph each round.
        seed: seed of the draws.

    Raises:
        ConfigError: no such graph exists, or no connected one was found.
    """

    num_nodes: int
    degree: int = 4
    rewire: float = 0.1
    dynamic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_nodes(self.num_nodes)
        _check_degree(self.degree, self.num_nodes)
        if self.degree % 2:
            problem = "a small world has the same number of neighbours on both sides; use an even number"
            raise ConfigError("topology.degree", self.degree, problem)
        if not 0.0 <= self.rewire <= 1.0:
            raise ConfigError("topology.rewire", self.rewire, "expected a probability in [0, 1]")
        self.at(0)

    def _edges(self, round: int) -> Iterable[tuple[int, int]]:
        for seed in _seeds(self.seed, round):
            graph = nx.watts_strogatz_graph(self.num_nodes, self.degree, self.rewire, seed=seed)
            if nx.is_connected(graph):
                return list(graph.edges)
        raise _never_connected("topology.rewire", self.rewire, "use a smaller one, or a higher topology.degree")


@dataclass(frozen=True)
class ErdosRenyi(Undirected):
    """Each pair of nodes is joined with probability p, given that the graph is connected.

    Disconnected draws are repeated, so the draw is from the connected graphs alone.

    Args:
        num_nodes: N.
        p: probability of each edge, in (0, 1]. Connected draws are rare much below ln(N) / N.
        dynamic: draw a new graph each round.
        seed: seed of the draws.

    Raises:
        ConfigError: p out of range, or so low that no connected graph was found.
    """

    num_nodes: int
    p: float = 0.5
    dynamic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_nodes(self.num_nodes)
        if not 0.0 < self.p <= 1.0:
            raise ConfigError("topology.p", self.p, "expected a probability in (0, 1]")
        self.at(0)

    def _edges(self, round: int) -> Iterable[tuple[int, int]]:
        if self.p == 1.0:  # the fast sampler divides by log(1 - p)
            return FullyConnected(self.num_nodes)._edges(round)
        for seed in _seeds(self.seed, round):
            graph = nx.fast_gnp_random_graph(self.num_nodes, self.p, seed=seed)
            if nx.is_connected(graph):
                return list(graph.edges)
        threshold = math.log(self.num_nodes) / self.num_nodes
        raise _never_connected("topology.p", self.p, f"use more than ln(N) / N = {threshold:.3g}")


@dataclass(frozen=True)
class OnePeerExponential:
    """Directed: in each round a node sends to one other, at a distance that doubles from round to round.

    In round r node i sends to ``i + 2^(r mod ceil(log2 N))`` (modulo N), and each node weighs the received
    model and its own with 1/2 each. When N is a power of two, log2 N rounds average exactly. Source: Ying,
    Yuan, Chen, Hu, Pan, Yin, "Exponential Graph is Provably Efficient for Decentralized Deep Training",
    NeurIPS 2021.

    Args:
        num_nodes: N, at least 2.
        seed: not used; the graphs are fixed.

    >>> [OnePeerExponential(8).at(r).recipients[0] for r in range(4)]
    [(1,), (2,), (4,), (1,)]
    """

    num_nodes: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_nodes(self.num_nodes)
        if self.num_nodes < 2:
            raise ConfigError("nodes.count", self.num_nodes, "a one-peer topology needs at least 2 nodes")

    def at(self, round: int) -> Graph:
        """Return the graph of ``round``; it repeats with period ceil(log2 N)."""
        check_round(round)
        N = self.num_nodes
        distance = 1 << (round % (N - 1).bit_length())
        return Graph(
            N,
            senders=tuple({(i - distance) % N: 0.5} for i in range(N)),
            recipients=tuple(((i + distance) % N,) for i in range(N)),
        )


TOPOLOGIES: Mapping[str, Callable[..., Topology]] = {
    "ring": Ring,
    "fully_connected": FullyConnected,
    "star": Star,
    "torus": Torus,
    "regular": Regular,
    "small_world": SmallWorld,
    "erdos_renyi": ErdosRenyi,
    "one_peer_exponential": OnePeerExponential,
    "finite_time": FiniteTime,
    "edge_list": EdgeList,
}
"""Topologies by their name in ``topology.kind``."""


def _check_degree(degree: int, num_nodes: int) -> None:
    if degree < 1:
        raise ConfigError("topology.degree", degree, "expected at least 1 neighbour")
    if degree >= num_nodes:
        raise ConfigError(
            "topology.degree",
            degree,
            f"each of {num_nodes} nodes has at most {num_nodes - 1} neighbours; use a lower one, or more nodes",
        )


def _seeds(seed: int, round: int) -> Iterator[int]:
    rng = stream(seed, "topology", round=round)
    return (int(rng.integers(2**63)) for _ in range(_DRAWS))


def _never_connected(path: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(path, value, f"none of {_DRAWS} draws was a connected graph; {remedy}")


def _cycle(nodes: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Return the edges of a cycle; none for one node, and one for two."""
    return ((i, j) for i, j in zip(nodes, (*nodes[1:], nodes[0]), strict=True) if i != j)
