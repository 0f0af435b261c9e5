"""The sections of an experiment as TOML has them; each class is a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from jwins.experiment.rules import MISSING, OneOrMany, OrObject, OrWord, TomlPath, Within, refuse
from jwins.experiment.settings import Settings

if TYPE_CHECKING:
    from jwins.sharing import Cutoff
    from jwins.tasks.partition import Partitioner
else:  # torch is not loaded only to read a configuration
    Cutoff = Partitioner = Any

__all__ = [
    "ByKeyConfig",
    "ChocoConfig",
    "ComputeConfig",
    "CrashConfig",
    "DelayConfig",
    "DirichletConfig",
    "DropConfig",
    "EdgeListConfig",
    "ErdosRenyiConfig",
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
]

Fraction = Annotated[float, Within("a fraction", 0, 1, open_low=True)]


Count = Annotated[int, Within("a whole number", 1)]


Index = Annotated[int, Within("a whole number", 0)]


Duration = Annotated[float, Within("a time", 0)]


Precision = Annotated[
    Literal["float32", "bfloat16"], Field(description="what values are rounded to before they are sent")
]


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
    threads: Count | None = Field(
        default=None,
        description="threads for training and evaluation; results do not depend on it; left out: as many as there "
        "are cores",
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
