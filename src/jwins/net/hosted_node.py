"""The only node of a node group, driven by a session."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from jwins.engines.node_group import Envelope, MessageArrived, NodeGroup, ScheduledEvent
from jwins.node import Phase, Rejoin
from jwins.wire.frame import Frame, FrameHeader, Message, Packed


class HostedNode:
    """The only node of a node group, driven by a session.

    Args:
        group: node group with this node only.
    """

    def __init__(self, group: NodeGroup) -> None:
        self.group, self.rules = group, group.rules
        (self.id,) = group.nodes
        self._machine = group.machine(self.id)
        self._envelopes = 0

    @property
    def round(self) -> int:
        """Return the number of completed rounds."""
        return self._machine.round

    @property
    def waiting_for(self) -> tuple[int, ...] | None:
        """Return the neighbours whose frame of this round is missing; None while the node does not wait."""
        return self._machine.waiting_for if self._machine.phase is Phase.WAITING else None

    @property
    def awaited(self) -> tuple[int, ...]:
        """Return the neighbours whose frame of this round is missing."""
        return self._machine.waiting_for

    @property
    def merged_with(self) -> tuple[int, ...]:
        """Return the neighbours that had a weight in the newest merge."""
        return self._machine.merged_with

    @property
    def params(self) -> Tensor:
        """Return the parameters, (P,) float32, on the CPU."""
        return self.group.parameters(self.id)

    def start(self, now: float) -> list[Any]:
        """Begin the node's current round."""
        return list(self.group.start(now)[self.id])

    def handle(self, event: Any, now: float) -> list[Any]:
        """Deliver an event to the node, and return its commands."""
        if isinstance(event, Rejoin) and event.params is not None:
            event = replace(event, params=event.params.to(self._machine.params.device))
        (commands,) = self.group.handle([ScheduledEvent(self.id, now, event)])
        return list(commands)

    def objection(self, frame: FrameHeader) -> str | None:
        """Return why the node cannot take a frame, by its header, or None."""
        return self._machine.objection(frame)

    def max_frames(self, frame: FrameHeader) -> int:
        """Return the largest number of frames like this one that may wait."""
        return self._machine.max_frames(frame)

    def read(self, peer: int, data: bytes) -> tuple[Message, Any]:
        """Decode a message, and make the event that delivers it to the node."""
        self._envelopes += 1
        envelope = Envelope(self._envelopes, peer, Packed(data, 0, 0))
        message = self.group.read(envelope)
        if isinstance(message, Frame):
            message.update.largest()  # computed here, where a lack of memory is the peer's fault
        return message, MessageArrived(envelope)
