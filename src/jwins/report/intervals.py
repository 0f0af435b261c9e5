"""Differences of two variants that ran with the same seeds, and confidence intervals of their means.

>>> found = paired([0.5, 0.6, 0.7], [0.4, 0.5, 0.5])
>>> f"{found.mean:.3f} +- {found.half_width:.3f}"
'0.133 +- 0.143'
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from jwins.errors import UsageError


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference over pairs.

    Attributes:
        half_width: half width of its confidence interval; None for one pair.
    """

    mean: float
    half_width: float | None
    pairs: int


def paired(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Return the mean of ``values - reference``, pair by pair, with Student's 95 % interval.

    Pairing removes effects of a seed on both, such as the partition and the initial model.

    Raises:
        UsageError: no pairs, or different numbers of values.
    """
    if len(values) != len(reference) or not values:
        raise UsageError(
            f"paired: {len(values)} and {len(reference)} numbers; expected the same number of "
            f"both, at least one"
        )
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    count = len(differences)
    mean = statistics.fmean(differences)
    if count == 1:
        return Difference(mean, None, 1)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1) / count)
    return Difference(mean, student_t_quantile(0.975, count - 1) * error, count)


def student_t_quantile(p: float, freedom: int) -> float:
    """Return the quantile ``p`` of Student's t with ``freedom`` degrees of freedom.

    For whole degrees of freedom the distribution function is a finite sum in the angle
    ``arctan(t / sqrt(freedom))`` (Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and
    26.7.4); bisection over the angle inverts it.

    Args:
        p: in [0.5, 1).
        freedom: at least 1.

    Raises:
        UsageError: an argument is out of range.

    >>> round(student_t_quantile(0.975, 4), 4)
    2.7764
    """
    if not 0.5 <= p < 1.0 or freedom < 1:
        raise UsageError(
            f"student_t_quantile: p = {p}, freedom = {freedom}; expected p in [0.5, 1), freedom >= 1"
        )
    inside = 2.0 * p - 1.0  # P(|T| < t)
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _within_angle(middle, freedom) < inside:
            low = middle
        else:
            high = middle
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _within_angle(angle: float, freedom: int) -> float:
    """Return P(|T| < sqrt(freedom) tan(angle))."""
    sine, square = math.sin(angle), math.cos(angle) ** 2
    term = 1.0 if freedom % 2 == 0 else math.cos(angle)
    total = term if freedom > 1 else 0.0
    for k in range(2 if freedom % 2 == 0 else 3, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return sine * total if freedom % 2 == 0 else 2.0 / math.pi * (angle + sine * total)
