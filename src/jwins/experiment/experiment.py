"""Experiments: typed settings, written in TOML or in Python, and the objects that they name.

>>> from jwins.experiment import Experiment, FixedCutoffConfig, JwinsConfig, NodesConfig
>>> experiment = Experiment(name="tiny", sharing=JwinsConfig(cutoff=FixedCutoffConfig(fraction=0.2)))
>>> experiment.sharing.levels, experiment.run.rounds
(4, 200)
>>> Experiment(nodes=NodesConfig(count=0))
Traceback (most recent call last):
    ...
jwins.errors.ConfigError: count = 0: expected a number of nodes of at least 1
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, field_serializer, field_validator, model_validator

from jwins.experiment.field_types import OneOf, OrObject, identity_text, refuse
from jwins.experiment.plugins import (
    ALGORITHMS,
    RATE_KEYS,
    TOPOLOGY_TABLES,
    DemoConfig,
    FullConfig,
    FullyConnectedConfig,
    JwinsConfig,
    NoLoCoConfig,
    OnePeerExponentialConfig,
    PowerGossipConfig,
    RegularConfig,
    SharingTable,
    SparseLocoConfig,
    TopologyTable,
)
from jwins.experiment.sections import (
    FAULT_TABLES,
    AttackConfig,
    ComputeConfig,
    FaultTable,
    LinksConfig,
    NodesConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    WireConfig,
)
from jwins.experiment.settings import Settings
from jwins.experiment.toml import merge, nested, write_toml
from jwins.scenario import Attack, Fault, Faults, check_scenario
from jwins.validation import MISSING

if TYPE_CHECKING:
    from jwins.sharing import Sharing
    from jwins.topology.graph import Topology

    AnySharing = Sharing[Any]
else:  # torch is not loaded only to read a configuration
    AnySharing = Topology = Any


def is_folder_name(name: str) -> bool:
    """Return whether a name can be a folder's on Linux and macOS, with some room for what is added to it."""
    return name.isprintable() and "/" not in name and name.strip(". ") == name and len(name.encode()) <= 200


