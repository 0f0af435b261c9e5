"""The field's algorithms: against their papers' equations in numpy, and what they promise."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jwins.errors import ConfigError
from jwins.ops.dct import BlockDct
from jwins.ops.quantize import absmax_scales
from jwins.rng import RoundContext, stream
from jwins.sharing import beer, choco, demo, full, moniqua, noloco, power_gossip, sparse_loco
from jwins.sharing.sparse_loco import TwoBits
from jwins.sharing.update import Quantized, Received, Update
from jwins.topology import FullyConnected, Regular, Ring, Topology

N, P = 5, 12
Array = npt.NDArray[np.float64]
GRAPH = Ring(N)
MIXING = GRAPH.at(0).matrix()
TARGETS = np.random.default_rng(3).normal(size=(N, P))
STARTS = np.tile(np.random.default_rng(4).normal(size=P), (N, 1))


def run(
    algorithm: Any,
    rounds: int,
    *,
    lr: float = 0.1,
    starts: Array = STARTS,
    topology: Topology = GRAPH,
    lost: tuple[int, int, int] = (-1, -1, -1),
) -> Array:
    """Nodes that each descend to a target of their own; ``lost`` is (round, sender, receiver) of one frame.

    Returns:
        (rounds + 1, N, P) the parameters at the start of each round and at the end.
    """
    params = [torch.from_numpy(row).float() for row in starts]
    state = [algorithm.init(x) for x in params]
    history = [np.stack([x.numpy().astype(np.float64) for x in params])]
    for r in range(rounds):
        graph, sent = topology.at(r), {}
        trained = [x - lr * (x - torch.from_numpy(t).float()) for x, t in zip(params, TARGETS, strict=False)]
        contexts = [RoundContext(1, i, r, graph.senders[i]) for i in range(len(params))]
        for i, ctx in enumerate(contexts):
            update, state[i] = algorithm.share(state[i], trained[i], ctx)
            own = algorithm.for_peer if algorithm.per_peer else lambda _, peer, update=update: update
            sent |= {(i, j): own(state[i], j) for j in graph.recipients[i]}
        for i, ctx in enumerate(contexts):
            received = [Received(j, r, w, sent[j, i]) for j, w in ctx.weights.items() if (r, j, i) != lost]
            params[i], state[i] = algorithm.merge(state[i], trained[i], received, ctx)
        history.append(np.stack([x.numpy().astype(np.float64) for x in params]))
    return np.stack(history)


def top(rows: Array, k: int) -> Array:
    """Each row with all but its k largest magnitudes set to 0."""
    kept = np.zeros_like(rows)
    for row, out in zip(rows, kept, strict=True):
        at = np.argsort(-np.abs(row), kind="stable")[:k]
        out[at] = row[at]
    return kept


def spread(rows: Array) -> float:
    return float(np.linalg.norm(rows - rows.mean(axis=0)))


# --- BEER and MoTEF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [1.0, 0.3])
@pytest.mark.parametrize("k", [3, P])
def test_beer_is_the_algorithm_of_its_paper(momentum: float, k: int) -> None:
    """X, V, H, G in matrices, the gradient being (x - target) and the learning rate in V."""
    gamma, lr, rounds = 0.4, 0.1, 12
    laplacian = MIXING - np.eye(N)
    X = STARTS.copy()
    H = np.zeros_like(X)
    G = np.zeros_like(X)
    M = -lr * (X - TARGETS)
    V = M.copy()
    expected = [X]
    for _ in range(rounds):
        H = H + top(X - H, k)
        G = G + top(V - G, k)
        X = X + gamma * laplacian @ H + V
        newest = (1 - momentum) * M - momentum * lr * (X - TARGETS)
        V = V + gamma * laplacian @ G + newest - M
        M = newest
        expected.append(X)
    found = run(beer(k / P, gamma, momentum=momentum), rounds, lr=lr)
    np.testing.assert_allclose(found, np.stack(expected), atol=2e-5)


@pytest.mark.parametrize("momentum", [1.0, 0.5])
def test_beer_has_no_bias_on_unlike_data(momentum: float) -> None:
    """D-PSGD stops where each node is drawn to its own target; gradient tracking reaches the mean of them."""
    optimum = np.tile(TARGETS.mean(axis=0), (N, 1))
    exact = run(beer(0.5, 0.3, momentum=momentum), 600, lr=0.05)[-1]
    biased = run(full(), 600, lr=0.05)[-1]
    assert np.linalg.norm(exact - optimum) < 1e-3
    assert np.linalg.norm(biased - optimum) > 0.1


def test_beer_catches_up_with_a_frame_it_missed_by_a_keyframe() -> None:
    algorithm = beer(0.5, 0.5)
    start = torch.zeros(P)
    states = [algorithm.init(start), algorithm.init(start)]
    contexts = [[RoundContext(1, i, r, {1 - i: 0.5}) for i in (0, 1)] for r in range(3)]
    trained = torch.linspace(-1.0, 1.0, P)
    for r in range(2):
        _, states[0] = algorithm.share(states[0], trained, contexts[r][0])
        _, states[0] = algorithm.merge(states[0], trained, [], contexts[r][0])
    update, states[0] = algorithm.share(states[0], trained, contexts[2][0])
    _, states[1] = algorithm.share(states[1], trained, contexts[2][1])
    merged, gap = algorithm.merge(states[1], trained, [Received(0, 2, 0.5, update)], contexts[2][1])
    assert algorithm.stale_peers(gap) == {0}
    assert torch.equal(merged, trained)
    keyframe = Received(0, 2, 0.5, algorithm.keyframe(states[0], contexts[2][0]))
    _, healed = algorithm.merge(states[1], trained, [keyframe], contexts[2][1])
    assert algorithm.stale_peers(healed) == frozenset()
    assert torch.equal(healed.replicas[0].x_hat, states[0].x_hat)


# --- SparseLoCo -------------------------------------------------------------------------------------------


def test_sparse_loco_is_its_equations() -> None:
    gamma, decay, lr, chunk, rounds = 0.5, 0.8, 0.1, 16, 10
    size = 40  # two whole chunks and a short one
    rng = np.random.default_rng(5)
    targets, X = rng.normal(size=(N, size)), np.tile(rng.normal(size=size), (N, 1))
    hats = np.zeros_like(X)
    algorithm = sparse_loco(0.25, gamma, decay=decay, chunk=chunk)
    params = [torch.from_numpy(row).float() for row in X]
    state = [algorithm.init(x) for x in params]
    senders = GRAPH.at(0).senders
    for r in range(rounds):
        Y = X - lr * (X - targets)
        sent, trained = (
            [],
            [x - lr * (x - torch.from_numpy(t).float()) for x, t in zip(params, targets, strict=True)],
        )
        for i in range(N):
            for begin in range(0, size, chunk):
                part = (Y - hats)[i, begin : begin + chunk]
                at = np.argsort(-np.abs(part), kind="stable")[: round(0.25 * len(part))]
                largest = np.abs(part).max()
                large = np.abs(part[at]) > 2 / 3 * largest
                hats[i, begin + at] += np.sign(part[at]) * np.where(large, largest, largest / 3)
            update, state[i] = algorithm.share(state[i], trained[i], RoundContext(1, i, r, senders[i]))
            sent.append(update)
        np.testing.assert_allclose([s.x_hat.numpy() for s in state], hats, atol=0.02)
        hats = np.stack([s.x_hat.numpy().astype(np.float64) for s in state])  # scales are rounded to bfloat16
        X = Y - (1 - decay) * (Y - hats) + gamma * (MIXING - np.eye(N)) @ hats
        for i in range(N):
            received = [Received(j, r, w, sent[j]) for j, w in senders[i].items()]
            params[i], state[i] = algorithm.merge(
                state[i], trained[i], received, RoundContext(1, i, r, senders[i])
            )
        np.testing.assert_allclose([x.numpy() for x in params], X, atol=1e-5)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60), st.integers(1, 20))
def test_two_bits_err_by_a_third_of_the_largest(numbers: list[float], block: int) -> None:
    values = torch.tensor(numbers)
    subbands = tuple(len(part) for part in values.split(block))
    found = TwoBits()(values, subbands, RoundContext(1, 0, 0))
    assert set(found.symbols.tolist()) <= {-3, -1, 0, 1, 3}
    largest = torch.cat([part.abs().max().repeat(len(part)) for part in values.split(block)])
    assert bool(((found.dense() - values).abs() <= largest * (1 / 3 + 0.01) + 1e-30).all())
    assert bool((found.dense() * values >= 0).all())


def test_without_decay_and_chunks_it_chooses_as_choco_does() -> None:
    algorithm, other = sparse_loco(0.25, 0.5, decay=1.0), choco(0.25, 0.5, values=TwoBits())
    np.testing.assert_array_equal(run(algorithm, 8), run(other, 8))


# --- Moniqua ----------------------------------------------------------------------------------------------


def test_moniqua_is_d_psgd_on_rounded_parameters() -> None:
    theta, bits, rounds = 4.0, 6, 10
    step = 2 * theta / (2**bits - 1)
    X = STARTS.copy()
    for _ in range(rounds):
        Y = X - 0.1 * (X - TARGETS)
        own = np.round(Y / step) * step
        X = Y + (MIXING - np.eye(N)) @ own
    np.testing.assert_allclose(run(moniqua(theta, bits=bits), rounds)[-1], X, atol=1e-4)


def resolved(theta: float, bits: int, mine: Tensor, theirs: Tensor) -> Tensor:
    """Return a node's merge with one neighbour of weight 1."""
    algorithm = moniqua(theta, bits=bits)
    ctx = RoundContext(1, 0, 0, {1: 1.0})
    update, _ = algorithm.share(None, theirs, RoundContext(1, 1, 0, {0: 1.0}))
    assert isinstance(update.values, Quantized)
    assert int(update.values.symbols.min()) >= -(2 ** (bits - 1))
    assert int(update.values.symbols.max()) < 2 ** (bits - 1)
    return algorithm.merge(None, mine, [Received(1, 0, 1.0, update)], ctx)[0]


