"""The virtual clock against closed forms; no stopwatch is read."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from worlds import end, evals, simulator

from jwins.engines.node_group import Envelope, NodeGroup, ScheduledEvent, TrainingDone
from jwins.engines.simulator import Compute, Faults, Links
from jwins.engines.simulator.barrier import Members
from jwins.engines.simulator.fault_script import FrameFault
from jwins.engines.simulator.network import Flow, SimulatedNetwork, SimulatedUplink
from jwins.engines.simulator.queue import EventQueue, NodeEvent, TransferDone
from jwins.errors import ConfigError
from jwins.sharing import FixedCutoff, jwins
from jwins.topology import Regular, Ring, Star
from jwins.training.stacked import StackedTrainer
from jwins.training.trainer import Trainer
from jwins.wire import Packed


def frame_bytes() -> int:
    """Length of a full-sharing frame in codec raw; the same in every round."""
    traffic = simulator(2, rounds=1).run().traffic
    assert len(traffic) == 2
    assert traffic[0].bytes.total == traffic[1].bytes.total
    return traffic[0].bytes.total


def test_doubling_the_uplink_halves_the_sending_time() -> None:
    compute_s = 2 * 0.010
    sending = []
    for mbps in (0.5, 1.0, 2.0):
        outcome = simulator(2, rounds=1, links=Links(mbps, latency_ms=0.0), compute=Compute(10.0)).run()
        sending.append(evals(outcome)[-1].time_s - compute_s)
    assert sending[0] == pytest.approx(frame_bytes() * 8 / 0.5e6, rel=1e-9)
    assert sending[0] / sending[1] == pytest.approx(2.0, rel=1e-9)
    assert sending[1] / sending[2] == pytest.approx(2.0, rel=1e-9)


@pytest.mark.parametrize("topology", [Ring(num_nodes=6, seed=1), Star(num_nodes=6, seed=1)])
def test_rounds_follow_the_closed_recurrence(topology: Ring | Star) -> None:
    """A node begins round r+1 when it and all of its neighbours have trained, and their frames are here.

    start_i(r+1) = max(start_i(r) + c_i, max_j start_j(r) + c_j + deg_j * 8 B / u_j + latency)
    """
    uplinks = (1.0, 2.0, 4.0, 8.0, 3.0, 5.0)
    steps_ms = (10.0, 14.0, 8.0, 30.0, 11.0, 9.0)
    rounds, latency_s, size = 8, 0.005, frame_bytes()
    outcome = simulator(
        6, topology=topology, rounds=rounds, links=Links(uplinks, latency_s * 1e3), compute=Compute(steps_ms)
    ).run()

    graph = topology.at(0)
    start = [0.0] * 6
    expected = [0.0]
    for _ in range(rounds):
        trained = [start[i] + 2 * steps_ms[i] * 1e-3 for i in range(6)]
        arrived = [
            trained[i] + len(graph.recipients[i]) * size * 8 / (uplinks[i] * 1e6) + latency_s for i in range(6)
        ]
        start = [max(trained[i], *(arrived[j] for j in graph.senders[i])) for i in range(6)]
        expected.append(max(start))
    assert [row.time_s for row in evals(outcome)] == pytest.approx(expected, rel=1e-12)


def test_an_uplink_is_shared_fairly_by_transfers_that_come_and_go() -> None:
    """100 bits from 0 s and 100 bits from 5 s at 10 bit/s: the first has 50 left when it begins to share."""
    envelope = Envelope(1, 0, Packed(b"", 0, 0))
    uplink = SimulatedUplink(rate=10.0)
    uplink.add(0.0, 100, 1, envelope, 0.0, False)
    assert uplink.next_time() == 10.0
    uplink.add(5.0, 100, 2, envelope, 0.0, False)
    assert uplink.next_time() == 15.0
    first: list[Flow] = uplink.pop(15.0)
    assert [flow.to for flow in first] == [1]
    assert uplink.next_time() == 20.0
    assert [flow.to for flow in uplink.pop(20.0)] == [2]
    assert not uplink.flows


def test_in_turn_a_transfer_waits_for_those_before_it() -> None:
    """100 bits from 0 s, 50 bits from 5 s and 10 bits from 30 s at 10 bit/s: through at 10, 15 and 31 s."""
    envelope = Envelope(1, 0, Packed(b"", 0, 0))
    uplink = SimulatedUplink(rate=10.0, in_turn=True)
    uplink.add(0.0, 100, 1, envelope, 0.0, False)
    uplink.add(5.0, 50, 2, envelope, 0.0, False)
    restored = SimulatedUplink(rate=10.0, in_turn=True)
    restored.restore(uplink.snapshot())
    for either in (uplink, restored):
        assert either.next_time() == 10.0
        assert [flow.to for flow in either.pop(10.0)] == [1]
        assert either.next_time() == 15.0
        assert [flow.to for flow in either.pop(15.0)] == [2]
        either.add(30.0, 10, 3, envelope, 0.0, False)
        assert either.next_time() == 31.0


def test_in_turn_a_round_of_equal_frames_is_as_long_and_one_of_unequal_frames_shorter() -> None:
    together, in_turn = (Links(0.5, latency_ms=1.0, sending=sending) for sending in ("together", "in_turn"))

    def seconds(links: Links, **changes: Any) -> tuple[float, Any]:
        outcome = simulator(8, links=links, topology=Regular(num_nodes=8, seed=1, degree=4), **changes).run()
        return end(outcome).time_s, outcome.params

    assert seconds(in_turn)[0] == pytest.approx(seconds(together)[0], rel=1e-9)
    (shorter, params), (longer, same) = (
        seconds(links, sharing=jwins(), rounds=20) for links in (in_turn, together)
    )
    assert shorter < 0.95 * longer
    assert all(torch.equal(params[i], same[i]) for i in range(8))


def test_fewer_bytes_take_less_virtual_time() -> None:
    slow = Links(uplink_mbps=0.1, latency_ms=1.0)
    full = simulator(4, links=slow, train={"task": None}).run()
    sparse = simulator(4, sharing=jwins(FixedCutoff(0.1)), links=slow).run()
    assert end(sparse).time_s < 0.6 * end(full).time_s


def test_compute_factors_are_repeatable_and_bounded() -> None:
    compute = Compute(step_ms=10.0, spread=2.0, jitter=2.0)
    drawn = [compute.seconds(1, node, r, 3) for node in range(20) for r in range(20)]
    assert drawn == [compute.seconds(1, node, r, 3) for node in range(20) for r in range(20)]
    assert min(drawn) >= compute.min_seconds(3)
    assert max(drawn) <= 0.030 * 64
    assert len(set(drawn)) > 200
    still = Compute(step_ms=10.0, spread=0.5)
    assert still.seconds(1, 3, 0, 3) == still.seconds(1, 3, 9, 3) != still.seconds(1, 4, 0, 3)


def test_looking_ahead_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handling a window of events at once gives what handling them one by one gives."""

    def run(one_by_one: bool, threads: int) -> tuple[str, list[object]]:
        sim = simulator(
            8,
            sharing=jwins(),
            topology=Regular(num_nodes=8, seed=3, degree=3, dynamic=True),
            rounds=10,
            threads=threads,
            codec="pco",
            compute=Compute(10.0, spread=0.3, jitter=0.3),
        )
        if one_by_one:
            sim.window_s = 0.0
        else:
            assert sim.window_s > 0.0
        outcome = sim.run()
        return end(outcome).sha256, [*evals(outcome), outcome.traffic]

    for limit in ("SERIAL_BELOW", "ENCODE_APART_FROM", "DECODE_APART_FROM"):
        monkeypatch.setattr(f"jwins.engines.node_group.{limit}", 0)
    reference = run(one_by_one=True, threads=1)
    assert run(one_by_one=False, threads=1) == reference
    assert run(one_by_one=False, threads=3) == reference


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Links(0.0), "links.uplink_mbps = 0.0"),
        (lambda: Links(1.0, -1.0), "links.latency_ms = -1.0"),
        (lambda: Compute(0.0), "compute.step_ms = 0.0"),
        (lambda: Compute(1.0, spread=3.0), "compute.spread = 3.0"),
        (
            lambda: simulator(4, links=Links((1.0, 2.0))),
            "links.uplink_mbps = [1.0, 2.0]: 2 numbers for 4 nodes",
        ),
        (lambda: simulator(4, topology=Ring(num_nodes=5, seed=1)), "topology = 5"),
    ],
)
def test_impossible_worlds_are_refused(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build()  # type: ignore[operator]


def test_who_is_still_missing_is_not_looked_up_for_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """With N nodes that would be N * N steps for each evaluation and each checkpoint."""
    looked_up: list[int] = []
    real = Members.expected

    def expected(self: Members, round: int) -> set[int]:
        looked_up.append(round)
        return real(self, round)

    monkeypatch.setattr(Members, "expected", expected)
    assert simulator(30, rounds=4, checkpoint_every=2).run().status == "finished"
    assert sorted(looked_up) == [0, 1, 2, 2, 3, 4, 4]


def test_progress_is_that_of_the_slowest_live_node() -> None:
    faults = Faults().crash(node=1, round=2).rejoin(node=1, round=5)
    sim = simulator(6, rounds=8, faults=faults)
    seen: list[int] = []
    sim.on_progress = lambda progress: seen.append(
        progress.round
        - min((done for node, done in enumerate(sim._rounds) if node not in sim._members.down), default=8)
    )
    assert sim.run().status == "finished"
    assert len(seen) > 20
    assert set(seen) == {0}


def test_progress_counts_a_message_once_for_each_receiver() -> None:
    seen: list[int] = []
    sim = simulator(5, topology=Star(num_nodes=5, seed=1), rounds=2)
    sim.on_progress = lambda progress: seen.append(progress.bytes_total)
    outcome = sim.run()
    assert seen[-1] == sum(edge.bytes.total for edge in outcome.traffic) > 0


@pytest.mark.parametrize(("given", "within"), [(30, 60), (5000, 5000), (0, 0)])
def test_cycles_are_looked_for_as_seldom_as_many_nodes_need(given: int, within: int) -> None:
    """And as often as before afterwards, be it after a failure."""
    seen: set[int] = set()

    def look(progress: object) -> None:
        seen.add(gc.get_threshold()[0])
        raise ZeroDivisionError

    sim = simulator(6, on_progress=look)
    before = gc.get_threshold()
    gc.set_threshold(given, *before[1:])
    try:
        with pytest.raises(ZeroDivisionError):
            sim.run()
        assert seen == {within}
        assert gc.get_threshold() == (given, *before[1:])
    finally:
        gc.set_threshold(*before)


def test_a_round_leaves_no_cycles_behind() -> None:
    found: list[int] = []
    sim = simulator(8, rounds=6, codec="pco", eval_at=(), train={"batching": "stacked"})
    sim.on_progress = lambda progress: found.append(gc.collect())
    sim.run()
    assert set(found[len(found) // 2 :]) == {0}


def test_only_the_last_word_about_an_uplink_is_foreseen() -> None:
    """A frame to many neighbours begins as many transfers, and the next of them ends once."""
    queue = EventQueue()
    network = SimulatedNetwork(Links(uplink_mbps=8.0), 9, queue)
    network.send(1.0, Envelope(1, 0, Packed(bytes(1000), 0, 0)), range(1, 9), {3: FrameFault(dropped=True)})
    ((at, item),) = queue.pop_window(0.0)
    assert (at, item) == (1.008, TransferDone(0, 8))
    network.advance(TransferDone(0, 7), at)
    assert not queue
    network.advance(TransferDone(0, 8), at)
    assert [item.node for item in queue.items() if isinstance(item, NodeEvent)] == [1, 2, 4, 5, 6, 7, 8]


def test_a_stack_trains_when_the_training_of_one_of_its_nodes_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later than together with other stacks, with more nodes at once, and with the same results."""

    def run(groups: int = 1) -> tuple[int, str, list[object]]:
        trained: list[set[int]] = []
        real, handle = StackedTrainer.train, NodeGroup.handle

        def train(
            self: StackedTrainer, worker: int, number: int, rounds: Mapping[int, int], indices: Any
        ) -> Any:
            trained.append(set(rounds))
            return real(self, worker, number, rounds, indices)

        def look(self: NodeGroup, due: Sequence[ScheduledEvent], train: Mapping[int, int] | None = None) -> Any:
            before = len(trained)
            found = handle(self, due, train)
            over = {item.node for item in due if isinstance(item.event, TrainingDone)}
            assert all(not nodes.isdisjoint(over) for nodes in trained[before:]) or together
            return found

        with monkeypatch.context() as patched:
            patched.setattr(StackedTrainer, "train", train)
            patched.setattr(NodeGroup, "handle", look)
            sim = simulator(
                12,
                groups=groups,
                sharing=jwins(),
                topology=Regular(num_nodes=12, seed=3, degree=3),
                rounds=8,
                train={"batching": "stacked", "chunk": 3},
                compute=Compute(10.0, spread=0.3, jitter=0.3),
            )
            outcome = sim.run()
        assert sum(map(len, trained)) == 12 * 8
        return len(trained), end(outcome).sha256, [*evals(outcome), outcome.traffic]

    together = False
    few, *results = run()
    assert run(groups=2)[1:] == tuple(results)
    together = True
    monkeypatch.setattr(Trainer, "train_batch_of", lambda self, node: 0)
    many, *others = run()
    assert others == results
    assert few < many


@pytest.mark.parametrize("sending", ["together", "in_turn"])
def test_what_is_through_before_the_next_frame_leaves_it_the_uplink(sending: str) -> None:
    """Though it is handled later: a window of events may hold both."""
    queue = EventQueue()
    network = SimulatedNetwork(Links(8.0, 1.0, sending), 2, queue)  # type: ignore[arg-type]
    network.send(1.0, Envelope(1, 0, Packed(bytes(1000), 0, 0)), [1], {})
    network.send(1.5, Envelope(2, 0, Packed(bytes(2000), 0, 0)), [1], {})
    times = []
    while queue:
        for at, item in queue.pop_window(0.0):
            if isinstance(item, TransferDone):
                network.advance(item, at)
            else:
                times.append(at)
    assert times == pytest.approx([1.002, 1.503])
