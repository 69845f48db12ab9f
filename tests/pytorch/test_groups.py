"""The coupling groups of PyTorch models: the zoo, against what is known of each and against what inspect counts."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import whet
import zoo_torch
from whet.errors import ModelError
from whet.torch import groups, inspect
from whet.torch.groups import read_model

# families of every model of the zoo: {name: (groups, positions of the producing axis in each)}
KNOWN = {
    "demo": {"conv1.weight": (10, 1), "conv2.weight": (20, 1), "fc1.weight": (50, 1)},
    "residual": {"conv1.weight": (8, 1), "conv2.weight": (16, 1), "conv3.weight": (4, 2)},
    "concat": {"a.weight": (6, 1), "b.weight": (10, 1), "c.weight": (8, 1)},
    "depthwise": {"stem.weight": (8, 1), "point.weight": (12, 1)},
    "grouped": {"stem.weight": (6, 4), "grouped.weight": (2, 12)},
    "shuffle": {"a.weight": (2, 4), "b.weight": (4, 2)},
    "permute": {"conv.weight": (6, 1)},
    "pixel_shuffle": {"a.weight": (4, 4)},
    "decoder": {"fc.weight": (8, 9), "up.weight[1]": (6, 1)},
    "fused_qkv": {"qkv.weight": (4, 12)},
    "grouped_query": {"q.weight": (2, 8)},
    "attention": {"inp.weight": (16, 1), "attn.in_proj_weight": (4, 12)},
    "recurrent": {"lstm.weight_ih_l0": (8, 4), "gru.weight_ih_l0": (8, 3)},
    "tied": {"mid.weight": (12, 1)},
    "twice": {"stem.weight": (8, 1)},
    "siamese": {"branch.0.weight": (12, 1)},
    "functional": {"kernel": (6, 1), "w1[1]": (8, 1)},
    "sequential": {"0.weight": (6, 1), "5.weight": (8, 1)},
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_zoo(name) -> None:
    model, inputs = zoo_torch.CASES[name]()
    found = groups(model, inputs)
    assert {f.name: (len(f), f.width) for f in found.families} == KNOWN[name]
    counted = inspect(model, inputs)
    assert (found.size().parameters, found.size().bytes) == (counted.parameters, counted.bytes)
    assert found.size().macs == counted.macs


def members(found, name):
    return {(m.tensor, m.axis): m.positions.tolist() for m in found.named(name).members}


def test_heads_of_a_fused_projection() -> None:
    model, inputs = zoo_torch.CASES["fused_qkv"]()
    found = groups(model, inputs)
    assert found.families[0].kind == "head"
    held = members(found, "qkv.weight")
    assert held["qkv.weight", 0][1] == [4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39]  # head 1 of q, k and v
    assert held["proj.weight", 1][1] == [4, 5, 6, 7]


def test_grouped_query_heads_take_their_keys_and_values_along() -> None:
    model, inputs = zoo_torch.CASES["grouped_query"]()
    held = members(groups(model, inputs), "q.weight")
    assert held["q.weight", 0][1] == list(range(8, 16)) and held["k.weight", 0][1] == [4, 5, 6, 7] == held["v.weight", 0][1]


def test_flatten_in_both_orders() -> None:
    model, inputs = zoo_torch.CASES["permute"]()
    assert members(groups(model, inputs), "conv.weight")["fc.weight", 1][2] == list(range(2, 216, 6))
    model, inputs = zoo_torch.CASES["sequential"]()
    assert members(groups(model, inputs), "0.weight")["5.weight", 1][2] == list(range(18, 27))


def test_an_option_a_shortcut_shifts_channels() -> None:
    model, inputs = zoo_torch.CASES["residual"]()
    found = groups(model, inputs)
    assert members(found, "conv1.weight")["conv3.weight", 0][0] == [4]
    assert members(found, "conv3.weight")["conv3.weight", 0] == [[0, 12], [1, 13], [2, 14], [3, 15]]  # as many on both sides
    assert found.named("conv3.weight").sites and not found.named("conv2.weight").sites
    free = read_model(model, inputs, dynamic=True).groups  # where every pad amount can be written anew
    assert members(free, "conv3.weight")["conv3.weight", 0] == [[0], [1], [2], [3], [12], [13], [14], [15]]


def test_torchs_own_shuffle_and_gate_are_followed() -> None:
    found = groups(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GLU(1), nn.Conv2d(4, 2, 1)), zoo_torch.normal(2, 3, 4, 4))
    held = members(found, "0.weight")
    assert held["0.weight", 0][1] == [1, 5] and held["2.weight", 1][1] == [1]  # a value and its gate
    assert not [row for row in found.fixed if "cannot be followed" in row.reason]
    shuffled = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 2, 1))
    held = members(groups(shuffled, zoo_torch.normal(2, 3, 4, 4)), "0.weight")
    rows = dict(zip(map(tuple, held["0.weight", 0]), map(tuple, held["2.weight", 1]), strict=True))
    old, new = next(iter(rows.items()))
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # which channel of the convolution each place behind the shuffle holds
    assert sorted(order[place] for place in new) == sorted(old)


class Odd(nn.Module):
    """Operations that keep channels, and some that stop them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale, self.idle = nn.Parameter(torch.rand(6)), nn.Linear(3, 5)
        self.register_buffer("shift", torch.rand(6), persistent=False)
        self.register_buffer("gain", torch.rand(6))

    def forward(self, x):
        x = F.gelu(self.a(x)) * self.scale * self.gain
        x = torch.softmax(self.b(x), -1)
        x = F.normalize(self.c(x), dim=-1)
        return torch.fft.rfft(self.d(x) + self.shift).abs().sum(-1)


def test_what_stays_is_named_with_its_reason() -> None:
    found = groups(Odd(), np.ones((3, 4), np.float32))
    assert [f.name for f in found.families] == ["a.weight"]
    assert {(m.tensor, m.axis) for m in found.families[0].members} >= {("scale", 0), ("gain", 0), ("b.weight", 1)}
    why = {(f.tensor, f.axis): f.reason for f in found.fixed}
    assert "softmax mixes it" in why["b.weight", 0] and "linalg_vector_norm runs over it" in why["c.weight", 0]
    assert "not saved with the model" in why["d.weight", 0] or "fft_rfft" in why["d.weight", 0]
    assert why["idle.weight", 0] == "never read by the example"


def test_a_model_that_cannot_be_traced_is_refused_with_the_cause() -> None:
    model, inputs = zoo_torch.CASES["branching"]()
    with pytest.raises(ModelError, match=r"channels of Branching cannot be followed: .* Masks"):
        groups(model, inputs)
    with pytest.raises(ModelError, match="needs example="):
        groups(model, None)


def test_groups_from_the_front_door() -> None:
    model, inputs = zoo_torch.CASES["demo"]()
    found = whet.groups(model, torch.from_numpy(inputs))
    assert "conv2.weight  channel      20" in str(found)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_any_batch_size_gives_the_same_groups(rows) -> None:
    model, inputs = zoo_torch.CASES["residual"]()
    assert str(groups(model, inputs[:rows])) == str(groups(model, inputs))
