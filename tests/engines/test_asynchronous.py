"""Asynchronous runs: no node waits, and neighbours still agree about each other's replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import end, evals, simulator, state_of, trainer

import jwins as jwins_package
from jwins.engines.node_group import Envelope, MessageArrived
from jwins.engines.simulator import Compute, Faults, Links, SimulatedDriver
from jwins.engines.simulator.network import SimulatedNetwork
from jwins.engines.simulator.queue import EventQueue, TransferDone
from jwins.errors import ConfigError
from jwins.node import PeerUp, Rejoin, Staleness, Trained
from jwins.run.assembly import assemble
from jwins.sharing import Sharing, choco, closed_loop, full, jwins, moniqua, random_k, stateless
from jwins.topology import FullyConnected, Regular
from jwins.training.loop import LoopTrainer
from jwins.wire.frame import Packed

SHARED: dict[str, Sharing[Any]] = {
    "full": full(),
    "jwins": jwins(),
    "random_k": random_k(0.3),
    "choco": choco(0.3, 0.5),
    "closed_loop": closed_loop(),
    "stateless": stateless(),
    "moniqua": moniqua(theta=2.0),
}


def asynchronous(num_nodes: int = 4, **options: Any) -> SimulatedDriver:
    options = {"rounds": 12, "staleness": Staleness(16), **options}
    return simulator(num_nodes, **options)


def slow(num_nodes: int = 4) -> Compute:
    """The last node takes five times as long."""
    return Compute((*[10.0] * (num_nodes - 1), 50.0))


@pytest.mark.parametrize("name", SHARED)
def test_a_slow_node_does_not_delay_the_others(name: str) -> None:
    outcome = asynchronous(sharing=SHARED[name], compute=slow()).run()
    assert (outcome.status, [row.round for row in evals(outcome)]) == ("finished", list(range(13)))
    # 12 rounds of two steps of 10 ms; the frames of the last one are waited for, at most 20 ms
    assert 12 * 0.020 <= end(outcome).time_s <= 13 * 0.020 + 1e-9
    assert evals(outcome)[-1].metrics["loss"].mean < evals(outcome)[0].metrics["loss"].mean


def test_an_asynchronous_run_is_further_after_the_same_time() -> None:
    options: dict[str, Any] = {"sharing": full(), "compute": slow(8), "topology": FullyConnected(8, 1)}
    options |= {"rounds": 40, "links": Links(100.0, latency_ms=1.0)}
    waits, goes_on = (evals(simulator(8, staleness=s, **options).run()) for s in (None, Staleness(16)))
    assert goes_on[-1].time_s < waits[-1].time_s / 4.5
    meanwhile = [row for row in waits if row.time_s <= goes_on[-1].time_s]
    assert goes_on[-1].metrics["accuracy"].mean > meanwhile[-1].metrics["accuracy"].mean + 0.1


def test_equal_nodes_take_one_step_on_the_mean_of_the_round_before() -> None:
    """With equal speeds and a complete graph: share m + (z - y), where m is the mean of all y."""
    options: dict[str, Any] = {
        "sharing": full(),
        "topology": FullyConnected(4, 1),
        "rounds": 3,
        "links": Links(100.0, 1.0),
    }
    driver = asynchronous(**options)
    own = trainer()
    y = [own.initial() for _ in range(4)]
    for at in range(3):
        for node in range(4):
            own.row(node).copy_(y[node])
        own.train(dict.fromkeys(range(4), at))
        z = [own.row(node).clone() for node in range(4)]
        if at:
            mean = torch.stack(y).mean(0)
            z = [mean + (z[node] - y[node]) for node in range(4)]
        y = z
    outcome = driver.run()
    assert outcome.params is not None
    assert torch.allclose(outcome.params, torch.stack(y).mean(0), atol=1e-6)


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_the_mean_over_nodes_moves_by_training_alone(batching: str) -> None:
    """With full sharing and equal speeds, merging does not change the mean, however late it happens."""
    driver = asynchronous(
        8, topology=Regular(num_nodes=8, seed=1, degree=4), train={"batching": batching, "lr": 1e-9}
    )
    outcome = driver.run()
    assert outcome.params is not None
    assert torch.allclose(outcome.params.mean(0), trainer().initial(), atol=1e-6)


def test_an_evaluation_is_of_the_merged_models_of_all_nodes_that_are_up() -> None:
    rows = evals(asynchronous(compute=slow(), faults=Faults().crash(0, 4).rejoin(0, 8)).run())
    nodes = {row.round: row.nodes for row in rows}
    assert nodes[3] == [0, 1, 2, 3]
    assert nodes[7] == [1, 2, 3]
    assert nodes[12] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "table", ["kind='beer',fraction=0.2,gamma=0.5", "kind='power_gossip'", "kind='noloco'"]
)
def test_algorithms_of_equal_rounds_are_refused(table: str) -> None:
    experiment = jwins_package.load("digits", [f"sharing={{{table}}}", "run.mode=async", "nodes.count=8"])
    with pytest.raises(
        ConfigError, match=r"run.mode = 'async': \w+ needs updates of the same round; take another"
    ):
        assemble(experiment)


def test_a_frame_beyond_the_largest_staleness_is_not_merged() -> None:
    """The slow node completes one round in five, so with a bound of 3 it stays apart."""

    def distance(largest: int) -> float:
        row = evals(asynchronous(staleness=Staleness(largest), compute=slow(), rounds=40).run())[-1]
        assert row.consensus_distance is not None
        return row.consensus_distance

    assert distance(3) > 1.5 * distance(4)


def test_the_weight_of_a_stale_frame_falls_with_the_power() -> None:
    assert Staleness(16, power=1.0).factor(0) == 1.0
    assert Staleness(16, power=1.0).factor(3) == 0.25


def test_several_node_groups_give_the_same_bits() -> None:
    one, two = (asynchronous(8, groups=groups, compute=slow(8), threads=2).run() for groups in (1, 2))
    assert end(one).sha256 == end(two).sha256
    assert evals(one) == evals(two)


def test_a_run_interrupted_in_its_last_round_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = asynchronous(compute=slow()).run()
    reached: list[int] = []
    first = asynchronous(
        compute=slow(),
        folder=tmp_path,
        stop=lambda: 11 in reached,
        on_progress=lambda p: reached.append(p.round),
    )
    assert first.run().status == "interrupted"
    resumed = asynchronous(compute=slow(), folder=tmp_path).run(resume=True)
    assert end(resumed).sha256 == end(whole).sha256
    assert evals(resumed) == evals(whole)


def wander(self: LoopTrainer, worker: int, node: int, round: int, indices: Any) -> float:
    """Go some way in place of training, which takes most of the time of a run."""
    vector = self._store.rows[self._store.row(node)]
    vector += torch.from_numpy(np.random.default_rng([node, round]).normal(0.0, 0.1, len(vector)).astype("f4"))
    return 1.0


@pytest.mark.parametrize(
    "seeds",
    [range(20), *(pytest.param(range(i, i + 245), marks=pytest.mark.slow) for i in range(20, 1000, 245))],
    ids=lambda seeds: f"from-{seeds[0]}",
)
def test_replicas_agree_under_any_schedule_of_delays(seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end each replica is, by its hash, one that its owner had; nothing waits for ever."""
    monkeypatch.setattr(LoopTrainer, "train", wander)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        script = Faults()
        for _ in range(rng.integers(6)):
            sender, at = int(rng.integers(5)), int(rng.integers(10))
            drops = rng.random() < 0.4
            script = script.drop(sender, at) if drops else script.delay(sender, at, float(rng.exponential(0.2)))
        if rng.random() < 0.4:
            script = script.crash(1, int(rng.integers(1, 5))).rejoin(1, int(rng.integers(6, 10)))
        driver = asynchronous(
            5,
            sharing=(closed_loop, lambda: choco(0.5, 0.5), lambda: closed_loop(history=0))[seed % 3](),
            topology=Regular(num_nodes=5, seed=seed, degree=4),
            compute=Compute(10.0, spread=float(rng.uniform(0, 1.5)), jitter=float(rng.uniform(0, 1.0))),
            links=Links(10.0, latency_ms=float(rng.choice([0.0, 1.0, 20.0, 200.0]))),
            faults=script,
            eval_at=(),
            rounds=10,
        )
        outcome = driver.run()
        assert outcome.status == "finished", seed
        assert not outcome.refused, seed
        for node in range(5):
            for peer, replica in state_of(driver, node).replicas.items():
                owner = state_of(driver, peer)
                if replica.round == owner.shared:
                    assert torch.equal(replica.x_hat, owner.x_hat), (seed, node, peer)


