"""Graphs of rounds, made from edges and cached while they are in use."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

from jwins.errors import ConfigError, UsageError
from jwins.rng import EVERY_ROUND
from jwins.topology.graph import Graph, Topology

_CACHED_GRAPHS = 16
"""Size of the cache. Nodes request a round's graph one by one, and faults may delay some by a few rounds."""


class Undirected(Topology, Protocol):
    """A topology that lists the undirected edges of a round."""

    def _edges(self, round: int) -> Iterable[tuple[int, int]]: ...

    def __hash__(self) -> int: ...


@lru_cache(maxsize=_CACHED_GRAPHS)
def _graph(topology: Undirected, round: int) -> Graph:
    return Graph.metropolis_hastings(topology.num_nodes, topology._edges(round))


def static_graph(topology: Undirected, round: int) -> Graph:
    """Return the graph of a static topology; ``round`` is only checked."""
    check_round(round)
    return _graph(topology, EVERY_ROUND)


def drawn_graph(topology: Undirected, round: int) -> Graph:
    """Return the graph of ``round`` of a topology that is drawn again in each round."""
    check_round(round)
    return _graph(topology, round)


def check_round(round: int) -> None:
    """Raise a UsageError for a round before the first."""
    if round < 0:
        raise UsageError(f"round = {round}: rounds count from 0")


def check_nodes(num_nodes: int) -> None:
    """Raise a ConfigError for an experiment without nodes."""
    if num_nodes < 1:
        raise ConfigError("nodes.count", num_nodes, "expected at least 1 node")
