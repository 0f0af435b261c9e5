"""Which settings make a variant."""

from __future__ import annotations

from typing import Any

import pytest

from jwins.experiment import Experiment
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
