"""Play a script of faults: find the due ones, and remember those that have happened."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from jwins.scenario import Fault, Faults


class FrameFault(NamedTuple):
    """Fault of a frame on its way to one receiver.

    Attributes:
        extra_s: additional seconds until it arrives.
        dropped: whether it uses the uplink but never arrives.
    """

    extra_s: float = 0.0
    dropped: bool = False


NO_FRAME_FAULT = FrameFault()


class FaultScript:
    """Player of scripted faults; it plays each crash and rejoin once."""

    def __init__(self, faults: Faults) -> None:
        self._of_nodes: list[tuple[int, Fault]] = []
        self._of_frames: dict[tuple[int, int], list[Fault]] = {}
        for number, fault in enumerate(faults.script):
            if fault.kind in ("crash", "rejoin"):
                self._of_nodes.append((number, fault))
            else:
                self._of_frames.setdefault((fault.node, fault.round), []).append(fault)
        self.fired: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._of_nodes or self._of_frames)

    def on_train(self, node: int, round: int, crashed: Collection[int]) -> Iterator[Fault]:
        """Return the rejoins that are due when a node is about to train a round, and its own crash.

        Args:
            node: node that is about to train.
            round: the round.
            crashed: nodes that are down; read again for each fault, so it may change in between.
        """
        for number, fault in self._of_nodes:
            back = fault.kind == "rejoin" and fault.node in crashed
            down = fault.kind == "crash" and fault.node == node
            if (back or down) and number not in self.fired and fault.round <= round:
                self.fired.add(number)
                yield fault

    def on_send(self, node: int, round: int, to: Iterable[int]) -> dict[int, FrameFault]:
        """Return the faults of an update, by receiver."""
        faults = self._of_frames.get((node, round))
        if faults is None:
            return {}
        found = {}
        for receiver in to:
            if hit := [fault for fault in faults if fault.receiver in (None, receiver)]:
                extra_s = sum(fault.seconds for fault in hit if fault.kind == "delay")
                found[receiver] = FrameFault(extra_s, any(fault.kind == "drop" for fault in hit))
        return found
