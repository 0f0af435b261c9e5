"""Chart of the partition of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jwins.report.chart import Chart, page_figure, steps
from jwins.report.colours import KIND_COLOURS, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
