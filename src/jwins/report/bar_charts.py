"""Figures with one row per variant: its bytes by kind, and the final metric of its nodes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from jwins.report.chart import Chart, page_figure, steps
from jwins.report.colours import KIND_COLOURS, Style
from jwins.report.formatting import size, spaced
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
    legend = {kind: KIND_COLOURS[kind] for kind in sent}

    def draw(paper: bool) -> Figure:
        figure, axes = _rows([group.name for group in groups], paper=paper, legend=legend if paper else {})
        most = 1.0
        for row, group in enumerate(groups):
            kinds, left = bytes_by_kind(group), 0.0
            for kind in sent:
                axes.barh(row, kinds[kind], left=left, height=0.42, color=KIND_COLOURS[kind])
                left += kinds[kind]
            axes.annotate(
                size(left), (left, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10.8
            )
            most = max(most, left)
        axes.set_xlim(0, most * 1.17)
        axes.xaxis.set_major_locator(steps(4))
        axes.xaxis.set_major_formatter(lambda value, _: size(value) if value else "0")
        axes.set_xlabel("bytes sent per node")
        return figure

    return Chart("bytes-by-content", "Bytes per node", "", draw)


def nodes_chart(groups: Sequence[Group], styles: Sequence[Style], metric: str, *, percent: bool) -> Chart:
    """Draw every node's final metric, over all seeds: points, with a box for the middle half and the median."""

    def draw(paper: bool) -> Figure:
        figure, axes = _rows([group.name for group in groups], paper=paper)
        for row, (group, style) in enumerate(zip(groups, styles, strict=True)):
            values = np.sort(final_per_node(group, metric)) * (100.0 if percent else 1.0)
            if not len(values):
                continue
            low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
            axes.barh(row, high - low, left=low, height=0.42, color=style.colour, alpha=0.22, zorder=2)
            axes.plot([middle, middle], [row - 0.25, row + 0.25], color=style.colour, linewidth=2.6, zorder=4)
            # A fixed low-discrepancy sequence spreads the points, so that they do not overlap.
            up = ((np.arange(len(values)) * 0.6180339887) % 1.0 - 0.5) * 0.34
            points = axes.scatter(values, row + up, s=11, color=style.colour, alpha=0.7, linewidths=0, zorder=3)
            points.set_rasterized(len(values) > _MAX_POINTS)
        axes.xaxis.set_major_locator(steps(5, least=3))
        axes.margins(x=0.04)
        axes.set_xlabel(f"{spaced(metric)}{' in %' if percent else ''}")
        return figure

    caption = "One point per node and seed; the box holds the middle half, its line is the median."
    return Chart("per-node", f"Final {spaced(metric)} of every node", caption, draw)


_MAX_POINTS = 2000
"""Above this number, points are one picture in the figure, so that a page stays small."""


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

    figure = page_figure(0.74 + 0.56 * max(1, len(names)), paper=paper, legend_rows=2 if legend else 0)
    axes = figure.add_subplot()
    axes.set_ylim(max(1, len(names)) - 0.6, -0.72)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    for row, name in enumerate(names):
        short = textwrap.shorten(name, 56, placeholder="…")
        axes.text(0, row - 0.29, short, transform=axes.get_yaxis_transform(), va="bottom", fontsize=11.3)
    if legend:
        handles = [Patch(color=colour, label=name) for name, colour in legend.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=5, handlelength=1.0, columnspacing=1.2)
    return figure, axes
