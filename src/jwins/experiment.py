"""What an experiment is: typed settings, written in TOML or in Python, and what they resolve to.

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
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, field_serializer, field_validator, model_validator

from jwins.errors import ConfigError
from jwins.settings import (
    MISSING,
    OneOrMany,
    OrObject,
    OrWord,
    Settings,
    TomlPath,
    Within,
    merge,
    nearest,
    parse_overrides,
    read_toml,
    refuse,
    write_toml,
)

if TYPE_CHECKING:
    from jwins.sharing import Cutoff, Sharing
    from jwins.tasks.base import Task
    from jwins.tasks.partition import Partitioner
    from jwins.topology import Topology
else:  # torch is not loaded only to read a configuration
    Cutoff = Partitioner = Sharing = Task = Topology = Any

__all__ = [
    "BUNDLED",
    "ByKeyConfig",
    "ChocoConfig",
    "ComputeConfig",
    "CrashConfig",
    "DelayConfig",
    "DirichletConfig",
    "DropConfig",
    "EdgeListConfig",
    "ErdosRenyiConfig",
    "Experiment",
    "FixedCutoffConfig",
    "FullConfig",
    "FullyConnectedConfig",
    "IidConfig",
    "JwinsConfig",
    "LinksConfig",
    "NodesConfig",
    "OnePeerExponentialConfig",
    "OptimizerConfig",
    "RandomCutoffConfig",
    "RandomKConfig",
    "RegularConfig",
    "RejoinConfig",
    "RingConfig",
    "RunConfig",
    "ShardsConfig",
    "SmallWorldConfig",
    "StarConfig",
    "TaskConfig",
    "TopKConfig",
    "TorusConfig",
    "TrainConfig",
    "WireConfig",
    "bundled",
    "digest_of",
    "what_counts",
    "lay_over",
    "load",
    "read",
]

Fraction = Annotated[float, Within("a fraction", 0, 1, open_low=True)]
Count = Annotated[int, Within("a whole number", 1)]
Index = Annotated[int, Within("a whole number", 0)]
Duration = Annotated[float, Within("a time", 0)]
Precision = Annotated[
    Literal["float32", "bfloat16"], Field(description="what values are rounded to before they are sent")
]


# --- [task] and [nodes] -----------------------------------------------------------------------------------


class IidConfig(Settings):
    """Samples shuffled and dealt out evenly."""

    kind: Literal["iid"] = "iid"


class ShardsConfig(Settings):
    """Samples sorted by label, cut into shards, dealt out at random: few labels per node."""

    kind: Literal["shards"] = "shards"
    shards_per_node: Count = Field(default=2, description="shards of the sorted samples that each node gets")


class DirichletConfig(Settings):
    """Each label divided among the nodes in proportions drawn from a Dirichlet distribution."""

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: Annotated[float, Within("a concentration", 0, open_low=True)] = Field(
        default=0.5, description="concentration; the smaller, the fewer labels per node"
    )
    min_samples: Count = Field(default=1, description="every node gets at least so many samples")


class ByKeyConfig(Settings):
    """Each owner in the data (writer, user, role) wholly to one node."""

    kind: Literal["by_key"] = "by_key"


class TaskConfig(Settings):
    """The workload and how its data are divided. Exactly one of ``name``, ``file`` and ``own`` is given."""

    name: str | None = Field(default=None, description="a task of this package; `jwins list` shows them")
    file: str | None = Field(
        default=None,
        description='your own, as "my_task.py:MyTask", relative to this TOML file\'s folder',
    )
    own: Any = Field(default=None, exclude=True)
    options: Annotated[
        dict[str, Any], Field(description='arguments of the task\'s constructor, such as `{ model = "cnn" }`')
    ] = Field(default_factory=dict)
    data: TomlPath | None = Field(
        default=None, description="folder of the data, for tasks that do not bring their own"
    )
    if TYPE_CHECKING:
        partition: IidConfig | ShardsConfig | DirichletConfig | ByKeyConfig | Partitioner = IidConfig()
    else:
        partition: Annotated[
            IidConfig | ShardsConfig | DirichletConfig | ByKeyConfig,
            Field(discriminator="kind"),
            OrObject(("split",), base="jwins.tasks.partition.Partitioner"),
        ] = Field(default=IidConfig(), description="how the training samples are divided among the nodes")

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        given = [key for key in ("name", "file", "own") if getattr(self, key) is not None]
        if not given:
            raise refuse("name", MISSING, 'required: the name of a task, or file = "my_task.py:MyTask"')
        if len(given) > 1:
            raise refuse(
                given[1], getattr(self, given[1]), f"{given[0]} names a task already; remove one of them"
            )
        if isinstance(self.own, str):
            raise refuse(
                "own", self.own, 'a task object comes from Python only; write file = "my_task.py:MyTask"'
            )
        if self.own is not None and self.options and not isinstance(self.own, type):
            raise refuse("options", self.options, "the task is an object already; hand over its class instead")
        if self.file is not None and not all(self.file.rpartition(":")[::2]):
            raise refuse("file", self.file, 'expected file and class, such as "my_task.py:MyTask"')
        return self


class NodesConfig(Settings):
    """The nodes."""

    count: Annotated[int, Within("a number of nodes", 1)] = Field(default=16, description="how many nodes")


# --- [topology] -------------------------------------------------------------------------------------------


class RingConfig(Settings):
    """Two neighbours each, in a circle."""

    kind: Literal["ring"] = "ring"


class FullyConnectedConfig(Settings):
    """Everyone is everyone's neighbour."""

    kind: Literal["fully_connected"] = "fully_connected"


