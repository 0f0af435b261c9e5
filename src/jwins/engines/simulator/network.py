"""Messages under way: each node's uplink, shared evenly or one message at a time, then latency."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from jwins.engines.node_group import Envelope, MessageArrived
from jwins.engines.simulator.fault_script import NO_FRAME_FAULT, FrameFault
from jwins.engines.simulator.queue import EventQueue, NodeEvent, TransferDone
from jwins.scenario import Links


@dataclass(frozen=True, slots=True)
class Flow:
    """A transfer on an uplink.

    Attributes:
        finish: value of the uplink's ``served`` at which the transfer ends.
        order: its number on this uplink; of transfers that end at the same time, the lower number is first.
        extra_s: additional seconds until it arrives, by a fault.
        dropped: whether it never arrives, by a fault.
    """

    finish: float
    order: int
    to: int
    envelope: Envelope
    extra_s: float
    dropped: bool


@dataclass(frozen=True, slots=True)
class UplinkState:
    """State of an uplink in a checkpoint; the fields are those of :class:`SimulatedUplink`."""

    time: float
    served: float
    version: int
    orders: int
    flows: tuple[Flow, ...]


@dataclass(slots=True)
class SimulatedUplink:
    """Fair sharing of one uplink: n simultaneous transfers each get 1/n of the rate.

    ``served`` counts the bits that a transfer would have sent if it had been under way all the time. So a
    transfer of b bits that begins now ends when ``served`` has grown by b, whatever other transfers begin and
    end in between. With ``in_turn`` it counts all sent bits, and a transfer ends b bits after the one before
    it.

    Attributes:
        rate: bits per second.
        in_turn: whether one transfer at a time gets the whole rate.
        in_order: whether transfers to one receiver follow each other, as on a connection.
        time: time of ``served``, in seconds on the clock.
        served: bits so far, as above.
        version: increases whenever transfers begin or end, so that an outdated :class:`TransferDone` is
            recognised.
        flows: a heap of (finish, order, transfer).
    """

    rate: float
    in_turn: bool = False
    in_order: bool = False
    time: float = 0.0
    served: float = 0.0
    version: int = 0
    orders: int = 0
    flows: list[tuple[float, int, Flow]] = field(default_factory=list)

    def add(self, now: float, bits: int, to: int, envelope: Envelope, extra_s: float, dropped: bool) -> None:
        """Begin a transfer of ``bits``."""
        self._advance(now)
        before = (f for f, _, flow in self.flows if self.in_turn or (self.in_order and flow.to == to))
        flow = Flow(max(before, default=self.served) + bits, self.orders, to, envelope, extra_s, dropped)
        heapq.heappush(self.flows, (flow.finish, flow.order, flow))
        self.orders += 1
        self.version += 1

    def next_time(self) -> float:
        """Return the end of the next transfer; there must be one."""
        return self.time + (self.flows[0][0] - self.served) * self._sharers / self.rate

    def pop(self, now: float) -> list[Flow]:
        """Remove and return the transfers that end at ``now``, which is ``next_time()``."""
        self.served = self.flows[0][0]
        self.time = now
        done = []
        while self.flows and self.flows[0][0] <= self.served:
            done.append(heapq.heappop(self.flows)[2])
        self.version += 1
        return done

    def clear(self, now: float) -> None:
        """Drop all unsent transfers, because the sender has crashed."""
        self._advance(now)
        self.flows.clear()
        self.version += 1

    def snapshot(self) -> UplinkState:
        """Return the state for :meth:`restore`."""
        flows = tuple(flow for _, _, flow in self.flows)
        return UplinkState(self.time, self.served, self.version, self.orders, flows)

    def restore(self, state: UplinkState) -> None:
        """Restore the state of :meth:`snapshot`."""
        self.time, self.served = state.time, state.served
        self.version, self.orders = state.version, state.orders
        self.flows = [(flow.finish, flow.order, flow) for flow in state.flows]
        heapq.heapify(self.flows)

    def _advance(self, now: float) -> None:
        if self.flows:
            self.served += (now - self.time) * self.rate / self._sharers
        self.time = now

    @property
    def _sharers(self) -> int:
        if self.in_order and not self.in_turn:
            return len({flow.to for _, _, flow in self.flows})
        return 1 if self.in_turn else len(self.flows)


class SimulatedNetwork:
    """Network that carries envelopes from node to node.

    Args:
        in_order: see :class:`SimulatedUplink`. Needed if nodes share before their last frame has left.
    """

    def __init__(self, links: Links, num_nodes: int, queue: EventQueue, *, in_order: bool = False) -> None:
        in_turn = links.sending == "in_turn"
        self.uplinks = [SimulatedUplink(links.bits_per_s(node), in_turn, in_order) for node in range(num_nodes)]
        self._latency_s = links.latency_ms * 1e-3
        self._queue = queue

    def send(
        self, now: float, envelope: Envelope, to: Iterable[int], frame_faults: Mapping[int, FrameFault]
    ) -> None:
        """Put an envelope on its sender's uplink, once for each receiver."""
        uplink, bits = self.uplinks[envelope.sender], 8 * envelope.packed.size_bytes
        # A transfer that has ended may not be handled yet, because the events of a window are handled at once.
        while uplink.flows and uplink.next_time() < now:
            self._arrive(uplink, uplink.next_time())
        for receiver in to:
            frame_fault = frame_faults.get(receiver, NO_FRAME_FAULT)
            uplink.add(now, bits, receiver, envelope, frame_fault.extra_s, frame_fault.dropped)
        self._queue.push(uplink.next_time(), TransferDone(envelope.sender, uplink.version))

    def advance(self, due: TransferDone, now: float) -> None:
        """Schedule the arrival, one latency later, of each frame that has left by ``now``."""
        uplink = self.uplinks[due.node]
        if due.version != uplink.version:
            return
        self._arrive(uplink, now)
        if uplink.flows:
            self._queue.push(uplink.next_time(), TransferDone(due.node, uplink.version))

    def _arrive(self, uplink: SimulatedUplink, now: float) -> None:
        for flow in uplink.pop(now):
            if not flow.dropped:
                arrival = NodeEvent(flow.to, MessageArrived(flow.envelope))
                self._queue.push(now + self._latency_s + flow.extra_s, arrival)

    def envelopes(self) -> Iterator[Envelope]:
        """Return the envelopes of unfinished transfers."""
        for uplink in self.uplinks:
            yield from (flow.envelope for _, _, flow in uplink.flows)
