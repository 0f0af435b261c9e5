"""Quantizers: how far a value may be from what is sent for it, and the mean of what is sent."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jwins.errors import ConfigError
from jwins.ops.quantize import MAX_STEPS, absmax_scales, blocks, to_dithered, to_either_side, to_nearest
from jwins.rng import RoundContext
from jwins.sharing import AbsmaxQuantizer, UniformQuantizer
from jwins.sharing.update import Quantized, Update, dither
from jwins.wire import codec
from updates import identical

quick = settings(max_examples=80, deadline=None)
steps = st.lists(st.floats(-1e4, 1e4, width=32), max_size=50).map(
    lambda x: torch.tensor(x, dtype=torch.float32)
)
values = st.lists(st.floats(-(2.0**127), 2.0**127, width=32), max_size=100).map(
    lambda x: torch.tensor(x, dtype=torch.float32)
)
ROUNDING = 2e-3  # of numbers up to 1e4 in float32, twice


def context(node: int = 3, round: int = 5) -> RoundContext:
    return RoundContext(seed=1, node=node, round=round)


@given(steps, st.floats(0.5, 1.0))
@quick
def test_nearest_errs_by_no_more_than_its_dead_zone(x: Tensor, dead_zone: float) -> None:
    symbols = to_nearest(x, dead_zone)
    assert symbols.dtype == torch.int32
    off = (x.double() - symbols.double()).abs()
    assert bool((off <= dead_zone + ROUNDING).all())
    assert bool((symbols * x >= 0).all()), "a value changed its sign"
    assert bool((symbols[x.abs() < dead_zone - ROUNDING] == 0).all())
    assert bool((symbols[x.abs() > dead_zone + ROUNDING] != 0).all())


def test_boundaries_between_symbols_are_a_step_apart() -> None:
    x = torch.arange(-4000, 4001) / 1000
    for dead_zone in (0.5, 0.65, 1.0):
        symbols = to_nearest(x, dead_zone).tolist()
        jumps = [float(b) for a, b, old in zip(symbols, x[1:], symbols[1:], strict=False) if a != old]
        positive = [jump for jump in jumps if jump > 0]
        assert positive == pytest.approx([dead_zone + i for i in range(len(positive))], abs=2e-3)
        assert jumps == pytest.approx([-jump for jump in reversed(jumps)], abs=2e-3)


@given(steps, st.integers(0, 2**64 - 1))
@quick
def test_a_dither_leaves_half_a_step_of_error(x: Tensor, seed: int) -> None:
    u = dither(seed, len(x))
    off = to_dithered(x, u).double() - u.double() - x.double()
    assert bool((off.abs() <= 0.5 + ROUNDING).all())


def test_dithered_errors_are_uniform_and_do_not_depend_on_the_value() -> None:
    """Also for values far smaller than a step, which rounding to the nearest would never tell."""
    count = 200_000
    for value in (0.0, 0.1, 0.25, -0.4, 0.5):
        u = dither(int(1000 * value) % 97, count)
        errors = np.sort((to_dithered(torch.full((count,), value), u) - u - value).numpy())
        uniform = (np.arange(count) + 0.5) / count - 0.5
        assert np.abs(errors - uniform).max() < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov, 0.1 %
        assert abs(errors.mean()) < 4 * math.sqrt(1 / 12 / count)


@given(steps, st.integers(0, 2**32 - 1))
@quick
def test_stochastic_rounding_takes_a_neighbour(x: Tensor, seed: int) -> None:
    uniform = torch.from_numpy(np.random.default_rng(seed).random(len(x), dtype=np.float32))
    symbols = to_either_side(x, uniform)
    assert bool(((symbols == x.floor()) | (symbols == x.floor() + 1)).all())
    whole = x == x.floor()
    assert torch.equal(symbols[whole], x[whole].to(torch.int32))


@pytest.mark.parametrize("value", [-2.75, -0.1, 0.03, 0.5, 1.9])
def test_stochastic_rounding_has_no_bias(value: float) -> None:
    count = 200_000
    uniform = torch.from_numpy(np.random.default_rng(1).random(count, dtype=np.float32))
    symbols = to_either_side(torch.full((count,), value), uniform).double()
    above = value - math.floor(value)
    spread = math.sqrt(above * (1 - above) / count)
    assert abs(float(symbols.mean()) - value) < 4 * spread
    assert float(symbols.var()) == pytest.approx(above * (1 - above), rel=0.05)


def test_symbols_end_where_int32_does() -> None:
    x = torch.tensor([3e38, -3e38, 2.0**31, float(MAX_STEPS)])
    for symbols in (to_nearest(x), to_dithered(x, torch.zeros(4)), to_either_side(x, torch.zeros(4))):
        assert symbols.tolist() == [MAX_STEPS, -MAX_STEPS, MAX_STEPS, MAX_STEPS]


@given(st.integers(0, 500), st.integers(1, 100))
@quick
def test_blocks_are_all_of_one_length_but_the_last(count: int, block: int) -> None:
    lengths = blocks(count, block)
    assert sum(lengths) == count
    assert all(length == block for length in lengths[:-1])
    assert all(0 < length <= block for length in lengths)


@given(values, st.integers(1, 127), st.integers(1, 40))
@quick
def test_scales_of_blocks_reach_their_largest_value(x: Tensor, largest: int, block: int) -> None:
    scales = absmax_scales(x, block, largest)
    assert len(scales) == len(blocks(len(x), block))
    assert bool((torch.isfinite(scales) & (scales > 0)).all())
    assert torch.equal(scales.to(torch.bfloat16).float(), scales), "two bytes must do"
    for part, scale in zip(x.split(block), scales.tolist(), strict=False):
        most = float(part.abs().max())
        if most == 0:
            assert scale == 1.0
        elif most > 1e-30 and most < 1e38:
            assert most <= scale * largest * (1 + 1e-6) <= most * (1 + 2**-7)


@given(values, st.integers(2, 8), st.integers(16, 40), st.sampled_from(["nearest", "stochastic"]))
@quick
def test_absmax_errs_by_a_step_and_half_of_it_to_the_nearest(
    x: Tensor, bits: int, block: int, rounding: Any
) -> None:
    sent = AbsmaxQuantizer(bits, block, rounding)(x, (len(x),), context())
    assert sent.runs == blocks(len(x), block)
    most = 2 ** (bits - 1) - 1
    assert bool((sent.symbols.abs() <= most).all())
    scale = sent.scales.double().repeat_interleave(torch.tensor(sent.runs, dtype=torch.int64))
    exact = x.double()
    off = (sent.symbols.double() * scale - exact).abs()
    clipped = (exact.abs() - most * scale).clamp(min=0)  # only at the end of float32's range
    limit = (0.5 if rounding == "nearest" else 1.0) * scale * (1 + 1e-5) + clipped
    assert bool((off <= limit).all())


@pytest.mark.parametrize("rounding", ["stochastic", "dithered"])
def test_unbiased_quantizers_are_right_in_the_mean_over_rounds(rounding: Any) -> None:
    """A quantizer draws anew for each node and round."""
    x = torch.linspace(-0.05, 0.05, 41)
    quantizer = UniformQuantizer(0.1, rounding)
    sent = [quantizer(x, (41,), context(node, r)).dense() for node in range(10) for r in range(100)]
    bias = torch.stack(sent).double().mean(0) - x
    assert float(bias.abs().max()) < 4.5 * 0.05 / math.sqrt(len(sent))
    absmax = AbsmaxQuantizer(2, 64)
    sent = [absmax(x, (41,), context(node, r)).dense() for node in range(10) for r in range(100)]
    bias = torch.stack(sent).double().mean(0) - x
    assert float(bias.abs().max()) < 4.5 * 0.025 / math.sqrt(len(sent))


@pytest.mark.parametrize(
    "quantizer",
    [
        UniformQuantizer(0.07),
        UniformQuantizer(0.07, dead_zone=0.8, offset=0.2),
        UniformQuantizer(0.07, "dithered"),
        UniformQuantizer(0.07, "stochastic"),
        AbsmaxQuantizer(5, 32),
        AbsmaxQuantizer(2, 16, "nearest"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("subbands", [(0,), (40, 0, 60), (7, 300)])
def test_a_quantizer_keeps_its_contract(quantizer: Any, subbands: tuple[int, ...]) -> None:
    count = sum(subbands)
    x = torch.from_numpy(np.random.default_rng(count).laplace(scale=0.1, size=count).astype(np.float32))
    before, state = x.clone(), torch.get_rng_state()
    sent = quantizer(x, subbands, context())
    assert isinstance(sent, Quantized)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    again = pickle.loads(pickle.dumps(quantizer))
    assert (again, hash(again), repr(again)) == (quantizer, hash(quantizer), repr(quantizer))
    update = Update(count, None, sent)
    assert identical(update, Update(count, None, again(x, subbands, context())))
    for name in ("pco", "raw"):
        assert identical(update, codec(name).decode(codec(name).encode(update).data, dim=count))
    if isinstance(quantizer, UniformQuantizer):
        assert sent.runs == subbands
        nearest = quantizer.dead_zone + quantizer.offset
        bound = 1.0 if quantizer.rounding == "stochastic" else nearest
        assert bool(((sent.dense() - x).abs() <= 0.07 * bound + 1e-6).all())


def test_a_dead_zone_and_an_offset_pay_for_laplacian_values() -> None:
    """Fewer bits for the same error: what they are for."""
    x = torch.from_numpy(np.random.default_rng(0).laplace(scale=1.0, size=100_000).astype(np.float32))

    def found(quantizer: UniformQuantizer) -> tuple[float, int]:
        sent = quantizer(x, (len(x),), context())
        error = float((sent.dense() - x).square().mean())
        return error, codec("pco").encode(Update(len(x), None, sent)).values_bytes

    error, size = found(UniformQuantizer(2.0))
    better_error, smaller = found(UniformQuantizer(1.9, dead_zone=0.6, offset=0.05))
    assert better_error < error
    assert smaller < size


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda: UniformQuantizer(0.0), "step = 0.0"),
        (lambda: UniformQuantizer(math.nan), "step = nan"),
        (lambda: UniformQuantizer(1.0, "up"), "rounding = 'up': expected one of nearest, dithered"),  # type: ignore[arg-type]
        (lambda: UniformQuantizer(1.0, dead_zone=1.1), "dead_zone = 1.1"),
        (lambda: UniformQuantizer(1.0, offset=0.5), "offset = 0.5"),
        (
            lambda: UniformQuantizer(1.0, "dithered", dead_zone=0.6),
            "dead_zone = 0.6: applies only to .*remove it",
        ),
        (lambda: UniformQuantizer(1.0, "stochastic", offset=0.1), "offset = 0.1: applies only to .*remove it"),
        (lambda: AbsmaxQuantizer(1), "bits = 1"),
        (lambda: AbsmaxQuantizer(4.0), "bits = 4.0: expected a whole number"),  # type: ignore[arg-type]
        (lambda: AbsmaxQuantizer(4, 8), "block = 8"),
        (lambda: AbsmaxQuantizer(4, rounding="dithered"), "rounding = 'dithered'"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range_name_their_path(build: Any, path: str) -> None:
    with pytest.raises(ConfigError, match=f"sharing.values.{path}"):
        build()


@pytest.mark.parametrize("symbols", [[0, 3, -5], [0, 0], [2**31 - 1, -(2**31)], [7]])
@pytest.mark.parametrize("offset", [0.0, 0.3])
@pytest.mark.parametrize("scale", [0.01, 1e-30, 1e37])
def test_the_largest_magnitude_is_that_of_the_values(symbols: list[int], offset: float, scale: float) -> None:
    """Also beyond float32, where it is infinite; it is computed from the largest symbol alone."""
    scales = torch.full((2,), scale)
    values = Quantized(torch.tensor(symbols, dtype=torch.int32), scales, (1, len(symbols) - 1), offset=offset)
    update = Update(len(symbols), None, values)
    assert update.largest() == float(update.dense_values().abs().max())
