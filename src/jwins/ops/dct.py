"""Discrete cosine transform of blocks of a model's tensors, by products with small orthonormal matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockDct:
    """Two-dimensional orthonormal DCT-II of each block of each tensor.

    A matrix is cut into blocks of ``block`` x ``block``, from its first row and column on. Where a dimension is
    no multiple of ``block``, its last blocks are narrower. A tensor of one dimension counts as one row, and one
    of more than two as a matrix of ``shape[0]`` rows. Coefficients are ordered by block, in a block by rows.

    Attributes:
        shapes: shapes of the tensors, in the order of the vector.
        block: length of a block's sides, at least 1.

    >>> BlockDct(((2, 2),), 2).forward(torch.tensor([1.0, 1.0, 1.0, 3.0])).round(decimals=4)
    tensor([ 3., -1., -1.,  1.])
    """

    shapes: tuple[tuple[int, ...], ...]
    block: int

    def forward(self, vector: Tensor) -> Tensor:
        """Return the coefficients (P,) float32 of a vector (P,) of the same length."""
        found = [
            (_basis(view.shape[2], view) @ view @ _basis(view.shape[3], view).t()).flatten()
            for view in self._views(vector)
        ]
        return torch.cat(found) if found else vector.clone()

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Return the vector (P,) of coefficients (P,)."""
        vector = torch.empty_like(coefficients)
        begin = 0
        for view in self._views(vector):
            blocks = coefficients[begin : begin + view.numel()].view(view.shape)
            begin += view.numel()
            view.copy_(_basis(view.shape[2], view).t() @ blocks @ _basis(view.shape[3], view))
        return vector

    def largest(self, coefficients: Tensor, k: int) -> tuple[Tensor | None, tuple[int, ...]]:
        """Choose the k largest magnitudes of each block; ties go to the lower position, zeros are left out.

        Args:
            coefficients: (P,) float32, finite.
            k: at least 1; blocks with fewer coefficients give all of theirs.

        Returns:
            Positions, strictly increasing, or None for all; and their number in each range of equal blocks.
        """
        parts, begin = [], 0
        for view in self._views(coefficients):
            size = view.shape[2] * view.shape[3]
            magnitude = coefficients[begin : begin + view.numel()].view(-1, size).abs()
            begin += view.numel()
            if k < size:
                smallest = torch.topk(magnitude, k, dim=1).values[:, -1:]
                larger, equal = magnitude > smallest, magnitude == smallest
                room = k - larger.sum(dim=1, keepdim=True)
                chosen = (larger | (equal & (equal.cumsum(dim=1) <= room))) & (magnitude > 0.0)
            else:
                chosen = magnitude > 0.0
            parts.append(chosen.flatten())
        counts = tuple(int(part.sum()) for part in parts)
        if sum(counts) == len(coefficients):
            return None, counts
        return torch.nonzero(torch.cat(parts)).squeeze(-1), counts

    def _views(self, vector: Tensor) -> Iterator[Tensor]:
        """Yield views (rows of blocks, columns of blocks, height, width), each of blocks of one size."""
        begin = 0
        for shape in self.shapes:
            size = math.prod(shape)
            rows = shape[0] if len(shape) > 1 else 1
            if size:
                matrix = vector[begin : begin + size].view(rows, -1)
                for top, bottom, height in _cuts(rows, self.block):
                    for left, right, width in _cuts(size // rows, self.block):
                        part = matrix[top:bottom, left:right]
                        high, wide = (bottom - top) // height, (right - left) // width
                        yield part.view(high, height, wide, width).permute(0, 2, 1, 3)
            begin += size


def _cuts(length: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Yield begin, end and block length of the whole blocks, and of the rest."""
    whole = length - length % block
    if whole:
        yield 0, whole, block
    if whole < length:
        yield whole, length, length - whole


def _basis(size: int, like: Tensor) -> Tensor:
    return _matrix(size).to(like.device)


@cache
def _matrix(size: int) -> Tensor:
    """Return the DCT-II as an orthonormal matrix (size, size) float32; row f has frequency f."""
    frequency, place = np.arange(size)[:, None], np.arange(size)[None, :]
    rows = np.cos(np.pi * frequency * (2 * place + 1) / (2 * size)) * math.sqrt(2 / size)
    rows[0] *= math.sqrt(0.5)
    return torch.from_numpy(rows.astype(np.float32))
