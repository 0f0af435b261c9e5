"""Mapping of ids to indices: a driver uses indices, the ranks of ids in the roster; a transport uses ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jwins.net.transport_interface import LinkEvent, LinkReport, Transport


class IndexMap:
    """A transport that names peers by their index.

    Args:
        transport: transport that uses ids.
        ids: ids of all members, increasing.
    """

    def __init__(self, transport: Transport, ids: Sequence[int]) -> None:
        self._transport = transport
        self.ids = tuple(ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the ids of all members; more may be appended."""
        return self._ids

    @ids.setter
    def ids(self, ids: Sequence[int]) -> None:
        self._ids = tuple(ids)
        self._indices = {member: index for index, member in enumerate(self._ids)}

    def start(self) -> None:
        """Begin to listen and to dial."""
        self._transport.start()

    def send(self, peer: int, data: bytes, *, beside: bool = False) -> bool:
        """Queue a message; never blocks."""
        return self._transport.send(self._ids[peer], data, beside=beside)

    def poll(self, timeout_s: float | None) -> LinkEvent | None:
        """Return the next event, with indices for ids."""
        event = self._transport.poll(timeout_s)
        if event is None or event.peer not in self._indices:
            return None
        return replace(event, peer=self._indices[event.peer])

    def wake(self) -> None:
        """Make ``poll`` return None at once."""
        self._transport.wake()

    def close(self, flush_s: float = 5.0) -> None:
        """End all connections."""
        self._transport.close(flush_s)

    def report(self) -> Mapping[int, LinkReport]:
        """Return the state of each peer's connection, by index."""
        found = self._transport.report()
        return {self._indices[member]: r for member, r in found.items() if member in self._indices}
