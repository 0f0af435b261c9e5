"""One node of an experiment over a network, in its own folder.

The folder is ``nodes/<i>`` in the run folder. It has the files of a run folder for one node, and also
``log.jsonl`` (one line per event) and ``status.json`` (the node's progress, written about twice a second).
A node that finds its own checkpoints there goes on from the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from jwins.engines.interrupts import interrupts
from jwins.engines.recorder import Recorder
from jwins.errors import ConfigError
from jwins.experiment.experiment import Experiment, identity_settings
from jwins.experiment.plugins import TopologyTable
from jwins.net.driver import NodeEvaluation, NodeOutcome, NodeProgress, RealTimeDriver
from jwins.net.handshake import flat_settings, pack_greeting
from jwins.net.journal import Journal, write_journal
from jwins.net.membership import Membership
from jwins.net.neighbour_timeout import DEFAULT_TIMEOUT_S, TIMEOUT_S
from jwins.net.roster import Roster, providers_of
from jwins.net.status import StatusFile, serve
from jwins.node import MAX_MAGNITUDE_RATIO
from jwins.run.assembly import Components, assemble
from jwins.run.folder import FolderState, folder_state, goes_on
from jwins.run_folder import checkpoint
from jwins.run_folder.atomic import write_atomically
from jwins.run_folder.lock import locked
from jwins.run_folder.own_files import private_folder
from jwins.topology import Topology


@dataclass(frozen=True)
class NodeResult:
    """End of one node's run.

    Attributes:
        status: ``finished``, ``diverged``, ``interrupted``, or ``removed`` from the roster.
        was_complete: whether the node had finished before, so that nothing had to be done.
        outcome: result of the driver; None if nothing had to be done.
    """

    folder: Path
    status: str
    round: int
    was_complete: bool = False
    outcome: NodeOutcome | None = None


def node_folder(folder: Path, node: int) -> Path:
    """Return the folder of one node in a run folder."""
    return folder / "nodes" / str(node)


def timeout_of(experiment: Experiment, timeout_s: float | None) -> float:
    """Return the minimum time to wait for a neighbour: as given, else the experiment's deadline, else 30 s.

    Raises:
        ConfigError: a number out of range.
    """
    if timeout_s is not None:
        TIMEOUT_S.check("--neighbour-timeout", timeout_s)
        return timeout_s
    return DEFAULT_TIMEOUT_S if experiment.run.deadline_s is None else experiment.run.deadline_s


def for_network(experiment: Experiment) -> Experiment:
    """Return the experiment with the settings of a process that holds one node, which trains in a loop.

    Raises:
        ConfigError: it has settings for the simulator only.
    """
    if experiment.train.batching == "stacked":
        problem = "a process holds one node, which trains in a loop; write loop or auto"
        raise ConfigError("train.batching", "stacked", problem)
    if experiment.faults:
        problem = "only `jwins run` and `jwins compare` simulate scripted faults; remove them"
        raise ConfigError("faults", f"{len(experiment.faults)} tables", problem)
    if experiment.run.stop is not None:
        problem = "no node knows the mean over all nodes; remove it, or use `jwins run`"
        raise ConfigError("run.stop", experiment.run.stop.model_dump(exclude_none=True), problem)
    if experiment.wire.codec == "paper":
        problem = "its decoder is unsafe on bytes of other machines; use pco or raw"
        raise ConfigError("wire.codec", experiment.wire.codec, problem)
    return experiment.changed({"train": {"batching": "loop"}})


def for_real_time(components: Components) -> Components:
    """Return the components for real time: another start row, no virtual deadline, limits on other nodes."""
    return replace(
        components,
        rules=components.rules.among_strangers(
            MAX_MAGNITUDE_RATIO, changing=components.experiment.topology_changes
        ),
        start=msgspec.structs.replace(components.start, clock="wall"),
    )


def run_node(
    experiment: Experiment,
    roster: Roster,
    name: str,
    key_file: Path,
    *,
    folder: Path | None = None,
    timeout_s: float | None = None,
    listen: str | None = None,
    keep_models: bool = False,
    metrics_port: int | None = None,
    progress: Callable[[NodeProgress, Sequence[str]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    roster_file: Path | None = None,
    bootstrap_from: Sequence[str] = (),
) -> NodeResult:
    """Run one node of an experiment, or continue it.

    Args:
        experiment: the experiment, the same on all machines.
        roster: the roster; all present and former members are the nodes of the experiment, in order of ids.
        name: name of this node in the roster.
        key_file: file of its private key.
        folder: folder of the node; None for ``nodes/<i>`` in the run folder.
        timeout_s: minimum time to wait for a neighbour; None for the experiment's deadline, or 30.
        listen: host:port to listen on, if it is not the roster's.
        keep_models: keep the model of each evaluation in ``models/``, so that all nodes' measurements can be
            combined.
        metrics_port: port for status and metrics, on loopback; None serves neither.
        progress: called after every event, with the current names of the nodes.
        stop: called after every event; True ends the node with a checkpoint.
        roster_file: file of ``roster``, which is watched for changes; None to keep this roster until the end.
        bootstrap_from: members to request a model from, one after the other; none for the common
            initial parameters. Not used if the folder has a checkpoint.

    Raises:
        ConfigError: experiment, roster and key do not match.
        ResumeError: the folder holds another experiment, or another process runs this node.
        PeerError: no member sent a model.
    """
    experiment = for_network(experiment)
    least_s = timeout_of(experiment, timeout_s)
    _check_places(experiment, roster)
    member = roster.named(name)
    providers = providers_of(roster, member, bootstrap_from)
    node = roster.ids_ever.index(member.id)
    _check_reachable(experiment, roster)
    place = node_folder(experiment.folder, node) if folder is None else folder
    state, experiment = folder_state(experiment, place)
    if state is FolderState.COMPLETE:
        return NodeResult(place, "finished", experiment.run.rounds, was_complete=True)
    fixed = for_real_time(assemble(experiment, nodes=[node]))
    private_folder(place)
    with locked(place, f"node {member.name}"), interrupts() as interrupted:
        if state is FolderState.ABSENT:
            write_atomically(place / "config.toml", fixed.experiment.to_toml(place).encode())
        journal = Journal(member.name)
        membership = Membership(
            roster_file,
            roster,
            member.id,
            key_file,
            num_nodes=experiment.nodes.count,
            build=lambda count: _graph_of(fixed, count),
            folder=place / "rosters",
            journal=journal,
        )
        components = replace(fixed, rules=replace(fixed.rules, topology=membership.topology))
        with write_journal(place / "log.jsonl"):
            going_on = goes_on(place, components.start)
            status = StatusFile(place / "status.json", membership.names)

            def on_progress(now: NodeProgress) -> None:
                status(now)
                if progress is not None:
                    progress(now, membership.names)

            group = components.node_group()
            asked = [] if going_on else providers
            greeting = greeting_of(components.experiment)
            changing = components.experiment.topology_changes
            driver = RealTimeDriver(
                group,
                membership.connect(group.rules.wire, greeting, listen=listen, changing=changing, also=asked),
                start=components.start,
                names=membership.names,
                greeting=greeting,
                bootstrap_from=asked,
                joins_at=member.since_round or None,
                changes=membership.look,
                timeout_s=least_s,
                recorder=Recorder(place),
                on_progress=on_progress,
                on_evaluated=_models_in(place / "models") if keep_models else None,
                stop=lambda: interrupted() or stop(),
                journal=journal,
                signatures=membership,
            )
            ended = "failed"
            try:
                with nullcontext() if metrics_port is None else serve(driver, metrics_port):
                    outcome = driver.run(resume=going_on)
                ended = outcome.status
            except KeyboardInterrupt:
                ended = "interrupted"
                raise
            finally:
                status(driver.progress(), ended)
    return NodeResult(place, outcome.status, outcome.round, outcome=outcome)


def greeting_of(experiment: Experiment) -> bytes:
    """Return the greeting of a node: the experiment's digest, and the settings that count."""
    return pack_greeting(experiment.digest(), flat_settings(identity_settings(experiment.resolved()), ""))


