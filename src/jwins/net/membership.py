"""Membership that follows the roster's file while a node runs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jwins.errors import ConfigError
from jwins.net.certificate import is_signature, sign
from jwins.net.index_map import IndexMap
from jwins.net.journal import Journal
from jwins.net.limits import Limits
from jwins.net.roster import Roster, read_roster, write_roster
from jwins.net.roster_versions import RosterVersions
from jwins.net.transport import TlsTransport
from jwins.topology import Topology
from jwins.wire.frame import NONCE_BYTES, Wire, max_frame_bytes

_LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Change:
    """Changes of a new roster, for the driver.

    Attributes:
        roster_version: version of the new roster.
        from_round: the round from which this node uses its graph.
    """

    roster_version: int
    from_round: int
    joined: frozenset[int]
    removed: frozenset[int]


class Membership:
    """Membership: graphs, connections and names, which follow the roster's file.

    A change that cannot be followed is an error in the journal, and the node continues as before.

    Args:
        path: path of the file, which is checked once a second. None to use ``roster`` until the end.
        num_nodes: largest number of members, including former and future ones.
        build: returns the topology for a number of nodes.
        folder: folder for the used rosters, which a restart needs; None keeps none.

    Attributes:
        names: names of the nodes by number.
        nonce: random bytes of this process, see :class:`~jwins.net.witnesses.Signatures`.

    Raises:
        ConfigError: the roster cannot follow those in ``folder``, or has no graph.
        OSError: the roster cannot be kept.
    """

    def __init__(
        self,
        path: Path | None,
        roster: Roster,
        id: int,
        key_file: Path,
        *,
        num_nodes: int,
        build: Callable[[int], Topology],
        folder: Path | None,
        journal: Journal,
    ) -> None:
        self._path, self._given, self._id, self._key_file = path, roster, id, key_file
        self._num_nodes, self._folder, self._journal = num_nodes, folder, journal
        kept = [] if folder is None else kept_rosters(folder)
        if folder is not None and not kept:
            keep_roster(roster, roster.from_round, folder)
        every = kept or [roster]
        self._roster = every[-1]
        check_follows(self._roster, roster, num_nodes)
        self.node = roster.ids_ever.index(id)
        self.names = names_of(self._roster, num_nodes)
        self.topology = RosterVersions(num_nodes, build)
        for old in every:
            self.topology.add(
                old.roster_version, old.from_round, [old.ids_ever.index(member) for member in old.ids]
            )
        self._links: tuple[TlsTransport, IndexMap] | None = None
        self._changing = False
        self._look_at = 0.0
        self._seen: tuple[int, ...] = ()
        self._problem = ""
        self._begins = True
        self.nonce = os.urandom(NONCE_BYTES)

    def connect(
        self,
        wire: Wire,
        greeting: bytes = b"",
        *,
        listen: str | None,
        changing: bool,
        also: Iterable[int] = (),
    ) -> IndexMap:
        """Return the connections with the other members, by number; not started yet.

        Args:
            wire: wire of the experiment: its longest frame is the longest message.
            greeting: see :func:`~jwins.net.handshake.pack_greeting`; b"" for the digest alone.
            listen: host:port to listen on, if it is not the roster's.
            changing: whether neighbours change from round to round, so that all members are dialled.
            also: other nodes to dial, until the roster changes.

        Raises:
            ConfigError: this node's key and certificate do not match, or are invalid.
        """
        self._changing = changing
        wanted = self._wanted(self._given, 0)
        dial = None if wanted is None else wanted | {self._given.ids_ever[node] for node in also}
        transport = TlsTransport(
            self._given,
            self._id,
            self._key_file,
            greeting=greeting or wire.digest,
            limits=Limits.of_messages(max_frame_bytes(wire.dim)),
            listen=listen,
            dial=dial,
        )
        by_index = IndexMap(transport, self._given.ids_ever)
        self._links = (transport, by_index)
        return by_index

    def _wanted(self, roster: Roster, round: int) -> set[int] | None:
        """Return the ids of peers whose connections stay from ``round`` on; None for all."""
        if self._changing:
            return None
        return {roster.ids_ever[node] for node in self.topology.neighbours(self.node, round)}

    def sign(self, data: bytes) -> bytes:
        """Return this node's signature, or b"" if its key cannot be read now."""
        try:
            return sign(self._key_file, data)
        except ConfigError:
            return b""

    def verify(self, node: int, data: bytes, signature: bytes) -> bool:
        """Return whether a node, a member of the newest roster, has signed ``data``."""
        roster, ids = self._roster, self._roster.ids_ever
        is_member = node < len(ids) and ids[node] in roster
        return is_member and is_signature(signature, data, roster[ids[node]].x509.public_key)

    def look(self, next_round: int) -> Change | None:
        """Change to the file's roster if the file has changed; without a file, to the given one, once.

        Args:
            next_round: the first round for which this node has not shared anything yet.

        Returns:
            The changes, or None without any.
        """
        now = time.monotonic()
        if now < self._look_at:
            return None
        self._look_at = now + (math.inf if self._path is None else _LOOK_EVERY_S)
        try:
            if self._path is None:
                return self._follow(self._given, next_round)
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
        check_follows(old, new, self._num_nodes)
        number = {member: at for at, member in enumerate(new.ids_ever)}
        known = before = set(old.ids)
        if self._begins:  # an earlier process may have kept the roster, but not who joined and who was removed
            known, before = {member.id for member in new.members if not member.since_round}, set(new.ids_ever)
        self._begins = False
        joined = frozenset(number[member] for member in set(new.ids) - known)
        removed = frozenset(number[member] for member in before - set(new.ids))
        from_round = max(new.from_round, next_round if new.roster_version > old.roster_version else 0)
        if new == old:
            return Change(new.roster_version, from_round, joined, removed) if joined or removed else None
        if self._id in new:
            if new.roster_version > old.roster_version:
                self._take_up(new, from_round, [number[member] for member in new.ids])
            if self._links is not None:
                transport, by_index = self._links
                transport.update(new, key_file=self._key_file, dial=self._wanted(new, next_round - 1))
                by_index.ids = new.ids_ever
            for node in joined:
                self.names[node] = new[new.ids_ever[node]].name
        self._roster = new
        self._journal.info(
            "roster",
            roster_version=new.roster_version,
            from_round=from_round,
            joined=[self.names[node] for node in sorted(joined)],
            removed=[self.names[node] for node in sorted(removed)],
        )
        return Change(new.roster_version, from_round, joined, removed)

    def _take_up(self, roster: Roster, from_round: int, active: list[int]) -> None:
        """Change to the new graph, once; removed members are cut even if there is no graph."""
        if self.topology.newest == roster.roster_version:
            return  # it was taken up before, and then this node's key did not fit
        try:
            self.topology.add(roster.roster_version, from_round, active)
            if self._folder is not None:
                keep_roster(roster, from_round, self._folder)
        except (ConfigError, OSError) as error:
            self._journal.error("roster", problem=str(error))


