"""Low-rank part of a vector of matrices, as products of small whole numbers: exact on every machine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_FACTOR = 32
"""Largest magnitude of a factor. Products of two are at most 2^10, so float32 adds thousands exactly."""
_ITERATIONS = 3


@dataclass(frozen=True)
class LowRank:
    """Sums of ``rank`` outer products for each matrix of a vector.

    A tensor of more than two dimensions counts as a matrix of ``shape[0]`` rows. Tensors of one dimension, and
    matrices with a side of at most ``rank``, have no low-rank part.

    Attributes:
        shapes: shapes of the tensors, in the order of the vector.
        rank: number of outer products for each matrix, at least 1.
    """

    shapes: tuple[tuple[int, ...], ...]
    rank: int

    @cached_property
    def size(self) -> int:
        """Number of factors of the whole vector: for each outer product, those of the column and of the row."""
        return sum(self.rank * (rows + columns) for _, rows, columns in self._matrices())

    def factors(self, vector: Tensor, step: float) -> Tensor:
        """Return whole numbers whose :meth:`product`, times ``step``, is near the vector.

        Each outer product is found by power iteration on what the rounded ones before it left. Directions whose
        products would be rounded to 0 have factors of 0.

        Args:
            vector: (P,) float32.
            step: step of the product, above 0.

        Returns:
            (size,) int32, of magnitudes up to :data:`MAX_FACTOR`.
        """
        found = []
        for begin, rows, columns in self._matrices():
            rest = vector[begin : begin + rows * columns].view(rows, columns) / step
            for _ in range(self.rank):
                left, right = _rounded(rest)
                rest = torch.addr(rest, left, right, alpha=-1.0)
                found += [left, right]
        return torch.cat([*found, vector[:0]]).to(torch.int32)

    def product(self, factors: Tensor) -> Tensor | None:
        """Return the sums of outer products, (P,) int32; None if a factor is larger than :data:`MAX_FACTOR`.

        Args:
            factors: (size,) int32, any.
        """
        if bool(((factors < -MAX_FACTOR) | (factors > MAX_FACTOR)).any()):
            return None
        numbers = factors.to(torch.float32)
        parts, begin, filled = [], 0, 0
        for first, rows, columns in self._matrices():
            pairs = numbers[begin : begin + self.rank * (rows + columns)].view(self.rank, rows + columns)
            begin += pairs.numel()
            product = pairs[:, :rows].t() @ pairs[:, rows:]
            parts += [numbers.new_zeros(first - filled), product.flatten()]
            filled = first + rows * columns
        parts.append(numbers.new_zeros(sum(map(math.prod, self.shapes)) - filled))
        return torch.cat(parts).to(torch.int32)

    def _matrices(self) -> Iterator[tuple[int, int, int]]:
        """Yield the first position, the rows and the columns of each matrix that has a low-rank part."""
        begin = 0
        for shape in self.shapes:
            size = math.prod(shape)
            if len(shape) > 1 and size and min(shape[0], size // shape[0]) > self.rank:
                yield begin, shape[0], size // shape[0]
            begin += size


def _rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers (m,) and (n,) whose outer product is near the matrix (m, n); 0 if none is."""
    rows, columns = matrix.shape
    right = matrix[int(matrix.square().sum(dim=1).argmax())]
    for _ in range(_ITERATIONS):
        left = matrix @ right
        left /= torch.linalg.vector_norm(left).clamp(min=1e-30)
        right = matrix.t() @ left
    # With this scale the products of both sides' rounding have the same step.
    scale = math.sqrt(float(torch.linalg.vector_norm(right))) * (rows / columns) ** 0.25
    left = _whole(left * scale)
    square = float(left @ left)
    if square == 0.0:
        return left, torch.zeros_like(right)
    return left, _whole(matrix.t() @ left / square)


def _whole(numbers: Tensor) -> Tensor:
    return numbers.round_().clamp_(-MAX_FACTOR, MAX_FACTOR)