@given(
    st.integers(2, 16),
    st.floats(0.01, 10.0),
    st.lists(st.tuples(st.floats(-50, 50), st.floats(-1, 1)), min_size=1, max_size=20),
)
def test_within_theta_no_wrap_is_wrong(bits: int, theta: float, pairs: list[tuple[float, float]]) -> None:
    """Two nodes that differ by theta less a step, or by less, find each other to a step."""
    step = moniqua(theta, bits=bits).step
    mine = torch.tensor([centre for centre, _ in pairs])
    theirs = mine + torch.tensor([0.99 * (theta - step) * side for _, side in pairs])
    found = resolved(theta, bits, mine, theirs)
    assert float((found - theirs).abs().max()) <= 1.01 * step + 1e-4


@given(st.integers(2, 8), st.floats(1.2, 40.0))
def test_beyond_theta_a_wrong_wrap_is_noticed(bits: int, times: float) -> None:
    mine, apart = torch.linspace(-1.0, 1.0, P), torch.zeros(P)
    apart[4] = times * 2.0  # of theta = 1, at least 2.4, more than a range of 2 / (1 - 2^-b) for 3 bits or more
    found = resolved(1.0, max(bits, 3), mine, mine + apart)
    assert torch.equal(found, mine)


def test_updates_that_are_none_of_moniquas_change_nothing() -> None:
    algorithm, mine = moniqua(1.0), torch.linspace(-1.0, 1.0, P)
    ctx = RoundContext(1, 0, 0, {1: 0.5})
    symbols = Quantized(torch.full((P,), 3, dtype=torch.int32), torch.tensor([1.0]), (P,))
    for update in (
        Update(P, None, torch.ones(P)),
        Update(P, None, symbols),
        Update(P, None, symbols, check=7),
        Update(P, torch.tensor([2]), torch.ones(1), check=7),
    ):
        assert torch.equal(algorithm.merge(None, mine, [Received(1, 0, 0.5, update)], ctx)[0], mine)


