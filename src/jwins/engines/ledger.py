"""Who has sent how many bytes to whom, split by what they carried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from jwins.runfiles.rows import Traffic, TrafficSplit
from jwins.wire.frame import Packed

__all__ = ["Ledger", "Purpose", "total"]

Purpose = Literal["update", "key", "control"]
_COLUMN = {name: index for index, name in enumerate(TrafficSplit.KINDS)}


class Ledger:
    """Counts every message once per recipient.

    Args:
        edges: what has been counted before, by (source, target); as :meth:`snapshot` gave it.
    """

    def __init__(self, edges: Mapping[tuple[int, int], tuple[int, ...]] | None = None) -> None:
        self._edges = {edge: list(columns) for edge, columns in (edges or {}).items()}
        self._nodes: dict[int, list[int]] = {}
        self._total = sum(map(sum, self._edges.values()))
        for (source, _), columns in self._edges.items():
            own = self._nodes.setdefault(source, [0] * len(_COLUMN))
            for index, size_bytes in enumerate(columns):
                own[index] += size_bytes

    def count(self, source: int, target: int, packed: Packed, purpose: Purpose) -> None:
        """One message from one node to another.

        Args:
            source: who sends it.
            target: who is to get it, whether it arrives or not.
            packed: the message; of an update, positions, values and the rest are counted apart.
            purpose: what it is for.
        """
        empty = [0] * len(_COLUMN)
        edge = self._edges.setdefault((source, target), empty.copy())
        node = self._nodes.setdefault(source, empty)
        if purpose == "update":
            spent: Mapping[str, int] = {
                "positions": packed.positions_bytes,
                "values": packed.values_bytes,
                "header": packed.header_bytes,
            }
        else:
            spent = {purpose: packed.size_bytes}
        for kind, size_bytes in spent.items():
            column = _COLUMN[kind]
            self._total += size_bytes
            edge[column] += size_bytes
            node[column] += size_bytes

    def sent(self, node: int) -> TrafficSplit:
        """All that a node has sent."""
        return TrafficSplit(*self._nodes.get(node, ()))

    def total_bytes(self) -> int:
        """All that all nodes have sent."""
        return self._total

    def edges(self) -> list[Traffic]:
        """By directed edge, in the order of (source, target)."""
        return [
            Traffic(source, target, TrafficSplit(*columns))
            for (source, target), columns in sorted(self._edges.items())
        ]

    def snapshot(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """What the constructor takes."""
        return {edge: tuple(columns) for edge, columns in self._edges.items()}


def total(splits: Iterable[TrafficSplit]) -> TrafficSplit:
    """The sum of some."""
    return sum(splits, TrafficSplit())
