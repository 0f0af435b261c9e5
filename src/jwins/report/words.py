"""Numbers as tables, pages and the command line say them."""

from __future__ import annotations

import math

from jwins.results.groups import Target

__all__ = ["NEVER"]

NEVER = "—"


def spread_text(mean: float, sd: float | None, *, percent: bool) -> str:
    """Mean and standard deviation.

    >>> spread_text(0.5, 0.012, percent=True)
    '50.0 ± 1.2 %'
    """
    if math.isnan(mean):
        return NEVER
    scale, unit, digits = (100.0, " %", 1) if percent else (1.0, "", 4)
    return f"{mean * scale:.{digits}f}" + ("" if sd is None else f" ± {sd * scale:.{digits}f}") + unit


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """A number with so many decimals; what rounds to zero has no sign.

    >>> fixed(-0.04, 1), fixed(0.26, 1, sign=True)
    ('0.0', '+0.3')
    """
    value = round(value, digits)
    return f"{0.0:.{digits}f}" if value == 0.0 else f"{value:{'+' if sign else ''}.{digits}f}"


def of_seeds(some: int, seeds: int) -> str:
    """How many of the seeds a mean is over, unless all or none.

    >>> of_seeds(2, 3), of_seeds(3, 3)
    (' (2/3)', '')
    """
    return f" ({some}/{seeds})" if 0 < some < seeds else ""


def difference_text(mean: float, half: float | None, *, percent: bool) -> str:
    """A difference and its interval; of percentages, in points.

    >>> difference_text(-0.012, 0.02, percent=True)
    '-1.2 [-3.2, +0.8]'
    """
    scale, digits = (100.0, 1) if percent else (1.0, 4)
    if math.isnan(mean):
        return NEVER
    text, low, high = (
        fixed(value * scale, digits, sign=True) for value in (mean, mean - (half or 0.0), mean + (half or 0.0))
    )
    return text if half is None else f"{text} [{low}, {high}]"


def size(number: float) -> str:
    """Bytes in decimal units.

    >>> size(999), size(1_234_567)
    ('999 B', '1.23 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return (
                f"{number / factor:.3g} {unit}" if number < 1000 * factor else f"{number / factor:.0f} {unit}"
            )
    return f"{number:.0f} B"


def share(fraction: float) -> str:
    """A fraction in percent.

    >>> share(0.6413)
    '64.1 %'
    """
    return NEVER if math.isnan(fraction) else f"{fixed(fraction * 100, 1)} %"


def is_percent(target: Target) -> bool:
    """Whether the metric is shown in percent."""
    return target.metric in ("accuracy",) or target.metric.endswith("_accuracy")


def describe_target(target: Target) -> str:
    """The target in a sentence."""
    if math.isnan(target.value):
        return f"Target: unknown ({target.meaning})."
    value = f"{target.value * 100:.1f} %" if is_percent(target) else f"{target.value:.4g}"
    return f"Target: {target.metric} {value}{f' ({target.meaning})' if target.meaning else ''}."
