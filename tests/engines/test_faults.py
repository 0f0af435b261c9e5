"""Faults by script: what goes on, what is lost, and that every algorithm finds back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from worlds import end, evals, simulator, state_of

from jwins.engines.simulator import Compute, Faults, Links, StalledError
from jwins.errors import ConfigError
from jwins.rng import RoundContext
from jwins.run_folder.record import Record
from jwins.sharing import Sharing, choco, closed_loop, full, jwins, stateless
from jwins.sharing.update import Received, Update
from jwins.topology import FullyConnected, Regular, Ring

ALGORITHMS = {
    "full": full(),
    "jwins": jwins(),
    "choco": choco(0.3, gamma=0.5),
    "closed_loop": closed_loop(),
    "stateless": stateless(),
}


def test_a_dropped_frame_leaves_its_weight_with_the_receiver() -> None:
    """Node 1 misses node 0 in round 2: until then all is as without the fault, then only 1 differs at once."""
    runs = []
    for faults in (Faults(), Faults().drop(sender=0, round=2, receiver=1)):
        sim = simulator(4, rounds=3, faults=faults, deadline_s=0.5)
        outcome = sim.run()
        assert outcome.params is not None
        runs.append(outcome.params)
    differs = [not torch.equal(a, b) for a, b in zip(*runs, strict=True)]
    assert differs == [False, True, False, False]


def test_a_dropped_frame_is_paid_for() -> None:
    clean = simulator(4, deadline_s=0.5).run()
    lossy = simulator(4, deadline_s=0.5, faults=Faults().drop(sender=0, round=2)).run()
    assert clean.traffic == lossy.traffic
    assert end(lossy).time_s > end(clean).time_s


def test_without_a_deadline_a_drop_is_refused_and_a_stall_is_named() -> None:
    with pytest.raises(ConfigError, match=r"faults\[0\]\.kind = 'drop'.*run\.deadline_s"):
        simulator(4, faults=Faults().drop(sender=0, round=2))
    sim = simulator(4, faults=Faults().delay(sender=0, round=2, seconds=1.0))
    sim.network.uplinks[0].rate = 1e-300  # a link so slow that nothing arrives before time overflows
    sim.network.advance = lambda due, now: None  # type: ignore[method-assign]
    with pytest.raises(StalledError, match=r"node 0 in round 0 for frames of 1, 3; set run\.deadline_s"):
        sim.run()


def test_a_delayed_frame_is_waited_for() -> None:
    clean = simulator(4, rounds=4).run()
    late = simulator(4, rounds=4, faults=Faults().delay(sender=0, round=1, seconds=3.0)).run()
    assert end(late).sha256 == end(clean).sha256
    assert end(late).time_s == pytest.approx(end(clean).time_s + 3.0)


def test_a_late_frame_is_not_merged_by_an_algorithm_without_memory() -> None:
    dropped = simulator(4, rounds=6, deadline_s=0.1, faults=Faults().drop(sender=0, round=1, receiver=1)).run()
    late = simulator(
        4, rounds=6, deadline_s=0.1, faults=Faults().delay(sender=0, round=1, seconds=0.15, receiver=1)
    ).run()
    assert end(dropped).sha256 == end(late).sha256


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_others_go_on_when_a_node_crashes_and_it_finds_back(name: str, dynamic: bool) -> None:
    sim = simulator(
        6,
        sharing=ALGORITHMS[name],
        topology=Regular(num_nodes=6, seed=2, degree=3, dynamic=dynamic),
        rounds=16,
        faults=Faults().crash(node=2, round=4).rejoin(node=2, round=9),
    )
    outcome = sim.run()
    rows = {row.round: row for row in evals(outcome)}
    assert outcome.status == "finished"
    assert rows[4].nodes == [0, 1, 2, 3, 4, 5]
    assert rows[7].nodes == [0, 1, 3, 4, 5]
    assert rows[16].nodes == [0, 1, 2, 3, 4, 5]
    assert not outcome.refused
    distance = [rows[r].consensus_distance for r in (10, 16)]
    assert distance[1] < 3 * rows[4].consensus_distance, "the rejoined node was drawn back to the others"
    sent_by_2 = sum(edge.bytes.total for edge in outcome.traffic if edge.source == 2)
    sent_by_3 = sum(edge.bytes.total for edge in outcome.traffic if edge.source == 3)
    assert 0 < sent_by_2 < sent_by_3
    check_replicas(sim)


def test_a_crash_without_rejoin_leaves_the_model_of_the_crash() -> None:
    outcome = simulator(5, rounds=8, faults=Faults().crash(node=0, round=3)).run()
    before = simulator(5, rounds=3).run()
    assert outcome.params is not None
    assert before.params is not None
    assert torch.equal(outcome.params[0], before.params[0])
    assert evals(outcome)[-1].round == 8
    assert evals(outcome)[-1].nodes == [1, 2, 3, 4]


def test_a_run_in_which_all_nodes_crash_is_stalled(tmp_path: Path) -> None:
    faults = Faults()
    for node in range(4):
        faults = faults.crash(node=node, round=3 + (node == 2))
    sim = simulator(4, rounds=10, faults=faults, folder=tmp_path)
    outcome = sim.run()
    last = end(outcome)
    sent = sum(edge.bytes.total for edge in outcome.traffic)
    assert (outcome.status, last.status, last.round) == ("stalled", "stalled", 4)
    assert last.reason == f"all 4 nodes are down, the last one since round 4; {sent} bytes were sent"
    assert evals(outcome)[-1].round == 4
    record = Record.read(tmp_path)
    assert record.status == "stalled @ 4"
    assert record.ended_early
    assert math.isnan(record.final("accuracy"))


def test_a_crash_leaves_no_checkpoint_out(tmp_path: Path) -> None:
    """Those who are left had asked for it before the slowest node, which asks no more, went down."""
    sim = simulator(
        4,
        rounds=14,
        topology=FullyConnected(num_nodes=4, seed=1),
        faults=Faults().crash(node=3, round=1).rejoin(node=3, round=12),
        folder=tmp_path,
        checkpoint_every=1,
        deadline_s=0.05,
        compute=Compute(step_ms=(10.0, 10.0, 10.0, 400.0)),
    )
    saved: list[int] = []
    save = sim._save

    def saving(completed: int) -> None:
        saved.append(completed)
        save(completed)

    sim._save = saving  # type: ignore[method-assign]
    sim.run()

    assert saved == [11, 12, 13], "at the crash, those who are left had all asked for that of round 11"


def test_a_share_that_is_not_finite_names_class_node_and_round() -> None:
    @dataclass(frozen=True)
    class Broken(Sharing[int]):
        remembers_peers: ClassVar[bool] = False
        needs_common_start: ClassVar[bool] = False
        state_types: ClassVar[tuple[type, ...]] = ()

        def init(self, params: torch.Tensor) -> int:
            return 0

        def share(self, state: int, params: torch.Tensor, ctx: RoundContext) -> tuple[Update, int]:
            values = params * float("nan") if (ctx.node, ctx.round) == (2, 3) else params.clone()
            return Update(len(params), None, values), state

        def merge(
            self, state: int, params: torch.Tensor, received: Sequence[Received], ctx: RoundContext
        ) -> tuple[torch.Tensor, int]:
            return params, state

    outcome = simulator(16, sharing=Broken(), rounds=6).run()
    assert outcome.status == "diverged"
    assert end(outcome).reason == "node 2, round 3: Broken.share returned a value that is not finite"


def check_replicas(sim: Any) -> None:
    """Every replica that a CHOCO-SGD node holds is its neighbour's own, bit for bit."""
    for node in range(sim.num_nodes):
        for j, replica in getattr(state_of(sim, node), "replicas", {}).items():
            theirs = state_of(sim, j)
            if replica.round == theirs.shared:
                assert torch.equal(replica.x_hat, theirs.x_hat), f"{node} holds a wrong replica of {j}"


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("back", [None, 5])
def test_what_a_crashed_node_has_sent_stays_counted(name: str, back: int | None) -> None:
    faults = Faults().crash(node=1, round=3)
    if back is not None:
        faults = faults.rejoin(node=1, round=back)
    outcome = simulator(4, sharing=ALGORITHMS[name], rounds=7, faults=faults).run()
    totals = [row.traffic.total for row in evals(outcome)]
    assert totals == sorted(totals)
    assert totals[-1] == sum(edge.bytes.total for edge in outcome.traffic)


