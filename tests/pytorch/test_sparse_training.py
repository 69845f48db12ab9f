"""Training with masks that move, scores that training makes, and penalties that make channels small: PyTorch."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import whet
from torch_parts import batches, examples, seeded, small
from whet import ERK, Cubic, Global, GroupLasso, Movement, Prune, Random, RigL, Taylor, Train, Wanda
from whet import torch as side
from whet.errors import ModelError, SpecError

QUIET = {"progress": False}
RIGL = Prune(0.7, criterion=Random(), allocation=ERK(), schedule=RigL(fraction=0.5, frequency=3, end=0.7))
MOVING = Prune(0.6, criterion=Movement(), allocation=Global(), schedule=Cubic(begin=0.2, end=0.7, frequency=2))


def loop(model, pruner, steps, watch=None, optimizer=None, loss=nn.functional.cross_entropy):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches()]
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        pruner.step()
        if watch is not None:
            watch()


def test_rigl_moves_masks_at_one_sparsity_and_stops() -> None:
    model = small()
    pruner = side.Pruner(model, RIGL, steps=20)
    seen = []

    def watch():
        for name, mask in pruner.masks.items():
            assert not model.get_parameter(name).detach().numpy()[mask == 0].any()
        seen.append(pruner.masks)

    loop(model, pruner, 20, watch)
    sizes = [{name: int(mask.sum()) for name, mask in masks.items()} for masks in seen]
    assert all(size == sizes[0] for size in sizes) and sum(sizes[0].values()) == round(0.3 * 228)
    moved = [i for i in range(1, 20) if any((seen[i][n] != seen[i - 1][n]).any() for n in seen[i])]
    assert moved == [2, 5, 8, 11]  # after steps 3, 6, 9, 12 of an end of 14
    assert pruner.is_done


def test_what_rigl_grows_has_the_largest_gradient_and_begins_at_zero() -> None:
    model = small()
    pruner = side.Pruner(model, Prune(0.5, schedule=RigL(fraction=0.4, frequency=1, end=0.9)), steps=10)
    before = pruner.masks["head.weight"]
    loop(model, pruner, 1)
    after, gradient = pruner.masks["head.weight"], model.head.weight.grad.abs().numpy()
    grown, never = (before == 0) & (after == 1), (before == 0) & (after == 0)
    assert grown.any() and gradient[grown].min() >= gradient[never].max()
    assert not model.head.weight.detach().numpy()[grown].any()


@pytest.mark.parametrize("handed", [True, False])
def test_the_moments_of_what_rigl_grows_begin_at_zero(handed) -> None:
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    spec = Prune(0.5, schedule=RigL(fraction=0.4, frequency=3, end=0.9))
    pruner = side.Pruner(model, spec, steps=10, optimizer=optimizer if handed else None)
    loop(model, pruner, 2, optimizer=optimizer)
    before = pruner.masks["head.weight"]
    loop(model, pruner, 1, optimizer=optimizer)  # the third step moves the masks
    grown = torch.from_numpy((before == 0) & (pruner.masks["head.weight"] == 1))
    kept = torch.from_numpy((before == 1) & (pruner.masks["head.weight"] == 1))
    state = optimizer.state[model.head.weight]
    assert grown.any() and bool((state["exp_avg"][kept] != 0).any())
    for key in ("exp_avg", "exp_avg_sq"):
        assert bool((state[key][grown] == 0).all()) is handed
    assert int(optimizer.state[model.head.bias]["step"]) == 3


def test_rigl_without_gradients_says_what_to_do() -> None:
    pruner = side.Pruner(small(), Prune(0.5, schedule=RigL(frequency=1)), steps=10)
    with pytest.raises(SpecError, match=r"RigL needs the gradient of 'conv.weight'.*before zero_grad"):
        pruner.step()
    pruner = side.Pruner(small(), Prune(0.5, schedule=RigL(frequency=1)), steps=10, data=list(batches()))
    pruner.step()
    assert pruner.sparsity == 0.5


def test_movement_with_sgd_is_the_papers_sum() -> None:
    model = small()
    pruner = side.Pruner(model, Prune(0.5, criterion=Movement(), schedule=Cubic(begin=0.5, end=0.8, frequency=1)), steps=10)
    optimizer, sums = torch.optim.SGD(model.parameters(), lr=0.01), {}
    data = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches()]
    for step in range(4):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for name in ("conv.weight", "head.weight"):
            p = model.get_parameter(name)
            sums[name] = sums.get(name, 0) - 0.01 * p.detach() * p.grad
        optimizer.step()
        pruner.step()
    moved = pruner.state_dict()["moved"]
    for name, expected in sums.items():
        torch.testing.assert_close(moved[name], expected, rtol=1e-3, atol=1e-7)


def test_movement_masks_are_not_those_of_magnitude_and_resume_exactly() -> None:
    def make():
        model = small()
        return model, side.Pruner(model, MOVING, steps=20), torch.optim.SGD(model.parameters(), lr=0.05)

    straight, pruner, optimizer = make()
    loop(straight, pruner, 8, optimizer=optimizer)
    saved = copy.deepcopy(pruner.state_dict())
    weights = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    assert 0 < pruner.sparsity < 0.6
    loop(straight, pruner, 12, optimizer=optimizer)
    assert pruner.sparsity == pytest.approx(round(0.6 * 228) / 228)

    resumed, again, optimizer = make()
    again.load_state_dict(saved)
    resumed.load_state_dict(weights)
    loop(resumed, again, 12, optimizer=optimizer)
    assert all(np.array_equal(again.masks[name], mask) for name, mask in pruner.masks.items())
    plain = whet.prune(resumed, Prune(0.7, allocation=Global()), **QUIET)
    assert any((plain.masks[name] != mask).any() for name, mask in pruner.masks.items())


@pytest.mark.parametrize(
    "spec", [RIGL, MOVING, Prune(0.5, criterion=Taylor(batches=1), schedule=Cubic(frequency=4)), Prune(0.5, criterion=Wanda())]
)
def test_inside_train_masks_hold_to_the_end(spec) -> None:
    made = whet.fit(small(), Train(epochs=5, apply=(spec,)), train=examples(), val=examples(48, seed=1), **QUIET)
    sizes = sum(mask.size for mask in made.masks.values())
    assert sum(int((mask == 0).sum()) for mask in made.masks.values()) == pytest.approx(spec.fraction * sizes, abs=1)
    for name, mask in made.masks.items():
        weight = made.model.get_parameter(name).detach().numpy()
        assert not weight[mask == 0].any() and weight[mask == 1].any()
    assert made.report.data["steps"][0]["train"]["history"][-1]["eligible"]


def test_a_target_that_training_cannot_reach_is_an_error_before_it() -> None:
    for spec, said in (
        (Prune(0.5, schedule=RigL()), "never move a mask"),
        (Prune(0.5, criterion=Movement()), "before the first step"),
    ):
        with pytest.raises(SpecError, match=said):
            whet.fit(small(), Train(epochs=5, apply=(spec,)), train=examples(), **QUIET)


def test_group_lasso_by_its_formula_and_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 3).double(), nn.Linear(3, 2).double())
    expected = sum((layer.weight.shape[1] ** 0.5) * layer.weight.detach().norm(dim=1).sum() for layer in (model[0], model[1]))
    value = side.group_lasso(model, 0.5)
    assert value.item() == pytest.approx(0.5 * expected.item(), rel=1e-6)
    with torch.no_grad():
        model[0].weight[1] = 0
    side.group_lasso(model, 1.0).backward()
    assert torch.isfinite(model[0].weight.grad).all() and not model[0].weight.grad[1].any()
    row = model[0].weight.detach()[0]
    torch.testing.assert_close(model[0].weight.grad[0], 2 * row / row.norm(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="no convolution or linear weight"):
        side.group_lasso(nn.LayerNorm(3))


def test_group_lasso_in_training_makes_channels_small_in_both_ways() -> None:
    def norms(model):
        return torch.sort(model.conv.weight.detach().flatten(1).norm(dim=1)).values

    plain = whet.fit(small(), Train(epochs=10, learning_rate=0.03), train=examples(), **QUIET)
    made = whet.fit(small(), Train(epochs=10, learning_rate=0.03, apply=(GroupLasso(0.1),)), train=examples(), **QUIET)
    assert norms(made.model)[0] < 0.3 * norms(plain.model)[0]
    model = seeded(small)
    loop(
        model,
        side.Pruner(model, Prune(0.01, include="head"), steps=30),
        30,
        loss=lambda o, y: nn.functional.cross_entropy(o, y) + side.group_lasso(model, 0.05),
    )
    assert norms(model)[0] < 0.5 * norms(small())[0]
