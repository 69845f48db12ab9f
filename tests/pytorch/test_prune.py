"""Magnitude pruning of PyTorch models."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from torch_parts import Small, Tied, batches, same_state, seeded, small, state_of
from whet import torch as side
from whet.errors import ModelError, SpecError
from whet.specs import Cubic, Global, Prune
from whet.torch.views import weight_views


def zeros(tensor):
    return int((tensor == 0).sum())


def matrix(rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
    return nn.Sequential(layer)


def test_the_smallest_go_and_ties_go_by_position():
    model = matrix([[0.5, -0.1, 0.3], [-0.1, 0.1, -2.0]])
    masks, step = side.prune(model, Prune(0.34), masks={})
    assert masks["0.weight"].dtype == np.uint8
    np.testing.assert_array_equal(masks["0.weight"], [[1, 0, 1], [0, 1, 1]])
    np.testing.assert_array_equal(model[0].weight.detach(), np.float32([[0.5, 0, 0.3], [0, 0.1, -2.0]]))
    (row,) = step.changed
    drawn = row.pop("histogram")
    assert row == {"name": "0.weight", "parameters": 6, "sparsity": 2 / 6}
    assert drawn["edges"] == [-2.0, 0.5] and drawn["before"][24:26] == [2, 0] and drawn["after"][24:26] == [0, 2]
    assert step.spec == {"Prune": {"sparsity": 0.34}} and step.train is None and step.seconds >= 0


def test_removed_weights_are_positive_zeros():
    model = matrix([[-0.1, 1.0], [-0.2, 1.0]])
    side.prune(model, Prune(0.5), masks={})
    assert not torch.signbit(model[0].weight).any()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77, 0.99])
def test_uniform_counts_are_exact_and_nothing_else_changes(sparsity):
    model = small()
    before = state_of(model)
    masks, step = side.prune(model, Prune(sparsity), masks={})
    assert set(masks) == {"conv.weight", "head.weight"}
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert zeros(weight) == min(round(sparsity * mask.size), mask.size - 1) == mask.size - mask.sum()
        assert torch.equal(weight.detach(), before.pop(name) * torch.from_numpy(mask))
    assert same_state(before, {name: value for name, value in state_of(model).items() if name in before})
    assert {row["name"] for row in step.changed} == set(masks)


def test_global_ranks_all_layers_together_and_empties_none():
    model = small()
    with torch.no_grad():
        model.conv.weight.mul_(1e-4)
    masks, _ = side.prune(model, Prune(0.5, allocation=Global()), masks={})
    total = sum(mask.size for mask in masks.values())
    assert sum(int((mask == 0).sum()) for mask in masks.values()) == round(total / 2)
    assert masks["conv.weight"].sum() == 1
    assert masks["head.weight"].mean() > 0.5


@pytest.mark.parametrize(
    "spec, pruned, skipped, unmatched",
    [
        (Prune(0.5, keep=("head",)), {"conv.weight"}, {"name": "head", "reason": "in keep"}, ()),
        (Prune(0.5, include=("c*",)), {"conv.weight"}, {"name": "head", "reason": "not in include"}, ()),
        (Prune(0.5, keep=("head.weight", "bn", "hed")), {"conv.weight"}, {"name": "head", "reason": "in keep"}, ("hed",)),
    ],
)
def test_keep_include_and_patterns_that_name_nothing(spec, pruned, skipped, unmatched):
    masks, step = side.prune(small(), spec, masks={})
    assert set(masks) == pruned and skipped in step.skipped and step.unmatched == unmatched


@pytest.mark.parametrize(
    "build, spec, said",
    [
        (small, Prune(0.0), "sparsity 0 is reached already"),
        (small, Prune(0.001), "removes less than one weight"),
        (small, Prune(0.5, include=("nothing",)), "not in include.*match no layer: nothing"),
        (small, Prune(0.5, keep=("*",)), "conv: in keep; head: in keep"),
        (lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.PReLU()), Prune(0.5), "no convolution or linear weight"),
    ],
)
def test_no_change_is_an_error(build, spec, said):
    with pytest.raises(ModelError, match=f"Prune would change nothing.*{said}"):
        side.prune(build(), spec, masks={})


def test_a_ramp_without_training_is_an_error():
    with pytest.raises(SpecError, match="needs training"):
        side.prune(small(), Prune(0.5, schedule=Cubic()), masks={})


@pytest.mark.parametrize("allocation", [{}, {"allocation": Global()}])
def test_masks_from_before_stay_and_count(allocation):
    model = small()
    first, _ = side.prune(model, Prune(0.5, **allocation), masks={})
    second, _ = side.prune(model, Prune(0.8, **allocation), masks=first)
    for name in first:
        assert not (second[name] & ~first[name] & 1).any()
    removed = sum(int((mask == 0).sum()) for mask in second.values())
    assert removed == sum(round(0.8 * n) for n in ([36 + 192] if allocation else [36, 192]))
    with pytest.raises(ModelError, match="change nothing"):
        side.prune(model, Prune(0.8, **allocation), masks=second)


def test_what_is_removed_already_counts_before_weights_that_happen_to_be_zero():
    model = matrix([[0.0, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0]])
    masks, _ = side.prune(model, Prune(0.25), masks={"0.weight": np.uint8([[1, 1, 0, 1, 1, 1, 1, 1]])})
    np.testing.assert_array_equal(masks["0.weight"], [[0, 1, 0, 1, 1, 1, 1, 1]])


def test_masks_outside_the_spec_are_held():
    model = small()
    first, _ = side.prune(model, Prune(0.5, include=("conv",)), masks={})
    with torch.no_grad():
        model.conv.weight.add_(1)
    masks, step = side.prune(model, Prune(0.5, include=("head",)), masks=first)
    np.testing.assert_array_equal(masks["conv.weight"], first["conv.weight"])
    assert zeros(model.conv.weight) == 18
    assert {row["name"]: row["sparsity"] for row in step.changed} == {"conv.weight": 0.5, "head.weight": 0.5}


def test_masks_of_another_model_are_refused():
    with pytest.raises(ModelError, match=r"mask of shape \(2, 2\) for 'head.weight', but the parameter has shape \(3, 64\)"):
        side.prune(small(), Prune(0.5), masks={"head.weight": np.ones((2, 2), np.uint8)})
    with pytest.raises(ModelError, match="there is no such parameter"):
        side.prune(small(), Prune(0.5), masks={"tail.weight": np.ones((2, 2), np.uint8)})


def test_a_frozen_model_is_pruned_and_stays_frozen():
    model = small().requires_grad_(False)
    side.prune(model, Prune(0.5), masks={})
    assert zeros(model.head.weight) == 96 and not model.head.weight.requires_grad


def test_shared_layers_once_and_embeddings_never():
    model = Tied()
    before = model.embed.weight.detach().clone()
    masks, step = side.prune(model, Prune(0.5), masks={})
    assert set(masks) == {"hidden.weight"}
    assert model.out.weight is model.embed.weight and torch.equal(model.embed.weight, before)
    assert {"name": "embed.weight", "reason": "embedding weights are not pruned"} in step.skipped


def test_channels_last_and_transposed_weights_give_the_same_masks():
    plain, strided = small(), small().to(memory_format=torch.channels_last)
    strided.head.weight = nn.Parameter(strided.head.weight.detach().t().contiguous().t())
    assert not strided.head.weight.is_contiguous()
    one, _ = side.prune(plain, Prune(0.6), masks={})
    two, _ = side.prune(strided, Prune(0.6), masks={})
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert same_state(state_of(plain), state_of(strided))


def test_sixteen_bit_weights_keep_their_dtype():
    model = small().bfloat16()
    masks, _ = side.prune(model, Prune(0.75), masks={})
    assert model.conv.weight.dtype == torch.bfloat16 and zeros(model.conv.weight) == 27 == (masks["conv.weight"] == 0).sum()


class Conv1D(nn.Module):
    """As in Hugging Face transformers: y = x W + b with W (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv3d(2, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(3, 5, 2)
        self.gpt = Conv1D(6, 4)
        self.lstm = nn.LSTM(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.norm = nn.LayerNorm((3, 4))
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.pos_embed, self.scale = nn.Parameter(torch.randn(1, 7, 4)), nn.Parameter(torch.ones(4, 1, 1))
        self.modern = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.counts = nn.Parameter(torch.ones(3, 3, dtype=torch.int64), requires_grad=False)


def test_every_kind_of_weight_is_seen_once_with_its_axes():
    views = weight_views(Zoo())
    found = {view.name: (view.layer, view.out_axis, view.in_axis) for view in views.weights}
    assert found == {
        "kernel": ("kernel", 0, 1),
        "conv3.weight": ("conv3", 0, 1),
        "up.weight": ("up", 1, 0),
        "gpt.weight": ("gpt", 1, 0),
        "lstm.weight_ih_l0": ("lstm", 0, 1),
        "lstm.weight_hh_l0": ("lstm", 0, 1),
        "attention.in_proj_weight": ("attention", 0, 1),
        "attention.out_proj.weight": ("attention.out_proj", 0, 1),
    }
    skipped = dict(views.skipped)
    assert set(skipped) == {"pos_embed", "modern.weight"} and skipped["modern.weight"].startswith("parametrized")


@pytest.mark.filterwarnings("ignore")
def test_weights_that_something_else_computes_are_named():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4))
    l1_unstructured(model[1], "weight", 0.5)
    masks, step = side.prune(model, Prune(0.5), masks={})
    assert set(masks) == {"2.weight"}
    assert [row["name"] for row in step.skipped] == ["0.weight", "1.weight"]
    assert "from_torch_prune_" in step.skipped[1]["reason"]


def test_a_model_that_is_one_layer():
    layer = nn.Linear(4, 4)
    masks, _ = side.prune(layer, Prune(0.5), masks={})
    assert set(masks) == {"weight"} and zeros(layer.weight) == 8


SPEC = Prune(0.75, schedule=Cubic(begin=0.1, end=0.7, frequency=2))


def own_loop(model, optimizer, pruner, first, last, watch=None):
    data = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches()]
    for step in range(first, last):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        if watch is not None:
            watch(step)


