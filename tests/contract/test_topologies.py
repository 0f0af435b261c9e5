"""Contract of every topology, from one table, and promises of single ones."""

from __future__ import annotations

import os
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from jwins.errors import ConfigError, UsageError
from jwins.experiment import Experiment
from jwins.topology import TOPOLOGIES, Graph, Regular, Topology, Torus
from jwins.topology.graph import CheckedTopology
from jwins.topology.participation import Participation

EDGES = (
    "# a ring of twelve, with a chord\n" + "".join(f"{i} {(i + 1) % 12}\n" for i in range(12)) + "\n0, 6\n6 0\n"
)

# kind -> options; undirected; connected in every round; the same graph in every round. All with 12 nodes.
TABLE = {
    "ring": ({}, True, True, True),
    "fully_connected": ({}, True, True, True),
    "star": ({}, True, True, True),
    "torus": ({"rows": 3}, True, True, True),
    "regular": ({"degree": 3}, True, True, True),
    "regular, dynamic": ({"degree": 3, "dynamic": True}, True, False, False),
    "regular, dynamic matchings": ({"degree": 1, "dynamic": True}, True, False, False),
    "small_world": ({"degree": 4, "rewire": 0.5}, True, True, True),
    "small_world, dynamic": ({"degree": 4, "rewire": 0.5, "dynamic": True}, True, True, False),
    "erdos_renyi": ({"p": 0.3}, True, True, True),
    "erdos_renyi, dynamic": ({"p": 0.3, "dynamic": True}, True, True, False),
    "one_peer_exponential": ({}, False, False, False),
    "finite_time": ({}, True, False, False),
    "finite_time, degree 3": ({"degree": 3}, True, False, False),
    "edge_list": ({"path": "edges.txt"}, True, True, True),
}


def make_topology(
    kind: str, options: dict[str, Any], *, num_nodes: int, seed: int, folder: Path = Path()
) -> Topology:
    """Make a topology; a relative path starts in ``folder``."""
    place = {key: folder / value for key, value in options.items() if key == "path"}
    return TOPOLOGIES[kind](num_nodes=num_nodes, seed=seed, **options | place)


def build(row: str, folder: Path, seed: int = 1) -> Topology:
    (folder / "edges.txt").write_text(EDGES)
    return make_topology(row.split(",")[0], TABLE[row][0], num_nodes=12, seed=seed, folder=folder)


def networkx_of(graph: Graph) -> nx.DiGraph:
    found = nx.DiGraph()
    found.add_nodes_from(range(graph.num_nodes))
    found.add_edges_from(graph.edges)
    return found


def test_table_has_every_kind() -> None:
    assert {row.split(",")[0] for row in TABLE} == set(TOPOLOGIES)


@pytest.mark.parametrize("row", TABLE)
class TestEveryTopology:
    def test_mixing_matrix_is_doubly_stochastic(self, row: str, tmp_path: Path) -> None:
        topology = build(row, tmp_path)
        for r in range(6):
            W = topology.at(r).matrix()
            assert W.shape == (12, 12)
            assert (W >= 0).all()
            assert (np.diag(W) > 0).all()
            np.testing.assert_allclose(W.sum(axis=0), 1, atol=1e-12)
            np.testing.assert_allclose(W.sum(axis=1), 1, atol=1e-12)
            if TABLE[row][1]:
                np.testing.assert_array_equal(np.tril(W, -1), np.triu(W, 1).T)

    def test_senders_and_recipients_agree(self, row: str, tmp_path: Path) -> None:
        for r in range(3):
            graph = build(row, tmp_path).at(r)
            received = sorted((j, i) for i, weights in enumerate(graph.senders) for j in weights)
            assert graph.edges == tuple(received)
            assert all(list(weights) == sorted(weights) for weights in graph.senders)
            assert all(list(receivers) == sorted(receivers) for receivers in graph.recipients)
            assert all(i != j for i, j in graph.edges)

    def test_connected_where_promised(self, row: str, tmp_path: Path) -> None:
        if TABLE[row][2]:
            for r in range(6):
                assert nx.is_strongly_connected(networkx_of(build(row, tmp_path).at(r)))

    def test_static_or_drawn_anew(self, row: str, tmp_path: Path) -> None:
        topology = build(row, tmp_path)
        assert (len({topology.at(r).edges for r in range(6)}) == 1) == TABLE[row][3]

    def test_deterministic_and_picklable(self, row: str, tmp_path: Path) -> None:
        topology = build(row, tmp_path)
        later_first = [topology.at(r) for r in (40, 3, 0)][::-1]
        copy = pickle.loads(pickle.dumps(topology))
        (tmp_path / "edges.txt").unlink()  # what a copy in another process cannot see
        assert copy == topology
        assert hash(copy) == hash(topology)
        assert [copy.at(r) for r in (0, 3, 40)] == later_first
        assert pickle.loads(pickle.dumps(later_first[0])) == later_first[0]
        assert repr(topology)

    def test_seed_matters_where_it_draws(self, row: str, tmp_path: Path) -> None:
        draws = row.split(",")[0] in ("regular", "small_world", "erdos_renyi")
        same = build(row, tmp_path, seed=1).at(0) == build(row, tmp_path, seed=2).at(0)
        assert same != draws

    def test_rounds_count_from_zero(self, row: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="round = -1"):
            build(row, tmp_path).at(-1)