def check_follows(old: Roster, new: Roster, num_nodes: int) -> None:
    """Refuse a roster to which running nodes cannot change.

    Raises:
        ConfigError: with the problem and the remedy.
    """
    if new.roster_version < old.roster_version:
        problem = f"nodes use roster version {old.roster_version} already; change the newest roster"
        raise ConfigError("roster_version", new.roster_version, problem)
    if new.roster_version == old.roster_version and (new.ids, new.departed) != (old.ids, old.departed):
        problem = "members have changed without a new roster version; change the roster with --from-round"
        raise ConfigError("roster_version", new.roster_version, problem)
    if new.ids_ever[: len(old.ids_ever)] != old.ids_ever:
        problem = f"expected {list(old.ids_ever)}, then new ids; ids of former members stay in departed"
        raise ConfigError("members", list(new.ids_ever), problem)
    if common_of(new) != common_of(old):
        problem = "a run keeps its topology and seed; use those of the previous roster"
        raise ConfigError("topology, seed", common_of(new), problem)
    if len(new.ids_ever) > num_nodes:
        problem = f"expected at most {num_nodes} with former members (nodes.count, or places of the roster)"
        raise ConfigError("members", len(new.ids_ever), problem)


def common_of(roster: Roster) -> tuple[dict[str, Any], int]:
    """Return the settings in the roster that peers in their own loops must share."""
    topology = roster.topology.model_dump(mode="json")
    topology.pop("path", None)  # the file is the same on every machine, but its path may differ
    return topology, roster.seed


def names_of(roster: Roster, num_nodes: int) -> list[str]:
    """Return the nodes' names by number, those of future members included."""
    known = {member.id: member.name for member in roster.members}
    names = [known.get(member, f"id {member}, which left") for member in roster.ids_ever]
    return [*names, *(f"node {node}, to join" for node in range(len(names), num_nodes))]


def keep_roster(roster: Roster, from_round: int, folder: Path) -> None:
    """Keep a roster for a restart of this node, with the round from which the node uses it.

    Raises:
        OSError: e.g. a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = roster.model_copy(update={"from_round": from_round})
    write_roster(kept, folder / f"version-{roster.roster_version:08d}.toml")


def kept_rosters(folder: Path) -> list[Roster]:
    """Return the rosters that a node has used, oldest first; see :func:`keep_roster`.

    Raises:
        ConfigError: a file there is damaged.
    """
    return [read_roster(path) for path in sorted(folder.glob("version-*.toml"))]
