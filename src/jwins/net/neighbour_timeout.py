"""Timeout for a neighbour: the user's number, adapted to the neighbour's response times."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from jwins.validation import Within

TIMEOUT_S = Within("a time in seconds", 0, open_low=True)

DEFAULT_TIMEOUT_S = 30.0
"""Minimum wait for a neighbour if neither the user nor ``run.deadline_s`` sets one."""

SUSPECT_AFTER = 3
"""Number of rounds in a row with a timeout after which a node stops waiting for a connected neighbour."""

MAX_FACTOR = 20.0
"""Maximum wait for any neighbour, and the wait for one that never connected, in multiples of ``timeout_s``."""

OTHERS_FACTOR = 4.0
"""Maximum wait for a neighbour as a multiple of the others' median, or ``timeout_s``. So a neighbour that
always answers just in time slows the others down by no more than that."""

MEAN_GAIN, DEVIATION_GAIN, DEVIATIONS = 1 / 8, 1 / 4, 4.0
"""Factors as in V. Jacobson, "Congestion avoidance and control", SIGCOMM 1988, and RFC 6298."""

MAX_STEP_S = 2.0
"""A longer time between two readings of the clock counts as a standstill of this process."""


class NeighbourTimeout:
    """Timeout of one neighbour, from the smoothed mean and deviation of its response times.

    A wait begins when the node has sent its own frame. Its limit is ``max(timeout_s, min(mean + 4 deviation,
    20 timeout_s, 4 median))`` with the mean and deviation of this neighbour's times and the median of the
    others'. Time in which the neighbour was not connected, or this process stood still, is not observed, so one
    crash does not make the next wait longer.

    Args:
        timeout_s: the minimum wait, in seconds.

    Raises:
        ConfigError: a number out of range.

    >>> timeout = NeighbourTimeout(2.0)
    >>> timeout.observe(1.0)
    >>> timeout.limit_s()
    3.0
    """

    __slots__ = ("deviation_s", "mean_s", "timeout_s")

    def __init__(self, timeout_s: float) -> None:
        TIMEOUT_S.check("timeout_s", timeout_s)
        self.timeout_s = timeout_s
        self.mean_s: float | None = None
        self.deviation_s = 0.0

    def observe(self, seconds: float) -> None:
        """Record the seconds between the node's own frame and the neighbour's."""
        seconds = max(0.0, seconds)
        if self.mean_s is None:
            self.mean_s, self.deviation_s = seconds, seconds / 2
            return
        self.deviation_s += DEVIATION_GAIN * (abs(seconds - self.mean_s) - self.deviation_s)
        self.mean_s += MEAN_GAIN * (seconds - self.mean_s)

    def limit_s(self, others_s: Iterable[float] = ()) -> float:
        """Return the timeout for the neighbour.

        Args:
            others_s: means of the other neighbours.
        """
        own_s = 0.0 if self.mean_s is None else self.mean_s + DEVIATIONS * self.deviation_s
        most_s = self.first_s
        if means := list(others_s):
            most_s = min(most_s, OTHERS_FACTOR * statistics.median_low(means))
        return max(self.timeout_s, min(own_s, most_s))

    @property
    def first_s(self) -> float:
        """Return the timeout for a neighbour that has never been connected."""
        return MAX_FACTOR * self.timeout_s


class AwakeClock:
    """Clock of the seconds in which this process was awake, from a clock that also runs while it is stopped.

    >>> clock = AwakeClock(0.0)
    >>> clock.at(1.0), clock.at(600.0)
    (1.0, 3.0)
    """

    __slots__ = ("_last", "_max_step_s", "seconds")

    def __init__(self, now: float, max_step_s: float = MAX_STEP_S) -> None:
        self._last, self._max_step_s = now, max_step_s
        self.seconds = 0.0

    def at(self, now: float) -> float:
        """Return the seconds awake until ``now``. Call it at least every ``max_step_s`` while awake."""
        self.seconds += min(max(0.0, now - self._last), self._max_step_s)
        self._last = now
        return self.seconds
