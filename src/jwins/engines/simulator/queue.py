"""Events of the virtual clock in the order of time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jwins.engines.node_group import NodeGroupEvent, ScheduledEvent


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """A future event of a node."""

    node: int
    event: NodeGroupEvent

    def at(self, time: float) -> ScheduledEvent:
        """Return the event with its time."""
        return ScheduledEvent(self.node, time, self.event)


@dataclass(frozen=True, slots=True)
class TransferDone:
    """End of the next transfer of a node's uplink; outdated if the version has changed.

    Attributes:
        version: version of the uplink when this was scheduled.
    """

    node: int
    version: int


QueueItem = NodeEvent | TransferDone
QueueEntry = tuple[float, int, QueueItem]


@dataclass(frozen=True, slots=True)
class QueueState:
    """State of a queue in a checkpoint."""

    sequence: int
    entries: tuple[QueueEntry, ...]


class EventQueue:
    """Queue of items by time; items of the same time keep the order in which they were pushed."""

    def __init__(self) -> None:
        self._entries: list[QueueEntry] = []
        self._sequence = 0

    def __bool__(self) -> bool:
        return bool(self._entries)

    def push(self, at: float, item: QueueItem) -> None:
        """Add an item at ``at`` seconds."""
        heapq.heappush(self._entries, (at, self._sequence, item))
        self._sequence += 1

    def pop_window(self, length_s: float) -> list[tuple[float, QueueItem]]:
        """Remove and return the next item, and all others less than ``length_s`` later."""
        at, _, item = heapq.heappop(self._entries)
        window, end = [(at, item)], at + length_s
        while self._entries and self._entries[0][0] < end:
            at, _, item = heapq.heappop(self._entries)
            window.append((at, item))
        return window

    def keep(self, wanted: Callable[[QueueItem], bool]) -> None:
        """Drop all other items."""
        self._entries = [entry for entry in self._entries if wanted(entry[2])]
        heapq.heapify(self._entries)

    def items(self) -> Sequence[QueueItem]:
        """Return all items, in no particular order."""
        return [item for _, _, item in self._entries]

    def snapshot(self) -> QueueState:
        """Return the state for :meth:`restore`."""
        return QueueState(self._sequence, tuple(self._entries))

    def restore(self, state: QueueState) -> None:
        """Restore the state of :meth:`snapshot`."""
        self._sequence = state.sequence
        self._entries = list(state.entries)
        heapq.heapify(self._entries)
