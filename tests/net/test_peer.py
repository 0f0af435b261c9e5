"""A peer in a loop of one's own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from members import roster_of
from torch import nn
from wires import Wires

import jwins
from jwins.engines import memory
from jwins.errors import ConfigError, PeerError, ResumeError, UsageError
from jwins.net import driver
from jwins.net.peer_session import State
from jwins.net.roster import Roster, write_roster
from jwins.rng import RoundContext
from jwins.sharing import Nesterov, Sharing, choco, full, top_k
from jwins.sharing.update import Received, Update
from jwins.wire.frame import describe


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
        transport = None if self.wires is None else self.wires.end(rank)
        options = {"sharing": full(), "timeout_s": 20.0, "transport": transport, **options}
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
        assert all(report.timed_out == () for report in reports)
        assert reports[-1].bytes_total >= sum(report.bytes_sent for report in reports) > 4 * 4 * len(start)
    for found in models:
        torch.testing.assert_close(flat(found), start + 4.0)


def test_memory_is_stated_before_it_is_taken(
    tmp_path: Path, wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, stated = Peers(tmp_path, 2, wires), "3.0 x the model) between rounds, 0.0 MB (6.0 x the model) more"
    with monkeypatch.context() as patch:
        patch.setattr(memory, "memory_free", lambda: 4.0 * 34 * 3 - 1)
        with pytest.raises(ConfigError) as refused:
            peers.peer(0, model())
    assert refused.value.path == "Peer.model"
    assert f"'34 parameters': the exchange takes 0.0 MB ({stated}" in str(refused.value)
    assert "0.0 MB are free" in str(refused.value)
    monkeypatch.setattr(driver, "memory_free", lambda: 4.0 * 34 * 8)
    peers.peer(0, model(), folder=tmp_path / "alice").close()
    lines = [json.loads(line) for line in (tmp_path / "alice" / "log.jsonl").read_text().splitlines()]
    logged = [(line["level"], line["event"]) for line in lines if stated in line.get("exchange", "")]
    assert logged == [("info", "memory"), ("warning", "memory may not suffice")]


def test_an_outer_step_is_taken_before_sharing_and_goes_on_after_a_restart(
    tmp_path: Path, wires: Wires
) -> None:
    """Two peers that move by 1 and 3: DiLoCo's step on their mean, with one momentum throughout."""
    peers = Peers(tmp_path, 2, wires)
    models = [model() for _ in range(2)]
    expected = flat(models[0]).requires_grad_()
    sgd = torch.optim.SGD([expected], lr=0.7, momentum=0.9, nesterov=True)
    for first in (0, 3):

        def loop(rank: int, first: int = first) -> int:
            options: dict[str, Any] = {"outer": Nesterov(0.7, 0.9), "folder": tmp_path / f"peer-{rank}"}
            with peers.peer(rank, models[rank], **options) as peer:
                for _ in peer.rounds(first + 3):
                    moved(models[rank], float(1 + 2 * rank))
                    peer.exchange()
                return peer.round

        assert peers.each(loop) == [first + 3] * 2
        for _ in range(3):
            expected.grad = torch.full_like(expected, -2.0)
            sgd.step()
        for found in models:
            torch.testing.assert_close(flat(found), expected.detach(), atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match=r"outer = 0.7: expected an outer optimizer, such as jwins.sharing.N"):
        peers.peer(0, models[0], outer=0.7)
    with pytest.raises(ConfigError, match=r"buffers = 'shared': the outer step would extrapolate"):
        peers.peer(0, models[0], outer=Nesterov(0.7, 0.9), buffers="shared")
    with pytest.raises(ConfigError, match=r"outer = Nesterov.*noloco has an outer step of its own; remove one"):
        peers.peer(0, models[0], outer=Nesterov(0.7, 0.9), sharing=jwins.sharing.noloco())
    with pytest.raises(ConfigError, match=r"sharing.gamma = None: left out, each lost frame would change"):
        peers.peer(0, models[0], sharing=jwins.sharing.demo(0.1))


