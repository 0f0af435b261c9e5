"""Rounds in which only some of the nodes take part."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from jwins.rng import stream
from jwins.topology.graph import Graph, Topology


@dataclass(frozen=True)
class Participation:
    """A topology in which a fixed share of the nodes takes part in each round, drawn from the seed.

    A node that does not take part neither trains nor exchanges anything. Edges between the others keep their
    mixing weights, so that the weights stay doubly stochastic.

    Attributes:
        topology: topology of all nodes.
        share: share of the nodes that take part, rounded to a whole number of at least 1.
        seed: seed of the experiment.

    >>> from jwins.topology import Ring
    >>> ring = Participation(Ring(num_nodes=8, seed=1), 0.5, seed=1)
    >>> sorted(ring.active(0)), sorted(ring.active(1))
    ([3, 4, 5, 6], [0, 4, 6, 7])
    """

    topology: Topology
    share: float
    seed: int
    _graphs: dict[int, tuple[Graph, Graph]] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    @property
    def num_nodes(self) -> int:
        """Return the number of nodes."""
        return self.topology.num_nodes

    def active(self, round: int) -> frozenset[int]:
        """Return the nodes that take part in a round."""
        return _drawn(self.seed, self.num_nodes, max(1, int(self.share * self.num_nodes + 0.5)), round)

    def at(self, round: int) -> Graph:
        """Return the graph of a round: the edges between nodes that take part."""
        whole = self.topology.at(round)
        known = self._graphs.get(round)
        if known is not None and known[0] is whole:
            return known[1]
        active = self.active(round)
        graph = replace(
            whole,
            senders=tuple(
                {j: weight for j, weight in row.items() if j in active} if i in active else {}
                for i, row in enumerate(whole.senders)
            ),
            recipients=tuple(
                tuple(j for j in row if j in active) if i in active else ()
                for i, row in enumerate(whole.recipients)
            ),
        )
        while len(self._graphs) >= _GRAPHS:  # threads may do so at once
            self._graphs.pop(next(iter(self._graphs)), None)
        self._graphs[round] = whole, graph
        return graph


_GRAPHS = 8
"""Graphs that are remembered: nodes are few rounds apart."""


@lru_cache(maxsize=256)
def _drawn(seed: int, num_nodes: int, count: int, round: int) -> frozenset[int]:
    drawn = stream(seed, "participation", round=round).choice(num_nodes, count, replace=False)
    return frozenset(drawn.tolist())
