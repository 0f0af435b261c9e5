"""Nodes in network namespaces with slow uplinks: a small run of benchmarks/namespaces.py."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

NODES, MBPS, ROUNDS = 3, 4.0, 4


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", ["full", "jwins"])
def test_slow_uplinks_change_the_time_and_not_the_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    namespaces = importlib.import_module("benchmarks.namespaces")
    if problem := namespaces.obstacle():
        pytest.skip(problem)
    found = namespaces.compare(
        tmp_path / name,
        namespaces.SHARINGS[name],
        nodes=NODES,
        degree=2,
        width=160,
        mbps=MBPS,
        rounds=ROUNDS,
    )
    assert found.same
    if name == "full":  # of the same length in every round, and no uplink is faster than it is
        least_s = 8 * found.megabytes / MBPS
        assert found.real_s > 0.8 * least_s, "the limit is not in effect"
        assert found.virtual_s >= 0.999 * least_s
