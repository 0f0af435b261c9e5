"""A model as one flat float32 vector, and back.

Nodes exchange and merge vectors of P numbers, but they train modules. :class:`Layout` maps the numbers of the
vector to the tensors of the module. Parameters that are not trained, because ``requires_grad`` is False, are
not in the vector: they keep their initial values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from jwins.errors import ConfigError, UsageError

BufferPolicy = Literal["local", "shared"]
"""``local``: buffers stay on their node. ``shared``: float buffers are part of the vector."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Place of one of the model's tensors in the vector.

    Attributes:
        name: as in ``model.named_parameters()`` or ``model.named_buffers()``.
        offset: position of its first number in the vector.
        kind: ``parameter``, or ``buffer`` for a shared one.
        nonnegative: whether it is a variance, which must not fall below 0 in a merge.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int
    kind: Literal["parameter", "buffer"]
    nonnegative: bool


@dataclass(frozen=True)
class Layout:
    """The order of a model's tensors in its flat vector.

    Attributes:
        slots: the trained parameters, in the order of ``model.named_parameters()``, then the shared buffers.
        local: names of the buffers that stay on their node. Integer buffers always do, and so do buffers
            that the model does not save (``persistent=False``): those are constants.
        size: P, the length of the vector.
        tied: for each parameter or saved buffer with several names, pairs of another name and its name in
            ``slots``, ``local`` or ``frozen``.
        transient: names of the buffers in ``local`` that the model does not save.
        frozen: names of the parameters with ``requires_grad`` False, which are not in the vector.

    >>> layout = Layout.of(nn.Linear(3, 2))
    >>> [(slot.name, slot.shape, slot.offset) for slot in layout.slots], layout.size
    ([('weight', (2, 3), 0), ('bias', (2,), 6)], 8)
    """

    slots: tuple[Slot, ...]
    local: tuple[str, ...]
    size: int
    tied: tuple[tuple[str, str], ...] = ()
    transient: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @staticmethod
    def of(model: nn.Module, buffers: BufferPolicy = "local", *, convert: bool = False) -> Layout:
        """Return the layout of a model.

        Args:
            model: a model with at least one trained parameter; trained parameters are float32. A parameter or
                buffer held under several names counts once.
            buffers: ``local`` or ``shared``; see :data:`BufferPolicy`.
            convert: whether other floating-point types are accepted, too: :meth:`flatten` converts them to
                float32, and :meth:`write` rounds to the nearest number of their own type.

        Raises:
            UsageError: no parameters, none that trains, a lazy one, a tensor that cannot be part of a float32
                vector, or two that share memory and are not the same, unless neither can change.
            ConfigError: an unknown policy.
        """
        if buffers not in ("local", "shared"):
            raise ConfigError("train.buffers", buffers, "expected local or shared")
        slots: list[Slot] = []
        offset = 0
        first_name: dict[int, str] = {}
        tied, frozen = [], []
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if nn.parameter.is_lazy(parameter):
                raise UsageError(f"parameter {name!r} has no shape yet: run one batch through the model first")
            if id(parameter) in first_name:
                tied.append((name, first_name[id(parameter)]))
                continue
            first_name[id(parameter)] = name
            if not parameter.requires_grad:
                frozen.append(name)
                continue
            _check_type("parameter", name, parameter, convert)
            slots.append(Slot(name, tuple(parameter.shape), offset, parameter.numel(), "parameter", False))
            offset += parameter.numel()
        if offset == 0 and frozen:
            raise UsageError(
                f"{type(model).__name__} has no parameter with requires_grad: there is nothing to train"
            )
        if offset == 0:
            raise UsageError(f"{type(model).__name__} has no parameters: there is nothing to train and share")

        variances = _variance_names(model)
        saved = set(model.state_dict(keep_vars=True))
        local = []
        for name, buffer in model.named_buffers(remove_duplicate=False):
            if (first := first_name.setdefault(id(buffer), name)) != name:
                if name in saved:
                    tied.append((name, first))
            elif buffers == "shared" and buffer.is_floating_point() and name in saved:
                _check_type("buffer", name, buffer, convert)
                slots.append(
                    Slot(name, tuple(buffer.shape), offset, buffer.numel(), "buffer", name in variances)
                )
                offset += buffer.numel()
            else:
                local.append(name)
        transient = tuple(name for name in local if name not in saved)
        _check_storage(model, {slot.name for slot in slots}, transient)
        return Layout(tuple(slots), tuple(local), offset, tuple(tied), transient, tuple(frozen))

    def flatten(self, model: nn.Module) -> Tensor:
        """Copy the model's numbers into one vector, (P,) float32."""
        tensors = self._tensors_of(model)
        with torch.no_grad():
            return torch.cat([tensors[slot.name].detach().reshape(-1).to(torch.float32) for slot in self.slots])

    def write(self, vector: Tensor, model: nn.Module) -> None:
        """Copy a vector into the model's tensors, in place.

        Args:
            vector: (P,) float32.
            model: a model of this layout.

        Raises:
            UsageError: a vector of another length.
        """
        self._check(vector)
        tensors = self._tensors_of(model)
        with torch.no_grad():
            for slot in self.slots:
                piece = vector[slot.offset : slot.offset + slot.size]
                tensors[slot.name].copy_(piece.view(slot.shape))

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return views of the tensors in a vector, or in each row of a stack of vectors.

        Returns:
            A view (..., *shape) for each slot, by name.

        Raises:
            UsageError: the last dimension is not P.

        >>> layout = Layout.of(nn.Linear(3, 2))
        >>> {name: tuple(view.shape) for name, view in layout.views(torch.zeros(5, 8)).items()}
        {'weight': (5, 2, 3), 'bias': (5, 2)}
        """
        self._check(vector)
        lead = vector.shape[:-1]
        return {
            slot.name: vector[..., slot.offset : slot.offset + slot.size].view((*lead, *slot.shape))
            for slot in self.slots
        }

    @property
    def has_variances(self) -> bool:
        """Return whether the vector has variances, which :meth:`project_` clamps."""
        return any(slot.nonnegative for slot in self.slots)

    def project_(self, vector: Tensor) -> Tensor:
        """Clamp shared variances at 0, in place. Call it after each merge.

        A merge in the wavelet domain replaces some coefficients of a variance and not others, so the sum
        can be negative although no node's variance is. NaN stays NaN.

        Args:
            vector: (..., P).

        Returns:
            The same tensor.
        """
        self._check(vector)
        for slot in self.slots:
            if slot.nonnegative:
                vector[..., slot.offset : slot.offset + slot.size].clamp_(min=0.0)
        return vector

    def state_dict(
        self, vector: Tensor, local: Mapping[str, Tensor], frozen: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return a state dict for ``model.load_state_dict``, of contiguous copies.

        Args:
            vector: (P,) float32.
            local: the node's local buffers by name; those that the model does not save are left out.
            frozen: the parameters that are not trained, by name; required if the layout has some.

        Returns:
            All saved tensors by name, on the CPU; tied parameters under each of their names.

        Raises:
            UsageError: a local buffer or a frozen parameter is missing.
        """
        missing = [name for name in self.local if name not in local and name not in self.transient]
        if missing:
            raise UsageError(f"Layout.state_dict: local buffers missing: {', '.join(missing)}")
        constant = {} if frozen is None else frozen
        missing = [name for name in self.frozen if name not in constant]
        if missing:
            raise UsageError(f"Layout.state_dict: frozen parameters missing: {', '.join(missing)}")
        found = self.views(vector.detach())
        found.update({name: constant[name].detach() for name in self.frozen})
        found.update({name: local[name].detach() for name in self.local if name in local})
        found.update({name: found[first] for name, first in self.tied})
        found = {name: tensor for name, tensor in found.items() if name not in self.transient}
        return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in found.items()}

    def _tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's tensors by name; raise UsageError if one is missing or has another shape."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for slot in self.slots:
            tensor = tensors.get(slot.name)
            if tensor is None or tensor.shape != slot.shape:
                found = "not there any more" if tensor is None else f"of shape {tuple(tensor.shape)} now"
                raise UsageError(
                    f"{slot.kind} {slot.name!r} is {found}: it had the shape {slot.shape} at the start; "
                    "change the structure of a model only before the start"
                )
        return tensors

    def _check(self, vector: Tensor) -> None:
        if vector.dim() == 0 or vector.shape[-1] != self.size:
            raise UsageError(
                f"Layout: got a vector of shape {tuple(vector.shape)}, expected (..., {self.size})"
            )


