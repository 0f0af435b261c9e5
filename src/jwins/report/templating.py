"""The page's templates: Jinja2, what is put into them escaped, and nothing in them left undefined."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from jwins.report.tables import TableCell

__all__ = ["templates"]


@functools.cache
def templates() -> Environment:
    """The templates beside this file, in ``templates/``."""
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
    """Numbers with their units, between which a line must not break; what is markup already stays as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return re.sub(r"(?<=\d) (?=[%×]|[kMG]?B\b)", "\N{NO-BREAK SPACE}", str(value))


def breakable(name: object) -> Markup:
    """A name of the code that a line may break within, at its dots and underscores.

    >>> breakable("train.lr")
    Markup('train.<wbr>lr')
    """
    return Markup(re.sub(r"(?<=\w)([._])(?=\w)", r"\1<wbr>", str(escape(_kept_together(name)))))


def _cells(row: Sequence[str]) -> list[TableCell]:
    """A table's row in which every text is a cell."""
    return [text if isinstance(text, TableCell) else TableCell(text) for text in row]
