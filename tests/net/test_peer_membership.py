"""A peer in a loop of one's own follows its roster's file: members join, leave, change their certificates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from members import member, roster_of
from test_peer import flat, model, moved, until
from wires import Wires

import jwins
from jwins.errors import ConfigError, PeerError, RemovedError
from jwins.net.certificate import renewed
from jwins.net.membership import kept_rosters
from jwins.net.peer_session import State
from jwins.net.roster import Roster, read_roster, write_roster
from jwins.sharing import closed_loop, full, stateless

PAUSE_S = 0.05
"""Of a round at least, so that a file is looked at in fewer rounds than a change lies ahead."""
AHEAD = 60


class Loop:
    """A member's loop on a thread: every round adds 1 to each parameter."""

    def __init__(self, peer: jwins.Peer) -> None:
        self.peer, self.report = peer, None
        self.reports: list[Any] = []
        self.failure: BaseException | None = None
        self._asked_to_end = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._asked_to_end:
                moved(self.peer.model, 1.0)
                self.reports.append(self.peer.exchange())
                time.sleep(PAUSE_S)
        except BaseException as error:
            self.failure = error

    @property
    def roster_version(self) -> int:
        return self.reports[-1].roster_version if self.reports else -1

    def end(self) -> None:
        self._asked_to_end = True
        self.peer.close()
        self._thread.join(60.0)
        assert not self._thread.is_alive(), "a peer hangs"