def test_metropolis_hastings_weights() -> None:
    path = Graph.metropolis_hastings(4, [(1, 0), (1, 2), (3, 2), (0, 1)])
    assert path.senders[0] == {1: 1 / 3}
    assert path.senders[1] == {0: 1 / 3, 2: 1 / 3}
    assert path.recipients == ((1,), (0, 2), (1, 3), (2,))
    for edge in [(0, 0), (0, 4), (-1, 2)]:
        with pytest.raises(UsageError, match="two different nodes of 0 to 3"):
            Graph.metropolis_hastings(4, [edge])


@pytest.mark.parametrize("num_nodes", [2, 4, 16, 64])
def test_one_peer_exponential_averages_exactly_over_a_period(num_nodes: int) -> None:
    topology = make_topology("one_peer_exponential", {}, num_nodes=num_nodes, seed=0)
    product = np.eye(num_nodes)
    for r in range(num_nodes.bit_length() - 1):
        product = topology.at(r).matrix() @ product
    np.testing.assert_allclose(product, 1 / num_nodes, atol=1e-15)


def test_torus_is_as_square_as_can_be() -> None:
    assert Torus(12).at(0) == Torus(12, rows=3).at(0)
    assert {len(row) for row in Torus(30).at(0).recipients} == {4}
    assert {len(row) for row in Torus(10).at(0).recipients} == {3}  # 2 x 5: up and down are one edge


def test_small_graphs() -> None:
    for kind in ("ring", "fully_connected", "star", "erdos_renyi"):
        assert make_topology(kind, {}, num_nodes=1, seed=0).at(0).edges == ()
        assert make_topology(kind, {}, num_nodes=2, seed=0).at(0).edges == ((0, 1), (1, 0))
    assert Regular(2, degree=1).at(0).edges == ((0, 1), (1, 0))


@pytest.mark.parametrize(
    ("kind", "num_nodes", "options", "path", "remedy"),
    [
        ("ring", 0, {}, "nodes.count", "at least 1"),
        ("regular", 8, {"degree": 8}, "topology.degree", "at most 7 neighbours"),
        ("regular", 8, {"degree": 0}, "topology.degree", "at least 1"),
        ("regular", 7, {"degree": 3}, "topology.degree", "7 x 3 is odd"),
        ("regular", 8, {"degree": 1}, "topology.degree", "use 2 or more, or dynamic = true"),
        ("small_world", 8, {"degree": 3}, "topology.degree", "even"),
        ("small_world", 8, {"degree": 8}, "topology.degree", "at most 7"),
        ("small_world", 8, {"rewire": 1.5}, "topology.rewire", r"\[0, 1\]"),
        ("erdos_renyi", 8, {"p": 0.0}, "topology.p", r"\(0, 1\]"),
        ("erdos_renyi", 100, {"p": 0.001}, "topology.p", r"more than ln\(N\) / N = 0.0461"),
        ("one_peer_exponential", 1, {}, "nodes.count", "at least 2"),
        ("torus", 12, {"rows": 5}, "topology.rows", r"\[2, 3, 4, 6\]"),
        ("torus", 13, {}, "topology.rows", "use ring"),
        ("edge_list", 8, {"path": "nowhere.txt"}, "topology.path", "cannot be read"),
    ],
)
def test_impossible_graphs_are_refused(
    kind: str, num_nodes: int, options: dict[str, object], path: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        make_topology(kind, options, num_nodes=num_nodes, seed=0)
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("table", "path", "remedy"),
    [
        ({"kind": "hexagon"}, "topology.kind", "kinds: ring, fully_connected"),
        ({"kind": "ring", "degree": 2}, "topology.degree", "this key is for kind"),
        ({"kind": "regular", "rewire": 0.1}, "topology.rewire", 'this key is for kind = "small_world"'),
        ({"kind": "edge_list"}, "topology.path", "required"),
    ],
)
def test_tables_of_no_topology_are_refused(table: dict[str, Any], path: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        Experiment(topology=table)  # type: ignore[arg-type]
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0 1\n1 2\nx 3\n", "edges.txt, line 3: expected two node numbers"),
        ("0 1 0.5\n", "edges.txt, line 1: expected two node numbers"),
        ("0 -1\n", "edges.txt, line 1: expected two node numbers"),
        ("0 1\n\n# rest\n2 4\n", "edges.txt, line 4: node 4 is not one of 0 to 3"),
        ("0 1\n2 2\n", "edges.txt, line 2: joins node 2 with itself"),
        ("0 1\n2 3\n", "node 0 and node 2 are not connected"),
        (
            "# nodes\n96\n0 1\n",
            "edges.txt, line 2: the file is of 96 nodes; write nodes.count = 96, or choose another file",
        ),
        ("4\n0 1\n4\n", "edges.txt, line 3: expected two node numbers"),
        ("4\n", "node 0 and node 1 are not connected"),
        ("", "node 0 and node 1 are not connected"),
    ],
)
def test_edge_list_errors_name_file_and_line(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "edges.txt").write_text(text)
    with pytest.raises(ConfigError) as caught:
        make_topology("edge_list", {"path": "edges.txt"}, num_nodes=4, seed=0, folder=tmp_path)
    assert problem in str(caught.value)
    assert str(tmp_path / "edges.txt") in str(caught.value)


