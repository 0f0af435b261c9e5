"""Events and commands of a session, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from jwins.engines.node_group import TrainingDone
from jwins.net.membership import Change
from jwins.net.transport_interface import Connected, Disconnected, KeyUsedElsewhere, MessageReceived

__all__ = [
    "Command",
    "Connected",
    "Disconnected",
    "Ended",
    "Event",
    "Failed",
    "KeepCut",
    "KeyUsedElsewhere",
    "Measure",
    "MessageReceived",
    "NotQueued",
    "LogLine",
    "MembersChanged",
    "SaveCheckpoint",
    "StartTraining",
    "TimePassed",
    "TrainingDone",
    "Transmit",
]


@dataclass(frozen=True, slots=True)
class NotQueued:
    """Failure of a :class:`Transmit`: the transport had no room for a message, or no connection."""

    peer: int
    label: str
    round: int = -1


@dataclass(frozen=True, slots=True)
class MembersChanged:
    """A change of the members."""

    change: Change


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Passage of time without another event; the session checks timeouts and tries again to send."""


Event: TypeAlias = (
    Connected
    | Disconnected
    | KeyUsedElsewhere
    | MessageReceived
    | TrainingDone
    | NotQueued
    | MembersChanged
    | TimePassed
)


@dataclass(frozen=True, slots=True)
class Transmit:
    """Hand a message to the transport.

    Attributes:
        peer: the receiver.
        data: the message.
        label: ``frame``, ``hello``, ``state`` or ``control``.
        round: round of a frame.
        beside: whether it goes in pieces between other messages.
    """

    peer: int
    data: bytes
    label: str
    round: int = -1
    beside: bool = False


@dataclass(frozen=True, slots=True)
class StartTraining:
    """Train in the background, then report :class:`TrainingDone`."""

    round: int


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure the node's model after this number of completed rounds."""

    round: int


@dataclass(frozen=True, slots=True)
class SaveCheckpoint:
    """Save node and session."""

    round: int


@dataclass(frozen=True, slots=True)
class KeepCut:
    """Record for later processes that a peer was cut off, and why."""

    peer: int
    reason: str


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of the log."""

    level: str
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ended:
    """The node is done; write its result before anything else is carried out."""

    status: str
    round: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The node cannot continue."""

    reason: str


Command: TypeAlias = Transmit | StartTraining | Measure | SaveCheckpoint | KeepCut | LogLine | Ended | Failed
