"""Mixing matrices are symmetric where the graph is, and doubly stochastic, whatever the graph."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jwins.topology import FiniteTime, Graph, OnePeerExponential, Regular, Ring, SmallWorld, Topology, Torus

sizes = st.integers(1, 40)
seeds = st.integers(-(2**63), 2**63 - 1)
rounds = st.integers(0, 10**6)


def check(graph: Graph, *, symmetric: bool) -> None:
    W = graph.matrix()
    assert (W >= 0).all()
    np.testing.assert_allclose(W.sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(W.sum(axis=1), 1, atol=1e-12)
    if symmetric:
        np.testing.assert_array_equal(np.tril(W, -1), np.triu(W, 1).T)
        assert (np.diag(W) > 0).all()
    # A matrix of norm at most 1 around the mean never moves models apart.
    assert np.linalg.norm(W - 1 / graph.num_nodes, 2) <= 1 + 1e-9


@st.composite
def edge_sets(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    n = draw(sizes)
    nodes = st.integers(0, n - 1)
    pairs = st.tuples(nodes, nodes).filter(lambda pair: pair[0] != pair[1])
    return n, draw(st.lists(pairs, max_size=120)) if n > 1 else []


@given(edge_sets())
def test_metropolis_hastings_of_any_edges(graph: tuple[int, list[tuple[int, int]]]) -> None:
    n, edges = graph
    found = Graph.metropolis_hastings(n, edges)
    check(found, symmetric=True)
    assert set(found.edges) == {*edges, *((j, i) for i, j in edges)}
    degrees = [len(row) for row in found.recipients]
    for i, weights in enumerate(found.senders):
        assert all(weight == 1 / (1 + max(degrees[i], degrees[j])) for j, weight in weights.items())


@st.composite
def random_topologies(draw: st.DrawFn) -> tuple[Topology, int | None]:
    """A topology that draws, and the degree of its nodes if they have the same."""
    n = draw(st.integers(4, 40))
    seed = draw(seeds)
    dynamic = draw(st.booleans())
    if draw(st.booleans()):
        degree = draw(st.integers(1 if dynamic else 2, n - 1).filter(lambda d: n * d % 2 == 0))
        return Regular(n, degree, dynamic, seed), degree
    # From 8 neighbours on, a draw that is not connected is as good as impossible at these sizes.
    degree = draw(st.sampled_from([d for d in (2, 8, 12) if d < n]))
    rewire = draw(st.floats(0, 0.05 if degree == 2 else 1))
    return SmallWorld(n, degree, rewire, dynamic, seed), None


@settings(deadline=None)  # redrawing until connected takes as long as it takes
@given(random_topologies(), rounds)
def test_random_topologies(drawn: tuple[Topology, int | None], round: int) -> None:
    topology, degree = drawn
    graph = topology.at(round)
    check(graph, symmetric=True)
    if degree is not None:
        assert {len(row) for row in graph.recipients} == {degree}
    if isinstance(topology, SmallWorld) or (isinstance(topology, Regular) and not topology.dynamic):
        assert nx.is_connected(nx.Graph(graph.edges))


@given(sizes)
def test_ring(n: int) -> None:
    check(Ring(n).at(0), symmetric=True)
    assert {len(row) for row in Ring(n).at(0).recipients} == {min(n - 1, 2)}


@given(st.integers(2, 8), st.integers(2, 8))
def test_torus(rows: int, columns: int) -> None:
    graph = Torus(rows * columns, rows=rows).at(0)
    check(graph, symmetric=True)
    assert {len(row) for row in graph.recipients} == {min(rows - 1, 2) + min(columns - 1, 2)}


@given(st.integers(2, 70), rounds)
def test_one_peer_exponential(n: int, round: int) -> None:
    graph = OnePeerExponential(n).at(round)
    check(graph, symmetric=False)
    assert all(len(row) == 1 for row in graph.recipients)
    assert all(list(weights.values()) == [0.5] for weights in graph.senders)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("n", range(1, 65))
def test_finite_time_graphs_average_exactly(n: int, degree: int) -> None:
    topology = FiniteTime(n, degree)
    product = np.eye(n)
    for r in range(topology.period):
        graph = topology.at(r)
        check(graph, symmetric=True)
        assert all(len(row) <= degree for row in graph.recipients)
        product = graph.matrix() @ product
    np.testing.assert_allclose(product, np.full((n, n), 1 / n), atol=1e-12)
    assert topology.at(topology.period) == topology.at(0)
    most = 2 * np.emath.logn(degree + 1, n) + 2  # theorem 1 of the paper
    assert topology.period <= max(most, 1)


@pytest.mark.parametrize(("n", "degree", "rounds"), [(8, 1, 3), (16, 3, 2), (9, 2, 2), (12, 2, 3), (5, 4, 1)])
def test_finite_time_takes_as_few_rounds_as_factors(n: int, degree: int, rounds: int) -> None:
    assert FiniteTime(n, degree).period == rounds
