"""A model and its vector hold the same numbers, and buffers follow their policy."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from jwins.errors import ConfigError, UsageError
from jwins.training.layout import Layout


def normed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model(torch.randn(8, 4))
    return model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.decoder(self.encoder(x)) * self.scale


def test_local_policy_keeps_every_buffer_out_of_the_vector():
    layout = Layout.of(normed())
    assert layout.size == 4 * 3 + 3 + 3 + 3 + 3 * 2 + 2
    assert layout.local == ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert all(slot.kind == "parameter" for slot in layout.slots)


def test_shared_policy_puts_float_buffers_behind_the_parameters():
    model = normed()
    layout = Layout.of(model, "shared")
    assert layout.local == ("1.num_batches_tracked",)
    assert [(s.name, s.kind, s.nonnegative) for s in layout.slots[-2:]] == [
        ("1.running_mean", "buffer", False),
        ("1.running_var", "buffer", True),
    ]
    vector = layout.flatten(model)
    assert torch.equal(vector[-3:], model[1].running_var)


def test_merged_variances_do_not_fall_below_zero():
    layout = Layout.of(normed(), "shared")
    matrix = torch.full((2, layout.size), -1.0)
    matrix[0, -1] = torch.nan
    assert layout.project_(matrix) is matrix
    assert torch.equal(matrix[:, -3:-1], torch.zeros(2, 2))
    assert torch.isnan(matrix[0, -1])  # divergence is not hidden
    assert bool((matrix[:, :-3] == -1).all())
    assert torch.equal(Layout.of(normed()).project_(torch.full((29,), -1.0)), torch.full((29,), -1.0))


@pytest.mark.parametrize("policy", ["local", "shared"])
@pytest.mark.parametrize("build", [normed, Tied])
def test_write_undoes_flatten(build, policy):
    model = build()
    layout = Layout.of(model, policy)
    vector = layout.flatten(model)
    other = build()
    layout.write(torch.zeros(layout.size), other)
    assert not layout.flatten(other).any()
    layout.write(vector, other)
    assert torch.equal(layout.flatten(other), vector)
    vector.zero_()
    assert layout.flatten(other).any()  # a copy


def test_views_share_memory_with_rows():
    layout = Layout.of(normed())
    matrix = torch.zeros(5, 32)[:, : layout.size]
    views = layout.views(matrix)
    views["0.weight"][3, 1, 2] = 7.0
    assert matrix[3, 1 * 4 + 2] == 7.0
    assert layout.views(matrix[3])["0.weight"][1, 2] == 7.0


def test_tied_parameters_count_once_and_are_saved_under_both_names():
    model = Tied()
    layout = Layout.of(model)
    assert layout.size == 9 + 1
    assert layout.tied == (("decoder.weight", "encoder.weight"),)
    assert layout.transient == ("mask",)
    saved = load(save(layout.state_dict(torch.arange(10.0), {})))
    fresh = Tied()
    fresh.load_state_dict(saved)
    assert torch.equal(layout.flatten(fresh), torch.arange(10.0))


def by_data(model):
    model[1].weight.data = model[0].weight.data


def transposed(model):
    model[1].weight.data = model[0].weight.data.T


def sliced(model):
    model[1].bias.data = model[0].weight.data[1]


def one_frozen(model):
    model[1].weight.requires_grad_(False)
    model[1].weight.data = model[0].weight.data


def new_parameter(model):
    model[1].weight = nn.Parameter(model[0].weight.detach())


def buffer(model):
    model[1].register_buffer("weight_before", model[0].weight.data)


def the_first_is_long(model):
    store = torch.zeros(100)
    model[0].weight.data, model[0].bias.data = store.as_strided((3, 3), (30, 1)), store[3:6]
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    model[1].bias.data = store[50:53]


@pytest.mark.parametrize(
    "tie", [by_data, transposed, sliced, one_frozen, new_parameter, buffer, the_first_is_long]
)
@pytest.mark.parametrize("buffers", ["local", "shared"])
def test_memory_under_two_names_is_refused(tie, buffers):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tie(model)
    with pytest.raises(
        UsageError, match=r"'0\.\w+' and \w+ '1\.\w+' share memory|'1.* and .*'0.* share memory"
    ):
        Layout.of(model, buffers)


class Counters(nn.Module):
    """Two layers with a running mean each, on one memory or not."""

    def __init__(self, second=None, **options):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("other", torch.zeros(3) if second is None else second(self.mean), **options)


@pytest.mark.parametrize(
    "second", [lambda mean: mean.data, lambda mean: mean[1:], lambda mean: mean.view(3, 1)]
)
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("buffers", ["local", "shared"])
def test_buffers_on_one_memory_are_refused(second, persistent, buffers):
    model = Counters(second, persistent=persistent)
    with pytest.raises(UsageError, match=r"buffer '\w+' and buffer '\w+' share memory"):
        Layout.of(model, buffers)
    table = torch.zeros(3, 3)
    layer = nn.Linear(1, 1)
    for name in ("rows", "again"):  # constants: the model does not save them
        layer.register_buffer(name, table[:2], persistent=False)
    assert Layout.of(layer, buffers).local == ("rows", "again")


def test_numbers_of_a_shared_buffer_on_one_memory_are_refused():
    model = Counters(lambda mean: torch.zeros(1).expand(3))
    assert "other" in Layout.of(model).local
    with pytest.raises(UsageError, match=r"buffer 'other' of shape \(3,\): several of its numbers share"):
        Layout.of(model, "shared")


@pytest.mark.parametrize("buffers", ["local", "shared"])
def test_one_buffer_under_two_names_is_saved_under_both(buffers):
    model = Counters(lambda mean: mean)
    layout = Layout.of(model, buffers)
    model.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    local = {name: buffer for name, buffer in model.named_buffers() if name in layout.local}
    assert layout.tied == (("other", "mean"),)
    assert layout.size == (12 if buffers == "local" else 15)
    plain = Counters()
    plain.load_state_dict(load(save(layout.state_dict(layout.flatten(model), local))))
    assert plain.other.tolist() == plain.mean.tolist() == [1.0, 2.0, 3.0]


def test_a_buffer_that_is_saved_under_its_second_name_only_is_saved_there():
    model = Counters()
    model.register_buffer("third", model.mean)
    model.register_buffer("mean", model.mean, persistent=False)
    layout = Layout.of(model)
    saved = layout.state_dict(layout.flatten(model), dict(model.named_buffers()))
    assert saved.keys() == model.state_dict().keys() == {"layer.weight", "layer.bias", "other", "third"}


@pytest.mark.parametrize("values", [torch.zeros(1).expand(3, 3), torch.zeros(5).as_strided((3, 3), (1, 1))])
def test_numbers_of_one_parameter_on_one_memory_are_refused(values):
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.data = values
    with pytest.raises(
        UsageError, match=r"parameter '0.weight' of shape \(3, 3\): several of its numbers share"
    ):
        Layout.of(model, "local")


def test_neighbours_in_one_memory_are_not_the_same():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    store = torch.zeros(24)
    for parameter, part in zip(model.parameters(), store.split([9, 3, 9, 3]), strict=True):
        parameter.data = part.view(parameter.shape)
    assert Layout.of(model).size == 24
    model[0].weight.requires_grad_(False)
    model[0].register_buffer("same", model[0].weight.data)  # neither of them trains
    assert Layout.of(model).size == 15


def test_frozen_parameters_are_left_out_of_the_vector_and_saved_all_the_same():
    model = Tied()
    model.encoder.weight.requires_grad_(False)
    layout = Layout.of(model)
    assert (layout.size, layout.frozen) == (1, ("encoder.weight",))
    assert layout.tied == (("decoder.weight", "encoder.weight"),)
    assert torch.equal(layout.flatten(model), torch.ones(1))
    kept = model.encoder.weight.detach().clone()
    layout.write(torch.zeros(1), model)
    assert torch.equal(model.encoder.weight, kept)
    fresh = Tied()
    saved = layout.state_dict(torch.full((1,), 2.0), {}, {"encoder.weight": kept})
    fresh.load_state_dict(load(save(saved)), strict=True)
    assert torch.equal(fresh.decoder.weight, kept)
    assert fresh.scale == 2.0
    with pytest.raises(UsageError, match=r"frozen parameters missing: encoder\.weight"):
        layout.state_dict(torch.ones(1), {})
    assert Layout.of(nn.Linear(2, 2)).frozen == ()
    with pytest.raises(UsageError, match="requires_grad"):
        Layout.of(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("policy", ["local", "shared"])
def test_state_dict_loads_into_a_plain_model(policy):
    model = normed()
    layout = Layout.of(model, policy)
    local = {name: buffer for name, buffer in model.named_buffers() if name in layout.local}
    fresh = normed()
    fresh.load_state_dict(load(save(layout.state_dict(layout.flatten(model), local))))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True)
    )
    with pytest.raises(UsageError, match="num_batches_tracked"):
        layout.state_dict(layout.flatten(model), {})


def test_a_model_that_has_changed_since_is_refused_by_name():
    model = nn.Linear(3, 2)
    layout = Layout.of(model)
    model.weight = nn.Parameter(torch.zeros(4, 3))
    for use in (lambda: layout.flatten(model), lambda: layout.write(torch.zeros(8), model)):
        with pytest.raises(UsageError, match=r"'weight' is of shape \(4, 3\) now: it had the shape \(2, 3\)"):
            use()
    nn.utils.parametrizations.weight_norm(model)
    with pytest.raises(UsageError, match="'weight' is not there any more"):
        layout.flatten(model)


def test_models_that_are_no_float32_vector_are_refused():
    with pytest.raises(UsageError, match=r"parameter 'weight' is float64: expected float32.*\.float\(\)"):
        Layout.of(nn.Linear(2, 2).double())
    with pytest.raises(UsageError, match="has no parameters"):
        Layout.of(nn.ReLU())
    with pytest.raises(UsageError, match="'weight' has no shape yet"):
        Layout.of(nn.LazyLinear(2))
    with pytest.raises(ConfigError, match=r"train.buffers = 'mine'"):
        Layout.of(nn.Linear(2, 2), "mine")  # type: ignore[arg-type]
    double = nn.BatchNorm1d(2)
    double.running_mean = double.running_mean.double()
    with pytest.raises(UsageError, match="buffer 'running_mean' is float64"):
        Layout.of(double, "shared")
    assert "running_mean" in Layout.of(double).local
    with pytest.raises(UsageError, match=r"expected \(\.\.\., 6\)"):
        Layout.of(nn.Linear(2, 2)).views(torch.zeros(5))
