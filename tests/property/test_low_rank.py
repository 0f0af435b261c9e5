"""Low-rank parts: exact products, and factors that bring every vector nearer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jwins.ops.low_rank import MAX_FACTOR, LowRank

SHAPES = ((5, 7), (3,), (4, 2, 3), (2, 9), (6, 6), ())
SIZE = 35 + 3 + 24 + 18 + 36 + 1


def blocks(rank: int) -> list[tuple[int, int, int]]:
    """First position, rows and columns of the matrices whose sides are longer than the rank."""
    found = [(0, 5, 7), (38, 4, 6), (62, 2, 9), (80, 6, 6)]
    return [(first, rows, columns) for first, rows, columns in found if min(rows, columns) > rank]


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_product_is_the_sum_of_whole_outer_products(rank: int, seed: int) -> None:
    low_rank = LowRank(SHAPES, rank)
    factors = torch.from_numpy(
        np.random.default_rng(seed).integers(
            -MAX_FACTOR, MAX_FACTOR, low_rank.size, endpoint=True, dtype=np.int32
        )
    )
    expected, at = np.zeros(SIZE, dtype=np.int64), 0
    for first, rows, columns in blocks(rank):
        for _ in range(rank):
            left, right = factors[at : at + rows].numpy(), factors[at + rows : at + rows + columns].numpy()
            expected[first : first + rows * columns] += np.outer(left, right).ravel()
            at += rows + columns
    assert at == low_rank.size
    product = low_rank.product(factors)
    assert product is not None
    assert product.dtype == torch.int32
    assert product.tolist() == expected.tolist()


@pytest.mark.parametrize("far", [MAX_FACTOR + 1, -MAX_FACTOR - 1, 2**31 - 1, -(2**31)])
def test_a_product_of_larger_factors_is_refused(far: int) -> None:
    low_rank = LowRank(SHAPES, 2)
    factors = torch.zeros(low_rank.size, dtype=torch.int32)
    factors[7] = far
    assert low_rank.product(factors) is None


def drawn(seed: int, scale: float) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * scale


@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(0.01, 1e4))
def test_factors_never_lead_away(rank: int, seed: int, scale: float) -> None:
    low_rank, vector = LowRank(SHAPES, rank), drawn(seed, scale)
    factors = low_rank.factors(vector, step=1.0)
    product = low_rank.product(factors)
    assert product is not None
    assert float((vector - product).norm()) <= float(vector.norm()) * (1 + 1e-5)
    outside = torch.ones(SIZE, dtype=torch.bool)
    for first, rows, columns in blocks(rank):
        outside[first : first + rows * columns] = False
    assert not product[outside].any()


def test_a_matrix_of_that_rank_is_met_within_its_rounding() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(40, 3, generator=generator) @ torch.randn(3, 60, generator=generator)
    low_rank = LowRank(((40, 60),), 3)
    fine = low_rank.product(low_rank.factors(matrix.flatten(), step=0.01))
    coarse = low_rank.product(low_rank.factors(matrix.flatten(), step=0.3))
    assert fine is not None
    assert coarse is not None
    apart = [float((part.view(40, 60) - matrix).norm() / matrix.norm()) for part in (fine * 0.01, coarse * 0.3)]
    assert apart[0] < 0.1 < apart[1] < 0.6


@pytest.mark.parametrize("step", [1.0, 1e-6, 1e30])
def test_zeros_and_short_tensors_have_factors_of_zero(step: float) -> None:
    for shapes in (SHAPES, ((3, 2), (7,)), ((0, 4), (5, 0))):
        size = sum(map(math.prod, shapes))
        low_rank = LowRank(shapes, 2)
        factors = low_rank.factors(torch.zeros(size), step)
        assert len(factors) == low_rank.size
        assert not factors.any()
        product = low_rank.product(factors)
        assert product is not None
        assert len(product) == size