class StarConfig(Settings):
    """Node 0 is everyone's only neighbour."""

    kind: Literal["star"] = "star"


class TorusConfig(Settings):
    """A grid that wraps around."""

    kind: Literal["torus"] = "torus"
    rows: Count | None = Field(
        default=None, description="a divisor of the number of nodes; left out: as square as can be"
    )


class RegularConfig(Settings):
    """A random graph in which every node has the same number of neighbours."""

    kind: Literal["regular"] = "regular"
    degree: Count = Field(default=4, description="neighbours of each node")
    dynamic: bool = Field(default=False, description="drawn anew each round")


class SmallWorldConfig(Settings):
    """Watts-Strogatz: a ring of nearest neighbours, some edges rewired."""

    kind: Literal["small_world"] = "small_world"
    degree: Count = Field(default=4, description="neighbours of each node before rewiring, even")
    rewire: Annotated[float, Within("a probability", 0, 1)] = Field(
        default=0.1, description="how likely an edge is rewired"
    )
    dynamic: bool = Field(default=False, description="drawn anew each round")


class ErdosRenyiConfig(Settings):
    """Each edge with the same probability, given that the graph is connected."""

    kind: Literal["erdos_renyi"] = "erdos_renyi"
    p: Annotated[float, Within("a probability", 0, 1, open_low=True)] = Field(
        default=0.5, description="of each edge"
    )
    dynamic: bool = Field(default=False, description="drawn anew each round")


class OnePeerExponentialConfig(Settings):
    """Directed: one recipient per round, at a distance that doubles."""

    kind: Literal["one_peer_exponential"] = "one_peer_exponential"


class EdgeListConfig(Settings):
    """The graph in a text file, two node numbers per line."""

    kind: Literal["edge_list"] = "edge_list"
    path: TomlPath = Field(description="the file; relative to the folder of this TOML file")


_TopologyTable = Annotated[
    RingConfig
    | FullyConnectedConfig
    | StarConfig
    | TorusConfig
    | RegularConfig
    | SmallWorldConfig
    | ErdosRenyiConfig
    | OnePeerExponentialConfig
    | EdgeListConfig,
    Field(discriminator="kind"),
]


