"""Rate limit for all lines of the log, so that no peer can fill the disk."""

from __future__ import annotations

from jwins.net.limits import Bucket

AT_ONCE = 10.0
PER_S = 1 / 60


class LogLimits:
    """At most ten lines at once of one event of one peer, and one a minute from then on.

    >>> limits = LogLimits()
    >>> [limits.take("late", 1, 0.0) for _ in range(12)].count(None), limits.take("late", 1, 61.0)
    (2, 2)
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, object], Bucket] = {}
        self._suppressed: dict[tuple[str, object], int] = {}

    def take(self, event: str, peer: object, now: float) -> int | None:
        """Return how many lines were left out before this one, or None to leave this one out, too."""
        name = (event, peer)
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = Bucket.full(PER_S, AT_ONCE, now)
        bucket.take(0.0, now)
        if bucket.tokens < 1.0:
            self._suppressed[name] = self._suppressed.get(name, 0) + 1
            return None
        bucket.take(1.0, now)
        return self._suppressed.pop(name, 0)