# --- PowerGossip ------------------------------------------------------------------------------------------

SHAPES = ((2, 3), (4,), (1, 2, 1))


def power_gossip_of_the_paper(rounds: int, lr: float) -> Array:
    """The nodes of the ring with matrices of their own, one vector per edge and matrix, and its products."""
    X, vectors, history = STARTS.copy(), {}, [STARTS]
    for r in range(rounds):
        X = X - lr * (X - TARGETS)
        change = np.zeros_like(X)
        for i, j in itertools.combinations(range(N), 2):
            if not MIXING[i, j]:
                continue
            if r == 0:
                drawn = stream(1, f"power gossip {i} {j}", round=0).standard_normal(3 + 2, dtype="float32")
                vectors[i, j] = np.split(drawn.astype(np.float64), [3])
            after = []
            for (begin, end, rows), v in zip(((0, 6, 2), (10, 12, 1)), vectors[i, j], strict=True):
                own, other = X[i, begin:end].reshape(rows, -1), X[j, begin:end].reshape(rows, -1)
                u = v / np.linalg.norm(v)
                p = (other - own) @ u if r % 2 == 0 else (other - own).T @ u
                low_rank = np.outer(p, u) if r % 2 == 0 else np.outer(u, p)
                change[i, begin:end] += MIXING[i, j] * low_rank.ravel()
                change[j, begin:end] -= MIXING[i, j] * low_rank.ravel()
                after.append(p)
            vectors[i, j] = after
            change[i, 6:10] += MIXING[i, j] * (X[j] - X[i])[6:10]
            change[j, 6:10] -= MIXING[i, j] * (X[j] - X[i])[6:10]
        X = X + change
        history.append(X)
    return np.stack(history)


