"""Base-(k+1) graphs: a sequence of graphs of low degree after which every node has the exact average.

Source: Y. Takezawa, R. Sato, H. Bao, K. Niwa, M. Yamada, "Beyond Exponential Graph: Communication-Efficient
Topologies for Decentralized Learning via Finite-time Convergence", NeurIPS 2023.

The steps of a set of n nodes, with b = k + 1:

- n is a product of factors of at most b: for each factor f, groups of f nodes average, one after the other.
- otherwise n is written in base b, n = a_1 b^p_1 + a_2 b^p_2 + ..., and the nodes are divided into sets of
  a_l b^p_l. Each set averages within itself. Then each set in turn, the largest first, exchanges with all later
  sets: a later node is joined to one node in each of the a_l pieces of b^p_l, so that the pieces have
  the right mean. The pieces spread it while the later sets continue.
- if n = p q, p a product of factors of at most b, p groups of q nodes may also do the above within each group
  and then average across the groups. The shorter sequence is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from jwins.errors import ConfigError
from jwins.topology.graph import Graph, check_nodes, check_round

Step = Mapping[tuple[int, int], float]
"""Undirected edges (lower node first) of one round and their weights."""


@dataclass(frozen=True)
class FiniteTime:
    """Base-(k+1) graphs; the module's docstring describes them. The sequence repeats after its end.

    Some nodes have fewer neighbours than ``degree`` in some rounds, or none.

    Args:
        num_nodes: N, at least 1.
        degree: k, the largest number of neighbours of a node in a round, at least 1.
        seed: not used; the graphs are fixed.

    >>> FiniteTime(6, degree=2).period, FiniteTime(6, degree=1).period
    (2, 4)
    """

    num_nodes: int
    degree: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_nodes(self.num_nodes)
        if self.degree < 1:
            raise ConfigError("topology.degree", self.degree, "expected at least 1 neighbour")

    @property
    def period(self) -> int:
        """Return the number of rounds of mixing after which all nodes have the average."""
        return len(_graphs(self.num_nodes, self.degree))

    def at(self, round: int) -> Graph:
        """Return the graph of ``round``; it repeats with the period."""
        check_round(round)
        graphs = _graphs(self.num_nodes, self.degree)
        return graphs[round % len(graphs)]


@lru_cache(maxsize=16)
def _graphs(num_nodes: int, degree: int) -> tuple[Graph, ...]:
    steps = _steps(range(num_nodes), degree + 1) or [{}]
    return tuple(_graph(num_nodes, step) for step in steps)


def _graph(num_nodes: int, step: Step) -> Graph:
    senders: list[dict[int, float]] = [{} for _ in range(num_nodes)]
    for (i, j), weight in sorted(step.items()):
        senders[i][j] = weight
        senders[j][i] = weight
    ordered = tuple(dict(sorted(row.items())) for row in senders)
    return Graph(num_nodes, ordered, tuple(tuple(row) for row in ordered))


def _steps(nodes: Sequence[int], base: int) -> list[Step]:
    """Return the shorter of both base-(k+1) sequences."""
    plain = _simple(nodes, base)
    groups = _smooth_part(len(nodes), base)
    size = len(nodes) // groups
    if groups == 1 or size == 1:
        return plain
    apart = _side_by_side([_simple(nodes[g * size : (g + 1) * size], base) for g in range(groups)])
    across = _side_by_side([_averaging(nodes[i::size], base) for i in range(size)])
    return min(plain, apart + across, key=len)


def _simple(nodes: Sequence[int], base: int) -> list[Step]:
    """Return the simple base-(k+1) sequence, by the digits of the number of nodes."""
    if _smooth_part(len(nodes), base) == len(nodes):
        return _averaging(nodes, base)
    groups, pieces, begin = [], [], 0
    for digit, size in _digits(len(nodes), base):
        group = nodes[begin : begin + digit * size]
        groups.append(group)
        pieces.append([group[a * size : (a + 1) * size] for a in range(digit)])
        begin += len(group)
    first = _side_by_side([_averaging(group, base) for group in groups])
    exchanges: list[list[Step]] = [[] for _ in groups]
    begin = 0
    for index, group in enumerate(groups[:-1]):
        later = nodes[begin + len(group) :]
        weight = len(pieces[index][0]) / (len(group) + len(later))
        exchange = {
            _edge(node, piece[place]): weight for place, node in enumerate(later) for piece in pieces[index]
        }
        spread = _side_by_side([_averaging(piece, base) for piece in pieces[index]])
        exchanges[index] = [*([{}] * index), exchange, *spread]
        begin += len(group)
    return first + _side_by_side(exchanges)


def _averaging(nodes: Sequence[int], base: int) -> list[Step]:
    """Return the hyper-hypercube sequence, for a number of nodes with factors of at most ``base``."""
    steps: list[Step] = []
    stride = 1
    for factor in _factors(len(nodes), base):
        step: dict[tuple[int, int], float] = {}
        for begin in range(len(nodes)):
            if begin // stride % factor == 0:
                group = [nodes[begin + a * stride] for a in range(factor)]
                step |= {_edge(i, j): 1.0 / factor for i in group for j in group if i != j}
        steps.append(step)
        stride *= factor
    return steps


def _side_by_side(sequences: Sequence[Sequence[Step]]) -> list[Step]:
    """Combine sequences into one; no two have edges of the same node in the same round."""
    length = max(map(len, sequences), default=0)
    return [
        {edge: weight for steps in sequences if r < len(steps) for edge, weight in steps[r].items()}
        for r in range(length)
    ]


def _edge(i: int, j: int) -> tuple[int, int]:
    return (i, j) if i < j else (j, i)


def _digits(number: int, base: int) -> list[tuple[int, int]]:
    """Return ``(digit, power)`` with ``number = sum(digit * power)``, the largest power first, without digits
    0.

    >>> _digits(11, 3)
    [(1, 9), (2, 1)]
    """
    found, power = [], 1
    while number:
        number, digit = divmod(number, base)
        if digit:
            found.append((digit, power))
        power *= base
    return found[::-1]


def _smooth_part(number: int, base: int) -> int:
    """Return the largest divisor without a prime factor above ``base``.

    >>> _smooth_part(84, 4)
    12
    """
    found = 1
    for prime in range(2, base + 1):  # a composite factor divides nothing at this point
        while number % prime == 0:
            number //= prime
            found *= prime
    return found


def _factors(number: int, base: int) -> tuple[int, ...]:
    """Return the fewest factors of at most ``base`` of ``number``, which has no larger prime factor.

    >>> _factors(12, 4), _factors(16, 4), _factors(1, 4)
    ((4, 3), (4, 4), ())
    """
    fewest: dict[int, tuple[int, ...]] = {1: ()}
    for divisor in (d for d in range(2, number + 1) if number % d == 0):
        ways = [
            (factor, *fewest[divisor // factor])
            for factor in range(min(base, divisor), 1, -1)
            if divisor % factor == 0 and divisor // factor in fewest
        ]
        if ways:
            fewest[divisor] = min(ways, key=len)
    return fewest[number]
