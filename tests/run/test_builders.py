"""Checks of an experiment before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jwins
from jwins.errors import DataError
from jwins.experiment import Experiment
from jwins.run.assembly import build
from jwins.run.builders import advice, build_partition, build_task, write_partition
from jwins.sharing import choco
from jwins.topology import Regular, Ring

DRAWN = {"kind": "regular", "degree": 4, "dynamic": True}


@pytest.mark.parametrize(
    ("topology", "sharing", "said"),
    [
        (DRAWN, {"kind": "closed_loop"}, True),
        (DRAWN, choco(0.2, 0.5), True),
        (DRAWN, {"kind": "stateless"}, False),
        ({"kind": "ring"}, {"kind": "closed_loop"}, False),
        (Ring(num_nodes=16, seed=1), {"kind": "closed_loop"}, False),
        (Regular(num_nodes=16, seed=1, degree=4, dynamic=True), {"kind": "closed_loop"}, True),
    ],
)
def test_replicas_are_said_to_be_costly_where_neighbours_change(
    topology: Any, sharing: Any, said: bool
) -> None:
    assert bool(advice(Experiment(topology=topology, sharing=sharing))) == said


def test_an_algorithm_knows_the_shapes_of_the_model() -> None:
    found = build(Experiment(task={"name": "digits"}, sharing={"kind": "power_gossip"}))  # type: ignore[arg-type]
    layout = found.driver.groups[0].trainer.layout
    assert found.driver.rules.sharing.shapes == tuple(slot.shape for slot in layout.slots)
    assert any(len(shape) > 1 for shape in found.driver.rules.sharing.shapes)


def test_the_samples_of_each_node_are_in_the_run_folder(tmp_path: Path) -> None:
    experiment = jwins.load("digits", ["nodes.count=5", "topology.kind=ring", "run.rounds=1"])
    experiment = experiment.changed({"run.folder": tmp_path / "run", "sharing.kind": "full"})
    result = jwins.simulate(experiment)
    wanted = build_partition(experiment, build_task(experiment))
    for found, part in zip(result.partition, wanted, strict=True):
        assert np.array_equal(found, part)
    assert sum(map(len, wanted)) == sum(json.loads((result.folder / "partition.json").read_text())["samples"])
    file = result.folder / "partition.safetensors"
    assert file.stat().st_size < 4 * sum(map(len, wanted))
    before = file.read_bytes()
    file.unlink()
    with pytest.raises(
        DataError, match=r"partition.safetensors: cannot be read; build_partition of jwins.run.builders draws"
    ):
        _ = result.partition
    write_partition(result.folder, build_task(experiment), wanted)
    assert file.read_bytes() == before
    file.write_bytes(before[:40])
    with pytest.raises(DataError, match=r"partition.safetensors: cannot be read"):
        _ = result.partition


def test_a_seed_that_all_know_is_said_to_protect_from_others_alone() -> None:
    (note,) = advice(jwins.load("digits", ["train.privacy={noise_multiplier=1.0}"]))
    assert note == "train.privacy: noise is drawn from run.seed; epsilon holds against those who do not know it"
