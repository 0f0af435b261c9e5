"""Threshold of Python's search for reference cycles while many nodes run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OBJECTS_PER_NODE = 10
"""New objects per node before Python searches for cycles. Between share and merge, a node has about thirty
objects that no collection frees. Python's default is 700 new objects in all: with thousands of nodes, it would
examine each object several times in vain."""


@contextmanager
def raised_gc_threshold(num_nodes: int) -> Iterator[None]:
    """Within the block, collect reference cycles less often, in proportion to the number of nodes.

    Objects of the package have no cycles. Cycles in a task's own model are found later, but only with many
    nodes, whose models are small. The setting applies to the process. A setting that collects less often, or
    never, is not changed.
    """
    before = gc.get_threshold()
    if before[0] > 0:
        gc.set_threshold(max(before[0], _OBJECTS_PER_NODE * num_nodes), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
