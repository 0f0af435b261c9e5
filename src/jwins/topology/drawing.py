"""Topologies that list undirected edges, and the cache of their graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import lru_cache

from jwins.errors import ConfigError, UsageError
from jwins.rng import EVERY_ROUND
from jwins.topology.graph import Graph

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
