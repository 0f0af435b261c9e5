"""The sections of an experiment; each class is a TOML table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from jwins.experiment.field_types import (
    Count,
    Fraction,
    Index,
    OneOf,
    OneOrMany,
    OrObject,
    OrWord,
    TomlPath,
    from_home,
    refuse,
)
from jwins.experiment.plugins import (
    FEATURE_SHIFT_TABLES,
    PARTITION_TABLES,
    FeatureShiftTable,
    IidConfig,
    PartitionTable,
    Plugin,
    by_kind,
)
from jwins.experiment.settings import Settings
from jwins.scenario import (
    DEADLINE_S,
    DELAY_S,
    LATENCY_MS,
    SPREAD,
    STEP_MS,
    UPLINK_MBPS,
    Attack,
    Compute,
    Fault,
    Links,
    Sending,
)
from jwins.validation import LEARNING_RATE, MISSING, MOMENTUM, NORM, RATE, Within

if TYPE_CHECKING:
    from jwins.node import Staleness
    from jwins.sharing import Nesterov
    from jwins.tasks.partition import Partitioner
    from jwins.training.learning_rate import LearningRateSchedule
else:  # torch is not loaded only to read a configuration
    Partitioner = Any

_FINAL = "fraction of the learning rate at the end of the run"


def _file_from_home(text: str) -> str:
    file, colon, name = text.rpartition(":")
    try:
        return f"{from_home(file)}{colon}{name}" if file else text
    except ValueError as error:
        raise PydanticCustomError("settings", "{text}", {"text": str(error)}) from None


class TaskConfig(Settings):
    """The task and the division of its data. Give exactly one of ``name``, ``file`` and ``own``."""

    name: str | None = Field(default=None, description="task of this package; `jwins list` shows all")
    file: Annotated[str, AfterValidator(_file_from_home)] | None = Field(
        default=None,
        description='your own task, such as "my_task.py:MyTask", relative to the folder of this TOML file',
    )
    own: Any = Field(default=None, exclude=True)
    options: Annotated[
        dict[str, Any], Field(description='arguments of the task\'s constructor, such as `{ model = "cnn" }`')
    ] = Field(default_factory=dict)
    data: TomlPath | None = Field(default=None, description="folder with the data, for tasks that need one")
    partition: Annotated[
        PartitionTable | Partitioner,
        OneOf(PARTITION_TABLES),
        OrObject(("split",), base="jwins.tasks.partition.Partitioner"),
    ] = Field(default=IidConfig(), description="division of the training samples among the nodes")
    label_noise: Annotated[float, Within("a fraction", 0, 1)] = Field(
        default=0.0,
        description="fraction of the training labels of the last node that are replaced by others; node i of N "
        "has the fraction i / (N - 1) of it",
    )
    feature_shift: Annotated[FeatureShiftTable, OneOf(FEATURE_SHIFT_TABLES)] | None = Field(
        default=None, description="change of the training inputs that grows from node to node; left out: none"
    )

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
            problem = 'only Python code can pass a task object; in TOML write file = "my_task.py:MyTask"'
            raise refuse("own", self.own, problem)
        if self.own is not None and self.options and not isinstance(self.own, type):
            raise refuse("options", self.options, "the task is an object already; pass its class instead")
        if self.file is not None and not all(self.file.rpartition(":")[::2]):
            raise refuse("file", self.file, 'expected file and class, such as "my_task.py:MyTask"')
        return self


class NodesConfig(Settings):
    """The nodes of the network."""

    count: Annotated[int, Within("a number of nodes", 1)] = Field(default=16, description="number of nodes")
    participation: Fraction = Field(
        default=1.0,
        description="share of the nodes that take part in a round, drawn from the seed; others neither train "
        "nor exchange anything",
    )


class OptimizerConfig(Settings):
    """An optimizer of torch.optim; all other keys are its options, with torch's names."""

    model_config = ConfigDict(extra="allow")

    kind: str = Field(default="sgd", description='optimizer of torch.optim, such as "sgd" or "adamw"')
    lr: Annotated[float, LEARNING_RATE] = Field(default=0.05, description="learning rate")
    quasi_global: Annotated[float, MOMENTUM] | None = Field(
        default=None,
        description="decay per round of the momentum of the merged models, from which local steps of sgd with "
        "momentum start; left out: they start from the momentum of the node",
    )

    weight_decay_on: Literal["all", "matrices"] = Field(
        default="all",
        description="all: weight_decay applies to all parameters; matrices: not to biases and scales of norms, "
        "which have fewer than two dimensions",
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            kind: str = "sgd",
            lr: float = 0.05,
            quasi_global: float | None = None,
            weight_decay_on: Literal["all", "matrices"] = "all",
            **options: Any,
        ) -> None: ...

    @property
    def options(self) -> dict[str, Any]:
        """Return all arguments of the optimizer's constructor."""
        return {"lr": self.lr, **(self.model_extra or {})}


