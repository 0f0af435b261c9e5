"""The page's Jinja2 templates, with escaping and without undefined names."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from jwins.report.comparison_table import TableCell


@functools.cache
def templates() -> Environment:
    """Load the templates of the folder ``templates/``."""
    environment = Environment(
        loader=PackageLoader("jwins.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_kept_together,
    )
    environment.filters["breakable"] = breakable
    environment.filters["verbatim"] = escape
    environment.filters["cells"] = _cells
    return environment


def _kept_together(value: Any) -> Any:
    """Prevent line breaks between numbers and units; markup is not changed."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return re.sub(r"(?<=\d) (?=[%×]|[kMG]?B\b)", "\N{NO-BREAK SPACE}", str(value))


def breakable(name: object) -> Markup:
    """Allow line breaks in a name of the code, at its dots and underscores.

    >>> breakable("train.lr")
    Markup('train.<wbr>lr')
    """
    return Markup(re.sub(r"(?<=\w)([._])(?=\w)", r"\1<wbr>", str(escape(_kept_together(name)))))


def _cells(row: Sequence[str]) -> list[TableCell]:
    return [text if isinstance(text, TableCell) else TableCell(text) for text in row]
