"""Tables of TOML for algorithms, cut-offs, quantizers, topologies and partitioners.

Each class is one table. Its keys are the arguments of the object that ``build`` makes, with the same names and
defaults; they are repeated here, because reading a signature would import torch; a test compares them. A
mapping at the end of each section lists the values of ``kind``, one row per class. The check of settings,
``jwins list`` and the reference of all keys read these mappings.

Nothing here imports torch or networkx before something is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from jwins.experiment.field_types import Count, Fraction, OneOf, OrObject, OrWords, TomlPath, refuse
from jwins.experiment.settings import Settings
from jwins.validation import (
    BITS,
    BYTES,
    DEAD_ZONE,
    GAMMA,
    HISTORY,
    LEARNING_RATE,
    LEVELS,
    MBPS,
    MISSING,
    MOMENTUM,
    RANK,
    RATE,
    SECONDS,
    STEP,
    STEP_RATIO,
    Within,
)

if TYPE_CHECKING:
    from jwins.sharing import Cutoff, Quantizer, RobustMerge, Sharing
    from jwins.tasks.partition import Partitioner
    from jwins.topology.graph import Topology
else:  # torch is not loaded only to read a configuration
    Cutoff = Partitioner = Quantizer = RobustMerge = Sharing = Topology = Any


class Plugin(Settings):
    """A table whose ``kind`` names the class that it builds."""

    if TYPE_CHECKING:
        kind: str

    @classmethod
    def name(cls) -> str:
        """Return the ``kind`` of this class."""
        return str(cls.model_fields["kind"].default)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments: every key but ``kind``, with objects built from tables."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name != "kind"}
        return {
            name: value.build() if isinstance(value, ComponentTable) else value for name, value in given.items()
        }


class ComponentTable(Plugin):
    """A component of an algorithm, in a table within that of the algorithm."""

    registry: ClassVar[str]

    def build(self) -> Any:
        """Build the object of this name in the registry of :mod:`jwins.sharing`."""
        from jwins import sharing

        return getattr(sharing, self.registry)[self.kind](**self.arguments())


P = TypeVar("P", bound=Plugin)


def by_kind(*tables: type[P]) -> dict[str, type[P]]:
    """Return the tables by their ``kind``."""
    return {table.name(): table for table in tables}


# --- Partitioners -----------------------------------------------------------------------------------------


class PartitionTable(Plugin):
    """A division of the training samples among the nodes."""

    def build(self) -> Partitioner:
        """Build the partitioner of this name in :data:`jwins.tasks.partition.PARTITIONERS`."""
        from jwins.tasks.partition import PARTITIONERS

        return PARTITIONERS[self.kind](**self.arguments())


class IidConfig(PartitionTable):
    """Shuffle the samples and deal them out evenly."""

    kind: Literal["iid"] = "iid"


class ContiguousConfig(PartitionTable):
    """Cut the samples, in their order, into runs of equal length, one for each node."""

    kind: Literal["contiguous"] = "contiguous"


class ShardsConfig(PartitionTable):
    """Sort the samples by label, cut them into shards and deal these out at random: few labels per node."""

    kind: Literal["shards"] = "shards"
    shards_per_node: Count = Field(default=2, description="number of shards that each node gets")


class DirichletConfig(PartitionTable):
    """Divide each label among the nodes in proportions drawn from a Dirichlet distribution."""

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: Annotated[float, Within("a concentration", 0, open_low=True)] = Field(
        default=0.5, description="concentration; a smaller value gives each node fewer labels"
    )
    min_samples: Count = Field(default=1, description="minimum number of samples per node")


class QuantityConfig(PartitionTable):
    """Deal out shuffled samples in numbers drawn from a Dirichlet distribution: nodes of unequal size."""

    kind: Literal["quantity"] = "quantity"
    alpha: Annotated[float, Within("a concentration", 0, open_low=True)] = Field(
        default=0.5, description="concentration; a smaller value makes nodes less equal in size"
    )
    min_samples: Count = Field(default=1, description="minimum number of samples per node")


class ByKeyConfig(PartitionTable):
    """Give all samples of an owner (writer, user, role) to one node."""

    kind: Literal["by_key"] = "by_key"


PARTITION_TABLES: Mapping[str, type[PartitionTable]] = by_kind(
    IidConfig, ShardsConfig, DirichletConfig, QuantityConfig, ByKeyConfig, ContiguousConfig
)
"""Tables by ``task.partition.kind``."""


# --- Samples of a node's own: the same data, changed from node to node ----------------------------------------


class FeatureShiftTable(Plugin):
    """A change of inputs that grows from the first node to the last."""


class RotationConfig(FeatureShiftTable):
    """Rotate the images of node i of N by the fraction i / (N - 1) of an angle."""

    kind: Literal["rotation"] = "rotation"
    degrees: Annotated[float, Within("an angle", -180, 180)] = Field(
        default=45.0, description="angle of the last node, counterclockwise"
    )


class NoiseConfig(FeatureShiftTable):
    """Add Gaussian noise to the inputs of node i of N, of the fraction i / (N - 1) of a deviation."""

    kind: Literal["noise"] = "noise"
    sd: Annotated[float, Within("a standard deviation", 0, open_low=True)] = Field(
        default=0.5, description="standard deviation of the last node, in units of that of all training inputs"
    )


FEATURE_SHIFT_TABLES: Mapping[str, type[FeatureShiftTable]] = by_kind(RotationConfig, NoiseConfig)
"""Tables by ``task.feature_shift.kind``."""

# --- Topologies -------------------------------------------------------------------------------------------


Dynamic = Annotated[bool, Field(description="draw a new graph in each round")]


class TopologyTable(Plugin):
    """A communication graph: the neighbours of each node."""

    always_changes: ClassVar[bool] = False

    @property
    def changes(self) -> bool:
        """Return whether a node's neighbours change from round to round."""
        return getattr(self, "dynamic", self.always_changes)

    def build(self, *, num_nodes: int, seed: int) -> Topology:
        """Build the topology of this name in :data:`jwins.topology.TOPOLOGIES`.

        Raises:
            ConfigError: no such graph exists.
        """
        from jwins.topology import TOPOLOGIES

        given = {key: value for key, value in self.arguments().items() if value is not None}
        return TOPOLOGIES[self.kind](num_nodes=num_nodes, seed=seed, **given)


