"""Figures of bars and cells: bytes by kind, the final metric of nodes, and the samples of each node."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from jwins.report.chart import Chart, page_figure, steps
from jwins.report.colours import KIND_COLOURS, MUTED, Style
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
    """Return the kinds of bytes that any variant sent; all kinds if nothing was sent."""
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


# --- Partitions -----------------------------------------------------------------------------------------------

_CELL = "#5094c8"
"""Colour of cells on light and on dark: a map is a picture, whose colours do not follow the theme."""


@dataclass(frozen=True, slots=True)
class PartitionCounts:
    """Samples of each node.

    Attributes:
        labels: the classes, if samples have any.
        counts: (nodes, classes) samples.
    """

    samples: tuple[int, ...]
    labels: tuple[int, ...] = ()
    counts: tuple[tuple[int, ...], ...] = ()


def partition_chart(
    slug: str, title: str, caption: str, partition: PartitionCounts, *, by_class: bool
) -> Chart:
    """Draw the partition: a heat map of class by node, or sorted bars of samples per node."""

    def draw(paper: bool) -> Figure:
        figure = page_figure(4.2 if by_class else 3.2, paper=paper)
        axes = figure.add_subplot()
        if by_class:
            _draw_map(axes, partition)
        else:
            _draw_samples(axes, partition.samples)
        return figure

    return Chart(slug, title, caption, draw)


def _draw_map(axes: Axes, partition: PartitionCounts) -> None:
    """Draw a cell per class and node; more samples make it more opaque, and without samples it is empty."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    shades = LinearSegmentedColormap.from_list("samples", [to_rgba(_CELL, 0.15), to_rgba(_CELL, 1.0)])
    counts = np.ma.masked_equal(np.array(partition.counts).T, 0)
    cells = axes.imshow(counts, cmap=shades, vmin=1, aspect="auto", interpolation="none")
    key = axes.figure.colorbar(cells, ax=axes, label="samples", ticks=steps(5, only_whole=True))
    assert key.solids is not None
    key.solids.set_rasterized(True)
    key.outline.set_visible(False)
    labels = partition.labels
    axes.yaxis.set_major_locator(steps(10, only_whole=True))
    axes.yaxis.set_major_formatter(lambda row, _: str(labels[int(row)]) if 0 <= row < len(labels) else "")
    axes.xaxis.set_major_locator(steps(8, only_whole=True))
    axes.grid(visible=False)
    axes.set_title("class", color=MUTED)
    axes.set_xlabel("node")


def _draw_samples(axes: Axes, samples: tuple[int, ...]) -> None:
    heights = np.sort(samples)[::-1]
    axes.stairs(heights, fill=True, color=KIND_COLOURS["values"])
    axes.set_xlim(0, len(heights))
    axes.set_ylim(0, float(heights[0]) * 1.06 or 1.0)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(steps(6))
    axes.set_xlabel("nodes, most samples first")
    axes.set_title("training samples", color=MUTED)
