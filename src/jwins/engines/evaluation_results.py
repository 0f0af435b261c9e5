"""Reduction of the node groups' evaluation results to one row.

The row does not depend on the assignment of nodes to node groups. Numbers of single nodes are in the
order of their ids. Sums over nodes follow a fixed binary tree over the ids, and a node group sends the
sums of the largest subtrees that it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jwins.errors import UsageError
from jwins.run_folder.rows import EvalRow, Spread, TrafficSplit
from jwins.training.node_store import mean_buffers


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationSamples:
    """Test samples of an evaluation.

    Attributes:
        common: (m,) increasing int64, for all nodes; None for all samples.
        own: for each node, (m_i,) int64, test samples like its own training data: of the same owners, or with
            the same shares of labels. They give the metrics ``own_<name>``, which a node without such samples
            lacks. None to leave out these metrics.
    """

    common: Tensor | None = None
    own: Sequence[Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationPlan:
    """Samples of each evaluation.

    Attributes:
        samples: samples of evaluations after ``early_before`` or more rounds.
        early: samples of evaluations after fewer rounds, a subset of ``samples``. Later evaluations report
            their result on these, too (``EvalRow.early``). None if all evaluations use ``samples``.
        early_before: number of completed rounds from which on evaluations use ``samples``.
    """

    samples: EvaluationSamples = field(default_factory=EvaluationSamples)
    early: EvaluationSamples | None = None
    early_before: int = 0

    def of(self, round: int) -> EvaluationSamples:
        """Return the samples for the evaluation after ``round`` completed rounds."""
        return self.early if self.early is not None and round < self.early_before else self.samples

    def common_early(self, round: int, num_test: int) -> Tensor | None:
        """Return which common samples of a later evaluation are early, (m,) bool; None if there are none."""
        if self.early is None or self.of(round) is self.early:
            return None
        common = torch.arange(num_test) if self.samples.common is None else self.samples.common
        some = torch.arange(num_test) if self.early.common is None else self.early.common
        return _mask_of(common, some, "common samples")

    def own_early(self, round: int, node: int) -> Tensor | None:
        """Return the same for a node's own samples, (m_i,) bool or None."""
        if self.early is None or self.of(round) is self.early:
            return None
        if self.early.own is None or self.samples.own is None:
            return None
        return _mask_of(self.samples.own[node], self.early.own[node], f"samples of node {node}")


def _mask_of(samples: Tensor, some: Tensor, what: str) -> Tensor:
    found = torch.isin(samples, some)
    if int(found.sum()) != len(some):
        raise UsageError(f"early evaluations: {what} must be a subset of those of later evaluations")
    return found


# --- Sums over nodes --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class PartialSum:
    """Sum over the nodes of one subtree, whose first leaf is node ``index * 2**level``.

    Attributes:
        level: height of the subtree; 0 for a single node.
        index: position in its level.
        total: float64, or None if none of its nodes was measured.
    """

    level: int
    index: int
    total: Tensor | None


def tree_sums(leaves: Iterable[tuple[int, Tensor | None]]) -> list[PartialSum]:
    """Return the sums of the largest whole subtrees.

    Args:
        leaves: node and vector, or None if the node was not measured; in the order of the nodes, each once.

    Returns:
        The sums in the order of the nodes. Memory: about one vector for each level of the tree.
    """
    sums: list[PartialSum] = []
    for node, leaf in leaves:
        sums.append(PartialSum(0, node, None if leaf is None else leaf.to(torch.float64)))
        _join_siblings(sums)
    return sums


def tree_total(partials: Iterable[PartialSum]) -> Tensor | None:
    """Return the sum over the whole tree, from the subtrees of all node groups in the order of the nodes."""
    sums: list[PartialSum] = []
    for partial in partials:
        sums.append(partial)
        _join_siblings(sums)
    total: Tensor | None = None
    for partial in reversed(sums):  # the right edge, whose subtrees are smaller than complete ones
        total = _sum(partial.total, total)
    return total


