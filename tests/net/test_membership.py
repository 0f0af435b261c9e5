"""Members that join, leave and change their certificates while nodes run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from members import member, roster_of
from wires import Running, Wires, World, accuracy

import jwins
from jwins.errors import CodecError, ConfigError, PeerError
from jwins.net.bootstrap import pack_state, state_wire
from jwins.net.certificate import renewed
from jwins.net.driver import RealTimeDriver
from jwins.net.handshake import BOOTSTRAPPED
from jwins.net.journal import Journal
from jwins.net.membership import Change, Membership, check_follows, keep_roster, kept_rosters
from jwins.net.peer_session import BufferedFrame
from jwins.net.roster import Roster, read_roster, write_roster
from jwins.net.roster_versions import RosterVersions
from jwins.net.transport_interface import MessageReceived
from jwins.node import Finished
from jwins.run_folder import traffic
from jwins.run_folder.record import Record
from jwins.sharing import choco, closed_loop, full, stateless
from jwins.sharing import jwins as jwins_sharing
from jwins.topology import FullyConnected, Regular, Ring
from jwins.wire.frame import Frame, Packed, StateRequest

# --- Graphs -----------------------------------------------------------------------------------------------


def ring_of(places: int) -> RosterVersions:
    return RosterVersions(places, lambda count: Ring(num_nodes=count, seed=1))


def test_in_every_round_those_who_take_part_mix_and_nobody_else() -> None:
    versions = ring_of(6)
    versions.add(0, 0, range(5))
    versions.add(1, 10, (0, 1, 3, 4))
    versions.add(2, 20, (0, 1, 3, 4, 5))
    for at, active in ((0, range(5)), (9, range(5)), (10, (0, 1, 3, 4)), (25, (0, 1, 3, 4, 5))):
        graph = versions.at(at)
        mixing = graph.matrix()
        assert np.array_equal(mixing, mixing.T)
        np.testing.assert_allclose(mixing.sum(axis=0), 1.0)
        for node in range(6):
            neighbours = {*graph.senders[node], *graph.recipients[node]}
            assert neighbours <= set(active) - {node}
            assert len(neighbours) == (2 if node in active else 0)
    assert [versions.at(at).roster_version for at in (9, 10, 19, 20)] == [0, 1, 1, 2]
    assert versions.neighbours(1, 30) == {0, 3}
    assert versions.neighbours(1, 9) == {0, 2, 3}
    assert versions.neighbours(4, 0) == {0, 3, 5}  # also of the first ring, though two more are to come


def test_as_long_as_all_take_part_nothing_is_different() -> None:
    whole = Regular(num_nodes=8, seed=1, degree=4)
    versions = RosterVersions(8, lambda count: whole)
    versions.add(0, 0, range(8))
    assert versions.at(3) is whole.at(3)


def test_a_roster_that_is_taken_up_late_is_of_later_rounds() -> None:
    versions = ring_of(4)
    versions.add(0, 0, range(4))
    versions.add(1, 30, (0, 1, 2))
    versions.add(2, 20, (0, 1))
    assert [versions.at(at).roster_version for at in (19, 20, 30, 40)] == [0, 2, 2, 2]


def test_the_first_roster_that_a_node_knows_is_also_that_of_earlier_rounds() -> None:
    versions = ring_of(4)
    versions.add(2, 20, (0, 1, 2))
    assert [versions.at(at).roster_version for at in (0, 19, 20)] == [2, 2, 2]
    assert len(versions.at(0).senders[0]) == 2
    assert 3 not in versions.at(0).senders[0]


# --- Rosters ----------------------------------------------------------------------------------------------


def test_numbers_stay_whoever_joins_or_leaves(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 3)
    left = roster.without("bob", from_round=10)
    assert (left.ids, left.departed, left.ids_ever) == ((0, 2), (1,), (0, 1, 2))
    dave = member(tmp_path, 3, "dave")
    with pytest.raises(ConfigError, match=r"--id = 1: expected more than 2"):
        left.with_member(dave.model_copy(update={"id": 1}), from_round=20)
    joined = left.with_member(dave, from_round=20)
    assert (joined.ids_ever, joined[3].since_round, joined[0].since_round) == ((0, 1, 2, 3), 20, 0)
    write_roster(joined, tmp_path / "roster.toml")
    assert read_roster(tmp_path / "roster.toml") == joined
    assert joined.digest != left.digest
    with pytest.raises(ConfigError, match="departed = 1: is the id of a current member, too"):
        Roster(members=roster.members, departed=(1,))


def test_what_was_taken_up_is_known_after_a_restart(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 3)
    left = roster.without("bob", from_round=10)
    keep_roster(left, 12, tmp_path / "rosters")
    keep_roster(roster, 0, tmp_path / "rosters")
    assert [(kept.roster_version, kept.from_round) for kept in kept_rosters(tmp_path / "rosters")] == [
        (0, 0),
        (1, 12),
    ]


def restarted(folder: Path, roster: Roster) -> Membership:
    """Alice's membership after a restart, of three members at most."""
    return Membership(
        folder / "roster.toml",
        roster,
        0,
        folder / "alice.key",
        num_nodes=3,
        build=lambda count: FullyConnected(num_nodes=count),
        folder=folder / "rosters",
        journal=Journal("alice"),
    )