class ScheduleTable(Plugin):
    """The learning rate over the local steps of the whole run."""

    warmup_steps: Index = Field(
        default=0, description="number of local steps at the start over which the learning rate rises linearly"
    )

    def build(self, total_steps: int) -> LearningRateSchedule | None:
        """Build the schedule of a run of ``total_steps`` local steps; None if the learning rate never changes.

        Raises:
            ConfigError: the warm-up would take the whole run.
        """
        from jwins.training.learning_rate import LearningRateSchedule

        found = LearningRateSchedule(total_steps=total_steps, **{"kind": self.kind, **self.arguments()})
        return None if self.kind == "constant" and self.warmup_steps == 0 else found


class ConstantScheduleConfig(ScheduleTable):
    """The learning rate stays after the warm-up."""

    kind: Literal["constant"] = "constant"


class LinearScheduleConfig(ScheduleTable):
    """The learning rate falls along a line after the warm-up."""

    kind: Literal["linear"] = "linear"
    final_fraction: Annotated[float, RATE] = Field(default=0.0, description=_FINAL)


class CosineScheduleConfig(ScheduleTable):
    """The learning rate falls along half a cosine after the warm-up."""

    kind: Literal["cosine"] = "cosine"
    final_fraction: Annotated[float, RATE] = Field(default=0.0, description=_FINAL)


SCHEDULE_TABLES: Mapping[str, type[ScheduleTable]] = by_kind(
    ConstantScheduleConfig, LinearScheduleConfig, CosineScheduleConfig
)
"""Tables by ``train.schedule.kind``."""


class NesterovOuterConfig(Plugin):
    """Nesterov's step on the change of a round, taken before the model is shared; DiLoCo's outer optimizer."""

    kind: Literal["nesterov"] = "nesterov"
    lr: Annotated[float, LEARNING_RATE] = Field(
        default=0.7, description="learning rate of the outer step; 1 with momentum 0 changes nothing"
    )
    momentum: Annotated[float, MOMENTUM] = Field(
        default=0.9, description="decay of the outer momentum from round to round"
    )

    def build(self) -> Nesterov:
        """Return the outer optimizer of the nodes."""
        from jwins.sharing import Nesterov

        return Nesterov(**self.arguments())


