"""Rounds of sharing without training at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import evals, simulator

from jwins import simulate
from jwins.experiment import Experiment
from jwins.run_folder.record import Record, flat_rows
from jwins.sharing import choco, closed_loop, full, jwins, stateless

ALGORITHMS = {
    "full": full(),
    "jwins": jwins(),
    "choco": choco(0.5, 0.5),
    "closed_loop": closed_loop(step=1e-3),
    "stateless": stateless(step=1e-3),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_models_meet_and_what_was_before_is_unchanged(name: str) -> None:
    without = simulator(4, sharing=ALGORITHMS[name], rounds=5).run()
    outcome = simulator(4, sharing=ALGORITHMS[name], rounds=9, consensus_rounds=4).run()
    rows = evals(outcome)
    assert [row.consensus_rounds for row in rows] == [0] * 6 + [1, 2, 3, 4]
    assert rows[:6] == evals(without)
    assert rows[-1].traffic.total > rows[5].traffic.total
    distances = [row.consensus_distance or 0.0 for row in rows[5:]]
    assert distances[-1] < 0.5 * distances[0]


def test_full_sharing_averages_by_the_mixing_matrix() -> None:
    before = simulator(4, rounds=3).run().params
    after = simulator(4, rounds=5, consensus_rounds=2).run().params
    assert before is not None
    assert after is not None
    mixing = torch.full((4, 4), 0.0)
    for i in range(4):
        for j in (i - 1, i, i + 1):
            mixing[i, j % 4] = 1 / 3
    torch.testing.assert_close(after, mixing @ mixing @ before, rtol=0, atol=1e-6)


def experiment(folder: Path, **run: Any) -> Experiment:
    return Experiment(
        name="consensus",
        nodes={"count": 4},  # type: ignore[arg-type]
        topology={"kind": "ring"},  # type: ignore[arg-type]
        run={"rounds": 3, "eval_every": 1, "threads": 1, "folder": folder, **run},  # type: ignore[arg-type]
    )


def test_a_record_keeps_both_numbers_apart(tmp_path: Path) -> None:
    result = simulate(experiment(tmp_path / "run", consensus_rounds=2, eval_samples_early=100, eval_last=1))
    record = Record.read(result.folder)
    assert [row.round for row in record.evaluations] == [0, 1, 2, 3]
    assert [row.round for row in record.consensus] == [5]
    assert [row.samples for row in record.evaluations] == [100, 100, 100, record.consensus[0].samples]
    assert record.final("accuracy") == record.evaluations[-1].metrics["accuracy"].mean
    assert record.after_consensus("accuracy") == record.consensus[-1].metrics["accuracy"].mean
    assert [row["consensus_rounds"] for row in flat_rows(record)] == [0, 0, 0, 0, 2]


def test_without_such_rounds_nothing_is_different(tmp_path: Path) -> None:
    plain = experiment(tmp_path)
    assert experiment(tmp_path, consensus_rounds=0).digest() == plain.digest()
    assert experiment(tmp_path, consensus_rounds=1).digest() != plain.digest()