@pytest.mark.parametrize("text", ["4\n0 1\n1 2\n2 3\n", "# a path\n\n 4  # nodes\n0,1\n1,2\n2,3"])
def test_edge_list_that_begins_with_the_number_of_nodes(text: str, tmp_path: Path) -> None:
    """As decentralizepy's graph files do."""
    (tmp_path / "edges.txt").write_text(text)
    graph = make_topology("edge_list", {"path": "edges.txt"}, num_nodes=4, seed=0, folder=tmp_path).at(0)
    assert graph.recipients == ((1,), (0, 2), (1, 3), (2,))


def test_edge_list_of_an_editor_that_marks_the_byte_order(tmp_path: Path) -> None:
    (tmp_path / "edges.txt").write_bytes(b"\xef\xbb\xbf0 1\r\n1 2\r\n2 3\r\n")
    graph = make_topology("edge_list", {"path": "edges.txt"}, num_nodes=4, seed=0, folder=tmp_path).at(0)
    assert graph.recipients == ((1,), (0, 2), (1, 3), (2,))


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_edge_list_that_never_ends(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no regular file"):
        make_topology("edge_list", {"path": name}, num_nodes=4, seed=0, folder=tmp_path)


def test_edge_list_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "edges.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a UTF-8 text file"):
        make_topology("edge_list", {"path": "edges.txt"}, num_nodes=4, seed=0, folder=tmp_path)


# --- Rounds in which some take part -------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row, promises in TABLE.items() if promises[1]])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_weights_of_those_who_take_part_are_doubly_stochastic(
    row: str, share: float, tmp_path: Path
) -> None:
    whole = build(row, tmp_path)
    some = Participation(whole, share, seed=3)
    assert some.num_nodes == 12
    drawn = [some.active(r) for r in range(8)]
    assert {len(active) for active in drawn} == {max(1, round(share * 12))}
    assert (len(set(drawn)) > 1) is (share < 1)
    for r, active in enumerate(drawn):
        W, all_of_it = some.at(r).matrix(), whole.at(r).matrix()
        np.testing.assert_allclose(W.sum(axis=0), 1, atol=1e-12)
        np.testing.assert_array_equal(W, W.T)
        for i in range(12):
            assert some.at(r).recipients[i] == tuple(some.at(r).senders[i])
            for j in range(12):
                if i != j:
                    assert W[i, j] == (all_of_it[i, j] if {i, j} <= active else 0.0)
    again = pickle.loads(pickle.dumps(some))
    assert again == some
    assert again.at(5) == some.at(5)
    assert [Participation(whole, share, seed=4).active(r) for r in range(8)] != drawn or share == 1


class Meeting:
    """A ring whose graphs are counted; where two threads ask for a graph, both wait for the other."""

    num_nodes = 4

    def __init__(self) -> None:
        self.graphs: list[weakref.ref[Graph]] = []
        self.both: threading.Barrier | None = None

    def at(self, round: int) -> Graph:
        if self.both is not None:
            self.both.wait(timeout=30)
        graph = Graph.metropolis_hastings(4, [(0, 1), (1, 2), (2, 3), (3, 0)])
        self.graphs.append(weakref.ref(graph))
        return graph


def test_graphs_of_a_topology_of_ones_own_are_kept_for_a_few_rounds() -> None:
    own = Meeting()
    topology = CheckedTopology(own, rounds=8)
    for at in range(15):
        topology.at(at)
    own.both = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(topology.at, (15, 16)))
    own.both = None
    for at in range(17, 100):
        topology.at(at)
        assert topology.at(at) is topology.at(at)
    assert sum(graph() is not None for graph in own.graphs) <= 17
