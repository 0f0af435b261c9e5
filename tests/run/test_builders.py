"""Checks of an experiment before it runs."""

from __future__ import annotations

from typing import Any

import pytest

from jwins.experiment import Experiment
from jwins.run.assembly import build
from jwins.run.builders import advice
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