class Experiment(Settings):
    """All settings of a run, as in a TOML file.

    Raises:
        ConfigError: raised by the constructor, with TOML path, value and remedy of every problem.
    """

    name: str = Field(
        default="experiment", description="name in tables, figures and the default folder", min_length=1
    )
    task: TaskConfig = TaskConfig(name="digits")
    nodes: NodesConfig = NodesConfig()
    topology: Annotated[
        TopologyTable | Topology,
        OneOf(TOPOLOGY_TABLES),
        OrObject(("at",), ("num_nodes",), base="jwins.topology.Topology"),
    ] = Field(default=RegularConfig(), description="communication graph of the nodes")
    train: TrainConfig = TrainConfig()
    sharing: Annotated[
        SharingTable | AnySharing,
        OneOf(ALGORITHMS),
        OrObject(
            (
                "init",
                "share",
                "merge",
                "keyframe",
                "stale_peers",
                "replica_round",
                "delta_since",
                "update_dim",
                "projected",
                "for_model",
                "for_peer",
            ),
            ("remembers_peers", "per_peer", "state_types"),
            base="jwins.sharing.Sharing",
        ),
    ] = Field(default=JwinsConfig(), description="sharing algorithm")
    wire: WireConfig = WireConfig()
    links: LinksConfig = LinksConfig()
    compute: ComputeConfig = ComputeConfig()
    faults: Annotated[tuple[Annotated[FaultTable, OneOf(FAULT_TABLES)], ...], Field(strict=False)] = Field(
        default=(), description="faults, an array of tables"
    )
    run: RunConfig = RunConfig()

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not is_folder_name(name):
            raise refuse("", name, "expected a name that can be a folder's name")
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_scenario(
            num_nodes=self.nodes.count,
            rounds=self.run.rounds + self.run.consensus_rounds,
            links=self.links.build(),
            compute=self.compute.build(),
            faults=self.fault_script(),
            deadline_s=self.run.deadline_s,
            waits=self.run.mode == "sync",
        )
        self._check_training()
        self._check_attacks()
        self._check_graph()
        for index, at in enumerate(self.run.eval_at):
            if at > self.run.rounds:
                raise refuse(f"run.eval_at[{index}]", at, f"the run ends after run.rounds = {self.run.rounds}")
        return self

    def _check_training(self) -> None:
        train, each = self.train, self.train.local_steps
        schedule, optimizer = train.schedule, train.optimizer
        if isinstance(each, tuple) and len(each) != self.nodes.count:
            problem = f"{len(each)} numbers for {self.nodes.count} nodes; write one per node, or one"
            raise refuse("train.local_steps", list(each), problem)
        if train.uneven and (schedule.kind != "constant" or schedule.warmup_steps):
            problem = (
                "needs the same number of local steps at all nodes: one number of train.local_steps, without "
                "train.local_epochs and train.balanced"
            )
            raise refuse("train.schedule.kind", schedule.kind, problem)
        steps = self.run.rounds * (max(each) if isinstance(each, tuple) else each)
        if schedule.warmup_steps >= steps:
            problem = (
                f"the run has {steps} local steps (run.rounds * train.local_steps); expected fewer to warm up"
            )
            raise refuse("train.schedule.warmup_steps", schedule.warmup_steps, problem)
        if optimizer.quasi_global is not None and (schedule.kind != "constant" or schedule.warmup_steps):
            problem = (
                "train.optimizer.quasi_global needs one learning rate for all rounds; remove one of the two"
            )
            raise refuse("train.schedule.kind", schedule.kind, problem)
        if optimizer.quasi_global is not None and train.outer is not None:
            problem = "train.outer also applies momentum to the merged models; remove one of the two"
            raise refuse("train.optimizer.quasi_global", optimizer.quasi_global, problem)
        signs = isinstance(self.sharing, DemoConfig) and self.sharing.lr is not None
        if train.outer is not None and (signs or isinstance(self.sharing, NoLoCoConfig)):
            kind = "demo" if signs else "noloco"
            problem = f'sharing.kind = "{kind}" has an outer step of its own; remove one of both'
            raise refuse("train.outer", train.outer.kind, problem)
        given = {"sharing.lr": signs, "train.outer": train.outer is not None, "train.balanced": train.balanced}
        if (name := next((name for name in given if given[name]), None)) and train.buffers == "shared":
            problem = f'{name} would extrapolate the shared statistics; write "local", or remove {name}'
            raise refuse("train.buffers", train.buffers, problem)

    def _check_graph(self) -> None:
        sharing, topology = self.sharing, self.topology
        if self.run.mode == "async" and self.nodes.participation < 1.0:
            problem = 'chooses the nodes of a round, and with run.mode = "async" nodes have no rounds in common'
            raise refuse("nodes.participation", self.nodes.participation, f"{problem}; remove it")
        if self.run.mode == "async" and isinstance(topology, TopologyTable) and topology.changes:
            problem = 'run.mode = "async" needs the same neighbours in all rounds; take another'
            raise refuse("topology.kind", topology.kind, f"{problem}, or remove dynamic")
        if isinstance(sharing, SparseLocoConfig | DemoConfig) and sharing.gamma is None:
            whole = isinstance(topology, FullyConnectedConfig) and self.nodes.participation == 1.0
            if not whole:
                problem = (
                    "left out, it is the algorithm of the paper, which needs all nodes as neighbours in every "
                    'round; set topology.kind = "fully_connected" without nodes.participation, or gamma'
                )
                raise refuse("sharing.gamma", MISSING, problem)
        if isinstance(sharing, DemoConfig) and sharing.gamma is None:
            needs = 'sharing.kind = "demo" without gamma needs every frame; remove this, or set sharing.gamma'
            if self.run.deadline_s is not None:
                raise refuse("run.deadline_s", self.run.deadline_s, needs)
            for index, fault in enumerate(self.faults):
                if fault.kind == "crash":
                    raise refuse(f"faults[{index}].kind", fault.kind, needs)
        if isinstance(sharing, PowerGossipConfig) and isinstance(topology, OnePeerExponentialConfig):
            problem = 'its edges have a direction; take another, such as "finite_time"'
            raise refuse("topology.kind", topology.kind, f'sharing.kind = "power_gossip": {problem}')

    def fault_script(self) -> Faults:
        """Return the scripted faults without the attacks, for the driver."""
        built = (None if isinstance(fault, AttackConfig) else fault.build() for fault in self.faults)
        return Faults(tuple(fault for fault in built if isinstance(fault, Fault)))

    def attacks(self) -> dict[int, Attack]:
        """Return the attacks by node."""
        tables = (fault for fault in self.faults if isinstance(fault, AttackConfig))
        return {node: table.build() for table in tables for node in table.nodes}

    def _check_attacks(self) -> None:
        first: dict[int, int] = {}
        for index, fault in enumerate(self.faults):
            if not isinstance(fault, AttackConfig):
                continue
            for place, node in enumerate(fault.nodes):
                path = f"faults[{index}].nodes[{place}]"
                if node >= self.nodes.count:
                    raise refuse(path, node, f"there are nodes 0 to {self.nodes.count - 1}")
                if node in first:
                    raise refuse(
                        path, node, f"also attacks in faults[{first[node]}]; remove it from one of them"
                    )
                first[node] = index
            if fault.round >= self.run.rounds:
                raise refuse(f"faults[{index}].round", fault.round, f"expected 0 to {self.run.rounds - 1}")
            if fault.form == "little" and not isinstance(self.sharing, FullConfig):
                problem = (
                    'needs whole models of its neighbours: set sharing.kind = "full", or use another attack'
                )
                raise refuse(f"faults[{index}].form", fault.form, problem)
        if len(first) == self.nodes.count:
            raise refuse("faults", f"{len(first)} attackers", "all nodes attack; leave at least one honest")

    @property
    def folder(self) -> Path:
        """Return the run folder."""
        return self.run.folder if self.run.folder is not None else Path("runs") / self.name

    @property
    def topology_changes(self) -> bool:
        """Return whether neighbours change from round to round; True for a topology that is an object."""
        if self.nodes.participation < 1.0:
            return True
        return self.topology.changes if isinstance(self.topology, TopologyTable) else True

    def resolved(self, relative_to: Path | None = None) -> dict[str, Any]:
        """Return every key with its value, including defaults, as plain tables.

        Args:
            relative_to: folder to which paths are made relative, so that a run folder can be moved
                together with its files; None does not change paths.
        """
        tables: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        if (own := self.task.own) is not None:
            tables["task"]["own"] = identity_text(own if isinstance(own, type) else type(own))
        _drop_step_ratio_(tables["sharing"])
        if self.train.local_epochs is not None:
            del tables["train"]["local_steps"]
        tables["faults"] = list(tables["faults"])
        if not tables["faults"]:
            del tables["faults"]
        tables["run"]["folder"] = str(self.folder)
        if relative_to is not None:
            rewrite_paths_(tables, lambda path: Path(os.path.relpath(path, relative_to)).as_posix())
        return tables

    def to_toml(self, relative_to: Path | None = None) -> str:
        """Return the settings as TOML, which :func:`load` can read."""
        return write_toml(self.resolved(relative_to))

    def digest(self) -> bytes:
        """Return 8 bytes that identify the experiment between machines, computed from the settings alone.

        :func:`identity_settings` returns the covered settings.
        """
        return digest_of(self.resolved())

    def changed(self, tables: Mapping[str, Any]) -> Experiment:
        """Return a copy with some keys changed: ``{"run": {"seed": 2}}`` as in TOML, or ``{"run.seed": 2}``.

        Of a dataclass in place of a table, ``{"sharing.fraction": 0.2}`` changes the field ``fraction``.

        Raises:
            ConfigError: the result is not a valid experiment.
        """
        return Experiment(**merge_experiment(_keys(self), nested(tables)))

    @field_serializer("faults")
    def _plain_faults(self, faults: tuple[Any, ...]) -> list[dict[str, Any]]:
        return [fault.model_dump(exclude_none=True) for fault in faults]


