"""Chart of the partition of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from jwins.report.chart import Chart, Drawing, HoverTarget, page_figure, steps
from jwins.report.colours import AXIS, KIND_COLOURS, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_COLUMNS, _DRAWN_COLUMNS, _MAX_CLASSES = 128, 96, 80
_COLOUR = KIND_COLOURS["positions"]
"""Of cells, on light and on dark: they are a picture, whose colours do not follow the theme."""


@dataclass(frozen=True, slots=True)
class PartitionCounts:
    """Samples of each node.

    Attributes:
        samples: training samples of each node.
        labels: the classes, if samples have any.
        counts: (nodes, classes) samples.
    """

    samples: tuple[int, ...]
    labels: tuple[int, ...] = ()
    counts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class _Map:
    """Data of the heat map.

    Attributes:
        counts: (classes, nodes) samples.
        classes: names of the rows.
        nodes: numbers of the columns.
    """

    counts: npt.NDArray[np.int64]
    classes: list[str]
    nodes: npt.NDArray[np.int64]

    @property
    def most(self) -> int:
        """Return the largest number of samples in one cell."""
        return int(self.counts.max()) if self.counts.size else 0

    def picture(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return cells of these numbers of samples as RGBA, of which more samples make more opaque ones."""
        from matplotlib.colors import to_rgba

        cells = np.full((*counts.shape, 4), to_rgba(_COLOUR))
        cells[..., 3] = np.where(counts > 0, 0.15 + 0.85 * counts / max(1, self.most), 0.0)
        return cells


def partition_chart(
    slug: str, title: str, caption: str, partition: PartitionCounts, *, by_class: bool
) -> Chart:
    """Draw the partition: a heat map of class by node, or sorted bars of samples per node.

    Of more than 128 nodes, 96 evenly spaced ones are drawn; of more than 80 classes, the largest 79 and the
    rest as one. Classes without samples are left out. The caption states it.
    """
    samples = np.array(partition.samples)
    n = len(samples)
    if not by_class or not partition.counts:
        return _samples_chart(slug, title, caption, samples)
    found, left_out = _map_of(partition)
    caption = " ".join([caption, *left_out])
    held = (np.array(partition.counts) > 0).sum(axis=1)
    alt = (
        f"Heat map of samples per class and node: {len(found.classes)} classes, {n} nodes, {samples.min()} to "
        f"{samples.max()} samples and {held.min()} to {held.max()} classes per node; at most "
        f"{found.most} samples of a class on a node."
    )

    def draw(paper: bool) -> Drawing:
        height = min(5.5, max(2.9, 1.3 + 0.16 * len(found.classes)))
        figure = page_figure(height, paper=paper)
        axes = figure.add_axes((0.13, 0.62 / height, 0.85, 1 - 1.28 / height))
        _draw_cells(axes, found)
        axes.set_title("class", color=MUTED)
        axes.set_xlabel("node")
        _draw_key(figure, found, height)
        hover_targets = []
        if found.counts.size <= 1000:
            hover_targets = [
                HoverTarget(
                    axes,
                    i - 0.5,
                    k - 0.5,
                    f"node {found.nodes[i]}, class {found.classes[k]}: {found.counts[k, i]} samples",
                    1,
                    1,
                )
                for k, i in zip(*np.nonzero(found.counts), strict=True)
            ]
        return Drawing(figure, hover_targets)

    return Chart(slug, title, caption.strip(), alt, draw)