class RingConfig(TopologyTable):
    """A circle in which every node has two neighbours."""

    kind: Literal["ring"] = "ring"


class FullyConnectedConfig(TopologyTable):
    """A complete graph: every node is a neighbour of every other."""

    kind: Literal["fully_connected"] = "fully_connected"


class StarConfig(TopologyTable):
    """Node 0 in the centre, as the only neighbour of every other node."""

    kind: Literal["star"] = "star"


class TorusConfig(TopologyTable):
    """A grid that wraps around."""

    kind: Literal["torus"] = "torus"
    rows: Count | None = Field(
        default=None,
        description="number of rows, a divisor of the number of nodes; left out: as square as possible",
    )


class RegularConfig(TopologyTable):
    """A random graph in which every node has the same number of neighbours."""

    kind: Literal["regular"] = "regular"
    degree: Count = Field(default=4, description="number of neighbours of each node")
    dynamic: Dynamic = False


class SmallWorldConfig(TopologyTable):
    """Watts-Strogatz: a ring of nearest neighbours in which some edges are rewired."""

    kind: Literal["small_world"] = "small_world"
    degree: Count = Field(default=4, description="neighbours of each node before rewiring; an even number")
    rewire: Annotated[float, Within("a probability", 0, 1)] = Field(
        default=0.1, description="probability that an edge is rewired"
    )
    dynamic: Dynamic = False


class ErdosRenyiConfig(TopologyTable):
    """A connected random graph in which each edge has the same probability."""

    kind: Literal["erdos_renyi"] = "erdos_renyi"
    p: Annotated[float, Within("a probability", 0, 1, open_low=True)] = Field(
        default=0.5, description="probability of each edge"
    )
    dynamic: Dynamic = False


class OnePeerExponentialConfig(TopologyTable):
    """A directed graph: one recipient per round, at a distance that doubles."""

    kind: Literal["one_peer_exponential"] = "one_peer_exponential"
    always_changes: ClassVar[bool] = True


