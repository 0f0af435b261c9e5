"""The figure of a comparison: a metric against rounds, bytes and virtual seconds."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jwins.report.words import is_percent
from jwins.results.groups import Group, Target
from jwins.results.record import Record
from jwins.runfiles.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "colours_of", "figure", "mark_level", "save_figure"]

COLOURS = {
    "full": "#4d4d4d",
    "random_k": "#e69f00",
    "top_k": "#009e73",
    "choco": "#0072b2",
    "jwins": "#d55e00",
}
"""One colour per algorithm, told apart with any colour vision (after Okabe and Ito)."""


_OWN_COLOUR = "#cc79a7"


_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (5, 1.5, 1, 1.5)))


_MARKERS = {"full": "o", "random_k": "^", "top_k": "v", "choco": "s", "jwins": "D"}


@dataclass(frozen=True)
class _Axis:
    label: str
    values: Callable[[Record], list[float]]
    log: bool = False


def figure(groups: Sequence[Group], target: Target | None, *, metric: str, title: str = "") -> Figure:
    """The metric against rounds, against bytes per node (log axis) and against virtual seconds.

    Lines are means over seeds; bands reach from the lowest to the highest seed.

    Args:
        groups: the variants.
        target: drawn as a dotted line, if there is one.
        metric: what to draw.
        title: above everything.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    axes_of = [
        _Axis("rounds", lambda record: [float(row.round) for row in record.evaluations]),
        _Axis("MB sent per node (log)", lambda r: [b / 1e6 for b in r.bytes_per_node()], log=True),
        _Axis("virtual seconds", lambda record: [row.time_s for row in record.evaluations]),
    ]
    with rc_context(_STYLE):
        drawing = Figure(figsize=(12.0, 4.6), dpi=150)
        FigureCanvasAgg(drawing)
        panels = drawing.subplots(1, 3, sharey=True)
        percent = is_percent(Target(metric, math.nan))
        styles = _styles(groups)
        ends: list[float] = []
        for panel, axis in zip(panels, axes_of, strict=True):
            for group, style in zip(groups, styles, strict=True):
                ends += _draw(panel, group, metric, axis, style, 100.0 if percent else 1.0)
            panel.set_xlabel(axis.label)
            if axis.log:
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
                panel.xaxis.set_minor_formatter(NullFormatter())
            else:
                panel.set_xlim(left=0)
        panels[0].set_ylabel(f"{metric} in %, mean over nodes" if percent else f"{metric}, mean over nodes")
        _limit(panels[0], groups, metric, 100.0 if percent else 1.0)
        if target is not None:
            level = target.value * (100.0 if percent else 1.0)
            name = f"target {level:.1f} %" if percent else f"target {level:.4g}"
            for panel in panels:
                named = name if panel is panels[0] else ""
                mark_level(panel, level, named, size=9.0, line="#777777", letters="#555555")
        handles, names = panels[0].get_legend_handles_labels()
        rows = math.ceil(len(names) / 5)
        drawing.legend(
            handles,
            names,
            loc="upper left",
            bbox_to_anchor=(0.045, 0.93 if title else 1.0),
            ncols=math.ceil(len(names) / rows) if rows else 1,
            handlelength=3.0,
            columnspacing=1.8,
        )
        if title:
            drawing.text(0.052, 0.975, title, ha="left", va="top", fontsize=12.5, fontweight="bold")
        top = (0.90 if title else 0.97) - 0.055 * rows
        drawing.subplots_adjust(left=0.06, right=0.985, bottom=0.13, top=top, wspace=0.07)
    return drawing


def save_figure(drawing: Figure, path: Path) -> list[Path]:
    """Write ``path`` as PNG and as PDF, without dates in them, and return both."""
    from matplotlib import rc_context

    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None, "Producer": None})):
        buffer = io.BytesIO()
        with rc_context(_STYLE):
            drawing.savefig(buffer, format=suffix[1:], metadata=metadata)
        write_atomically(path.with_suffix(suffix), buffer.getvalue())
        written.append(path.with_suffix(suffix))
    return written


_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": "#222222",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": "#222222",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "pdf.fonttype": 42,
    "savefig.facecolor": "white",
}


def colours_of(algorithms: Sequence[str]) -> list[tuple[str, int]]:
    """Whose colour each variant has, and how many before it have the same.

    A variant has its algorithm's colour. Where an algorithm has more than three variants, as in an ablation,
    all but the first also take those of algorithms that are not there.

    Args:
        algorithms: of the variants, in order; one that is not in ``COLOURS`` counts as ``own``.
    """
    keys = [algorithm if algorithm in COLOURS else "own" for algorithm in algorithms]
    spare = [key for key in ("choco", "top_k", "own", "random_k") if key not in keys]
    colours: list[str] = []
    for number, key in enumerate(keys):
        palette = [key, *spare] if keys.count(key) > 3 else [key]
        colours.append(palette[keys[:number].count(key) % len(palette)])
    return [(colour, colours[:number].count(colour)) for number, colour in enumerate(colours)]


