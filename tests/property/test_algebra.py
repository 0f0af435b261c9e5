"""Properties of the algorithms for all numbers: equalities between them, conserved means, and slow,
literal versions of selection and of the score rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jwins.errors import UsageError
from jwins.ops.select import count_of, largest_k
from jwins.ops.wavelet import Wavelet
from jwins.rng import RoundContext, stream
from jwins.sharing import PAPER_FRACTIONS, FixedCutoff, RandomCutoff, choco, full, jwins, random_k, top_k
from jwins.sharing.update import Quantized, Received, Sampled, Update, dither
from jwins.topology import ErdosRenyi, FullyConnected, Ring, Star
from updates import identical

P = 53
TOPOLOGIES = [Ring(5), Star(6), FullyConnected(4), ErdosRenyi(7, p=0.5, seed=2)]


def run(sharing: Any, topology: Any, rounds: int, *, train: bool = True) -> list[list[Tensor]]:
    """Parameters of all nodes after training and after merging: [trained, merged, trained, ...]."""
    nodes = range(topology.num_nodes)
    start = torch.from_numpy(stream(1, "start").normal(size=P)).float()
    params = [start + (0.0 if train else 1.0) * noise(i, -1) for i in nodes]
    state = [sharing.init(start) for _ in nodes]
    history = []
    for r in range(rounds):
        if train:
            params = [x + noise(i, r) for i, x in enumerate(params)]
        history.append(params)
        weights = topology.at(r).senders
        ctx = [RoundContext(1, i, r, weights[i]) for i in nodes]
        sent: list[Update] = []
        for i in nodes:
            update, state[i] = sharing.share(state[i], params[i], ctx[i])
            sent.append(update)
        merged = []
        for i in nodes:
            received = [Received(j, r, w, sent[j]) for j, w in weights[i].items()]
            x, state[i] = sharing.merge(state[i], params[i], received, ctx[i])
            merged.append(x)
        params = merged
        history.append(params)
    return history


def noise(node: int, round: int) -> Tensor:
    return torch.from_numpy(stream(2, "training", node=node, round=round).normal(size=P, scale=0.3)).float()


def assert_same(a: list[list[Tensor]], b: list[list[Tensor]], atol: float) -> None:
    for step, (left, right) in enumerate(zip(a, b, strict=True)):
        for i, (x, y) in enumerate(zip(left, right, strict=True)):
            torch.testing.assert_close(
                x, y, rtol=0, atol=atol, msg=lambda m, s=step, i=i: f"{s}, node {i}: {m}"
            )


# --- Equalities between algorithms --------------------------------------------------------------------------


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: type(t).__name__)
def test_full_sharing_is_multiplication_with_the_mixing_matrix(topology: Any) -> None:
    history = run(full(), topology, 1)
    W = topology.at(0).matrix()
    expected = W @ torch.stack(history[0]).double().numpy()
    np.testing.assert_allclose(torch.stack(history[1]).numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "algorithm",
    [top_k(1.0), top_k(1.0, accumulate=True), random_k(1.0), jwins(FixedCutoff(1.0), wavelet=None)],
    ids=repr,
)
def test_sending_everything_is_full_sharing(algorithm: Any) -> None:
    for topology in TOPOLOGIES:
        assert_same(run(algorithm, topology, 4), run(full(), topology, 4), atol=0.0)


@pytest.mark.parametrize("mode", ["symmetric", "periodization"])
@pytest.mark.parametrize("wavelet", ["haar", "sym2", "db4", "bior2.2"])
@pytest.mark.parametrize("score", ["since_sent", "reference", "training_only"])
def test_jwins_at_fraction_one_is_full_sharing(wavelet: str, mode: Any, score: Any) -> None:
    algorithm = jwins(FixedCutoff(1.0), wavelet, 3, mode, score)
    assert_same(run(algorithm, Ring(5), 4), run(full(), Ring(5), 4), atol=2e-5)


@pytest.mark.parametrize("score", ["since_sent", "reference", "training_only"])
def test_dense_is_a_shorter_way_to_send_all_positions(score: Any) -> None:
    dense = jwins(FixedCutoff(1.0), score=score)
    listed = jwins(FixedCutoff(1.0 - 1e-9), score=score, dense_above=2.0)
    assert_same(run(dense, Ring(5), 4), run(listed, Ring(5), 4), atol=1e-6)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: type(t).__name__)
def test_choco_without_compression_and_gamma_one_is_d_psgd(topology: Any) -> None:
    assert_same(run(choco(1.0, 1.0), topology, 6), run(full(), topology, 6), atol=5e-6)


def test_top_k_is_jwins_without_wavelet_and_with_a_fixed_cutoff() -> None:
    plain = jwins(FixedCutoff(0.3), wavelet=None, accumulate=False, dense_above=1.0)
    assert top_k(0.3) == plain
    assert_same(run(top_k(0.3), Ring(5), 4), run(plain, Ring(5), 4), atol=0.0)


def test_the_identity_transform_is_no_transform() -> None:
    for score in ("since_sent", "reference", "training_only"):
        with_levels = jwins(FixedCutoff(0.3), "sym2", 0, score=score)  # type: ignore[arg-type]
        without = jwins(FixedCutoff(0.3), None, score=score)  # type: ignore[arg-type]
        assert_same(run(with_levels, Ring(5), 4), run(without, Ring(5), 4), atol=0.0)


# --- Conserved means and consensus --------------------------------------------------------------------------


KEEPING = [
    full(),
    full(values="bfloat16"),
    choco(0.2, 0.4),
    choco(0.2, 0.4, values="bfloat16"),
    choco(1.0, 1.0),
    jwins(FixedCutoff(1.0)),
    jwins(FixedCutoff(1.0), values="bfloat16"),
]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("algorithm", KEEPING, ids=repr)
def test_merging_keeps_the_mean_over_the_network(algorithm: Any, topology: Any) -> None:
    history = run(algorithm, topology, 8)
    for trained, merged in zip(history[0::2], history[1::2], strict=True):
        before = torch.stack(trained).double().mean(dim=0)
        after = torch.stack(merged).double().mean(dim=0)
        torch.testing.assert_close(after, before, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("algorithm", "rounds", "left"),
    [
        (full(), 60, 1e-5),
        (choco(0.3, 0.3), 400, 1e-4),
        (jwins(), 200, 1e-3),
        (top_k(0.3, accumulate=True), 200, 1e-3),
        (random_k(0.3), 200, 1e-3),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_without_training_the_nodes_agree(algorithm: Any, rounds: int, left: float) -> None:
    history = run(algorithm, Ring(4), rounds, train=False)

    def distance(params: list[Tensor]) -> float:
        rows = torch.stack(params)
        return float((rows - rows.mean(dim=0)).norm())

    assert distance(history[-1]) < left * distance(history[0])


def test_one_round_of_a_full_graph_is_the_average() -> None:
    history = run(full(), FullyConnected(4), 1)
    for x in history[1]:
        torch.testing.assert_close(x, torch.stack(history[0]).mean(dim=0), rtol=0, atol=1e-6)


# --- Selection ----------------------------------------------------------------------------------------------


def slow_largest_k(score: Sequence[float], k: int) -> list[int]:
    """By sorting: larger magnitude first, then the lower position."""
    return sorted(sorted(range(len(score)), key=lambda i: (-abs(score[i]), i))[:k])


tied = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 2e-45, 1.1754942e-38, -1e-40, 3.4028235e38])
numbers = st.one_of(tied, st.floats(width=32, allow_nan=False, allow_infinity=False))


@settings(max_examples=300, deadline=None)
@given(st.lists(numbers, max_size=40), st.data())
def test_largest_k_is_what_sorting_finds(score: list[float], data: Any) -> None:
    k = data.draw(st.integers(0, len(score)))
    given_score = torch.tensor(score, dtype=torch.float32)
    before = given_score.clone()
    chosen = largest_k(given_score, k)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == slow_largest_k(given_score.tolist(), k)
    assert torch.equal(given_score.view(torch.int32), before.view(torch.int32))


def test_largest_k_of_many_ties() -> None:
    rng = np.random.default_rng(0)
    score = rng.integers(-3, 4, 5000).astype(np.float32)
    for k in (0, 1, 7, 700, 2500, 4999, 5000):
        assert largest_k(torch.from_numpy(score), k).tolist() == slow_largest_k(score.tolist(), k)


def test_largest_k_of_views_and_parameters() -> None:
    score = torch.arange(20.0).reshape(10, 2)
    assert largest_k(score[:, 1], 3).tolist() == [7, 8, 9]
    assert largest_k(torch.nn.Parameter(torch.tensor([1.0, -2.0])), 1).tolist() == [1]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_largest_k_refuses_what_has_no_order(wrong: float, k: int) -> None:
    with pytest.raises(UsageError, match="not finite"):
        largest_k(torch.tensor([1.0, wrong, 2.0]), k)


def test_largest_k_refuses_counts_out_of_range() -> None:
    for k in (-1, 4):
        with pytest.raises(UsageError, match="0 <= k <= 3"):
            largest_k(torch.zeros(3), k)


@given(st.floats(0, 1), st.integers(0, 10**7))
def test_count_of_rounds(fraction: float, size: int) -> None:
    count = count_of(fraction, size)
    assert 0 <= count <= size
    assert abs(count - fraction * size) <= 0.5


# --- Pseudo-random positions --------------------------------------------------------------------------------


def slow_positions(seed: int, count: int, dim: int) -> list[int]:
    """From docs/reference/wire.md: a Philox word per position; the smallest win, ties to the lower position."""
    bits = np.random.Philox(key=seed + (int.from_bytes(b"JWINS_PO", "big") << 64))
    words = [int(word) for word in bits.random_raw(dim)]
    return sorted(sorted(range(dim), key=lambda i: (words[i], i))[:count])


GOLDEN_POSITIONS = {
    (0, 5, 20): [0, 5, 8, 11, 14],
    (7, 3, 10): [0, 2, 5],
    (2**64 - 1, 4, 100): [11, 12, 34, 62],
    (123456789, 6, 1000): [103, 151, 301, 531, 585, 611],
}


@pytest.mark.parametrize("case", GOLDEN_POSITIONS)
def test_sampled_positions_never_change(case: tuple[int, int, int]) -> None:
    seed, count, dim = case
    assert Sampled(seed, count).positions(dim).tolist() == GOLDEN_POSITIONS[case]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 60), st.data())
def test_sampled_positions_by_their_definition(seed: int, dim: int, data: Any) -> None:
    count = data.draw(st.integers(0, dim))
    positions = Sampled(seed, count).positions(dim)
    assert positions.dtype == torch.int64
    assert positions.tolist() == slow_positions(seed, count, dim)


def test_sampled_positions_are_uniform() -> None:
    hits = np.zeros(50)
    for seed in range(2000):
        hits[Sampled(seed, 10).positions(50).numpy()] += 1
    assert abs(hits / 2000 - 0.2).max() < 5 * (0.2 * 0.8 / 2000) ** 0.5


def test_an_update_draws_its_positions_once_for_all_receivers() -> None:
    update = Update(1000, Sampled(123456789, 6), torch.ones(6))
    positions = update.indices()
    assert positions is not None
    assert positions.tolist() == GOLDEN_POSITIONS[123456789, 6, 1000]
    assert update.indices() is positions


def test_more_positions_than_there_are_is_misuse() -> None:
    with pytest.raises(UsageError, match="fewer positions"):
        Sampled(1, 11).positions(10)


# --- Cut-off ------------------------------------------------------------------------------------------------


def test_the_random_cutoff_draws_each_fraction_equally_often() -> None:
    cutoff = RandomCutoff()
    draws = [cutoff(RoundContext(5, node, r)) for node in range(50) for r in range(100)]
    counts = Counter(draws)
    assert set(counts) == set(PAPER_FRACTIONS)
    expected = len(draws) / len(PAPER_FRACTIONS)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 22.5, "chi2, 6 degrees, p = 0.001"
    assert np.mean(draws) == pytest.approx(np.mean(PAPER_FRACTIONS), abs=0.02)


def test_the_random_cutoff_is_each_nodes_own_and_repeatable() -> None:
    cutoff = RandomCutoff()
    of_node = [[cutoff(RoundContext(5, node, r)) for r in range(40)] for node in range(3)]
    assert of_node == [[cutoff(RoundContext(5, node, r)) for r in range(40)] for node in range(3)]
    assert of_node[0] != of_node[1] != of_node[2]
    assert of_node[0] != [cutoff(RoundContext(6, 0, r)) for r in range(40)]


def test_a_fraction_listed_twice_is_drawn_twice_as_often() -> None:
    cutoff = RandomCutoff((0.1, 0.1, 0.4))
    draws = [cutoff(RoundContext(5, 0, r)) for r in range(3000)]
    assert draws.count(0.1) / len(draws) == pytest.approx(2 / 3, abs=0.04)


# --- Score rules --------------------------------------------------------------------------------------------


class Literal:
    """JWINS for one node, written down coefficient by coefficient from the definition of its score rules."""

    def __init__(self, x0: Tensor, rule: str, wavelet: str | None) -> None:
        self.rule, self.wavelet = rule, wavelet
        self.x = [float(v) for v in self.transform(x0)]
        size = len(self.x)
        self.history: list[tuple[list[float], list[float]]] = []  # T(x), T(y) of each round
        self.last: list[int | None] = [None] * size  # round in which each coefficient was last sent
        self.x0 = list(self.x)

    def transform(self, vector: Tensor) -> np.ndarray:
        if self.wavelet is None:
            return vector.double().numpy()
        return np.concatenate(pywt.wavedec(vector.double().numpy(), self.wavelet, level=2))

    def scores(self, y: Tensor) -> list[float]:
        ty = [float(v) for v in self.transform(y)]
        self.history.append((self.x, ty))
        result = []
        for c, last in enumerate(self.last):
            if self.rule == "training_only":
                first = 0 if last is None else last + 1
                result.append(sum(b[c] - a[c] for a, b in self.history[first:]))
            elif last is None:
                result.append(ty[c] - self.x0[c])
            elif self.rule == "since_sent":
                result.append(ty[c] - self.history[last][1][c])
            else:
                result.append(ty[c] - self.history[last][0][c])
        return result

    def merged(self, x: Tensor) -> None:
        self.x = [float(v) for v in self.transform(x)]

    def sent(self, positions: Sequence[int]) -> None:
        for c in positions:
            self.last[c] = len(self.history) - 1


@pytest.mark.parametrize("wavelet", [None, "sym2"])
@pytest.mark.parametrize("rule", ["since_sent", "reference", "training_only"])
def test_score_rules_by_their_definition(rule: Any, wavelet: str | None) -> None:
    fractions = [0.1, 0.3, 0.2, 1.0, 0.1, 0.4, 0.2, 0.1]
    algorithm = jwins(lambda ctx: fractions[ctx.round], wavelet, 2, score=rule)
    x = torch.from_numpy(stream(1, "start").normal(size=P)).float()
    literal = Literal(x, rule, wavelet)
    state = algorithm.init(x)
    size = algorithm.update_dim(P)
    for r, fraction in enumerate(fractions):
        ctx = RoundContext(1, 0, r, {1: 0.5})
        y = x + noise(0, r)
        update, state = algorithm.share(state, y, ctx)
        scores = literal.scores(y)
        if fraction == 1.0:
            assert update.positions is None
            chosen = list(range(size))
        else:
            chosen = slow_largest_k(scores, round(fraction * size))
            positions = update.indices()
            assert positions is not None
            assert positions.tolist() == chosen, f"round {r}"
        np.testing.assert_allclose(
            update.dense_values().numpy(), literal.transform(y)[chosen], rtol=0, atol=1e-5
        )
        literal.sent(chosen)
        other = Wavelet("sym2", 2).forward(y + noise(1, r)) if wavelet else y + noise(1, r)
        keep = torch.arange(0, size, 3)
        x, state = algorithm.merge(state, y, [Received(1, r, 0.5, Update(size, keep, other[keep]))], ctx)
        literal.merged(x)


@pytest.mark.parametrize("rule", ["since_sent", "reference", "training_only"])
def test_without_accumulation_only_this_rounds_training_counts(rule: Any) -> None:
    algorithm = jwins(FixedCutoff(0.2), None, score=rule, accumulate=False)
    x = torch.zeros(P)
    state = algorithm.init(x)
    for r in range(4):
        change = noise(0, r)
        update, state = algorithm.share(state, x + change, RoundContext(1, 0, r))
        positions = update.indices()
        assert positions is not None
        assert positions.tolist() == slow_largest_k(((x + change) - x).tolist(), round(0.2 * P))
        x, state = algorithm.merge(state, x + change, [], RoundContext(1, 0, r))


def test_every_coefficient_is_sent_in_the_end() -> None:
    """With accumulated scores, one that changes a little each round overtakes what was sent lately."""
    algorithm = jwins(FixedCutoff(0.1), None)
    x, seen = torch.zeros(P), set()
    state = algorithm.init(x)
    change = torch.linspace(0.5, 1.0, P)
    for r in range(40):
        update, state = algorithm.share(state, x + change, RoundContext(1, 0, r))
        seen |= set(update.indices().tolist())  # type: ignore[union-attr]
        x, state = algorithm.merge(state, x + change, [], RoundContext(1, 0, r))
    assert seen == set(range(P))


# --- Quantized ----------------------------------------------------------------------------------------------


def test_an_offset_moves_nonzero_levels_towards_zero_and_no_further() -> None:
    symbols = torch.tensor([-3, -1, 0, 1, 3], dtype=torch.int32)
    quantized = Quantized(symbols, torch.tensor([2.0]), (5,), offset=0.25)
    assert quantized.dense().tolist() == [-5.5, -1.5, 0.0, 1.5, 5.5]
    assert Quantized(symbols, torch.tensor([2.0]), (5,), offset=0.1).offset == float(np.float32(0.1))


def test_the_error_of_a_dithered_quantizer_does_not_depend_on_the_value() -> None:
    """Without dither, values below half a step all become 0; with it, their mean is kept."""
    values = torch.full((40_000,), 0.2)
    noise = dither(11, len(values))
    assert abs(float(noise.mean())) < 0.01
    assert -0.5 < float(noise.min()) < float(noise.max()) < 0.5
    symbols = (values + noise).round().to(torch.int32)
    dense = Quantized(symbols, torch.ones(1), (len(values),), dither=11).dense()
    assert float(dense.mean()) == pytest.approx(0.2, abs=0.01)
    assert float((dense - values).abs().max()) <= 0.5 + 1e-6
    assert float((dense - values).var()) == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"dither": -1}, "dither = -1"),
        ({"dither": 2**64}, "unsigned 64-bit seed"),
        ({"offset": -0.1}, "offset = -0.1"),
        ({"offset": 0.5}, r"offset = 0.5: expected steps in \[0, 1/2\)"),
        ({"offset": 0.5 - 1e-12}, "offset"),
        ({"offset": float("nan")}, "offset = nan"),
    ],
)
def test_dither_and_offset_are_checked(more: Any, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        Quantized(torch.zeros(1, dtype=torch.int32), torch.ones(1), (1,), **more)


@pytest.mark.parametrize("wrong", [0.0, -0.0, -1.0, float("inf"), float("-inf"), float("nan")])
def test_scales_are_finite_and_above_zero(wrong: float) -> None:
    symbols = torch.zeros(3, dtype=torch.int32)
    Quantized(symbols, torch.tensor([2.0**-149, 3.4e38, 1.0]), (1, 1, 1))
    for at in range(3):
        scales = torch.ones(3)
        scales[at] = wrong
        with pytest.raises(UsageError, match="finite values > 0"):
            Quantized(symbols, scales, (1, 1, 1))
    Quantized(symbols[:0], scales[:0], ())


# --- identical() --------------------------------------------------------------------------------------------


def variants() -> list[Update]:
    symbols = torch.tensor([1, 2], dtype=torch.int32)
    nan = torch.tensor([0x7FC00001, 0x7FC00002], dtype=torch.int32).view(torch.float32)
    two = torch.tensor([1.0, 2.0])
    return [
        Update(2, None, two),
        Update(2, torch.tensor([0, 1]), two),
        Update(2, Sampled(1, 2), two),
        Update(2, Sampled(2, 2), two),
        Update(3, torch.tensor([0, 1]), two),
        Update(3, torch.tensor([0, 2]), two),
        Update(2, None, two, base=0),
        Update(2, None, two, base=1),
        Update(2, None, two, check=0),
        Update(2, None, two, check=1),
        Update(2, None, two.bfloat16()),
        Update(2, None, torch.tensor([0.0, 2.0])),
        Update(2, None, torch.tensor([-0.0, 2.0])),
        Update(2, None, torch.tensor([-0.0, 2.0]).bfloat16()),
        Update(2, None, nan),
        Update(2, None, nan.flip(0)),
        Update(2, None, Quantized(symbols, torch.tensor([1.0]), (2,))),
        Update(2, None, Quantized(symbols.flip(0), torch.tensor([1.0]), (2,))),
        Update(2, None, Quantized(symbols, torch.tensor([2.0]), (2,))),
        Update(2, None, Quantized(symbols, torch.tensor([1.0, 1.0]), (1, 1))),
        Update(2, None, Quantized(symbols, torch.tensor([1.0, 1.0]), (2, 0))),
        Update(2, None, Quantized(symbols, torch.tensor([1.0]), (2,), dither=0)),
        Update(2, None, Quantized(symbols, torch.tensor([1.0]), (2,), dither=1)),
        Update(2, None, Quantized(symbols, torch.tensor([1.0]), (2,), offset=0.1)),
        Update(2, None, Quantized(symbols, torch.tensor([1.0]), (2,), dither=1, offset=0.1)),
        Update(0, None, torch.zeros(0)),
        Update(0, torch.zeros(0, dtype=torch.int64), torch.zeros(0)),
        Update(0, Sampled(0, 0), torch.zeros(0)),
    ]


def test_identical_means_bit_for_bit() -> None:
    for i, a in enumerate(variants()):
        for j, b in enumerate(variants()):
            assert identical(a, b) == (i == j), f"{a} and {b}"