# --- [train] ----------------------------------------------------------------------------------------------


class OptimizerConfig(Settings):
    """A torch.optim optimizer; further keys are its options, by torch's names."""

    model_config = ConfigDict(extra="allow")

    kind: str = Field(default="sgd", description='a torch.optim optimizer, such as "sgd" or "adamw"')
    lr: Annotated[float, Within("a learning rate", 0, open_low=True)] = Field(
        default=0.05, description="learning rate"
    )

    if TYPE_CHECKING:

        def __init__(self, *, kind: str = "sgd", lr: float = 0.05, **options: Any) -> None: ...

    @property
    def options(self) -> dict[str, Any]:
        """All arguments of the optimizer's constructor."""
        return {"lr": self.lr, **(self.model_extra or {})}


class TrainConfig(Settings):
    """Local training, the same on every node."""

    local_steps: Count = Field(default=3, description="optimizer steps between two rounds of sharing")
    batch_size: Count = Field(default=8, description="samples per step")
    optimizer: OptimizerConfig = OptimizerConfig()
    optimizer_state: Literal["keep", "reset"] = Field(
        default="keep",
        description="whether momenta live on from round to round or start anew",
    )
    buffers: Literal["local", "shared"] = Field(
        default="local", description="whether floating-point buffers (BatchNorm) stay on the node or are shared"
    )
    batching: Literal["auto", "loop", "stacked"] = Field(
        default="auto",
        description="nodes trained one by one or as one stacked model; auto: a fixed rule",
    )


# --- [sharing] and [wire] ---------------------------------------------------------------------------------


class FullConfig(Settings):
    """D-PSGD: everything, every round."""

    kind: Literal["full"] = "full"
    values: Precision = "float32"


class RandomKConfig(Settings):
    """A random subset; the seed travels instead of positions."""

    kind: Literal["random_k"] = "random_k"
    fraction: Fraction = Field(description="of the parameters that are sent")
    values: Precision = "float32"


class TopKConfig(Settings):
    """The parameters that changed most."""

    kind: Literal["top_k"] = "top_k"
    fraction: Fraction = Field(description="of the parameters that are sent")
    accumulate: bool = Field(
        default=False, description="score by the change since last sent, not in this round"
    )
    values: Precision = "float32"


class ChocoConfig(Settings):
    """CHOCO-SGD: compressed differences to replicas that neighbours keep."""

    kind: Literal["choco"] = "choco"
    fraction: Fraction = Field(description="of the parameters whose differences are sent")
    gamma: Annotated[float, Within("a consensus step size", 0, 1, open_low=True)] = Field(
        description="consensus step size; smaller for smaller fractions"
    )
    values: Precision = "float32"


class RandomCutoffConfig(Settings):
    """Each node draws a fraction from a list in each round."""

    kind: Literal["random"] = "random"
    fractions: Annotated[tuple[Fraction, ...], Field(strict=False, min_length=1)] = Field(
        default=(0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 1.0), description="drawn from uniformly"
    )


class FixedCutoffConfig(Settings):
    """The same fraction in every round."""

    kind: Literal["fixed"] = "fixed"
    fraction: Fraction = Field(description="of the coefficients that are sent")


def _none_is_a_word(value: Any) -> Any:
    return "none" if value is None else value


