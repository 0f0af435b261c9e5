"""The faster forms give what torch gives, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from jwins.training.flat_graph import StackedKernels, flatten_graph


def compare(function, *inputs):
    """Values and gradients of a stack of four, against one by one without the kernels."""
    stacked = [torch.stack([x * (i + 1) if x.is_floating_point() else x for i in range(4)]) for x in inputs]
    leaves = [x.requires_grad_() for x in stacked if x.is_floating_point()]
    with StackedKernels():
        values = torch.func.vmap(function)(*stacked)
    values.square().sum().backward()
    gradients = [x.grad for x in leaves]
    assert all(gradient.is_contiguous() for gradient in gradients[1:])
    for i in range(4):
        single = [x[i].detach().clone() for x in stacked]
        own = [x.requires_grad_() for x in single if x.is_floating_point()]
        value = function(*single)
        value.square().sum().backward()
        torch.testing.assert_close(values[i], value, atol=1e-5, rtol=1e-4)
        for gradient, x in zip(gradients, own, strict=True):
            torch.testing.assert_close(gradient[i], x.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3)])
@pytest.mark.parametrize("out", [4, 6000])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, out, bias):
    torch.manual_seed(0)
    x, w, b = torch.randn(*shape), torch.randn(out, 3) / 20, torch.randn(out) / 20
    if bias:
        compare(functional.linear, x, w, b)
    else:
        compare(functional.linear, x, w)


@pytest.mark.parametrize("out", [4, 6000])
def test_linear_of_an_input_that_all_rows_share(out):
    x, w = torch.randn(5, 3), torch.randn(4, out, 3)
    with StackedKernels():
        got = torch.func.vmap(lambda w: functional.linear(x, w))(w)
    torch.testing.assert_close(got, torch.stack([functional.linear(x, row) for row in w]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"ignore_index": 1},
        {"label_smoothing": 0.1},
        {"weight": torch.tensor([1.0, 2.0, 3.0])},
    ],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5)])
def test_cross_entropy(shape, options):
    torch.manual_seed(1)
    outputs, targets = torch.randn(*shape), torch.randint(3, (shape[0], *shape[2:]))
    targets.view(-1)[0] = options.get("ignore_index", -100)
    compare(lambda x, y: functional.cross_entropy(x, y, **options), outputs, targets)


def test_cross_entropy_of_probabilities_and_of_one_sample():
    outputs = torch.randn(5, 3)
    compare(functional.cross_entropy, outputs, outputs.detach().softmax(dim=1))
    compare(functional.cross_entropy, outputs[0], torch.tensor(1))


def test_an_unknown_reduction_is_torch_s_error():
    with StackedKernels(), pytest.raises(ValueError, match="not a valid value for reduction"):
        functional.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), reduction="median")


def test_flattened_repeats_operations_gradients_and_changes_in_place():
    def function(x, counter):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad((x.view(2, 3).permute(0, 1) ** 3).sum(), [x])
        counter.add_(1)
        return gradient, None

    counter = torch.zeros(())
    flat = flatten_graph(function, [torch.ones(2, 3), counter])
    assert int(counter) == 1
    x = torch.arange(6.0).view(2, 3)
    with torch.no_grad():
        gradient, nothing = flat(x, counter)
    assert nothing is None
    assert int(counter) == 2
    torch.testing.assert_close(gradient, 3 * x**2)
    assert "permute" not in flat.code
    assert "view" not in flat.code