def _map_of(partition: PartitionCounts) -> tuple[_Map, list[str]]:
    """Return the drawing of a partition, and sentences about the rest."""
    left_out = []
    counts = np.array(partition.counts)
    names = [str(label) for label in partition.labels]
    there = np.flatnonzero(counts.sum(axis=0) > 0)
    if len(there) < len(names):
        gone = len(names) - len(there)
        left_out.append(f"Nobody has samples of {gone} class{'es' if gone > 1 else ''}, left out here.")
        counts, names = counts[:, there], [names[i] for i in there]
    if len(names) > _MAX_CLASSES:
        order = np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[: _MAX_CLASSES - 1])
        rest = counts.sum(axis=1) - counts[:, order].sum(axis=1)
        left_out.append(f"The {len(names) - len(order)} smallest classes are one row, “other”.")
        names = [*(names[i] for i in order), "other"]
        counts = np.concatenate([counts[:, order], rest[:, None]], axis=1)
    n = len(counts)
    nodes = np.arange(n) if n <= _MAX_COLUMNS else np.linspace(0, n - 1, _DRAWN_COLUMNS).round().astype(int)
    if len(nodes) < n:
        left_out.append(f"Drawn are {len(nodes)} of {n} nodes, evenly spaced.")
    return _Map(counts[nodes].T, names, nodes), left_out


def _draw_cells(axes: Axes, found: _Map) -> None:
    axes.imshow(found.picture(found.counts), aspect="auto", interpolation="none")
    axes.set_xlim(-0.5, len(found.nodes) - 0.5)
    axes.set_ylim(len(found.classes) - 0.5, -0.5)
    axes.grid(visible=False)
    step = max(1, math.ceil(len(found.classes) / 10))
    axes.set_yticks(range(0, len(found.classes), step), found.classes[::step])
    across = max(1, math.ceil(len(found.nodes) / 8))
    named = range(0, len(found.nodes), across)
    axes.set_xticks(named, [str(found.nodes[i]) for i in named])


def _draw_key(figure: Figure, found: _Map, height: float) -> None:
    """Draw the colour key: a strip above the map, at its right."""
    if found.most == 0:
        return
    counts = np.unique(np.linspace(1, found.most, min(5, found.most)).round().astype(int))
    key = figure.add_axes((0.98 - 0.075 * len(counts), 1 - 0.33 / height, 0.075 * len(counts), 0.16 / height))
    key.imshow(found.picture(counts[None]), aspect="auto", interpolation="none")
    key.set_yticks([])
    key.grid(visible=False)
    key.tick_params(axis="x", length=0, pad=2, labelsize=10.3)
    key.set_xticks(range(len(counts)), [f"{count}" for count in counts])
    for spine in key.spines.values():
        spine.set(visible=True, color=AXIS, linewidth=0.8)
    key.annotate(
        "samples; empty: none",
        (0, 0.5),
        xycoords="axes fraction",
        xytext=(-8, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        color=MUTED,
        fontsize=10.5,
    )


def _samples_chart(slug: str, title: str, caption: str, samples: npt.NDArray[np.int64]) -> Chart:
    order = np.argsort(-samples, kind="stable")
    alt = (
        f"Bars of training samples per node, sorted: {len(samples)} nodes, from {samples.max()} down to "
        f"{samples.min()}, median {np.median(samples):.0f}."
    )

    def draw(paper: bool) -> Drawing:
        figure = page_figure(3.2, paper=paper)
        axes = figure.add_axes((0.14, 0.2, 0.83, 0.68))
        axes.fill_between(
            np.arange(len(samples) + 1),
            np.append(samples[order], samples[order][-1]),
            step="post",
            color=KIND_COLOURS["values"],
            linewidth=0,
        )
        axes.set_xlim(0, len(samples))
        axes.set_ylim(0, float(samples.max()) * 1.06 or 1.0)
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(steps(6))
        axes.set_xlabel("nodes, most samples first")
        axes.set_title("training samples", color=MUTED)
        hover_targets = []
        if len(samples) <= 400:
            hover_targets = [
                HoverTarget(axes, i, 0.0, f"node {node}: {samples[node]} samples", 1, float(samples[node]))
                for i, node in enumerate(order)
            ]
        return Drawing(figure, hover_targets)

    return Chart(slug, title, caption, alt, draw)