def test_each_neighbour_gets_an_update_of_its_own(tmp_path: Path, wires: Wires) -> None:
    """Three peers that move apart once: low-rank differences on each edge bring them together."""
    peers = Peers(tmp_path, 3, wires)
    models = [model() for _ in range(3)]
    start = flat(models[0])

    def loop(rank: int) -> None:
        with peers.peer(rank, models[rank], sharing=jwins.sharing.power_gossip()) as peer:
            for at in peer.rounds(12):
                if at == 0:
                    moved(models[rank], float(rank))
                peer.exchange()

    peers.each(loop)
    for found in models:
        torch.testing.assert_close(flat(found), start + 1.0, atol=0.02, rtol=0)


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
        assert report.timed_out == ()
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
    with pytest.raises(UsageError, match="has no trainable parameter 'head'"):
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


@pytest.mark.parametrize("sharing", ["full", "jwins", "closed_loop"])
def test_a_program_may_make_its_tensors_elsewhere(sharing: str, tmp_path: Path, wires: Wires) -> None:
    """As after ``torch.set_default_device("cuda")``; what is made on "meta" holds no numbers."""
    peers = Peers(tmp_path, 2, wires)
    models = {device: [model(), model()] for device in ("cpu", "meta")}

    def loop(rank: int, device: str) -> Any:
        found = models[device][rank]
        options = {"sharing": getattr(jwins.sharing, sharing)(), "buffers": "shared"}
        with (
            torch.device(device),
            peers.peer(rank, found, **options, folder=tmp_path / device / str(rank)) as peer,
        ):
            for _ in range(3):
                moved(found, 0.01 * (rank + 1))
                peer.exchange()
        return flat(found)

    usual, elsewhere = (peers.each(partial(loop, device=device)) for device in ("cpu", "meta"))
    assert all(torch.equal(a, b) for a, b in zip(usual, elsewhere, strict=True))
    assert not torch.equal(usual[0], flat(model()))


