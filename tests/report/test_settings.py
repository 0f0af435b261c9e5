"""Settings in which variants differ."""

from __future__ import annotations

from typing import Any

import pytest

from jwins.experiment import Experiment
from jwins.experiment.experiment import digest_of
from jwins.report.settings import compared_settings


@pytest.mark.parametrize(
    ("section", "key", "other"),
    [("run", "consensus_rounds", 2), ("run", "eval_own", True), ("links", "sending", "in_turn")],
)
def test_a_run_from_before_a_key_was_there_is_of_the_same_variant(section: str, key: str, other: Any) -> None:
    now = Experiment().resolved()
    before = {name: dict(table) if isinstance(table, dict) else table for name, table in now.items()}
    before[section].pop(key, None)
    assert compared_settings(before) == compared_settings(now)
    changed = Experiment().changed({section: {key: other}}).resolved()
    assert compared_settings(changed) != compared_settings(now)
    assert changed[section][key] == other, "nothing is taken out of what is compared"


def test_a_ratio_beside_a_budget_has_no_effect_so_its_default_may_change() -> None:
    """Runs from before, which wrote it all the same, are as those of now."""

    def settings(**sharing: Any) -> tuple[Any, bytes]:
        experiment = Experiment(sharing={"kind": "closed_loop", **sharing})
        return compared_settings(experiment.resolved()), experiment.digest()

    for rate in ({"budget": 0.32}, {"step": 0.01}):
        tables = Experiment(sharing={"kind": "closed_loop", **rate}).resolved()
        assert "step_ratio" not in tables["sharing"]
        before = {**tables, "sharing": {**tables["sharing"], "step_ratio": 3.0}}
        assert (compared_settings(before), digest_of(before)) == settings(**rate)
    now, other = settings(), settings(step_ratio=3.0)
    assert now[0] != other[0]
    assert now[1] != other[1]