def test_power_gossip_is_the_algorithm_of_its_paper() -> None:
    algorithm = power_gossip().for_model(SHAPES)
    np.testing.assert_allclose(run(algorithm, 12), power_gossip_of_the_paper(12, 0.1), atol=1e-4)
    update, state = algorithm.share(
        algorithm.init(torch.ones(P)), torch.ones(P), RoundContext(1, 0, 0, {1: 0.5})
    )
    assert update.count == 2 + 4 + 1  # of rows, the vector, and one row
    _, state = algorithm.merge(state, torch.ones(P), [], RoundContext(1, 0, 0, {1: 0.5}))
    assert algorithm.share(state, torch.ones(P), RoundContext(1, 0, 1, {1: 0.5}))[0].count == 3 + 4 + 2


def test_power_gossip_goes_on_after_a_lost_frame() -> None:
    """An edge rests until both nodes have drawn the same vector again; the others go on."""
    algorithm = power_gossip().for_model(SHAPES)
    apart = STARTS + np.random.default_rng(6).normal(size=STARTS.shape)
    history = run(algorithm, 40, lr=0.0, starts=apart, lost=(3, 0, 1))
    assert spread(history[-1]) < 1e-2 * spread(history[0])
    moved = np.abs(np.diff(history.mean(axis=1), axis=0)).max(axis=1)
    assert moved[3] > 1e-3  # one of the two has moved alone
    assert np.delete(moved, 3).max() < 1e-5


def test_power_gossip_draws_anew_after_missed_rounds() -> None:
    """Vectors of an edge for the other side of the matrices are of no use."""
    algorithm, params = power_gossip().for_model(SHAPES), torch.from_numpy(STARTS[0]).float()
    contexts = [RoundContext(1, 0, at, {1: 0.5}) for at in range(3)]
    sent, state = algorithm.share(algorithm.init(params), params, contexts[0])
    _, state = algorithm.merge(state, params, [Received(1, 0, 0.5, sent)], contexts[0])
    assert len(state.vectors[1]) == 2 + 1  # for round 1
    update, state = algorithm.share(state, params, contexts[2])
    assert update.count == 2 + 4 + 1
    assert len(state.vectors[1]) == 3 + 2


# --- NoLoCo -----------------------------------------------------------------------------------------------


def test_noloco_is_the_algorithm_of_its_paper() -> None:
    """Pairs that change every round, and the mean of both the changes and the starts over each pair."""
    lr, momentum, gamma, rounds = 0.7, 0.5, 0.6, 10
    pairs = Regular(num_nodes=4, seed=3, degree=1, dynamic=True)
    targets, X = TARGETS[:4], STARTS[:4].copy()
    M, expected = np.zeros_like(X), [X]
    for r in range(rounds):
        D = -0.1 * (X - targets)
        (partner,) = zip(*(graph for graph in pairs.at(r).senders), strict=True)
        M = np.stack(
            [
                momentum * M[i]
                + lr * (D[i] + D[j]) / 2  # of the pseudo-gradients
                - gamma * (X[i] - (X[i] + X[j]) / 2)
                for i, j in enumerate(partner)
            ]
        )
        X = X + M
        expected.append(X)
    assert len({tuple(sorted(pairs.at(r).senders[0])) for r in range(rounds)}) > 1
    found = run(noloco(lr, momentum, gamma), rounds, starts=STARTS[:4], topology=pairs)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)


# --- SparseLoCo on a complete graph -----------------------------------------------------------------------