def _styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Colours as in ``colours_of``; those of one differ in dashes, from the fifth on in shade, too."""
    return [
        {
            "color": _shade(COLOURS.get(key, _OWN_COLOUR), number // len(_STYLES)),
            "marker": _MARKERS.get(group.algorithm, "P"),
            "linestyle": _STYLES[number % len(_STYLES)],
        }
        for group, (key, number) in zip(groups, colours_of([g.algorithm for g in groups]), strict=True)
    ]


def _shade(colour: str, number: int) -> str:
    """``colour`` for number 0, lighter for odd and darker for further even ones."""
    towards, amount = (255 if number % 2 else 0), (0.45 if number else 0.0)
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (towards - c) * amount):02x}" for c in channels)


def _draw(
    panel: Axes, group: Group, metric: str, axis: _Axis, style: dict[str, Any], scale: float
) -> list[float]:
    """One variant in one panel; returns where its line ends."""
    # A seed that stopped earlier would bend the mean; so the mean goes as far as every seed does that counts.
    records, diverged = group.counted.records, group.diverged
    shared = min((len(record.evaluations) for record in records), default=0)
    skip = 1 if axis.log else 0  # nothing was sent before the first round
    if shared <= skip:
        return []
    x = np.mean([axis.values(record)[skip:shared] for record in records], axis=0)
    y = np.array([record.series(metric)[skip:shared] for record in records]) * scale
    if len(y) > 1:
        panel.fill_between(x, y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.16, linewidth=0)
    mean = y.mean(axis=0)
    panel.plot(
        x,
        mean,
        label=f"{group.name} ({diverged})" if diverged else group.name,
        markevery=[len(x) - 1],
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=1.0,
        clip_on=False,
        zorder=3,
        **style,
    )
    if diverged == "diverged":
        panel.plot(x[-1:], mean[-1:], marker="x", color=style["color"], markersize=11, mew=2.5, zorder=4)
    return [float(mean[-1])]


def mark_level(axes: Axes, y: float, name: str, *, size: float, line: str, letters: str) -> None:
    """A dotted horizontal line, named at one end, above or below it: where the fewest curves run.

    Args:
        axes: with their curves, scales and limits as they will be.
        y: where, in data units.
        name: what to write; "" for nothing.
        size: of the letters, points.
        line: colour of the line.
        letters: colour of the letters.
    """
    if name:
        at_end, above = _clear_place(axes, y, width=0.62 * size * len(name), height=1.5 * size)
        axes.annotate(
            name,
            (float(at_end), y),
            xycoords=("axes fraction", "data"),
            xytext=(-4 if at_end else 4, 3 if above else -3),
            textcoords="offset points",
            ha="right" if at_end else "left",
            va="bottom" if above else "top",
            fontsize=size,
            color=letters,
            zorder=5,
        )
    axes.axhline(y, color=line, linewidth=1.1, linestyle=(0, (2, 2)), zorder=1)


def _clear_place(axes: Axes, y: float, *, width: float, height: float) -> tuple[bool, bool]:
    """(at the end, above): the corner at a level where a box, in points, covers the least of the curves."""
    drawing = axes.get_figure()
    assert drawing is not None
    width, height = width * drawing.dpi / 72.0, height * drawing.dpi / 72.0
    points = [np.empty((0, 2))]
    between = np.linspace(0.0, 1.0, 24, endpoint=False)[:, None]
    for curve in axes.get_lines():
        corners = curve.get_transform().transform(np.asarray(curve.get_xydata(), dtype=np.float64))
        points += [a + between * (b - a) for a, b in itertools.pairwise(corners)]
        points.append(corners[-1:])
    x_all, y_all = np.concatenate(points).T
    (left, bottom), (right, top) = axes.transAxes.transform([(0.0, 0.0), (1.0, 1.0)])
    level = float(axes.transData.transform((axes.get_xlim()[1], y))[1])

    def covered(place: tuple[bool, bool]) -> tuple[bool, int]:
        at_end, above = place
        x0, y0 = (right - width if at_end else left), (level if above else level - height)
        inside = (x0 <= x_all) & (x_all <= x0 + width) & (y0 <= y_all) & (y_all <= y0 + height)
        return not bottom <= y0 <= top - height, int(inside.sum())

    return min(itertools.product((True, False), (False, True)), key=covered)


def _limit(panel: Axes, groups: Sequence[Group], metric: str, scale: float) -> None:
    """Leave out values so far off that they would flatten everything else, such as a diverging loss."""
    values = np.array([v for g in groups for r in g.records for v in r.series(metric)]) * scale
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return
    low, high = float(values.min()), float(values.max())
    typical = float(np.quantile(values, 0.9))
    if high - low > 10 * (typical - low) > 0:
        high = typical
    margin = 0.04 * (high - low) or 1.0
    panel.set_ylim(low - margin, high + margin)
