"""How many runs fit into memory."""

from __future__ import annotations

from jwins.report.words import size
from jwins.run.memory import memory_free, memory_needed

__all__ = ["memory_free", "memory_needed", "that_fit"]


def that_fit(wanted: int, needed: float, free: float | None) -> tuple[int, str]:
    """How many of the wanted runs fit side by side, at least one, and what to say if that is fewer.

    >>> that_fit(8, 4e9, 10e9)
    (2, '2 runs side by side instead of 8: each may need 4 GB of memory, and 10 GB are free')
    """
    if free is None or wanted * needed <= free:
        return wanted, ""
    fit = max(1, int(free // needed))
    if fit == wanted:  # not even one fits, and one is what was wanted
        return fit, f"a run may need {size(needed)} of memory, and {size(free)} are free"
    return fit, (
        f"{fit} run{'s' if fit != 1 else ''} side by side instead of {wanted}: each may need {size(needed)} of "
        f"memory, and {size(free)} are free"
    )
