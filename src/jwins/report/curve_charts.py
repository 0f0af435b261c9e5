"""Curves: a metric against rounds, bytes and virtual seconds, for the page and for the figure of a comparison.

Lines are means over seeds; bands reach from the lowest to the highest seed. Curves that coincide remain
distinguishable: those drawn first are wider and show on both sides of those above, and no two have their
    markers
at the same evaluation.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jwins.report.chart import Chart, blank, drawing_style, page_figure, steps
from jwins.report.colours import MUTED, PAGE, Style, styles_of
from jwins.report.formatting import is_percent, number, size, spaced
from jwins.report.seed_groups import Group, Target
from jwins.run_folder.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class XAxis:
    """Horizontal axis of curves.

    Attributes:
        values: values of each evaluation of a run.
        in_bytes: whether these are bytes. The axis is then logarithmic and omits the start, where nothing was
            sent.
        whole: whether values are whole numbers.
    """

    label: str
    values: Callable[[Record], list[float]]
    in_bytes: bool = False
    whole: bool = False


ROUNDS = XAxis("rounds", lambda record: [float(row.round) for row in record.evaluations], whole=True)
SENT = XAxis("bytes sent per node", Record.bytes_per_node, in_bytes=True)


def seconds(clock: str = "virtual") -> XAxis:
    """Return an axis of a clock's seconds, named by a word or none."""
    return XAxis(f"{clock} seconds".strip(), lambda record: [row.time_s for row in record.evaluations])


@dataclass(frozen=True, slots=True)
class YAxis:
    """Vertical axis of curves.

    Attributes:
        values: values of each evaluation of a run; NaN leaves a gap.
        percent: whether it is a fraction shown in percent.
        target: level of a dotted line, or None.
        compared: whether variants are compared by it, so that the axis must show their ends.
    """

    label: str
    values: Callable[[Record], list[float]]
    percent: bool = False
    target: float | None = None
    compared: bool = False
    lower_is_better: bool = False

    @property
    def scale(self) -> float:
        """Convert the metric to the axis."""
        return 100.0 if self.percent else 1.0

    @classmethod
    def of_metric(cls, target: Target) -> YAxis:
        """Return the axis of a comparison's metric, with its target if that has a value."""
        percent = is_percent(target.metric)
        return cls(
            f"{spaced(target.metric)}{' in %' if percent else ''}, mean over nodes",
            lambda record: record.series(target.metric),
            percent,
            target.value if math.isfinite(target.value) else None,
            compared=True,
            lower_is_better=target.lower_is_better,
        )


# --- Curves and limits ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Curve:
    """One variant's curve."""

    name: str
    lost: str
    style: Style
    place: int
    x: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    rounds: list[int]
    seeds: int

    @property
    def diverged(self) -> bool:
        return self.lost == "diverged"


def _curves(groups: Sequence[Group], styles: Sequence[Style], x_axis: XAxis, y_axis: YAxis) -> list[_Curve]:
    found: list[_Curve] = []
    for group, style in zip(groups, styles, strict=True):
        # A run that stopped earlier would bend the mean, so the mean ends with the shortest run that counts.
        records = group.counted.records
        shared = min((len(record.evaluations) for record in records), default=0)
        skip = 0
        if x_axis.in_bytes:  # a log axis cannot show values measured before anything was sent
            while skip < shared and (skip == 0 or not any(x_axis.values(record)[skip] for record in records)):
                skip += 1
        if shared <= skip:
            continue
        x = np.mean([x_axis.values(record)[skip:shared] for record in records], axis=0)
        y = np.array([y_axis.values(record)[skip:shared] for record in records], dtype=float) * y_axis.scale
        with np.errstate(invalid="ignore"):
            mean, low, high = y.mean(axis=0), y.min(axis=0), y.max(axis=0)
        rounds = [row.round for row in records[0].evaluations[skip:shared]]
        found.append(
            _Curve(group.name, group.diverged, style, len(found), x, mean, low, high, rounds, len(records))
        )
    return found


def means(groups: Sequence[Group], y_axis: YAxis) -> list[dict[int, float]]:
    """Return the points of each variant's curve: the mean over seeds by round, not in percent."""
    styles = styles_of([group.algorithm for group in groups])
    points = {
        curve.name: dict(zip(curve.rounds, (curve.mean / y_axis.scale).tolist(), strict=True))
        for curve in _curves(groups, styles, ROUNDS, y_axis)
    }
    return [points.get(group.name, {}) for group in groups]


@dataclass(frozen=True, slots=True)
class _Limits:
    """Range of an axis, with a note if it leaves out the beginning of the curves."""

    low: float
    high: float
    note: str = ""


_ENDS_SHARE, _TARGET_SHARE = 0.4, 0.8
"""Fractions of an axis's height for the curves' ends, and down to the target."""


