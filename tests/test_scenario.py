"""Links, compute and faults: settings and the objects that an engine is given are refused in the same words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jwins.errors import ConfigError
from jwins.experiment import load
from jwins.scenario import Compute, Fault, Faults, Links, check_scenario


def world(
    links: Links | None = None,
    compute: Compute | None = None,
    faults: Faults | None = None,
    deadline_s: float | None = None,
) -> None:
    check_scenario(
        num_nodes=16,
        rounds=200,
        links=links or Links(),
        compute=compute or Compute(),
        faults=faults or Faults(),
        deadline_s=deadline_s,
    )


CASES: list[tuple[list[str], Callable[[], object]]] = [
    (["links.uplink_mbps=0.0"], lambda: Links(0.0)),
    (["links.uplink_mbps=[1.0, inf]"], lambda: Links((1.0, float("inf")))),
    (["links.latency_ms=-1.0"], lambda: Links(1.0, -1.0)),
    (["compute.step_ms=nan"], lambda: Compute(float("nan"))),
    (["compute.step_ms=[1.0, 0.0]"], lambda: Compute((1.0, 0.0))),
    (["compute.spread=3.0"], lambda: Compute(spread=3.0)),
    (["compute.jitter=-0.5"], lambda: Compute(jitter=-0.5)),
    (["links.uplink_mbps=[1.0, 2.0]"], lambda: world(Links((1.0, 2.0)))),
    (["compute.step_ms=[1.0, 2.0]"], lambda: world(compute=Compute((1.0, 2.0)))),
    (["run.deadline_s=0.0"], lambda: world(deadline_s=0.0)),
    (["faults=[{kind='drop', sender=1, round=2}]"], lambda: world(faults=Faults().drop(1, 2))),
    (["faults=[{kind='crash', node=16, round=2}]"], lambda: world(faults=Faults().crash(16, 2))),
    (
        ["faults=[{kind='delay', sender=16, round=2, seconds=1.0}]"],
        lambda: world(faults=Faults().delay(16, 2, 1.0)),
    ),
    (
        ["faults=[{kind='delay', sender=1, receiver=20, round=2, seconds=1.0}]"],
        lambda: world(faults=Faults().delay(1, 2, 1.0, receiver=20)),
    ),
    (
        ["faults=[{kind='delay', sender=1, round=2, seconds=0.0}]"],
        lambda: world(faults=Faults().delay(1, 2, 0.0)),
    ),
    (["faults=[{kind='rejoin', node=1, round=200}]"], lambda: world(faults=Faults().rejoin(1, 200))),
    (["faults=[{kind='rejoin', node=1, round=3}]"], lambda: world(faults=Faults().rejoin(1, 3))),
    (
        ["faults=[{kind='crash', node=1, round=3}, {kind='crash', node=1, round=4}]"],
        lambda: world(faults=Faults().crash(1, 3).crash(1, 4)),
    ),
]


@pytest.mark.parametrize(("overrides", "make"), CASES, ids=[" ".join(sets) for sets, _ in CASES])
def test_settings_and_objects_are_refused_alike(overrides: list[str], make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as of_settings:
        load("digits", overrides)
    with pytest.raises(ConfigError) as of_object:
        make()
    assert str(of_settings.value) == str(of_object.value)


def test_tables_build_what_the_clock_plays() -> None:
    experiment = load(
        "digits",
        [
            "run.deadline_s=1.0",
            "links={uplink_mbps=5.0, latency_ms=1.0}",
            "compute={step_ms=2.0, spread=0.1, jitter=0.2}",
            "faults=[{kind='crash', node=1, round=2}, {kind='rejoin', node=1, round=4}, "
            "{kind='drop', sender=2, receiver=3, round=5}, {kind='delay', sender=4, round=6, seconds=0.5}]",
        ],
    )
    assert experiment.links.build() == Links(5.0, 1.0)
    assert experiment.compute.build() == Compute(2.0, 0.1, 0.2)
    assert experiment.fault_script() == Faults().crash(1, 2).rejoin(1, 4).drop(2, 5, 3).delay(4, 6, 0.5)
    assert experiment.fault_script().script[2] == Fault("drop", 2, 5, 3)
