"""State of a node: its phase, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

from jwins.sharing.update import Quantized, Sampled, Update
from jwins.wire.frame import Frame, Packed


class Phase(StrEnum):
    """Phase of a node."""

    NEW = "new"
    TRAINING = "training"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, eq=False)
class NodeState:
    """State of a node in a checkpoint, with which it can continue after a restart; by default, a new one.

    Attributes:
        phase: a :class:`Phase`, as a string.
        round: current round = completed rounds.
        params: (P,) parameters at the start of the round, or after training while waiting.
        sharing: the algorithm's state.
        inbox: frames that wait for a merge, by (sender, round).
        down: peers that are down.
        expected_from: first round of each peer that came up later.
        informed: peers to which this node's latest update or keyframe was sent, so that they have its replica.
        outgoing: the frame of the current round, while waiting.
        shared: round of the last share, or None.
        sent_bytes: length of the previous update's frame.
        deadline: deadline on the clock of ``now``, while waiting, if there is one.
        stopping: whether :class:`Stop` was received.
        replica_rounds: round of this node's replica at each peer that has requested increments.
        answered: round in which each such peer was last sent increments, or a keyframe in their place.
        spread: standard deviation of each parameter over the models that an attacker last received.
        momentum: (P,) of the outer optimizer; None before its first step, or without one.
        merged: (P,) in an asynchronous run, the model after the newest merge; None before it.
        merged_rounds: of each sender in an asynchronous run, this node's round of the newest merge of its
            update, and the round of that update.
        round_began: start of the round in an asynchronous run, on the clock of ``now``.
    """

    phase: str
    round: int
    params: Tensor
    sharing: Any
    inbox: Mapping[tuple[int, int], Frame] = field(default_factory=dict)
    down: frozenset[int] = frozenset()
    expected_from: Mapping[int, int] = field(default_factory=dict)
    informed: frozenset[int] = frozenset()
    outgoing: Packed | None = None
    shared: int | None = None
    sent_bytes: int = 0
    deadline: float | None = None
    stopping: bool = False
    replica_rounds: Mapping[int, int] = field(default_factory=dict)
    answered: Mapping[int, int] = field(default_factory=dict)
    spread: Tensor | None = None
    momentum: Tensor | None = None
    merged: Tensor | None = None
    merged_rounds: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    round_began: float = 0.0


STATE_TYPES: tuple[type, ...] = (NodeState, Frame, Packed, Quantized, Sampled, Update)
"""Types in a node's state in a checkpoint, besides the ``state_types`` of its algorithm."""
