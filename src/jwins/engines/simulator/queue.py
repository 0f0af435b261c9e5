"""Events under way, and the fair share of an uplink."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from jwins.wire.frame import Frame, KeyRequest


@dataclass(slots=True, eq=False)
class Parcel:
    """Bytes under way, shared by all their receivers, and what they decode to once they arrive."""

    sender: int
    data: bytes
    message: Frame | KeyRequest | None = None


@dataclass(frozen=True, slots=True)
class TrainedDue:
    """A node's local training is over."""

    node: int
    round: int


@dataclass(frozen=True, slots=True)
class UplinkDue:
    """The next transfer of a node's uplink is through, unless its version has changed."""

    node: int
    version: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """A parcel reaches its receiver."""

    node: int
    parcel: Parcel


@dataclass(frozen=True, slots=True)
class TickDue:
    """A node asked to be woken."""

    node: int


@dataclass(frozen=True, slots=True)
class LossNoticed:
    """A node notices that a peer is gone."""

    node: int
    peer: int


Item = TrainedDue | UplinkDue | Arrival | TickDue | LossNoticed


@dataclass(frozen=True, slots=True)
class Flow:
    """A transfer on an uplink; ``finish`` is on the uplink's own scale of bits served per flow."""

    finish: float
    order: int
    to: int
    parcel: Parcel
    extra_s: float
    dropped: bool


@dataclass(slots=True)
class Uplink:
    """Fluid fair share of one uplink: n simultaneous transfers each get 1/n of the rate.

    ``served`` counts the bits that each transfer present all the time would have got, so a transfer of b bits
    that joins now is through when ``served`` has grown by b, whoever comes and goes in between.
    """

    rate: float
    time: float = 0.0
    served: float = 0.0
    version: int = 0
    orders: int = 0
    flows: list[tuple[float, int, Flow]] = field(default_factory=list)

    def add(self, now: float, bits: int, to: int, parcel: Parcel, extra_s: float, dropped: bool) -> None:
        """A transfer of ``bits`` begins."""
        self._advance(now)
        flow = Flow(self.served + bits, self.orders, to, parcel, extra_s, dropped)
        heapq.heappush(self.flows, (flow.finish, flow.order, flow))
        self.orders += 1
        self.version += 1

    def next_time(self) -> float:
        """When the next transfer is through; there must be one."""
        return self.time + (self.flows[0][0] - self.served) * len(self.flows) / self.rate

    def pop(self, now: float) -> list[Flow]:
        """The transfers that are through at ``now``, which is ``next_time()``."""
        self.served = self.flows[0][0]
        self.time = now
        done = []
        while self.flows and self.flows[0][0] <= self.served:
            done.append(heapq.heappop(self.flows)[2])
        self.version += 1
        return done

    def clear(self, now: float) -> None:
        """The sender is gone, and what it had not sent with it."""
        self._advance(now)
        self.flows.clear()
        self.version += 1

    def _advance(self, now: float) -> None:
        if self.flows:
            self.served += (now - self.time) * self.rate / len(self.flows)
        self.time = now