def test_after_a_restart_those_who_left_are_lost_once(tmp_path: Path) -> None:
    """The roster was kept at once; that somebody is gone would have been in the next checkpoint."""
    roster = roster_of(tmp_path, 3)
    left = roster.without("bob", from_round=10)
    write_roster(left, tmp_path / "roster.toml")
    for kept in (roster, left):
        keep_roster(kept, kept.from_round, tmp_path / "rosters")
    again = restarted(tmp_path, left)
    assert set(again.topology.at(9).senders[0]) == {1, 2}
    assert again.look(5) == Change(1, 10, frozenset(), frozenset({1}))
    again._look_at = 0.0
    assert again.look(6) is None


def test_after_a_restart_those_who_joined_may_still_ask_for_a_model(tmp_path: Path) -> None:
    """Also if this node took up the roster in an earlier process, or later than others."""
    roster = roster_of(tmp_path, 2).model_copy(update={"places": 3})
    joined = roster.with_member(member(tmp_path, 2, "carol"), from_round=10)
    write_roster(joined, tmp_path / "roster.toml")
    for kept, from_round in ((roster, 0), (joined, 12)):
        keep_roster(kept, from_round, tmp_path / "rosters")
    again = restarted(tmp_path, joined)
    assert again.look(5) == Change(1, 10, frozenset({2}), frozenset())
    again._look_at = 0.0
    assert again.look(6) is None


REFUSED: dict[str, tuple[Callable[[Roster, Path], Roster], str]] = {
    "older": (
        lambda old, _: old.model_copy(update={"roster_version": 0}),
        "roster_version = 0: nodes use roster version 1 already",
    ),
    "without a version of its own": (
        lambda old, _: old.without("carol"),
        "members have changed without a new roster version",
    ),
    "forgets who left": (
        lambda old, _: old.without("carol", from_round=20).model_copy(update={"departed": ()}),
        "ids of former members stay in departed",
    ),
    "another graph": (
        lambda old, _: old.model_copy(update={"seed": 7, "roster_version": 2, "from_round": 20}),
        "a run keeps its topology and seed",
    ),
    "too many": (
        lambda old, folder: old.with_member(member(folder, 3, "dave"), from_round=20),
        r"expected at most 3 with former members \(nodes.count, or places of the roster\)",
    ),
}


