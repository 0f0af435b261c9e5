"""Figures with one row per variant: its bytes by kind, and the final metric of its nodes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from jwins.report.chart import Chart, Drawing, HoverTarget, page_figure, steps
from jwins.report.colours import KIND_COLOURS, PAGE, Style
from jwins.report.formatting import number, size, spaced
from jwins.report.seed_groups import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def bytes_by_kind(group: Group) -> dict[str, float]:
    """Return bytes per node until the last evaluation, by kind, mean over seeds."""
    kinds = {}
    for kind in KIND_COLOURS:
        sent = [
            getattr(record.evaluations[-1].traffic, kind) / record.start.num_nodes
            for record in group.counted.records
            if record.evaluations
        ]
        kinds[kind] = float(np.mean(sent)) if sent else 0.0
    return kinds


def kinds_sent(groups: Sequence[Group]) -> list[str]:
    """Return the kinds of bytes of at least one variant; all kinds if nothing was sent."""
    found = [bytes_by_kind(group) for group in groups]
    return [kind for kind in KIND_COLOURS if any(kinds[kind] > 0 for kinds in found)] or list(KIND_COLOURS)


def bytes_chart(groups: Sequence[Group]) -> Chart:
    """Draw the bytes of each variant by kind: a stacked bar each, per node and mean over seeds."""
    sent = kinds_sent(groups)
    split = {group.name: {kind: bytes_by_kind(group)[kind] for kind in sent} for group in groups}
    alt = "Stacked bars of bytes per node. " + "; ".join(
        f"{name}: " + ", ".join(f"{kind} {size(value)}" for kind, value in kinds.items())
        for name, kinds in split.items()
    )
    legend = {kind: KIND_COLOURS[kind] for kind in sent}

    def draw(paper: bool) -> Drawing:
        figure, axes = _rows([group.name for group in groups], paper=paper, legend=legend if paper else {})
        most = max((sum(kinds.values()) for kinds in split.values()), default=0.0) or 1.0
        hover_targets = []
        for row, (name, kinds) in enumerate(split.items()):
            left, total = 0.0, sum(kinds.values())
            for kind, value in kinds.items():
                gap = 0.8 if value > 0.01 * most else 0.0
                axes.barh(
                    row, value, left=left, height=0.42, color=KIND_COLOURS[kind], edgecolor=PAGE, linewidth=gap
                )
                if value > 0:
                    text = f"{name}, {kind}: {size(value)} ({value / total * 100:.1f} %)"
                    hover_targets.append(HoverTarget(axes, left, row - 0.21, text, value, 0.42))
                left += value
            axes.annotate(
                size(total), (left, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10.8
            )
        axes.set_xlim(0, most * 1.17)
        axes.xaxis.set_major_locator(steps(4))
        axes.xaxis.set_major_formatter(lambda value, _: size(value) if value else "0")
        axes.set_xlabel("bytes sent per node")
        return Drawing(figure, hover_targets)

    return Chart("bytes-by-content", "Bytes per node", "", alt + ".", draw)


_MAX_POINTS = 150


def nodes_chart(groups: Sequence[Group], styles: Sequence[Style], metric: str, *, percent: bool) -> Chart:
    """Draw every node's final metric, over all seeds: points, with a box for the middle half and the median."""
    values = {group.name: final_per_node(group, metric) for group in groups}
    label = f"{spaced(metric)}{' in %' if percent else ''}"
    described = "; ".join(
        f"{name}: lowest {number(float(v.min()), percent=percent)}, median "
        f"{number(float(np.median(v)), percent=percent)}, highest {number(float(v.max()), percent=percent)}"
        for name, v in values.items()
        if len(v)
    )
    caption = "One point per node and seed; the box holds the middle half, its line is the median."
    if any(len(v) > _MAX_POINTS for v in values.values()):
        caption += f" Where there are more than {_MAX_POINTS} points, evenly spaced quantiles are drawn."

    def draw(paper: bool) -> Drawing:
        figure, axes = _rows(list(values), paper=paper)
        hover_targets = []
        for row, (name, style) in enumerate(zip(values, styles, strict=True)):
            if len(values[name]):
                hover_targets.append(_strip(axes, row, name, style, values[name], percent=percent))
        axes.xaxis.set_major_locator(steps(5, least=3))
        axes.margins(x=0.04)
        axes.set_xlabel(label)
        return Drawing(figure, hover_targets)

    title, alt = f"Final {spaced(metric)} of every node", f"Strip chart of final {label}. {described}."
    return Chart("per-node", title, caption, alt, draw)


def _strip(
    axes: Axes, row: int, name: str, style: Style, values: npt.NDArray[np.float64], *, percent: bool
) -> HoverTarget:
    """Draw one variant's points and box, with their texts."""
    scale, colour = (100.0 if percent else 1.0), style.colour
    v = np.sort(values) * scale
    low, middle, high = (float(q) for q in np.quantile(v, (0.25, 0.5, 0.75)))
    axes.barh(row, high - low, left=low, height=0.42, color=colour, alpha=0.22, linewidth=0, zorder=2)
    axes.plot([middle, middle], [row - 0.25, row + 0.25], color=colour, linewidth=2.6, zorder=4)
    drawn = v if len(v) <= _MAX_POINTS else np.quantile(v, np.linspace(0, 1, _MAX_POINTS))
    # A fixed low-discrepancy sequence spreads the points, so that they do not overlap.
    up = ((np.arange(len(drawn)) * 0.6180339887) % 1.0 - 0.5) * 0.34
    axes.scatter(drawn, row + up, s=11, color=colour, alpha=0.7, linewidths=0, zorder=3)
    least, first, median, third, most = (
        number(value / scale, percent=percent) for value in (float(v[0]), low, middle, high, float(v[-1]))
    )
    text = f"{name}: median {median}, middle half {first} to {third}, all {least} to {most}"
    return HoverTarget(axes, float(v[0]), row - 0.25, text, max(float(v[-1] - v[0]), 1e-9), 0.5)


def final_per_node(group: Group, metric: str) -> npt.NDArray[np.float64]:
    """Return each node's finite metric at the last evaluation, over all seeds."""
    found = [
        value
        for record in group.counted.records
        if record.evaluations
        for value in record.evaluations[-1].per_node.get(metric, [])
        if value is not None and math.isfinite(value)
    ]
    return np.array(found, dtype=float)


def _rows(names: Sequence[str], *, paper: bool, legend: Mapping[str, str] | None = None) -> tuple[Figure, Axes]:
    """Make empty axes with one row per name. Names are above the rows, so that they may be long."""
    from matplotlib.patches import Patch

    above = 0.35 if legend else 0.08
    height = 0.66 + above + 0.56 * max(1, len(names))
    figure = page_figure(height, paper=paper)
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
