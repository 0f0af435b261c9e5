"""The roster: members with addresses and certificates, in the same file on every machine."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from jwins.errors import ConfigError, UsageError
from jwins.experiment.error_messages import nearest
from jwins.experiment.field_types import Index, OneOf
from jwins.experiment.plugins import TOPOLOGY_TABLES, FullyConnectedConfig, TopologyTable
from jwins.experiment.settings import Settings
from jwins.experiment.toml import read_toml, toml_text, write_toml
from jwins.net.certificate import Certificate, check_name, new_identity, read_certificate
from jwins.validation import Within

if TYPE_CHECKING:
    from jwins.topology import Topology

MAX_MEMBERS = 10_000
MAX_ID = 2**31 - 1
SOON = datetime.timedelta(days=30)
"""Time before its expiry at which a certificate should be replaced."""


class Member(Settings):
    """A member of the roster: one node."""

    id: Annotated[int, Within("a node's id", 0, MAX_ID)] = Field(description="unique id; never used again")
    name: str = Field(description="unique name")
    address: str = Field(description="host:port at which other members dial it")
    reachable: bool = Field(
        default=True,
        description="false: behind a firewall or NAT; it dials the others, and they cannot dial it",
    )
    fingerprint: str = Field(description="SHA-256 of the certificate, 64 hexadecimal digits")
    certificate: str = Field(description="certificate in PEM form; no other is accepted from this node")
    since_round: Index = Field(default=0, description="round in which it joined a run; 0 for the first members")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_name("name", self.name)
        split_address("address", self.address)
        found = self.x509.fingerprint
        if plain(self.fingerprint) != found:
            problem = f"the certificate beside it has {found}; ask {self.name} which one is right"
            raise ConfigError("fingerprint", self.fingerprint, problem)
        return self

    @classmethod
    def new(cls, id: int, name: str, address: str, keys: Path, *, reachable: bool = True) -> Self:
        """Make a member with a new key and certificate in the folder ``keys``.

        Raises:
            ConfigError: as for :func:`~jwins.net.certificate.new_identity`, or not an address.
        """
        _, _, certificate = new_identity(name, keys)
        return cls(
            id=id,
            name=name,
            address=address,
            reachable=reachable,
            fingerprint=certificate.fingerprint,
            certificate=certificate.pem,
        )

    @property
    def x509(self) -> Certificate:
        """Return the content of the certificate."""
        return read_certificate(self.certificate, "certificate")

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Return host and port to dial."""
        return split_address("address", self.address)


