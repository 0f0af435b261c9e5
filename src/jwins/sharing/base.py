"""The protocol of a sharing algorithm, and the two things every algorithm here is made of.

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
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.rng import RoundContext
from jwins.update import Received, Update

__all__ = ["Cutoff", "Precision", "Sharing", "mix", "place", "rounded"]

S = TypeVar("S")

Cutoff = Callable[[RoundContext], float]
"""Which fraction of the coefficients a node sends in a round; drawn by each node for itself."""

Precision = Literal["float32", "bfloat16"]
"""What values are rounded to before they are sent. The rounding is part of the algorithm: what is sent
arrives bit for bit."""


class Sharing(Protocol[S]):
    """What a sharing algorithm must offer. Implementations are frozen, picklable and printable.

    A class derived from this one needs ``init``, ``share`` and ``merge``, and ``state_types`` if its state is a
    dataclass. The rest is for algorithms that remember their peers, or whose updates are not parts of the
    parameter vector itself.

    >>> import torch
    >>> from jwins.sharing import top_k
    >>> algorithm = top_k(fraction=0.5)
    >>> ctx = {i: RoundContext(seed=1, node=i, round=0, weights={1 - i: 0.5}) for i in (0, 1)}
    >>> trained = {0: torch.tensor([4.0, 1.0]), 1: torch.tensor([1.0, 2.0])}
    >>> sent, state = {}, {}
    >>> for i in (0, 1):  # both nodes start from zero, train, and tell half of the result
    ...     sent[i], state[i] = algorithm.share(algorithm.init(torch.zeros(2)), trained[i], ctx[i])
    >>> merged, _ = algorithm.merge(state[0], trained[0], [Received(1, 0, 0.5, sent[1])], ctx[0])
    >>> sent[1].positions, merged
    (tensor([1]), tensor([4.0000, 1.5000]))
    """

    remembers_peers: ClassVar[bool] = False
    """Whether the state holds replicas of neighbours, which lost frames would make stale."""
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
        """What the node tells its neighbours after local training.

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
        """Take in what was heard. Called once in every round, also when nothing was.

        Args:
            state: from ``share`` of the same round.
            params: the same (P,) parameters that ``share`` got.
            received: every update since the last merge, sorted by (sender, round); those with weight 0
                only matter to an algorithm that remembers its peers.
            ctx: the round; ``ctx.weights`` has all neighbours. The weight of one that was not heard stays
                with the node.

        Returns:
            (P,) float32 parameters at the start of the next round, and the state.
        """
        ...

    def projected(self, state: S, params: Tensor) -> S:
        """The state, where the parameters were changed after ``merge``: variances were clamped at 0.

        Args:
            state: from ``merge``.
            params: (P,) float32, what the next round starts from.
        """
        return state

    def key(self, state: S, ctx: RoundContext) -> Update:
        """An update that stands alone: what a neighbour must hold of this node after its last share.

        Asked for where a neighbour's ``missing`` names this node, where a peer comes back and the algorithm
        remembers its peers, and where an update has a ``base`` that a recipient cannot hold.
        """
        raise TypeError(f"{type(self).__name__} has no key; one that remembers its peers must have one")

    def missing(self, state: S) -> frozenset[int]:
        """Senders whose replica is lost or stale and whose key is needed."""
        return frozenset()


def mix(own: Tensor, received: Sequence[Received]) -> Tensor:
    """What the neighbours change in a vector: ``sum_j W_ij (v_j - v_i)`` over what each of them sent.

    A coefficient that a neighbour did not send counts as the receiver's own, so its difference is 0. Working
    on differences keeps the mean over the nodes exactly where every node sends everything.

    Args:
        own: (C,) float32, the receiver's vector v_i.
        received: updates of dimension C; those of weight 0 are passed over.

    Returns:
        (C,) float32, zero where nothing was heard.
    """
    change = torch.zeros_like(own)
    for item in received:
        if item.weight == 0.0:
            continue
        values = item.update.dense_values().to(own.device)
        positions = item.update.indices()
        # The sender's vector as the receiver sees it. Filling in is faster than gathering, here and on a GPU.
        theirs = values - own if positions is None else place(own, positions.to(own.device), values).sub_(own)
        change.add_(theirs, alpha=item.weight)
    return change


def place(vector: Tensor, positions: Tensor | None, values: Tensor) -> Tensor:
    """A copy of ``vector`` (C,) with ``values`` (k,) at ``positions`` (k,), or everywhere if None."""
    if positions is None:
        return values.to(vector.dtype)
    return vector.index_copy(0, positions, values.to(vector.dtype))


def rounded(values: Tensor, precision: Precision) -> Tensor:
    """``values`` (k,) as they are sent: float32 untouched, or rounded to the nearest bfloat16."""
    return values if precision == "float32" else values.to(torch.bfloat16)


def check_fraction(name: str, fraction: float) -> None:
    """Raise a ConfigError unless ``fraction`` is in (0, 1]."""
    if not 0.0 < fraction <= 1.0:
        hint = f"; did you mean {fraction / 100:g}?" if 1.0 < fraction <= 100.0 else ""
        raise ConfigError(name, fraction, f"expected a fraction in (0, 1]{hint}")


def check_precision(precision: str) -> None:
    """Raise a ConfigError unless ``precision`` is one of :data:`Precision`."""
    if precision not in ("float32", "bfloat16"):
        raise ConfigError("sharing.values", precision, "expected 'float32' or 'bfloat16'")
