"""Commands of a node, which its driver runs.

They hold numbers and bytes, no tensors: a command refers to the model in ``Node.params`` at that time.
"""

from __future__ import annotations

from dataclasses import dataclass

from jwins.wire.frame import Packed


@dataclass(frozen=True, slots=True)
class Train:
    """Train ``round`` from the node's parameters, then report :class:`Trained`."""

    round: int


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    """Send the same bytes to each of ``to``.

    Attributes:
        to: receivers, increasing.
        round: round of the update.
        packed: the frame.
        keyframe: whether it carries a keyframe in place of the round's update.
    """

    to: tuple[int, ...]
    round: int
    packed: Packed
    keyframe: bool

    def in_turn(self, node: int) -> tuple[int, ...]:
        """Return the receivers in the order in which ``node`` sends to one at a time.

        Receivers with a higher number are first, then the others from 0. So no node is last for all neighbours.

        >>> Send((1, 3, 8), round=0, packed=Packed(b"", 0, 0), keyframe=False).in_turn(node=2)
        (3, 8, 1)
        """
        return tuple(sorted(self.to, key=lambda receiver: (receiver < node, receiver)))


@dataclass(frozen=True, slots=True, eq=False)
class RequestKeyframe:
    """Ask the node ``to`` for its keyframe; ``packed`` is the request."""

    to: int
    packed: Packed


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Measure the node's parameters, its model after ``round`` completed rounds."""

    round: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Request for a checkpoint: ``round`` rounds are complete."""

    round: int


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send a :class:`Tick` at ``time`` (seconds, on the clock of ``now``) or later."""

    time: float


@dataclass(frozen=True, slots=True)
class FrameRefused:
    """A frame was refused, without any effect on the node.

    Attributes:
        sender: sender of the frame.
        round: the sender's round.
        reason: reason as text.
        inflated: whether a value is larger than an honest node sends; it may also be damaged.
    """

    sender: int
    round: int
    reason: str
    inflated: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The node has finished or failed; its parameters are the result.

    Attributes:
        status: ``finished``, ``stopped``, or ``diverged`` if parameters stopped being finite (or grew beyond
            :data:`MAX_PARAMETER`).
        round: completed rounds.
        reason: reason as text, unless it finished.
    """

    status: str
    round: int
    reason: str = ""


Command = Train | Send | RequestKeyframe | Evaluate | Checkpoint | WakeAt | FrameRefused | Finished