@pytest.mark.parametrize(("change", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_running_nodes_cannot_take_up_is_refused(change: Any, problem: str, tmp_path: Path) -> None:
    old = roster_of(tmp_path, 3).without("bob", from_round=10)
    check_follows(old, old.without("carol", from_round=11), 3)
    with pytest.raises(ConfigError, match=problem):
        check_follows(old, change(old, tmp_path), 3)


# --- The driver -------------------------------------------------------------------------------------------

ALGORITHMS = {"full": full(), "jwins": jwins_sharing(), "choco": choco(0.3, 0.5)}


@pytest.mark.parametrize("sharing", ALGORITHMS.values(), ids=ALGORITHMS)
def test_one_leaves_and_another_joins_and_one_hears_of_it_late(sharing: Any, wires: Wires) -> None:
    """Node 4 is there from round 12; node 2 is gone from round 12; node 1 learns both in round 15 or later."""
    topologies = [RosterVersions(5, lambda count: FullyConnected(num_nodes=count, seed=1)) for _ in range(5)]
    for topology in topologies[:4]:
        topology.add(0, 0, (0, 1, 2, 3))
    topologies[4].add(1, 12, (0, 1, 3, 4))
    joined, removed = frozenset({4}), frozenset({2})
    done: set[int] = set()

    def changes(node: int) -> Callable[[int], Change | None]:
        def look(next_round: int) -> Change | None:
            due = next_round > (15 if node == 1 else 5)
            if node in done or not due or (node == 4 or (node == 2 and next_round < 12)):
                return None
            done.add(node)
            from_round = max(12, next_round)
            if node != 2:
                topologies[node].add(1, from_round, (0, 1, 3, 4))
            return Change(1, from_round, joined, removed)

        return look

    drivers = [
        World(5, sharing, topologies[node], rounds=40, timeout_s=0.4, eval_at=frozenset({0, 40})).driver(
            node, wires, changes=changes(node), joins_at=12 if node == 4 else None
        )
        for node in range(5)
    ]
    running = Running()
    for node, driver in enumerate(drivers):
        running.start(node, driver)
    outcomes = running.join_all()
    assert outcomes[2].status == "removed"
    for node in (0, 1, 3, 4):
        assert (outcomes[node].status, outcomes[node].round) == ("finished", 40)
    sent = {(edge.source, edge.target) for outcome in outcomes.values() for edge in outcome.traffic}
    assert {(0, 4), (4, 0), (1, 4), (4, 1)} <= sent


BEGINNERS = {**ALGORITHMS, "closed_loop": closed_loop(step=0.01), "stateless": stateless(step=0.01)}


@pytest.mark.parametrize("sharing", BEGINNERS.values(), ids=BEGINNERS)
def test_a_joiner_begins_with_the_model_of_a_provider_in_the_round_in_which_it_joins(
    sharing: Any, wires: Wires
) -> None:
    """Node 3 asks from the start, and is a member from round 12 on; node 2 is never there."""
    topologies = [RosterVersions(4, lambda count: FullyConnected(num_nodes=count, seed=1)) for _ in range(4)]
    for topology in topologies[:2]:
        topology.add(0, 0, (0, 1))
        topology.add(1, 12, (0, 1, 3))
    topologies[3].add(1, 12, (0, 1, 3))
    worlds = [World(4, sharing, topologies[node], rounds=30, eval_at=frozenset({0, 30})) for node in range(4)]
    drivers = [worlds[node].driver(node, wires) for node in (0, 1)]
    joiner = worlds[3].driver(3, wires, bootstrap_from=[1], joins_at=12)
    initial = joiner.group.parameters(3).clone()
    models = state_wire(joiner.rules.wire.digest, len(initial))
    sent: list[Frame] = []

    def fate(sender: int, receiver: int, data: bytes) -> float:
        with contextlib.suppress(CodecError):
            found = models.unpack(data)
            assert isinstance(found, Frame)
            sent.append(found)
        return 0.01  # so that the request comes before round 12, as a rule

    wires.fate = fate
    for driver in drivers:  # a member by its roster
        driver.peers[3].joined_later, driver.peers[3].joins_at = True, 12
    running = Running()
    for driver in (*drivers, joiner):
        running.start(driver.node, driver)
    outcomes = running.join_all()
    assert [(found.sender, found.round >= 12) for found in sent] == [(1, True)]
    assert not torch.equal(sent[0].update.dense_values(), initial)
    for outcome in outcomes.values():
        assert (outcome.status, outcome.round) == ("finished", 30)
        assert not any(outcome.refused.values())
        assert not any(outcome.timed_out.values())
    least = min(accuracy(outcomes[node]) for node in (0, 1))
    assert accuracy(outcomes[3]) >= least - 0.05


def test_a_provider_whose_connection_breaks_is_asked_again_when_it_is_back(wires: Wires) -> None:
    world = World(2, rounds=8, timeout_s=1.5)
    driver, provider = world.driver(1, wires, bootstrap_from=[0], x0=BOOTSTRAPPED), wires.end(0)
    size = driver.session.handshake.dim
    params = torch.arange(size, dtype=torch.float32) / size
    running = Running()
    provider.start()
    running.start(1, driver)
    questions = 0
    while questions < 2:
        event = provider.poll(30.0)
        assert event is not None, "no question for half a minute"
        if isinstance(event, MessageReceived):
            assert isinstance(driver.rules.wire.unpack(event.data), StateRequest)
            questions += 1
            if questions == 1:
                wires.cut([(0, 1)])
                wires.mend()
    provider.send(1, pack_state(state_wire(driver.rules.wire.digest, size), 0, 7, params).data)
    running.wait_until(lambda: driver.round >= 7, "it begins in the provider's round")
    driver._stop = lambda: True
    running.join_all()


def ends_without_a_model(driver: RealTimeDriver, problem: str) -> None:
    running = Running()
    running.start(driver.node, driver)
    running.join(driver.node)
    failure = running.failures[driver.node]
    assert isinstance(failure, PeerError)
    assert problem in str(failure)


def test_a_provider_that_only_comes_and_goes_is_not_waited_for_for_ever(wires: Wires) -> None:
    driver = World(2, timeout_s=0.05).driver(1, wires, bootstrap_from=[0], names=("alice", "bob"))
    wires.end(0).start()
    over, meanwhile = threading.Event(), []

    def come_and_go() -> None:
        until = time.monotonic() + 20.0
        while not over.wait(0.05) and time.monotonic() < until:
            wires.cut([(0, 1)])
            wires.mend()
        meanwhile.append(over.is_set())

    flapping = threading.Thread(target=come_and_go, daemon=True)
    flapping.start()
    ends_without_a_model(driver, "none of alice sent its model")
    over.set()
    flapping.join(30.0)
    assert meanwhile == [True], "it gave up while the provider still came and went"


def test_a_provider_that_has_ended_says_so(wires: Wires) -> None:
    world = World(2, rounds=2, timeout_s=30.0)
    first = world.driver(0, wires)
    first.session.end = Finished("finished", 2)
    first.peers[1].buffer.frames[0] = BufferedFrame(Packed(b"", 0, 0), "update", sent=True)  # stays for node 1
    wires.join(first.transport)  # type: ignore[arg-type]
    lingering = threading.Thread(target=first._linger, daemon=True)
    lingering.start()
    driver = world.driver(1, wires, bootstrap_from=[0], names=("alice", "bob"))
    ends_without_a_model(driver, "none of alice sent its model: alice ends: finished")
    first._stop = lambda: True
    lingering.join(60.0)


# --- Processes --------------------------------------------------------------------------------------------

ROUNDS = 300
SHARINGS = {
    "jwins": {"kind": "jwins"},
    "choco": {"kind": "choco", "fraction": 0.3, "gamma": 0.5},
}


class Site:
    """Nodes of a small experiment as processes that read one roster."""

    def __init__(self, folder: Path, places: int, members: int, sharing: str) -> None:
        self.folder, self.roster = folder, folder / "roster.toml"
        first = roster_of(folder, members)
        write_roster(first.model_copy(update={"places": places}), self.roster)
        experiment = jwins.load("digits").changed(
            {
                "nodes": {"count": places},
                "task": {"partition": {"kind": "iid"}},
                "topology": {"kind": "fully_connected"},
                "sharing": SHARINGS[sharing],
                "run": {
                    "rounds": ROUNDS,
                    "eval_every": ROUNDS,
                    "checkpoint_every": 20,
                    "threads": 1,
                    "folder": folder / "run",
                },
            }
        )
        (folder / "digits.toml").write_text(experiment.to_toml(folder))
        undisturbed = jwins.simulate(experiment.changed({"run": {"folder": folder / "virtual"}})).record
        self.least = undisturbed.evaluations[-1].metrics["accuracy"].mean - 0.03
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in [entry.name for entry in first.members]:
            self.start(name)

    def start(self, name: str, *options: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "jwins", "node", str(self.folder / "digits.toml"), "--as", name),
                    *("--roster", str(self.roster), "--key", str(self.folder / f"{name}.key")),
                    *("--folder", str(self.folder / "nodes" / name), "--neighbour-timeout", "60"),
                    *options,
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def change(self, work: Callable[[Roster, int], Roster]) -> int:
        """Another roster, some rounds ahead; from which round on."""
        from_round = self.round() + 60
        write_roster(work(read_roster(self.roster), from_round), self.roster)
        return from_round

    def round(self) -> int:
        try:
            found: int = json.loads((self.folder / "nodes" / "alice" / "status.json").read_text())["round"]
        except (OSError, ValueError):
            return 0
        return found

    def until(self, holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
        end = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def end(self) -> None:
        for name, process in self.processes.items():
            assert process.wait(180.0) == 0, f"{name}: {self.said()}"

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        lines = (self.folder / "nodes" / name / "log.jsonl").read_text().splitlines()
        return [found for found in map(json.loads, lines) if found["event"] == event]

    def accuracy(self, name: str) -> float:
        (value,) = Record.read(self.folder / "nodes" / name).evaluations[-1].per_node["accuracy"]
        assert value is not None
        return value

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[[int, int, str], Site]]:
    made: list[Site] = []

    def make(places: int, members: int, sharing: str) -> Site:
        made.append(Site(tmp_path, places, members, sharing))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.slow
@pytest.mark.parametrize(("sharing", "provider"), [("jwins", "bob"), ("choco", None)])
def test_a_member_joins_a_run_under_way(sharing: str, provider: str | None, site: Any, tmp_path: Path) -> None:
    run = site(4, 3, sharing)
    run.until(lambda: run.round() >= 20)
    dave = member(tmp_path, 3, "dave")
    from_round = run.change(lambda roster, at: roster.with_member(dave, from_round=at))
    run.start("dave", *(() if provider is None else ("--bootstrap-from", provider)))
    run.end()
    transfer = run.events("dave", "bootstrapped")
    assert [found["peer"] for found in transfer] == ([] if provider is None else [provider])
    assert all(found["round"] >= from_round for found in transfer)
    for name in ("alice", "bob", "carol"):
        (taken_up,) = run.events(name, "roster")
        assert (taken_up["roster_version"], taken_up["joined"], taken_up["removed"]) == (1, ["dave"], [])
        assert taken_up["from_round"] >= from_round
        assert run.accuracy(name) >= run.least
    assert run.accuracy("dave") >= run.least
    edges = {(edge.source, edge.target): edge for edge in traffic.read(tmp_path / "nodes" / "alice") or []}
    assert edges[0, 3].bytes.values > 0


@pytest.mark.slow
def test_a_member_leaves_and_is_cut_at_once(site: Any) -> None:
    run = site(4, 4, "choco")
    run.until(lambda: run.round() >= 20)
    run.change(lambda roster, at: roster.without("bob", from_round=at))
    run.end()
    assert "removed" in (run.folder / "bob.out").read_text()
    assert json.loads((run.folder / "nodes" / "bob" / "status.json").read_text())["status"] == "removed"
    for name in ("alice", "carol", "dave"):
        (taken_up,) = run.events(name, "roster")
        assert taken_up["removed"] == ["bob"]
        assert run.events(name, "timed_out") == []
        assert run.accuracy(name) >= run.least


@pytest.mark.slow
def test_a_member_changes_its_certificate(site: Any, tmp_path: Path) -> None:
    run = site(3, 3, "choco")
    run.until(lambda: run.round() >= 20)
    new = renewed("bob", tmp_path / "bob.key", 30)

    def change(roster: Roster, at: int) -> Roster:
        bob = roster.named("bob").model_copy(update={"fingerprint": new.fingerprint, "certificate": new.pem})
        return roster.with_member(bob, replace=True, from_round=at)

    run.change(change)
    run.end()
    for name in ("alice", "bob", "carol"):
        assert [found["roster_version"] for found in run.events(name, "roster")] == [1]
        assert run.events(name, "timed_out") == []
        assert run.accuracy(name) >= run.least
    assert [found for found in run.events("alice", "active") if found["peer"] == "bob"][1:], "connected anew"
