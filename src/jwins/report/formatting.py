"""Numbers as tables, pages and the command line say them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jwins.report.seed_groups import Target

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
    """Return the number of seeds behind a mean, unless all or none.

    >>> of_seeds(2, 3), of_seeds(3, 3)
    (' (2/3)', '')
    """
    return f" ({some}/{seeds})" if 0 < some < seeds else ""


def difference_texts(
    mean: float, half: float | None, *, percent: bool, stated: float | None = None
) -> tuple[str, str, str]:
    """A difference and the ends of its interval; of percentages, in points.

    Args:
        mean: the difference.
        half: half of the interval's width, None if there is none.
        percent: whether it is one of fractions shown in percent.
        stated: what to say in place of ``mean``; the interval stays where it is, but covers it.

    >>> difference_texts(-0.0117, 0.02, percent=True, stated=-0.011)
    ('-1.1', '-3.2', '+0.8')
    """
    scale, digits = (100.0, 1) if percent else (1.0, 4)
    said, half = mean if stated is None else stated, half or 0.0
    values = (said, min(said, mean - half), max(said, mean + half))
    text, low, high = (fixed(value * scale, digits, sign=True) for value in values)
    return text, low, high


def difference_text(mean: float, half: float | None, *, percent: bool, stated: float | None = None) -> str:
    """A difference and its interval in one line; see :func:`difference_texts`.

    >>> difference_text(-0.012, 0.02, percent=True)
    '-1.2 [-3.2, +0.8]'
    """
    if math.isnan(mean):
        return NEVER
    text, low, high = difference_texts(mean, half, percent=percent, stated=stated)
    return text if half is None else f"{text} [{low}, {high}]"


def minus(text: str) -> str:
    """With the sign of minus before numbers, as prose and the page have it.

    >>> minus("-1.2 to +0.8, top-k")
    '−1.2 to +0.8, top-k'
    """
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def number(value: float, *, percent: bool = False, digits: int | None = None) -> str:
    """A metric's value as text, percent if it is a fraction shown so.

    >>> number(0.8691, percent=True), number(0.5174), number(float("nan"))
    ('86.9 %', '0.5174', '—')
    """
    if not math.isfinite(value):
        return NEVER
    if percent:
        return f"{value * 100:.{1 if digits is None else digits}f} %"
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"


def final_text(value: float, *, percent: bool, unit: bool = True) -> str:
    """A final value, or the deviation of one, with the decimals that tables have.

    >>> final_text(0.9541, percent=True), final_text(0.004, percent=True, unit=False)
    ('95.4 %', '0.4')
    """
    text = number(value, percent=percent, digits=1 if percent else 4)
    return text if unit else text.removesuffix(" %")


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
    return metric_percent(target.metric)


def metric_percent(metric: str) -> bool:
    """Whether a metric of this name is shown in percent."""
    return metric == "accuracy" or metric.endswith("_accuracy")


def describe_target(target: Target) -> str:
    """The target in a sentence."""
    if math.isnan(target.value):
        return f"Target: unknown ({target.meaning})."
    value = f"{target.value * 100:.1f} %" if is_percent(target) else f"{target.value:.4g}"
    return f"Target: {target.metric} {value}{f' ({target.meaning})' if target.meaning else ''}."


def spaced(name: str) -> str:
    """A name of the code as words.

    >>> spaced("squared_error")
    'squared error'
    """
    return name.replace("_", " ")


def capital(text: str) -> str:
    """Beginning with a capital.

    >>> capital("full sharing")
    'Full sharing'
    """
    return text[:1].upper() + text[1:]


def and_list(words: Sequence[str]) -> str:
    """Like ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def shown(value: Any) -> str:
    """A setting's value as text.

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


def without_paths(text: str, folder: Path) -> str:
    """A message without the folders of the files it names.

    Args:
        text: the message.
        folder: the run's, within which or beside which the files are.

    >>> without_paths("/home/you/runs/a/../my_task.py: no such file", Path("/home/you/runs/a"))
    'my_task.py: no such file'
    >>> without_paths("path = '/home/you/my graphs/a.txt': cannot be read", Path("run"))
    "path = 'a.txt': cannot be read"
    """
    for place in (folder.resolve(), folder):
        text = text.replace(f"{place}/", "").replace(f"{place}\\", "")
    text = re.sub(r"(['\"])[^'\"\n]*[/\\](?=[^'\"/\\\n]+\1)", r"\1", text)
    return re.sub(r"[^\s'\"(]*[/\\](?=[^\s/\\])", "", text)