class FiniteTimeConfig(TopologyTable):
    """Base-(k+1) graphs: a sequence of sparse graphs after which all nodes hold the exact average."""

    kind: Literal["finite_time"] = "finite_time"
    degree: Count = Field(default=1, description="maximum number of neighbours of a node in a round, k")
    always_changes: ClassVar[bool] = True


class EdgeListConfig(TopologyTable):
    """A graph from a text file with two node numbers per line."""

    kind: Literal["edge_list"] = "edge_list"
    path: TomlPath = Field(
        description="file, relative to the folder of this TOML file; may begin with the number of nodes"
    )


TOPOLOGY_TABLES: Mapping[str, type[TopologyTable]] = by_kind(
    RingConfig,
    FullyConnectedConfig,
    StarConfig,
    TorusConfig,
    RegularConfig,
    SmallWorldConfig,
    ErdosRenyiConfig,
    OnePeerExponentialConfig,
    FiniteTimeConfig,
    EdgeListConfig,
)
"""Tables by ``topology.kind``."""


# --- Cut-offs of JWINS -----------------------------------------------------------------------


class CutoffTable(ComponentTable):
    """The fraction of the coefficients that is sent."""

    registry = "CUTOFFS"


class RandomCutoffConfig(CutoffTable):
    """Each node draws a fraction from a list in each round."""

    kind: Literal["random"] = "random"
    fractions: Annotated[tuple[Fraction, ...], Field(strict=False, min_length=1)] = Field(
        default=(0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 1.0), description="values to draw from, all equally likely"
    )


class FixedCutoffConfig(CutoffTable):
    """The same fraction in every round."""

    kind: Literal["fixed"] = "fixed"
    fraction: Fraction = Field(description="fraction of the coefficients that is sent")


CUTOFF_TABLES: Mapping[str, type[CutoffTable]] = by_kind(RandomCutoffConfig, FixedCutoffConfig)
"""Tables by ``sharing.cutoff.kind``."""


# --- Quantizers of sent values ---------------------------------------------------------


class QuantizerTable(ComponentTable):
    """The rounding of values before they are sent."""

    registry = "QUANTIZERS"


class UniformConfig(QuantizerTable):
    """Integer multiples of one step, compressed by an entropy coder."""

    kind: Literal["uniform"] = "uniform"
    step: Annotated[float, Within("a step", 1e-30)] = Field(
        description="distance between two symbols, in units of the coefficients or parameters that are sent"
    )
    rounding: Literal["nearest", "dithered", "stochastic"] = Field(
        default="nearest",
        description="nearest: to the nearest symbol; dithered, stochastic: without bias; "
        "see docs/explanation/algorithm.md",
    )
    dead_zone: Annotated[float, Within("a dead zone", 0.5, 1)] = Field(
        default=0.5, description="values closer to zero than this number of steps become 0; only with nearest"
    )
    offset: Annotated[float, Within("an offset", 0, 0.49)] = Field(
        default=0.0, description="shift of decoded nonzero symbols towards zero, in steps; only with nearest"
    )


class AbsmaxConfig(QuantizerTable):
    """A fixed number of bits per value, scaled by the largest value of each block."""

    kind: Literal["absmax"] = "absmax"
    bits: Annotated[int, Within("a whole number of bits", 2, 8)] = Field(description="bits per value")
    block: Annotated[int, Within("a whole number of values per block", 16)] = Field(
        default=256, description="number of values that share one step; each step costs two bytes"
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="stochastic",
        description="nearest: to the nearest symbol; stochastic: without bias; docs/explanation/algorithm.md",
    )


QUANTIZER_TABLES: Mapping[str, type[QuantizerTable]] = by_kind(UniformConfig, AbsmaxConfig)
"""Tables by ``sharing.values.kind``."""


# --- Robust merges -----------------------------------------------------------------


class RobustTable(ComponentTable):
    """A robust merge."""

    registry = "ROBUST_MERGES"


Attackers = Annotated[Count, Field(description="number of neighbours of a node that may attack")]


class ClippedGossipConfig(RobustTable):
    """Mix as full sharing does, with every difference clipped to a radius."""

    kind: Literal["clipped_gossip"] = "clipped_gossip"
    radius: Annotated[float, Within("a distance", 0, open_low=True)] | None = Field(
        default=None,
        description="largest distance of two models that counts; left out: that of the nearest neighbours "
        "without as many as may attack",
    )
    attackers: Attackers = 1


