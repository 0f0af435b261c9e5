"""Blocks of nodes: whole, in whole chunks, and with neighbours together where that saves frames."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jwins.run.placement import cut_edges, neighbours_together, node_blocks, spread
from jwins.topology import Regular, Ring, Torus
from jwins.topology.graph import Graph


@settings(deadline=None, max_examples=60)
@given(st.integers(4, 60), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_blocks_hold_each_node_once_in_whole_chunks(num_nodes: int, groups: int, chunk: int, seed: int) -> None:
    groups = min(groups, -(-num_nodes // chunk))
    degree = 3 if num_nodes % 2 == 0 else 2
    graph = Regular(num_nodes=num_nodes, seed=seed, degree=degree).at(0)
    plain = spread(num_nodes, groups, chunk)
    placed = neighbours_together(graph, plain, chunk)
    assert sorted(node for block in placed for node in block) == list(range(num_nodes))
    assert all(block and block == sorted(block) for block in placed)
    for start in range(0, num_nodes, chunk):
        together = set(range(start, min(start + chunk, num_nodes)))
        assert sum(bool(together & set(block)) for block in placed) == 1
    counts = [-(-len(block) // chunk) for block in placed]
    assert counts == [-(-len(block) // chunk) for block in plain]
    assert cut_edges(graph, placed) <= cut_edges(graph, plain)
    assert placed == neighbours_together(graph, plain, chunk), "the same every time"


def test_neighbours_that_were_scattered_come_together() -> None:
    """Two cliques, one of the even and one of the odd nodes: no frame need go between two node groups."""
    n = 20
    edges = [(i, j) for i in range(n) for j in range(i + 2, n, 2)]
    graph = Graph.metropolis_hastings(n, edges)
    plain = spread(n, 2, 1)
    assert cut_edges(graph, plain) == 100
    placed = neighbours_together(graph, plain, 1)
    assert cut_edges(graph, placed) == 0
    assert placed == [list(range(0, n, 2)), list(range(1, n, 2))]


def test_a_good_order_stays() -> None:
    assert node_blocks(Ring(num_nodes=12, seed=1), 3, 1) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert node_blocks(Ring(num_nodes=5, seed=1), 1, 1) == [[0, 1, 2, 3, 4]]


def test_a_graph_that_is_drawn_anew_keeps_consecutive_blocks() -> None:
    topology = Regular(num_nodes=12, seed=1, degree=3, dynamic=True)
    assert node_blocks(topology, 2, 1) == [list(range(6)), list(range(6, 12))]


@pytest.mark.parametrize("groups", [2, 4])
def test_the_rule_saves_frames_in_random_graphs(groups: int) -> None:
    graph = Regular(num_nodes=200, seed=1, degree=4).at(0)
    plain = spread(200, groups, 1)
    assert cut_edges(graph, neighbours_together(graph, plain, 1)) < 0.8 * cut_edges(graph, plain)
    grid = Torus(num_nodes=64, seed=1)
    blocks = spread(64, groups, 1)
    assert cut_edges(grid.at(0), node_blocks(grid, groups, 1)) <= cut_edges(grid.at(0), blocks)
