"""Wait until all nodes that are up have reported a round."""

from __future__ import annotations

from collections.abc import Collection
from typing import Generic, TypeVar

T = TypeVar("T")


class Members:
    """Nodes of a simulation that are up, and the round in which each came up.

    Args:
        num_nodes: N; all are up from round 0 on.

    Attributes:
        down: the nodes that have crashed and not returned.
        joined: the round in which each node last returned; 0 if it was never down.
    """

    def __init__(self, num_nodes: int) -> None:
        self.restore(frozenset(), (0,) * num_nodes)

    def restore(self, down: Collection[int], joined: Collection[int]) -> None:
        """Take over ``down`` and ``joined`` of a checkpoint."""
        self.down, self.joined = set(down), list(joined)
        self._late = sum(map(bool, self.joined))  # number of nodes that joined after round 0

    def rejoin(self, node: int, round: int) -> None:
        """Mark a node that was down as up from ``round`` on."""
        self.down.discard(node)
        self._late += not self.joined[node]
        self.joined[node] = round

    @property
    def all_down(self) -> bool:
        """Return whether no node is up."""
        return len(self.down) == len(self.joined)

    @property
    def up(self) -> frozenset[int]:
        """Return the nodes that are up."""
        return frozenset(range(len(self.joined))) - self.down

    def expected(self, round: int) -> set[int]:
        """Return the nodes that have completed ``round`` rounds, or still will."""
        return {node for node in self.up if self.joined[node] < max(round, 1)}

    def are_all(self, nodes: Collection[int], round: int) -> bool:
        """Return whether ``nodes`` contains all nodes that :meth:`expected` returns.

        It compares the counts first: with thousands of nodes, comparing the sets each time is slow.
        """
        least = len(self.joined) - len(self.down) - self._late
        return len(nodes) >= least and self.expected(round) <= set(nodes)


class Barrier(Generic[T]):
    """Reports of nodes by round, kept until all nodes that will complete the round have reported it.

    Attributes:
        reports: by number of completed rounds, then by node.
    """

    def __init__(self, members: Members) -> None:
        self._members = members
        self.reports: dict[int, dict[int, T]] = {}

    def report(self, round: int, node: int, value: T) -> None:
        """Add one node's report."""
        self.reports.setdefault(round, {})[node] = value

    def take(self, round: int) -> dict[int, T] | None:
        """Return the reports of ``round`` by node, and forget them; None while some are missing."""
        if not self._members.are_all(self.reports[round], round):
            return None
        return self.reports.pop(round)
