"""Fast training steps of models that are stacked with ``torch.func.vmap``.

With small models, the Python calls of a step take longer than its tensor operations. :func:`flatten_graph`
records the operations once, so that they can be repeated without the calls. :class:`StackedKernels` replaces
two functions during the recording. The results are the same up to rounding:

- ``linear`` of vmap leaves the gradient of the weight transposed in memory, which makes the
  optimizer slow. The replacement returns it in order.
- ``cross_entropy`` is decomposed by vmap into many small steps in Python; the replacement needs only a few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
_MIN_LARGE_NUMEL = 2**16
# from this size on, new memory from the operating system takes as long as the product written to it


def flatten_graph(function: Callable[..., Any], example: Sequence[Tensor]) -> torch.fx.GraphModule:
    """Record the tensor operations of a function, and return a function that repeats only these.

    The example fixes everything but the tensors: shapes, strides, the branches taken, and all numbers
    that are not in an argument. Draws from torch's global generator remain draws.

    Args:
        function: maps tensors to a tuple of tensors and Nones; it may compute gradients.
        example: arguments of one call, which may change them in place.

    Returns:
        A function of the same arguments, to be called under ``torch.no_grad()``. Large results are
        overwritten by the next call, so threads need copies of their own (``copy.deepcopy``).

    Raises:
        Exception: whatever the function or the recording of it raises.

    >>> f = flatten_graph(lambda x: (x.expand(2, 3) * 2,), [torch.ones(2, 3)])
    >>> f(torch.full((2, 3), 5.0))[0][0]
    tensor([10., 10., 10.])
    """
    module = make_fx(function)(*example)  # it imports torch._dynamo, for seconds, and only reads a setting
    for node in list(module.graph.nodes):
        if node.op == "call_function" and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    _keep_memory_of_products(module)
    module.recompile()
    return module


def _keep_memory_of_products(module: torch.fx.GraphModule) -> None:
    """Write large products among the results, such as gradients of weights, to the same memory at each call.

    Otherwise the allocator returns the memory to the operating system after each step and requests it again,
    which takes a third of the step's time.
    """
    graph = module.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    products = [node for node in output.all_input_nodes if node.target is aten.bmm.default]
    for i, node in enumerate(products):
        value = node.meta["val"]
        if value.numel() < _MIN_LARGE_NUMEL or set(node.users) != {output}:
            continue
        name = f"_product_{i}"
        module.register_buffer(name, torch.empty(value.shape, dtype=value.dtype, device=value.device))
        with graph.inserting_before(node):
            memory = graph.get_attr(name)
            written = graph.call_function(aten.bmm.out, node.args, {"out": memory})
        node.replace_all_uses_with(written)
        graph.erase_node(node)


def _changes_nothing(node: torch.fx.Node) -> bool:
    if node.target in (aten.detach.default, aten.alias.default):
        return True
    if node.target is aten.permute.default:
        return list(node.args[1]) == list(range(len(node.args[1])))  # type: ignore[arg-type]
    if node.target in (aten.view.default, aten._unsafe_view.default, aten.expand.default):
        source = node.args[0]
        return isinstance(source, torch.fx.Node) and source.meta["val"].shape == node.meta["val"].shape
    return False


class StackedKernels(TorchFunctionMode):
    """Context that replaces ``linear`` and ``cross_entropy`` on this thread, as the module's docstring
    describes.

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
    """Product ``x W^T`` of (..., B, in) and (..., out, in)."""

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
    if torch.is_autocast_enabled(input.device.type):  # as autocast does for functional.linear
        dtype = torch.get_autocast_dtype(input.device.type)
        return _linear_of(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return _linear_of(input, weight, bias)


def _linear_of(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    out = _Product.apply(flat, weight)  # type: ignore[no-untyped-call]
    if bias is not None:
        out = out + bias
    result: Tensor = out if input.dim() == 2 else out.reshape(*input.shape[:-1], weight.shape[0])
    return result


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
