"""Training samples of a node."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jwins.errors import UsageError
from jwins.rng import stream

Indices = npt.NDArray[np.int64]


def batch_indices(
    partition: Indices, *, seed: int, node: int, round: int, local_steps: int, batch_size: int
) -> Indices:
    """Return the samples that a node trains on in a round.

    A node's stream of samples is its partition in random order, again and again: permutation e of node i comes
    from ``stream(seed, "shuffle", node=i, round=e)``. Local step t, counted from the start of the run, takes
    samples ``[t * batch_size, (t + 1) * batch_size)`` of that stream.

    Args:
        partition: (n,) int64, the node's samples, n >= 1.
        seed: seed of the experiment.
        node: number of the node.
        round: counted from 0.
        local_steps: steps per round.
        batch_size: samples per step; may be larger than n.

    Returns:
        (local_steps, batch_size) int64, entries of ``partition``.
    """
    shuffled = Shuffle(partition, seed, node)
    return shuffled.take(round * local_steps * batch_size, local_steps * batch_size).reshape(
        local_steps, batch_size
    )


class Shuffle:
    """One node's stream of samples, which caches the last permutation.

    Args:
        partition: (n,) int64, the node's samples, n >= 1.
    """

    __slots__ = ("_epoch", "_node", "_order", "_seed", "partition")

    def __init__(self, partition: Indices, seed: int, node: int) -> None:
        self.partition, self._seed, self._node = partition, seed, node
        self._epoch = -1
        self._order = partition

    def take(self, start: int, count: int) -> Indices:
        """Return samples ``start`` to ``start + count`` of the stream, (count,) int64."""
        n = len(self.partition)
        epoch, offset = divmod(start, n)
        if offset + count <= n:
            return self._permutation(epoch)[offset : offset + count]
        out = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, offset = divmod(start + filled, n)
            piece = self._permutation(epoch)[offset : offset + count - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return out

    def _permutation(self, epoch: int) -> Indices:
        if epoch != self._epoch:
            generator = stream(self._seed, "shuffle", node=self._node, round=epoch)
            self._order = self.partition[generator.permutation(len(self.partition))]
            self._epoch = epoch
        return self._order


def checked_partition(partition: Indices, node: int, num_samples: int) -> Indices:
    """Return a node's samples as int64.

    Raises:
        UsageError: the node has no samples, or they are not positions among ``num_samples``.
    """
    indices = np.asarray(partition)
    if indices.ndim != 1 or len(indices) == 0:
        raise UsageError(f"node {node} has no samples: use fewer nodes or another partition")
    if not np.issubdtype(indices.dtype, np.integer):
        raise UsageError(f"node {node}: expected integer sample indices, got {indices.dtype}")
    if indices.min() < 0 or indices.max() >= num_samples:
        raise UsageError(f"node {node}: sample indices reach beyond the {num_samples} training samples")
    return indices.astype(np.int64)