class TrimmedMeanConfig(RobustTable):
    """Mean of each parameter without its lowest and highest values."""

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    attackers: Attackers = 1


class MedianConfig(RobustTable):
    """Median of each parameter over the node's own and all received values."""

    kind: Literal["median"] = "median"


ROBUST_TABLES: Mapping[str, type[RobustTable]] = by_kind(ClippedGossipConfig, TrimmedMeanConfig, MedianConfig)
"""Tables by ``sharing.robust.kind``."""

# --- Sharing algorithms -----------------------------------------------------------------------------------


GammaOfFraction = Annotated[
    float, GAMMA, Field(description="consensus step size; a smaller fraction needs a smaller step")
]
Levels = Annotated[int, LEVELS, Field(description="number of levels of the wavelet transform")]
WaveletMode = Annotated[
    Literal["symmetric", "periodization"],
    Field(description="extension of the signal beyond its ends, as in PyWavelets"),
]
AnyCutoff = Annotated[
    CutoffTable | Cutoff,
    OneOf(CUTOFF_TABLES),
    Field(description="fraction of the coefficients that is sent"),
    OrObject(()),
]
Robust = Annotated[RobustTable | RobustMerge, OneOf(ROBUST_TABLES), OrObject(())]
Values = Annotated[
    Literal["float32", "bfloat16"] | QuantizerTable | Quantizer,
    OneOf(QUANTIZER_TABLES),
    Field(description="number format or quantizer of the values that are sent"),
    OrWords("float32", "bfloat16"),
    OrObject(()),
]
WaveletName = Annotated[
    str | None,
    BeforeValidator(lambda name: "none" if name is None else name),
    Field(description='name of a discrete wavelet of PyWavelets; "none" sends parameters without a transform'),
]


class SharingTable(Plugin):
    """A sharing algorithm."""

    def build(self) -> Sharing[Any]:
        """Build the algorithm whose constructor has this name in :mod:`jwins.sharing`.

        Raises:
            ConfigError: no such wavelet.
        """
        from jwins import sharing

        return getattr(sharing, self.kind)(**self.arguments())  # type: ignore[no-any-return]


class FullConfig(SharingTable):
    """D-PSGD: send all parameters in every round."""

    kind: Literal["full"] = "full"
    values: Values = "float32"
    robust: Robust | None = Field(
        default=None,
        description="robust merge, against attackers among the neighbours; left out: mixing weights alone",
    )


class RandomKConfig(SharingTable):
    """Send a random subset of the parameters; a seed replaces the positions."""

    kind: Literal["random_k"] = "random_k"
    fraction: Fraction = Field(description="fraction of the parameters that is sent")
    values: Values = "float32"


class TopKConfig(SharingTable):
    """Send the parameters that changed most."""

    kind: Literal["top_k"] = "top_k"
    fraction: Fraction = Field(description="fraction of the parameters that is sent")
    accumulate: bool = Field(
        default=False,
        description="true: scores count the change since the last send; false: the change in this round",
    )
    values: Values = "float32"


class ChocoConfig(SharingTable):
    """CHOCO-SGD: send compressed differences to the replicas that neighbours keep."""

    kind: Literal["choco"] = "choco"
    fraction: Fraction = Field(description="fraction of the parameters whose differences are sent")
    gamma: GammaOfFraction
    values: Values = "float32"


class JwinsConfig(SharingTable):
    """JWINS: send the wavelet coefficients that changed most; each round draws their fraction at random."""

    kind: Literal["jwins"] = "jwins"
    cutoff: AnyCutoff = RandomCutoffConfig()
    wavelet: WaveletName = "sym2"
    levels: Levels = 4
    mode: WaveletMode = "symmetric"
    score: Literal["since_sent", "reference", "training_only"] = Field(
        default="reference",
        description="value from which the change of a coefficient is measured; docs/explanation/algorithm.md",
    )
    accumulate: bool = Field(
        default=True,
        description="true: scores add up over rounds; false: scores count the training of this round only",
    )
    dense_above: Annotated[float, Within("a fraction", 0, open_low=True)] = Field(
        default=0.5, description="from this fraction on, all coefficients are sent, without positions"
    )
    values: Values = "float32"


