"""Assignment of nodes to node groups such that few frames go between groups.

Node groups are filled one after the other. Each begins with the first unit that is not placed; a unit
is a node, or a whole chunk of nodes that train in one stack. Then it takes the unit with the most edges to its
units, the first of equal ones, until it is full. This assignment is used if it cuts fewer edges than blocks of
consecutive nodes. Otherwise blocks are used, and also if the graph changes from round to round.

Results do not depend on the assignment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jwins.errors import ConfigError
from jwins.topology.graph import Graph, Topology


def node_blocks(topology: Topology, groups: int, chunk: int) -> list[list[int]]:
    """Return the nodes of each node group, increasing, by the module's rule.

    Raises:
        ConfigError: fewer chunks than node groups.
    """
    blocks = spread(topology.num_nodes, groups, chunk)
    first = topology.at(0)
    if groups == 1 or topology.at(1).recipients != first.recipients:
        return [list(block) for block in blocks]
    return neighbours_together(first, blocks, chunk)


def spread(num_nodes: int, groups: int, chunk: int) -> list[range]:
    """Divide nodes into blocks of consecutive numbers and whole chunks, as evenly as possible.

    Raises:
        ConfigError: fewer chunks than node groups.

    >>> spread(10, 3, 1)
    [range(0, 4), range(4, 7), range(7, 10)]
    >>> spread(10, 2, 4)
    [range(0, 8), range(8, 10)]
    """
    chunks = -(-num_nodes // chunk)
    if groups > chunks:
        stacked = f", in stacks of {chunk}; train.batching = 'loop' needs none" if chunk > 1 else ""
        raise ConfigError("actors", groups, f"expected at most {chunks} for {num_nodes} nodes{stacked}")
    each, more = divmod(chunks, groups)
    ends = [chunk * (each * (k + 1) + min(k + 1, more)) for k in range(groups)]
    return [range(a, min(b, num_nodes)) for a, b in zip([0, *ends], ends, strict=False)]


def neighbours_together(graph: Graph, blocks: Sequence[Sequence[int]], chunk: int) -> list[list[int]]:
    """Return groups of nearly the same sizes that cut fewer of the graph's edges, or the same blocks.

    Args:
        graph: the graph.
        blocks: consecutive nodes of each node group, in whole chunks but for the last.
        chunk: nodes that must be on one node group.

    Returns:
        The nodes of each node group, increasing.

    >>> ladder = Graph.metropolis_hastings(6, [(0, 3), (1, 4), (2, 5), (0, 1), (3, 4)])
    >>> neighbours_together(ladder, [range(0, 4), range(4, 6)], 1)
    [[0, 1, 3, 4], [2, 5]]
    """
    plain = [list(block) for block in blocks]
    grown = _grown(graph, [-(-len(block) // chunk) for block in blocks], chunk)
    return grown if cut_edges(graph, grown) < cut_edges(graph, plain) else plain


def cut_edges(graph: Graph, blocks: Sequence[Sequence[int]]) -> int:
    """Count the directed edges between nodes of different node groups."""
    group_of = {node: group for group, block in enumerate(blocks) for node in block}
    return sum(
        group_of[node] != group_of[receiver]
        for node, receivers in enumerate(graph.recipients)
        for receiver in receivers
    )


def _grown(graph: Graph, sizes: Sequence[int], chunk: int) -> list[list[int]]:
    num_nodes = len(graph.recipients)
    units = -(-num_nodes // chunk)
    between: list[dict[int, int]] = [{} for _ in range(units)]
    for node, receivers in enumerate(graph.recipients):
        for receiver in receivers:
            one, other = node // chunk, receiver // chunk
            if one != other:
                between[one][other] = between[one].get(other, 0) + 1
                between[other][one] = between[other].get(one, 0) + 1
    free, blocks = np.ones(units, dtype=bool), []
    for size in sizes:
        held: list[int] = []
        edges = np.zeros(units, dtype=np.int64)
        while len(held) < size:
            unit = int(np.where(free, edges, -1).argmax())  # the first of equal ones
            free[unit] = False
            held.append(unit)
            for other, count in between[unit].items():
                edges[other] += count
        blocks.append(
            sorted(n for unit in held for n in range(unit * chunk, min((unit + 1) * chunk, num_nodes)))
        )
    return blocks