class JwinsConfig(Settings):
    """JWINS: wavelet coefficients that changed most since they were sent, a random fraction of them."""

    kind: Literal["jwins"] = "jwins"
    if TYPE_CHECKING:
        cutoff: RandomCutoffConfig | FixedCutoffConfig | Cutoff = RandomCutoffConfig()
        wavelet: str | None = "sym2"
    else:
        cutoff: Annotated[RandomCutoffConfig | FixedCutoffConfig, Field(discriminator="kind"), OrObject(())] = (
            Field(default=RandomCutoffConfig(), description="which fraction of the coefficients is sent")
        )
        wavelet: Annotated[str, BeforeValidator(_none_is_a_word)] = Field(
            default="sym2",
            description='a discrete wavelet of PyWavelets, or "none" to work on the parameters themselves',
        )
    levels: Count = Field(default=4, description="levels of the transform")
    mode: Literal["symmetric", "periodization"] = Field(
        default="symmetric", description="what the transform assumes beyond the ends"
    )
    score: Literal["since_sent", "reference", "training_only"] = Field(
        default="reference", description="what a coefficient's change is measured from; docs/algorithm.md"
    )
    accumulate: bool = Field(default=True, description="false scores by this round's training alone")
    dense_above: Annotated[float, Within("a fraction", 0, open_low=True)] = Field(
        default=0.5, description="from this fraction on, all coefficients are sent and no positions"
    )
    values: Precision = "float32"


_SharingTable = Annotated[
    FullConfig | RandomKConfig | TopKConfig | ChocoConfig | JwinsConfig, Field(discriminator="kind")
]


class WireConfig(Settings):
    """How updates become bytes."""

    codec: Literal["pco", "raw", "paper"] = Field(
        default="pco",
        description="pco: pcodec; raw: uint32 and float32; paper: Elias gamma and fpzip, to count its bytes",
    )


# --- The simulated world: [links], [compute], [[faults]] --------------------------------------------------


class LinksConfig(Settings):
    """The network of the virtual clock."""

    if TYPE_CHECKING:
        uplink_mbps: float | tuple[float, ...] = 100.0
    else:
        uplink_mbps: Annotated[
            float | tuple[float, ...], OneOrMany(Within("a rate in Mbit/s", 0, open_low=True))
        ] = Field(default=100.0, description="what a node can send, shared by its simultaneous sends")
    latency_ms: Duration = Field(default=20.0, description="from the last byte sent to the frame received")


class ComputeConfig(Settings):
    """How long local training takes on the virtual clock."""

    if TYPE_CHECKING:
        step_ms: float | tuple[float, ...] = 10.0
    else:
        step_ms: Annotated[float | tuple[float, ...], OneOrMany(Within("a time in ms", 0, open_low=True))] = (
            Field(default=10.0, description="virtual time of one local step")
        )
    spread: Annotated[float, Within("a standard deviation", 0, 2)] = Field(
        default=0.0, description="over nodes, of the logarithm of their slowness; drawn from the seed"
    )
    jitter: Annotated[float, Within("a standard deviation", 0, 2)] = Field(
        default=0.0, description="the same over the rounds of a node"
    )


class CrashConfig(Settings):
    """A node stops when it is about to train; what it had sent arrives."""

    kind: Literal["crash"] = "crash"
    node: Index = Field(description="which node")
    round: Index = Field(description="the round in which it happens, from 0")


class RejoinConfig(Settings):
    """A crashed node comes back, with its state of the crash."""

    kind: Literal["rejoin"] = "rejoin"
    node: Index = Field(description="which node")
    round: Index = Field(description="the round that the first of the others begins when it comes back")


class DropConfig(Settings):
    """A frame is sent, its bytes count, and it never arrives."""

    kind: Literal["drop"] = "drop"
    sender: Index = Field(description="who sent it")
    receiver: Index | None = Field(default=None, description="who does not get it; left out: nobody gets it")
    round: Index = Field(description="the sender's round")


class DelayConfig(Settings):
    """A frame arrives late."""

    kind: Literal["delay"] = "delay"
    sender: Index = Field(description="who sent it")
    receiver: Index | None = Field(default=None, description="who gets it late; left out: everyone")
    round: Index = Field(description="the sender's round")
    seconds: Annotated[float, Within("a time", 0, open_low=True)] = Field(
        description="how much later, in virtual seconds"
    )