class Roster(Settings):
    """Members and their graph.

    A changed roster has a higher version and names the round from which it is in effect, so that all nodes
    change their mixing weights in the same round. A member's place in the graph is its rank by id. Its number
    as a node is its rank among all present and former members, so that it never changes.
    """

    roster_version: Index = Field(default=0, description="version; each change during a run raises it by one")
    from_round: Index = Field(default=0, description="round from which this version is in effect")
    places: Annotated[int, Within("a number of nodes", 1)] | None = Field(
        default=None,
        description="final number of members, if some join later; with `jwins node` it is nodes.count; "
        "left out: all are listed",
    )
    departed: Annotated[tuple[Index, ...], Field(strict=False, max_length=MAX_MEMBERS)] = Field(
        default=(), description="ids of members that left during a run"
    )
    seed: Annotated[int, Within("a signed 64-bit number", -(2**63), 2**63 - 1)] = Field(
        default=1, description="seed of the topology and of all other draws that nodes have in common"
    )
    topology: Annotated[TopologyTable, OneOf(TOPOLOGY_TABLES)] = Field(
        default=FullyConnectedConfig(), description="communication graph, as in an experiment"
    )
    members: Annotated[tuple[Member, ...], Field(strict=False, max_length=MAX_MEMBERS)] = Field(
        default=(), description="members, one table each"
    )

    @model_validator(mode="after")
    def _all_differ(self) -> Self:
        for key, of in (
            ("id", lambda m: m.id),
            ("name", lambda m: m.name),
            ("fingerprint", lambda m: plain(m.fingerprint)),
        ):
            seen: dict[object, int] = {}
            for index, member in enumerate(self.members):
                value = of(member)
                if value in seen:
                    problem = f"members[{seen[value]}] has the same; each member needs its own"
                    raise ConfigError(f"members[{index}].{key}", value, problem)
                seen[value] = index
        if used := sorted({member.id for member in self.members} & set(self.departed)):
            problem = "is the id of a current member, too; ids are never reused, so give the member a new one"
            raise ConfigError("departed", used[0], problem)
        return self

    def __contains__(self, id: object) -> bool:
        return any(member.id == id for member in self.members)

    def __getitem__(self, id: int) -> Member:
        for member in self.members:
            if member.id == id:
                return member
        raise UsageError(f"id = {id}: no member of the roster has it; ids are {', '.join(map(str, self.ids))}")

    @property
    def ids(self) -> tuple[int, ...]:
        """Return the ids of all members, increasing; the position is a member's index in the topology."""
        return tuple(sorted(member.id for member in self.members))

    @property
    def ids_ever(self) -> tuple[int, ...]:
        """Return the ids of all present and former members, increasing; the position is a node's number."""
        return tuple(sorted((*self.ids, *self.departed)))

    @property
    def num_places(self) -> int:
        """Return the number of places, including former and future members."""
        return len(self.ids_ever) if self.places is None else self.places

    @property
    def digest(self) -> str:
        """Return a hash of everything but addresses, 64 hexadecimal digits, for comparing rosters."""
        topology = self.topology.model_dump(mode="json")
        topology.pop("path", None)
        tables = {**self._head(), "topology": topology}
        members = [
            f"{m.id} {m.name} {plain(m.fingerprint)}" + (f" {m.since_round}" if m.since_round else "")
            for m in sorted(self.members, key=lambda m: m.id)
        ]
        return hashlib.sha256("\n".join([write_toml(tables), *members]).encode()).hexdigest()

    def _head(self) -> dict[str, Any]:
        """Return all keys except topology and members; empty ones are left out."""
        head: dict[str, Any] = {
            "roster_version": self.roster_version,
            "from_round": self.from_round,
            "seed": self.seed,
        }
        if self.places is not None:
            head["places"] = self.places
        if self.departed:
            head["departed"] = list(self.departed)
        return head

    def named(self, name: str, place: str = "NAME") -> Member:
        """Return the member with this name; ``place`` is the setting that errors name.

        Raises:
            ConfigError: there is none.
        """
        for member in self.members:
            if member.name == name:
                return member
        known = [member.name for member in self.members]
        raise ConfigError(
            place, name, f"not in the roster{nearest(name, known) or ';'} it has {_listed(known)}"
        )

    def owner_of(self, key_file: Path) -> Member:
        """Return the member whose certificate belongs to a private key.

        Raises:
            ConfigError: the key cannot be used, or belongs to no member.
        """
        from jwins.net.certificate import read_key

        public = read_key(key_file)
        for member in self.members:
            if member.x509.public_key == public:
                return member
        remedy = "add its certificate with `jwins roster add`, or pass another key"
        raise ConfigError("key", str(key_file), f"is the key of no member of the roster; {remedy}")

    def build_topology(self) -> Topology:
        """Build the graphs over the members' ranks by id.

        Raises:
            ConfigError: there is no such graph, or it joins two members that cannot dial each other.
        """
        if not self.members:
            raise ConfigError("members", [], "expected at least one; add members with `jwins roster add`")
        topology = self.topology.build(num_nodes=len(self.members), seed=self.seed)
        apart = {rank for rank, node in enumerate(self.ids) if not self[node].reachable}
        for i, j in sorted(pair for pair in self._pairs(topology) if apart.issuperset(pair)):
            a, b = self[self.ids[i]].name, self[self.ids[j]].name
            raise ConfigError(
                "topology.kind",
                self.topology.kind,
                f"makes {a} and {b} neighbours, and neither can be dialled (reachable = false); make one "
                "reachable by a forwarded port or a tunnel, or choose a graph in which they are not neighbours",
            )
        return topology

    def _pairs(self, topology: Topology) -> set[tuple[int, int]]:
        """Return the pairs of ranks that are ever neighbours; in a changing graph, all pairs."""
        if not self.topology.changes:
            return {(min(edge), max(edge)) for edge in topology.at(0).edges}
        count = len(self.members)
        return {(i, j) for i in range(count) for j in range(i + 1, count)}

    def neighbours(self, id: int) -> tuple[int, ...]:
        """Return all ids that ``id`` exchanges with in some round, increasing."""
        rank = self.ids.index(self[id].id)
        pairs = self._pairs(self.build_topology())
        return tuple(self.ids[j if i == rank else i] for i, j in sorted(pairs) if rank in (i, j))

    def problems(self, now: datetime.datetime | None = None) -> Iterator[str]:
        """Return the problems that keep the members from working together, each with its remedy."""
        now = now or datetime.datetime.now(datetime.UTC)
        for member in sorted(self.members, key=lambda m: m.id):
            where, certificate = f"{member.name} (id {member.id})", member.x509
            remedy = f"make a new one with `jwins keys renew {member.name}`, then `jwins roster add --replace`"
            if problem := certificate.problem(now):
                yield f"{where}: its certificate is {problem}; {remedy}"
            if certificate.name != member.name:
                yield f"{where}: its certificate names {certificate.name!r}; is it the right one?"
        addresses: dict[str, str] = {}
        for member in self.members:
            if member.reachable and (other := addresses.setdefault(member.address, member.name)) != member.name:
                yield f"{member.name} and {other} have the same address {member.address}; one of them is wrong"
        try:
            self.build_topology()
        except ConfigError as error:
            yield str(error)

    def warnings(self, now: datetime.datetime | None = None) -> Iterator[str]:
        """Return a text for each certificate that expires within 30 days."""
        now = now or datetime.datetime.now(datetime.UTC)
        for member in self.members:
            expires = member.x509.not_after
            if now <= expires < now + SOON:
                yield f"{member.name} (id {member.id}): its certificate expires on {expires:%Y-%m-%d %H:%M} UTC"

    def with_member(self, member: Member, *, replace: bool = False, from_round: int | None = None) -> Roster:
        """Return a copy with another member.

        Args:
            member: the joiner, or the changed entry of a member.
            replace: whether a member of the same name is replaced.
            from_round: if nodes run already, the round from which the change is in effect.

        Raises:
            ConfigError: such a member is there already.
        """
        others = [old for old in self.members if old.name != member.name]
        if len(others) < len(self.members) and not replace:
            raise ConfigError(
                "NAME", member.name, "is in the roster already; use --replace to change its entry"
            )
        if from_round is not None and member.id not in self:
            if member.id <= max(self.ids_ever, default=-1):
                problem = f"expected more than {max(self.ids_ever)}, the highest id ever used"
                raise ConfigError("--id", member.id, problem)
            member = member.model_copy(update={"since_round": from_round})
        elif member.id in self:
            member = member.model_copy(update={"since_round": self[member.id].since_round})
        return self._changed([*others, member], from_round)

    def without(self, name: str, *, from_round: int | None = None) -> Roster:
        """Return a copy without a member; its id is never used again.

        Raises:
            ConfigError: there is no member of this name.
        """
        gone = self.named(name)
        return self._changed([member for member in self.members if member != gone], from_round)

    def _changed(self, members: Iterable[Member], from_round: int | None) -> Roster:
        roster_version = self.roster_version if from_round is None else self.roster_version + 1
        start = self.from_round if from_round is None else from_round
        if from_round is not None and from_round <= self.from_round and self.roster_version > 0:
            problem = f"the last change is of round {self.from_round}; name a later round"
            raise ConfigError("--from-round", from_round, problem)
        members = tuple(sorted(members, key=lambda m: m.id))
        gone = set() if from_round is None else set(self.ids) - {member.id for member in members}
        return Roster(
            roster_version=roster_version,
            from_round=start,
            places=self.places,
            departed=tuple(sorted({*self.departed, *gone})),
            seed=self.seed,
            topology=self.topology,
            members=members,
        )


