"""Bytes between each pair of nodes, by kind."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from jwins.run_folder.rows import Traffic, TrafficSplit
from jwins.wire.frame import Packed

Purpose = Literal["update", "keyframe", "control"]
_COLUMN_OF = {name: index for index, name in enumerate(TrafficSplit.KINDS)}
_UPDATE_COLUMNS = tuple(_COLUMN_OF[name] for name in ("positions", "values", "header"))


class TrafficCounter:
    """Counter of bytes: every message counts once per recipient.

    Args:
        edges: earlier counts by (source, target), from :meth:`snapshot`.
    """

    def __init__(self, edges: Mapping[tuple[int, int], tuple[int, ...]] | None = None) -> None:
        self._edges: dict[int, dict[int, list[int]]] = {}
        self._nodes: dict[int, list[int]] = {}
        self._total = 0
        for (source, target), columns in (edges or {}).items():
            self._add(source, (target,), tuple(enumerate(columns)))

    def count(self, source: int, targets: Collection[int], packed: Packed, purpose: Purpose) -> None:
        """Count one message from one node to some others, whether it arrives or not; an update by its parts."""
        if purpose == "update":
            sizes = (packed.positions_bytes, packed.values_bytes, packed.header_bytes)
            self._add(source, targets, tuple(zip(_UPDATE_COLUMNS, sizes, strict=True)))
        else:
            self._add(source, targets, ((_COLUMN_OF[purpose], packed.size_bytes),))

    def _add(self, source: int, targets: Collection[int], spent: Iterable[tuple[int, int]]) -> None:
        """Add ``spent`` bytes by column, for each of the targets."""
        edges = self._edges.setdefault(source, {})
        node = self._nodes.setdefault(source, [0] * len(_COLUMN_OF))
        for column, size_bytes in spent:
            node[column] += size_bytes * len(targets)
            self._total += size_bytes * len(targets)
        for target in targets:
            edge = edges.get(target)
            if edge is None:
                edge = edges[target] = [0] * len(_COLUMN_OF)
            for column, size_bytes in spent:
                edge[column] += size_bytes

    def sent(self, node: int) -> TrafficSplit:
        """Return all bytes that a node has sent."""
        return TrafficSplit(*self._nodes.get(node, ()))

    def total_bytes(self) -> int:
        """Return all bytes that all nodes have sent."""
        return self._total

    def edges(self) -> list[Traffic]:
        """Return bytes by directed edge, in the order of (source, target)."""
        return [
            Traffic(source, target, TrafficSplit(*columns))
            for source, own in sorted(self._edges.items())
            for target, columns in sorted(own.items())
        ]

    def snapshot(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """Return the arguments of the constructor."""
        return {
            (source, target): tuple(columns)
            for source, own in self._edges.items()
            for target, columns in own.items()
        }