_FaultTable = Annotated[CrashConfig | RejoinConfig | DropConfig | DelayConfig, Field(discriminator="kind")]


# --- [run] ------------------------------------------------------------------------------------------------


class RunConfig(Settings):
    """How long, how measured, on what, and where to."""

    rounds: Count = Field(default=200, description="rounds of training and sharing")
    eval_every: Count = Field(
        default=20, description="rounds between two evaluations; start and end are always evaluated"
    )
    eval_at: Annotated[tuple[Index, ...], Field(strict=False)] = Field(
        default=(), description="further rounds to evaluate at"
    )
    eval_samples: Annotated[int | Literal["all"], OrWord(Within("a number of samples", 1), "all")] = Field(
        default="all", description="test samples of each evaluation, a fixed choice drawn from the seed, or all"
    )
    eval_samples_early: Annotated[int, Within("a number of samples", 1)] | None = Field(
        default=None,
        description="test samples of all evaluations but the last eval_last, some of eval_samples; "
        "left out: as many",
    )
    eval_last: Count = Field(default=5, description="evaluations at the end that use all eval_samples")
    eval_own: bool = Field(
        default=False,
        description="also evaluate each node on the test samples of the owners whose samples it trains on, "
        "on eval_samples of them at most",
    )
    seed: Annotated[int, Within("a signed 64-bit number", -(2**63), 2**63 - 1)] = Field(
        default=1, description="of everything random"
    )
    deadline_s: Annotated[float, Within("a time", 0, open_low=True)] | None = Field(
        default=None,
        description="virtual seconds a node waits for its neighbours' frames; left out: as long as it takes",
    )
    threads: Count = Field(default=1, description="threads for training; results do not depend on it")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where training happens; auto: cuda if there is one"
    )
    checkpoint_every: Count = Field(default=20, description="rounds between two checkpoints")
    folder: TomlPath | None = Field(
        default=None,
        description="where the run is written, from the current folder; left out: runs/<name>",
    )
    tensorboard: bool = Field(
        default=False, description="also write TensorBoard event files to the run folder; needs the extra"
    )


