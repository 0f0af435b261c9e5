"""Module of a worker, whose tensors can become views of any row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from jwins.training.layout import Layout


@dataclass(frozen=True, slots=True)
class _ModuleSlot:
    """All places of one tensor in a module; a tied tensor has several."""

    owners: tuple[tuple[dict[str, Any], str], ...]

    def put(self, tensor: Tensor) -> None:
        for table, key in self.owners:
            table[key] = tensor

    def get(self) -> Tensor:
        table, key = self.owners[0]
        found: Tensor = table[key]
        return found


def _module_slots(model: nn.Module) -> dict[str, _ModuleSlot]:
    by_tensor: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    by_tensor.setdefault(id(tensor), []).append((table, key))
    return {
        name: _ModuleSlot(tuple(by_tensor[id(tensor)]))
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
    }


class WorkerModule:
    """Module of one worker. Its tensors can become views of any row; frozen parameters do not change.

    Attributes:
        trained: trained parameters, each with its place in a row.
        shared: places in a row of the shared buffers.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model = model
        parameters = dict(model.named_parameters())
        self.trained = [(parameters[s.name], s) for s in layout.slots if s.kind == "parameter"]
        self._module_slots = _module_slots(model)
        self.shared = [slot for slot in layout.slots if slot.kind == "buffer"]

    def bind(self, row: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Make the module's tensors views of ``row`` (P,), and ``buffers`` its local buffers."""
        for parameter, slot in self.trained:
            parameter.data = row[slot.offset : slot.offset + slot.size].view(slot.shape)
        for name, tensor in self._buffers_of(row, buffers):
            self._module_slots[name].put(tensor)

    def collect(self, row: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Copy back buffers that the model replaced instead of changing them in place."""
        for name, tensor in self._buffers_of(row, buffers):
            found = self._module_slots[name].get()
            if found is not tensor:
                tensor.copy_(found.detach())

    @contextmanager
    def swapped(self, names: Sequence[str], tensors: Sequence[Tensor]) -> Iterator[None]:
        """Within the block, give the module other tensors, such as vmap's; faster than ``functional_call``."""
        own = [self._module_slots[name].get() for name in names]
        for name, tensor in zip(names, tensors, strict=True):
            self._module_slots[name].put(tensor)
        try:
            yield
        finally:
            for name, tensor in zip(names, own, strict=True):
                self._module_slots[name].put(tensor)

    def get(self, name: str) -> Tensor:
        """Return the module's current tensor of this name."""
        return self._module_slots[name].get()

    def _buffers_of(self, row: Tensor, buffers: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for slot in self.shared:
            yield slot.name, row[slot.offset : slot.offset + slot.size].view(slot.shape)
        yield from buffers.items()
