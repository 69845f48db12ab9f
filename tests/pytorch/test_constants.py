"""Channels that leave but were not zero: what they always were is folded into what follows, or reported."""

import numpy as np
import pytest
import torch
from torch import nn

import whet
import zoo_torch
from torch_parts import same_state, seeded, state_of
from whet.specs import Channel, Prune
from whet.torch import predict, remove
from whet.torch.constants import fold_constants, put_back
from whet.torch.groups import read_model

QUARTER = Prune(2 / 8, granularity=Channel(), round_to=1, include=("a",))


class Gated(nn.Module):
    """A convolution behind a sigmoid: σ(bias) is not zero where the weights are."""

    def __init__(self, bias=True, norm=False, padding=0, twice=False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=padding, bias=bias)
        self.norm, self.head, self.twice = nn.BatchNorm2d(6) if norm else nn.Identity(), nn.Linear(6, 3), twice

    def forward(self, x):
        x = torch.sigmoid(self.a(x))
        y = self.b(x) + self.b(x.flip(2)) if self.twice else self.b(x)
        return self.head(torch.relu(self.norm(y)).mean((2, 3)))


def dead(**how):
    """Channels 1 and 4 of `a` are constants, and those that leave."""
    model = seeded(lambda: Gated(**how)).eval()
    with torch.no_grad():
        model.a.weight[[1, 4]] = 0
        model.b.weight[:, [1, 4]] *= 0.3
        if how.get("norm"):
            model.norm.running_mean.normal_()
            model.norm.running_var.uniform_(1, 2)
    return model, zoo_torch.normal(4, 3, 8, 8)


@pytest.mark.parametrize("rebuild", [None, "graph"])
@pytest.mark.parametrize("how", [{}, {"norm": True}, {"norm": True, "bias": False}], ids=["bias", "both", "running_mean"])
def test_a_constant_goes_into_the_bias_or_the_running_mean(how, rebuild) -> None:
    model, x = dead(**how)
    before = state_of(model)
    spec = Prune(2 / 8, granularity=Channel(), round_to=1, include=("a",), rebuild=rebuild)
    made = whet.prune(model, spec, example=x)
    told = made.steps[0].removal
    assert (told["silent"], told["constant"], told["varying"]) == (0, 2, 0) and told["left"] == []
    (row,) = told["folded"]
    into = "b.bias" if how.get("bias", True) else "norm.running_mean"
    assert (row["layer"], row["channels"], row["into"], row["borders"]) == ("b", 2, into, "exact")
    assert told["oracle"] <= 1e-6 and told["change"] <= 1e-6  # nothing was lost at all
    np.testing.assert_allclose(predict(made.model, x), predict(model, x), atol=1e-6)
    assert same_state(before, state_of(model))


def test_by_hand_the_bias_takes_the_sigmoid_of_the_bias_times_the_summed_kernel() -> None:
    model, x = dead()
    with torch.no_grad():
        constant = torch.sigmoid(model.a.bias[[1, 4]].double())
        wanted = model.b.bias.double() + model.b.weight[:, [1, 4]].double().sum((2, 3)) @ constant
    remove(model, QUARTER, example=x)
    torch.testing.assert_close(model.b.bias.double(), wanted, atol=1e-7, rtol=0)


def test_where_padding_is_read_the_borders_differ_and_this_is_told() -> None:
    model, x = dead(padding=1)
    told = whet.prune(model, QUARTER, example=x).steps[0].removal
    assert told["folded"][0]["borders"] == "differ" and 1e-4 < told["change"] < 0.05 and told["oracle"] <= 1e-6
    model.b.padding_mode = "circular"  # reads no zeros
    told = whet.prune(model, QUARTER, example=x).steps[0].removal
    assert told["folded"][0]["borders"] == "exact" and told["change"] <= 1e-6


@pytest.mark.parametrize(
    ("how", "why"), [({"bias": False}, "it has no bias, and no batch norm"), ({"twice": True}, "read several times")]
)
def test_what_cannot_take_a_constant_is_reported(how, why) -> None:
    model, x = dead(**how)
    told = whet.prune(model, QUARTER, example=x).steps[0].removal
    assert told["folded"] == [] and told["constant"] == 2 and told["change"] > 1e-3
    assert all(why in row["reason"] and row["layer"] == "b" for row in told["left"]) and told["left"]


def test_zero_channels_and_those_that_carry_something_are_counted_apart() -> None:
    model, x = zoo_torch.CASES["demo"]()
    with torch.no_grad():
        model.conv1.weight[3] = 0
        model.conv1.bias[3] = -1.0  # zero behind the ReLU
        model.conv1.weight[5] *= 0.01
        model.conv1.bias[5] *= 0.01
    told = whet.prune(model, Prune(0.2, granularity=Channel(), round_to=1, include=("conv1",)), example=x).steps[0].removal
    assert (told["silent"], told["constant"], told["varying"]) == (1, 0, 1) and told["folded"] == [] == told["left"]


def test_one_example_does_not_make_its_values_constants() -> None:
    """With a single example every feature of a linear layer has one value only; other inputs show that it varies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3)).eval()
    before = model[2].bias.clone()
    remove(model, Prune(0.5, granularity=Channel(), round_to=1), example=zoo_torch.normal(1, 6))
    assert torch.equal(model[2].bias, before)


def test_a_fold_can_be_undone() -> None:
    model, x = dead()
    before = state_of(model)
    reading = read_model(model, x)
    gone = reading.groups.gone([reading.groups.named("a.weight").roots[[1, 4]]])
    constants = fold_constants(model, reading, gone)
    assert not same_state(before, state_of(model)) and constants.constant == 2
    put_back(constants)
    assert same_state(before, state_of(model))


def test_a_batch_norm_that_scales_to_nothing_leaves_its_offset() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))).eval()
    with torch.no_grad():
        model[1].weight[[0, 6]] = 0
        model[1].bias[[0, 6]] = torch.tensor([0.7, -0.2])
        model[0].weight[[0, 6]] *= 0.01
        model[3].weight[:, [0, 6]] *= 0.1
    x = zoo_torch.normal(4, 5)
    made = whet.prune(model, Prune(2 / 8, granularity=Channel(), round_to=1), example=x)
    told = made.steps[0].removal
    assert (told["silent"], told["constant"]) == (1, 1) and told["folded"][0]["into"] == "3.bias"
    np.testing.assert_allclose(predict(made.model, x), predict(model, x), atol=1e-6)
    assert whet.records.Step.from_dict(made.steps[0].to_dict()).removal == told
