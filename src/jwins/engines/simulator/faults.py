"""A script of what goes wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jwins.errors import ConfigError

__all__ = ["Fault", "Faults"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, or right again.

    Attributes:
        kind: ``crash`` and ``rejoin`` of ``node`` at the start of ``round``; ``drop`` and ``delay`` of the
            frame that ``node`` sends in ``round``.
        node: who.
        round: when.
        receiver: only the frame to this node; None for all.
        seconds: of a delay.
    """

    kind: Literal["crash", "rejoin", "drop", "delay"]
    node: int
    round: int
    receiver: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Faults:
    """A script of faults.

    >>> Faults().crash(node=1, round=4).rejoin(node=1, round=8).drop(sender=2, round=3).kinds()
    ['crash', 'rejoin', 'drop']
    """

    script: tuple[Fault, ...] = ()

    def crash(self, node: int, round: int) -> Faults:
        """The node dies when it is about to train ``round``; what it had sent arrives."""
        return self._and(Fault("crash", node, round))

    def rejoin(self, node: int, round: int) -> Faults:
        """A crashed node is back when the first of the others begins ``round``, with its state of the crash."""
        return self._and(Fault("rejoin", node, round))

    def drop(self, sender: int, round: int, receiver: int | None = None) -> Faults:
        """The frame is sent, its bytes count, and it never arrives."""
        return self._and(Fault("drop", sender, round, receiver))

    def delay(self, sender: int, round: int, seconds: float, receiver: int | None = None) -> Faults:
        """The frame arrives ``seconds`` later."""
        return self._and(Fault("delay", sender, round, receiver, seconds))

    def kinds(self) -> list[str]:
        """The kinds in order."""
        return [fault.kind for fault in self.script]

    def check(self, num_nodes: int, rounds: int, deadline_s: float | None) -> None:
        """Raise a ConfigError for a script that cannot be played."""
        down: dict[int, int] = {}
        for index, fault in enumerate(self.script):
            where = f"faults[{index}]"
            for name, node in (("node", fault.node), ("receiver", fault.receiver)):
                if node is not None and not 0 <= node < num_nodes:
                    raise ConfigError(f"{where}.{name}", node, f"expected a node, 0 to {num_nodes - 1}")
            if fault.receiver == fault.node:
                problem = "is the sender itself, which sends itself nothing; name another node"
                raise ConfigError(f"{where}.receiver", fault.receiver, problem)
            if not 0 <= fault.round < rounds:
                raise ConfigError(f"{where}.round", fault.round, f"expected a round, 0 to {rounds - 1}")
            if fault.kind == "drop" and deadline_s is None:
                raise ConfigError(
                    f"{where}.kind",
                    "drop",
                    "the receiver would wait for ever; set run.deadline_s to a number of seconds",
                )
            if fault.kind == "delay" and not (fault.seconds > 0 and math.isfinite(fault.seconds)):
                raise ConfigError(f"{where}.seconds", fault.seconds, "expected seconds above 0")
        for fault in sorted(self.script, key=lambda f: f.round):
            if fault.kind == "crash":
                if fault.node in down:
                    raise ConfigError("faults", fault.node, "the node crashes twice without a rejoin between")
                down[fault.node] = fault.round
            if fault.kind == "rejoin" and not down.pop(fault.node, rounds) < fault.round:
                raise ConfigError("faults", fault.node, "the node rejoins without a crash in an earlier round")

    def _and(self, fault: Fault) -> Faults:
        return Faults((*self.script, fault))