def test_a_short_frame_does_not_overtake_a_long_one_to_the_same_receiver() -> None:
    queue = EventQueue()
    network = SimulatedNetwork(Links(1.0, latency_ms=1.0), 3, queue, in_order=True)
    for number, (size, to) in enumerate([(1000, 1), (10, 1), (10, 2)]):
        network.send(0.001 * number, Envelope(number, 0, Packed(bytes(size), 0, 0)), (to,), {})
    arrived = []
    while queue:
        for at, item in queue.pop_window(0.0):
            if isinstance(item, TransferDone):
                network.advance(item, at)
            else:
                assert isinstance(item.event, MessageArrived)
                arrived.append(item.event.envelope.number)
    assert arrived == [2, 0, 1]


@pytest.mark.parametrize("sharing", [full(), choco(0.5, 0.5), jwins()], ids=lambda one: type(one).__name__)
def test_a_node_that_takes_a_model_over_shares_nothing_of_its_own(sharing: Sharing[Any]) -> None:
    node = asynchronous(2, sharing=sharing, topology=FullyConnected(2, 1)).groups[0].machine(0)
    own = node.params
    node.start(0.0)
    node.handle(Trained(0, own + 1.0), 1.0)
    node.handle(Rejoin(5, params=own + 10.0), 2.0)
    assert torch.equal(node.model, own + 10.0)
    assert node.handle(PeerUp(1, 5), 2.0) == []
    node.handle(Trained(5, own + 11.0), 3.0)
    assert torch.equal(node.params, own + 11.0)


def test_a_change_is_weighed_before_it_is_shared() -> None:
    """Two nodes train alike; one counts half, so their mean moves by three quarters."""
    options: dict[str, Any] = {"topology": FullyConnected(2, 1), "rounds": 1, "sharing": full()}
    half = simulator(2, change_factor={1: 0.5}, **options)
    whole = simulator(2, **options)
    start = trainer().initial()
    moved = [driver.run().params for driver in (whole, half)]
    own = trainer(2)
    own.train({0: 0, 1: 0})
    first, second = (own.row(node).clone() - start for node in range(2))
    for params, expected in zip(moved, (first + second, first + 0.5 * second), strict=True):
        assert params is not None
        assert torch.allclose(params[0], start + expected / 2, atol=1e-6)
