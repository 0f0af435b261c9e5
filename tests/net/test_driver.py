"""A network of nodes on the wall clock ends where the simulator does, to the last bit."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from wires import Running, Wires, World, run_all
from worlds import evals

from jwins.net.peer_session import State
from jwins.run_folder.rows import EvalRow
from jwins.sharing import choco, full, jwins, random_k, top_k
from jwins.topology import FullyConnected, Regular

CASES = {
    "full": full(),
    "jwins": jwins(),
    "choco": choco(0.3, 0.5),
    "random_k": random_k(0.3),
    "top_k": top_k(0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_parameters_and_bytes_as_in_the_simulator(name: str, wires: Wires) -> None:
    world = World(6, CASES[name], Regular(num_nodes=6, seed=1, degree=3), codec="pco")
    expected = world.simulate()
    found = run_all(world, wires)
    for node, outcome in found.items():
        assert outcome.status == "finished"
        assert torch.equal(outcome.params, expected.params[node]), f"node {node}"
        assert not any(outcome.refused.values())
    sent = {(edge.source, edge.target): edge.bytes for found in found.values() for edge in found.traffic}
    for edge in expected.traffic:
        mine = sent[edge.source, edge.target]
        for kind in ("positions", "values", "header", "keyframe"):
            assert getattr(mine, kind) == getattr(edge.bytes, kind), (edge.source, edge.target, kind)
        assert mine.control > edge.bytes.control, "a Hello and a Bye"


def test_who_ends_first_waits_for_nobody_who_has_ended_too(wires: Wires) -> None:
    world = World(4, topology=FullyConnected(num_nodes=4, seed=1), rounds=2, timeout_s=300.0)
    drivers = world.drivers(wires)
    # Frames to node 3 are late, so it ends last.
    wires.fate = lambda sender, receiver, data: 0.3 if receiver == 3 and len(data) > 300 else 0.0
    running = Running()
    for node, driver in enumerate(drivers):
        running.start(node, driver)
    running.join_all(timeout_s=100.0)
    for driver in drivers:
        assert {known.state for known in driver.peers.values()} == {State.LEFT}


def test_training_that_does_not_end_is_waited_for_in_vain_for_a_limited_time(
    wires: Wires, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("jwins.net.driver.SETTLE_S", 0.05)
    stopped, goes_on = threading.Event(), threading.Event()
    driver = World(2).driver(0, wires, stop=stopped.is_set)
    monkeypatch.setattr(driver.group, "train", lambda rounds: goes_on.wait(60.0))
    running = Running()
    running.start(0, driver)
    running.wait_until(lambda: driver.session.training, "training")
    stopped.set()
    try:
        running.join(0, timeout_s=30.0)
    finally:
        goes_on.set()
    assert running.outcomes[0].status == "interrupted"
    assert "training did not end in time" in caplog.text


def test_each_node_measures_itself_as_the_simulator_does(wires: Wires) -> None:
    world = World(4)
    expected = {row.round: row for row in evals(world.simulate())}
    for node, outcome in run_all(world, wires).items():
        rows = [row for row in outcome.rows if isinstance(row, EvalRow)]
        assert [row.round for row in rows] == sorted(expected)
        for row in rows:
            assert row.per_node["accuracy"] == [expected[row.round].per_node["accuracy"][node]]
            assert row.nodes == [node]


def test_a_graph_drawn_anew_each_round(wires: Wires) -> None:
    world = World(6, jwins(), Regular(num_nodes=6, seed=1, degree=2, dynamic=True), rounds=12)
    expected = world.simulate()
    for node, outcome in run_all(world, wires).items():
        assert torch.equal(outcome.params, expected.params[node]), f"node {node}"


def test_the_time_in_which_the_machine_was_suspended_counts(
    wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have completed rounds meanwhile, and the node must believe them."""
    before_s = World(2).driver(0, wires).session.now
    monkeypatch.setattr(time, "clock_gettime", lambda clock: before_s + 3600.0 * (clock == time.CLOCK_BOOTTIME))
    assert World(2).driver(1, wires).session.now >= before_s + 3600.0


def test_a_system_without_such_a_clock_has_another(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clock_gettime", "CLOCK_BOOTTIME", "CLOCK_MONOTONIC"):
        monkeypatch.delattr(time, name)
    assert World(2).driver(0, wires).session.now <= time.monotonic()
