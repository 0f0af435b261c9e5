"""A run that its own rule ends: when it ends, and with which models."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import end, evals, simulator

from jwins.engines.simulator import Compute, Faults, Progress
from jwins.engines.stop_rule import StopRule
from jwins.errors import ConfigError, ResumeError
from jwins.run_folder.rows import EvalRow, Spread, TrafficSplit
from jwins.sharing import jwins


def row(round: int, **means: float | None) -> EvalRow:
    metrics = {name: Spread(mean, 0.0, mean, mean) for name, mean in means.items()}
    return EvalRow(round, float(round), [0], metrics, {}, None, None, TrafficSplit(), 1)


def rows(*means: float | None) -> list[Any]:
    return [row(number, loss=mean) for number, mean in enumerate(means)]


@pytest.mark.parametrize(
    ("lower", "rule", "means", "ended"),
    [
        (True, {"target": 0.5}, (1.0, 0.6), False),
        (True, {"target": 0.5}, (1.0, 0.5), True),
        (True, {"target": 0.5}, (0.4, 0.6), False),
        (True, {"target": 0.5}, (1.0, None), False),
        (False, {"target": 0.5}, (0.4, 0.6), True),
        (False, {"target": 0.5}, (1.0, 0.4), False),
        (True, {"patience": 2}, (1.0, 0.9, 0.9), False),
        (True, {"patience": 2}, (1.0, 0.9, 0.9, 0.95), True),
        (True, {"patience": 2}, (1.0, 0.9, 0.95, 0.89), False),
        (False, {"patience": 2}, (0.5, 0.4, 0.3), True),
        (True, {"patience": 2}, (None, 0.9, None), False),
        (True, {"patience": 2}, (0.5, None, None), True),
        (True, {"patience": 1}, (None,), False),
    ],
)
def test_when_it_ends(lower: bool, rule: dict[str, Any], means: tuple[float | None, ...], ended: bool) -> None:
    assert bool(StopRule("loss", lower, **rule).reason(rows(*means))) is ended


def test_a_metric_that_is_not_measured_is_named() -> None:
    with pytest.raises(ConfigError, match=r"run.stop.metric = 'rmse': expected a metric of the task: loss"):
        StopRule("rmse", True, target=0.1).reason(rows(1.0))


UNEVEN = Compute(10.0, spread=1.0, jitter=0.5)
"""Some nodes are rounds ahead of the slowest when its evaluation is complete."""


def target_after(round: int, **world: Any) -> StopRule:
    """A loss that is first reached after so many rounds."""
    measured = {row.round: row.metrics["loss"].mean for row in evals(simulator(rounds=10, **world).run())}
    target = measured[round]
    assert target is not None
    assert all(mean is None or mean > target for at, mean in measured.items() if at < round)
    return StopRule("loss", True, target=target)


@pytest.mark.parametrize("batching", ["loop", "stacked"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_final_models_are_those_that_were_measured(batching: str, groups: int, tmp_path: Path) -> None:
    world: dict[str, Any] = {"compute": UNEVEN, "num_nodes": 6, "sharing": jwins()}
    world["train"] = {"batching": batching, "chunk": 3}
    rule = target_after(4, **world)
    shorter = simulator(rounds=4, folder=tmp_path / "short", **world).run()
    stopped = simulator(rounds=10, folder=tmp_path / "stopped", stop_rule=rule, groups=groups, **world).run()
    assert (stopped.status, end(stopped).round) == ("stopped", 4)
    assert "loss reached" in end(stopped).reason
    assert evals(stopped) == evals(shorter)
    assert (end(stopped).sha256, end(stopped).time_s) == (end(shorter).sha256, evals(shorter)[-1].time_s)
    assert stopped.params is not None
    assert shorter.params is not None
    assert torch.equal(stopped.params, shorter.params)
    for node in range(6):
        name = f"final/node-{node}.safetensors"
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "short" / name).read_bytes()


def test_a_rule_that_is_met_at_the_last_round_lets_the_run_finish() -> None:
    rule = target_after(6)
    assert simulator(rounds=6, stop_rule=rule).run().status == "finished"
    assert simulator(rounds=7, stop_rule=rule).run().status == "stopped"


def test_a_rule_that_is_met_at_the_start_ends_the_run_there() -> None:
    outcome = simulator(rounds=4, stop_rule=StopRule("loss", True, target=1e9)).run()
    assert (outcome.status, end(outcome).round, len(evals(outcome))) == ("stopped", 0, 1)


def test_patience_counts_the_evaluations_before_an_interruption(tmp_path: Path) -> None:
    world: dict[str, Any] = {"compute": UNEVEN, "rounds": 40, "checkpoint_every": 2, "train": {"lr": 2.0}}
    rule = StopRule("accuracy", False, patience=4)
    whole = simulator(stop_rule=rule, **world).run()
    assert whole.status == "stopped"
    assert 6 <= end(whole).round < 40
    for last in range(3, end(whole).round, 3):
        folder = tmp_path / str(last)
        asked = threading.Event()

        def ask(now: Progress, last: int = last, asked: threading.Event = asked) -> None:
            if now.round >= last:
                asked.set()

        first = simulator(stop_rule=rule, folder=folder, stop=asked.is_set, on_progress=ask, **world).run()
        assert first.status in ("interrupted", "stopped")
        if first.status == "stopped":
            continue
        again = simulator(stop_rule=rule, folder=folder, **world).run(resume=True)
        assert evals(again) == evals(whole)
        assert (again.status, end(again).sha256) == ("stopped", end(whole).sha256)


def test_a_node_that_is_down_keeps_the_model_of_its_crash() -> None:
    faults = Faults().crash(1, 2)
    rule = target_after(5, faults=faults)
    stopped = simulator(rounds=10, faults=faults, stop_rule=rule).run()
    shorter = simulator(rounds=5, faults=faults).run()
    assert (stopped.status, end(stopped).sha256) == ("stopped", end(shorter).sha256)


def test_a_rule_that_what_is_kept_of_a_run_meets_is_refused(tmp_path: Path) -> None:
    simulator(
        rounds=10, folder=tmp_path, checkpoint_every=4, stop=iter([False] * 60 + [True] * 9).__next__
    ).run()
    rule = StopRule("loss", True, target=1e9)
    with pytest.raises(ResumeError, match=r"run.stop: would have ended this run after 0 rounds \(loss reached"):
        simulator(rounds=10, folder=tmp_path, checkpoint_every=4, stop_rule=rule).run(resume=True)
