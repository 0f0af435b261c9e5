"""Figures of a report: each is drawn once, and becomes an SVG in the page and a PDF and a PNG for papers.

In the page's SVG, colours are CSS variables, so that a figure follows the reader's light or dark theme, text
is text, and measured points tell their numbers to a pointer that rests on them.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jwins.report.curves import COLOURS, colours_of, mark_level, save_figure
from jwins.report.words import is_percent, size
from jwins.results.groups import Group, Target
from jwins.results.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jwins.topology.graph import Graph

__all__ = [
    "PARTS",
    "THEME",
    "Chart",
    "Partition",
    "Style",
    "as_svg",
    "bytes_chart",
    "curve_chart",
    "nodes_chart",
    "number",
    "partition_chart",
    "save",
    "styles_of",
    "topology_chart",
]

WIDTH_IN = 5.3
"""Width of a figure in inches of 72 units: what fits three in a row on a desk and one on a phone."""

_TEXT, _MUTED, _GRID, _AXIS, _PAGE = "#1f2328", "#57606a", "#e3e6ea", "#8c959f", "#ffffff"

PARTS = {
    "values": "#2f6690",
    "positions": "#81b1d6",
    "header": "#9a9a9c",
    "key": "#7a5195",
    "control": "#c3a5d9",
}
"""What bytes carried, and its colour in the figure."""

_SHADES = {
    "full": ("#4d4d4d", "#1a1a1a", "#8f8f8f"),
    "random_k": ("#e69f00", "#a87400", "#f2c14e"),
    "top_k": ("#009e73", "#006b4e", "#52c4a3"),
    "choco": ("#0072b2", "#004d7a", "#56a9dc"),
    "jwins": ("#d55e00", "#933f00", "#f0905a"),
    "own": ("#cc79a7", "#96467a", "#e0aac8"),
}
_DARK = {
    "full": ("#d0d4da", "#ffffff", "#8b929c"),
    "random_k": ("#f0b429", "#ffd886", "#b88412"),
    "top_k": ("#2fc796", "#8ae6c6", "#178a66"),
    "choco": ("#4ca9ea", "#a5d5f8", "#2a78b0"),
    "jwins": ("#ff8540", "#ffc09a", "#c65a1a"),
    "own": ("#e59cc6", "#f6cfe4", "#b3648f"),
}

THEME: dict[str, tuple[str, str, str]] = {
    _TEXT: ("text", _TEXT, "#e6e9ed"),
    _MUTED: ("muted", _MUTED, "#a3acb8"),
    _GRID: ("grid", _GRID, "#2b313a"),
    _AXIS: ("axis", _AXIS, "#6b7480"),
    _PAGE: ("page", _PAGE, "#14171c"),
    **{
        colour: (f"part-{part}", colour, dark)
        for (part, colour), dark in zip(
            PARTS.items(), ("#5d9fd0", "#bcd9ee", "#7f8792", "#b58ad0", "#e0cdee"), strict=True
        )
    },
    **{
        colour: (f"{algorithm.replace('_', '-')}-{index}", colour, _DARK[algorithm][index])
        for algorithm, shades in _SHADES.items()
        for index, colour in enumerate(shades)
    },
}
"""Each colour in figures: the CSS variable that takes its place in a page, its value on light and on dark."""

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 1.5, 1, 1.5)))
_MARKERS = {"full": "o", "random_k": "^", "top_k": "v", "choco": "s", "jwins": "D", "own": "P"}
_MORE_MARKERS = "oXs*<>dph"

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11.8,
    "text.parse_math": False,  # names may hold dollars
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _AXIS,
    "axes.facecolor": "none",
    "axes.labelcolor": _MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.8,
    "axes.titlecolor": _TEXT,
    "axes.titlepad": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _AXIS,
    "ytick.color": _AXIS,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "text.color": _TEXT,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "jwins",
    "pdf.fonttype": 42,
    "savefig.facecolor": "white",
}


# --- Charts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hit:
    """A place in a figure that says something when pointed at: a circle, or a box of data coordinates."""

    axes: Axes
    x: float
    y: float
    text: str
    width: float = 0.0
    height: float = 0.0


@dataclass
class Drawing:
    """A drawn figure.

    Attributes:
        figure: of matplotlib.
        hits: what the page's version tells.
    """

    figure: Figure
    hits: list[Hit] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """A figure that can be drawn for the page and for paper.

    Attributes:
        slug: name of its files.
        title: what it shows, as its heading.
        caption: what one must know to read it.
        alt: its content in words, for who cannot see it.
        draw: draws it; True: for paper, where the page's legend is missing and must be within.
    """

    slug: str
    title: str
    caption: str
    alt: str
    draw: Callable[[bool], Drawing]


@dataclass(frozen=True)
class Style:
    """How a variant is drawn, everywhere."""

    colour: str
    dash: Any
    marker: str

    @property
    def variable(self) -> str:
        """The colour as CSS."""
        return f"var(--{THEME[self.colour][0]})"


@dataclass(frozen=True)
class Partition:
    """Who holds how much.

    Attributes:
        samples: training samples of each node.
        labels: the classes, if samples have any.
        counts: (nodes, classes) samples.
    """

    samples: tuple[int, ...]
    labels: tuple[int, ...] = ()
    counts: tuple[tuple[int, ...], ...] = ()


def styles_of(algorithms: Sequence[str]) -> list[Style]:
    """One style per variant: colours as in ``colours_of``; shade, dashes and marker tell those of one apart."""
    seen: dict[str, int] = {}
    styles = []
    for algorithm, (colour, number_) in zip(algorithms, colours_of(algorithms), strict=True):
        key = algorithm if algorithm in COLOURS else "own"
        index = seen.get(key, 0)
        seen[key] = index + 1
        marker = _MARKERS[key] if index == 0 else _MORE_MARKERS[(index - 1) % len(_MORE_MARKERS)]
        styles.append(Style(_SHADES[colour][number_ % 3], _DASHES[number_ % len(_DASHES)], marker))
    return styles


def number(value: float, *, percent: bool = False, digits: int | None = None) -> str:
    """A metric's value as text, percent if it is a fraction shown so.

    >>> number(0.8691, percent=True), number(0.5174), number(float("nan"))
    ('86.9 %', '0.5174', '—')
    """
    if not math.isfinite(value):
        return "—"
    if percent:
        return f"{value * 100:.{1 if digits is None else digits}f} %"
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"


@contextmanager
def _drawing() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def _blank(height_in: float, *, paper: bool) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=220 if paper else 72)
    FigureCanvasAgg(figure)
    return figure


# --- Curves -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    group: Group
    style: Style
    x: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    rounds: list[int]

    @property
    def diverged(self) -> bool:
        return self.group.diverged == "diverged"


def _curves(
    groups: Sequence[Group],
    styles: Sequence[Style],
    x: Callable[[Record], list[float]],
    y: Callable[[Record], list[float]],
    *,
    skip: int,
) -> list[_Curve]:
    found = []
    for group, style in zip(groups, styles, strict=True):
        # A run that stopped earlier would bend the mean; so the mean goes as far as every run that counts.
        records = group.counted.records
        shared = min((len(record.evaluations) for record in records), default=0)
        if shared <= skip:
            continue
        across = np.mean([x(record)[skip:shared] for record in records], axis=0)
        values = np.array([y(record)[skip:shared] for record in records], dtype=float)
        with np.errstate(invalid="ignore"):
            mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
        rounds = [row.round for row in records[0].evaluations[skip:shared]]
        found.append(_Curve(group, style, across, mean, low, high, rounds))
    return found


def curve_chart(
    slug: str,
    title: str,
    caption: str,
    groups: Sequence[Group],
    styles: Sequence[Style],
    *,
    x: Callable[[Record], list[float]],
    x_label: str,
    y: Callable[[Record], list[float]],
    y_label: str,
    percent: bool = False,
    in_bytes: bool = False,
    target: Target | None = None,
) -> Chart:
    """Something measured against something else: means over seeds as lines, lowest to highest seed as bands.

    Args:
        slug: name of its files.
        title: its heading.
        caption: below it.
        groups: the variants.
        styles: how each is drawn.
        x: of each evaluation of a run.
        x_label: with its unit.
        y: likewise; None is not possible, not a number leaves a gap.
        y_label: with its unit.
        percent: whether y is a fraction shown in percent.
        in_bytes: whether x is bytes: a log axis, without the start, where nothing was sent.
        target: drawn as a dotted line.
    """
    curves = _curves(groups, styles, x, y, skip=1 if in_bytes else 0)
    ends = "; ".join(
        f"{c.group.name} ends at {number(float(c.mean[-1]), percent=percent)}"
        f" at {size(c.x[-1]) if in_bytes else f'{c.x[-1]:.4g}'}{' and diverged' if c.diverged else ''}"
        for c in curves
    )
    alt = f"Line chart: {y_label} against {x_label}. {ends or 'Nothing was measured'}."
    scale = 100.0 if percent else 1.0

    def draw(paper: bool) -> Drawing:
        rows = math.ceil(len(curves) / 2) if paper else 0
        height = 3.46 + 0.21 * rows
        figure = _blank(height, paper=paper)
        axes = figure.add_axes((0.115, 0.55 / height, 0.83, 2.55 / height))
        hits: list[Hit] = []
        for curve in curves:
            hits += _draw_curve(axes, curve, scale, in_bytes=in_bytes, many=len(groups[0].records) > 1)
        axes.set_xlabel(x_label)
        axes.set_title(y_label, color=_MUTED)
        _limit_y(axes, curves, scale, target)
        if in_bytes and curves:
            axes.set_xscale("log")
            _byte_ticks(axes, curves)
        elif curves:
            axes.set_xlim(0, max(float(c.x[-1]) for c in curves) * 1.03 or 1.0)
            axes.xaxis.set_major_locator(_whole_steps(6, only_whole=x_label == "rounds"))
        if not any(np.isfinite(curve.mean).any() for curve in curves):
            _say(axes, "nothing measured yet")
        elif target is not None and math.isfinite(target.value):
            name = f"target {number(target.value, percent=percent)}"
            mark_level(axes, target.value * scale, name, size=10.8, line=_MUTED, letters=_MUTED)
        if paper and curves:
            figure.legend(
                *axes.get_legend_handles_labels(),
                loc="upper left",
                bbox_to_anchor=(0.1, 1.0),
                ncols=2,
                handlelength=3.0,
                borderaxespad=0.3,
            )
        return Drawing(figure, hits)

    return Chart(slug, title, caption, alt, draw)


def _draw_curve(axes: Axes, curve: _Curve, scale: float, *, in_bytes: bool, many: bool) -> list[Hit]:
    style = curve.style
    if many:
        axes.fill_between(
            curve.x, curve.low * scale, curve.high * scale, color=style.colour, alpha=0.17, linewidth=0
        )
    name = curve.group.name + (f" ({curve.group.diverged})" if curve.group.diverged else "")
    axes.plot(
        curve.x,
        curve.mean * scale,
        color=style.colour,
        linestyle=style.dash,
        marker=style.marker,
        markevery=[len(curve.x) - 1],
        markersize=6.5,
        markeredgecolor=_PAGE,
        markeredgewidth=0.9,
        clip_on=True,
        zorder=3,
        label=textwrap.shorten(name, 34, placeholder="…"),
    )
    if curve.diverged:
        measured = np.flatnonzero(np.isfinite(curve.mean))
        if len(measured):
            last = measured[-1]
            x, y = curve.x[last], curve.mean[last] * scale
            axes.plot(x, y, marker="x", color=style.colour, markersize=10, markeredgewidth=2.4, zorder=4)
    step = max(1, math.ceil(len(curve.x) / 40))
    chosen = sorted({*range(0, len(curve.x), step), len(curve.x) - 1})
    percent = scale != 1.0
    hits = []
    for i in chosen:
        if not math.isfinite(curve.mean[i]):
            continue
        at = size(float(curve.x[i])) if in_bytes else f"{curve.x[i]:.4g}"
        low, mean, high = (number(float(v[i]), percent=percent) for v in (curve.low, curve.mean, curve.high))
        spread = f" ({low} to {high})" if many else ""
        text = f"{curve.group.name}, round {curve.rounds[i]}"
        text += f", {at}" if in_bytes or f"{curve.rounds[i]}" != at else ""
        text += f": {mean}{spread}"
        hits.append(Hit(axes, float(curve.x[i]), float(curve.mean[i] * scale), text))
    return hits


def _limit_y(axes: Axes, curves: Sequence[_Curve], scale: float, target: Target | None) -> None:
    """Leave out values so far off that they would flatten everything else, such as a diverging loss."""
    pieces = [piece for c in curves for piece in (c.low, c.high)]
    values = np.concatenate(pieces) * scale if pieces else np.zeros(0)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return
    low, high = float(values.min()), float(values.max())
    typical = float(np.quantile(values, 0.9))
    if high - low > 10 * (typical - low) > 0:
        high = typical
    if target is not None and math.isfinite(target.value):
        low, high = min(low, target.value * scale), max(high, target.value * scale)
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(_whole_steps(6, whole=False))


def _say(axes: Axes, text: str) -> None:
    """Words instead of curves."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_MUTED)


