"""Frames that wait for a node's merge, and the limits on what may wait."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from jwins.node.commands import FrameRefused
from jwins.node.rules import FREE_FRAMES, MAX_ROUNDS_AHEAD, Rules
from jwins.sharing.own_scale import OwnScale, scale_of
from jwins.wire.frame import ROSTER_VERSIONS, Frame, FrameHeader

BYTES_PER_VALUE = 16
"""Memory of a position, a value and their decoded form."""

FRAMES_OF_STRANGERS = 2
"""Frames that may wait although their sender is not a neighbour: a newer roster may make it one, from this
round or the next."""

INFLATION = 100.0
"""No honest node exceeds the limit of ``Rules.max_growth`` by this factor, even if another node has inflated
its model, because it merges nothing beyond the limit."""


class Inbox:
    """The frames that wait for a node's merge.

    Args:
        node: the node.
        rules: common rules of all nodes of the run.
        update_dim: dimension of its updates.
        frames: frames that wait already, by (sender, round).
        scale: scale of the node's own values, for ``Rules.max_growth``; None for no limit.

    Attributes:
        frames: as above.
        scale: as above.
    """

    def __init__(
        self,
        node: int,
        rules: Rules,
        update_dim: int,
        frames: Mapping[tuple[int, int], Frame],
        scale: OwnScale | None,
    ) -> None:
        self._node, self._rules, self._update_dim = node, rules, update_dim
        self.frames, self.scale = dict(frames), scale

    def add(self, frame: Frame) -> None:
        """Keep a frame; a keyframe replaces an update of its round, which did not match."""
        if self._rules.asynchronous and not self._rules.sharing.remembers_peers:
            frame = self._joined(frame)
        there = self.frames.get((frame.sender, frame.round))
        if there is None or (frame.keyframe and not there.keyframe):
            self.frames[frame.sender, frame.round] = frame

    def take(self, round: int) -> list[Frame]:
        """Remove and return the frames that a merge in ``round`` needs, by (sender, round)."""
        due = sorted((j, r) for j, r in self.frames if self._rules.asynchronous or r <= round)
        return [self.frames.pop(name) for name in due]

    def refused(self, frame: Frame, round: int, params: Tensor) -> FrameRefused | None:
        """Return the refusal of a frame, or None if it can be accepted.

        Args:
            frame: the frame.
            round: the node's round.
            params: (P,), its model.
        """
        reason = (
            self.objection(frame, round) or self._over_budget(frame, round) or self._unusable(frame, params)
        )
        if reason is None:
            return None
        largest = frame.update.largest() if self.scale is not None else 0.0
        inflated = math.isfinite(largest) and largest > INFLATION * self._most()
        return FrameRefused(frame.sender, frame.round, reason, inflated)

    def objection(self, frame: Frame | FrameHeader, round: int) -> str | None:
        """Return why a frame cannot be accepted in the node's ``round``, by its header, or None."""
        rules = self._rules
        if not 0 <= frame.sender < rules.topology.num_nodes or frame.sender == self._node:
            return "the sender is not another node of this topology"
        if not 0 <= frame.round < rules.rounds:
            return f"the run has {rules.rounds} rounds"
        if not rules.asynchronous and frame.round > round + rules.rounds_ahead:
            return f"{frame.round - round} rounds ahead; at most {rules.rounds_ahead} are kept"
        # A sender with another roster may be a neighbour in a graph that this node does not know yet.
        if not self._is_neighbour(frame) and frame.roster_version == roster_version(rules, frame.round):
            return "the sender is not a neighbour in that round"
        return None

    def max_frames(self, frame: Frame | FrameHeader) -> int:
        """Return the largest number of this sender's frames that may wait for a merge."""
        return self._rules.inbox_frames if self._is_neighbour(frame) else FRAMES_OF_STRANGERS

    def _joined(self, frame: Frame) -> Frame:
        """Join a frame with the sender's frames that still wait: at each position the newest value counts."""
        for name in sorted(name for name in self.frames if name[0] == frame.sender):
            waiting = self.frames.pop(name)
            older, newer = sorted((waiting, frame), key=lambda one: one.round)
            frame = replace(newer, update=newer.update.over(older.update))
        return frame

    def _is_neighbour(self, frame: Frame | FrameHeader) -> bool:
        return frame.sender in self._rules.topology.at(frame.round).senders[self._node]

    def _over_budget(self, frame: Frame, round: int) -> str | None:
        """Return why no further frame of a sender may wait for a merge, or None."""
        if math.isinf(self._rules.inbox_bytes) or (frame.round == round and self._is_neighbour(frame)):
            return None  # the node waits for this frame, however many late ones came before it
        if not self._rules.asynchronous and frame.round < round - MAX_ROUNDS_AHEAD:
            return f"{round - frame.round} rounds old; at most {MAX_ROUNDS_AHEAD} are accepted"
        waiting = [f for (sender, at), f in self.frames.items() if sender == frame.sender and at != frame.round]
        counts = [f.update.count for f in waiting]
        return over_budget(counts, frame.update.count, self.max_frames(frame), self._rules.inbox_bytes)

    def _unusable(self, frame: Frame, params: Tensor) -> str | None:
        """Return why a frame's values cannot be merged, or None."""
        update = frame.update
        if update.dim != self._update_dim:
            return f"an update of dimension {update.dim}, not {self._update_dim}"
        if not update.is_finite():
            return "a value is not finite"
        if math.isfinite(self._rules.max_magnitude_ratio):
            own = scale_of(params)
            if (largest := update.largest()) > self._rules.max_magnitude_ratio * own:
                return f"a value of {largest:.3g}, where no parameter of this node is beyond {own:.3g}"
        if self.scale is not None and (largest := update.largest()) > self._most():
            return f"a value of {largest:.3g}; by this node's own training none is beyond {self.scale.own:.3g}"
        return None

    def _most(self) -> float:
        return math.inf if self.scale is None else self._rules.max_growth * self.scale.own


def over_budget(counts: Sequence[int], count: int, max_frames: int, max_bytes: float) -> str | None:
    """Return why no further frame of ``count`` values may wait beside those of ``counts``, or None."""
    if len(counts) >= max_frames:
        return f"{len(counts)} frames of it wait for a merge; at most {max_frames} may"
    size_bytes = BYTES_PER_VALUE * (sum(counts) + count)
    if len(counts) >= FREE_FRAMES and size_bytes > max_bytes:
        return f"its frames that wait for a merge take {size_bytes} bytes; {max_bytes:.0f} may"
    return None


def roster_version(rules: Rules, round: int) -> int:
    """Return the roster version of a round, as in frames."""
    return rules.topology.at(round).roster_version % ROSTER_VERSIONS
