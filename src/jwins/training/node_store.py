"""Storage of a process's nodes: one row of parameters, local buffers and optimizer state for each node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jwins.errors import UsageError
from jwins.training.layout import Layout
from jwins.training.optimizer import Optimizer, OptimizerState

_ALIGN = 16
# Rows start at multiples of 64 bytes, as torch's own tensors do: kernels may round differently elsewhere, and
# a node must get the same bits whether it is the only one of its process or one of many.


@dataclass(frozen=True, slots=True, eq=False)
class LocalState:
    """State of a node's training between rounds, besides its parameters.

    Attributes:
        moments: moments of the optimizer by torch's names, or of the quasi-global momentum, (P,) each.
        counters: counters of the optimizer, one number for each parameter tensor, or of the quasi-global
            momentum.
        buffers: local buffers, by name.
    """

    moments: Mapping[str, Tensor]
    counters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


def aligned_rows(initial: Tensor, rows: int) -> Tensor:
    """Return ``initial`` (P,) in each of ``rows`` aligned rows, (rows, P)."""
    size = len(initial)
    stride = -(-size // _ALIGN) * _ALIGN
    matrix = torch.zeros(rows, stride, device=initial.device)[:, :size]
    return matrix.copy_(initial)


class NodeStore:
    """The nodes of a process as rows, in the order of their numbers.

    Args:
        nodes: numbers of the nodes, increasing.
        rows: number of rows, at least one per node; the others are padding.
        initial: (P,) float32, the common start.
        buffers: local buffers at the start, by name.
    """

    def __init__(
        self,
        nodes: Sequence[int],
        rows: int,
        layout: Layout,
        initial: Tensor,
        buffers: Mapping[str, Tensor],
        optimizer: Optimizer,
    ) -> None:
        self.nodes = tuple(nodes)
        self._row = {node: row for row, node in enumerate(self.nodes)}
        self._size = layout.size
        self.rows = aligned_rows(initial, rows)
        self.buffers = {name: buffers[name].expand(rows, *buffers[name].shape).clone() for name in layout.local}
        tensors = sum(slot.kind == "parameter" for slot in layout.slots)
        self.optimizer = OptimizerState(optimizer, rows, self.rows.stride(0), tensors, initial.device)

    def row(self, node: int) -> int:
        """Return the index of a node's row.

        Raises:
            UsageError: the node is not here.
        """
        found = self._row.get(node)
        if found is None:
            raise UsageError(f"node {node} is not among the {len(self.nodes)} nodes held here")
        return found

    def buffers_of(self, node: int) -> dict[str, Tensor]:
        """Return a node's local buffers, without copying."""
        row = self.row(node)
        return {name: tensor[row] for name, tensor in self.buffers.items()}

    def state(self, node: int) -> LocalState:
        """Return a copy of a node's local state."""
        own = self._views(node)
        return LocalState(*({name: tensor.clone() for name, tensor in group.items()} for group in own))

    def load_state_(self, node: int, state: LocalState) -> None:
        """Set a node's local state to a result of :meth:`state`, from here or from another process.

        Raises:
            UsageError: names or shapes differ; nothing has been changed then.
        """
        pairs = []
        for group, tensors in zip(("moments", "counters", "buffers"), self._views(node), strict=True):
            given = getattr(state, group)
            if set(given) != set(tensors):
                raise UsageError(f"local state of node {node}, {group}: {sorted(given)}, not {sorted(tensors)}")
            for name, tensor in tensors.items():
                if given[name].shape != tensor.shape or given[name].dtype != tensor.dtype:
                    raise UsageError(
                        f"local state of node {node}, {group}.{name}: {tuple(given[name].shape)} "
                        f"{given[name].dtype}, not {tuple(tensor.shape)} {tensor.dtype}"
                    )
                pairs.append((tensor, given[name]))
        for tensor, source in pairs:
            tensor.copy_(source)

    def _views(self, node: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return moments, counters and buffers of a node, in the order of :class:`LocalState`."""
        row = self.row(node)
        return (
            {name: tensor[row, : self._size] for name, tensor in self.optimizer.all_moments().items()},
            {name: tensor[row] for name, tensor in self.optimizer.all_counters().items()},
            self.buffers_of(node),
        )


def mean_buffers(every: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return floating-point buffers averaged over the nodes, and the first node's integer buffers."""
    return {
        name: torch.stack([buffers[name] for buffers in every]).mean(dim=0)
        if first.is_floating_point()
        else first.clone()
        for name, first in every[0].items()
    }
