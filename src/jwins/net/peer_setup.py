"""Set-up of a peer in the user's own loop, from the arguments of :class:`jwins.Peer`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor, nn

from jwins.engines.memory import ExchangeMemory
from jwins.engines.node_group import NodeGroup
from jwins.engines.recorder import Recorder
from jwins.engines.sharing_check import check_sharing, is_own
from jwins.errors import ConfigError
from jwins.experiment.field_types import NAMELESS, nameless
from jwins.experiment.plugins import FullyConnectedConfig
from jwins.net.driver import RealTimeDriver
from jwins.net.external_training import ExternalTraining
from jwins.net.handshake import BOOTSTRAPPED, pack_greeting
from jwins.net.journal import Journal
from jwins.net.membership import Membership
from jwins.net.peer_settings import (
    check_arguments,
    check_resumable,
    digest_of_run,
    hash_of_layout,
    selected,
    settings_of_run,
)
from jwins.net.roster import Member, Roster, providers_of, read_roster
from jwins.net.status import ENDLESS, StatusFile
from jwins.net.transport_interface import Transport
from jwins.node import MAX_MAGNITUDE_RATIO, Rules, Staleness
from jwins.run_folder.rows import StartRow
from jwins.sharing import CommonDemo, CommonSparseLoco, Nesterov, Sharing
from jwins.sharing import jwins as jwins_sharing
from jwins.sharing.calls import call_for_model
from jwins.training.layout import BufferPolicy, Layout
from jwins.wire.codec import codec as codec_named
from jwins.wire.frame import Wire

if TYPE_CHECKING:
    from jwins.training.trainer import Trainer


@dataclass(frozen=True, eq=False)
class Arguments:
    """Arguments of :class:`jwins.Peer`.

    Raises:
        ConfigError: for the first one that is of a wrong type or out of range.
    """

    model: nn.Module
    roster: Roster | Path | str
    key: Path | str
    sharing: Sharing[Any] | None
    outer: Nesterov | None
    params: Collection[str] | Callable[[str], bool] | None
    buffers: BufferPolicy
    bootstrap_from: str | Sequence[str] | None
    codec: str
    timeout_s: float
    folder: Path | str | None
    metrics_port: int | None
    listen: str | None
    mode: Literal["sync", "async"]
    max_staleness: int
    transport: Transport | None

    def __post_init__(self) -> None:
        check_arguments(vars(self))

    @property
    def staleness(self) -> Staleness | None:
        """Return the rule for stale updates; None if peers wait for each other."""
        return Staleness(self.max_staleness) if self.mode == "async" else None


class PeerSetup:
    """A peer's components before it starts: no thread runs, no port is open, and no file is written.

    Attributes:
        layout: layout of the exchanged vector.
        place: the folder, or None.
        going_on: whether the folder has a checkpoint.
        providers: numbers of the members that may provide the model to begin with.
        status: writer of ``status.json``; None without a folder.

    Raises:
        ConfigError, ResumeError, UsageError: as :class:`jwins.Peer`.
    """

    def __init__(self, given: Arguments) -> None:
        self._given = given
        self._file = None if isinstance(given.roster, Roster) else Path(given.roster)
        self._roster = read_roster(self._file) if self._file is not None else cast(Roster, given.roster)
        self.me = self._roster.owner_of(Path(given.key))
        self._roster.build_topology()
        self.layout = selected(Layout.of(given.model, given.buffers, convert=True), given.params)
        self.place = None if given.folder is None else Path(given.folder)
        self.going_on = self.place is not None and any((self.place / "checkpoints").glob("round-*.safetensors"))
        self.providers = [] if self.going_on else _providers(self._roster, self.me, given.bootstrap_from)
        self._journal = Journal(self.me.name)
        self._membership = self._make_membership()
        self.names = self._membership.names
        self._sharing = jwins_sharing() if given.sharing is None else given.sharing
        self._initial: Tensor = self.layout.flatten(given.model).cpu()
        topology = self._roster.topology
        if isinstance(self._sharing, CommonSparseLoco) and not isinstance(topology, FullyConnectedConfig):
            problem = "left out, it needs a complete graph; give it, or use a roster of kind fully_connected"
            raise ConfigError("sharing.gamma", None, problem)
        if isinstance(self._sharing, CommonDemo):
            problem = "left out, each lost frame would change this peer's model for good; give gamma, not lr"
            raise ConfigError("sharing.gamma", None, problem)
        if is_own(self._sharing):  # before a port is opened
            if cls := nameless(self._sharing):
                raise ConfigError("Peer.sharing", self._sharing, NAMELESS.format(cls=cls))
            check_sharing(self._for_model(), self._initial, self._membership.topology, self._roster.seed)
        if given.staleness is not None and self._roster.topology.changes:
            problem = "needs the same neighbours in all rounds; use a roster whose topology does not change"
            raise ConfigError("mode", "async", problem)
        run = (self._roster, self._sharing, given.codec, given.outer, given.staleness)
        self._digest = digest_of_run(*run)
        self._agreed = {"layout": hash_of_layout(self.layout)}
        if self.place is not None and self.going_on:
            check_resumable(self.place, self._digest, self._agreed)
        self._greeting = pack_greeting(self._digest, settings_of_run(*run))
        self._rules = self._make_rules()
        senders = self._membership.topology.at(self.me.since_round).senders[self._membership.node]
        ExchangeMemory.of(self._for_model(), self.layout.size, len(senders)).check("Peer.model")
        self.transport = given.transport or self._membership.connect(
            self._rules.wire,
            self._greeting,
            listen=given.listen,
            changing=self._roster.topology.changes,
            also=self.providers,
        )
        self.training = ExternalTraining(self._membership.node, self.layout, self._initial)
        self.status = None if self.place is None else StatusFile(self.place / "status.json", self.names)

    def _make_membership(self) -> Membership:
        roster = self._roster
        return Membership(
            self._file,
            roster,
            self.me.id,
            Path(self._given.key),
            num_nodes=roster.num_places,
            build=lambda count: roster.topology.build(num_nodes=count, seed=roster.seed),
            folder=None if self.place is None else self.place / "rosters",
            journal=self._journal,
        )

    def _for_model(self) -> Sharing[Any]:
        return call_for_model(self._sharing, tuple(slot.shape for slot in self.layout.slots))

    def _make_rules(self) -> Rules:
        layout = self.layout
        return Rules(
            self._for_model(),
            Wire(codec_named(self._given.codec), self._digest, self._sharing.update_dim(layout.size)),
            self._membership.topology,
            rounds=ENDLESS,
            seed=self._roster.seed,
            checkpoint_every=0 if self.place is None else 1,
            outer=self._given.outer,
            staleness=self._given.staleness,
            project=layout.project_ if layout.has_variances else None,
        ).among_strangers(MAX_MAGNITUDE_RATIO, changing=self._roster.topology.changes)

    def make_driver(self, stop: Callable[[], bool], farewell: Callable[[], str]) -> RealTimeDriver:
        """Make the driver that runs the peer until ``stop``, and sends a Bye with the reason ``farewell``."""
        timeout_s = self._given.timeout_s
        starts_alike = not self.providers or self._sharing.needs_common_start
        return RealTimeDriver(
            NodeGroup(cast("Trainer", self.training), self._rules),
            self.transport,
            start=self._start_row(),
            names=self.names,
            agreed=self._agreed,
            greeting=self._greeting,
            x0=None if starts_alike else BOOTSTRAPPED,
            bootstrap_from=self.providers,
            joins_at=self.me.since_round or None,
            changes=self._membership.look,
            timeout_s=timeout_s,
            flush_s=max(5.0, timeout_s),
            recorder=Recorder(self.place),
            on_progress=self.status,
            stop=stop,
            farewell=farewell,
            journal=self._journal,
            signatures=self._membership,
        )

    def _start_row(self) -> StartRow:
        return StartRow(
            self.me.name,
            self._digest.hex(),
            self._roster.seed,
            len(self.names),
            self.layout.size,
            0.0,
            {},
            {},
            dict(self._agreed),
            "own loop",
            "wall",
        )


def _providers(members: Roster, me: Member, bootstrap_from: str | Sequence[str] | None) -> list[int]:
    """Return the numbers of the providers; a joiner must name some."""
    if me.since_round and members.places is None:
        problem = f"{me.name} joins a run without a free place; set places to the largest number of members"
        raise ConfigError("roster.places", None, problem)
    if me.since_round and not bootstrap_from:
        problem = f"{me.name} joins in round {me.since_round} and cannot begin with its own model"
        raise ConfigError("bootstrap_from", bootstrap_from, f"{problem}; name members that provide theirs")
    return providers_of(
        members, me, [bootstrap_from] if isinstance(bootstrap_from, str) else bootstrap_from or []
    )
