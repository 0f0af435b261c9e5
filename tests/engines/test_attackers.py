"""Nodes that attack their neighbours, in a run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jwins
from jwins.errors import ConfigError
from jwins.node import Rules
from jwins.run.assembly import assemble, build
from jwins.run.builders import build_task, local_changes
from jwins.run.node import for_network
from jwins.tasks import Dataset, Task
from jwins.tasks.local_data import Changes, FlippedLabels, with_local_data

FULL: dict[str, Any] = {"kind": "full"}


def experiment(
    attack: str | None, sharing: dict[str, Any] = FULL, folder: Path | None = None, **run: Any
) -> Any:
    scale = {"sign_flip": 4.0, "gaussian": 1.0, "little": 3.0}.get(str(attack), 1.0)
    table = {"kind": "attack", "form": attack, "nodes": [1, 5], "scale": scale}
    return jwins.Experiment(
        name="attacked",
        task={"name": "digits", "partition": {"kind": "iid"}},  # type: ignore[arg-type]
        nodes={"count": 8},  # type: ignore[arg-type]
        topology={"kind": "fully_connected"},  # type: ignore[arg-type]
        sharing=sharing,  # type: ignore[arg-type]
        train={"optimizer": {"kind": "sgd", "lr": 0.1}},  # type: ignore[arg-type]
        faults=() if attack is None else (table,),  # type: ignore[arg-type]
        run={"rounds": 25, "eval_every": 25, "folder": folder, **run},  # type: ignore[arg-type]
    )


def accuracy(made: jwins.Experiment) -> float:
    outcome = build(made).driver.run()
    if outcome.status == "diverged":
        return 0.0
    row = outcome.rows[-2]
    return float(row.metrics["accuracy"].mean)  # type: ignore[union-attr,arg-type]


@pytest.fixture(scope="module")
def honest() -> float:
    return accuracy(experiment(None))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clipped_gossip", "trimmed_mean", "median"])
@pytest.mark.parametrize("attack", ["sign_flip", "gaussian", "little", "label_flip"])
def test_robust_merges_stand_two_attackers_of_eight(attack: str, kind: str, honest: float) -> None:
    robust: dict[str, Any] = {"kind": kind} if kind == "median" else {"kind": kind, "attackers": 2}
    stood = accuracy(experiment(attack, {"kind": "full", "robust": robust}))
    assert stood > honest - 0.08
    if attack == "gaussian":
        assert accuracy(experiment(attack)) < stood - 0.1


def test_attackers_are_not_measured_and_train_on(tmp_path: Path) -> None:
    result = jwins.simulate(experiment("sign_flip", folder=tmp_path, rounds=4, eval_every=2))
    for row in result.record.evaluations:
        assert row.nodes == [0, 2, 3, 4, 6, 7]
        assert len(row.per_node["accuracy"]) == 6
        assert row.metrics["accuracy"].mean == pytest.approx(
            statistics.fmean(value for value in row.per_node["accuracy"] if value is not None)
        )
    assert len(list((tmp_path / "final").glob("*.safetensors"))) == 8


@pytest.mark.parametrize(
    ("attack", "batching"),
    [
        *((attack, "loop") for attack in ("sign_flip", "gaussian", "little", "label_flip")),
        *((attack, "stacked") for attack in ("gaussian", "label_flip")),  # one of models and one of samples
    ],
)
def test_a_run_that_goes_on_is_attacked_alike(attack: str, batching: str, tmp_path: Path) -> None:
    made = experiment(attack, rounds=5, eval_every=1, checkpoint_every=1).changed({"train.batching": batching})
    whole = jwins.simulate(made.changed({"run.folder": tmp_path / "whole"}))
    if batching == "loop":
        halves = [range(4), range(4, 8)]

        def place(resolved: jwins.Experiment, rules: Rules, chunk: int) -> Any:
            groups = [assemble(resolved, nodes=own).node_group() for own in halves]
            return groups, lambda calls: [call() for call in calls]

        assert tuple(build(made, place=place).driver.run().rows[1:-1]) == whole.record.evaluations
    part = made.changed({"run.folder": tmp_path / "part"})
    rounds: list[int] = []
    jwins.simulate(
        part,
        stop=lambda: bool(rounds) and rounds[-1] >= 3,
        progress=lambda now: rounds.append(now.round),
    )
    again = jwins.simulate(part, resume=True)
    assert again.sha256 == whole.sha256
    assert again.record.evaluations == whole.record.evaluations


def test_honest_nodes_without_attackers_near_them_are_as_before() -> None:
    """An attack that begins in the last round changes nothing before it."""
    plain = build(experiment(None, rounds=4, eval_every=1)).driver.run()
    late = experiment("gaussian", rounds=4, eval_every=1).changed(
        {"faults": [{"kind": "attack", "form": "gaussian", "nodes": [1], "round": 3}]}
    )
    found = build(late).driver.run()
    rows = [(a, b) for a, b in zip(plain.rows, found.rows, strict=True) if hasattr(a, "per_node")]
    for a, b in rows[:-1]:
        assert [a.per_node["loss"][node] for node in b.nodes] == b.per_node["loss"]  # type: ignore[union-attr]
    assert rows[-1][0].per_node["loss"][0] != rows[-1][1].per_node["loss"][0]  # type: ignore[union-attr]


def test_labels_are_flipped_on_the_attackers_alone() -> None:
    made = experiment("label_flip")
    task = build_task(made)
    changes = local_changes(made, task)
    assert changes == dict.fromkeys((1, 5), Changes((FlippedLabels(10),)))
    parts = {node: np.arange(node * 10, node * 10 + 10) for node in (0, 1)}
    local, held = with_local_data(task, parts, changes)
    assert held[0] is parts[0]
    assert torch.equal(local.train.targets[held[1]], 9 - task.train.targets[parts[1]])
    assert torch.equal(local.train.inputs[held[1]], task.train.inputs[parts[1]])
    assert len(task.train) == 1437
    assert with_local_data(task, parts, {})[0] is task
    start = build(made).start.fingerprints
    assert start["data"] == build(experiment(None)).start.fingerprints["data"]


def test_targets_that_are_no_labels_cannot_be_flipped() -> None:
    class Plain(Task):
        def __init__(self) -> None:
            self.train = self.test = Dataset(torch.zeros(40, 2), torch.zeros(40))

        def model(self) -> torch.nn.Module:
            return torch.nn.Linear(2, 1)

    with pytest.raises(
        ConfigError, match=r"faults.form = 'label_flip': the task's targets are not labels; remove this setting"
    ):
        local_changes(experiment("label_flip"), Plain())


def test_attacks_are_played_by_the_simulator_alone() -> None:
    with pytest.raises(ConfigError, match="simulate scripted faults; remove them"):
        for_network(experiment("sign_flip"))
