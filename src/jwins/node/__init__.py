"""One node's rounds as a state machine without I/O: events in, commands out (state_machine.py)."""

from __future__ import annotations

from jwins.node.commands import (
    Checkpoint,
    Command,
    Evaluate,
    Finished,
    FrameRefused,
    RequestKeyframe,
    Send,
    Train,
    WakeAt,
)
from jwins.node.events import (
    Event,
    FrameReceived,
    KeyframeRequested,
    PeerLost,
    PeerUp,
    Rejoin,
    RosterChanged,
    Stop,
    Tick,
    TimedOut,
    Trained,
)
from jwins.node.inbox import over_budget
from jwins.node.rules import FREE_FRAMES, MAX_MAGNITUDE_RATIO, MAX_ROUNDS_AHEAD, Rules, Staleness
from jwins.node.state import STATE_TYPES, NodeState, Phase
from jwins.node.state_machine import Node

__all__ = [
    "FREE_FRAMES",
    "MAX_MAGNITUDE_RATIO",
    "MAX_ROUNDS_AHEAD",
    "STATE_TYPES",
    "Checkpoint",
    "Command",
    "Evaluate",
    "Event",
    "Finished",
    "FrameReceived",
    "FrameRefused",
    "KeyframeRequested",
    "Node",
    "NodeState",
    "PeerLost",
    "PeerUp",
    "Phase",
    "Rejoin",
    "RequestKeyframe",
    "RosterChanged",
    "Rules",
    "Send",
    "Staleness",
    "Stop",
    "Tick",
    "TimedOut",
    "Train",
    "Trained",
    "WakeAt",
    "over_budget",
]