def _limits(curves: Sequence[_Curve], y_axis: YAxis) -> _Limits | None:
    """Return the range of the axis for these curves, None if there is nothing to show.

    Values that would flatten everything else, such as a diverging loss, are left out. On the axis that compares
    variants, the beginning of the curves is left out, too, if the ends would be too close to tell apart. The
    target remains visible.
    """
    pieces = [piece for curve in curves for piece in (curve.low, curve.high)]
    values = np.concatenate(pieces) if pieces else np.zeros(0)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    low, high = float(values.min()), float(values.max())
    typical = float(np.quantile(values, 0.9))
    if high - low > 10 * (typical - low) > 0:
        high = typical
    levels = [] if y_axis.target is None else [y_axis.target * y_axis.scale]
    low, high = min([low, *levels]), max([high, *levels])
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    whole = _Limits(low - margin, high + margin)
    ends = [float(c.mean[-1]) for c in curves if not c.diverged and math.isfinite(c.mean[-1])]
    if not y_axis.compared or len(ends) < 2:
        return whole
    best = low if y_axis.lower_is_better else high
    view = max(
        max(abs(best - end) for end in ends) / _ENDS_SHARE,
        max((abs(best - level) for level in levels), default=0.0) / _TARGET_SHARE,
        0.1 * (high - low),
    )
    if not 0.0 < view < 0.75 * (high - low):
        return whole
    step = 10 ** math.floor(math.log10(view)) / 2
    margin, unit = 0.06 * view, " %" if y_axis.percent else ""
    if y_axis.lower_is_better:
        top = math.ceil((low + view) / step) * step
        return _Limits(low - margin, top, f"The axis ends at {top:.4g}{unit}; earlier values are higher.")
    bottom = math.floor((high - view) / step) * step
    return _Limits(bottom, high + margin, f"The axis begins at {bottom:.4g}{unit}; earlier values are lower.")


# --- Drawing ----------------------------------------------------------------------------------------------


def _draw_curve(axes: Axes, curve: _Curve, curves: Sequence[_Curve], limits: _Limits | None) -> None:
    style, many = curve.style, len(curves)
    if curve.seeds > 1:
        axes.fill_between(curve.x, curve.low, curve.high, color=style.colour, alpha=0.17, linewidth=0)
    axes.plot(
        curve.x,
        curve.mean,
        color=style.colour,
        linestyle=style.dash,
        linewidth=_width(curve.place, many),
        marker=style.marker,
        markevery=_marked(curve, many, limits),
        markersize=6.5,
        markeredgecolor=PAGE,
        markeredgewidth=0.9,
        zorder=3,
        label=textwrap.shorten(curve.name + (f" ({curve.lost})" if curve.lost else ""), 34, placeholder="…"),
    )
    if curve.diverged:
        measured = np.flatnonzero(np.isfinite(curve.mean))
        if len(measured):
            x, y = curve.x[measured[-1]], curve.mean[measured[-1]]
            axes.plot(x, y, marker="x", color=style.colour, markersize=10, markeredgewidth=2.4, zorder=4)


def _width(place: int, many: int) -> float:
    """Return the width of a line in points: 1.8 for the topmost, and up to 0.8 more for each one below it."""
    if many < 2:
        return 2.0
    return 1.8 + min(0.8, 2.4 / (many - 1)) * (many - 1 - place)


def _marked(curve: _Curve, many: int, limits: _Limits | None) -> list[int]:
    """Return the points with a marker: about five visible ones, none at a marker of another curve."""
    seen = _in_sight(curve, limits)
    if len(seen) == 0:
        return []
    step = max(many, math.ceil(len(seen) / 5))
    return [int(seen[-1 - back]) for back in range(curve.place % len(seen), len(seen), step)]


def _in_sight(curve: _Curve, limits: _Limits | None) -> npt.NDArray[np.intp]:
    """Return the points of the mean that are on the axis."""
    low, high = (-math.inf, math.inf) if limits is None else (limits.low, limits.high)
    return np.flatnonzero((curve.mean >= low) & (curve.mean <= high))


def _draw_panel(
    axes: Axes,
    curves: Sequence[_Curve],
    limits: _Limits | None,
    x_axis: XAxis,
    y_axis: YAxis,
    *,
    size: float,
) -> None:
    """Draw all curves, fitting axes, and the target with a label of ``size`` points."""
    for curve in curves:
        _draw_curve(axes, curve, curves, limits)
    if limits is not None:
        axes.set_ylim(limits.low, limits.high)
        axes.yaxis.set_major_locator(steps(6, least=3))
    axes.set_xlabel(x_axis.label)
    if x_axis.in_bytes and curves:
        _byte_ticks(axes, curves, limits)
    elif x_axis.in_bytes:
        _write_text(axes, "nothing was sent")
    elif curves:
        axes.set_xlim(0, max(float(c.x[-1]) for c in curves) * 1.03 or 1.0)
        axes.xaxis.set_major_locator(steps(6, only_whole=x_axis.whole))
    if not any(np.isfinite(curve.mean).any() for curve in curves):
        if not x_axis.in_bytes or curves:
            _write_text(axes, "nothing measured yet")
    elif y_axis.target is not None:
        name = f"target {number(y_axis.target, percent=y_axis.percent)}"
        # At their ends curves have passed the target, so its other side is empty.
        above = y_axis.lower_is_better
        mark_level(axes, y_axis.target * y_axis.scale, name, size=size, at=1.0, above=above)


