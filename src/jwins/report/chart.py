"""Figures: drawn once, written into the page, as PDF and as PNG.

In the page's picture, colours are CSS variables, so that a figure follows the reader's light or dark theme.
Its text can be selected and searched. Numbers are in the tables beside the figures.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from jwins.report.colours import AXIS, GRID, MUTED, TEXT, THEME
from jwins.report.templating import templates
from jwins.run_folder.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_IN = 5.3
"""Width of a figure in inches of 72 units: three fit in a row on a desk, and one on a phone."""

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11.8,
    "text.parse_math": False,  # names may contain dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": AXIS,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.8,
    "axes.titlecolor": TEXT,
    "axes.titlepad": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "jwins",
    "pdf.fonttype": 42,
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Chart:
    """A figure that can be drawn for the page and for paper.

    Attributes:
        slug: name of its files.
        draw: function that draws it; True is for paper, where the figure needs its own legend.
    """

    slug: str
    title: str
    caption: str
    draw: Callable[[bool], Figure]


def load_matplotlib() -> None:
    """Import matplotlib, ignoring ``MPLBACKEND``: figures of a report need no window and no notebook."""
    named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib  # noqa: F401  a backend that is not installed stops this import
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named


@contextmanager
def drawing_style(**changes: Any) -> Iterator[None]:
    """Within the block, matplotlib draws in the style of reports; ``changes`` are further settings."""
    load_matplotlib()
    from matplotlib import rc_context, rcdefaults, rcParams

    with rc_context(), warnings.catch_warnings():
        rcdefaults()  # ignore the user's matplotlibrc
        rcParams.update(_STYLE | changes)
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def blank(width_in: float, height_in: float, *, dpi: int) -> Figure:
    """Make an empty figure."""
    load_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def page_figure(height_in: float, *, paper: bool, legend_rows: int = 0) -> Figure:
    """Make an empty figure of the page's width; on paper it has room for a legend."""
    return blank(WIDTH_IN, height_in + paper * 0.21 * legend_rows, dpi=220 if paper else 72)


def steps(count: int, *, least: int = 2, only_whole: bool = False) -> Any:
    """Return ticks at round numbers: ``least`` to about ``count`` of them."""
    from matplotlib.ticker import MaxNLocator

    sizes = [1, 2, 5, 10] if only_whole else [1, 2, 2.5, 5, 10]
    return MaxNLocator(count, steps=sizes, min_n_ticks=least, integer=only_whole)


# --- In the page ------------------------------------------------------------------------------------------


def as_svg(chart: Chart, prefix: str) -> Markup:
    """Return the figure as an ``<svg>`` element for the page.

    Args:
        chart: the chart.
        prefix: prefix of all ids in it, so that several figures can be on one page.
    """
    with drawing_style():
        buffer = io.StringIO()
        chart.draw(False).savefig(
            buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None, "Format": None}
        )
    text = buffer.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    body = text[text.index("<svg") :].partition(">")[2].rpartition("</svg>")[0]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'\bxlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r"font-family: [^;\"]+;? ?", "", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", body)
    body = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", body)
    body = re.sub(r'(style="[^"]*")', lambda match: _themed(match[1]), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    template = templates().get_template("figure.svg.jinja")
    return Markup(template.render(box=box[1], title=chart.title, body=Markup(body)))


def _themed(style: str) -> str:
    def variable(match: re.Match[str]) -> str:
        known = THEME.get(match[0].lower())
        return match[0] if known is None else f"var(--{known[0]})"

    return re.sub(r"#[0-9a-fA-F]{6}\b", variable, style)


# --- For papers -------------------------------------------------------------------------------------------


def save(chart: Chart, path: Path) -> list[Path]:
    """Write a figure for paper as PNG and as PDF, with the suffixes of both, and return their paths."""
    with drawing_style():
        return save_figure(chart.draw(True), path)


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` as PNG and as PDF, without dates in them, and return both."""
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None, "Producer": None})):
        buffer = io.BytesIO()
        with drawing_style():
            figure.savefig(buffer, format=suffix[1:], metadata=metadata)
        write_atomically(path.with_suffix(suffix), buffer.getvalue())
        written.append(path.with_suffix(suffix))
    return written
