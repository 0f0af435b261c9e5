"""Partitions of the training samples.

A partitioner divides sample numbers among the nodes: every sample goes to exactly one node, and no node is
empty. If that is impossible, it raises a :class:`~jwins.errors.ConfigError` with the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

from jwins.errors import ConfigError, JwinsError, error_text

Indices = npt.NDArray[np.int64]

_DIRICHLET_DRAWS = 500
"""Number of draws of Dirichlet shares before an error; each takes milliseconds."""


class Partitioner(Protocol):
    """Protocol of a partitioner, which divides the samples of a data set among nodes."""

    def split(
        self, *, num_samples: int, num_nodes: int, labels: Indices | None, keys: Indices | None, rng: Generator
    ) -> list[Indices]:
        """Return the samples of each node.

        Args:
            num_samples: n, the number of samples.
            num_nodes: N, the number of nodes.
            labels: (n,) int64 classes, or None if the task has none.
            keys: (n,) int64 natural owners, or None if the task has none.
            rng: the only source of randomness.

        Returns:
            N arrays of increasing int64 sample numbers. None is empty, and each of range(n) is in exactly one.

        Raises:
            ConfigError: no such partition exists, or none was found.
        """
        ...


@dataclass(frozen=True, slots=True)
class Iid:
    """Samples in random order, cut into partitions whose sizes differ by at most one.

    >>> partition = Iid().split(
    ...     num_samples=5, num_nodes=2, labels=None, keys=None, rng=np.random.default_rng(1)
    ... )
    >>> [len(samples) for samples in partition]
    [3, 2]
    """

    def split(
        self, *, num_samples: int, num_nodes: int, labels: Indices | None, keys: Indices | None, rng: Generator
    ) -> list[Indices]:
        """Return the samples of each node."""
        _check_enough("iid", num_samples, num_nodes)
        return [np.sort(samples) for samples in np.array_split(rng.permutation(num_samples), num_nodes)]


@dataclass(frozen=True, slots=True)
class Contiguous:
    """Samples in their order, cut into runs whose sizes differ by at most one; which node gets which is random.

    For texts and other series, of which each node has one stretch.

    >>> partition = Contiguous().split(
    ...     num_samples=5, num_nodes=2, labels=None, keys=None, rng=np.random.default_rng(1)
    ... )
    >>> [samples.tolist() for samples in partition]
    [[0, 1, 2], [3, 4]]
    """

    def split(
        self, *, num_samples: int, num_nodes: int, labels: Indices | None, keys: Indices | None, rng: Generator
    ) -> list[Indices]:
        """Return the samples of each node."""
        _check_enough("contiguous", num_samples, num_nodes)
        runs = np.array_split(np.arange(num_samples, dtype=np.int64), num_nodes)
        return [runs[number] for number in rng.permutation(num_nodes)]


@dataclass(frozen=True, slots=True)
class Shards:
    """Samples sorted by label, cut into equal shards, of which each node gets some at random.

    With two shards a node sees about two classes. Source: McMahan, Moore, Ramage, Hampson, Aguera y Arcas,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, section 3.

    Args:
        shards_per_node: at least 1. Shards differ in size by at most one sample.
    """

    shards_per_node: int = 2

    def __post_init__(self) -> None:
        if self.shards_per_node < 1:
            raise ConfigError("task.partition.shards_per_node", self.shards_per_node, "expected at least 1")

    def split(
        self, *, num_samples: int, num_nodes: int, labels: Indices | None, keys: Indices | None, rng: Generator
    ) -> list[Indices]:
        """Return the samples of each node."""
        labels = _check_labels("shards", labels)
        num_shards = num_nodes * self.shards_per_node
        if num_shards > num_samples:
            raise ConfigError(
                "task.partition.shards_per_node",
                self.shards_per_node,
                f"{num_nodes} nodes would need {num_shards} shards, and there are {num_samples} training "
                f"samples; use fewer shards or nodes",
            )
        shuffled = rng.permutation(num_samples)
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        shards = np.array_split(by_label, num_shards)
        dealt = rng.permutation(num_shards).reshape(num_nodes, self.shards_per_node)
        return [np.sort(np.concatenate([shards[s] for s in own])) for own in dealt]


@dataclass(frozen=True, slots=True)
class Dirichlet:
    """Each class is divided among the nodes in proportions drawn from a symmetric Dirichlet distribution.

    Draws are repeated until every node has ``min_samples``. Source: Yurochkin, Agarwal, Ghosh, Greenewald,
    Hoang, Khazaeni, "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019, section 4.

    Args:
        alpha: concentration, > 0. With 0.1 most nodes have a few classes; 100 is nearly iid.
        min_samples: minimum number of samples of a node, at least 1.
    """

    alpha: float = 0.5
    min_samples: int = 1

    def __post_init__(self) -> None:
        _check_concentration(self.alpha, self.min_samples)

    def split(
        self, *, num_samples: int, num_nodes: int, labels: Indices | None, keys: Indices | None, rng: Generator
    ) -> list[Indices]:
        """Return the samples of each node."""
        labels = _check_labels("dirichlet", labels)
        if num_nodes * self.min_samples > num_samples:
            raise ConfigError(
                "task.partition.min_samples",
                self.min_samples,
                f"{num_samples} training samples are too few for {num_nodes} nodes; use a smaller number",
            )
        classes, counts = np.unique(labels, return_counts=True)
        for _ in range(_DIRICHLET_DRAWS):
            shares = rng.dirichlet(np.full(num_nodes, self.alpha), size=len(classes))
            # Rounding the cumulated shares, not the shares, distributes each class exactly.
            ends = np.rint(np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
            ends[:, -1] = counts
            if np.diff(ends, axis=1, prepend=0).sum(axis=0).min() >= self.min_samples:
                break
        else:
            raise ConfigError(
                "task.partition.alpha",
                self.alpha,
                f"none of {_DIRICHLET_DRAWS} draws gave each of {num_nodes} nodes {self.min_samples} or more "
                f"samples; use a larger alpha, fewer nodes or fewer task.partition.min_samples",
            )
        partition: list[list[Indices]] = [[] for _ in range(num_nodes)]
        for label, end in zip(classes, ends, strict=True):
            members = rng.permutation(np.flatnonzero(labels == label))
            for samples, piece in zip(partition, np.split(members, end[:-1]), strict=True):
                samples.append(piece)
        return [np.sort(np.concatenate(samples)) for samples in partition]


@dataclass(frozen=True, slots=True)
class Quantity:
    """Shuffled samples are dealt out in numbers drawn from a symmetric Dirichlet distribution: quantity skew.

    Every node gets ``min_samples``, and the rest goes by the draw. Source: Li, Diao, Chen, He, "Federated
    Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022, section 4.3.

    Args:
        alpha: concentration, > 0: 0.1 gives few nodes most samples, 100 gives all nodes about as many.
        min_samples: minimum number of samples of a node, at least 1.
    """

    alpha: float = 0.5
    min_samples: int = 1

    def __post_init__(self) -> None:
        _check_concentration(self.alpha, self.min_samples)

    def split(
        self, *, num_samples: int, num_nodes: int, labels: Indices | None, keys: Indices | None, rng: Generator
    ) -> list[Indices]:
        """Return the samples of each node."""
        free = num_samples - num_nodes * self.min_samples
        if free < 0:
            problem = (
                f"{num_nodes} nodes cannot all have that many of {num_samples} training samples; use fewer"
            )
            raise ConfigError("task.partition.min_samples", self.min_samples, problem)
        shares = rng.dirichlet(np.full(num_nodes, self.alpha))
        ends = np.rint(np.cumsum(shares) * free).astype(np.int64) + self.min_samples * np.arange(
            1, num_nodes + 1
        )
        return [np.sort(samples) for samples in np.split(rng.permutation(num_samples), ends[:-1])]


@dataclass(frozen=True, slots=True)
class ByKey:
    """All samples of a natural owner (writer, user, role) are on one node.

    Owners are shuffled and divided into partitions whose numbers of owners differ by at most one. The numbers
    of samples differ as the owners' numbers do.
    """

    def split(
        self, *, num_samples: int, num_nodes: int, labels: Indices | None, keys: Indices | None, rng: Generator
    ) -> list[Indices]:
        """Return the samples of each node."""
        if keys is None:
            raise ConfigError(
                "task.partition.kind",
                "by_key",
                "the task's samples have no natural owner; use 'shards', 'dirichlet' or 'iid', or give "
                "task.train its keys",
            )
        _, owners = np.unique(keys, return_inverse=True)
        num_owners = int(owners.max(initial=-1)) + 1
        if num_owners < num_nodes:
            raise ConfigError(
                "task.partition.kind",
                "by_key",
                f"there are {num_owners} owners of samples for {num_nodes} nodes; use at most {num_owners} "
                f"nodes, or 'iid'",
            )
        node_of_owner = np.empty(num_owners, dtype=np.int64)
        for node, own in enumerate(np.array_split(rng.permutation(num_owners), num_nodes)):
            node_of_owner[own] = node
        node_of_sample = node_of_owner[owners]
        order = np.argsort(node_of_sample, kind="stable")
        return np.split(order, np.cumsum(np.bincount(node_of_sample, minlength=num_nodes))[:-1])


PARTITIONERS: Mapping[str, type[Partitioner]] = {
    "iid": Iid,
    "shards": Shards,
    "dirichlet": Dirichlet,
    "quantity": Quantity,
    "by_key": ByKey,
    "contiguous": Contiguous,
}
"""Partitioners by their name in ``task.partition.kind``."""


def checked_split(
    partitioner: Partitioner,
    *,
    num_samples: int,
    num_nodes: int,
    labels: Indices | None,
    keys: Indices | None,
    rng: Generator,
) -> list[Indices]:
    """Call a partitioner, and check its result by the rules of :meth:`Partitioner.split`.

    The partitioner receives copies of labels and keys.

    Raises:
        ConfigError: raised by the partitioner, or the result is wrong; the message names its class.
    """
    cls = type(partitioner)

    def wrong(problem: str) -> ConfigError:
        named = f"{cls.__module__}.{cls.__qualname__}"
        return ConfigError("task.partition", named, f"{cls.__name__}.split() {problem}")

    try:
        partition: Any = partitioner.split(
            num_samples=num_samples,
            num_nodes=num_nodes,
            labels=None if labels is None else labels.copy(),
            keys=None if keys is None else keys.copy(),
            rng=rng,
        )
    except JwinsError:
        raise
    except Exception as error:
        raise wrong(f"raises {error_text(error)}") from error
    if not isinstance(partition, list | tuple) or len(partition) != num_nodes:
        count = f" of {len(partition)}" if isinstance(partition, list | tuple) else ""
        raise wrong(
            f"returns a {type(partition).__name__}{count}; expected a list of {num_nodes}, one per node"
        )
    owner = np.full(num_samples, -1)
    for node, samples in enumerate(partition):
        if not isinstance(samples, np.ndarray) or samples.dtype != np.int64 or samples.ndim != 1:
            found = (
                f"{samples.dtype} of shape {samples.shape}"
                if isinstance(samples, np.ndarray)
                else type(samples).__name__
            )
            raise wrong(f"returns {found} for node {node}; expected a NumPy array of int64, shape (n,)")
        if not len(samples):
            raise wrong(f"gives node {node} no samples; expected at least one each")
        outside = samples[(samples < 0) | (samples >= num_samples)]
        if len(outside):
            raise wrong(f"gives node {node} sample {outside[0]}; expected 0 to {num_samples - 1}")
        falls = np.flatnonzero(np.diff(samples) <= 0)
        if len(falls):
            one, other = samples[falls[0] : falls[0] + 2]
            raise wrong(f"gives node {node} sample {other} after {one}; expected increasing numbers, each once")
        taken = samples[owner[samples] >= 0]
        if len(taken):
            raise wrong(
                f"gives nodes {owner[taken[0]]} and {node} sample {taken[0]}; each sample needs one node"
            )
        owner[samples] = node
    left = np.flatnonzero(owner < 0)
    if len(left):
        raise wrong(f"gives sample {left[0]} to no node ({len(left)} such samples); each sample needs one node")
    return list(partition)


def _check_concentration(alpha: float, min_samples: int) -> None:
    """Refuse arguments of the partitioners that draw from a Dirichlet distribution."""
    if not 0.0 < alpha < float("inf"):
        raise ConfigError("task.partition.alpha", alpha, "expected a finite number above 0, such as 0.5")
    if min_samples < 1:
        raise ConfigError("task.partition.min_samples", min_samples, "expected at least 1")


def _check_enough(kind: str, num_samples: int, num_nodes: int) -> None:
    if num_samples < num_nodes:
        problem = f"{num_samples} training samples cannot fill {num_nodes} nodes; use fewer nodes"
        raise ConfigError("task.partition.kind", kind, problem)


def _check_labels(kind: str, labels: Sequence[int] | Indices | None) -> Indices:
    if labels is None:
        raise ConfigError(
            "task.partition.kind",
            kind,
            "the task's samples have no labels; use 'by_key' or 'iid', or define "
            "partition_labels() in the task",
        )
    return np.asarray(labels, dtype=np.int64)