def _byte_ticks(axes: Axes, curves: Sequence[_Curve], limits: _Limits | None) -> None:
    """Set limits and ticks of an axis of bytes, which begins where the first curve becomes visible."""
    first = [seen[0] if len(seen := _in_sight(curve, limits)) else 0 for curve in curves]
    low = min(float(c.x[max(0, i - 1)]) for c, i in zip(curves, first, strict=True))
    high = max(float(c.x[-1]) for c in curves)
    byte_ticks(axes, low / 1.12, high * 1.12)


def byte_ticks(axes: Axes, low: float, high: float) -> None:
    """Set a log axis of bytes from ``low`` to ``high``, both above 0, with at most five round numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(ticks) <= 5:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(lambda value, _: size(float(f"{value:.6g}")))
    axes.xaxis.set_minor_locator(NullLocator())


def mark_level(axes: Axes, y: float, name: str, *, size: float, at: float, above: bool) -> None:
    """Draw a dotted line at the height ``y``, with a label of ``size`` points above or below it.

    The label is ``at`` 0, the left end, to 1, the right end.
    """
    axes.annotate(
        name,
        (at, y),
        xycoords=("axes fraction", "data"),
        xytext=(4 - 8 * at, 3 if above else -3),
        textcoords="offset points",
        ha="left" if at == 0.0 else "right" if at == 1.0 else "center",
        va="bottom" if above else "top",
        fontsize=size,
        color=MUTED,
        zorder=5,
    )
    axes.axhline(y, color=MUTED, linewidth=1.1, linestyle=(0, (2, 2)), zorder=1)


# --- The page's figures -----------------------------------------------------------------------------------


def curve_chart(
    slug: str,
    title: str,
    caption: str,
    groups: Sequence[Group],
    styles: Sequence[Style],
    x_axis: XAxis,
    y_axis: YAxis,
) -> Chart:
    """Return a chart of one measurement against another."""
    curves = _curves(groups, styles, x_axis, y_axis)
    limits = _limits(_curves(groups, styles, ROUNDS, y_axis), y_axis)  # the same for every horizontal axis
    caption = f"{caption} {limits.note if limits is not None else ''}".strip()

    def draw(paper: bool) -> Figure:
        drawn = page_figure(3.46, paper=paper, legend_rows=math.ceil(len(curves) / 2))
        axes = drawn.add_subplot()
        axes.set_title(y_axis.label, color=MUTED)
        _draw_panel(axes, curves, limits, x_axis, y_axis, size=10.8)
        if paper and curves:
            drawn.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, handlelength=3.0)
        return drawn

    return Chart(slug, title, caption, draw)


def _write_text(axes: Axes, text: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)


# --- The figure of a comparison ---------------------------------------------------------------------------


def figure(groups: Sequence[Group], target: Target | None, *, metric: str, title: str = "") -> Figure:
    """Draw the metric against rounds, against bytes per node (log axis) and against virtual seconds."""
    lower = target is not None and target.lower_is_better
    y_axis = YAxis.of_metric(Target(metric, math.nan if target is None else target.value, lower))
    styles = styles_of([group.algorithm for group in groups])
    sizes: dict[str, Any] = {"font.size": 10.5, "legend.fontsize": 10.5}
    with drawing_style(**sizes):
        drawn = blank(12.0, 4.6, dpi=150)
        panels = drawn.subplots(1, 3, sharey=True)
        limits = _limits(_curves(groups, styles, ROUNDS, y_axis), y_axis)
        for panel, x_axis in zip(panels, (ROUNDS, SENT, seconds()), strict=True):
            _draw_panel(panel, _curves(groups, styles, x_axis, y_axis), limits, x_axis, y_axis, size=9.0)
        panels[1].set_xlabel(f"{SENT.label} (log)")
        panels[0].set_ylabel(y_axis.label)
        for columns in range(5, 0, -1):
            legend = drawn.legend(
                *panels[0].get_legend_handles_labels(),
                loc="outside upper left",
                ncols=columns,
                handlelength=3.0,
                columnspacing=1.8,
                title=title,
                title_fontproperties={"size": 12.5, "weight": "bold"},
                alignment="left",
            )
            if columns == 1 or legend.get_window_extent().width <= drawn.bbox.width:
                break
            legend.remove()
    return drawn
