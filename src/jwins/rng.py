"""Randomness as a pure function of (seed, node, round, purpose).

Nothing in the package draws from a global generator. Two draws that must differ have different
purposes; two processes that must agree derive the same key. This makes a run repeatable with any
number of threads, resumable at any round, and the same in every engine.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

EVERY_NODE = -1
"""Node number of streams that all nodes share, such as the initial model."""
EVERY_ROUND = -1
"""Round number of streams that are drawn once per run, such as the partition."""


def _key(seed: int, node: int, round: int, purpose: str) -> int:
    digest = hashlib.blake2b(struct.pack("<qqq", seed, node, round) + purpose.encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def stream(seed: int, purpose: str, *, node: int = EVERY_NODE, round: int = EVERY_ROUND) -> np.random.Generator:
    """Return a new generator for one purpose.

    Args:
        seed: the experiment's seed, any signed 64-bit integer.
        purpose: use of the numbers; different purposes give independent streams.
        node: the node, or :data:`EVERY_NODE`.
        round: the round, or :data:`EVERY_ROUND`.

    Returns:
        A Philox generator at the start of its stream.

    >>> a = stream(1, "cutoff", node=3, round=7).random()
    >>> a == stream(1, "cutoff", node=3, round=7).random()
    True
    >>> a == stream(1, "cutoff", node=4, round=7).random()
    False
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, node, round, purpose)))


def torch_generator(
    seed: int,
    purpose: str,
    *,
    node: int = EVERY_NODE,
    round: int = EVERY_ROUND,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """Return :func:`stream` for torch's samplers, on ``device``."""
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(_key(seed, node, round, purpose) & 0x7FFF_FFFF_FFFF_FFFF)
    return generator


@dataclass(frozen=True, slots=True)
class RoundContext:
    """Facts about the round for an algorithm, besides its state and the parameters.

    Attributes:
        seed: the experiment's seed.
        node: the node that runs the algorithm.
        round: the round, counted from 0.
        weights: mixing weight of each neighbour this node receives from in this round; its own is 1 - sum.
        sent_bytes: encoded bytes of this node's previous update, for algorithms that control their rate.

    >>> RoundContext(seed=1, node=0, round=2, weights={1: 0.25}).own_weight
    0.75
    """

    seed: int
    node: int
    round: int
    weights: Mapping[int, float] = field(default_factory=dict)
    sent_bytes: int = 0

    @property
    def own_weight(self) -> float:
        """Return the node's own weight when every neighbour's update arrives."""
        return 1.0 - sum(self.weights.values())

    def rng(self, purpose: str) -> np.random.Generator:
        """Return a new generator for ``purpose`` in this round of this node."""
        return stream(self.seed, purpose, node=self.node, round=self.round)

    def of(self, sender: int, round: int) -> RoundContext:
        """Return the context of another node's round, as far as a receiver can know it."""
        return RoundContext(seed=self.seed, node=sender, round=round)
