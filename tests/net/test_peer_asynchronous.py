"""Peers that exchange without waiting for each other."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_peer import Peers, flat, model, moved, until
from wires import Wires

import jwins
from jwins.errors import ConfigError, PeerError
from jwins.sharing import Sharing, choco, closed_loop, full


@pytest.mark.parametrize(
    "sharing", [full(), closed_loop(step=0.01), choco(1.0, 1.0)], ids=lambda s: type(s).__name__
)
def test_a_peer_that_stands_still_delays_nobody_and_is_merged_later(
    tmp_path: Path, wires: Wires, sharing: Sharing[Any]
) -> None:
    """Carol begins, and trains until the others have ended 12 rounds; then she merges their newest models."""
    peers = Peers(tmp_path, 3, wires)
    models = [model() for _ in range(3)]
    start = flat(models[0])
    open_peers = [peers.peer(rank, models[rank], mode="async", sharing=sharing) for rank in range(3)]
    met, ended = threading.Barrier(3), threading.Barrier(3)

    def loop(rank: int) -> list[Any]:
        reports = []
        with open_peers[rank] as peer:
            until(lambda: len(peer._driver.progress().connected) == 2)
            met.wait()
            for at in peer.rounds(1 if rank == 2 else 12):
                moved(models[rank], 0.1)
                reports.append(peer.exchange())
                if rank < 2 and at % 2:  # the other's frame arrives
                    time.sleep(0.02)
            ended.wait()
            if rank == 2:  # the frames that came meanwhile
                until(lambda: len(peer._driver.group.machine(2).inbox) >= 2)
                reports.append(peer.exchange())
            ended.wait()
        return reports

    alice, bob, carol = peers.each(loop)
    assert all(report.timed_out == () for report in [*alice, *bob, *carol])
    assert [report.round for report in alice] == list(range(12))
    assert {name for report in alice for name in report.merged_with} == {"bob", "carol"}
    assert set(carol[-1].merged_with) == {"alice", "bob"}
    assert 0.3 < float((flat(models[2]) - start).mean()) < 1.3


def test_synchronous_and_asynchronous_peers_name_the_difference(tmp_path: Path) -> None:
    peers = Peers(tmp_path, 2, None)
    models = [model() for _ in range(2)]
    open_peers = [peers.peer(rank, models[rank], mode=("sync", "async")[rank]) for rank in range(2)]

    def loop(rank: int) -> str:
        with open_peers[rank] as peer:
            until(lambda: any(known.mismatch for known in peer._driver.peers.values()))
            with pytest.raises(PeerError) as refused:
                peer.exchange()
            return str(refused.value)

    first, second = peers.each(loop)
    assert "its mode is async, here it is sync" in first
    assert "its mode is sync, here it is async" in second


def test_a_peer_from_scratch_takes_a_model_and_does_not_spread_its_own(tmp_path: Path, wires: Wires) -> None:
    """Alice and bob are ten rounds ahead; carol starts without any of it."""
    peers = Peers(tmp_path, 3, wires)
    models = [model() for _ in range(3)]
    start = flat(models[0])
    joined = threading.Event()

    def loop(rank: int) -> Any:
        if rank == 2:
            until(lambda: all(float((flat(one) - start).mean()) >= 10.0 for one in models[:2]))
        timeout_s = 20.0 if rank == 2 else 0.5  # the first share waits so long for carol
        with peers.peer(rank, models[rank], mode="async", max_staleness=4, timeout_s=timeout_s) as peer:
            if rank == 2:
                report = peer.exchange()
                joined.set()
                return report, flat(models[2])
            for at in range(2000):
                if at < 10:
                    moved(models[rank], 1.0)
                    until(lambda: len(peer._driver.progress().connected) >= 1)
                peer.exchange()
                time.sleep(0.01)
                if joined.is_set():
                    break
            return flat(models[rank])

    first, second, (report, own) = peers.each(loop)
    assert report.skipped_rounds >= 9
    for found in (first, second, own):
        assert float((found - start).min()) > 9.0


def test_the_first_share_waits_for_the_neighbour_to_connect(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    with peers.peer(0, model(), mode="async") as alice:
        first = threading.Thread(target=alice.exchange)
        first.start()
        until(lambda: alice._driver.session.rounds.held == 0)
        assert alice._driver.session.peers[1].buffer.frames == {}
        with peers.peer(1, model(), mode="async"):
            first.join(20.0)
        assert not first.is_alive()


def test_a_peer_whose_neighbour_is_absent_waits_once_and_counts_no_byte(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    with peers.peer(0, model(), mode="async", timeout_s=0.2) as peer:
        reports = [peer.exchange() for _ in range(3)]
    assert [report.round for report in reports] == [0, 1, 2]
    assert reports[-1].bytes_total == 0


def test_a_restarted_peer_is_merged_from_its_first_round_on(tmp_path: Path, wires: Wires) -> None:
    """Bob runs twice, each time from round 0; alice is 12 rounds further then."""
    peers = Peers(tmp_path, 2, wires)
    models = [model(), model()]
    merged: list[int] = []
    with peers.peer(0, models[0], mode="async") as alice:

        def lives(rounds: int) -> None:
            with peers.peer(1, models[1], mode="async") as bob:
                for _ in range(rounds):
                    bob.exchange()
                    until(lambda: bool(alice._driver.group.machine(0).inbox))
                    merged.append(len(alice.exchange().merged_with))

        lives(12)
        lives(4)
    assert merged[12:] == [1] * 4


def test_wrong_arguments_are_named(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    with pytest.raises(ConfigError, match=r"mode = 'gossip': expected 'sync' or 'async'"):
        peers.peer(0, model(), mode="gossip")
    with pytest.raises(ConfigError, match=r"max_staleness = 0: expected a number of rounds of at least 1"):
        peers.peer(0, model(), mode="async", max_staleness=0)
    with pytest.raises(
        ConfigError, match=r"mode = 'async': Beer needs updates of the same round; take another"
    ):
        peers.peer(0, model(), mode="async", sharing=jwins.sharing.beer(0.5, 0.5))
