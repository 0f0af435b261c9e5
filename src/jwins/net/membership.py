"""Who takes part, kept up with the roster's file while a node runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jwins.errors import ConfigError
from jwins.net.epochs import Epochs
from jwins.net.journal import Journal
from jwins.net.ranks import ByRank
from jwins.net.roster import Roster, read_roster, write_roster
from jwins.net.transport import Transport

__all__ = ["Change", "Membership", "check_follows", "keep_roster", "kept_rosters", "names_of"]

_LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Change:
    """What a clock must know of a new roster.

    Attributes:
        epoch: of it.
        from_round: the round from which this node mixes by it.
        joined: nodes that are new.
        removed: nodes that are gone.
    """

    epoch: int
    from_round: int
    joined: frozenset[int]
    removed: frozenset[int]


class Membership:
    """Watches the roster's file, and lets the network and the graphs follow it.

    A change that cannot be followed is an error in the journal, and the node goes on as before.

    Args:
        path: of the file; looked at once a second. None to go by ``roster`` until the end.
        roster: by which the node goes now.
        id: of this node.
        key_file: its private key.
        num_nodes: how many the experiment has.
        topology: the graphs; has those of ``roster``.
        transport: cuts and dials.
        network: the same by number.
        folder: where rosters are kept for a restart.
        partners: with whom a node keeps connections, given its number; None for all.
        journal: told what happens.

    Attributes:
        names: of the nodes by number.
    """

    def __init__(
        self,
        path: Path | None,
        roster: Roster,
        id: int,
        key_file: Path,
        *,
        num_nodes: int,
        topology: Epochs,
        transport: Transport,
        network: ByRank,
        folder: Path,
        partners: Callable[[int], frozenset[int] | None],
        journal: Journal,
    ) -> None:
        self._path, self._roster, self._id, self._key_file = path, roster, id, key_file
        self._num_nodes, self._topology = num_nodes, topology
        self._transport, self._network = transport, network
        self._folder, self._partners, self._journal = folder, partners, journal
        self.names = names_of(roster, num_nodes)
        self._look_at = 0.0
        self._seen: tuple[int, ...] = ()
        self._problem = ""

    def look(self, next_round: int) -> Change | None:
        """Follow the file if it has changed.

        Args:
            next_round: the first round for which this node has not shared anything yet.

        Returns:
            What has changed; None if nothing has.
        """
        now = time.monotonic()
        if self._path is None or now < self._look_at:
            return None
        self._look_at = now + _LOOK_EVERY_S
        try:
            stat = os.stat(self._path)
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen == self._seen:
                return None
            change = self._follow(read_roster(self._path), next_round)
            self._seen, self._problem = seen, ""
        except (ConfigError, OSError) as error:  # the next look may find the file, or the key, as it should be
            if str(error) != self._problem:
                self._problem = str(error)
                self._journal.error("roster", problem=self._problem)
            return None
        return change

    def _follow(self, new: Roster, next_round: int) -> Change | None:
        old = self._roster
        if new == old:
            return None
        check_follows(old, new, self._num_nodes)
        number = {member: at for at, member in enumerate(new.ids_ever)}
        joined = frozenset(number[member] for member in set(new.ids) - set(old.ids))
        removed = frozenset(number[member] for member in set(old.ids) - set(new.ids))
        from_round = max(new.from_round, next_round)
        if self._id in new:
            if new.epoch > old.epoch:
                self._take_up(new, from_round, [number[member] for member in new.ids])
            partners = self._partners(number[self._id])
            dial = None if partners is None else {new.ids_ever[node] for node in partners}
            self._transport.update(new, key_file=self._key_file, dial=dial)
            self._network.ids = new.ids_ever
            for node in joined:
                self.names[node] = new[new.ids_ever[node]].name
        self._roster = new
        self._journal.info(
            "roster",
            epoch=new.epoch,
            from_round=from_round,
            joined=[self.names[node] for node in sorted(joined)],
            removed=[self.names[node] for node in sorted(removed)],
        )
        return Change(new.epoch, from_round, joined, removed)

    def _take_up(self, roster: Roster, from_round: int, active: list[int]) -> None:
        """Mix by the new graph; without one, whoever left is cut all the same."""
        try:
            self._topology.add(roster.epoch, from_round, active)
            keep_roster(roster, from_round, self._folder)
        except (ConfigError, OSError) as error:
            self._journal.error("roster", problem=str(error))


def check_follows(old: Roster, new: Roster, num_nodes: int) -> None:
    """Refuse a roster that nodes which go by another cannot take up while they run.

    Args:
        old: by which they go.
        new: that is to follow.
        num_nodes: how many the experiment has.

    Raises:
        ConfigError: says what is wrong, and what to do.
    """
    if new.epoch < old.epoch:
        raise ConfigError(
            "epoch", new.epoch, f"nodes go by epoch {old.epoch} already; change the newest roster"
        )
    if new.epoch == old.epoch and (new.ids, new.departed) != (old.ids, old.departed):
        problem = "members have changed and the epoch has not; change the roster with --from-round"
        raise ConfigError("epoch", new.epoch, problem)
    if new.ids_ever[: len(old.ids_ever)] != old.ids_ever:
        problem = f"expected {list(old.ids_ever)} and then new ones; ids of those who left are in departed"
        raise ConfigError("members", list(new.ids_ever), problem)
    if len(new.ids_ever) > num_nodes:
        problem = f"the experiment has nodes.count = {num_nodes}, those who left among them"
        raise ConfigError("members", len(new.ids_ever), problem)


def names_of(roster: Roster, num_nodes: int) -> list[str]:
    """What the nodes are called, by number; also those that are to join."""
    names = roster.names_ever
    return [*names, *(f"node {node}, to join" for node in range(len(names), num_nodes))]


def keep_roster(roster: Roster, from_round: int, folder: Path) -> None:
    """Keep a roster for a restart of this node, with the round in which the node takes it up.

    Raises:
        OSError: e.g. a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = roster.model_copy(update={"from_round": from_round})
    write_roster(kept, folder / f"epoch-{roster.epoch:08d}.toml")


def kept_rosters(folder: Path) -> list[Roster]:
    """Those that a node has gone by so far, oldest first; see :func:`keep_roster`.

    Raises:
        ConfigError: a file there is damaged.
    """
    return [read_roster(path) for path in sorted(folder.glob("epoch-*.toml"))]
