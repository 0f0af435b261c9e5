"""Faster forms of two functions for models that are stacked with ``torch.func.vmap``.

The results are the same up to rounding. What changes is the cost of the gradient:

- ``linear`` as vmap takes it apart leaves the gradient of the weight transposed in memory, and autograd copies
  it before the optimizer may use it. Here it comes out in order: for small weights by multiplying from the
  other side, ``(W x^T)^T``, for large ones, where that product is slower, by a backward pass of its own.
- ``cross_entropy`` is taken apart by vmap in Python, step by step; the few steps it comes to are written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["StackedKernels"]

_LARGE_WEIGHT = 2**14
# numbers of a weight from which the faster product outweighs the calls of an own backward pass


class StackedKernels(TorchFunctionMode):
    """Within this context, and on this thread, the two functions are computed as above.

    >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    >>> with StackedKernels():
    ...     functional.linear(x, w)
    tensor([[11.]])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each of its functions."""
        if func is functional.linear:
            return _linear(*args, **(kwargs or {}))
        if func is functional.cross_entropy:
            return _cross_entropy(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
    """``x W^T`` of (..., B, in) and (..., out, in)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.matmul(x, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        for_x = torch.matmul(gradient, weight) if ctx.needs_input_grad[0] else None
        for_weight = torch.matmul(gradient.mT, x) if ctx.needs_input_grad[1] else None
        return for_x, for_weight

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], x: Tensor, weight: Tensor
    ) -> tuple[Tensor, int]:
        # Both with the stack in front: the backward pass above must give each row its own gradient.
        stacked = [
            tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
            if dim is None
            else tensor.movedim(dim, 0)
            for tensor, dim in zip((x, weight), in_dims, strict=True)
        ]
        return _Product.apply(*stacked), 0  # type: ignore[no-untyped-call]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() != 2 or input.dim() < 2:
        return functional.linear(input, weight, bias)
    flat = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    if weight.numel() < _LARGE_WEIGHT:
        out = torch.matmul(weight, flat.mT).mT
    else:
        out = _Product.apply(flat, weight)  # type: ignore[no-untyped-call]
    if bias is not None:
        out = out + bias
    return out if input.dim() == 2 else out.reshape(*input.shape[:-1], weight.shape[0])


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    usual = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    one_class_each = input.dim() >= 2 and target.dim() == input.dim() - 1 and target.dtype == torch.int64
    if not usual or not one_class_each or reduction not in ("mean", "sum", "none"):
        return functional.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    ignored = target == ignore_index
    likelihood = functional.log_softmax(input, dim=1)
    chosen = likelihood.gather(1, target.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    loss = -chosen.masked_fill(ignored, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / ignored.logical_not().sum()