def test_sparse_loco_of_its_paper_on_a_complete_graph() -> None:
    """One model, error feedback at each worker, and the mean of all compressed updates."""
    decay, rounds = 0.8, 6  # in later ones float32 and float64 choose differently between nearly equal values
    x, E, expected = STARTS[0], np.zeros_like(STARTS), [STARTS]
    for _ in range(rounds):
        E = decay * E - 0.1 * (x - TARGETS)
        sent = top(E, 3)
        largest = np.abs(E).max(axis=1, keepdims=True)
        largest = np.stack([absmax_scales(torch.tensor(row).float(), 1, 1).numpy() for row in largest])
        sent = np.sign(sent) * np.where(np.abs(sent) > 2 / 3 * largest, largest, largest / 3)
        E = E - sent
        x = x + sent.mean(axis=0)
        expected.append(np.tile(x, (N, 1)))
    algorithm = sparse_loco(3 / P, decay=decay)
    found = run(algorithm, rounds, topology=FullyConnected(N))
    np.testing.assert_allclose(found, np.stack(expected), atol=2e-3)
    assert np.ptp(found, axis=1).max() == 0.0  # all nodes have the same model, bit for bit


@pytest.mark.parametrize("drifted", [False, True])
def test_sparse_loco_makes_up_for_a_lost_frame_by_its_keyframe(drifted: bool) -> None:
    algorithm, start = sparse_loco(3 / P), torch.from_numpy(STARTS[0]).float()
    states = {i: algorithm.init(start) for i in range(3)}
    params = dict.fromkeys(range(3), start)
    for r in range(4):
        contexts = {i: RoundContext(1, i, r, {j: 1 / 3 for j in range(3) if j != i}) for i in range(3)}
        sent = {}
        for i, ctx in contexts.items():
            trained = params[i] - 0.1 * (params[i] - torch.from_numpy(TARGETS[i]).float())
            sent[i], states[i] = algorithm.share(states[i], trained, ctx)
            params[i] = trained
        if r == 2:
            assert algorithm.stale_peers(states[1]) == frozenset({0} if drifted else ())
        for i, ctx in contexts.items():
            updates = {j: sent[j] for j in ctx.weights if (r, j, i) != (1, 0, 1)}
            if drifted and (r, i) == (1, 1):  # its replica is another, as the hash tells
                updates[0] = dataclasses.replace(sent[0], check=sent[0].check ^ 1)
            if (r, i) == (3, 1):
                updates[0] = algorithm.keyframe(states[0], contexts[0])
            received = [Received(j, r, 1 / 3, update) for j, update in updates.items()]
            params[i], states[i] = algorithm.merge(states[i], params[i], received, ctx)
        apart = float((params[1] - params[0]).abs().max())
        assert (apart > 1e-3) is (r in (1, 2))
        assert algorithm.stale_peers(states[1]) == (
            frozenset({0}) if r == 2 or (drifted and r == 1) else frozenset()
        )
    torch.testing.assert_close(params[1], params[2], rtol=0, atol=1e-6)


# --- DeMo -------------------------------------------------------------------------------------------------

MATRIX = ((3, 3), (3,))  # in blocks of 2: the matrix has four of 2 x 2, 2 x 1, 1 x 2 and 1 x 1
BLOCKS = [[[0, 1], [3, 4]], [[2], [5]], [[6, 7]], [[8]], [[9, 10]], [[11]]]


def cosines(size: int) -> Array:
    """The transform of a row by its definition: each frequency is a cosine of length 1."""
    rows = [[np.cos(np.pi * f * (place + 0.5) / size) for place in range(size)] for f in range(size)]
    return np.stack([np.array(row) / np.linalg.norm(row) for row in rows])


def transform_of_blocks() -> Array:
    rows = np.zeros((P, P))
    begin = 0
    for block in BLOCKS:
        at = np.array(block)
        rows[begin : begin + at.size, at.ravel()] = np.kron(cosines(at.shape[0]), cosines(at.shape[1]))
        begin += at.size
    return rows


T = transform_of_blocks()


def largest_of_blocks(coefficients: Array, k: int) -> Array:
    sizes = np.cumsum([np.size(block) for block in BLOCKS])
    return np.concatenate([top(part, k) for part in np.split(coefficients, sizes[:-1], axis=1)], axis=1)


