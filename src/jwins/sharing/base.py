"""The protocols of a sharing algorithm and of a quantizer, and what every algorithm here is made of.

A sharing algorithm is a frozen object without state of its own; what it must remember is passed in and
returned, as in optax. One round of node i, from parameters x at its start, is

    y        <- a few local steps from x                      (not the algorithm's business)
    u_i, s   <- share(s, y, ctx)                              the same update for every neighbour
    x, s     <- merge(s, y, [updates of the neighbours], ctx)

Neither function does I/O, reads a clock or draws from a global generator: randomness comes from ``ctx``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.ops.mixing import Term, mixed
from jwins.rng import RoundContext
from jwins.sharing.update import Quantized, Received, Update

__all__ = ["Cutoff", "Precision", "Quantizer", "SelfTerm", "Sharing", "mix", "place", "quantize"]

S = TypeVar("S")

Cutoff = Callable[[RoundContext], float]
"""Which fraction of the coefficients a node sends in a round; drawn by each node for itself."""

Precision = Literal["float32", "bfloat16"]
"""The quantizers with a name: values as they are, or rounded to the nearest bfloat16."""


SelfTerm = Literal["sent", "exact"]
"""The own model that a node compares with received ones: as it was sent, or as it is.

``sent`` keeps the mean over the nodes exactly, and moves a node by its own rounding errors; ``exact`` moves the
mean by the nodes' rounding errors, and each node only by those of its neighbours, which takes fewer bits."""


class Quantizer(Protocol):
    """Rounds values before they are sent. Implementations are frozen, hashable, picklable and printable.

    All loss is the algorithm's: what a quantizer returns arrives bit for bit, and the sender itself goes on
    with what its neighbours will read.
    """

    def __call__(self, values: Tensor, subbands: tuple[int, ...], ctx: RoundContext) -> Tensor | Quantized:
        """The values as they are sent.

        Args:
            values: (k,) float32, which is left as it is.
            subbands: how many of the values, in order, lie in each subband of the vector they are from,
                coarsest first, or all of them in one for parameters. They sum to k, and some may be 0.
            ctx: the round; what is drawn comes from ``ctx.rng(purpose)``.

        Returns:
            (k,) float32 or bfloat16, or k symbols, with one scale for each subband or as the quantizer likes.
        """
        ...


class Sharing(Protocol[S]):
    """Protocol of a sharing algorithm. Implementations are frozen, picklable and printable.

    A class derived from this one needs ``init``, ``share`` and ``merge``, and ``state_types`` if its state is a
    dataclass. The rest is for algorithms that remember their peers, or whose updates are not parts of the
    parameter vector itself.

    ``params`` is the node's own copy, which nobody changes any more: an algorithm may keep it, in its state or
    in an update, but must not change it. The vector that ``merge`` returns is trained in place: nothing else
    may hold its memory.

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
    """Whether updates are measured from the initial parameters that all nodes have in common. Who takes a
    neighbour's model must then know them, too; ``projected`` finds the state that goes with the model."""
    state_types: ClassVar[tuple[type, ...]] = ()
    """The dataclasses that a state is made of; only these are read back from a checkpoint."""

    def update_dim(self, num_params: int) -> int:
        """Length of the vector that updates are parts of, for models of ``num_params`` parameters."""
        return num_params

    @abstractmethod
    def init(self, params: Tensor) -> S:
        """State before the first round.

        Args:
            params: (P,) float32, the node's initial parameters.
        """
        ...

    @abstractmethod
    def share(self, state: S, params: Tensor, ctx: RoundContext) -> tuple[Update, S]:
        """Return what the node sends after local training.

        Args:
            state: from ``init`` or the previous ``merge``.
            params: (P,) float32 parameters after training; finite.
            ctx: the round.

        Returns:
            One update, the same for every neighbour, and the state to hand to ``merge``.
        """
        ...

    @abstractmethod
    def merge(
        self, state: S, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, S]:
        """Merge the updates of the neighbours. Called once in every round, also without any.

        Args:
            state: from ``share`` of the same round.
            params: the same (P,) parameters that ``share`` got.
            received: every update since the last merge, sorted by (sender, round); those with weight 0
                only matter to an algorithm that remembers its peers.
            ctx: the round; ``ctx.weights`` has all neighbours. The weight of one that is not received stays
                with the node.

        Returns:
            (P,) float32 parameters at the start of the next round, and the state.
        """
        ...

    def projected(self, state: S, params: Tensor) -> S:
        """The state once the parameters that ``merge`` returned have been changed from outside.

        Called after ``merge`` where shared buffers had left their range, such as BatchNorm's variances below 0.
        An algorithm that remembers something of the merged parameters finds it again here.

        Args:
            state: from ``merge``.
            params: (P,) float32, what the next round starts from.
        """
        return state

    def keyframe(self, state: S, ctx: RoundContext) -> Update:
        """An update that stands alone: what a neighbour must hold of this node after its last share.

        Asked for where a neighbour's ``stale_peers`` names this node, where a peer comes back and the algorithm
        remembers its peers, and where an update has a ``base`` that a recipient cannot hold.
        """
        raise TypeError(f"{type(self).__name__} has no keyframe; one that remembers its peers must have one")

    def stale_peers(self, state: S) -> frozenset[int]:
        """Return the senders whose replica is lost or stale, so that their keyframe is needed."""
        return frozenset()

    def replica_round(self, state: S, sender: int) -> int | None:
        """Return the round of the replica of a stale sender; None if it is lost."""
        return None

    def delta_since(self, state: S, round: int, ctx: RoundContext) -> Update | None:
        """Return an update with the base ``round`` that leads to the same as :meth:`keyframe`, or None.

        Args:
            state: after a share.
            round: of an earlier share of this node, whose replica a neighbour still holds.
            ctx: the round.
        """
        return None


def mix(own: Tensor, received: Sequence[Received]) -> Tensor:
    """Return the neighbours' change of a vector: ``sum_j W_ij (v_j - v_i)`` over what each of them sent.

    A coefficient that a neighbour did not send counts as the receiver's own, so its difference is 0. Working
    on differences keeps the mean over the nodes exactly where every node sends everything.

    Args:
        own: (C,) float32, the receiver's vector v_i.
        received: updates of dimension C; those of weight 0 are passed over.

    Returns:
        (C,) float32, zero where nothing was received.
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
    """A copy of ``vector`` (C,) with ``values`` (k,) at ``positions`` (k,), or everywhere if None."""
    if positions is None:
        return values.to(vector.dtype)
    return vector.index_copy(0, positions, values.to(vector.dtype))


def quantize(
    quantizer: Precision | Quantizer, values: Tensor, subbands: tuple[int, ...], ctx: RoundContext
) -> Tensor | Quantized:
    """``values`` (k,) as they are sent; see :class:`Quantizer`. Those of a name need no ``subbands``."""
    if not isinstance(quantizer, str):
        return quantizer(values, subbands, ctx)
    return values if quantizer == "float32" else values.to(torch.bfloat16)


def check_quantizer(quantizer: object) -> None:
    """Raise a ConfigError unless ``quantizer`` is one of :data:`Precision`, or can be called."""
    if quantizer not in get_args(Precision) and not callable(quantizer):
        raise ConfigError("sharing.values", quantizer, "expected 'float32', 'bfloat16' or a quantizer")
