"""One simulation over the machines of a Ray cluster, and an experiment on its way to one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jwins.engines.node_group import NodeGroup
from jwins.engines.ray.cluster import Demand, check_capacity, check_versions, connected
from jwins.engines.ray.files import FileSharing, SharedPath, local_copy
from jwins.engines.ray.node_group import RemoteNodeGroup, start_actors
from jwins.engines.simulator.driver import CallAll
from jwins.errors import ConfigError
from jwins.experiment.experiment import Experiment
from jwins.node import Rules
from jwins.run.assembly import Place, assemble
from jwins.run.memory import memory_needed
from jwins.run.placement import node_blocks
from jwins.run.run import Ray


@dataclass(frozen=True, slots=True)
class RemoteExperiment:
    """An experiment for another machine."""

    experiment: Experiment
    files: Mapping[str, SharedPath]

    def unpack(self) -> Experiment:
        """Return the experiment with its files on this machine.

        Raises:
            DataError: a file did not arrive.
        """
        changes: dict[str, Any] = {}
        for key, sent in self.files.items():
            section, _, name = key.partition(".")
            value = str(local_copy(sent))
            if key == "task.file":
                value += f":{str(self.experiment.task.file).rpartition(':')[2]}"
            changes.setdefault(section, {})[name] = value
        return self.experiment.changed(changes)


def pack_experiment(experiment: Experiment, shipping: FileSharing) -> RemoteExperiment:
    """Send the files of an experiment.

    Raises:
        DataError: a file or folder is missing here.
    """
    named: dict[str, str | Path | None] = {
        "task.data": experiment.task.data,
        "topology.path": getattr(experiment.topology, "path", None),
    }
    if experiment.task.file is not None:
        named["task.file"] = experiment.task.file.rpartition(":")[0]
    files = {key: shipping.send(Path(path)) for key, path in named.items() if path is not None}
    return RemoteExperiment(experiment, files)


@contextmanager
def cluster_of(engine: Ray) -> Iterator[None]:
    """Within the block, connect to the cluster, after checking its machines' versions.

    Raises:
        UsageError: no cluster, or a machine has other versions.
    """
    with connected(engine.address):
        check_versions()
        yield


@contextmanager
def placing(engine: Ray) -> Iterator[Place]:
    """Make the actors of a simulation; they end with the block."""
    with ExitStack() as stack:

        def place(
            experiment: Experiment, rules: Rules, chunk: int
        ) -> tuple[Sequence[RemoteNodeGroup], CallAll]:
            if not rules.wire.codec.accepts_foreign:
                problem = "cannot be used by several processes; use another codec, or leave out --engine ray"
                raise ConfigError("wire.codec", rules.wire.codec.name, problem)
            cores = experiment.run.threads or 1
            there = pack_experiment(experiment.changed({"run": {"threads": cores}}), FileSharing())
            on_gpu = experiment.run.device == "cuda"
            demand = Demand(cores, memory_needed([experiment], engine.actors), gpus=int(on_gpu))
            check_capacity(demand, engine.actors, "actors")
            blocks = node_blocks(rules.topology, engine.actors, chunk)
            actors = stack.enter_context(
                start_actors(
                    [(nodes, partial(_made, there, nodes)) for nodes in blocks],
                    rules,
                    demand=demand,
                    name=f"{experiment.name}, seed {experiment.run.seed}",
                )
            )
            pool = stack.enter_context(ThreadPoolExecutor(len(actors), "jwins-group"))
            return actors, lambda calls: list(pool.map(lambda call: call(), calls))

        yield place


def _made(there: RemoteExperiment, nodes: Sequence[int]) -> NodeGroup:
    return assemble(there.unpack(), nodes=nodes).node_group()
