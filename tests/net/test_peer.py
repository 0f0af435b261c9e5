"""A peer in a loop of one's own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from members import roster_of
from torch import nn
from wires import Wires

import jwins
from jwins.errors import PeerError, UsageError
from jwins.net.roster import Roster
from jwins.sharing import choco, full, top_k
from jwins.wire.frame import describe

pytestmark = pytest.mark.alone


def model(seed: int = 0, hidden: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 2))


def moved(module: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30.0
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


class Peers:
    """Peers of one roster, each driven on a thread."""

    def __init__(self, folder: Path, count: int, wires: Wires | None) -> None:
        self.folder, self.wires = folder, wires
        self.roster: Roster = roster_of(folder, count)
        self.names = [member.name for member in self.roster.members]

    def peer(self, rank: int, module: nn.Module, **options: Any) -> jwins.Peer:
        network = None if self.wires is None else self.wires.end(rank)
        options = {"sharing": full(), "patience_s": 20.0, "network": network, **options}
        return jwins.Peer(module, roster=self.roster, key=self.folder / f"{self.names[rank]}.key", **options)

    def each(self, work: Callable[[int], Any], timeout_s: float = 60.0) -> list[Any]:
        found: dict[int, Any] = {}

        def run(rank: int) -> None:
            try:
                found[rank] = work(rank)
            except BaseException as error:
                found[rank] = error

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(self.names))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout_s)
            assert not thread.is_alive(), "a peer hangs"
        for error in found.values():
            if isinstance(error, BaseException):
                raise error
        return [found[rank] for rank in range(len(self.names))]


def test_two_lines_in_a_loop_average_the_models(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 3, wires)
    models = [model() for _ in range(3)]
    start = flat(models[0])
    open_peers = [peers.peer(rank, models[rank]) for rank in range(3)]

    def loop(rank: int) -> list[Any]:
        reports = []
        with open_peers[rank] as peer:
            for _ in range(4):
                moved(models[rank], float(rank))
                reports.append(peer.exchange())
        return reports

    for reports in peers.each(loop):
        assert [report.round for report in reports] == [0, 1, 2, 3]
        assert [report.merged_round for report in reports] == [0, 1, 2, 3]
        assert all(report.late == () for report in reports)
        assert reports[-1].bytes_total >= sum(report.bytes_sent for report in reports) > 4 * 4 * len(start)
    for found in models:
        torch.testing.assert_close(flat(found), start + 4.0)


def test_over_real_connections(tmp_path: Path) -> None:
    peers = Peers(tmp_path, 2, None)
    models = [model() for _ in range(2)]
    start = flat(models[0])

    def loop(rank: int) -> Any:
        with peers.peer(rank, models[rank], sharing=jwins.sharing.jwins()) as peer:
            for _ in range(3):
                moved(models[rank], float(rank))
                report = peer.exchange()
        return report

    for report in peers.each(loop):
        assert report.round == 2
        assert report.late == ()
    both = (flat(models[0]) + flat(models[1])) / 2
    torch.testing.assert_close(both, start + 1.5, atol=0.5, rtol=0.0)


def test_without_waiting_the_merge_comes_one_round_late(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    models = [model() for _ in range(2)]
    start = flat(models[0])
    open_peers = [peers.peer(rank, models[rank]) for rank in range(2)]

    def loop(rank: int) -> list[Any]:
        seen = []
        with open_peers[rank] as peer:
            moved(models[rank], 2.0 * rank)
            report = peer.exchange(wait=False)
            seen.append((report.merged_round, flat(models[rank]) - start))
            moved(models[rank], 10.0)  # overlaps with the exchange
            report = peer.exchange(wait=False)
            seen.append((report.merged_round, flat(models[rank]) - start))
            report = peer.exchange()
            seen.append((report.merged_round, flat(models[rank]) - start))
        return seen

    for rank, seen in enumerate(peers.each(loop)):
        assert [merged for merged, _ in seen] == [None, 0, 2]
        torch.testing.assert_close(seen[0][1], torch.full_like(start, 2.0 * rank))
        torch.testing.assert_close(seen[1][1], torch.full_like(start, 11.0), atol=1e-4, rtol=0.0)
        torch.testing.assert_close(seen[2][1], torch.full_like(start, 11.0), atol=1e-4, rtol=0.0)


def test_an_event_loop_goes_on_meanwhile(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    models = [model() for _ in range(2)]
    with peers.peer(0, models[0]) as first, peers.peer(1, models[1]) as second:

        async def both() -> list[Any]:
            return await asyncio.gather(first.exchange_async(), second.exchange_async())

        reports = asyncio.run(both())
    assert [report.merged_round for report in reports] == [0, 0]


def test_only_chosen_parameters_are_exchanged(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    models = [model() for _ in range(2)]
    start = models[0].state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    chosen: list[Any] = [["3.weight", "3.bias"], lambda name: name.startswith("3.")]
    open_peers = [peers.peer(rank, models[rank], params=chosen[rank]) for rank in range(2)]

    def loop(rank: int) -> None:
        with open_peers[rank] as peer:
            moved(models[rank], float(rank))
            peer.exchange()

    peers.each(loop)
    for rank, found in enumerate(models):
        for name, parameter in found.named_parameters():
            by = 0.5 if name.startswith("3.") else float(rank)
            torch.testing.assert_close(parameter.detach(), start[name] + by)
    with pytest.raises(UsageError, match="trains no parameter 'head'"):
        peers.peer(0, model(), params=["head"])


@pytest.mark.parametrize("policy", ["local", "shared"])
def test_statistics_stay_or_are_shared_as_asked(policy: Any, tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    models = [model() for _ in range(2)]
    open_peers = [peers.peer(rank, models[rank], buffers=policy) for rank in range(2)]

    def loop(rank: int) -> None:
        with open_peers[rank] as peer:
            models[rank][1].running_mean.fill_(4.0 * rank)  # type: ignore[union-attr, operator]
            peer.exchange()

    peers.each(loop)
    means = [float(found[1].running_mean[0]) for found in models]  # type: ignore[index]
    assert means == ([0.0, 4.0] if policy == "local" else [2.0, 2.0])


MISFITS: dict[str, Any] = {
    "larger": (lambda: model(hidden=5), "its model has .* parameters"),
    "another start": (lambda: model(seed=1), "its initial parameters differ"),
}


@pytest.mark.parametrize(("other", "problem"), MISFITS.values(), ids=MISFITS)
def test_a_model_that_does_not_fit_the_others_is_an_error(
    other: Any, problem: str, tmp_path: Path, wires: Wires
) -> None:
    peers = Peers(tmp_path, 2, wires)
    models = [model(), other()]
    open_peers = [peers.peer(rank, models[rank]) for rank in range(2)]

    def loop(rank: int) -> None:
        with open_peers[rank] as peer, pytest.raises(PeerError, match=problem):
            peer.exchange()

    peers.each(loop)


def test_who_is_missing_is_late_and_then_not_waited_for(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 3, wires)
    models = [model() for _ in range(3)]
    open_peers = [peers.peer(rank, models[rank], sharing=top_k(0.5), patience_s=1.0) for rank in range(3)]
    last = threading.Barrier(2)

    def loop(rank: int) -> list[Any]:
        with open_peers[rank] as peer:
            reports = [peer.exchange() for _ in range(1 if rank == 2 else 6)]
            if rank != 2:
                last.wait(30.0)  # whoever closes first is gone for the other, too
            return reports

    reports = peers.each(loop)
    assert reports[0][0].late == ()
    assert all(report.late in ((), ("carol",)) for report in reports[0][1:])
    assert reports[0][-1].suspected == ("carol",)


def test_a_peer_that_is_made_again_goes_on_where_it_was(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    models = [model(), model()]
    kept = tmp_path / "kept"
    sharing = choco(0.5, 0.5)
    first = [peers.peer(0, models[0], sharing=sharing), peers.peer(1, models[1], sharing=sharing, folder=kept)]

    def loop(rank: int) -> None:
        moved(models[rank], 1.0 + rank)
        first[rank].exchange()

    peers.each(loop)
    first[1].close()
    fresh = model(seed=3)
    again = peers.peer(1, fresh, sharing=sharing, folder=kept)
    assert again.round == 1
    assert torch.equal(flat(fresh), flat(models[1])), "the checkpoint is in the model"
    until(lambda: first[0]._clock.peers[1].met and not first[0]._clock.peers[1].suspected)
    first[0].exchange(wait=False)
    report = again.exchange()
    assert report.round == 1
    assert report.late == ()
    again.close()
    first[0].close()


def test_a_newcomer_adopts_the_model_and_the_round_of_a_member_that_it_names(
    tmp_path: Path, wires: Wires
) -> None:
    peers = Peers(tmp_path, 3, wires)
    models = [model(), model(), model(seed=7)]
    first = [peers.peer(rank, models[rank], patience_s=0.2) for rank in (0, 1)]
    for _ in range(5):
        for rank, peer in enumerate(first):
            moved(models[rank], 1.0)
            peer.exchange(wait=False)
    wires.cut([(0, 2)])
    with pytest.raises(PeerError, match="none of alice gave its model: alice did not give it within 0 s"):
        peers.peer(2, model(seed=7), patience_s=0.01, adopt="alice")
    wires.mend()
    late = peers.peer(2, models[2], patience_s=0.2, adopt=["bob", "alice"])
    assert 4 <= late.round <= 5
    torch.testing.assert_close(flat(models[2]), flat(models[1]), atol=1.01, rtol=0.0)
    everyone = [*first, late]
    rounds = [peer.exchange(wait=False).round for peer in everyone]
    assert max(rounds) - min(rounds) <= 2
    for peer in everyone:
        assert peer.exchange().unfit == ()
    for peer in everyone:
        peer.close()


def test_eight_newcomers_at_once_change_their_donor_when_it_dies_half_way(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 10, wires)
    models = [model(seed=0 if rank < 2 else 7) for rank in range(10)]
    first = [peers.peer(rank, models[rank], patience_s=0.1) for rank in (0, 1)]
    for _ in range(3):
        for rank, peer in enumerate(first):
            moved(models[rank], 1.0)
            peer.exchange(wait=False)
    served: set[int] = set()

    def fate(sender: int, receiver: int, data: bytes) -> float | None:
        if sender != 0 or receiver < 2 or describe(data)["kind"] != "frame":
            return 0.0
        served.add(receiver)
        return None if receiver % 2 else 0.0  # of half of them the model is under way when the donor dies

    wires.fate = fate
    donor = wires._ends[0]

    def work(rank: int) -> Any:
        if rank == 0:
            until(lambda: len(served) == 8)
            donor.kill()
            return None
        if rank == 1:
            return first[1]
        return peers.peer(rank, models[rank], patience_s=1.0, adopt=["alice", "bob"])

    everyone = peers.each(work)[1:]
    assert all(peer.round >= 2 for peer in everyone)
    for found in models[2:]:
        assert float(flat(found).mean()) > 1.0, "it is a donor's, not its own"

    def once(rank: int) -> Any:
        return None if rank == 0 else everyone[rank - 1].exchange()

    reports = peers.each(once)[1:]
    assert all(report.unfit == () for report in reports)
    for peer in (*everyone, first[0]):
        peer.close()


def test_a_closed_peer_and_a_broken_model_are_errors(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    module = model()
    peer = peers.peer(0, module)
    moved(module, float("nan"))
    with pytest.raises(UsageError, match="not finite"):
        peer.exchange()
    peer.close()
    peer.close()
    with pytest.raises(UsageError, match="is closed"):
        peer.exchange()