class Federation:
    """Members of one roster file, over real connections."""

    def __init__(self, folder: Path, members: int, places: int | None) -> None:
        self.folder, self.file = folder, folder / "roster.toml"
        write_roster(roster_of(folder, members).model_copy(update={"places": places}), self.file)
        self.loops: dict[str, Loop] = {}
        self.start = flat(model())

    def peer(self, name: str, **options: Any) -> jwins.Peer:
        options = {"sharing": full(), "timeout_s": 20.0, **options}
        module = options.pop("module", None) or model()
        return jwins.Peer(module, roster=self.file, key=self.folder / f"{name}.key", **options)

    def begin(self, *names: str, **options: Any) -> None:
        for name in names:
            self.loops[name] = Loop(self.peer(name, **options))

    def change(self, work: Callable[[Roster, int], Roster]) -> int:
        """Another roster, some rounds ahead; from which round on."""
        from_round = max(loop.peer.round for loop in self.loops.values()) + AHEAD
        write_roster(work(read_roster(self.file), from_round), self.file)
        return from_round

    def until(self, holds: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
        end = time.monotonic() + timeout_s
        while not holds():
            failures = {name: loop.failure for name, loop in self.loops.items() if loop.failure}
            assert not [f for f in failures.values() if not isinstance(f, RemovedError)], failures
            assert time.monotonic() < end, f"waited for {what}"
            time.sleep(0.01)

    def until_version(self, roster_version: int, *names: str) -> None:
        self.until(
            lambda: all(self.loops[name].roster_version == roster_version for name in names),
            f"version {roster_version}",
        )

    def rounds_later(self, count: int, *names: str) -> None:
        goals = {name: self.loops[name].peer.round + count for name in names}
        self.until(lambda: all(self.loops[n].peer.round >= at for n, at in goals.items()), "more rounds")

    def close(self) -> None:
        for loop in self.loops.values():
            loop.end()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []

    def make(members: int, places: int | None = None) -> Federation:
        made.append(Federation(tmp_path, members, places))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_joiner_begins_with_the_model_that_a_member_has_in_the_round_of_the_roster(
    federation: Any, tmp_path: Path
) -> None:
    run = federation(2, places=3)
    run.begin("alice", "bob", folder=None)
    run.until(lambda: run.loops["alice"].peer.round >= 2, "two rounds")
    carol = member(tmp_path, 2, "carol")
    from_round = run.change(lambda roster, at: roster.with_member(carol, from_round=at))
    module = model(seed=7)
    peer = run.peer("carol", module=module, bootstrap_from=["bob", "alice"], folder=tmp_path / "kept")
    assert peer.round >= from_round
    torch.testing.assert_close(flat(module), run.start + peer.round, atol=1.01, rtol=0.0)
    run.loops["carol"] = Loop(peer)
    run.until_version(1, "alice", "bob", "carol")
    run.rounds_later(5, "alice", "bob", "carol")
    for loop in run.loops.values():
        assert loop.failure is None
        assert loop.reports[-1].incompatible == loop.reports[-1].suspect == ()
    assert run.loops["alice"]._thread.is_alive()
    for name in ("alice", "bob"):
        assert run.loops[name].peer._driver.peers[2].round > from_round, "its Hello arrived"
    run.loops["carol"].end()
    assert [kept.roster_version for kept in kept_rosters(tmp_path / "kept" / "rosters")] == [1]
    again = run.peer("carol", module=model(seed=9), folder=tmp_path / "kept")
    assert again.round > from_round
    assert float((flat(again.model) - run.start).mean()) > from_round - 5, "the checkpoint is in the model"
    again.close()


def test_who_is_removed_is_told_by_the_end_of_exchange_and_the_others_go_on(federation: Any) -> None:
    run = federation(3)
    run.begin("alice", "bob", "carol")
    run.until(lambda: run.loops["alice"].peer.round >= 2, "two rounds")
    run.change(lambda roster, at: roster.without("bob", from_round=at))
    run.until(lambda: run.loops["bob"].failure is not None, "bob is told")
    failure = run.loops["bob"].failure
    assert isinstance(failure, RemovedError)
    assert "was removed from the roster" in str(failure)
    module = run.loops["bob"].peer.model
    trained = flat(module)
    with pytest.raises(RemovedError):
        run.loops["bob"].peer.exchange(wait=False)
    assert torch.equal(flat(module), trained), "its model stays as it was trained"
    run.until_version(1, "alice", "carol")
    run.rounds_later(5, "alice", "carol")
    late = [report for name in ("alice", "carol") for report in run.loops[name].reports if report.timed_out]
    assert late == [], "nobody waits for it"
    with pytest.raises(ConfigError, match="is the key of no member"):
        run.peer("bob")


def test_who_changes_its_certificate_is_connected_anew(federation: Any, tmp_path: Path) -> None:
    run = federation(2)
    run.begin("alice", "bob")
    run.until(lambda: run.loops["alice"].peer.round >= 2, "two rounds")
    new = renewed("bob", tmp_path / "bob.key", 30)

    def change(roster: Roster, at: int) -> Roster:
        bob = roster.named("bob").model_copy(update={"fingerprint": new.fingerprint, "certificate": new.pem})
        return roster.with_member(bob, replace=True, from_round=at)

    run.change(change)
    run.until_version(1, "alice", "bob")
    run.rounds_later(5, "alice", "bob")
    for loop in run.loops.values():
        assert not any(report.timed_out for report in loop.reports)
        ((_, link),) = loop.peer._transport.report().items()
        assert link.connections >= 2


def test_a_joiner_has_to_say_whose_model_it_begins_with(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2)
    carol = member(tmp_path, 2, "carol")
    key = tmp_path / "carol.key"
    without_room = roster.with_member(carol, from_round=10)
    with pytest.raises(ConfigError, match=r"roster\.places = None: carol joins a run without a free place"):
        jwins.Peer(model(), roster=without_room, key=key, bootstrap_from="alice")
    joined = roster.model_copy(update={"places": 3}).with_member(carol, from_round=10)
    for bootstrap_from in (None, []):
        with pytest.raises(
            ConfigError, match=r"bootstrap_from = .*: carol joins in round 10 and cannot begin with its own"
        ):
            jwins.Peer(model(), roster=joined, key=key, bootstrap_from=bootstrap_from)
    with pytest.raises(ConfigError, match="bootstrap_from = 'carol': expected other members"):
        jwins.Peer(model(), roster=joined, key=key, bootstrap_from=["carol"])
    with pytest.raises(ConfigError, match="bootstrap_from = 'dave': not in the roster"):
        jwins.Peer(model(), roster=joined, key=key, bootstrap_from=["dave"])


@pytest.mark.parametrize(
    "sharing", [closed_loop(step=0.01), stateless(step=0.01)], ids=["closed_loop", "stateless"]
)
def test_who_measures_from_the_common_start_needs_it_and_hears_the_others_rightly(
    sharing: Any, tmp_path: Path, wires: Wires
) -> None:
    roster = roster_of(tmp_path, 2)

    def peer(rank: int, module: Any, **options: Any) -> jwins.Peer:
        key = tmp_path / f"{roster.members[rank].name}.key"
        transport = wires.end(rank)
        return jwins.Peer(module, roster=roster, key=key, sharing=sharing, transport=transport, **options)

    first = peer(0, model(), timeout_s=0.1)
    with pytest.raises(PeerError, match="alice is incompatible: its initial parameters differ"):
        peer(1, model(seed=7), timeout_s=0.1, bootstrap_from="alice")
    first.close()

    first = peer(0, model(), timeout_s=0.1)
    moved(first.model, 8.0)
    first.exchange()  # alone
    for known in first._driver.peers.values():
        known.timeout.timeout_s = 20.0
    second = peer(1, model(), timeout_s=20.0, bootstrap_from="alice")
    assert second.round == 1
    torch.testing.assert_close(flat(second.model), flat(model()) + 8.0)
    until(lambda: first._driver.peers[1].state is State.ACTIVE)
    moved(first.model, 4.0)
    both = [threading.Thread(target=one.exchange, daemon=True) for one in (first, second)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60.0)
        assert not thread.is_alive()
    for one in (first, second):
        torch.testing.assert_close(flat(one.model), flat(model()) + 10.0, atol=0.05, rtol=0.0)
        one.close()
