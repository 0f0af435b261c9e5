"""Several settings tuned at once: grids, and as many of their combinations as a budget has."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jwins.compare import compare
from jwins.compare.comparison import Comparison, load_comparison
from jwins.compare.plan import at_edge, plan
from jwins.compare.tuning import TuningGrid
from jwins.errors import ConfigError
from jwins.sharing import Full

FILE = """
name = "grids"
base = "digits"
[nodes]
count = 2
[topology]
kind = "ring"
[train]
batching = "loop"
[run]
rounds = 2
eval_every = 1
eval_samples = 60
[compare]
seeds = [1]
target = { accuracy = 0.15 }
folder = "FOLDER"
[[variants]]
name = "all"
sharing = { kind = "full" }
[[variants]]
name = "some"
sharing = { kind = "choco", fraction = 0.2, gamma = 0.4 }
"""
LR, STEPS = "train.optimizer.lr", "train.local_steps"


def load(folder: Path, extra: str = "", *overrides: str) -> Comparison:
    path = folder / "grids.toml"
    path.write_text(FILE.replace("FOLDER", str(folder / "out")) + extra)
    return load_comparison(path, overrides)


def test_all_combinations_in_order() -> None:
    grid = TuningGrid(grid={LR: (0.1, 0.2), STEPS: (1, 2, 3)})
    points = grid.points(seed=1)
    assert points[:3] == [{LR: 0.1, STEPS: 1}, {LR: 0.1, STEPS: 2}, {LR: 0.1, STEPS: 3}]
    assert len(points) == 6
    assert grid.keys == (LR, STEPS)
    assert TuningGrid(key=LR, values=(0.1, 0.2)).points(seed=1) == [{LR: 0.1}, {LR: 0.2}]


def test_a_budget_draws_some_of_them() -> None:
    grid = TuningGrid(grid={LR: (0.1, 0.2, 0.3), STEPS: (1, 2, 3, 4)}, budget=5)
    every = TuningGrid(grid=grid.grid).points(seed=1)
    drawn = grid.points(seed=1)
    assert len(drawn) == 5
    assert all(point in every for point in drawn)
    assert drawn == grid.points(seed=1)
    assert any(grid.points(seed=seed) != drawn for seed in range(2, 9))
    assert TuningGrid(grid=grid.grid, budget=99).points(seed=1) == every


def test_toml_may_write_the_paths_as_tables(tmp_path: Path) -> None:
    nested = load(tmp_path, "[tune.grid]\ntrain.optimizer.lr = [0.1, 0.2]\ntrain.local_steps = [1, 2]\n")
    quoted = load(tmp_path, "[tune.grid]\n'train.optimizer.lr' = [0.1, 0.2]\n'train.local_steps' = [1, 2]\n")
    assert nested.rule == quoted.rule
    assert nested.rule.shared == TuningGrid(grid={LR: (0.1, 0.2), STEPS: (1, 2)})
    assert nested.is_tuned


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            "[tune]\nkey = 'run.rounds'\nvalues = [1]\ngrid = { 'train.local_steps' = [1] }",
            "is given, too; move key",
        ),
        ("[tune]\nbudget = 3\n", "budget = 3: needs a grid; add one, or remove budget"),
        ("[tune.grid]\n'train.local_steps' = [1, 1]\n", "has a value twice; remove one"),
        (
            "[tune.grid]\n'train.local_steps' = [1, 0]\n",
            "train.local_steps: expected a whole number of at least 1",
        ),
        ("[tune.grid]\n'train.local_steps' = []\n", "expected at least one"),
        (
            "[tune]\nsensitivity = true\ngrid = { 'train.local_steps' = [1, 2] }",
            "needs key and values: the setting to vary",
        ),
        (
            "[[variants]]\nname = 'c'\ntune = { budget = 2 }",
            "required: the setting that is tuned and its values",
        ),
        (
            "[tune.grid]\n'train.local_steps' = [1, 2]\n[[variants]]\nname = 'c'\ntrain = { local_steps = 3 }",
            "is tuned for all variants ([tune]); remove it here",
        ),
    ],
)
def test_what_cannot_be_tried_is_refused(extra: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, extra)
    assert message in str(caught.value)


def test_a_setting_of_the_grid_cannot_be_set_beside_it(tmp_path: Path) -> None:
    grid = "[tune.grid]\n'train.local_steps' = [1, 2]\n'train.optimizer.lr' = [0.1]\n"
    with pytest.raises(ConfigError, match=r"write --set tune.grid.train.local_steps=\[2\]"):
        load(tmp_path, grid, "train.local_steps=2")


def test_the_edge_of_a_grid() -> None:
    grid = TuningGrid(grid={LR: (0.1, 0.2, 0.3), STEPS: (1, 2, 3)})
    at = {(point[LR], point[STEPS]): number for number, point in enumerate(grid.points(seed=0))}
    assert not at_edge(grid, at[0.2, 2])
    assert at_edge(grid, at[0.2, 3])
    assert at_edge(grid, at[0.1, 2])
    assert not at_edge(TuningGrid(grid={LR: (0.1, 0.2, 0.3), STEPS: (2,)}), 1)
    assert not at_edge(TuningGrid(grid=grid.grid, budget=4), 0)


def test_the_best_combination_is_used_by_all_variants(tmp_path: Path) -> None:
    extra = (
        "[tune]\nseeds = [7]\ngrid = { 'train.optimizer.lr' = [0.001, 0.2], 'train.local_steps' = [1, 4] }\n"
    )
    own = "[[variants]]\nname = 'own'\nsharing = { kind = 'choco', fraction = 0.2, gamma = 0.4 }\n"
    own += "tune = { grid = { 'sharing.gamma' = [0.1, 0.4], 'sharing.fraction' = [0.1, 0.3] }, budget = 2 }\n"
    comparison = load(tmp_path, own + extra)
    assert comparison.expected()[0] == 3 + 4 + 2
    found = compare(comparison, jobs=1)
    assert found.status == "finished"
    decided = plan(comparison)
    assert decided.chosen["all"] == decided.chosen["some"] == {LR: 0.2, STEPS: 4}
    assert decided.chosen["own"].keys() == {LR, STEPS, "sharing.gamma", "sharing.fraction"}
    assert [trial.chosen for trial in decided.trials].count(True) == 2
    finals = {trial.value: trial.final for trial in decided.trials if trial.variant == "all"}
    assert max(finals, key=lambda text: finals[text]) == "lr = 0.2, local_steps = 4"
    notes = (found.folder / "table.md").read_text(encoding="utf-8")
    assert "All variants: train.optimizer.lr = 0.2, train.local_steps = 4, the best of 4 on all." in notes
    assert "| lr = 0.001, local_steps = 1 |" in notes
    with (found.folder / "tuning.csv").open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[0]["key"] == f"{LR}, {STEPS}"
    assert "point" not in rows[0]
    assert compare(comparison, jobs=1).table == found.table


@dataclass(frozen=True)
class Mine(Full):
    beta1: float = 0.5
    beta2: float = 0.5
    remark: str = "a long text " * 15


def test_fields_of_an_algorithm_of_ones_own_are_tuned(tmp_path: Path) -> None:
    own = load(tmp_path).variants[0].experiment.changed({"sharing": Mine()})

    def tuned(value: float) -> Comparison:
        tune = TuningGrid(grid={"sharing.beta1": (value,), "sharing.beta2": (value,)})
        settings = {"seeds": [1], "target": {"accuracy": 0.15}, "folder": tmp_path / "out"}
        return Comparison(
            name="own", variants=[{"name": "mine", "experiment": own, "tune": tune}], compare=settings
        )  # type: ignore[list-item, arg-type]

    first = tuned(0.1)
    compare(first, jobs=1)
    (cell,) = plan(first).cells
    assert cell.experiment.sharing == Mine(beta1=0.1, beta2=0.1)
    compare(tuned(0.2), jobs=1)
    (earlier,) = (tmp_path / "out" / "mine" / "earlier").glob("beta1=*/seed-1")
    before = (earlier / "metrics.jsonl").read_bytes()
    compare(first, jobs=1)
    assert (cell.folder / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="Mine has no such field; its fields: values, robust, beta1"):
        own.changed({"sharing.beta": 1})