@pytest.mark.parametrize(("lr", "sign", "k"), [(0.02, True, 1), (0.02, None, 2), (0.7, False, 1)])
def test_demo_is_the_rule_of_its_authors_on_a_complete_graph(lr: float, sign: bool | None, k: int) -> None:
    """A momentum at each worker that loses what is sent, and a mean over those who sent a coefficient."""
    decay, rounds = 0.8, 8
    x, M, expected = STARTS[0], np.zeros_like(STARTS), [STARTS]
    for _ in range(rounds):
        M = decay * M - 0.1 * (x - TARGETS)
        sent = largest_of_blocks(M @ T.T, k)
        M = M - sent @ T
        mean = sent.sum(axis=0) / np.maximum(np.count_nonzero(sent, axis=0), 1)
        step = mean @ T
        x = x + lr * (step if sign is False else np.sign(step))
        expected.append(np.tile(x, (N, 1)))
    algorithm = demo(lr, sign=sign, decay=decay, k=k, block=2).for_model(MATRIX)
    found = run(algorithm, rounds, topology=FullyConnected(N))
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)
    assert np.ptp(found, axis=1).max() == 0.0  # all nodes have the same model, bit for bit


def test_demo_on_a_graph_is_its_equations() -> None:
    gamma, decay, rounds = 0.4, 0.7, 10
    X, expected = STARTS, [STARTS]
    M = pull = hats = np.zeros_like(STARTS)
    for _ in range(rounds):
        M = decay * M - 0.1 * (X - TARGETS) @ T.T + gamma * pull
        sent = largest_of_blocks(M, 1)
        M, hats = M - sent, hats + sent
        pull = (MIXING - np.eye(N)) @ hats
        X = STARTS + (hats + pull) @ T
        expected.append(X)
    algorithm = demo(gamma=gamma, decay=decay, k=1, block=2).for_model(MATRIX)
    np.testing.assert_allclose(run(algorithm, rounds), np.stack(expected), atol=1e-5)


def test_demo_with_all_coefficients_and_gamma_1_is_d_psgd() -> None:
    """The sums are then the models themselves."""
    np.testing.assert_allclose(run(demo(gamma=1.0, k=9, block=5), 6), run(full(), 6), atol=1e-5)


def test_demo_on_a_graph_holds_nodes_together_with_half_of_the_coefficients() -> None:
    found = run(demo(gamma=0.5, k=1, block=2).for_model(MATRIX), 200)[-1]
    assert spread(found) < 2 * spread(run(full(), 200)[-1])
    assert np.linalg.norm(found.mean(axis=0) - TARGETS.mean(axis=0)) < 0.01  # the mean follows the training


def test_a_node_that_joins_with_a_model_sends_all_of_it_first() -> None:
    algorithm = demo(gamma=0.5, k=1, block=2).for_model(MATRIX)
    start, model = torch.zeros(P), torch.from_numpy(TARGETS[0]).float()
    state = algorithm.projected(algorithm.init(start), model)
    update, state = algorithm.share(state, model * 1.1, RoundContext(1, 0, 4, {1: 0.5}))
    assert update.positions is None
    expected = torch.from_numpy(T @ TARGETS[0]).float() * (0.999 + 0.1)
    torch.testing.assert_close(update.values, expected, atol=1e-5, rtol=0)
    update, _ = algorithm.share(state, model, RoundContext(1, 0, 5, {1: 0.5}))
    assert update.count <= len(BLOCKS)


