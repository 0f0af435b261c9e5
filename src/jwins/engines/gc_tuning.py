"""Threshold of Python's search for reference cycles while many nodes run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["raised_gc_threshold"]

_OBJECTS_PER_NODE = 10
"""A node has about thirty objects under way between its share and its merge, which no collection frees. Python
looks at the youngest 700; with thousands of nodes all of them are looked at several times in vain."""


@contextmanager
def raised_gc_threshold(num_nodes: int) -> Iterator[None]:
    """Within the block, let Python look for cycles less often, in proportion to the number of nodes.

    What the package makes has no cycles; those of a task's own model are found later, and only where there are
    many nodes, whose models are small. The setting is the process's; one that looks less often, or never, is
    left as it is.
    """
    before = gc.get_threshold()
    if before[0] > 0:
        gc.set_threshold(max(before[0], _OBJECTS_PER_NODE * num_nodes), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
