"""Curves: told apart where they lie on each other, and axes that show where they end."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import group, record

from jwins.report.chart import drawing_style
from jwins.report.colours import styles_of
from jwins.report.curve_charts import ROUNDS, SENT, XAxis, YAxis, curve_chart, figure, seconds
from jwins.report.seed_groups import Group, Target

RISE = [0.10, 0.50, 0.80, 0.90, 0.93, 0.94, 0.945, 0.947, 0.949, 0.950]


def variants(
    *curves: Sequence[float], kinds: Sequence[str] = ("full", "choco", "jwins", "top_k")
) -> list[Group]:
    return [
        group(f"{kind} {i}", kind, [record(c)]) for i, (kind, c) in enumerate(zip(kinds, curves, strict=False))
    ]


def chart(groups: Sequence[Group], x_axis: XAxis = ROUNDS, y_axis: YAxis | None = None) -> Any:
    styles = styles_of([one.algorithm for one in groups])
    y_axis = y_axis or YAxis.of_metric(Target("accuracy", math.nan))
    return curve_chart("c", "C", "", groups, styles, x_axis, y_axis)


def drawn(groups: Sequence[Group], x_axis: XAxis = ROUNDS, y_axis: YAxis | None = None) -> Any:
    with drawing_style():
        return chart(groups, x_axis, y_axis).draw(False)


def pixels(figure: Any) -> npt.NDArray[np.uint8]:
    from matplotlib.image import imread

    buffer = io.BytesIO()
    with drawing_style():
        figure.savefig(buffer, format="png", dpi=300)
    buffer.seek(0)
    return np.asarray(imread(buffer)[..., :3] * 255).round().astype(np.uint8)


def columns_with(image: npt.NDArray[np.uint8], colour: str) -> int:
    """Return the number of pixel columns that have the colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    near = np.abs(image.astype(int) - wanted).max(axis=2) <= 6
    return int(near.any(axis=0).sum())


@pytest.mark.parametrize("x_axis", [ROUNDS, SENT, seconds()], ids=["rounds", "bytes", "seconds"])
def test_curves_on_each_other_are_all_seen(x_axis: XAxis) -> None:
    """Each colour shows along most of what the topmost shows of itself, though the curves are the same."""
    groups = variants(RISE, RISE, RISE)
    image = pixels(drawn(groups, x_axis))
    seen = [columns_with(image, style.colour) for style in styles_of([one.algorithm for one in groups])]
    assert min(seen) >= 0.8 * max(seen) >= 0.4 * image.shape[1]


def test_the_figure_of_a_comparison_tells_them_apart_too() -> None:
    image = pixels(figure(variants(RISE, RISE, RISE), None, metric="accuracy"))
    seen = [columns_with(image, style.colour) for style in styles_of(["full", "choco", "jwins"])]
    assert min(seen) >= 0.8 * max(seen)


@given(st.integers(1, 9), st.integers(1, 60))
@settings(max_examples=12, deadline=None)
def test_no_two_curves_have_a_marker_at_the_same_point(many: int, points: int) -> None:
    curves = [np.linspace(0.1, 0.9, points).tolist()] * many
    axes = drawn(variants(*curves, kinds=["jwins"] * many)).axes[0]
    lines = axes.get_lines()
    marked = [set(line.get_markevery()) for line in lines]
    assert all(0 < len(places) <= 6 for places in marked)
    if many <= sum(100 * value >= axes.get_ylim()[0] for value in curves[0]):
        assert sum(map(len, marked)) == len(set().union(*marked))


def test_the_axis_shows_where_the_curves_end() -> None:
    groups = variants(RISE, [*RISE[:-1], 0.940], [*RISE[:-1], 0.930])
    axes = drawn(groups).axes[0]
    low, high = axes.get_ylim()
    assert (95.0 - 93.0) / (high - low) > 0.07  # with the beginning in sight it was 0.02
    assert low < 93.0 < 95.0 < high
    caption = chart(groups).caption
    assert f"The axis begins at {low:.4g} %; earlier values are lower." in caption
    assert {
        one.axes[0].get_ylim() for one in (drawn(groups, x_axis) for x_axis in (ROUNDS, SENT, seconds()))
    } == {(low, high)}
    panel = figure(groups, None, metric="accuracy").axes[0]
    assert panel.get_ylim() == (low, high)


def test_an_axis_of_bytes_begins_where_curves_come_in_sight() -> None:
    groups = variants(RISE, [*RISE[:-1], 0.940])
    axes = drawn(groups, SENT).axes[0]
    low, high = axes.get_xlim()
    sent = groups[0].records[0].bytes_per_node()
    first = next(i for i, value in enumerate(RISE) if 100 * value >= axes.get_ylim()[0])
    assert sent[1] < low <= sent[first] < sent[-1] < high


def test_the_target_stays_in_sight() -> None:
    groups = variants(RISE, [*RISE[:-1], 0.940])
    low, high = drawn(groups, y_axis=YAxis.of_metric(Target("accuracy", 0.6))).axes[0].get_ylim()
    assert low < 60.0 < high


def test_the_end_of_a_loss_is_at_the_bottom() -> None:
    falls = [[2.0, 1.0, 0.5, 0.30, 0.28, 0.27], [2.0, 1.0, 0.5, 0.31, 0.30, 0.29]]
    y_axis = YAxis.of_metric(Target("loss", math.nan, lower_is_better=True))
    groups = [group(f"{i}", "jwins", [record(fall, metric="loss")]) for i, fall in enumerate(falls)]
    low, high = drawn(groups, y_axis=y_axis).axes[0].get_ylim()
    assert low < 0.27 < 0.29 < high < 1.0
    assert f"The axis ends at {high:.4g}; earlier values are higher." in chart(groups, y_axis=y_axis).caption


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        (variants(RISE), "one curve has nothing to be told apart from"),
        (variants(RISE, [0.1] * 10), "what ends far apart is told apart anyway"),
        (variants([0.5] * 10, [0.5] * 10), "nothing rises"),
    ],
    ids=["one", "far apart", "flat"],
)
def test_otherwise_the_axis_shows_everything(groups: list[Group], why: str) -> None:
    low, high = drawn(groups).axes[0].get_ylim()
    values = [value * 100 for one in groups for value in one.records[0].series("accuracy")]
    assert low < min(values) <= max(values) < high, why
    assert chart(groups).caption == ""


def test_a_curve_that_is_not_compared_is_shown_whole() -> None:
    groups = variants(RISE, [*RISE[:-1], 0.940])
    y_axis = YAxis("training loss", lambda one: one.series("accuracy"))
    low, high = drawn(groups, y_axis=y_axis).axes[0].get_ylim()
    assert low < 0.1 < 0.95 < high


def test_widths_and_markers_are_in_the_legend_on_paper() -> None:
    with drawing_style():
        drawing = chart(variants(RISE, RISE)).draw(True)
    legend = drawing.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["full 0", "choco 1"]
    assert [handle.get_marker() for handle in legend.get_lines()] == ["o", "s"]


def test_a_title_is_above_the_names_of_the_variants() -> None:
    drawn = figure(variants(RISE, RISE), None, metric="accuracy", title="digits")
    drawn.draw_without_rendering()
    (legend,) = drawn.legends
    assert legend.get_title().get_text() == "digits"
    names = [text.get_window_extent() for text in legend.get_texts()]
    assert legend.get_title().get_window_extent().y0 >= max(box.y1 for box in names)
    assert min(box.y0 for box in names) >= max(axes.get_tightbbox().y1 for axes in drawn.axes)