@pytest.mark.parametrize("block", [1, 2, 4, 64])
def test_a_transform_of_blocks_keeps_lengths_and_has_an_inverse(block: int) -> None:
    shapes = ((5, 7), (), (0, 3), (6,), (4, 2, 3), (1, 9))
    size = 35 + 1 + 6 + 24 + 9
    vector = torch.from_numpy(np.random.default_rng(2).normal(size=size)).float()
    dct = BlockDct(shapes, block)
    coefficients = dct.forward(vector)
    torch.testing.assert_close(dct.inverse(coefficients), vector, atol=1e-5, rtol=0)
    assert float(coefficients.norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
    if block == 2:
        matrix = vector.numpy()[-9:].reshape(1, 9)[:, 6:8] @ cosines(2).T
        np.testing.assert_allclose(coefficients.numpy()[-3:-1], matrix[0], atol=1e-6)


def test_the_largest_of_blocks_have_an_order_even_if_they_tie() -> None:
    dct = BlockDct(((4,), (2, 3)), 2)
    coefficients = torch.tensor([1.0, -1.0, 0.0, 2.0, 3.0, 3.0, 3.0, -3.0, 0.0, 0.0])
    positions, counts = dct.largest(coefficients, 1)
    assert positions is not None
    assert (positions.tolist(), counts) == ([0, 3, 4], (2, 1, 0))
    positions, counts = dct.largest(coefficients, 2)
    assert positions is not None
    assert (positions.tolist(), counts) == ([0, 1, 3, 4, 5], (3, 2, 0))
    positions, counts = dct.largest(coefficients + 9.0, 64)
    assert (positions, counts) == (None, (4, 4, 2))


# --- All ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "rounds", "left"),
    [
        (beer(0.3, 0.3), 400, 1e-4),
        (beer(0.3, 0.3, momentum=0.3), 400, 1e-4),
        (sparse_loco(0.3, 0.3, chunk=16), 400, 1e-2),
        (moniqua(4.0, bits=12), 100, 1e-2),
        (noloco(), 100, 1e-2),
        (power_gossip(), 60, 1e-2),
    ],
    ids=["beer", "motef", "sparse_loco", "moniqua", "noloco", "power_gossip"],
)
def test_without_training_the_nodes_agree(algorithm: Any, rounds: int, left: float) -> None:
    apart = STARTS + np.random.default_rng(6).normal(size=STARTS.shape)
    history = run(algorithm, rounds, lr=0.0, starts=apart)
    assert spread(history[-1]) < left * spread(history[0])


@pytest.mark.parametrize(
    "algorithm",
    [beer(0.3, 0.3), moniqua(4.0), noloco(), power_gossip()],
    ids=["beer", "moniqua", "noloco", "power_gossip"],
)
def test_the_mean_follows_the_training(algorithm: Any) -> None:
    """Mixing does not change the mean over the nodes."""
    history = run(algorithm, 10, lr=0.0, starts=STARTS + np.arange(N)[:, None] * 0.1)
    np.testing.assert_allclose(history.mean(axis=1), np.tile(history[0].mean(axis=0), (11, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda: beer(0.2, 1.5), "sharing.gamma = 1.5"),
        (lambda: beer(2.0, 0.5), "sharing.fraction = 2.0"),
        (lambda: beer(0.2, 0.5, momentum=0.0), "sharing.momentum = 0.0"),
        (lambda: sparse_loco(0.2, 0.0), "sharing.gamma = 0.0"),
        (lambda: sparse_loco(0.2, 0.5, decay=1.5), "sharing.decay = 1.5"),
        (lambda: sparse_loco(0.2, 0.5, chunk=4), "sharing.chunk = 4"),
        (lambda: sparse_loco(0.2, 0.5, chunk=64.0), "sharing.chunk = 64.0"),  # type: ignore[arg-type]
        (lambda: sparse_loco(2.0), "sharing.fraction = 2.0"),
        (lambda: sparse_loco(decay=1.5), "sharing.decay = 1.5"),
        (lambda: demo(), "sharing.lr = None: expected lr on a complete graph"),
        (lambda: demo(0.1, 0.5), "sharing.lr = 0.1: belongs to the outer step"),
        (lambda: demo(gamma=0.5, sign=True), "sharing.sign = True: belongs to the outer step"),
        (lambda: demo(-0.1), "sharing.lr = -0.1"),
        (lambda: demo(gamma=1.5), "sharing.gamma = 1.5"),
        (lambda: demo(0.1, decay=1.0), "sharing.decay = 1.0"),
        (lambda: demo(0.1, k=0), "sharing.k = 0"),
        (lambda: demo(0.1, block=2.0), "sharing.block = 2.0"),  # type: ignore[arg-type]
        (lambda: demo(0.1, values="int8"), "sharing.values = 'int8'"),  # type: ignore[arg-type]
        (lambda: noloco(lr=0.0), "sharing.lr = 0.0"),
        (lambda: noloco(momentum=1.0), "sharing.momentum = 1.0"),
        (lambda: noloco(gamma=2.0), "sharing.gamma = 2.0"),
        (lambda: power_gossip(values="int8"), "sharing.values = 'int8'"),  # type: ignore[arg-type]
        (lambda: moniqua(0.0), "sharing.theta = 0.0"),
        (lambda: moniqua(1.0, bits=1), "sharing.bits = 1"),
        (lambda: moniqua(1.0, bits=4.0), "sharing.bits = 4.0"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range_name_their_path(build: Any, path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        build()
