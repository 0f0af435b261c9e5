"""How long a node waits for its neighbours: one number of the user's, the rest from what it has seen."""

from __future__ import annotations

from collections import deque

from jwins.validation import Within

__all__ = ["TIMEOUT_S", "NeighbourTimeout"]

TIMEOUT_S = Within("a time in seconds", 0, open_low=True)

_FACTOR_OF_SLOWEST = 3.0
"""A frame may take thrice as long as the slowest of late: twice is what a neighbour takes that has to share its
processor with one more process."""
_MAX_FACTOR = 20.0
"""However slow the others have been, a wait ends: a peer that answers just in time cannot stretch it more."""
_REMEMBERED = 64
_SUSPECT_AFTER = 3


class NeighbourTimeout:
    """When a neighbour has timed out, and when it is no longer waited for.

    A wait begins when the node has sent its own frame. It lasts ``timeout_s``, or thrice the longest that a
    frame has taken of late, late ones included, and at most 20 ``timeout_s``: this is also how long a node
    waits for a neighbour that it has never been connected with, because people start nodes one after the other.
    Only durations on this machine's own clock are used.

    Args:
        timeout_s: the least time to wait for a neighbour, in seconds.

    Raises:
        ConfigError: a number out of range.
    """

    suspect_after = _SUSPECT_AFTER
    """A connected neighbour that timed out so many rounds in a row is no longer waited for."""

    def __init__(self, timeout_s: float) -> None:
        TIMEOUT_S.check("timeout_s", timeout_s)
        self.timeout_s = timeout_s
        self._seen: deque[float] = deque(maxlen=_REMEMBERED)

    def observe(self, seconds: float) -> None:
        """A neighbour's frame came so long after the node's own was sent."""
        self._seen.append(max(0.0, seconds))

    @property
    def limit_s(self) -> float:
        """How long to wait for a neighbour that has been connected."""
        longest = max(self._seen, default=0.0)
        return min(max(self.timeout_s, _FACTOR_OF_SLOWEST * longest), self.first_s)

    @property
    def first_s(self) -> float:
        """How long to wait for a neighbour that has never been connected."""
        return _MAX_FACTOR * self.timeout_s
