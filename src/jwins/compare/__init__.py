"""Comparisons: variants of an experiment over seeds.

- :class:`Comparison` of :class:`Variant` objects, or :func:`load_comparison` from TOML
- :func:`compare`, which runs it and calls back with :class:`CellProgress`; :func:`summarize`, which only reads
- :class:`ComparisonResult`, with tables and rows
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jwins.compare.comparison import Comparison, Variant, load_comparison
    from jwins.compare.result import ComparisonResult, summarize
    from jwins.compare.runner import compare
    from jwins.compare.workers import CellProgress

__all__ = [
    "CellProgress",
    "Comparison",
    "ComparisonResult",
    "Variant",
    "compare",
    "load_comparison",
    "summarize",
]

_HOMES = {
    "CellProgress": "jwins.compare.workers",
    "Comparison": "jwins.compare.comparison",
    "ComparisonResult": "jwins.compare.result",
    "Variant": "jwins.compare.comparison",
    "compare": "jwins.compare.runner",
    "load_comparison": "jwins.compare.comparison",
    "summarize": "jwins.compare.result",
}


def __getattr__(name: str) -> object:
    """Import names when they are first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