def providers_of(roster: Roster, me: Member, names: Sequence[str]) -> list[int]:
    """Return the numbers of the members that provide the model of ``me``; its own name is skipped.

    Raises:
        ConfigError: no such member, or none but ``me``.
    """
    others = [name for name in names if name != me.name]
    if names and not others:
        raise ConfigError(
            "bootstrap_from", me.name, "expected other members, which provide the model to begin with"
        )
    return [roster.ids_ever.index(roster.named(name, "bootstrap_from").id) for name in others]


def plain(fingerprint: str) -> str:
    """Return a fingerprint as 64 lower-case digits, without the capitals, colons or prefix that it may have."""
    return re.sub(r"^sha-?256[:=]", "", fingerprint.strip().lower()).replace(":", "").replace(" ", "")


def split_address(path: str, address: str) -> tuple[str, int]:
    """Return host and port of an address such as ``10.0.0.7:7420`` or ``[fd00::7]:7420``.

    Raises:
        ConfigError: the text is not such an address.

    >>> split_address("address", "[::1]:7420")
    ('::1', 7420)
    """
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/@]+)):(\d{1,5})", address)
    if found is None or not 1 <= int(found[3]) <= 65535:
        raise ConfigError(path, address, "expected host:port, such as 10.0.0.7:7420 or [fd00::7]:7420")
    return found[1] or found[2], int(found[3])


def read_roster(path: Path) -> Roster:
    """Read a roster from its file.

    Raises:
        ConfigError: no such file, or not a roster; with place and remedy.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("roster", str(path), f"not UTF-8 text ({error.reason})") from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); `jwins roster add` makes one"
        raise ConfigError("roster", str(path), problem) from None
    tables = read_toml(text, str(path))
    topology = tables.get("topology")
    if isinstance(topology, dict) and isinstance(topology.get("path"), str):
        topology["path"] = str(path.resolve().parent / topology["path"])
    try:
        return Roster(**tables)
    except ConfigError as error:
        error.add_note(f"in {path}")
        raise


def write_roster(roster: Roster, path: Path) -> None:
    """Write a roster atomically.

    Raises:
        OSError: e.g. a full disk.
    """
    from jwins.run_folder.atomic import write_atomically

    blocks = [write_toml({**roster._head(), "topology": roster.topology.model_dump(mode="json")})]
    for member in roster.members:
        silent = {"certificate"} if member.since_round else {"certificate", "since_round"}
        lines = [f"{key} = {toml_text(value)}" for key, value in member.model_dump(exclude=silent).items()]
        # A PEM text needs no escaping, and its own lines can be compared by eye.
        blocks.append("\n".join(["[[members]]", *lines, f'certificate = """\n{member.x509.pem}"""', ""]))
    write_atomically(path, "\n".join(blocks).encode())


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "no members"
