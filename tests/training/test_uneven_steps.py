"""Nodes that take different numbers of local steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jwins
from jwins.errors import ConfigError, UsageError
from jwins.run.builders import build_partition, build_task, change_factors, local_steps
from jwins.tasks import make_task
from jwins.training.optimizer import Optimizer
from jwins.training.trainer import Trainer

MOMENTUM = Optimizer("sgd", {"lr": 0.05, "momentum": 0.9})
QUASI_GLOBAL = Optimizer("sgd", {"lr": 0.05, "momentum": 0.9}, quasi_global=0.9)


def trainer(steps: Any, optimizer: Optimizer = MOMENTUM, **options: Any) -> Trainer:
    parts = [np.arange(node * 40, (node + 1) * 40) for node in range(4)]
    return Trainer(
        make_task("digits"), parts, seed=1, local_steps=steps, batch_size=4, optimizer=optimizer, **options
    )


@pytest.mark.parametrize("optimizer", [MOMENTUM, QUASI_GLOBAL], ids=["momentum", "quasi-global"])
def test_each_node_trains_as_where_all_take_its_number(optimizer: Optimizer) -> None:
    uneven = trainer([1, 4, 2, 4], optimizer)
    assert uneven.batching == "loop"
    assert uneven.reason == "nodes take different numbers of local steps"
    for at in range(3):
        losses = uneven.train(dict.fromkeys(range(4), at))
        assert len(losses) == 4
    for steps, nodes in ((1, (0,)), (2, (2,)), (4, (1, 3))):
        even = trainer(steps, optimizer, batching="loop")
        for at in range(3):
            even.train(dict.fromkeys(range(4), at))
        for node in nodes:
            assert torch.equal(uneven.row(node), even.row(node))


def test_equal_numbers_are_one_number() -> None:
    assert trainer([3, 3, 3, 3]).batching == trainer(3).batching == "stacked"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.batching = 'stacked': nodes with different numbers"):
        trainer([1, 2, 3, 4], batching="stacked")
    with pytest.raises(UsageError, match="3 numbers of local steps for 4 nodes"):
        trainer([1, 2, 3])
    with pytest.raises(ConfigError, match=r"train.local_steps = 0: expected an integer of at least 1"):
        trainer([1, 2, 3, 0])


def test_epochs_are_steps_by_the_samples_of_a_node() -> None:
    experiment = jwins.load("digits", ["train.local_epochs=0.5", "train.batch_size=8"])
    parts = [np.arange(count) for count in (1, 16, 17, 160, 161)]
    assert local_steps(experiment, parts) == [1, 1, 2, 10, 11]
    assert local_steps(experiment.changed({"train.local_epochs": 2}), parts) == [1, 4, 5, 40, 41]
    tenth = experiment.changed({"train.local_epochs": 0.1})
    assert local_steps(tenth, [np.arange(240)]) == [3]


def test_slow_nodes_take_the_steps_that_fit_into_the_time_of_the_median_and_count_alike() -> None:
    parts = [np.arange(8)] * 5
    experiment = jwins.load("digits", ["nodes.count=5", "train.local_steps=10", "train.balanced=true"])
    assert local_steps(experiment, parts) == [10] * 5
    uneven = experiment.changed({"compute.step_ms": [10.0, 5.0, 10.0, 34.0, 1000.0]})
    assert local_steps(uneven, parts) == [10, 20, 10, 2, 1]
    assert change_factors(uneven, parts) == pytest.approx({0: 0.86, 1: 0.43, 2: 0.86, 3: 4.3, 4: 8.6})
    assert change_factors(uneven.changed({"train.balanced": False}), parts) == {}


@pytest.mark.parametrize("key", ["train.local_epochs=0.3", "train.local_steps=[1, 5, 2, 3]"])
def test_a_run_takes_the_time_of_its_slowest_node(key: str, tmp_path: Path) -> None:
    sets = ["nodes.count=4", "topology.kind=fully_connected", "run.rounds=4", "links.latency_ms=0.001"]
    sets += ["task.partition={kind='dirichlet', alpha=0.3}", "sharing.kind=full", "links.uplink_mbps=1000000.0"]
    experiment = jwins.load("digits", [*sets, key, f"run.folder={tmp_path}"])
    partition = build_partition(experiment, build_task(experiment))
    steps = local_steps(experiment, partition)
    assert len(set(steps)) > 2
    result = jwins.simulate(experiment)
    assert result.rows[-1]["time_s"] == pytest.approx(4 * max(steps) * 0.01, rel=0.01)
    again = jwins.simulate(jwins.load(tmp_path / "config.toml", [f"run.folder={tmp_path}"]), resume=True)
    assert again.was_complete
    assert again.experiment.train.batching == "loop"


@pytest.mark.parametrize("setting", ["train.balanced=true", "train.local_steps=[2, 2, 2, 2]"])
def test_settings_that_give_all_nodes_the_same_steps_are_no_error(setting: str, tmp_path: Path) -> None:
    tables = ["nodes.count=4", "topology={kind='ring'}", "run.rounds=1", f"run.folder={tmp_path}", setting]
    assert jwins.simulate(jwins.load("digits", tables)).status == "finished"