def _join_siblings(sums: list[PartialSum]) -> None:
    while len(sums) > 1 and sums[-1].level == sums[-2].level and sums[-2].index + 1 == sums[-1].index:
        if sums[-2].index % 2:
            return
        right, left = sums.pop(), sums.pop()
        sums.append(PartialSum(left.level + 1, left.index // 2, _sum(left.total, right.total)))


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


@dataclass(frozen=True, slots=True, eq=False)
class AverageModel:
    """The mean of all nodes' models.

    Attributes:
        params: (P,) float32.
        buffers: local buffers by name; floating-point ones are averaged, integer ones are the first node's.
    """

    params: Tensor
    buffers: Mapping[str, Tensor]


def average(
    sums: Sequence[Sequence[PartialSum]], count: int, buffers: Mapping[int, Mapping[str, Tensor]]
) -> AverageModel:
    """Return the mean model."""
    partials = sorted((p for group in sums for p in group), key=lambda p: p.index << p.level)
    total = tree_total(partials)
    assert total is not None, "an evaluation measures at least one node"
    every = [buffers[node] for node in sorted(buffers)]
    return AverageModel((total / count).to(torch.float32), mean_buffers(every) if every else {})


def squared_distance(params: Tensor, mean: Tensor) -> float:
    """Return the squared distance of a node's model to the average model, both (P,) float32 on one device."""
    return float((params.double() - mean).square().sum())


# --- From results to a row ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class EvalResult:
    """Measurements of one node group at an evaluation.

    Attributes:
        metrics: values by metric and node.
        own: the same on the nodes' own test samples; nodes without any are left out.
        early: the same on the samples of early evaluations. ``own_<metric>`` is on the nodes' own samples.
        losses: mean training loss of each node's last round.
        squares: squared distance of each node to the average model.
        of_average: metrics of the average model, from the node group that tested it.
        epsilon: privacy that each node has spent; empty without ``train.privacy``.
    """

    metrics: Mapping[str, Mapping[int, float]]
    own: Mapping[str, Mapping[int, float]]
    early: Mapping[str, Mapping[int, float]]
    losses: Mapping[int, float]
    squares: Mapping[int, float]
    of_average: Mapping[str, float] | None = None
    epsilon: Mapping[int, float] = field(default_factory=dict)


def reduce_results(
    results: Sequence[EvalResult],
    *,
    round: int,
    time_s: float,
    nodes: Sequence[int],
    traffic: TrafficSplit,
    samples: int,
    consensus_rounds: int = 0,
) -> EvalRow:
    """Combine the results of all node groups into one row."""
    of_average: Mapping[str, float] = next((p.of_average for p in results if p.of_average is not None), {})
    metrics: dict[str, Spread] = {}
    per_node: dict[str, list[float | None]] = {}
    for name, values in _by_node([result.metrics for result in results]).items():
        listed = [values[node] for node in nodes]
        metrics[name] = _spread(listed, of_average.get(name, math.nan))
        per_node[name] = [finite(value) for value in listed]
    for name, values in _by_node([result.own for result in results]).items():
        metrics[f"own_{name}"] = _spread([values[node] for node in nodes if node in values], math.nan)
        per_node[f"own_{name}"] = [finite(values[node]) if node in values else None for node in nodes]
    losses = _by_node([{"": result.losses} for result in results]).get("", {})
    trained = [losses[node] for node in nodes if node in losses]
    squares = _by_node([{"": result.squares} for result in results]).get("", {})
    distances = torch.tensor([squares[node] for node in nodes if node in squares], dtype=torch.float64)
    return EvalRow(
        round=round,
        time_s=time_s,
        nodes=list(nodes),
        metrics=metrics,
        per_node=per_node,
        train_loss=finite(math.fsum(trained) / len(trained)) if trained and round > 0 else None,
        consensus_distance=finite(float(distances.mean().sqrt())) if len(distances) else 0.0,
        traffic=traffic,
        samples=samples,
        early={
            name: _spread([values[node] for node in nodes if node in values], math.nan).mean
            for name, values in _by_node([result.early for result in results]).items()
        },
        consensus_rounds=consensus_rounds,
        epsilon=max((value for result in results for value in result.epsilon.values()), default=None),
    )


def _by_node(results: Sequence[Mapping[str, Mapping[int, float]]]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for result in results:
        for name, values in result.items():
            found.setdefault(name, {}).update(values)
    return found


def _spread(values: Sequence[float], of_average: float) -> Spread:
    if not values:
        return Spread(None, None, None, None)
    found = torch.tensor(values, dtype=torch.float64)
    return Spread(
        finite(float(found.mean())),
        finite(float(found.std(unbiased=False))),
        finite(float(found.min())),
        finite(float(found.max())),
        finite(of_average),
    )


def finite(value: float) -> float | None:
    """Return ``value``, or None if it is not finite, which JSON cannot express."""
    return value if math.isfinite(value) else None
