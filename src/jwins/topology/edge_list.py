"""A graph from a text file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import networkx as nx

from jwins.errors import ConfigError
from jwins.topology.graph import Undirected, check_nodes


@dataclass(frozen=True)
class EdgeList(Undirected):
    """The connected graph that a text file lists: two node numbers per line.

    Node numbers start at 0 and are separated by blanks, a comma or both. ``#`` starts a comment. An edge
    that is listed twice, in either direction, counts once. The first line may hold only the number of nodes, as
    in files of decentralizepy. The file is read when the object is built.

    Args:
        num_nodes: N.
        path: the file.
        seed: not used; the graph is fixed.

    Raises:
        ConfigError: the file is missing or has another number of nodes, a line is not an edge (the message
            names file and line), or the graph is not connected.
    """

    num_nodes: int
    path: Path
    seed: int = 0
    _listed: tuple[tuple[int, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_nodes(self.num_nodes)
        edges = _read_edges(Path(self.path), self.num_nodes)
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "_listed", edges)
        unreached = _first_unreached(self.num_nodes, edges)
        if unreached is not None:
            raise ConfigError(
                "topology.path",
                str(self.path),
                f"node 0 and node {unreached} are not connected, so their models would never mix; "
                f"add edges, or lower nodes.count to the nodes of the file",
            )

    def _edges(self, round: int) -> Iterable[tuple[int, int]]:
        return self._listed


def _read_edges(path: Path, num_nodes: int) -> tuple[tuple[int, int], ...]:
    def wrong(line: int, problem: str) -> ConfigError:
        return ConfigError("topology.path", str(path), f"{path.name}, line {line}: {problem}")

    try:
        if path.exists() and not path.is_file():  # a pipe would never end, nor a device
            raise ConfigError("topology.path", str(path), "is no regular file; expected a text file")
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except OSError as error:
        problem = (
            f"cannot be read ({error.strerror or error}); expected a text file with two node numbers per line"
        )
        raise ConfigError("topology.path", str(path), problem) from error
    except UnicodeDecodeError as error:
        raise ConfigError("topology.path", str(path), "is not a UTF-8 text file") from error
    edges = []
    lines = [(number, line.split("#", 1)[0].strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(number, content) for number, content in lines if content]
    if lines and re.fullmatch(r"\d{1,9}", lines[0][1], flags=re.ASCII):
        number, content = lines.pop(0)
        if int(content) != num_nodes:
            raise wrong(
                number,
                f"the file is of {int(content)} nodes; write nodes.count = {int(content)}, or choose "
                f"another file",
            )
    for number, content in lines:
        pair = re.fullmatch(r"(\d{1,9})(?:\s*,\s*|\s+)(\d{1,9})", content, flags=re.ASCII)
        if pair is None:
            raise wrong(number, f"expected two node numbers such as '0 5', found {content[:40]!r}")
        i, j = int(pair[1]), int(pair[2])
        if max(i, j) >= num_nodes:
            raise wrong(
                number, f"node {max(i, j)} is not one of 0 to {num_nodes - 1}; nodes.count is {num_nodes}"
            )
        if i == j:
            raise wrong(number, f"joins node {i} with itself; every node keeps its own model anyway")
        edges.append((i, j))
    return tuple(edges)


def _first_unreached(num_nodes: int, edges: Iterable[tuple[int, int]]) -> int | None:
    graph = nx.Graph(edges)
    graph.add_nodes_from(range(num_nodes))
    reached = nx.node_connected_component(graph, 0)
    return next((i for i in range(num_nodes) if i not in reached), None)
