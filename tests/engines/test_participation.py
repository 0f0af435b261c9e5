"""Rounds in which only some of the nodes train and exchange."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import end, evals, simulator

import jwins
from jwins.engines.simulator import Compute
from jwins.errors import ConfigError
from jwins.run.builders import build_topology, raw_bytes_per_node
from jwins.sharing import Sharing, choco, closed_loop, full, stateless
from jwins.sharing import jwins as wavelets
from jwins.topology import Regular
from jwins.topology.participation import Participation

HALF = Participation(Regular(num_nodes=6, seed=1, degree=3), 0.5, seed=7)


def params_after(rounds: int, **world: Any) -> Tensor:
    found = simulator(6, rounds=rounds, topology=HALF, **world).run().params
    assert found is not None
    return found


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_a_node_that_does_not_take_part_keeps_its_model(batching: str) -> None:
    """And all others change theirs, as they train."""
    world: dict[str, Any] = {"train": {"batching": batching}}
    before = params_after(1, **world)
    for at in range(1, 5):
        after = params_after(at + 1, **world)
        same = {node for node in range(6) if torch.equal(before[node], after[node])}
        assert same == set(range(6)) - HALF.active(at)
        before = after


@pytest.mark.parametrize("sharing", [full(), wavelets(), choco(0.3, 0.5), closed_loop(), stateless()], ids=repr)
def test_node_groups_and_uneven_clocks_change_nothing(sharing: Sharing[Any]) -> None:
    world: dict[str, Any] = {"rounds": 8, "topology": HALF, "sharing": sharing, "codec": "pco"}
    plain = simulator(6, **world).run()
    for groups in (2, 3):
        other = simulator(6, groups=groups, **world).run()
        assert (other.rows[:-1], end(other).sha256) == (plain.rows[:-1], end(plain).sha256)
    uneven = simulator(6, compute=Compute(10.0, spread=1.0, jitter=0.5), **world).run()
    assert end(uneven).sha256 == end(plain).sha256
    assert [row.metrics for row in evals(uneven)] == [row.metrics for row in evals(plain)]
    assert not plain.refused


def test_as_many_bytes_as_edges_between_those_who_take_part() -> None:
    outcome = simulator(6, rounds=9, topology=HALF, sharing=full()).run()
    edges = {(r, i, j) for r in range(9) for i, j in HALF.at(r).edges}
    sent = {(edge.source, edge.target) for edge in outcome.traffic}
    assert sent == {(i, j) for _, i, j in edges}
    frame = evals(simulator(6, rounds=1, topology=HALF.topology, sharing=full()).run())[-1].traffic.total // 18
    assert evals(outcome)[-1].traffic.total == frame * len(edges)


def test_the_setting_is_the_topology_of_all_engines(tmp_path: Path) -> None:
    sets = ["nodes.count=6", "topology.degree=3", "train.batching=loop", "run.rounds=6", "run.eval_every=6"]
    start = jwins.load("digits", sets)
    half = start.changed({"nodes.participation": 0.5, "run.folder": tmp_path / "half"})
    topology = build_topology(half)
    assert isinstance(topology, Participation)
    assert [len(topology.active(r)) for r in range(6)] == [3] * 6
    assert raw_bytes_per_node(half, 100, 50) < 0.5 * raw_bytes_per_node(start, 100, 50)
    result = jwins.simulate(half)
    assert result.rows[-1]["bytes_total"] > 0
    assert jwins.simulate(half, resume=True).was_complete


def test_directed_graphs_are_refused() -> None:
    wrong = jwins.load("digits", ["topology.kind=one_peer_exponential", "nodes.participation=0.5"])
    with pytest.raises(
        ConfigError, match=r"nodes.participation = 0.5: this topology has asymmetric mixing weights"
    ):
        build_topology(wrong)


def test_one_node_of_few_is_enough() -> None:
    alone = Participation(Regular(num_nodes=6, seed=1, degree=3), 0.01, seed=1)
    outcome = simulator(6, rounds=12, topology=alone).run()
    assert outcome.status == "finished"
    assert evals(outcome)[-1].traffic.total == 0