RATE_KEYS = ("step", "budget", "budget_bytes", "budget_seconds")
"""Keys that set the rate; each excludes the others and ``step_ratio``."""
_STEP_RATIO = (
    "quantizer step divided by the root mean square of a round's training change; excludes step and budget"
)


class _RateTable(SharingTable):
    """Common keys of the closed loop and the stateless algorithm."""

    step: Annotated[float, STEP] | None = Field(
        default=None, description="step of the quantizer, constant over the rounds"
    )
    budget: Annotated[float, BITS] | None = Field(
        default=None,
        description="size of a frame in bits per parameter, headers included; the step adapts to it",
    )
    budget_bytes: Annotated[int, BYTES] | None = Field(
        default=None, description="size of a frame in bytes, headers included; the step adapts to it"
    )
    budget_seconds: Annotated[float, SECONDS] | None = Field(
        default=None,
        description="seconds that the frames of a round take on a link of link_mbps; the step adapts to it",
    )
    link_mbps: Annotated[float, MBPS] | None = Field(
        default=None, description="uplink of a node in Mbit/s; required with budget_seconds"
    )
    wavelet: WaveletName = "sym2"
    levels: Levels = 4
    mode: WaveletMode = "periodization"

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        named = [key for key in RATE_KEYS if getattr(self, key) is not None]
        if getattr(self, "step_ratio", None) != type(self).model_fields["step_ratio"].default:
            named.append("step_ratio")
        if len(named) > 1:
            problem = f"{named[0]} sets the rate already; remove one of them"
            raise refuse(named[1], getattr(self, named[1]), problem)
        if (self.budget_seconds is None) != (self.link_mbps is None):
            missing = "link_mbps" if self.link_mbps is None else "budget_seconds"
            raise refuse(missing, MISSING, "required: budget_seconds and link_mbps go together")
        return self


class ClosedLoopConfig(_RateTable):
    """Send quantized wavelet coefficients of the difference to the replicas that neighbours keep."""

    kind: Literal["closed_loop"] = "closed_loop"
    step_ratio: Annotated[float, STEP_RATIO] = Field(default=2.0, description=_STEP_RATIO)
    gamma: Annotated[float, GAMMA] = Field(default=1.0, description="consensus step size")
    dead_zone: Annotated[float, DEAD_ZONE] = Field(
        default=0.8, description="half-width of the dead zone in steps; 0.5 rounds to the nearest symbol"
    )
    residual_rate: Annotated[float, RATE] = Field(
        default=0.1,
        description="fraction of the accumulated residual that is returned per round; 1 is CHOCO-SGD",
    )
    history: Annotated[int, HISTORY] = Field(
        default=4, description="number of rounds that a neighbour may miss before it needs a keyframe"
    )
    rank: Annotated[int, RANK] | None = Field(
        default=None,
        description="rank of the low-rank part that each matrix's change is sent with; needs wavelet = 'none'",
    )


class StatelessConfig(_RateTable):
    """Send quantized wavelet coefficients; suits graphs that change and links that lose frames."""

    kind: Literal["stateless"] = "stateless"
    step_ratio: Annotated[float, STEP_RATIO] | None = Field(
        default=None, description=f"{_STEP_RATIO}; without any of them, budget is 1.6 plus 64 bytes"
    )
    self_term: Literal["sent", "exact"] = Field(
        default="exact",
        description="own model that a node compares with received ones; sent: as encoded; exact: as it is",
    )
    rounding: Literal["carry", "dither"] = Field(
        default="carry",
        description="carry: add rounding errors to the next round; dither: make them independent by dither",
    )

    @model_validator(mode="after")
    def _self_term_is_exact(self) -> Self:
        if self.rounding == "carry" and self.self_term == "sent":
            raise refuse("self_term", self.self_term, "expected 'exact', or rounding = 'dither'")
        return self


class BeerConfig(SharingTable):
    """BEER and MoTEF: track gradients by compressed differences to the replicas that neighbours keep."""

    kind: Literal["beer"] = "beer"
    fraction: Fraction = Field(
        description="fraction of the parameters, and of the tracker, whose differences are sent"
    )
    gamma: GammaOfFraction
    momentum: Fraction = Field(
        default=1.0,
        description="weight of the newest change in the tracker; 1 is BEER, below 1 is MoTEF",
    )
    values: Values = "float32"


