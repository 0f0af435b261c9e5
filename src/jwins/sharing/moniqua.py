"""Moniqua: parameters modulo a range, which a receiver decodes with its own parameters. There is no memory.

Let b be the bits, theta a bound on the difference of neighbours' parameters, and step = 2 theta / (2^b - 1):

    n_i = round(y_i / step)
    send  l_i = n_i modulo 2^b
    n_j = the number that is l_j modulo 2^b and nearest to n_i
    x_i = y_i + step sum_j W_ij (n_j - n_i)

The range 2^b step is the paper's B = 2 theta / (1 - 2 delta) for a quantizer of error delta = 2^-b / 2. As long
as no parameter of two neighbours differs by more than theta minus one step, a receiver's n_j equals the
sender's own, and the mean over nodes does not change. A parameter that differs by more may be decoded to a
wrong value, a whole range away. So the update has a hash of the sender's own n. If the hash does not match, the
receiver ignores that neighbour in the round. If it ignores many, theta is too small.

Source: Y. Lu, C. De Sa, "Moniqua: Modulo Quantized Communication in Decentralized SGD", ICML 2020, algorithm 1,
where theta follows from the learning rate and there is no hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jwins.ops.quantize import to_nearest
from jwins.rng import RoundContext
from jwins.sharing.base import Sharing, Vectors
from jwins.sharing.replicas import hash_of
from jwins.sharing.update import Quantized, Received, Update, one_scale
from jwins.validation import STEP, Within

_BITS = Within("a whole number of bits", 2, 16)


@dataclass(frozen=True, slots=True)
class Moniqua(Sharing[None]):
    """Modulo quantization; see the module's docstring for the algorithm.

    Attributes:
        theta: largest difference of a parameter between two neighbours; above 0.
        bits: bits of each parameter before the entropy coder, 2 to 16.

    Raises:
        ConfigError: an argument is out of range.
    """

    theta: float
    bits: int = 8
    asynchronous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        STEP.check("sharing.theta", self.theta)
        _BITS.check_whole("sharing.bits", self.bits)

    @property
    def step(self) -> float:
        """Return the difference between two symbols."""
        return 2.0 * self.theta / ((1 << self.bits) - 1)

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state and of an exchange."""
        return Vectors(0, 5 + 2 * neighbours, self.bits / 32)

    def init(self, params: Tensor) -> None:
        """Return None: there is no memory."""

    def share(self, state: None, params: Tensor, ctx: RoundContext) -> tuple[Update, None]:
        """Send all parameters as numbers of steps, modulo the range."""
        whole = to_nearest(params / self.step)
        runs = (len(params),)
        values = Quantized(self._wrapped(whole).cpu(), one_scale(self.step, runs), runs)
        return Update(len(params), None, values, check=hash_of(whole)), None

    def merge(
        self, state: None, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, None]:
        """Decode the received updates with this node's parameters, and mix those whose hash matches."""
        own = to_nearest(params / self.step)
        change = torch.zeros_like(params)
        for item in received:
            apart = self._apart(own, item.update) if item.weight > 0.0 else None
            if apart is not None:
                change.add_(apart.to(torch.float32), alpha=self.step * item.weight)
        return params + change, None

    def _apart(self, own: Tensor, update: Update) -> Tensor | None:
        """Return a neighbour's distance from ``own`` in steps, (P,) int32; None if the hash does not match."""
        values = update.values
        if update.positions is not None or not isinstance(values, Quantized) or len(values.symbols) != len(own):
            return None
        apart = self._wrapped(values.symbols.to(own.device) - own)
        return apart if hash_of(own + apart) == update.check else None

    def _wrapped(self, whole: Tensor) -> Tensor:
        """Return the numbers from -2^(b-1) to 2^(b-1) - 1 that are equal to ``whole`` modulo 2^b."""
        half = 1 << (self.bits - 1)
        return torch.remainder(whole + half, 2 * half) - half


moniqua = Moniqua
"""Constructor under its name in ``sharing.kind``."""
