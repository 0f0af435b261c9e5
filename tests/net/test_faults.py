"""Nodes on the wall clock when things go wrong. Every run ends, and says what it did without."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from members import roster_of
from wires import End, Killed, Running, Wires, World, accuracy
from worlds import DIGEST, Lines

from frames import pack
from jwins.errors import CodecError, ConfigError
from jwins.net.bootstrap import PROVIDE_EVERY, state_wire
from jwins.net.driver import NodeOutcome, RealTimeDriver
from jwins.net.index_map import IndexMap
from jwins.net.limits import Limits
from jwins.net.neighbour_timeout import SUSPECT_AFTER, NeighbourTimeout
from jwins.net.peer_session import State
from jwins.net.transport import TlsTransport
from jwins.net.transport_interface import Connected
from jwins.node import MAX_ROUNDS_AHEAD
from jwins.run_folder import atomic
from jwins.run_folder.rows import EvalRow
from jwins.sharing import choco, full, jwins
from jwins.sharing.update import Update
from jwins.topology import Regular, Ring
from jwins.wire.frame import Bye, Frame, Hello, StateRequest

ALGORITHMS = {"full": full(), "jwins": jwins(), "choco": choco(0.3, 0.5)}


def end_of(driver: RealTimeDriver) -> End:
    assert isinstance(driver.transport, End)
    return driver.transport


@pytest.mark.parametrize("sharing", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("every", [1, 4])
def test_killed_and_restarted_within_the_timeout_of_the_others_nothing_changes(
    sharing: Any, every: int, wires: Wires, tmp_path: Path
) -> None:
    world = World(4, sharing, rounds=12, checkpoint_every=every)
    expected = world.simulate()
    drivers = world.drivers(wires, tmp_path)
    again = [world.driver(2, wires, tmp_path / "2") for _ in range(3)]
    running = Running()
    for node, driver in enumerate(drivers):
        running.start(node, driver)
    for at, driver in zip((5, 6, 9), again, strict=True):
        previous = drivers[2]
        running.wait_until(lambda p=previous, at=at: p.round >= at, f"round {at}")  # type: ignore[misc]
        end_of(previous).kill()
        running.join(2)
        assert isinstance(running.failures.pop(2), Killed)
        drivers[2] = driver
        running.start(2, driver, resume=True)
    for node, outcome in running.join_all().items():
        assert outcome.status == "finished"
        assert torch.equal(outcome.params, expected.params[node]), f"node {node}"
        assert not any(outcome.timed_out.values())


def test_a_neighbour_that_reconnected_may_still_repeat_older_rounds(wires: Wires, tmp_path: Path) -> None:
    world = World(4, jwins(), rounds=12, checkpoint_every=50)
    expected = world.simulate()
    drivers = world.drivers(wires, tmp_path)
    again = world.driver(1, wires, tmp_path / "1")
    running = Running()
    for node, driver in enumerate(drivers):
        running.start(node, driver)
    running.wait_until(lambda: drivers[1].round >= 4, "round 4")
    wires.cut([(0, 1)])
    wires.mend()  # both say in which round they are, and that is not the one of a checkpoint
    at = drivers[1].round
    running.wait_until(lambda: drivers[1].round > at + 1, "they are connected again")
    end_of(drivers[1]).kill()
    running.join(1)
    del running.failures[1]
    running.start(1, again)
    for node, outcome in running.join_all().items():
        assert torch.equal(outcome.params, expected.params[node]), f"node {node}"


@pytest.mark.parametrize("every", [2, 3])
def test_killed_before_the_end_is_written_a_node_ends_when_it_is_started_again(
    every: int, wires: Wires, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(3, jwins(), rounds=4, checkpoint_every=every)
    expected = world.simulate()
    drivers = world.drivers(wires, tmp_path)
    again = world.driver(2, wires, tmp_path / "2")

    def killed(*_: object) -> None:
        end_of(drivers[2]).kill()
        raise Killed

    monkeypatch.setattr(drivers[2].recorder, "finish", killed)
    running = Running()
    for node, driver in enumerate(drivers):
        running.start(node, driver)
    running.join(2)
    assert isinstance(running.failures.pop(2), Killed)
    running.start(2, again, resume=True)
    for node, outcome in running.join_all().items():
        assert (outcome.status, outcome.round) == ("finished", 4)
        assert torch.equal(outcome.params, expected.params[node]), f"node {node}"
        assert not any(outcome.timed_out.values())


@pytest.mark.parametrize(
    "sharing",
    [
        pytest.param(sharing, id=name, marks=() if name == "jwins" else pytest.mark.slow)
        for name, sharing in ALGORITHMS.items()
    ],
)
def test_one_and_three_of_eight_are_killed_and_come_back_late(
    sharing: Any, wires: Wires, tmp_path: Path
) -> None:
    world = World(
        8,
        sharing,
        Regular(num_nodes=8, seed=1, degree=5),
        rounds=60,
        checkpoint_every=3,
        timeout_s=0.3,
        eval_at=frozenset({0, 60}),
    )
    undisturbed = world.simulate()
    drivers = world.drivers(wires, tmp_path)
    again = {node: world.driver(node, wires, tmp_path / str(node)) for node in (1, 4, 6)}
    running = Running()
    for node, driver in enumerate(drivers):
        running.start(node, driver)
    running.wait_until(lambda: drivers[0].round >= 6, "round 6")
    for node in again:
        end_of(drivers[node]).kill()
        running.join(node)
        del running.failures[node]
    running.wait_until(lambda: drivers[0].round >= 20, "the others go on")
    for node, driver in again.items():
        running.start(node, driver, resume=True)
    outcomes = running.join_all()
    assert all(outcome.status == "finished" and outcome.round == 60 for outcome in outcomes.values())
    assert any(outcomes[node].timed_out[peer] for node in (0, 2, 3, 5, 7) for peer in again)
    last = [row for row in undisturbed.rows if isinstance(row, EvalRow)][-1]
    mean = sum(map(accuracy, outcomes.values())) / 8
    assert mean >= last.metrics["accuracy"].mean - 0.03


def test_a_partition_into_halves_heals(wires: Wires) -> None:
    world = World(6, choco(0.3, 0.5), Ring(num_nodes=6, seed=1), rounds=60, timeout_s=0.3)
    halves = [(a, b) for a in (0, 1, 2) for b in (3, 4, 5)]
    drivers = world.drivers(wires)
    running = Running()
    for node, driver in enumerate(drivers):
        running.start(node, driver)
    running.wait_until(lambda: drivers[0].round >= 5, "round 5")
    wires.cut(halves)
    running.wait_until(lambda: bool(drivers[0].timed_out[5] and drivers[3].timed_out[2]), "each half goes on")
    wires.mend()
    outcomes = running.join_all()
    assert all(outcome.status == "finished" for outcome in outcomes.values())
    assert all(outcome.timed_out[peer] < 30 for outcome in outcomes.values() for peer in outcome.timed_out)
    for driver in drivers:
        assert not any(
            not known.is_awaited and known.state is not State.LEFT for known in driver.peers.values()
        )


def test_a_fifth_of_all_frames_comes_too_late(wires: Wires) -> None:
    world = World(4, jwins(), rounds=15, timeout_s=0.1)
    undisturbed = world.simulate()
    draws = random.Random(3)
    wires.fate = lambda sender, receiver, data: 0.25 if len(data) > 300 and draws.random() < 0.2 else 0.0
    drivers = world.drivers(wires)
    running = Running()
    for node, driver in enumerate(drivers):
        running.start(node, driver)
    outcomes = running.join_all()
    assert all(outcome.status == "finished" for outcome in outcomes.values())
    last = [row for row in undisturbed.rows if isinstance(row, EvalRow)][-1]
    mean = sum(map(accuracy, outcomes.values())) / 4
    assert mean >= last.metrics["accuracy"].mean - 0.03


def test_lost_frames_are_not_waited_for_forever(wires: Wires) -> None:
    world = World(3, choco(0.3, 0.5), rounds=10, timeout_s=0.1)
    draws = random.Random(3)
    wires.fate = lambda sender, receiver, data: None if len(data) > 300 and draws.random() < 0.2 else 0.0
    drivers = world.drivers(wires)
    running = Running()
    for node, driver in enumerate(drivers):
        running.start(node, driver)
    outcomes = running.join_all()
    assert all(outcome.status == "finished" for outcome in outcomes.values())


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    wires: Wires, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(3, rounds=6)
    expected = world.simulate()
    drivers = world.drivers(wires, tmp_path)
    real = atomic.write_atomically

    def full_disk(path: Path, data: bytes) -> None:
        if "checkpoints" in path.parts and "1" in path.parts:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr("jwins.run_folder.checkpoint.write_atomically", full_disk)
    running = Running()
    for node, driver in enumerate(drivers):
        running.start(node, driver)
    for node, outcome in running.join_all().items():
        assert torch.equal(outcome.params, expected.params[node])
    assert "No space left" in drivers[1].journal.last_error
    assert drivers[0].journal.last_error == ""


def test_a_peer_that_stops_reading_is_not_waited_for_and_fills_no_memory(wires: Wires, tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 3)
    large = {"task": Lines(hidden=20_000)}
    world = World(3, rounds=24, timeout_s=1.5, checkpoint_every=0, eval_at=frozenset(), train=large)
    most = 4 << 20
    transports = [
        TlsTransport(
            roster,
            node,
            tmp_path / f"{roster[node].name}.key",
            limits=Limits(queue_bytes=most, undelivered_bytes=1 if node == 0 else 16 << 20),
        )
        for node in range(3)
    ]
    drivers = [world.driver(node, wires, transport=IndexMap(transports[node], roster.ids)) for node in (1, 2)]
    silent = transports[0]
    silent.start()
    running = Running()
    for driver in drivers:
        running.start(driver.node, driver)
    hello = Hello(0, 0, drivers[0].session.handshake.dim, "raw", {}, drivers[0].session.handshake.x0, 0)
    greeted: set[int] = set()
    while greeted != {1, 2}:  # from then on, nothing that it is sent is taken
        event = silent.poll(30.0)
        assert event is not None
        if isinstance(event, Connected):
            silent.send(
                event.peer, pack(hello, world.rules(drivers[0].group.trainer.layout).wire.codec, DIGEST).data
            )
            greeted.add(event.peer)
    running.wait_until(lambda: min(driver.round for driver in drivers) >= 20, "20 rounds")
    queued = [transport.report()[0].queued_bytes for transport in transports[1:]]
    outcomes = running.join_all()
    silent.close(0.0)
    assert all(outcome.status == "finished" for outcome in outcomes.values())
    assert all(
        outcome.timed_out[0] >= 3 and not outcome.timed_out[3 - node] for node, outcome in outcomes.items()
    )
    assert max(queued) <= most


class Hostile:
    """A member of the roster that says what it likes, as node 0 of a ring of three."""

    def __init__(self, wires: Wires, world: World) -> None:
        self.wires, self.world = wires, world
        self.drivers = world.drivers(wires)[1:]
        victim = self.drivers[0]
        self.x0 = victim.session.handshake.x0
        self.dim = victim.session.handshake.dim
        self.codec = victim.rules.wire.codec
        self.digest = victim.rules.wire.digest
        self.running = Running()

    def say(self, message: Any, digest: bytes | None = None, to: int = 1) -> None:
        self.wires.inject(0, to, pack(message, self.codec, digest or self.digest).data)

    def hello(self, to: int = 1, **changes: Any) -> None:
        hello = Hello(0, 0, self.dim, self.codec.name, {}, self.x0)
        at = changes.get("round", 0)
        self.say(dataclasses.replace(hello, **{"resend_from": at, **changes}), to=to)

    def wait_until_read(self) -> None:
        """Wait until node 1 has read all messages of the hostile member."""
        known = self.drivers[0].peers[0]
        refused = known.refused
        self.wires.inject(0, 1, b"garbage")  # comes last
        self.running.wait_until(lambda: known.refused > refused, "all messages are read")

    def frame(self, round: int, value: float = 0.0, **changes: Any) -> Frame:
        return Frame(0, round, Update(self.dim, None, torch.full((self.dim,), value)), **changes)

    def run(self) -> dict[int, NodeOutcome]:
        for node, driver in enumerate(self.drivers, start=1):
            self.running.start(node, driver)
        self.running.wait_until(lambda: 2 in self.wires._ends and 1 in self.wires._ends, "both are there")
        return {}

    def end(self) -> None:
        """Interrupt both."""
        for driver in self.drivers:
            driver._stop = lambda: True
        self.running.join_all()


ATTACKS: dict[str, Any] = {
    "garbage": lambda h: h.wires.inject(0, 1, b"garbage" * 20),
    "empty": lambda h: h.wires.inject(0, 1, b""),
    "another experiment": lambda h: h.say(h.frame(0), digest=b"another!"),
    "not a number": lambda h: h.say(h.frame(0, float("nan"))),
    "infinite": lambda h: h.say(h.frame(0, float("inf"))),
    "in another's name": lambda h: h.say(dataclasses.replace(h.frame(0), sender=2)),
    "far ahead": lambda h: h.say(h.frame(MAX_ROUNDS_AHEAD + 5)),
    "beyond the end": lambda h: h.say(h.frame(10**6)),
    "replayed": lambda h: [h.say(h.frame(1)), h.say(h.frame(1))],
    "hello in another's name": lambda h: h.hello(sender=2),
    "a bye in another's name": lambda h: h.say(Bye(2, 0, "gone")),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_bad_frames_are_refused_and_counted_and_never_end_a_run(attack: Any, wires: Wires) -> None:
    world = World(3, rounds=6, timeout_s=0.2, eval_at=frozenset())
    hostile = Hostile(wires, world)
    wires.join(End(wires, 0))
    hostile.run()
    hostile.hello()
    hostile.hello(to=2)
    attack(hostile)
    outcomes = hostile.running.join_all()
    assert outcomes[1].status == outcomes[2].status == "finished"
    assert outcomes[1].refused[0] >= 1
    assert torch.isfinite(outcomes[1].params).all()
    assert outcomes[1].refused[2] == 0


def test_refused_frames_do_not_readmit_a_suspect_peer(wires: Wires) -> None:
    world = World(3, rounds=80, timeout_s=0.2, eval_at=frozenset())
    hostile = Hostile(wires, world)
    wires.join(End(wires, 0))
    wires.fate = lambda sender, receiver, data: 0.01  # so that the run is under way when the frame arrives
    hostile.run()
    hostile.hello()
    hostile.hello(to=2)
    victim = hostile.drivers[0]
    hostile.running.wait_until(lambda: not victim.peers[0].is_awaited, "it is suspect")
    hostile.say(hostile.frame(victim.round + 20, float("nan")))
    outcomes = hostile.running.join_all()
    assert outcomes[1].refused[0] == 1
    assert outcomes[1].timed_out[0] == SUSPECT_AFTER
    assert not victim.peers[0].is_awaited


def test_repeated_hellos_are_readmitted_at_growing_intervals(wires: Wires) -> None:
    world = World(3, rounds=40, timeout_s=0.2, eval_at=frozenset())
    hostile = Hostile(wires, world)
    wires.join(End(wires, 0))
    hostile.run()
    hostile.hello()
    hostile.hello(to=2)
    victim = hostile.drivers[0]
    known = victim.peers[0]
    said_in: set[int] = set()
    wires.fate = lambda sender, receiver, data: 0.002  # so that no round passes unseen

    def over() -> bool:
        if not known.is_awaited and victim.round not in said_in:
            said_in.add(victim.round)
            hostile.hello(round=victim.round)
        return 1 in hostile.running.outcomes

    hostile.running.wait_until(over, "the end", 300.0)
    outcomes = hostile.running.join_all()
    # Let in after round 3, and then 2, 4, 8 and 16 rounds later at least.
    assert 2 * SUSPECT_AFTER <= outcomes[1].timed_out[0] <= 6 * SUSPECT_AFTER
    assert outcomes[1].status == outcomes[2].status == "finished"


def test_a_repeated_hello_is_answered_with_frames_once_in_a_round(wires: Wires) -> None:
    hostile = Hostile(wires, World(3, rounds=40, timeout_s=60.0, eval_at=frozenset()))
    wires.join(End(wires, 0))
    victim = hostile.drivers[0]
    known = victim.peers[0]
    sent: list[int] = []

    def fate(sender: int, receiver: int, data: bytes) -> float:
        if (sender, receiver) == (1, 0) and isinstance(found := victim.rules.wire.unpack(data), Frame):
            sent.append(found.round)
        return 0.0

    wires.fate = fate
    hostile.run()
    hostile.running.wait_until(lambda: 0 in known.buffer.frames, "a frame for it")
    hostile.hello()
    hostile.wait_until_read()
    assert sent == [0]
    for _ in range(50):
        hostile.hello()
    hostile.wait_until_read()
    assert sent == [0, 0]
    hostile.say(hostile.frame(0))  # the round ends, and what was asked for meanwhile is due
    hostile.running.wait_until(lambda: 1 in sent, "the frame of the next round")
    assert sent == [0, 0, 0, 1]
    hostile.end()


def test_a_member_that_asks_again_is_sent_one_model_in_sixteen_rounds(wires: Wires) -> None:
    hostile = Hostile(wires, World(3, rounds=40, timeout_s=60.0, eval_at=frozenset()))
    wires.join(End(wires, 0))
    victim = hostile.drivers[0]
    given: list[int] = []
    models = state_wire(hostile.digest, hostile.dim)

    def fate(sender: int, receiver: int, data: bytes) -> float:
        if (sender, receiver) == (1, 0):
            with contextlib.suppress(CodecError):
                given.append(models.unpack(data).round)
        return 0.0

    def end_of_rounds(first: int, last: int) -> None:
        for at in range(first, last + 1):
            for neighbour in (1, 2):
                hostile.say(hostile.frame(at), to=neighbour)
            hostile.running.wait_until(lambda at=at: victim.round > at, "the next")  # type: ignore[misc]

    def ask(from_round: int) -> None:
        hostile.say(StateRequest(0, from_round))
        hostile.wait_until_read()

    wires.fate = fate
    hostile.run()
    for neighbour in (1, 2):
        hostile.hello(to=neighbour)
    end_of_rounds(0, 0)
    ask(0)
    assert given == [1]
    end_of_rounds(1, 1)
    ask(0)
    wires.cut([(0, 1)])
    wires.mend()
    hostile.hello(round=2)
    ask(0)
    assert given == [1]
    end_of_rounds(2, PROVIDE_EVERY + 2)
    assert given == [1, 1 + PROVIDE_EVERY]
    hostile.end()


def test_neighbours_that_time_out_again_and_again_readmit_each_other(wires: Wires) -> None:
    world = World(3, rounds=400, timeout_s=0.1, eval_at=frozenset())
    drivers = world.drivers(wires)
    first, second = drivers[0].peers[1], drivers[1].peers[0]
    running = Running()
    for node, driver in enumerate(drivers):
        running.start(node, driver)
    running.wait_until(lambda: drivers[0].round >= 3, "round 3")
    wires.fate = lambda sender, receiver, data: (
        None if len(data) > 300 and {sender, receiver} == {0, 1} else 0.005
    )
    for times in (1, 2, 3):  # of each other, they hear only Hello
        running.wait_until(lambda: not (first.is_awaited or second.is_awaited), "they give each other up")
        wires.cut([(0, 1)])
        wires.mend()
        running.wait_until(
            lambda times=times: min(first.backoff, second.backoff) >= 2**times,  # type: ignore[misc]
            "they try again",
        )
    wires.fate = lambda sender, receiver, data: 0.005
    running.wait_until(lambda: first.is_awaited and second.is_awaited, "they are back")
    running.wait_until(lambda: first.backoff == second.backoff == 1, "they are in time again")
    for driver in drivers:
        driver._stop = lambda: True
    running.join_all()


MISFITS = {
    "another length": ({"dim": 7}, "it exchanges 7 parameters"),
    "another codec": ({"codec": "pco"}, "uses the codec pco"),
    "another start": (
        {"x0": b"other", "versions": {"torch": "1.0"}},
        r"initial parameters differ .*'torch': '1.0'",
    ),
}


@pytest.mark.parametrize(("changes", "problem"), MISFITS.values(), ids=MISFITS)
def test_a_peer_of_another_kind_is_named_and_left_out(changes: Any, problem: str, wires: Wires) -> None:
    world = World(3, rounds=4, timeout_s=5.0)
    hostile = Hostile(wires, world)
    wires.join(End(wires, 0))
    hostile.run()
    hostile.hello(**changes)
    wires.inject(0, 2, b"")
    hostile.running.wait_until(lambda: bool(hostile.drivers[0].peers[0].mismatch), "the misfit is seen")
    wires.leave(wires._ends[0])
    for known in hostile.drivers[1].peers.values():
        known.timeout.timeout_s = 0.01
    outcomes = hostile.running.join_all()
    assert outcomes[1].status == "finished"
    import re

    assert re.search(problem, hostile.drivers[0].peers[0].mismatch)


def test_interrupted_and_resumed_nothing_changes(wires: Wires, tmp_path: Path) -> None:
    world = World(3, jwins(), rounds=10, checkpoint_every=4)
    expected = world.simulate()
    asked = False
    first = world.drivers(wires, tmp_path, stop=lambda: asked)
    second = world.drivers(wires, tmp_path)
    running = Running()
    for node, driver in enumerate(first):
        running.start(node, driver)
    running.wait_until(lambda: first[0].round >= 5, "round 5")
    asked = True
    assert {outcome.status for outcome in running.join_all().values()} == {"interrupted"}
    running = Running()
    for node, driver in enumerate(second):
        running.start(node, driver, resume=True)
    for node, outcome in running.join_all().items():
        assert torch.equal(outcome.params, expected.params[node]), f"node {node}"


# --- NeighbourTimeout
# -----------------------------------------------------------------------------------------------


def test_the_timeout_follows_what_a_neighbour_takes_within_bounds() -> None:
    timeout = NeighbourTimeout(2.0)
    assert (timeout.limit_s(), timeout.first_s) == (2.0, 40.0)
    timeout.observe(5.0)
    assert timeout.limit_s() == 15.0
    assert timeout.limit_s([0.1, 0.2, 6.0]) == 2.0, "the others take a twentieth"
    assert timeout.limit_s([3.0]) == 12.0
    timeout.observe(1000.0)
    assert timeout.limit_s() == 40.0, "nobody stretches it for ever"
    for _ in range(64):
        timeout.observe(0.1)
    assert timeout.limit_s() == 2.0, "what is long ago does not count"
    with pytest.raises(ConfigError, match="timeout_s = 0"):
        NeighbourTimeout(0.0)
