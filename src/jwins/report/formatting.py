"""Texts of numbers for tables, pages and the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jwins.report.seed_groups import Target

NEVER = "—"


def spread_text(mean: float, sd: float | None, *, percent: bool) -> str:
    """Return mean and standard deviation as text.

    >>> spread_text(0.5, 0.012, percent=True)
    '50.0 ± 1.2 %'
    """
    if math.isnan(mean):
        return NEVER
    scale, unit, digits = (100.0, " %", 1) if percent else (1.0, "", 4)
    return f"{mean * scale:.{digits}f}" + ("" if sd is None else f" ± {sd * scale:.{digits}f}") + unit


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """Return a number with ``digits`` decimals; a number that rounds to zero has no sign.

    >>> fixed(-0.04, 1), fixed(0.26, 1, sign=True)
    ('0.0', '+0.3')
    """
    value = round(value, digits)
    return f"{0.0:.{digits}f}" if value == 0.0 else f"{value:{'+' if sign else ''}.{digits}f}"


def of_seeds(some: int, seeds: int) -> str:
    """Return the number of seeds behind a mean, unless all or none.

    >>> of_seeds(2, 3), of_seeds(3, 3)
    (' (2/3)', '')
    """
    return f" ({some}/{seeds})" if 0 < some < seeds else ""


def difference_text(mean: float, half: float | None, *, percent: bool, stated: float | None = None) -> str:
    """Return a difference and its 95 % interval as text; those of percentages are in points.

    Args:
        mean: the difference.
        half: half of the interval's width, None without one.
        percent: whether it is a difference of fractions shown in percent.
        stated: shown in place of ``mean``; the interval is extended to cover it if necessary.

    >>> difference_text(-0.0117, 0.02, percent=True, stated=-0.011)
    '-1.1 [-3.2, +0.8]'
    """
    if math.isnan(mean):
        return NEVER
    scale, digits = (100.0, 1) if percent else (1.0, 4)
    shown_mean = mean if stated is None else stated
    values = (
        [shown_mean]
        if half is None
        else [shown_mean, min(shown_mean, mean - half), max(shown_mean, mean + half)]
    )
    text, *ends = (fixed(value * scale, digits, sign=True) for value in values)
    return f"{text} [{', '.join(ends)}]" if ends else text


def number(value: float, *, percent: bool = False, digits: int | None = None) -> str:
    """Return a metric's value as text, in percent if it is shown so.

    >>> number(0.8691, percent=True), number(0.5174), number(float("nan"))
    ('86.9 %', '0.5174', '—')
    """
    if not math.isfinite(value):
        return NEVER
    if percent:
        return f"{value * 100:.{1 if digits is None else digits}f} %"
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"


def final_text(value: float, *, percent: bool, unit: bool = True) -> str:
    """Return a final value, or its deviation, with the decimals of tables.

    >>> final_text(0.9541, percent=True), final_text(0.004, percent=True, unit=False)
    ('95.4 %', '0.4')
    """
    text = number(value, percent=percent, digits=1 if percent else 4)
    return text if unit else text.removesuffix(" %")


def size(number: float) -> str:
    """Return bytes in decimal units.

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
    """Return a fraction in percent.

    >>> share(0.6413)
    '64.1 %'
    """
    return NEVER if math.isnan(fraction) else f"{fixed(fraction * 100, 1)} %"


def is_percent(metric: str) -> bool:
    """Return whether a metric with this name is shown in percent."""
    return metric == "accuracy" or metric.endswith("_accuracy")


def describe_target(target: Target) -> str:
    """Return a sentence about the target."""
    if math.isnan(target.value):
        return f"Target: unknown ({target.meaning})."
    value = number(target.value, percent=is_percent(target.metric))
    return f"Target: {target.metric} {value}{f' ({target.meaning})' if target.meaning else ''}."


def spaced(name: str) -> str:
    """Return a name of the code as words.

    >>> spaced("squared_error")
    'squared error'
    """
    return name.replace("_", " ")


def capital(text: str) -> str:
    """Return the text with an initial capital.

    >>> capital("full sharing")
    'Full sharing'
    """
    return text[:1].upper() + text[1:]


def and_list(words: Sequence[str]) -> str:
    """Join texts as in ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def shown(value: Any) -> str:
    """Return a setting's value as text.

    >>> shown([0.1, True, None])
    '0.1 true —'
    """
    if value is None:
        return NEVER
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