class SparseLocoConfig(SharingTable):
    """SparseLoCo: send the largest values of each chunk in two bits, with fading error feedback."""

    kind: Literal["sparse_loco"] = "sparse_loco"
    fraction: Fraction = Field(default=1 / 64, description="fraction of each chunk whose values are sent")
    gamma: Annotated[float, GAMMA] | None = Field(
        default=None,
        description="consensus step size on a graph; a smaller fraction needs a smaller step; left out: the "
        "algorithm of the paper, on a complete graph",
    )
    decay: Annotated[float, RATE] = Field(
        default=0.95, description="factor on the unsent residual from round to round; 1 keeps all of it"
    )
    chunk: Annotated[int, Within("a whole number of values per chunk", 16)] = Field(
        default=4096,
        description="number of consecutive parameters in a chunk; each chunk selects its own largest values",
    )


class PowerGossipConfig(SharingTable):
    """PowerGossip: send each neighbour low-rank differences of matrices, by power iteration on the edge."""

    kind: Literal["power_gossip"] = "power_gossip"
    values: Values = "float32"


class NoLoCoConfig(SharingTable):
    """NoLoCo: send all parameters, and take an outer step with momentum and a consensus term."""

    kind: Literal["noloco"] = "noloco"
    lr: Annotated[float, LEARNING_RATE] = Field(default=0.7, description="learning rate of the outer step")
    momentum: Annotated[float, MOMENTUM] = Field(
        default=0.5, description="decay of the outer momentum from round to round"
    )
    gamma: Annotated[float, GAMMA] = Field(default=0.7, description="rate of the consensus")
    values: Values = "float32"


class DemoConfig(SharingTable):
    """DeMo: send the largest cosine coefficients of blocks of a momentum, which loses them."""

    kind: Literal["demo"] = "demo"
    lr: Annotated[float, LEARNING_RATE] | None = Field(
        default=None,
        description="learning rate of the outer step, as in the paper, on a complete graph; excludes gamma",
    )
    gamma: Annotated[float, GAMMA] | None = Field(
        default=None, description="consensus step size on a graph, without an outer step; excludes lr and sign"
    )
    sign: bool | None = Field(
        default=None,
        description="outer step; true, or left out: lr times the sign of the mean change; false: lr "
        "times the mean change itself",
    )
    decay: Annotated[float, MOMENTUM] = Field(
        default=0.999, description="factor on the momentum from round to round"
    )
    k: Count = Field(default=32, description="number of coefficients of each block that are sent")
    block: Count = Field(default=64, description="rows and columns of a matrix in a block")
    values: Values = "float32"

    @model_validator(mode="after")
    def _lr_or_gamma(self) -> Self:
        if self.gamma is None and self.lr is None:
            problem = "expected lr on a complete graph, as in the paper, or gamma on any graph"
            raise refuse("lr", MISSING, problem)
        for name in ("lr", "sign"):
            if self.gamma is not None and getattr(self, name) is not None:
                problem = "belongs to the outer step, which there is none of with gamma; remove one of both"
                raise refuse(name, getattr(self, name), problem)
        return self


class MoniquaConfig(SharingTable):
    """Moniqua: send parameters modulo a range; the receiver resolves them with its own."""

    kind: Literal["moniqua"] = "moniqua"
    theta: Annotated[float, STEP] = Field(
        description="maximum difference of a parameter between two neighbours; frames beyond it are ignored"
    )
    bits: Annotated[int, Within("a whole number of bits", 2, 16)] = Field(
        default=8, description="bits per parameter before the entropy coder"
    )


ALGORITHMS: Mapping[str, type[SharingTable]] = by_kind(
    FullConfig,
    RandomKConfig,
    TopKConfig,
    ChocoConfig,
    JwinsConfig,
    ClosedLoopConfig,
    StatelessConfig,
    BeerConfig,
    SparseLocoConfig,
    MoniquaConfig,
    PowerGossipConfig,
    NoLoCoConfig,
    DemoConfig,
)
"""Tables by ``sharing.kind``."""
