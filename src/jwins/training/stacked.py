"""Chunks of nodes that train as one stack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jwins.training.layout import Layout
from jwins.training.optimizer import Optimizer, optimizer_step

if TYPE_CHECKING:
    from jwins.training.trainer import Trainer

__all__ = ["Chunk", "MIN_STACK", "pieces_of", "values_of"]

MIN_STACK = 3


def values_of(layout: Layout, tensors: Mapping[str, Tensor], buffers: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of some rows in the order of a step's arguments.

    Buffers are contiguous: vmap works on copies of others, and what the model writes would be lost.
    """
    slots = [
        tensors[slot.name].contiguous() if slot.kind == "buffer" else tensors[slot.name]
        for slot in layout.slots
    ]
    return slots + list(buffers)


class Chunk:
    """A fixed range of rows as leaf tensors of one optimizer.

    Every computation runs over all rows, in the same layout whoever trains, so that no node's result
    depends on the others; rows that do not take part are put back afterwards.
    """

    def __init__(self, trainer: Trainer, number: int) -> None:
        part = slice(number * trainer._chunk, (number + 1) * trainer._chunk)
        rows = trainer._rows[part]
        self.size = trainer._chunk
        self.buffers = {name: tensor[part].data for name, tensor in trainer._buffers.items()}
        # .data gives each view a version counter of its own. Otherwise all chunks would count their changes
        # as those of the one matrix, and autograd of one thread would take another's for its own.
        self.tensors = {name: view.data for name, view in trainer.layout.views(rows).items()}
        self._layout = trainer.layout
        self._leaves = [self.tensors[name] for name in trainer._trained]
        self._optimizer = trainer._optimizer.build(self._leaves)
        self._moments = {
            name: tensor[part, : trainer.layout.size] for name, tensor in trainer._state.moments.items()
        }
        self._scalars = {name: tensor[part] for name, tensor in trainer._state.scalars.items()}
        views = {name: trainer.layout.views(tensor) for name, tensor in self._moments.items()}
        self._kept = [{name: found[leaf] for name, found in views.items()} for leaf in trainer._trained]
        self._updated = [rows, *self._moments.values()]
        self._all = [*self._updated, *self._scalars.values(), *self.buffers.values()]

    @contextmanager
    def only(self, chosen: Sequence[int]) -> Iterator[None]:
        """Whatever happens inside, rows other than the chosen come out as they went in."""
        with self._putting_back(chosen, self._all):
            yield

    @contextmanager
    def _putting_back(self, chosen: Sequence[int], tensors: Sequence[Tensor]) -> Iterator[None]:
        others = sorted(set(range(self.size)) - set(chosen))
        if not others:
            yield
            return
        index = torch.tensor(others)
        saved = [tensor[index.to(tensor.device)] for tensor in tensors]
        try:
            yield
        finally:
            for tensor, values in zip(tensors, saved, strict=True):
                tensor[index.to(tensor.device)] = values

    def begin(self, afresh: Optimizer | None) -> None:
        """Prepare the steps of a round; ``afresh`` builds an optimizer that remembers nothing."""
        if afresh is not None:
            self._optimizer = afresh.build(self._leaves)
        self._forget_gradients()
        for leaf, moments in zip(self._leaves, self._kept, strict=True):
            if moments:
                self._optimizer.state[leaf] = dict(moments)

    def values(self) -> list[Tensor]:
        """All tensors of the rows, as a step takes them."""
        return values_of(self._layout, self.tensors, list(self.buffers.values()))

    def step(self, gradients: Mapping[str, Tensor | None], chosen: Sequence[int]) -> None:
        """One step of the optimizer.

        Its counters are the same for a whole stack, so nodes that have come less far, after a fault, take
        their step apart from the others.
        """
        for leaf, gradient in zip(self._leaves, gradients.values(), strict=True):
            leaf.grad = gradient
        if not self._scalars:
            self._optimizer.step()
        else:
            groups: dict[tuple[bytes, ...], list[int]] = {}
            for row in chosen:
                key = tuple(counters[row].numpy().tobytes() for counters in self._scalars.values())
                groups.setdefault(key, []).append(row)
            if len(groups) == 1:
                self._step_together(chosen)
            else:
                for group in groups.values():
                    with self._putting_back(group, self._updated):
                        self._step_together(group)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None

    def _step_together(self, group: Sequence[int]) -> None:
        first = False
        for name, counters in self._scalars.items():
            if name == "started":
                first = not bool(counters[group[0], 0])
                continue
            for j, leaf in enumerate(self._leaves):
                self._optimizer.state[leaf][name] = counters[group[0], j].clone()
        optimizer_step(self._optimizer, first)
        index = torch.tensor(group)
        for name, counters in self._scalars.items():
            if name == "started":
                counters[index] = 1
                continue
            after = torch.stack([self._optimizer.state[leaf][name] for leaf in self._leaves])
            counters[index] = after

    def collect(self, buffers: Mapping[str, Tensor]) -> None:
        """Bring home buffers that the model replaced instead of changing them in place."""
        for name, found in buffers.items():
            own = self.buffers[name] if name in self.buffers else self.tensors[name]
            if found.data_ptr() != own.data_ptr():
                own.copy_(found.detach())


def pieces_of(count: int, size: int) -> list[slice]:
    """Ranges of about ``size``, none of one or two."""
    pieces = -(-count // size)
    length = max(MIN_STACK, -(-count // pieces))
    starts = list(range(0, count, length))
    if len(starts) > 1 and count - starts[-1] < MIN_STACK:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]