class Experiment(Settings):
    """Everything that determines a run, as the TOML file says it.

    Raises:
        ConfigError: from the constructor; names the TOML path, the value and the remedy of every problem.
    """

    name: str = Field(
        default="experiment", description="what tables, figures and the default folder call it", min_length=1
    )
    task: TaskConfig = TaskConfig(name="digits")
    nodes: NodesConfig = NodesConfig()
    if TYPE_CHECKING:
        topology: (
            RingConfig
            | FullyConnectedConfig
            | StarConfig
            | TorusConfig
            | RegularConfig
            | SmallWorldConfig
            | ErdosRenyiConfig
            | OnePeerExponentialConfig
            | EdgeListConfig
            | Topology
        ) = RegularConfig()
    else:
        topology: Annotated[
            _TopologyTable, OrObject(("at",), ("num_nodes",), base="jwins.topology.Topology")
        ] = Field(default=RegularConfig(), description="who sends to whom")
    train: TrainConfig = TrainConfig()
    if TYPE_CHECKING:
        sharing: FullConfig | RandomKConfig | TopKConfig | ChocoConfig | JwinsConfig | Sharing[Any] = (
            JwinsConfig()
        )
    else:
        sharing: Annotated[
            _SharingTable,
            OrObject(
                ("init", "share", "merge", "key", "missing", "update_dim"),
                ("remembers_peers", "state_types"),
                base="jwins.sharing.Sharing",
            ),
        ] = Field(default=JwinsConfig(), description="what is sent")
    wire: WireConfig = WireConfig()
    links: LinksConfig = LinksConfig()
    compute: ComputeConfig = ComputeConfig()
    faults: Annotated[tuple[_FaultTable, ...], Field(strict=False)] = Field(
        default=(), description="what goes wrong, as an array of tables"
    )
    run: RunConfig = RunConfig()

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not name.isprintable() or "/" in name or name.strip(". ") != name:
            raise refuse("", name, "expected a name that can be a folder's name")
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        count = self.nodes.count
        for path, value in (
            ("links.uplink_mbps", self.links.uplink_mbps),
            ("compute.step_ms", self.compute.step_ms),
        ):
            if isinstance(value, tuple) and len(value) != count:
                raise refuse(
                    path, list(value), f"{len(value)} numbers for {count} nodes; write one per node, or one"
                )
        for index, fault in enumerate(self.faults):
            for key in ("node", "sender", "receiver"):
                node = getattr(fault, key, None)
                if node is not None and node >= count:
                    raise refuse(f"faults[{index}].{key}", node, f"there are nodes 0 to {count - 1}")
        if self.run.deadline_s is None and any(isinstance(fault, DropConfig) for fault in self.faults):
            problem = "required when frames are dropped: how long a node waits for what may never come"
            raise refuse("run.deadline_s", MISSING, problem)
        for index, at in enumerate(self.run.eval_at):
            if at > self.run.rounds:
                raise refuse(f"run.eval_at[{index}]", at, f"the run ends after run.rounds = {self.run.rounds}")
        return self

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return self.run.folder if self.run.folder is not None else Path("runs") / self.name

    def resolved(self, relative_to: Path | None = None) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain tables.

        Args:
            relative_to: folder that paths are written relative to, so that a run folder can be moved
                together with what it names; None leaves them as they are.
        """
        tables: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        if self.task.own is not None:
            tables["task"]["own"] = _describe_task(self.task.own)
        tables["faults"] = list(tables["faults"])
        if not tables["faults"]:
            del tables["faults"]
        tables["run"]["folder"] = str(self.folder)
        if relative_to is not None:
            _rewrite_paths(tables, lambda path: Path(os.path.relpath(path, relative_to)).as_posix())
        return tables

    def to_toml(self, relative_to: Path | None = None) -> str:
        """The same as TOML, which :func:`load` reads again."""
        return write_toml(self.resolved(relative_to))

    def digest(self) -> bytes:
        """8 bytes that two experiments share if they have the same results; see :func:`digest_of`."""
        return digest_of(self.resolved())

    def changed(self, tables: Mapping[str, Any]) -> Experiment:
        """A copy with some keys changed; ``tables`` as in TOML, so ``{"run": {"seed": 2}}``.

        Raises:
            ConfigError: the result is not an experiment.
        """
        values = self._values()
        return Experiment(**lay_over(values, tables))

    def _values(self) -> dict[str, Any]:
        """The constructor's arguments, with objects as they are."""
        tables = self.model_dump(mode="python", exclude_none=True, exclude_unset=False)
        objects = {("task", "partition"), ("topology",), ("sharing",), ("sharing", "cutoff")}
        for path in objects:
            place: Any = self
            for step in path[:-1]:
                place = getattr(place, step)
            value = getattr(place, path[-1], None)
            if value is not None and not isinstance(value, Settings) and isinstance(place, Settings):
                table = tables
                for step in path[:-1]:
                    table = table[step]
                table[path[-1]] = value
        if self.task.own is not None:
            tables["task"]["own"] = self.task.own
        return tables

    @field_serializer("faults")
    def _plain_faults(self, faults: tuple[Any, ...]) -> list[dict[str, Any]]:
        return [fault.model_dump(exclude_none=True) for fault in faults]


