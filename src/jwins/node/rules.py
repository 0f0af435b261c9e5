"""Common rules of all nodes of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from jwins.scenario import Attack
from jwins.sharing.base import Sharing
from jwins.sharing.outer import Nesterov
from jwins.topology.graph import Topology
from jwins.topology.participation import Participation
from jwins.wire.frame import Wire

MAX_ROUNDS_AHEAD = 64
"""Frames further ahead than this are refused. In a static graph without deadlines a neighbour is at most one
round ahead; in a graph that is drawn again each round, about a diameter. This limits the memory that a peer can
use."""

INBOX_BYTES = 256 * 2**20
"""``Rules.inbox_bytes`` between machines."""

FREE_FRAMES = 3
"""Frames of a sender that may always wait for a merge: of two rounds, and a late one."""

EARLY_FRAMES = 6
"""Further rounds that a neighbour may be ahead if neighbours change from round to round: the diameter of the
union of such graphs."""

MAX_MAGNITUDE_RATIO = 1e6
"""``Rules.max_magnitude_ratio`` between machines. Honest models never differ by this factor, whatever training
and transforms did in between. A damaged number usually does."""

MAX_GROWTH = 1e3
"""``Rules.max_growth`` between machines. Honest neighbours' values grow about as this node's model grows by its
own training. A factor of ten between partitions is usual, a factor of a thousand is not."""


@dataclass(frozen=True, slots=True)
class Staleness:
    """Rule for the weights of updates in an asynchronous run.

    Attributes:
        largest: updates of a higher staleness get weight 0.
        power: the weight of an update of staleness s is divided by (1 + s) to this power. Source: C. Xie, S.
            Koyejo, I. Gupta, "Asynchronous Federated Optimization", 2019, whose polynomial weight this is.
    """

    largest: int
    power: float = 0.0

    def factor(self, staleness: int) -> float:
        """Return the factor of a mixing weight.

        >>> Staleness(largest=8, power=0.5).factor(3), Staleness(largest=2).factor(3)
        (0.5, 0.0)
        """
        return 0.0 if staleness > self.largest else float((1 + staleness) ** -self.power)


@dataclass(frozen=True, slots=True)
class Rules:
    """Common rules of all nodes of a run.

    Attributes:
        sharing: the sharing algorithm.
        wire: encoder of messages; its ``dim`` is the algorithm's ``update_dim``.
        topology: neighbours and mixing weights of every round.
        rounds: number of rounds, including those of consensus.
        seed: seed of the experiment.
        evaluate_at: numbers of completed rounds at which a node requests an evaluation.
        checkpoint_every: interval of rounds at which a node requests a checkpoint; 0 for never.
        deadline_s: time to wait for neighbours after the node has sent its frame; None for no limit.
        consensus_rounds: number of rounds at the end that share the merged model without training.
        max_magnitude_ratio: frames are refused if a value exceeds this multiple of the node's own largest
            parameter, or of 1 if that is larger.
        inbox_frames: largest number of frames of one sender that wait for a merge.
        inbox_bytes: limit on their decoded size, from the fourth frame on; infinite between nodes that trust
            each other, where ``inbox_frames`` does not apply either.
        rounds_ahead: number of rounds that a frame may be ahead of the node; later frames are refused.
        max_growth: frames are also refused if a value exceeds this multiple of the node's own scale, which
            others cannot raise (see :class:`~jwins.sharing.own_scale.OwnScale`).
        project: applied in place to merged parameters, e.g. ``Layout.project_``; None for nothing to do.
        participation: the nodes that take part in a round, as in ``topology``; None for all.
        attacks: attack of each attacker, by node; attackers are left out of evaluations.
        outer: step on the change of a round before it is shared; None to share the trained model.
        change_factor: factor of the change by training, of each node for which it is not 1.
        staleness: weights of updates in an asynchronous run, whose nodes do not wait for each other; None for
            rounds in which they wait.
    """

    sharing: Sharing[Any]
    wire: Wire
    topology: Topology
    rounds: int
    seed: int
    evaluate_at: frozenset[int] = frozenset()
    checkpoint_every: int = 0
    deadline_s: float | None = None
    project: Callable[[Tensor], Tensor] | None = None
    consensus_rounds: int = 0
    max_magnitude_ratio: float = math.inf
    inbox_frames: int = MAX_ROUNDS_AHEAD + 1
    inbox_bytes: float = math.inf
    rounds_ahead: int = MAX_ROUNDS_AHEAD
    max_growth: float = math.inf
    participation: Participation | None = None
    attacks: Mapping[int, Attack] = field(default_factory=dict)
    outer: Nesterov | None = None
    staleness: Staleness | None = None
    change_factor: Mapping[int, float] = field(default_factory=dict)

    def among_strangers(self, max_magnitude_ratio: float, *, changing: bool) -> Rules:
        """Return the rules between machines, where a frame may contain anything.

        A neighbour may send frames of several rounds at once: those that it keeps for a restart of this node.
        """
        frames = min(
            self.checkpoint_every + FREE_FRAMES + (EARLY_FRAMES if changing else 0), MAX_ROUNDS_AHEAD + 1
        )
        if self.asynchronous:
            frames = MAX_ROUNDS_AHEAD + 1
        return replace(
            self,
            deadline_s=None,
            max_magnitude_ratio=max_magnitude_ratio,
            inbox_frames=frames,
            inbox_bytes=INBOX_BYTES,
            rounds_ahead=frames - 1,
            max_growth=MAX_GROWTH,
        )

    @property
    def asynchronous(self) -> bool:
        """Return whether nodes do not wait for each other."""
        return self.staleness is not None

    @property
    def training_rounds(self) -> int:
        """Return the number of rounds that train before they share."""
        return self.rounds - self.consensus_rounds

    def trains(self, node: int, round: int) -> bool:
        """Return whether a node trains in a round, before it shares."""
        takes_part = self.participation is None or node in self.participation.active(round)
        return takes_part and round < self.training_rounds