_VECTOR, _BUFFER, _CONSTANT, _FROZEN = 3, 2, 1, 0
"""Kinds of tensors: in the vector, a local buffer that is saved or not, a parameter that does not train. Two on
one memory are refused if their sum is 3 or more, because one of them may change."""


def _check_storage(model: nn.Module, in_vector: Collection[str], constants: Collection[str]) -> None:
    """Refuse tensors that share memory and may change: each would change alone, or only one would be saved.

    For the model, a tie by ``.data``, a transpose and a slice are several tensors. One tensor under several
    names counts once, and is allowed.
    """
    taken: list[tuple[int, int, int, int, str]] = []
    every: list[tuple[str, str, Tensor]] = [("parameter", *named) for named in model.named_parameters()]
    every += [("buffer", *named) for named in model.named_buffers()]
    for what, name, tensor in every:
        if isinstance(tensor, nn.UninitializedBuffer) or tensor.layout != torch.strided or not tensor.numel():
            continue
        if not (store := tensor.untyped_storage().data_ptr()):
            continue  # without memory, as on the meta device
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in strides)
        first = int(tensor.storage_offset()) * tensor.element_size()
        end = first + int(span) * tensor.element_size()
        local = _CONSTANT if name in constants else _BUFFER
        kind = _VECTOR if name in in_vector else _FROZEN if what == "parameter" else local
        if kind == _VECTOR and span < tensor.numel():
            problem = "several of its numbers share memory, as after expand(); clone it in model()"
            raise UsageError(f"{what} {name!r} of shape {tuple(tensor.shape)}: {problem}")
        taken.append((store, first, end, kind, f"{what} {name!r}"))
    reach: dict[tuple[int, int], tuple[int, str]] = {}
    for store, first, end, kind, name in sorted(taken):
        for of_others in range(_VECTOR - kind, _VECTOR + 1):
            other_end, other = reach.get((store, of_others), (0, ""))
            if first < other_end:
                raise UsageError(
                    f"{other} and {name} share memory and are not the same tensor; make them one under both "
                    "names (module.b = module.a), or clone one"
                )
        reach[store, kind] = max(reach.get((store, kind), (0, "")), (end, name))


def _variance_names(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.running_var" if prefix else "running_var"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
    }


def _check_type(what: str, name: str, tensor: Tensor, convert: bool) -> None:
    if tensor.dtype != torch.float32 and not (convert and tensor.is_floating_point()):
        found = str(tensor.dtype).removeprefix("torch.")
        raise UsageError(f"{what} {name!r} is {found}: expected float32; convert the model, e.g. with .float()")