MISFITS: dict[str, Any] = {
    "larger": (lambda: model(hidden=5), "it exchanges .* parameters"),
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
    open_peers = [peers.peer(rank, models[rank], sharing=top_k(0.5), timeout_s=1.0) for rank in range(3)]
    last = threading.Barrier(2)

    def loop(rank: int) -> list[Any]:
        with open_peers[rank] as peer:
            reports = [peer.exchange() for _ in range(1 if rank == 2 else 6)]
            if rank != 2:
                last.wait(30.0)  # whoever closes first is gone for the other, too
            return reports

    reports = peers.each(loop)
    assert reports[0][0].timed_out == ()
    assert all(report.timed_out in ((), ("carol",)) for report in reports[0][1:])
    assert reports[0][-1].suspect == ("carol",)


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
    until(lambda: first[0]._driver.peers[1].state is State.ACTIVE)
    first[0].exchange(wait=False)
    report = again.exchange()
    assert report.round == 1
    assert report.timed_out == ()
    again.close()
    first[0].close()


def test_a_joiner_begins_with_the_model_and_the_round_of_a_member_that_it_names(
    tmp_path: Path, wires: Wires
) -> None:
    peers = Peers(tmp_path, 3, wires)
    models = [model(), model(), model(seed=7)]
    first = [peers.peer(rank, models[rank], timeout_s=0.2) for rank in (0, 1)]
    for _ in range(5):
        for rank, peer in enumerate(first):
            moved(models[rank], 1.0)
            peer.exchange(wait=False)
    wires.cut([(0, 2)])
    with pytest.raises(PeerError, match="none of alice sent its model: alice did not answer within 0 s"):
        peers.peer(2, model(seed=7), timeout_s=0.01, bootstrap_from="alice")
    wires.mend()
    late = peers.peer(2, models[2], timeout_s=0.2, bootstrap_from=["bob", "alice"])
    assert 4 <= late.round <= 5
    torch.testing.assert_close(flat(models[2]), flat(models[1]), atol=1.01, rtol=0.0)
    everyone = [*first, late]
    rounds = [peer.exchange(wait=False).round for peer in everyone]
    assert max(rounds) - min(rounds) <= 2
    for peer in everyone:
        assert peer.exchange().incompatible == ()
    for peer in everyone:
        peer.close()


def test_eight_joiners_at_once_change_their_provider_when_it_dies_half_way(
    tmp_path: Path, wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jwins.net.bootstrap.AWAY_S", 0.3)  # the others need not wait long for the dead one
    peers = Peers(tmp_path, 10, wires)
    models = [model(seed=0 if rank < 2 else 7) for rank in range(10)]
    first = [peers.peer(rank, models[rank], timeout_s=0.1) for rank in (0, 1)]
    for _ in range(3):
        for rank, peer in enumerate(first):
            moved(models[rank], 1.0)
            peer.exchange(wait=False)
    served: set[int] = set()

    def fate(sender: int, receiver: int, data: bytes) -> float | None:
        if sender != 0 or receiver < 2 or describe(data)["kind"] != "frame":
            return 0.0
        served.add(receiver)
        return None if receiver % 2 else 0.0  # of half of them the model is under way when the provider dies

    wires.fate = fate
    provider = wires._ends[0]

    def work(rank: int) -> Any:
        if rank == 0:
            until(lambda: len(served) == 8)
            provider.kill()
            return None
        if rank == 1:
            return first[1]
        return peers.peer(rank, models[rank], timeout_s=1.0, bootstrap_from=["alice", "bob"])

    everyone = peers.each(work)[1:]
    assert all(peer.round >= 2 for peer in everyone)
    for found in models[2:]:
        assert float(flat(found).mean()) > 1.0, "it is a provider's, not its own"

    def once(rank: int) -> Any:
        return None if rank == 0 else everyone[rank - 1].exchange()

    reports = peers.each(once)[1:]
    assert all(report.incompatible == () for report in reports)
    for peer in (*everyone, first[0]):
        peer.close()


def test_a_loop_over_the_rounds_that_are_left_cannot_be_wrong(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    models = [model(), model()]
    open_peers = [peers.peer(rank, models[rank], timeout_s=5.0) for rank in range(2)]
    found = peers.each(lambda rank: [(at, open_peers[rank].exchange()) for at in open_peers[rank].rounds(4)])
    for reports in found:
        assert [at for at, _ in reports] == [0, 1, 2, 3]
        assert [report.merged_round for _, report in reports] == [0, 1, 2, 3]
        for _, report in reports:
            assert (len(report.merged_with), report.partial, report.skipped_rounds) == (1, False, 0)
            assert sum(report.seconds_by.values()) >= report.seconds - 0.01
    # an update may come while the exchange before ends, so sums agree and single rounds need not
    sent = [reports[-1][1].bytes_total for reports in found]
    assert [sum(report.received_bytes for _, report in reports) for reports in found] == sent[::-1]
    with pytest.raises(UsageError, match="round 4 ended without an exchange"):
        for _ in open_peers[0].rounds(6):
            pass
    left = open_peers[0].rounds(9)
    assert next(left) == 4
    open_peers[0]._next = 7  # as after an exchange that took over the round of the others
    assert list(itertools.islice(left, 1)) == [7]
    for wrong in ("3", 3.0, None, True):
        with pytest.raises(ConfigError, match=r"count = .*: expected the number of rounds"):
            open_peers[0].rounds(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="wait = 'no': expected True or False"):
        open_peers[0].exchange(wait="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_merged_in_float32_and_rounded_back(kind: Any, tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    models = [model().to(kind), model().to(kind)]
    initial = flat(models[0]).float()
    open_peers = [peers.peer(rank, models[rank], sharing=full(), timeout_s=5.0) for rank in range(2)]
    moved(models[0], 1.0)
    moved(models[1], 2.0)
    expected = torch.stack([flat(m).float() for m in models]).mean(0)
    peers.each(lambda rank: open_peers[rank].exchange())
    for m in models:
        assert flat(m).dtype == kind
        torch.testing.assert_close(flat(m), expected.to(kind), rtol=1e-2, atol=1e-2)
        assert not torch.equal(flat(m).float(), initial)


def test_two_parameters_on_one_memory_are_refused_and_one_under_two_names_is_not(
    tmp_path: Path, wires: Wires
) -> None:
    class Tied(torch.nn.Module):
        def __init__(self, same: bool) -> None:
            super().__init__()
            self.a = torch.nn.Linear(3, 3)
            self.b = torch.nn.Linear(3, 3)
            if same:
                self.b.weight = self.a.weight
            else:
                self.b.weight.data = self.a.weight.data.T

    peers = Peers(tmp_path, 1, wires)
    with pytest.raises(UsageError, match=r"parameter 'a\.weight' and parameter 'b\.weight' share memory"):
        peers.peer(0, Tied(same=False))
    peers.peer(0, Tied(same=True)).close()


def test_a_wrapper_of_one_peer_is_seen_through(tmp_path: Path, wires: Wires) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.module = inner

    peers = Peers(tmp_path, 2, wires)
    models = [model(), Wrapped(model())]
    open_peers = [peers.peer(rank, models[rank], timeout_s=5.0) for rank in range(2)]
    for report in peers.each(lambda rank: open_peers[rank].exchange()):
        assert (report.incompatible, report.partial) == ((), False)


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


def test_a_peer_that_is_stopped_as_its_model_breaks_goes_on_from_before(tmp_path: Path, wires: Wires) -> None:
    """No checkpoint holds the end: it would be the end of every further try, too."""
    peers = Peers(tmp_path, 2, wires)
    models, kept = [model(), model()], tmp_path / "kept"
    both = [peers.peer(rank, models[rank], folder=kept if rank == 0 else None) for rank in range(2)]
    peers.each(lambda rank: both[rank].exchange())
    moved(models[0], float("nan"))
    both[0].exchange(wait=False)
    both[0].close()
    fresh = model()
    again = peers.peer(0, fresh, folder=kept)
    assert again.round == 1
    assert bool(torch.isfinite(flat(fresh)).all())
    again.close()
    both[1].close()


def test_an_exchange_that_is_given_up_comes_with_the_next(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    models = [model(), model()]
    start = flat(models[0])
    alice, bob = (peers.peer(rank, models[rank], timeout_s=60.0) for rank in range(2))
    moved(models[0], 8.0)

    async def given_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(alice.exchange_async(), 1.0)
        loop.append(threading.Thread(target=lambda: [bob.exchange() for _ in range(3)]))
        loop[0].start()

    loop: list[threading.Thread] = []
    asyncio.run(given_up())  # ends when its threads do: bob answered
    torch.testing.assert_close(flat(models[0]), start + 8.0)
    moved(models[0], 2.0)
    report = alice.exchange()
    assert (report.round, report.merged_round) == (1, 1)
    torch.testing.assert_close(flat(models[0]), start + 5.0)
    assert alice.exchange().merged_round == 2
    torch.testing.assert_close(flat(models[0]), start + 5.0)
    loop[0].join(30.0)
    torch.testing.assert_close(flat(models[1]), start + 5.0)
    alice.close()
    bob.close()


def test_an_interrupted_exchange_comes_with_the_next(
    tmp_path: Path, wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C in a notebook, whose next cell goes on."""
    peers = Peers(tmp_path, 2, wires)
    models = [model(), model()]
    start = flat(models[0])
    alice, bob = (peers.peer(rank, models[rank]) for rank in range(2))
    moved(models[0], 8.0)
    take = alice._training.take_merged

    def interrupted() -> Any:
        monkeypatch.setattr(alice._training, "take_merged", take)
        raise KeyboardInterrupt

    monkeypatch.setattr(alice._training, "take_merged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        alice.exchange()
    peers.each(lambda rank: [(alice, bob)[rank].exchange() for _ in range(1 + rank)])
    for found in models:
        torch.testing.assert_close(flat(found), start + 4.0)
    alice.close()
    bob.close()


@dataclass(frozen=True)
class Careless(Sharing[int]):
    """Full sharing that trains the parameters which it was handed."""

    def init(self, params: torch.Tensor) -> int:
        return 0

    def share(self, state: int, params: torch.Tensor, ctx: RoundContext) -> tuple[Update, int]:
        params += 1.0
        return Update(len(params), None, params.clone()), state

    def merge(
        self, state: int, params: torch.Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[torch.Tensor, int]:
        return params.clone(), state


class Hidden(Careless):
    def __init__(self, step: float) -> None:
        object.__setattr__(self, "step", step)


def test_a_mistake_in_an_algorithm_of_ones_own_is_named_before_a_port_is_opened(tmp_path: Path) -> None:
    peers = Peers(tmp_path, 2, None)
    with pytest.raises(UsageError, match=r"^Peer\.sharing = .*make Hidden a dataclass"):
        peers.peer(0, model(), sharing=Hidden(0.1))
    with pytest.raises(UsageError, match=r"Careless\.share changed params in place"):
        peers.peer(0, model(), sharing=Careless())
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # fails if a socket listens
        sock.bind(peers.roster.members[0].host_and_port)


def test_a_peer_that_did_not_fit_is_connected_after_a_restart(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    models = [model(), model(seed=1)]
    alice, bob = (peers.peer(rank, models[rank], timeout_s=60.0) for rank in range(2))
    until(lambda: bool(alice._driver.peers[1].mismatch) and bool(bob._driver.peers[0].mismatch))
    bob.close()
    models[1] = model()
    bob = peers.peer(1, models[1], timeout_s=60.0)
    until(lambda: alice._driver.peers[1].state is State.ACTIVE)
    for report in peers.each(lambda rank: (alice, bob)[rank].exchange()):
        assert (report.timed_out, report.suspect, report.incompatible) == ((), (), ())
    alice.close()
    bob.close()


def test_one_that_does_not_fit_is_no_reason_to_give_up_the_others(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 3, wires)
    alice = peers.peer(0, model(), timeout_s=0.2)
    bob = peers.peer(1, model(seed=1))
    until(lambda: bool(alice._driver.peers[1].mismatch))
    assert [text.partition(":")[0] for text in alice.exchange(wait=False).incompatible] == ["bob"]
    carol = peers.peer(2, model(), timeout_s=0.2)
    until(lambda: alice._driver.peers[2].is_introduced)
    assert len(alice.exchange(wait=False).incompatible) == 1
    for peer in (alice, bob, carol):
        peer.close()


def test_where_nobody_else_is_left_that_is_said(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 3, wires)
    alice, bob = peers.peer(0, model(), timeout_s=0.05), peers.peer(1, model(seed=1))

    def a_few() -> None:
        for _ in range(3):
            alice.exchange()

    problem = "incompatible with all other peers .*; all must use the same model, initial parameters, sharing"
    with pytest.raises(PeerError, match=problem):
        a_few()
    alice.close()
    bob.close()


@pytest.mark.parametrize(
    ("other", "sharing", "problem"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 5)), full(), "another model"),
        (lambda: nn.Sequential(nn.Linear(5, 6)), full(), "another model"),
        (lambda: nn.Sequential(nn.Linear(4, 6)), top_k(0.5), "another algorithm"),
    ],
)
def test_a_folder_goes_on_with_what_it_was_begun_with(
    other: Callable[[], nn.Module], sharing: Any, problem: str, tmp_path: Path, wires: Wires
) -> None:
    """Also where another model has as many parameters."""
    peers, kept = Peers(tmp_path, 2, wires), tmp_path / "kept"
    first = peers.peer(0, nn.Sequential(nn.Linear(4, 6)), folder=kept, timeout_s=0.05)
    first.exchange()
    first.close()
    with pytest.raises(ResumeError, match=f"kept'?: belongs to a run with {problem}"):
        peers.peer(0, other(), folder=kept, sharing=sharing)


def test_a_folder_is_for_one_peer_at_a_time(tmp_path: Path, wires: Wires) -> None:
    peers, kept = Peers(tmp_path, 2, wires), tmp_path / "kept"
    first = peers.peer(0, model(), folder=kept, timeout_s=0.05)
    with pytest.raises(
        ResumeError, match="another process is running this peer here, or this one does already"
    ):
        peers.peer(0, model(), folder=kept)
    first.exchange()
    first.close()
    with pytest.raises(UsageError, match="the checkpoint has no node 1: it is another member's"):
        peers.peer(1, model(), folder=kept)
    peers.peer(0, model(), folder=kept).close()


def test_what_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    peers = Peers(tmp_path, 2, None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="for metrics"):
            peers.peer(0, model(), metrics_port=taken.getsockname()[1])
    peers.peer(0, model()).close()


def test_an_exchange_that_skips_rounds_names_no_merge(tmp_path: Path, wires: Wires) -> None:
    peers, models, kept = Peers(tmp_path, 2, wires), [model(), model()], tmp_path / "kept"
    alice, bob = peers.peer(0, models[0]), peers.peer(1, models[1], folder=kept)
    assert [report.merged_round for report in peers.each(lambda rank: (alice, bob)[rank].exchange())] == [0, 0]
    bob.close()
    until(lambda: alice._driver.peers[1].state is State.LEFT)
    for _ in range(3):
        alice.exchange()
    bob = peers.peer(1, models[1], folder=kept)
    until(lambda: alice._driver.peers[1].is_introduced)
    alice.exchange(wait=False)
    report = bob.exchange()
    assert (report.round, report.skipped_rounds) == (1, 3)
    assert (report.merged_round, report.merged_with) == (None, ())
    report = bob.exchange()
    assert (report.round, report.merged_round, report.merged_with) == (4, 4, ("alice",))
    alice.close()
    bob.close()


@pytest.mark.parametrize(
    ("error", "status"), [(None, "ended"), (KeyboardInterrupt, "interrupted"), (OSError, "failed: OSError")]
)
def test_the_status_file_tells_the_last_round_and_how_the_peer_ended(
    error: type[BaseException] | None, status: str, tmp_path: Path, wires: Wires
) -> None:
    peers, models = Peers(tmp_path, 2, wires), [model(), model()]

    def work(rank: int) -> int:
        with (
            contextlib.suppress(KeyboardInterrupt, OSError),
            peers.peer(rank, models[rank], folder=tmp_path / str(rank)) as peer,
        ):
            for _ in range(3):
                peer.exchange()
            if error is not None:
                raise error
        return peer.round

    assert peers.each(work) == [3, 3]
    for rank in range(2):
        found = json.loads((tmp_path / str(rank) / "status.json").read_text())
        assert (found["round"], found["status"]) == (3, status)


def test_closing_sends_what_was_shared_for_as_long_as_others_wait(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    peers.peer(0, model(), timeout_s=77.0).close()
    assert wires.flushed == {0: 77.0}


@pytest.mark.parametrize(
    ("argument", "given", "problem"),
    [
        ("model", "m", "expected a torch.nn.Module"),
        ("sharing", "jwins", "expected an algorithm, such as"),
        ("roster", 7, "expected a path or a Roster"),
        ("key", None, "expected a path"),
        ("params", 3, "expected names of parameters"),
        ("params", ["0.weight", 3], "expected names of parameters"),
        ("buffers", "own", "expected 'local' or 'shared'"),
        ("bootstrap_from", 1, "expected a member's name"),
        ("codec", 5, "expected the name of a codec"),
        ("timeout_s", "5", "expected a time in seconds above 0"),
        ("timeout_s", True, "expected a time in seconds above 0"),
        ("timeout_s", 0.0, "expected a time in seconds above 0"),
        ("timeout_s", float("nan"), "expected a time in seconds above 0"),
        ("folder", 3, "expected a path"),
        ("metrics_port", "9100", "expected a port"),
        ("metrics_port", 99999, "expected a port"),
        ("metrics_port", -1, "expected a port"),
        ("listen", 7420, "expected an address"),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(
    argument: str, given: Any, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = Peers(tmp_path, 2, None)
    opened: list[Any] = []
    monkeypatch.setattr("jwins.net.membership.Membership.connect", lambda *a, **k: opened.append(a))
    options: dict[str, Any] = {"model": model(), "sharing": full(), "roster": peers.roster}
    options |= {"key": tmp_path / "alice.key", argument: given}
    with pytest.raises(ConfigError) as found:
        jwins.Peer(**options)
    assert str(found.value).startswith(f"{argument} = {given!r}: {problem}")
    assert not opened


def test_a_folder_that_cannot_be_made_is_refused_before_a_port_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = Peers(tmp_path, 2, None)
    monkeypatch.setattr("jwins.net.membership.Membership.connect", lambda *a, **k: pytest.fail("opened"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^folder = .*: cannot be made"):
        peers.peer(0, model(), folder=tmp_path / "file" / "state")


def test_a_single_name_is_one_parameter(tmp_path: Path, wires: Wires) -> None:
    peers = Peers(tmp_path, 2, wires)
    peer = peers.peer(0, model(), params="0.weight")
    peer.close()
    assert [slot.name for slot in peer._layout.slots if slot.kind == "parameter"] == ["0.weight"]


ENDS = """
import sys, torch, jwins
torch.manual_seed(0)
module = torch.nn.Linear(3, 2)
peer = jwins.Peer(module, roster=sys.argv[1], key=sys.argv[2], sharing=jwins.sharing.full(), timeout_s=100.0)
peer.exchange()
if sys.argv[3] == "error":
    raise ValueError("of the user's loop")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["end", "error"])
def test_a_program_that_does_not_close_its_peer_ends_all_the_same(how: str, tmp_path: Path) -> None:
    """And its neighbours hear of it."""
    peers = Peers(tmp_path, 2, None)
    write_roster(peers.roster, tmp_path / "roster.toml")
    torch.manual_seed(0)
    alice = peers.peer(0, nn.Linear(3, 2), timeout_s=100.0)
    command = [sys.executable, "-c", ENDS, str(tmp_path / "roster.toml"), str(tmp_path / "bob.key"), how]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        alice.exchange()
        _, said = child.communicate(timeout=90)
    assert child.returncode == (0 if how == "end" else 1), said
    assert ("of the user's loop" in said) == (how == "error")
    assert alice.exchange().suspect == ("bob",)
    alice.close()