def fresh(seed=0):
    model = seeded(Small, seed)
    return model, torch.optim.Adam(model.parameters(), lr=0.02)


def test_pruning_in_the_users_own_loop():
    model, optimizer = fresh()
    pruner = side.Pruner(model, SPEC, steps=20)
    seen = []

    def watch(step):
        for name, mask in pruner.masks.items():
            assert torch.equal(model.get_parameter(name) == 0, torch.from_numpy(mask == 0))
        seen.append(pruner.sparsity)

    own_loop(model, optimizer, pruner, 0, 20, watch)
    assert seen == sorted(seen) and seen[0] == 0 and len(set(seen)) > 4
    assert pruner.is_done and zeros(model.conv.weight) == 27 and zeros(model.head.weight) == 144


def test_resuming_in_the_middle_of_the_ramp_is_exact(tmp_path):
    straight, optimizer = fresh()
    own_loop(straight, optimizer, side.Pruner(straight, SPEC, steps=20), 0, 20)

    half, optimizer = fresh()
    pruner = side.Pruner(half, SPEC, steps=20)
    own_loop(half, optimizer, pruner, 0, 9)
    assert 0 < pruner.sparsity < 0.75
    torch.save({"m": half.state_dict(), "o": optimizer.state_dict(), "p": pruner.state_dict()}, tmp_path / "half.pt")

    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    resumed, optimizer = fresh(seed=1)
    pruner = side.Pruner(resumed, SPEC, steps=20)
    resumed.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    pruner.load_state_dict(saved["p"])
    own_loop(resumed, optimizer, pruner, 9, 20)
    assert same_state(state_of(straight), state_of(resumed))


def test_a_state_of_another_schedule_is_refused():
    state = side.Pruner(small(), SPEC, steps=20).state_dict()
    with pytest.raises(SpecError, match=r"belongs to.*over 20 steps"):
        side.Pruner(small(), SPEC, steps=30).load_state_dict(state)


def test_a_schedule_that_does_not_fit_is_an_error_at_the_start():
    with pytest.raises(SpecError, match="cannot ramp"):
        side.Pruner(small(), Prune(0.5, schedule=Cubic(frequency=50)), steps=20)
