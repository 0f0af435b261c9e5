"""Chart of accuracy against bytes: the end of every variant and the bytes that it took.

One point for each variant. Variants of one algorithm, such as several budgets, are joined in the algorithm's
colour, from the fewest bytes to the most. A ring marks the Pareto front: no other variant equals or
exceeds them with fewer bytes.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING

from jwins.report.chart import Chart, page_figure, steps
from jwins.report.colours import MUTED, PAGE, TEXT, Style, styles_of
from jwins.report.curve_charts import YAxis, byte_ticks, mark_level
from jwins.report.formatting import and_list, final_text, size
from jwins.report.seed_groups import Group, Target, deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FAR = 8.0
"""Points farther from the best than this multiple of the typical distance are named instead of drawn,"""
_CLOSE = 0.1
"""except those within this fraction of the best value, and full sharing."""


@dataclass(frozen=True, slots=True)
class Point:
    """End of a variant.

    Attributes:
        algorithm: its algorithm, whose points are joined.
        sent: bytes per node, mean over seeds; above 0.
        final: value of the metric, mean over seeds; finite.
        deviation: deviation of the final value over seeds, None for one seed.
    """

    name: str
    algorithm: str
    style: Style
    sent: float
    final: float
    deviation: float | None


def _points(groups: Sequence[Group], styles: Sequence[Style], metric: str, over: int) -> list[Point]:
    """Return the points of variants with a final value that sent something."""
    found = []
    for group, style in zip(groups, styles, strict=True):
        records = [record for record in group.counted.records if record.evaluations]
        finals = [record.final(metric, over) for record in records]
        sent = statistics.fmean(record.bytes_per_node()[-1] for record in records) if records else 0.0
        if sent > 0 and all(map(math.isfinite, finals)):
            mean = statistics.fmean(finals)
            found.append(Point(group.name, group.algorithm, style, sent, mean, deviation(finals)))
    return found


def front(points: Sequence[Point], *, lower_is_better: bool) -> list[Point]:
    """Return the points that no other point beats in bytes or value without being worse in the other.

    Points that are equal in both are all on the front.
    """
    sign = -1.0 if lower_is_better else 1.0

    def beaten(point: Point) -> bool:
        return any(
            other.sent <= point.sent
            and sign * other.final >= sign * point.final
            and (other.sent, other.final) != (point.sent, point.final)
            for other in points
        )

    return sorted((point for point in points if not beaten(point)), key=lambda point: point.sent)


def pareto_chart(
    groups: Sequence[Group],
    styles: Sequence[Style],
    target: Target,
    *,
    full: str | None,
    over: int = 1,
    slug: str = "pareto",
) -> Chart | None:
    """Return the chart of the final metric against bytes per node; None for fewer than two points.

    Of the target only the metric counts. The final value of the variant ``full``, the mean of its last ``over``
    evaluations, is drawn as a line.
    """
    points = _points(groups, styles, target.metric, over)
    if len(points) < 2:
        return None
    y_axis = YAxis.of_metric(target)
    near = _near(points, full, lower_is_better=target.lower_is_better)
    best = front(points, lower_is_better=target.lower_is_better)
    level = next((point for point in near if point.name == full), None)
    title = f"Final {y_axis.label.partition(' in %')[0].partition(',')[0]} against bytes"

    def draw(paper: bool) -> Figure:
        drawn = page_figure(3.66, paper=paper, legend_rows=math.ceil(len(near) / 2))
        axes = drawn.add_subplot()
        _set_limits(axes, near, y_axis)
        for algorithm in dict.fromkeys(point.algorithm for point in near):
            _join(axes, [point for point in near if point.algorithm == algorithm], algorithm, y_axis)
        for point in near:
            _draw(axes, point, y_axis, ringed=point in best)
        axes.set_title(f"final {y_axis.label}", color=MUTED)
        axes.set_xlabel("bytes sent per node (log)")
        if level is not None:
            name = f"{level.name} {final_text(level.final, percent=y_axis.percent)}"
            name = name if len(name) < 32 else "full sharing"
            mark_level(axes, level.final * y_axis.scale, name, size=10.8, at=_gap(axes, near), above=True)
        if paper:
            drawn.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
        return drawn

    return Chart(slug, title, _caption(points, near, y_axis), draw)


def _near(points: Sequence[Point], full: str | None, *, lower_is_better: bool) -> list[Point]:
    """Return the points to draw, without those so far off that all others would be on one line."""
    finals = [point.final for point in points]
    best = min(finals) if lower_is_better else max(finals)
    typical = statistics.median(abs(best - final) for final in finals)
    most = max(_FAR * typical, _CLOSE * abs(best))
    return [point for point in points if point.name == full or abs(best - point.final) <= most]


def _caption(points: Sequence[Point], near: Sequence[Point], y_axis: YAxis) -> str:
    better = "lower" if y_axis.lower_is_better else "higher"
    text = f"To the left is cheaper, {better} is better. Ringed: no other variant is as good for as few bytes."
    if any(point.deviation is not None for point in near):
        text += " Bars are one standard deviation over seeds."
    algorithms = [point.algorithm for point in near]
    if any(algorithms.count(kind) > 1 for kind in algorithms):
        text += " Lines join variants of one algorithm."
    far = [_said(point, y_axis) for point in points if point not in near]
    return text + (f" Too far off to be shown: {and_list(far)}." if far else "")


def _said(point: Point, y_axis: YAxis) -> str:
    spread = (
        ""
        if point.deviation is None
        else f" ± {final_text(point.deviation, percent=y_axis.percent, unit=False)}"
    )
    return f"{point.name}: {final_text(point.final, percent=y_axis.percent)}{spread} for {size(point.sent)}"


# --- Drawing ----------------------------------------------------------------------------------------------


def _set_limits(axes: Axes, points: Sequence[Point], y_axis: YAxis) -> None:
    reach = [
        (point.final + side * (point.deviation or 0.0)) * y_axis.scale for point in points for side in (-1, 1)
    ]
    low, high = min(reach), max(reach)
    margin = 0.12 * (high - low) or abs(high) * 0.05 or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(steps(6, least=3))
    byte_ticks(axes, min(point.sent for point in points) / 1.3, max(point.sent for point in points) * 1.3)


def _gap(axes: Axes, points: Sequence[Point]) -> float:
    """Return the place of a label in the widest gap between points, as :func:`mark_level` takes it."""
    low, high = map(math.log, axes.get_xlim())
    places = sorted([0.0, *((math.log(point.sent) - low) / (high - low) for point in points), 1.0])
    left, right = max(itertools.pairwise(places), key=lambda gap: gap[1] - gap[0])
    middle = (left + right) / 2
    return middle if 0.3 < middle < 0.7 else float(round(middle))  # long labels start at an end


def _join(axes: Axes, points: Sequence[Point], algorithm: str, y_axis: YAxis) -> None:
    if len(points) < 2:
        return
    (style,) = styles_of([algorithm])
    ordered = sorted(points, key=lambda point: point.sent)
    finals = [point.final * y_axis.scale for point in ordered]
    axes.plot([point.sent for point in ordered], finals, color=style.colour, linewidth=1.6, zorder=2)


def _draw(axes: Axes, point: Point, y_axis: YAxis, *, ringed: bool) -> None:
    x, y = point.sent, point.final * y_axis.scale
    if point.deviation is not None:
        axes.errorbar(
            x,
            y,
            yerr=point.deviation * y_axis.scale,
            color=point.style.colour,
            elinewidth=1.4,
            capsize=3,
            zorder=3,
        )
    if ringed:
        axes.plot(
            x,
            y,
            linestyle="none",
            marker="o",
            markersize=14,
            markerfacecolor="none",
            markeredgecolor=TEXT,
            markeredgewidth=1.3,
            color=TEXT,
            zorder=3,
        )
    axes.plot(
        x,
        y,
        linestyle="none",
        marker=point.style.marker,
        color=point.style.colour,
        markersize=8,
        markeredgecolor=PAGE,
        markeredgewidth=0.9,
        zorder=4,
        label=shorten(point.name, 34, placeholder="…"),
    )
