"""Accuracy against bytes: where points lie, what is joined, and which of them are on the front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import group, record, study

from jwins.report.chart import as_svg, drawing_style
from jwins.report.colours import TEXT, styles_of
from jwins.report.page import render
from jwins.report.pareto_chart import Point, front, pareto_chart
from jwins.report.seed_groups import Group, Target

STYLE = styles_of(["full"])[0]


def one(name: str, algorithm: str, sent: int, *finals: float, metric: str = "accuracy") -> Group:
    runs = [
        record([0.1, final], seed=seed, round_bytes=sent, metric=metric) for seed, final in enumerate(finals, 1)
    ]
    return group(name, algorithm, runs)


def variants() -> list[Group]:
    return [
        one("full sharing", "full", 40_000, 0.95, 0.96),
        one("loop 1", "closed_loop", 600, 0.90, 0.91),
        one("JWINS", "jwins", 15_000, 0.94, 0.93),
        one("loop 2", "closed_loop", 2500, 0.95, 0.956),
        one("loop 0.5", "closed_loop", 300, 0.86, 0.87),
    ]


def chart(groups: Sequence[Group], **changes: Any) -> Any:
    target = Target("accuracy", math.nan, changes.pop("lower_is_better", False))
    full = changes.pop("full", "full sharing")
    return pareto_chart(groups, styles_of([g.algorithm for g in groups]), target, full=full, **changes)


def lines(groups: Sequence[Group], **changes: Any) -> list[Any]:
    with drawing_style():
        return list(chart(groups, **changes).draw(True).axes[0].get_lines())


NUMBERS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(NUMBERS, st.booleans())
def test_the_front_is_what_nothing_beats(pairs: list[tuple[int, int]], lower: bool) -> None:
    points = [Point(str(i), "full", STYLE, sent, final, None) for i, (sent, final) in enumerate(pairs)]
    best = front(points, lower_is_better=lower)
    sign = -1 if lower else 1
    for point in points:
        as_good = [p for p in points if p.sent <= point.sent and sign * p.final >= sign * point.final]
        beaten = any((p.sent, p.final) != (point.sent, point.final) for p in as_good)
        assert (point in best) == (not beaten)
    assert [p.sent for p in best] == sorted(p.sent for p in best)


def test_variants_of_an_algorithm_are_joined_in_its_colour_by_bytes() -> None:
    joined = [line for line in lines(variants()) if len(line.get_xdata()) == 3]
    (line,) = joined
    assert line.get_color() == styles_of(["closed_loop"])[0].colour
    np.testing.assert_allclose(line.get_xdata(), [3000, 6000, 25_000])
    np.testing.assert_allclose(line.get_ydata(), [86.5, 90.5, 95.3])


def test_the_front_is_ringed_and_full_sharing_is_a_line() -> None:
    drawn = lines(variants())
    rings = [line for line in drawn if line.get_markeredgecolor() == TEXT and line.get_marker() == "o"]
    assert sorted(float(line.get_xdata()[0]) for line in rings) == [3000, 6000, 25_000, 400_000]
    assert any(list(line.get_ydata()) == [95.5, 95.5] for line in drawn)
    assert not any(list(line.get_ydata()) == [95.5, 95.5] for line in lines(variants(), full=None))


def test_bars_are_deviations_over_seeds() -> None:
    found = chart(variants())
    assert "Bars are one standard deviation over seeds" in found.caption
    with drawing_style():
        bars = found.draw(False).axes[0].collections
    assert len(bars) == 5
    (segment,) = bars[0].get_segments()
    assert segment[1][1] - segment[0][1] == pytest.approx(200 * np.std([0.95, 0.96], ddof=1))
    single = chart([one("a", "full", 10, 0.5), one("b", "jwins", 5, 0.5)])
    assert "Bars" not in single.caption
    assert "Lines join" not in single.caption


def test_lower_can_be_better() -> None:
    found = chart(
        [one("a", "full", 100, 0.3), one("b", "jwins", 50, 0.4), one("c", "choco", 60, 0.5)],
        lower_is_better=True,
    )
    assert "lower is better" in found.caption
    with drawing_style():
        drawn = found.draw(True).axes[0].get_lines()
    rings = [line for line in drawn if line.get_markeredgecolor() == TEXT and line.get_marker() == "o"]
    assert sorted(float(line.get_xdata()[0]) for line in rings) == [500, 1000]


def test_what_is_far_off_is_named_and_not_drawn() -> None:
    found = chart([*variants(), one("random", "random_k", 1000, 0.2, 0.2)])
    assert "Too far off to be shown: random: 20.0 % ± 0.0 for 10 kB." in found.caption
    with drawing_style():
        low, _ = found.draw(False).axes[0].get_ylim()
    assert low > 80


def test_what_has_no_end_or_sent_nothing_is_no_point() -> None:
    alone = [
        one("full sharing", "full", 100, 0.9),
        one("gone", "choco", 100, math.nan),
        one("mute", "jwins", 0, 0.9),
    ]
    assert chart(alone) is None
    assert chart([*alone, one("two", "top_k", 10, 0.8)]) is not None


def test_the_page_has_it_where_there_are_two_points() -> None:
    text, charts = render([study(variants())])
    assert "pareto" in [name for name, _ in charts]
    assert "Final accuracy against bytes" in text
    _, charts = render([study(variants()[:1])])
    assert "pareto" not in [name for name, _ in charts]
    assert "#" not in str(as_svg(chart(variants()), "p")).replace('"#p-', "").replace("url(#p-", "")