class PrivacyConfig(Settings):
    """DP-SGD; needs the extra `privacy`. Give one of ``epsilon`` and ``noise_multiplier``."""

    epsilon: Annotated[float, Within("a budget", 0, open_low=True)] | None = Field(
        default=None, description="privacy that a node has spent after all rounds; the noise follows from it"
    )
    noise_multiplier: Annotated[float, Within("a noise multiplier", 0, open_low=True)] | None = Field(
        default=None, description="standard deviation of the noise of a step, over clip_norm"
    )
    delta: Annotated[float, Within("a probability", 0, 0.5, open_low=True)] = Field(
        default=1e-5, description="probability with which epsilon may be exceeded; below 1 / samples of a node"
    )
    clip_norm: Annotated[float, NORM] = Field(
        default=1.0, description="largest norm of the gradient of a sample, over all parameters together"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise refuse("", self.model_dump(exclude_none=True), "expected one of epsilon and noise_multiplier")
        return self


class TrainConfig(Settings):
    """Local training, the same on every node."""

    local_steps: Annotated[int | tuple[int, ...], OneOrMany(Within("a whole number", 1), whole=True)] = Field(
        default=3, description="optimizer steps between two rounds of sharing, one number or one per node"
    )
    local_epochs: Annotated[float, Within("a number of passes", 0, open_low=True)] | None = Field(
        default=None,
        description="passes over the samples of a node between two rounds, in place of local_steps: a node "
        "with more samples takes more steps, rounded up; left out: local_steps",
    )
    balanced: bool = Field(
        default=False,
        description="give each node as many local steps as fit into the time of local_steps at a node of "
        "median speed, and weigh its change so that all nodes count alike",
    )
    batch_size: Count = Field(default=8, description="samples per step")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Annotated[ScheduleTable, OneOf(SCHEDULE_TABLES)] = Field(
        default=ConstantScheduleConfig(), description="learning rate over the local steps of the whole run"
    )
    outer: NesterovOuterConfig | None = Field(
        default=None,
        description="step on the change of a round before it is shared; left out: share the trained model",
    )
    clip_norm: Annotated[float, NORM] | None = Field(
        default=None,
        description="largest norm of the gradient of a step, over all parameters together; left out: any",
    )
    privacy: PrivacyConfig | None = Field(
        default=None, description="differential privacy of the training samples; left out: none"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="operations of the model in training; bfloat16: torch autocast, with float32 parameters",
    )
    optimizer_state: Literal["keep", "reset"] = Field(
        default="keep",
        description="keep: the state of the optimizer carries over to the next round; reset: it starts anew",
    )
    buffers: Literal["local", "shared"] = Field(
        default="local",
        description="local: floating-point buffers (BatchNorm) stay on the node; shared: they are sent",
    )
    batching: Literal["auto", "loop", "stacked"] = Field(
        default="auto",
        description="loop: train nodes one by one; stacked: as one stacked model; auto: choose by a fixed rule",
    )

    @model_validator(mode="after")
    def _private(self) -> Self:
        if self.privacy is not None and self.clip_norm is not None:
            problem = "train.privacy clips the gradient of each sample by its own clip_norm; remove one of both"
            raise refuse("clip_norm", self.clip_norm, problem)
        if self.privacy is not None and self.batching == "stacked":
            problem = "train.privacy takes the gradients of single samples, node by node; write loop or auto"
            raise refuse("batching", self.batching, problem)
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_epochs is not None and self.local_steps != 3:
            problem = (
                f"local_steps = {self.local_steps} already sets how much a node trains; remove one of them"
            )
            raise refuse("local_epochs", self.local_epochs, problem)
        if self.balanced and (self.local_epochs is not None or isinstance(self.local_steps, tuple)):
            problem = "needs one number of local_steps, that of a node of median speed; remove one of them"
            raise refuse("balanced", True, problem)
        if self.uneven and self.batching == "stacked":
            problem = "nodes with different numbers of local steps train one by one; write loop or auto"
            raise refuse("batching", self.batching, problem)
        return self

    @property
    def uneven(self) -> bool:
        """Return whether the number of local steps may differ between nodes."""
        return self.balanced or self.local_epochs is not None or isinstance(self.local_steps, tuple)


class WireConfig(Settings):
    """The encoding of updates into bytes."""

    codec: Literal["pco", "raw", "paper"] = Field(
        default="pco",
        description="pco: pcodec, or entropy-coded symbols; raw: uint32 and float32; "
        "paper: Elias gamma and fpzip, to count its bytes",
    )


class LinksConfig(Settings):
    """The simulated network."""

    uplink_mbps: Annotated[float | tuple[float, ...], OneOrMany(UPLINK_MBPS)] = Field(
        default=100.0,
        description="uplink of a node in Mbit/s, one number or one per node; simultaneous sends share it",
    )
    latency_ms: Annotated[float, LATENCY_MS] = Field(
        default=20.0, description="milliseconds from the last byte sent to the arrival of the frame"
    )
    sending: Sending = Field(
        default="together",
        description="together: the frames of a node share its uplink; in_turn: they leave one by one",
    )

    def build(self) -> Links:
        """Return the driver's form of these settings."""
        return Links(self.uplink_mbps, self.latency_ms, self.sending)


class ComputeConfig(Settings):
    """The simulated duration of local training."""

    step_ms: Annotated[float | tuple[float, ...], OneOrMany(STEP_MS)] = Field(
        default=10.0, description="virtual milliseconds of one local step, one number or one per node"
    )
    spread: Annotated[float, SPREAD] = Field(
        default=0.0,
        description="standard deviation over nodes of the logarithm of their step time; drawn from the seed",
    )
    jitter: Annotated[float, SPREAD] = Field(
        default=0.0,
        description="standard deviation over the rounds of a node of the logarithm of its step time",
    )

    def build(self) -> Compute:
        """Return the driver's form of these settings."""
        return Compute(self.step_ms, self.spread, self.jitter)


class FaultTable(Plugin):
    """A fault, the recovery from one, or an attack."""

    def build(self) -> Fault | Attack:
        """Return the engine's form of these settings."""
        given = self.arguments()
        node = given.pop("node" if "node" in given else "sender")
        return Fault(self.kind, node, **given)  # type: ignore[arg-type]


class CrashConfig(FaultTable):
    """A node stops before it trains; the frames that it sent before still arrive."""

    kind: Literal["crash"] = "crash"
    node: Index = Field(description="id of the node")
    round: Index = Field(description="round of the crash, counted from 0")


class RejoinConfig(FaultTable):
    """A crashed node comes back with the state it had at the crash."""

    kind: Literal["rejoin"] = "rejoin"
    node: Index = Field(description="id of the node")
    round: Index = Field(description="the node comes back when the first other node begins this round")


class DropConfig(FaultTable):
    """A frame is lost: its bytes count as sent, and it never arrives."""

    kind: Literal["drop"] = "drop"
    sender: Index = Field(description="id of the node that sends the frame")
    receiver: Index | None = Field(
        default=None, description="id of the node that does not receive it; left out: no node receives it"
    )
    round: Index = Field(description="round of the sender")


class DelayConfig(FaultTable):
    """A frame arrives late."""

    kind: Literal["delay"] = "delay"
    sender: Index = Field(description="id of the node that sends the frame")
    receiver: Index | None = Field(
        default=None, description="id of the node that receives it late; left out: all receivers"
    )
    round: Index = Field(description="round of the sender")
    seconds: Annotated[float, DELAY_S] = Field(description="delay in virtual seconds")


class AttackConfig(FaultTable):
    """Nodes that share false models, or train on false labels; they are left out of all measurements."""

    kind: Literal["attack"] = "attack"
    nodes: Annotated[tuple[Index, ...], Field(strict=False, min_length=1)] = Field(
        description="ids of the nodes that attack"
    )
    form: Literal["sign_flip", "gaussian", "little", "label_flip"] = Field(
        description="sign_flip: share the opposite of the own training; gaussian: add noise; little: stay "
        "within the spread of the received models; label_flip: train on false labels"
    )
    round: Index = Field(default=0, description="first round of the attack; label_flip attacks from round 0")
    scale: Annotated[float, Within("a number", 0, open_low=True)] = Field(
        default=1.0,
        description="sign_flip: multiple of the own training; gaussian: standard deviation; little: number of "
        "standard deviations",
    )

    @model_validator(mode="after")
    def _fits_the_attack(self) -> Self:
        if self.form == "label_flip" and self.round:
            raise refuse("round", self.round, "labels are flipped from round 0 on; leave it out")
        if self.form == "label_flip" and self.scale != 1.0:
            raise refuse("scale", self.scale, "all labels are flipped; leave it out")
        return self

    def build(self) -> Attack:
        """Return the driver's form of the fault."""
        return Attack(self.form, self.round, self.scale)


FAULT_TABLES: Mapping[str, type[FaultTable]] = by_kind(
    CrashConfig, RejoinConfig, DropConfig, DelayConfig, AttackConfig
)
"""Tables by ``faults[i].kind``."""


class StopConfig(Settings):
    """The rule by which a run ends before its last round. Give one of ``target`` and ``patience``."""

    metric: str = Field(default="accuracy", description="metric of the task whose mean over nodes ends the run")
    target: Annotated[float, Within("a number")] | None = Field(
        default=None, description="end the run at the first evaluation that reaches this value"
    )
    patience: Count | None = Field(
        default=None, description="end the run after this number of evaluations in a row without a better value"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.target is None) == (self.patience is None):
            raise refuse("", self.model_dump(exclude_none=True), "expected one of target and patience")
        return self


class RunConfig(Settings):
    """Length, evaluation, device and output of a run."""

    rounds: Count = Field(default=200, description="number of rounds of training and sharing")
    consensus_rounds: Index = Field(
        default=0,
        description="number of rounds at the end without training; the last of them is evaluated",
    )
    eval_every: Count = Field(
        default=20, description="number of rounds between two evaluations; start and end are always evaluated"
    )
    eval_at: Annotated[tuple[Index, ...], Field(strict=False)] = Field(
        default=(), description="additional rounds after which to evaluate"
    )
    eval_samples: Annotated[int | Literal["all"], OrWord(Within("a number of samples", 1), "all")] = Field(
        default="all",
        description="number of test samples per evaluation, a fixed choice drawn from the seed; or all",
    )
    eval_samples_early: Annotated[int, Within("a number of samples", 1)] | None = Field(
        default=None,
        description="number of test samples, a subset of eval_samples, in all but the last eval_last "
        "evaluations; left out: all eval_samples",
    )
    eval_last: Count = Field(
        default=5, description="number of evaluations at the end that use all eval_samples"
    )
    eval_own: bool = Field(
        default=False,
        description="also evaluate each node on test samples like its own, at most eval_samples of them: of "
        "the owners whose data it trains on, or in the proportions of its labels",
    )
    seed: Annotated[int, Within("a signed 64-bit number", -(2**63), 2**63 - 1)] = Field(
        default=1, description="seed of all random choices"
    )
    mode: Literal["sync", "async"] = Field(
        default="sync",
        description="sync: a node waits for the frames of its neighbours; async: it merges what has arrived, "
        "and rounds of the run are those that more than half of the nodes have completed",
    )
    max_staleness: Count = Field(
        default=16,
        description="async: largest staleness of a frame that is merged: the rounds that its sender or its "
        "receiver has completed between two merges of the sender's frames, less 1",
    )
    staleness_power: Annotated[float, Within("a power", 0)] = Field(
        default=0.0, description="async: divide the weight of a frame by (1 + its staleness) to this power"
    )
    stop: StopConfig | None = None
    deadline_s: Annotated[float, DEADLINE_S] | None = Field(
        default=None,
        description="virtual seconds that a node waits for the frames of its neighbours; left out: no limit",
    )
    threads: Count | None = Field(
        default=None,
        description="number of threads for training and evaluation, without effect on results; "
        "left out: one per core",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="device for training; auto: cuda if available"
    )
    checkpoint_every: Count = Field(default=20, description="number of rounds between two checkpoints")
    folder: TomlPath | None = Field(
        default=None,
        description="folder of the run, relative to the current folder; left out: runs/<name>",
    )
    tensorboard: bool = Field(
        default=False,
        description="also write TensorBoard event files to the run folder; needs the extra `tensorboard`",
    )

    def staleness(self) -> Staleness | None:
        """Return the nodes' rule for stale updates; None if they wait for each other."""
        from jwins.node import Staleness

        return Staleness(self.max_staleness, self.staleness_power) if self.mode == "async" else None

    @model_validator(mode="after")
    def _mode_fits(self) -> Self:
        if self.mode == "async" and self.deadline_s is not None:
            problem = 'with run.mode = "async" no node waits; remove it'
            raise refuse("deadline_s", self.deadline_s, problem)
        if self.mode == "async" and self.consensus_rounds:
            problem = 'with run.mode = "async" nodes have no rounds in common; remove it'
            raise refuse("consensus_rounds", self.consensus_rounds, problem)
        return self

    @model_validator(mode="after")
    def _stop_fits(self) -> Self:
        if self.stop is not None and self.consensus_rounds:
            problem = "such a run may never reach the consensus rounds after the last round; remove one"
            raise refuse("stop", self.stop.model_dump(exclude_none=True), problem)
        if self.stop is not None and self.eval_samples_early is not None:
            problem = "the last evaluations are not known in advance; remove this, or run.eval_samples_early"
            raise refuse("stop", self.stop.model_dump(exclude_none=True), problem)
        return self
