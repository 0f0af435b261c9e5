"""Chart of a round's graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from jwins.report.chart import Chart, Drawing, HoverTarget, page_figure
from jwins.report.colours import AXIS, KIND_COLOURS, PAGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from jwins.topology.graph import Graph

_MAX_EDGES = 1500
"""Above this number, edges are drawn as one picture in the figure, so that a page stays small."""
_MAX_ARROWS = 400
_CIRCLE_NODES = 32
_NAMED_NODES = 24


def topology_chart(slug: str, title: str, caption: str, graph: Graph) -> Chart:
    """Draw the graph of one round.

    Small graphs are on a circle; larger ones have a spring layout.
    """
    directed = any(set(senders) != set(to) for senders, to in zip(graph.senders, graph.recipients, strict=True))
    pairs = list(graph.edges) if directed else [(i, j) for i, j in graph.edges if i < j]
    degrees = [len(row) for row in graph.recipients]
    alt = (
        f"Drawing of a graph of {graph.num_nodes} nodes with {len(pairs)} "
        f"{'directed ' if directed else ''}edges; a node sends to {min(degrees)} to {max(degrees)} others."
    )

    def draw(paper: bool) -> Drawing:
        figure = page_figure(4.2, paper=paper)
        axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
        axes.set_axis_off()
        axes.set_aspect("equal")
        places = _places(graph)
        n = graph.num_nodes
        named = n <= _NAMED_NODES
        _draw_edges(axes, places, pairs, arrows=directed and len(pairs) <= _MAX_ARROWS, named=named)
        area = 300 if named else max(9.0, 2600 / n)
        axes.scatter(
            places[:, 0],
            places[:, 1],
            s=area,
            color=KIND_COLOURS["values"],
            edgecolors=PAGE,
            linewidths=0.8,
            zorder=2,
        )
        hover_targets = []
        for node, (x, y) in enumerate(places):
            if named:
                axes.annotate(str(node), (x, y), ha="center", va="center", color=PAGE, fontsize=10.3)
            text = f"node {node}: sends to {_listed(graph.recipients[node])}"
            hover_targets.append(HoverTarget(axes, float(x), float(y), text))
        axes.set_xlim(-1.12, 1.12)
        axes.set_ylim(-1.12, 1.12)
        return Drawing(figure, hover_targets if n <= 400 else [])

    return Chart(slug, title, caption, alt, draw)


def _draw_edges(
    axes: Axes,
    places: npt.NDArray[np.float64],
    pairs: Sequence[tuple[int, int]],
    *,
    arrows: bool,
    named: bool,
) -> None:
    if arrows:
        for i, j in pairs:
            axes.annotate(
                "",
                xy=places[j],
                xytext=places[i],
                arrowprops={
                    "arrowstyle": "-|>,head_width=0.22,head_length=0.45",
                    "color": AXIS,
                    "lw": 0.9,
                    "shrinkA": 3,
                    "shrinkB": 11 if named else 6,
                },
                zorder=1,
            )
        return
    from matplotlib.collections import LineCollection

    width = 1.1 if len(pairs) <= 100 else 0.7 if len(pairs) <= _MAX_EDGES else 0.25
    ends = [(places[i], places[j]) for i, j in pairs]
    lines = LineCollection(ends, colors=AXIS, linewidths=width, zorder=1)
    lines.set_rasterized(len(pairs) > _MAX_EDGES)
    axes.add_collection(lines)


def _listed(numbers: Sequence[int]) -> str:
    if not numbers:
        return "nobody"
    shown = ", ".join(map(str, numbers[:12]))
    return f"{shown} and {len(numbers) - 12} more" if len(numbers) > 12 else shown


def _places(graph: Graph) -> npt.NDArray[np.float64]:
    """Return (N, 2) positions in [-1, 1]: a circle, or a spring layout for some tens of nodes and few edges."""
    import networkx as nx

    n = graph.num_nodes
    angle = np.linspace(0, 2 * math.pi, n, endpoint=False)
    circle = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    drawn = nx.Graph(graph.edges)
    drawn.add_nodes_from(range(n))
    few = len(drawn.edges) <= n * n // 4
    if not (_CIRCLE_NODES < n < 500 and few and max(degree for _, degree in drawn.degree()) > 2):
        return circle
    found = nx.spring_layout(drawn, pos=dict(enumerate(circle)), seed=1, iterations=120, k=1.6 / math.sqrt(n))
    places = np.array([found[i] for i in range(n)])
    places -= (places.max(axis=0) + places.min(axis=0)) / 2
    return np.asarray(places / (np.abs(places).max() or 1.0))