def what_counts(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an experiment's resolved tables with everything that affects its results, as JSON has it.

    Left out are the name, folders, what only changes how fast a result comes (``run.threads`` and
    ``run.checkpoint_every``), and keys without effect that runs from before there were these keys do not have.
    """
    covered: dict[str, Any] = json.loads(json.dumps(tables))
    covered.pop("name", None)
    for key in ("threads", "checkpoint_every", "folder", "tensorboard"):
        covered["run"].pop(key, None)
    if not covered["run"].get("eval_own"):
        covered["run"].pop("eval_own", None)
    if covered["run"].get("eval_samples_early") is None:
        covered["run"].pop("eval_samples_early", None)
        covered["run"].pop("eval_last", None)
    covered["task"].pop("data", None)
    _rewrite_paths(covered, lambda path: Path(path).name)
    return covered


def digest_of(tables: Mapping[str, Any]) -> bytes:
    """BLAKE2b, 8 bytes, of everything in an experiment's resolved tables that affects its results."""
    text = json.dumps(what_counts(tables), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _describe_task(own: object) -> str:
    cls = own if isinstance(own, type) else type(own)
    return f"{cls.__module__}.{cls.__qualname__}"


def _rewrite_paths(tables: dict[str, Any], change: Any) -> None:
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


def lay_over(tables: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's tables with others laid over them; naming another task takes the place of the first."""
    merged = merge(tables, given)
    if given.keys() >= {"task"} and isinstance(given["task"], Mapping) and isinstance(merged["task"], dict):
        named = [key for key in ("name", "file", "own") if key in given["task"]]
        for key in ("name", "file", "own"):
            if named and key not in named:
                merged["task"].pop(key, None)
    return merged


# --- Reading ----------------------------------------------------------------------------------------------

BUNDLED = "experiments"
"""Folder of the package with the experiments that have names."""


def bundled() -> dict[str, str]:
    """The bundled experiments and comparisons, and the first line of comment in each."""
    found = {}
    for entry in sorted(resources.files("jwins").joinpath(BUNDLED).iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            first = entry.read_text(encoding="utf-8").partition("\n")[0]
            found[entry.name.removesuffix(".toml")] = first.lstrip("# ").strip()
    return found


def read(source: str | Path) -> tuple[dict[str, Any], str]:
    """The tables of a TOML file or a bundled experiment, paths in them made absolute.

    Args:
        source: a file, or the name of a bundled experiment.

    Returns:
        The tables, and what to call the source.

    Raises:
        ConfigError: neither a file nor a name, or not TOML.
    """
    path = Path(source)
    if path.is_file():
        text, origin, folder = _read_text(path), str(path), path.resolve().parent
    elif str(source) in (names := bundled()):
        entry = resources.files("jwins").joinpath(BUNDLED, f"{source}.toml")
        text, origin, folder = entry.read_text(encoding="utf-8"), str(source), Path.cwd()
    else:
        problem = "no such file" if path.suffix == ".toml" else "neither a file nor the name of an experiment"
        raise ConfigError(
            "experiment",
            str(source),
            f"{problem}{nearest(str(source), names) or ';'} bundled: {', '.join(names)}",
        )
    tables = read_toml(text, origin)
    _rewrite_paths(tables, lambda file: str(folder / file))
    return tables, origin


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError("experiment", str(path), f"not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise ConfigError("experiment", str(path), f"cannot be read: {error.strerror}") from None


def load(source: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """An experiment from a TOML file, or a bundled one by name.

    Paths in the file are relative to its folder, those in ``overrides`` to the current one.

    Args:
        source: file or name.
        overrides: ``key=value`` assignments as ``--set`` takes them; values are TOML, or else text.

    Raises:
        ConfigError: with TOML path, value and remedy.

    >>> load("digits", ["run.rounds=5", "sharing.kind=full"]).sharing
    FullConfig(kind='full', values='float32')
    """
    tables, origin = read(source)
    if "variants" in tables or "compare" in tables:
        raise ConfigError("experiment", str(source), "this is a comparison; run it with `jwins compare`")
    given = parse_overrides(overrides)
    _rewrite_paths(given, lambda file: str(Path(file).resolve()))
    tables = lay_over(tables, given)
    try:
        return Experiment(**tables)
    except ConfigError as error:
        error.add_note(f"in {origin}")
        raise
