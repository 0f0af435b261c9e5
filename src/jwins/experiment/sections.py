"""The sections of an experiment as TOML has them; each class is a table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from jwins.experiment.field_types import (
    MISSING,
    Count,
    Index,
    OneOrMany,
    OrObject,
    OrWord,
    TomlPath,
    Within,
    refuse,
)
from jwins.experiment.plugins import PARTITION_TABLES, IidConfig, PartitionTable, Plugin, by_kind, one_of
from jwins.experiment.settings import Settings
from jwins.scenario import (
    DEADLINE_S,
    DELAY_S,
    LATENCY_MS,
    SPREAD,
    STEP_MS,
    UPLINK_MBPS,
    Compute,
    Fault,
    Links,
    Sending,
)
from jwins.validation import MOMENTUM

if TYPE_CHECKING:
    from jwins.tasks.partition import Partitioner
else:  # torch is not loaded only to read a configuration
    Partitioner = Any

__all__ = [
    "FAULT_TABLES",
    "ComputeConfig",
    "CrashConfig",
    "DelayConfig",
    "DropConfig",
    "FaultTable",
    "LinksConfig",
    "NodesConfig",
    "OptimizerConfig",
    "RejoinConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "WireConfig",
]


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
        partition: PartitionTable | Partitioner = IidConfig()
    else:
        partition: Annotated[
            one_of(PARTITION_TABLES), OrObject(("split",), base="jwins.tasks.partition.Partitioner")
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


class OptimizerConfig(Settings):
    """A torch.optim optimizer; further keys are its options, by torch's names."""

    model_config = ConfigDict(extra="allow")

    kind: str = Field(default="sgd", description='a torch.optim optimizer, such as "sgd" or "adamw"')
    lr: Annotated[float, Within("a learning rate", 0, open_low=True)] = Field(
        default=0.05, description="learning rate"
    )
    quasi_global: Annotated[float, MOMENTUM] | None = Field(
        default=None,
        description="local steps of sgd with momentum start from the momentum of the merged models, this part "
        "of which lives on from round to round; left out: from the node's own",
    )

    if TYPE_CHECKING:

        def __init__(
            self, *, kind: str = "sgd", lr: float = 0.05, quasi_global: float | None = None, **options: Any
        ) -> None: ...

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


class WireConfig(Settings):
    """How updates become bytes."""

    codec: Literal["pco", "raw", "paper"] = Field(
        default="pco",
        description="pco: pcodec, or entropy-coded symbols; raw: uint32 and float32; "
        "paper: Elias gamma and fpzip, to count its bytes",
    )


class LinksConfig(Settings):
    """The network of the virtual clock."""

    if TYPE_CHECKING:
        uplink_mbps: float | tuple[float, ...] = 100.0
    else:
        uplink_mbps: Annotated[float | tuple[float, ...], OneOrMany(UPLINK_MBPS)] = Field(
            default=100.0, description="what a node can send, shared by its simultaneous sends"
        )
    latency_ms: Annotated[float, LATENCY_MS] = Field(
        default=20.0, description="from the last byte sent to the frame received"
    )
    sending: Sending = Field(
        default="together",
        description="whether a node's frames share its uplink, or leave one after another, as between machines",
    )

    def build(self) -> Links:
        """What the driver is given."""
        return Links(self.uplink_mbps, self.latency_ms, self.sending)


class ComputeConfig(Settings):
    """How long local training takes on the virtual clock."""

    if TYPE_CHECKING:
        step_ms: float | tuple[float, ...] = 10.0
    else:
        step_ms: Annotated[float | tuple[float, ...], OneOrMany(STEP_MS)] = Field(
            default=10.0, description="virtual time of one local step"
        )
    spread: Annotated[float, SPREAD] = Field(
        default=0.0, description="over nodes, of the logarithm of their slowness; drawn from the seed"
    )
    jitter: Annotated[float, SPREAD] = Field(default=0.0, description="the same over the rounds of a node")

    def build(self) -> Compute:
        """What the driver is given."""
        return Compute(self.step_ms, self.spread, self.jitter)


class FaultTable(Plugin):
    """Something that goes wrong, or right again."""

    @abstractmethod
    def build(self) -> Fault:
        """What the driver is given."""


class CrashConfig(FaultTable):
    """A node stops when it is about to train; what it had sent arrives."""

    kind: Literal["crash"] = "crash"
    node: Index = Field(description="which node")
    round: Index = Field(description="the round in which it happens, from 0")

    def build(self) -> Fault:
        """See :meth:`FaultTable.build`."""
        return Fault("crash", self.node, self.round)


class RejoinConfig(FaultTable):
    """A crashed node comes back, with its state of the crash."""

    kind: Literal["rejoin"] = "rejoin"
    node: Index = Field(description="which node")
    round: Index = Field(description="the round that the first of the others begins when it comes back")

    def build(self) -> Fault:
        """See :meth:`FaultTable.build`."""
        return Fault("rejoin", self.node, self.round)


class DropConfig(FaultTable):
    """A frame is sent, its bytes count, and it never arrives."""

    kind: Literal["drop"] = "drop"
    sender: Index = Field(description="who sent it")
    receiver: Index | None = Field(default=None, description="who does not get it; left out: nobody gets it")
    round: Index = Field(description="the sender's round")

    def build(self) -> Fault:
        """See :meth:`FaultTable.build`."""
        return Fault("drop", self.sender, self.round, self.receiver)


class DelayConfig(FaultTable):
    """A frame arrives late."""

    kind: Literal["delay"] = "delay"
    sender: Index = Field(description="who sent it")
    receiver: Index | None = Field(default=None, description="who gets it late; left out: everyone")
    round: Index = Field(description="the sender's round")
    seconds: Annotated[float, DELAY_S] = Field(description="how much later, in virtual seconds")

    def build(self) -> Fault:
        """See :meth:`FaultTable.build`."""
        return Fault("delay", self.sender, self.round, self.receiver, self.seconds)


FAULT_TABLES: Mapping[str, type[FaultTable]] = by_kind((CrashConfig, RejoinConfig, DropConfig, DelayConfig))
"""What ``faults[i].kind`` may say."""


class RunConfig(Settings):
    """How long, how measured, on what, and where to."""

    rounds: Count = Field(default=200, description="rounds of training and sharing")
    consensus_rounds: Index = Field(
        default=0,
        description="rounds of sharing alone at the end, evaluated after the last of them, too",
    )
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
    deadline_s: Annotated[float, DEADLINE_S] | None = Field(
        default=None,
        description="virtual seconds a node waits for its neighbours' frames; left out: as long as it takes",
    )
    threads: Count | None = Field(
        default=None,
        description="for training and evaluation; left out: as many as there are cores; "
        "results do not depend on it",
    )
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