def _whole_steps(count: int, *, whole: bool = True, only_whole: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    steps = [1, 2, 5, 10] if only_whole else [1, 2, 2.5, 5, 10]
    return MaxNLocator(count, steps=steps, min_n_ticks=2 if whole else 3, integer=only_whole)


def _byte_ticks(axes: Axes, curves: Sequence[_Curve]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min(float(c.x[0]) for c in curves), max(float(c.x[-1]) for c in curves)
    low, high = low / 1.12, high * 1.12
    axes.set_xlim(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(ticks) <= 5:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda value, _: size(float(f"{value:.6g}")))
    axes.xaxis.set_minor_locator(NullLocator())


# --- Bars and strips --------------------------------------------------------------------------------------


def bytes_chart(groups: Sequence[Group]) -> Chart:
    """What the bytes of each variant carried: a stacked bar each, per node and mean over seeds."""
    split = {group.name: bytes_by_part(group) for group in groups}
    alt = "Stacked bars of bytes per node. " + "; ".join(
        f"{name}: " + ", ".join(f"{part} {size(value)}" for part, value in parts.items())
        for name, parts in split.items()
    )

    def draw(paper: bool) -> Drawing:
        figure, axes = _rows([group.name for group in groups], paper=paper, legend=PARTS if paper else {})
        most = max((sum(parts.values()) for parts in split.values()), default=0.0) or 1.0
        hits = []
        for row, (name, parts) in enumerate(split.items()):
            left, total = 0.0, sum(parts.values())
            for part, value in parts.items():
                axes.barh(row, value, left=left, height=0.42, color=PARTS[part], linewidth=0)
                if value > 0:
                    text = f"{name}, {part}: {size(value)} ({value / total * 100:.1f} %)"
                    hits.append(Hit(axes, left, row - 0.21, text, value, 0.42))
                left += value
            axes.annotate(
                size(total), (left, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10.8
            )
        axes.set_xlim(0, most * 1.17)
        axes.xaxis.set_major_locator(_whole_steps(4))
        axes.xaxis.set_major_formatter(lambda value, _: size(value) if value else "0")
        axes.set_xlabel("bytes sent per node")
        return Drawing(figure, hits)

    return Chart("bytes-by-content", "Bytes per node", "", alt + ".", draw)


def bytes_by_part(group: Group) -> dict[str, float]:
    """Bytes per node until the last evaluation, by what they carried, mean over seeds."""
    parts = {}
    for part in PARTS:
        sent = [
            getattr(record.evaluations[-1].traffic, part) / record.start.num_nodes
            for record in group.counted.records
            if record.evaluations
        ]
        parts[part] = float(np.mean(sent)) if sent else 0.0
    return parts


_MOST_POINTS = 150


def nodes_chart(groups: Sequence[Group], styles: Sequence[Style], metric: str, *, percent: bool) -> Chart:
    """Every node's final metric, over all seeds: points, with a box for the middle half and the median."""
    values = {group.name: final_per_node(group, metric) for group in groups}
    label = f"{metric.replace('_', ' ')}{' in %' if percent else ''}"
    told = "; ".join(
        f"{name}: lowest {number(float(v.min()), percent=percent)}, median "
        f"{number(float(np.median(v)), percent=percent)}, highest {number(float(v.max()), percent=percent)}"
        for name, v in values.items()
        if len(v)
    )
    thinned = any(len(v) > _MOST_POINTS for v in values.values())
    caption = "One point per node and seed; the box holds the middle half, its line is the median."
    if thinned:
        caption += f" Where there are more than {_MOST_POINTS} points, evenly spaced quantiles are drawn."
    scale = 100.0 if percent else 1.0

    def draw(paper: bool) -> Drawing:
        figure, axes = _rows(list(values), paper=paper)
        hits = []
        for row, (name, style) in enumerate(zip(values, styles, strict=True)):
            v = np.sort(values[name]) * scale
            if len(v) == 0:
                continue
            low, middle, high = (float(q) for q in np.quantile(v, (0.25, 0.5, 0.75)))
            colour = style.colour
            axes.barh(row, high - low, left=low, height=0.42, color=colour, alpha=0.22, linewidth=0, zorder=2)
            axes.plot([middle, middle], [row - 0.25, row + 0.25], color=colour, linewidth=2.6, zorder=4)
            shown = v if len(v) <= _MOST_POINTS else np.quantile(v, np.linspace(0, 1, _MOST_POINTS))
            # Points side by side, not on one another: a fixed low-discrepancy sequence instead of chance.
            up = ((np.arange(len(shown)) * 0.6180339887) % 1.0 - 0.5) * 0.34
            axes.scatter(shown, row + up, s=11, color=colour, alpha=0.55, linewidths=0, zorder=3)
            one = 1 / scale
            text = (
                f"{name}: median {number(middle * one, percent=percent)}, middle half "
                f"{number(low * one, percent=percent)} to {number(high * one, percent=percent)}, all "
                f"{number(float(v[0]) * one, percent=percent)} to {number(float(v[-1]) * one, percent=percent)}"
            )
            hits.append(Hit(axes, float(v[0]), row - 0.25, text, max(float(v[-1] - v[0]), 1e-9), 0.5))
        axes.xaxis.set_major_locator(_whole_steps(5, whole=False))
        axes.margins(x=0.04)
        axes.set_xlabel(label)
        return Drawing(figure, hits)

    return Chart(
        "per-node",
        f"Final {metric.replace('_', ' ')} of every node",
        caption,
        f"Strip chart of final {label}. {told}.",
        draw,
    )


def final_per_node(group: Group, metric: str) -> npt.NDArray[np.float64]:
    """The metric of each node at the last evaluation, over all seeds, without what was not finite."""
    found = [
        value
        for record in group.counted.records
        if record.evaluations
        for value in record.evaluations[-1].per_node.get(metric, [])
        if value is not None and math.isfinite(value)
    ]
    return np.array(found, dtype=float)


def _rows(names: Sequence[str], *, paper: bool, legend: Mapping[str, str] | None = None) -> tuple[Figure, Axes]:
    """Empty axes with one row per name, the names above the rows, so that they may be long."""
    from matplotlib.patches import Patch

    above = 0.35 if legend else 0.08
    height = 0.66 + above + 0.56 * max(1, len(names))
    figure = _blank(height, paper=paper)
    axes = figure.add_axes((0.035, 0.62 / height, 0.93, 1 - (0.62 + above) / height))
    axes.set_ylim(max(1, len(names)) - 0.6, -0.72)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    for row, name in enumerate(names):
        axes.annotate(
            textwrap.shorten(name, 56, placeholder="…"),
            (0, row - 0.29),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontsize=11.3,
        )
    if legend:
        figure.legend(
            handles=[Patch(color=colour, label=name) for name, colour in legend.items()],
            loc="upper left",
            bbox_to_anchor=(0.02, 1.0),
            ncols=5,
            handlelength=1.0,
            columnspacing=1.2,
            borderaxespad=0.3,
        )
    return figure, axes


# --- Graph and partition ----------------------------------------------------------------------------------

_MOST_EDGES = 1500
"""More edges than these are drawn as one picture within the figure, so that a page stays small."""
_CIRCLE_NODES = 32
_NAMED_NODES = 24


def topology_chart(slug: str, title: str, caption: str, graph: Graph) -> Chart:
    """The graph of one round.

    Small graphs stand on a circle, larger ones where springs along the edges put them.
    """
    directed = any(set(heard) != set(to) for heard, to in zip(graph.senders, graph.recipients, strict=True))
    pairs = list(graph.edges) if directed else [(i, j) for i, j in graph.edges if i < j]
    degrees = [len(row) for row in graph.recipients]
    alt = (
        f"Drawing of a graph of {graph.num_nodes} nodes with {len(pairs)} "
        f"{'directed ' if directed else ''}edges; a node sends to {min(degrees)} to {max(degrees)} others."
    )

    def draw(paper: bool) -> Drawing:
        from matplotlib.collections import LineCollection

        figure = _blank(4.2, paper=paper)
        axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
        axes.set_axis_off()
        axes.set_aspect("equal")
        places = _places(graph)
        n = graph.num_nodes
        if directed and len(pairs) <= 400:
            for i, j in pairs:
                axes.annotate(
                    "",
                    xy=places[j],
                    xytext=places[i],
                    arrowprops={
                        "arrowstyle": "-|>,head_width=0.22,head_length=0.45",
                        "color": _AXIS,
                        "lw": 0.9,
                        "shrinkA": 3,
                        "shrinkB": 11 if n <= _NAMED_NODES else 6,
                    },
                    zorder=1,
                )
        else:
            width = 1.1 if len(pairs) <= 100 else 0.7 if len(pairs) <= _MOST_EDGES else 0.25
            lines = LineCollection(
                [(places[i], places[j]) for i, j in pairs], colors=_AXIS, linewidths=width, alpha=0.6, zorder=1
            )
            lines.set_rasterized(len(pairs) > _MOST_EDGES)
            axes.add_collection(lines)
        named = n <= _NAMED_NODES
        area = 300 if named else max(9.0, 2600 / n)
        colour = PARTS["values"]
        axes.scatter(
            places[:, 0], places[:, 1], s=area, color=colour, edgecolors=_PAGE, linewidths=0.8, zorder=2
        )
        hits = []
        for node, (x, y) in enumerate(places):
            if named:
                axes.annotate(str(node), (x, y), ha="center", va="center", color=_PAGE, fontsize=10.3)
            text = f"node {node}: sends to {_listed(graph.recipients[node])}"
            hits.append(Hit(axes, float(x), float(y), text))
        axes.set_xlim(-1.12, 1.12)
        axes.set_ylim(-1.12, 1.12)
        return Drawing(figure, hits if n <= 400 else [])

    return Chart(slug, title, caption, alt, draw)


def _listed(numbers: Sequence[int]) -> str:
    if not numbers:
        return "nobody"
    shown = ", ".join(map(str, numbers[:12]))
    return f"{shown} and {len(numbers) - 12} more" if len(numbers) > 12 else shown


def _places(graph: Graph) -> npt.NDArray[np.float64]:
    """(N, 2) in [-1, 1]."""
    import networkx as nx

    n = graph.num_nodes
    drawn = nx.Graph()
    drawn.add_nodes_from(range(n))
    drawn.add_edges_from(graph.edges)
    degrees = [d for _, d in drawn.degree()]
    hub = int(np.argmax(degrees))
    angle = np.linspace(0, 2 * math.pi, n, endpoint=False)
    circle = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    if n > 2 and max(degrees) == n - 1 and sum(degrees) == 2 * (n - 1):  # a star: the hub in the middle
        places = np.zeros((n, 2))
        others = [i for i in range(n) if i != hub]
        angle = np.linspace(0, 2 * math.pi, n - 1, endpoint=False)
        places[others] = np.stack([np.sin(angle), np.cos(angle)], axis=1)
        return places
    if n <= _CIRCLE_NODES or n >= 500 or len(drawn.edges) > n * n // 4 or max(degrees) <= 2:
        return circle
    start = {i: circle[i] for i in range(n)}
    found = nx.spring_layout(drawn, pos=start, seed=1, iterations=120, k=1.6 / math.sqrt(n))
    places = np.array([found[i] for i in range(n)])
    places -= (places.max(axis=0) + places.min(axis=0)) / 2
    return np.asarray(places / (np.abs(places).max() or 1.0))


_MOST_COLUMNS, _MOST_CLASSES = 128, 80
_MOST_CELLS, _CELL = 2000, "#4a8fc4"
"""More cells than these are drawn as one picture, whose colour is fixed and so must do on light and dark."""


def partition_chart(slug: str, title: str, caption: str, partition: Partition, *, by_class: bool) -> Chart:
    """Who holds which samples: a heat map of class by node, or sorted bars of samples per node.

    Of more than 128 nodes, 96 evenly spaced ones are drawn; of more than 80 classes, the largest 79 and the
    rest as one. The caption says so.
    """
    samples = np.array(partition.samples)
    n = len(samples)
    if not by_class or not partition.counts:
        return _samples_chart(slug, title, caption, samples)
    nodes = np.arange(n) if n <= _MOST_COLUMNS else np.linspace(0, n - 1, 96).round().astype(int)
    counts = np.array(partition.counts)
    names = [str(label) for label in partition.labels]
    if len(names) > _MOST_CLASSES:
        order = np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[: _MOST_CLASSES - 1])
        rest = counts.sum(axis=1) - counts[:, order].sum(axis=1)
        caption += f" The {len(names) - len(order)} smallest classes are one row, “other”."
        names = [*(names[i] for i in order), "other"]
        counts = np.concatenate([counts[:, order], rest[:, None]], axis=1)
    if len(nodes) < n:
        caption += f" Drawn are {len(nodes)} of {n} nodes, evenly spaced."
    shown = counts[nodes].T
    most = int(shown.max()) if shown.size else 0
    held = (counts > 0).sum(axis=1)
    caption += f" The most saturated cell has {most} samples; empty cells have none."
    alt = (
        f"Heat map of samples per class and node: {len(names)} classes, {n} nodes, {samples.min()} to "
        f"{samples.max()} samples and {held.min()} to {held.max()} classes per node."
    )

    def draw(paper: bool) -> Drawing:
        from matplotlib.collections import PatchCollection
        from matplotlib.colors import to_rgb
        from matplotlib.patches import Rectangle

        height = min(5.2, max(2.6, 1.0 + 0.16 * len(names)))
        figure = _blank(height, paper=paper)
        axes = figure.add_axes((0.13, 0.62 / height, 0.85, 1 - 0.98 / height))
        strength = np.where(shown > 0, 0.15 + 0.85 * shown / max(1, most), 0.0)
        if np.count_nonzero(shown) <= _MOST_CELLS:
            cells = [
                Rectangle((i - 0.5, k - 0.5), 1, 1, facecolor=(PARTS["values"], strength[k, i]), linewidth=0)
                for k, i in zip(*np.nonzero(shown), strict=True)
            ]
            axes.add_collection(PatchCollection(cells, match_original=True))
        else:
            image = np.zeros((*shown.shape, 4))
            image[..., :3] = to_rgb(_CELL)
            image[..., 3] = strength
            axes.imshow(image, aspect="auto", interpolation="nearest", origin="upper")
        axes.set_xlim(-0.5, len(nodes) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False)
        step = max(1, math.ceil(len(names) / 10))
        axes.set_yticks(range(0, len(names), step), names[::step])
        across = max(1, math.ceil(len(nodes) / 8))
        axes.set_xticks(range(0, len(nodes), across), [str(nodes[i]) for i in range(0, len(nodes), across)])
        axes.set_xlabel("node")
        axes.set_title("class", color=_MUTED)
        hits = []
        if shown.size <= 1000:
            hits = [
                Hit(axes, i - 0.5, k - 0.5, f"node {nodes[i]}, class {names[k]}: {shown[k, i]} samples", 1, 1)
                for k in range(len(names))
                for i in range(len(nodes))
                if shown[k, i]
            ]
        return Drawing(figure, hits)

    return Chart(slug, title, caption.strip(), alt, draw)


def _samples_chart(slug: str, title: str, caption: str, samples: npt.NDArray[np.int64]) -> Chart:
    order = np.argsort(-samples, kind="stable")
    alt = (
        f"Bars of training samples per node, sorted: {len(samples)} nodes, from {samples.max()} down to "
        f"{samples.min()}, median {np.median(samples):.0f}."
    )

    def draw(paper: bool) -> Drawing:
        figure = _blank(3.2, paper=paper)
        axes = figure.add_axes((0.14, 0.2, 0.83, 0.68))
        axes.fill_between(
            np.arange(len(samples) + 1),
            np.append(samples[order], samples[order][-1]),
            step="post",
            color=PARTS["values"],
            linewidth=0,
        )
        axes.set_xlim(0, len(samples))
        axes.set_ylim(0, float(samples.max()) * 1.06 or 1.0)
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(_whole_steps(6))
        axes.set_xlabel("nodes, most samples first")
        axes.set_title("training samples", color=_MUTED)
        hits = []
        if len(samples) <= 400:
            hits = [
                Hit(axes, i, 0.0, f"node {node}: {samples[node]} samples", 1, float(samples[node]))
                for i, node in enumerate(order)
            ]
        return Drawing(figure, hits)

    return Chart(slug, title, caption, alt, draw)


# --- Out --------------------------------------------------------------------------------------------------


def as_svg(chart: Chart, prefix: str) -> str:
    """The figure as an ``<svg>`` element for the page.

    Args:
        chart: what to draw.
        prefix: of all ids within, so that several figures can share a page.
    """
    with _drawing():
        drawing = chart.draw(False)
        buffer = io.StringIO()
        drawing.figure.savefig(
            buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None, "Format": None}
        )
        hits = "".join(_hit(drawing, hit) for hit in drawing.hits)
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
    label = html.escape(chart.alt, quote=True)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">{body}{hits}</svg>'


def _themed(style: str) -> str:
    def variable(match: re.Match[str]) -> str:
        known = THEME.get(match[0].lower())
        return match[0] if known is None else f"var(--{known[0]})"

    return re.sub(r"#[0-9a-fA-F]{6}\b", variable, style)


def _hit(drawing: Drawing, hit: Hit) -> str:
    height = drawing.figure.bbox.height
    x, y = hit.axes.transData.transform((hit.x, hit.y))
    if not (math.isfinite(x) and math.isfinite(y)):
        return ""
    title = f"<title>{html.escape(hit.text)}</title>"
    if not hit.width:
        return f'<circle class="hit" cx="{x:.1f}" cy="{height - y:.1f}" r="6">{title}</circle>'
    right, top = hit.axes.transData.transform((hit.x + hit.width, hit.y + hit.height))
    left, right = sorted((x, right))
    below, above = sorted((height - y, height - top))
    return (
        f'<rect class="hit" x="{left:.1f}" y="{below:.1f}" width="{right - left:.1f}" '
        f'height="{above - below:.1f}">{title}</rect>'
    )


def save(chart: Chart, folder: Path) -> list[Path]:
    """Write ``<slug>.png`` and ``<slug>.pdf`` and return both paths."""
    with _drawing():
        return save_figure(chart.draw(True).figure, folder / chart.slug)


def metric_percent(metric: str) -> bool:
    """Whether a metric is shown in percent."""
    return is_percent(Target(metric, math.nan))
