"""Protocols of a sharing algorithm and of a quantizer, and functions that several algorithms use.

A sharing algorithm is a frozen object without state of its own. Its memory is passed in and returned, as in
optax. One round of node i, from parameters x at its start, is

    y       <- a few local steps from x    (not in the algorithm)
    u_i, s  <- share(s, y, ctx)            one update for all neighbours, unless per_peer
    x, s    <- merge(s, y, [updates of the neighbours], ctx)

Neither function does I/O, reads a clock or draws from a global generator: randomness comes from ``ctx``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from jwins.errors import ConfigError, UsageError
from jwins.ops.mixing import Term, mixed
from jwins.rng import RoundContext
from jwins.sharing.update import Quantized, Received, Update

S = TypeVar("S")

Cutoff = Callable[[RoundContext], float]
"""Fraction of the coefficients that a node sends in a round; each node draws its own."""

Precision = Literal["float32", "bfloat16"]
"""The quantizers with a name: values as they are, or rounded to the nearest bfloat16."""


SelfTerm = Literal["sent", "exact"]
"""Form of a node's own model that it compares with received ones: as sent, or exact.

``sent`` preserves the mean over the nodes exactly, but a node moves by its own rounding errors. With ``exact``
the mean moves by the nodes' rounding errors, and a node only by those of its neighbours; updates take fewer
bits."""


NOT_ASYNCHRONOUS = (
    "{name} needs updates of the same round; take another algorithm, such as closed_loop, or set "
    "`asynchronous = True` in a class of your own for which this is not so"
)
"""Why an algorithm cannot be used in an asynchronous run."""


class Vectors(NamedTuple):
    """Memory of an algorithm at one node, in vectors of ``update_dim`` numbers of 4 bytes.

    Attributes:
        state: the state between rounds, without the vector that ``merge`` returned.
        exchange: at most further from ``share`` to the end of ``merge``, with the neighbours' decoded updates.
        frame: an encoded update.
    """

    state: float
    exchange: float
    frame: float = 1.0


class Quantizer(Protocol):
    """Protocol of a quantizer, which rounds values before they are sent.

    Implementations are frozen, hashable, picklable and printable.

    Nothing else is lost: encoding preserves every bit, so neighbours receive the returned values, and the
    sender continues with the same values.
    """

    def __call__(self, values: Tensor, subbands: tuple[int, ...], ctx: RoundContext) -> Tensor | Quantized:
        """Return the values to send.

        Args:
            values: (k,) float32; must not be changed.
            subbands: number of values in each subband of their vector, coarsest first; parameters without a
                transform are one subband. The numbers sum to k, and some may be 0.
            ctx: the round. Random numbers come from ``ctx.rng(purpose)``.

        Returns:
            (k,) float32 or bfloat16, or k symbols with scales, such as one for each subband.
        """
        ...


class Sharing(Protocol[S]):
    """Protocol of a sharing algorithm. Implementations are frozen, picklable and printable.

    A class derived from this one needs ``init``, ``share`` and ``merge``, and ``state_types`` if its state is a
    dataclass. The other members are for algorithms that remember their peers, or whose updates do not refer to
    the parameter vector itself.

    ``params`` is the node's own copy, which no other code changes. An algorithm may keep it in its state or
    in an update, but must not change it. The vector that ``merge`` returns is copied before it is trained, so
    the state may keep it, too.

    >>> import torch
    >>> from jwins.sharing import top_k
    >>> algorithm = top_k(fraction=0.5)
    >>> ctx = {i: RoundContext(seed=1, node=i, round=0, weights={1 - i: 0.5}) for i in (0, 1)}
    >>> trained = {0: torch.tensor([4.0, 1.0]), 1: torch.tensor([1.0, 2.0])}
    >>> sent, state = {}, {}
    >>> for i in (0, 1):  # both nodes start from zero, train, and send half of the result
    ...     sent[i], state[i] = algorithm.share(algorithm.init(torch.zeros(2)), trained[i], ctx[i])
    >>> merged, _ = algorithm.merge(state[0], trained[0], [Received(1, 0, 0.5, sent[1])], ctx[0])
    >>> sent[1].positions, merged
    (tensor([1]), tensor([4.0000, 1.5000]))
    """

    remembers_peers: ClassVar[bool] = False
    """Whether the state holds replicas of neighbours, which lost frames would make stale."""
    needs_common_start: ClassVar[bool] = False
    """Whether updates are measured from the common initial parameters of all nodes. If so, a node needs them
    even if it begins with a neighbour's model; ``projected`` returns the state for that model."""
    per_peer: ClassVar[bool] = False
    """Whether each neighbour gets an update of its own, from ``for_peer``."""
    asynchronous: ClassVar[bool] = False
    """Whether neighbours may be in different rounds. Each update then either stands alone, and at its positions
    replaces the sender's earlier values, or builds on a replica."""
    state_types: ClassVar[tuple[type, ...]] = ()
    """Dataclasses of the state; only these are read back from a checkpoint."""

    def update_dim(self, num_params: int) -> int:
        """Return the length of the vector that updates refer to, for models of ``num_params`` parameters."""
        return num_params

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory that a node with this number of neighbours takes, for estimates before a run.

        The default is for an algorithm of one's own with up to three vectors in its state, and replicas of the
        node and of each neighbour if it remembers peers.
        """
        replicas = 1 + neighbours if self.remembers_peers else 0
        return Vectors(3 + replicas, 6 + 2 * neighbours + replicas)

    def for_model(self, shapes: tuple[tuple[int, ...], ...]) -> Sharing[S]:
        """Return this algorithm for a model whose tensors have these shapes, in the order of the vector."""
        return self

    @abstractmethod
    def init(self, params: Tensor) -> S:
        """Return the state before the first round.

        Args:
            params: (P,) float32, the node's initial parameters.
        """
        ...

    @abstractmethod
    def share(self, state: S, params: Tensor, ctx: RoundContext) -> tuple[Update, S]:
        """Return the update to send after local training.

        Args:
            state: the state of ``init`` or of the previous ``merge``.
            params: (P,) float32 parameters after training; finite.
            ctx: the round.

        Returns:
            One update for every neighbour, and the state for ``merge``. With ``per_peer`` the updates that are
            sent come from ``for_peer``.
        """
        ...

    @abstractmethod
    def merge(
        self, state: S, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, S]:
        """Merge the updates of the neighbours. Called once in every round, even without any update.

        Args:
            state: the state of ``share`` in the same round.
            params: the same (P,) parameters as those of ``share``.
            received: every update since the last merge, sorted by (sender, round); those with weight 0
                only matter to an algorithm that remembers its peers.
            ctx: the round; ``ctx.weights`` has all neighbours. The weight of a neighbour without an update
                stays with the node.

        Returns:
            (P,) float32 parameters at the start of the next round, and the state.
        """
        ...

    def for_peer(self, state: S, peer: int) -> Update:
        """Return the update to send to the neighbour ``peer``, after ``share``; called where ``per_peer``."""
        raise TypeError(f"{type(self).__name__} has one update for all neighbours")

    def projected(self, state: S, params: Tensor) -> S:
        """Return the state after the parameters that ``merge`` returned were changed from outside.

        Called after ``merge`` if shared buffers had left their range, such as BatchNorm's variances below 0.
        An algorithm whose state depends on the merged parameters computes it again here.

        Args:
            state: the state of ``merge``.
            params: (P,) float32 at the start of the next round.
        """
        return state

    def keyframe(self, state: S, ctx: RoundContext) -> Update:
        """Return an update that stands alone: this node's replica after its last share.

        Called if a neighbour's ``stale_peers`` names this node, if a peer returns and the algorithm
        remembers its peers, or if an update has a ``base`` that a recipient cannot have.
        """
        raise TypeError(f"{type(self).__name__} has no keyframe, which remembers_peers requires; define one")

    def stale_peers(self, state: S) -> frozenset[int]:
        """Return the senders whose replica is lost or stale. The node asks them for a keyframe."""
        return frozenset()

    def replica_round(self, state: S, sender: int) -> int | None:
        """Return the round of the replica of a stale sender; None if it is lost."""
        return None

    def delta_since(self, state: S, round: int, ctx: RoundContext) -> Update | None:
        """Return an update with base ``round`` that leads to the same replica as :meth:`keyframe`, or None.

        Args:
            state: the state after a share.
            round: round of an earlier share of this node, whose replica a neighbour still has.
            ctx: the round.
        """
        return None


def mix(own: Tensor, received: Sequence[Received]) -> Tensor:
    """Return the change of a vector by mixing: ``sum_j W_ij (v_j - v_i)`` at the positions that each sent.

    A coefficient that a neighbour did not send counts as the receiver's own, so its difference is 0. Adding
    differences preserves the mean over the nodes exactly if every node sends everything.

    Args:
        own: (C,) float32, the receiver's vector v_i.
        received: updates of dimension C; those of weight 0 are skipped.

    Returns:
        (C,) float32; zero at positions that no neighbour sent.
    """
    return mixed(
        own,
        [
            Term(item.update.dense_values(), item.update.indices(), item.weight)
            for item in received
            if item.weight != 0.0
        ],
    )


def place(vector: Tensor, positions: Tensor | None, values: Tensor) -> Tensor:
    """Return a copy of ``vector`` (C,) with ``values`` (k,) at ``positions`` (k,), or everywhere if None."""
    if positions is None:
        return values.to(vector.dtype)
    return vector.index_copy(0, positions, values.to(vector.dtype))


def quantize(
    quantizer: Precision | Quantizer, values: Tensor, subbands: tuple[int, ...], ctx: RoundContext
) -> Tensor | Quantized:
    """Return ``values`` (k,) as they are sent. A quantizer that is given by name needs no ``subbands``."""
    if not isinstance(quantizer, str):
        found: object = quantizer(values, subbands, ctx)
        if not isinstance(found, Tensor | Quantized):
            name, problem = type(quantizer).__name__, f"returned a {type(found).__name__}"
            raise UsageError(f"the quantizer {name} {problem}: expected a tensor or Quantized")
        return found
    return values if quantizer == "float32" else values.to(torch.bfloat16)


def check_quantizer(quantizer: object) -> None:
    """Raise a ConfigError unless ``quantizer`` is one of :data:`Precision`, or can be called."""
    if quantizer not in get_args(Precision) and not callable(quantizer):
        raise ConfigError("sharing.values", quantizer, "expected 'float32', 'bfloat16' or a quantizer")
