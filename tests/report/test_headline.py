"""The page's first words: who is best, and differences that agree with the numbers beside them."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import group, record, study

from jwins.report.comparison_table import head_and_rows, metrics_table, page_table
from jwins.report.headline import verdict
from jwins.report.seed_groups import Group
from jwins.report.studies import Study


def one(name: str, algorithm: str, *finals: float, sent: int = 1000) -> Group:
    """A variant with one run per final value, which begin at 10 % and are half way at the middle."""
    runs = [
        record([0.1, 0.1 + (final - 0.1) / 2, final], seed=seed, round_bytes=sent)
        for seed, final in enumerate(finals, start=1)
    ]
    return group(name, algorithm, runs)


def demo(target: float = math.nan) -> Study:
    """CHOCO-SGD ends higher than JWINS with fewer bytes; full sharing ends highest."""
    return study(
        [
            one("full sharing", "full", 0.960, 0.950, sent=2000),
            one("CHOCO-SGD", "choco", 0.953, 0.945, sent=900),
            one("JWINS", "jwins", 0.900, 0.902, sent=1000),
        ],
        target,
    )


def test_who_is_best_comes_first_even_if_it_is_not_jwins() -> None:
    text = " ".join(verdict(demo(0.5)))
    assert text.startswith(
        "Full sharing ends at 95.5 % accuracy (± 0.7 over 2 seeds), the highest of 3 variants"
    )
    assert "CHOCO-SGD needs the fewest bytes to reach the target of 50.0 %: 9 kB per node, 0.45 times" in text


def test_jwins_is_said_to_be_best_where_it_is() -> None:
    found = study([one("full sharing", "full", 0.90, sent=2000), one("JWINS", "jwins", 0.95)], 0.5)
    first, second = verdict(found)
    assert first == "JWINS ends at 95.0 % accuracy, the highest of 2 variants."
    assert second.startswith("JWINS needs the fewest bytes to reach the target of 50.0 %: ")


def test_what_the_seeds_cannot_tell_apart_is_said() -> None:
    near = study([one("full sharing", "full", 0.90, 0.80), one("JWINS", "jwins", 0.89, 0.80)])
    assert "the 95 % interval of the difference to JWINS includes 0" in verdict(near)[0]
    far = study([one("full sharing", "full", 0.900, 0.901), one("JWINS", "jwins", 0.800, 0.801)])
    assert "interval" not in verdict(far)[0]


def test_equal_values_share_the_first_place() -> None:
    found = study([one("full sharing", "full", 0.9001, sent=2000), one("JWINS", "jwins", 0.9003)])
    assert verdict(found)[0].startswith(
        "JWINS ends at 90.0 % accuracy, the highest of 2 variants, shared with full"
    )
    turned = study([one("JWINS", "jwins", 0.9), one("top-k", "top_k", 0.9, sent=500)])
    assert verdict(turned)[0].startswith("Top-k ends at 90.0 % accuracy")  # with fewer bytes


def test_lower_can_be_better() -> None:
    runs = [
        group(name, kind, [record([0.9, level], metric="squared_error", round_bytes=sent)])
        for name, kind, level, sent in (
            ("full sharing", "full", 0.3, 2000),
            ("JWINS", "jwins", 0.5, 900),
            ("top-k", "top_k", 0.4, 800),
        )
    ]
    text = " ".join(verdict(study(runs, 0.6, metric="squared_error", lower_is_better=True)))
    assert text.startswith("Full sharing ends at 0.3000 squared error, the lowest of 3 variants")


def test_a_target_that_some_seeds_miss_wins_nothing() -> None:
    found = study([one("full sharing", "full", 0.9, 0.9, sent=2000), one("JWINS", "jwins", 0.9, 0.7)], 0.8)
    assert "Full sharing alone reaches the target of 80.0 % in every seed: 40 kB per node." in verdict(found)
    found = study([one("full sharing", "full", 0.9, 0.9, sent=2000), one("JWINS", "jwins", 0.7, 0.7)], 0.8)
    assert "Full sharing alone reaches the target of 80.0 %: 40 kB per node." in verdict(found)


def test_one_variant_is_not_best_of_anything() -> None:
    assert verdict(study([one("JWINS", "jwins", 0.9)])) == ["JWINS ends at 90.0 % accuracy."]


# --- Differences agree with the rounded numbers beside them -----------------------------------------------

FINALS = st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)), min_size=1, max_size=4)


def shown_number(text: str) -> float:
    found = re.search(r"[-+−]?\d[\d.]*", text)
    assert found is not None, text
    return float(found[0].replace("−", "-"))


@given(FINALS)
def test_differences_agree_with_the_final_values_as_shown(finals: list[tuple[float, float]]) -> None:
    full = one("full sharing", "full", *(a for a, _ in finals))
    other = one("JWINS", "jwins", *(b for _, b in finals))
    found = study([full, other])
    table = page_table(found.table(), found.target)
    final, apart = table.head.index("final accuracy"), table.head.index("difference to full sharing [95 %]")
    whole, mine = table.rows
    expected = round(shown_number(mine[final]) - shown_number(whole[final]), 1)
    assert shown_number(mine[apart]) == expected
    _, (_, text) = head_and_rows(found.table(), found.target)
    assert shown_number(text[8]) == expected
    (row,) = metrics_table([(other, full)], ["accuracy"]).rows
    assert shown_number(row[3]) == expected
    if "[" in text[8]:
        low, high = (float(end) for end in re.findall(r"[-+]?[\d.]+", text[8])[1:])
        assert low <= expected <= high


def test_a_difference_is_that_of_the_rounded_values() -> None:
    """95.85 and 95.44 differ by 0.41, but 95.9 and 95.4 by half a point."""
    found = study([one("full sharing", "full", 0.9585001), one("JWINS", "jwins", 0.9544)])
    assert page_table(found.table(), found.target).rows[1][5].startswith("-0.5")


def test_values_over_other_seeds_are_not_made_to_agree() -> None:
    full = one("full sharing", "full", 0.90, 0.96)
    mine = one("JWINS", "jwins", 0.85)
    found = study([full, mine])
    line = found.table()[1]
    assert line.difference == pytest.approx(-0.05)
    assert page_table(found.table(), found.target).rows[1][5].startswith("-5.0")
