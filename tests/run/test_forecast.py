"""Estimates of a run's cost against its real cost."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import jwins
from jwins.cli import app
from jwins.errors import ConfigError
from jwins.run.forecast import Calibration, _apart, _calibrate, _small, forecast
from jwins.tasks import Dataset, Task
from jwins.training.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of a calibration but its bytes, so it needs no process of its own."""
    monkeypatch.setattr("jwins.run.forecast._apart", _calibrate)


def experiment(folder: Path, **changes: Any) -> jwins.Experiment:
    base: dict[str, Any] = {
        "name": "planned",
        "nodes": {"count": 24},
        "topology": {"kind": "regular", "degree": 4},
        "train": {"batching": "loop"},
        "run": {"rounds": 10, "eval_every": 5, "checkpoint_every": 4, "threads": 1, "folder": folder},
    }
    return jwins.Experiment(**{**base, **changes})


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("sharing", [{"kind": "full"}, {"kind": "choco", "fraction": 0.2, "gamma": 0.4}])
def test_bytes_are_as_planned(sharing: dict[str, Any], tmp_path: Path) -> None:
    wanted = experiment(tmp_path / "run", sharing=sharing)
    found = forecast(wanted)
    assert not (tmp_path / "run").exists()
    result = jwins.simulate(wanted)
    sent = result.record.evaluations[-1].traffic.total
    assert found.total_bytes == pytest.approx(sent, rel=0.1)
    assert found.round_bytes == pytest.approx(24 * 4 * found.frame_bytes)
    assert (found.num_nodes, found.dim) == (24, result.record.start.dim)
    assert (found.evaluations, found.checkpoints, found.rounds) == (len(result.record.evaluations), 2, 10)


def test_an_evaluation_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    evaluate_all = Trainer.evaluate_all

    def slow(self: Trainer, requests: Any) -> Any:
        nonlocal now
        now += 3.0
        return evaluate_all(self, requests)

    monkeypatch.setattr(Trainer, "evaluate_all", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    found = _calibrate(_small(experiment(tmp_path / "run"), 4, 3, 100))
    assert found.evaluation_s == 3.0
    assert set(found.round_s.values()) == {0.0}


def test_actors_share_what_nodes_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Calibration] = {}

    def once(small: jwins.Experiment) -> Calibration:
        """Both plans calibrate the same runs."""
        if (key := repr(small)) not in known:
            known[key] = _apart(small)
        return known[key]

    monkeypatch.setattr("jwins.run.forecast._apart", once)
    many = experiment(
        tmp_path / "run", nodes={"count": 4000}, topology={"kind": "ring"}, sharing={"kind": "full"}
    )
    whole, half = forecast(many), forecast(many, jwins.Ray(actors=2))
    assert half.actors == 2
    assert len(known) == 2
    assert 0.3 < (half.memory_bytes - 250e6) / (whole.memory_bytes - 250e6) < 0.8, "all but the process"
    assert half.stored_bytes == pytest.approx(4 * half.frame_bytes), (
        "a ring is cut twice, and both directions count"
    )
    assert whole.stored_bytes == 0
    assert whole.memory_bytes > 4000 * 4 * 4 * whole.dim, "a few vectors per node at the least"


@pytest.mark.usefixtures("in_this_process")
def test_a_few_nodes_and_lists_of_one_per_node_are_planned_too(tmp_path: Path) -> None:
    found = forecast(
        experiment(
            tmp_path / "run",
            nodes={"count": 3},
            topology={"kind": "ring"},
            compute={"step_ms": [1.0, 2.0, 3.0]},
            links={"uplink_mbps": [1.0, 2.0, 3.0]},
        )
    )
    assert found.num_nodes == 3
    assert found.total_s > 0


@pytest.mark.usefixtures("in_this_process")
def test_a_graph_that_changes_is_planned_with_one_that_does(tmp_path: Path) -> None:
    found = forecast(experiment(tmp_path / "run", topology={"kind": "one_peer_exponential"}))
    assert found.round_bytes == pytest.approx(found.frame_bytes * found.num_nodes)


@pytest.mark.usefixtures("in_this_process")
def test_rounds_with_other_numbers_of_edges_are_all_counted(tmp_path: Path) -> None:
    wanted = experiment(tmp_path / "run", nodes={"count": 24, "participation": 0.3}, sharing={"kind": "full"})
    result = jwins.simulate(wanted)
    sent = result.record.evaluations[-1].traffic.total
    assert forecast(wanted).total_bytes == pytest.approx(sent, rel=0.02)


@pytest.mark.usefixtures("in_this_process")
def test_what_is_wrong_is_said_as_by_a_run(tmp_path: Path) -> None:
    class Unlabelled(Task):
        def __init__(self) -> None:
            self.train = self.test = Dataset(torch.zeros(40, 2), torch.zeros(40))

        def model(self) -> nn.Module:
            return nn.Linear(2, 1)

        def loss(self, model: Any, batch: Any, generator: Any) -> torch.Tensor:
            return (model(batch.inputs).squeeze(-1) - batch.targets).square().mean()

        def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (outputs.squeeze(-1) - targets).square()}

    task = {"own": Unlabelled, "partition": {"kind": "iid"}}
    wrong = experiment(tmp_path / "run", task=task).changed({"run": {"eval_own": True}})
    with pytest.raises(ConfigError, match=r"run\.eval_own = True: the task's samples have no natural owner"):
        forecast(wrong)


def test_the_command_line_says_it_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["run", "digits", "--plan", "--set", "run.rounds=40"])
    assert said.exit_code == 0, said.output
    first, *lines = said.stdout.splitlines()
    assert re.fullmatch(r"digits: 16 nodes of 12,010 parameters in 1 process, 40 rounds", first)
    assert [line.split()[0] for line in lines] == ["memory", "exchange", "seconds", "bytes"]
    stated = (
        "0.2 MB (5.0 x the model) between rounds, 0.8 MB (17.0 x the model) more in an exchange, for each node"
    )
    assert lines[1] == f"exchange {stated}"
    assert not list(tmp_path.iterdir())