@pytest.mark.parametrize("name", ["choco", "closed_loop"])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 8))])
def test_replicas_recover_from_random_loss(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    faults = Faults()
    for _ in range(6):
        sender, receiver, when = (int(torch.randint(high, (1,), generator=generator)) for high in (6, 6, 14))
        if sender != receiver:
            faults = faults.drop(sender, when, receiver)
    sim = simulator(
        6,
        sharing=ALGORITHMS[name],
        topology=Regular(num_nodes=6, seed=2, degree=3),
        rounds=20,
        faults=faults,
        deadline_s=0.2,
    )
    outcome = sim.run()
    assert outcome.status == "finished"
    lost = any(
        fault.receiver in sim.rules.topology.at(0).recipients[fault.node]
        for fault in faults.script
        if fault.round < 18
    )
    bytes_sent = evals(outcome)[-1].traffic
    assert (bytes_sent.keyframe > 0) == lost, "a keyframe is sent when a frame was lost, and only then"
    assert (bytes_sent.control > 0) == lost
    for node in range(6):
        assert not state_of(sim, node).stale_peers
        assert set(state_of(sim, node).replicas) == set(sim.rules.topology.at(0).senders[node])
    check_replicas(sim)
    of_all = [(j, replica) for node in range(6) for j, replica in state_of(sim, node).replicas.items()]
    newest = {(j, id(replica.x_hat)) for j, replica in of_all if replica.round == 19}
    assert len(newest) == len({j for j, _ in newest}), "all receivers of a node hold one replica of it"


def test_choco_on_dynamic_graphs_pays_for_keys() -> None:
    static = simulator(6, sharing=choco(0.3, 0.5), topology=Regular(num_nodes=6, seed=2, degree=3)).run()
    dynamic = simulator(
        6, sharing=choco(0.3, 0.5), topology=Regular(num_nodes=6, seed=2, degree=3, dynamic=True)
    ).run()
    assert evals(static)[-1].traffic.keyframe == 0
    assert evals(dynamic)[-1].traffic.keyframe > 0
    assert not dynamic.refused


@pytest.mark.parametrize("sharing", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_slow_node_is_left_behind_and_nothing_breaks(sharing: Sharing[Any]) -> None:
    """With a deadline a node on a slow line is late in every round; its weight stays with the others."""
    sim = simulator(
        4,
        sharing=sharing,
        topology=FullyConnected(num_nodes=4, seed=1),
        rounds=10,
        links=Links((0.05, 10.0, 10.0, 10.0), 1.0),
        deadline_s=0.02,
    )
    outcome = sim.run()
    assert outcome.status == "finished"
    assert not outcome.refused


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (Faults().crash(node=9, round=1), r"faults\[0\]\.node = 9"),
        (Faults().crash(node=1, round=99), r"faults\[0\]\.round = 99"),
        (Faults().rejoin(node=1, round=3), "rejoins without a crash"),
        (Faults().crash(1, 2).crash(1, 4), "crashes twice"),
        (Faults().delay(1, 2, seconds=1.0, receiver=1), r"faults\[0\]\.receiver = 1: is the sender itself"),
        (Faults().delay(1, 2, seconds=-1.0), r"faults\[0\]\.seconds = -1\.0"),
    ],
)
def test_scripts_that_cannot_be_played_are_refused(faults: Faults, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulator(4, topology=Ring(num_nodes=4, seed=1), faults=faults)