def _keys(settings: Settings) -> dict[str, Any]:
    """Return the constructor's arguments of settings and of nested settings; objects are not changed."""
    found: dict[str, Any] = {}
    for key, value in settings:
        if isinstance(value, Settings):
            found[key] = _keys(value)
        elif isinstance(value, tuple):
            found[key] = tuple(_keys(entry) if isinstance(entry, Settings) else entry for entry in value)
        elif value is not None:
            found[key] = value
    return found


def result_settings(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of resolved tables with all settings that affect the bits in a run folder.

    A run may continue in a folder with the same settings. Left out are the name, folders, settings of speed
    alone (``run.threads`` and ``run.checkpoint_every``), and keys without effect that older runs lack.

    Args:
        tables: tables with the chosen ``train.batching`` and ``run.device``.

    Returns:
        Tables as in JSON, with lists in place of tuples.
    """
    covered: dict[str, Any] = json.loads(json.dumps(tables))
    covered.pop("name", None)
    for key in ("threads", "checkpoint_every", "folder", "tensorboard"):
        covered["run"].pop(key, None)
    drop_without_effect_(covered)
    covered["task"].pop("data", None)
    rewrite_paths_(covered, lambda path: Path(path).name)
    return covered


_WITHOUT_EFFECT = {
    "run.consensus_rounds": 0,
    "run.eval_own": False,
    "links.sending": "together",
    "train.balanced": False,
    "train.precision": "float32",
    "train.schedule": {"kind": "constant", "warmup_steps": 0},
    "train.optimizer.weight_decay_on": "all",
    "nodes.participation": 1.0,
    "task.label_noise": 0.0,
}
"""Values of settings that older runs lack, with which a run is as theirs."""


def drop_without_effect_(tables: Mapping[str, Any]) -> None:
    """Remove keys without effect from sections: keys that older runs lack, or have with an earlier default."""
    for path, without_effect in _WITHOUT_EFFECT.items():
        section, *inner, key = path.split(".")
        table = tables.get(section, {})
        for name in inner:
            table = table.get(name, {})
        if table.get(key) == without_effect:
            del table[key]
    run = tables.get("run", {})
    if run.get("mode", "sync") == "sync":
        run.pop("mode", None)
        run.pop("max_staleness", None)
        run.pop("staleness_power", None)
    if run.get("eval_samples_early") is None:
        run.pop("eval_samples_early", None)
        run.pop("eval_last", None)
    _drop_step_ratio_(tables.get("sharing", {}))


def _drop_step_ratio_(sharing: dict[str, Any]) -> None:
    """Remove the default of a ratio if another key sets the rate."""
    if any(sharing.get(key) is not None for key in RATE_KEYS):
        sharing.pop("step_ratio", None)


def identity_settings(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same without ``run.device`` and ``train.batching``: the settings that must agree between
    machines.

    Each machine chooses these two itself. They change the last bits, as other processors do.
    """
    shared = result_settings(tables)
    shared["run"].pop("device", None)
    shared["train"].pop("batching", None)
    return shared


def digest_of(tables: Mapping[str, Any]) -> bytes:
    """Return BLAKE2b, 8 bytes, of :func:`identity_settings`, for frames and the start row of a log."""
    text = json.dumps(identity_settings(tables), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def rewrite_paths_(tables: dict[str, Any], change: Callable[[str], str]) -> None:
    """Apply ``change`` to each file that an experiment names (not to ``run.folder``), in place."""
    task, topology = tables.get("task"), tables.get("topology")
    if isinstance(task, dict):
        if isinstance(task.get("file"), str) and ":" in task["file"]:
            file, _, name = task["file"].rpartition(":")
            task["file"] = f"{change(file)}:{name}"
        if isinstance(task.get("data"), str):
            task["data"] = change(task["data"])
    if isinstance(topology, dict) and isinstance(topology.get("path"), str):
        topology["path"] = change(topology["path"])


def merge_experiment(tables: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge tables over those of an experiment; another task replaces the first."""
    merged = merge(tables, given)
    if given.keys() >= {"task"} and isinstance(given["task"], Mapping) and isinstance(merged["task"], dict):
        named = [key for key in ("name", "file", "own") if key in given["task"]]
        for key in ("name", "file", "own"):
            if named and key not in named:
                merged["task"].pop(key, None)
    return merged