def _models_in(folder: Path) -> Callable[[NodeEvaluation], None]:

    def keep(evaluation: NodeEvaluation) -> None:
        private_folder(folder)
        write_atomically(folder / f"round-{evaluation.round:08d}.safetensors", checkpoint.dump(evaluation))

    return keep


def _graph_of(components: Components, count: int) -> Topology:
    config, places = components.experiment.topology, components.experiment.nodes.count
    if count == places:
        return components.rules.topology
    if (share := components.experiment.nodes.participation) < 1.0:
        problem = f"{count} of {places} nodes are members, and the share is drawn from all; leave it out"
        raise ConfigError("nodes.participation", share, problem)
    if isinstance(config, TopologyTable):
        return config.build(num_nodes=count, seed=components.experiment.run.seed)
    raise ConfigError(
        "topology", repr(config), f"has {places} nodes, but {count} take part; change nodes.count or the roster"
    )


def _check_places(experiment: Experiment, roster: Roster) -> None:
    count = roster.num_places
    if count != experiment.nodes.count:
        problem = f"expected nodes.count = {experiment.nodes.count} members"
        if roster.places is not None or roster.departed:
            problem += ", including former members and future ones (places)"
        raise ConfigError("roster.members" if roster.places is None else "roster.places", count, problem)
    for member in roster.members:
        if member.since_round >= experiment.run.rounds:
            problem = f"{member.name} would join after the end; run.rounds = {experiment.run.rounds}"
            raise ConfigError("roster.members.since_round", member.since_round, problem)


def _check_reachable(experiment: Experiment, roster: Roster) -> None:
    if isinstance(experiment.topology, TopologyTable):
        Roster(topology=experiment.topology, seed=experiment.run.seed, members=roster.members).build_topology()
