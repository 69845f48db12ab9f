"""n:m and block masks, ERK, and criteria of gradients on PyTorch models, to the exported file."""

import numpy as np
import pytest
import torch

import whet
import zoo_torch
from torch_parts import batches, small
from whet.errors import ModelError, SpecError
from whet.specs import ERK, NM, Block, Cosine, Fisher, Iterative, Magnitude, Prune, Random, Taylor, UserCriterion
from whet.torch import Pruner, predict


def test_two_of_four_in_every_layer_that_fits_and_the_rest_is_named() -> None:
    model, inputs = zoo_torch.CASES["demo"]()
    made = whet.prune(model, Prune(granularity=NM(2, 4)))
    assert set(made.masks) == {"fc1.weight"}
    assert (made.masks["fc1.weight"].reshape(50, 80, 4).sum(2) == 2).all()
    why = {row["name"]: row["reason"] for row in made.steps[0].skipped}
    assert why["conv1"] == "its 1 inputs are no multiple of 4" and why["fc2"] == "its 50 inputs are no multiple of 4"
    assert np.isfinite(predict(made.model, inputs)).all()


def test_blocks_and_erk_have_the_sparsity_asked_for() -> None:
    model, _ = zoo_torch.CASES["demo"]()
    made = whet.prune(model, Prune(0.5, granularity=Block(2, 5), allocation=ERK(), include=("conv2", "fc*")))
    assert set(made.masks) == {"conv2.weight", "fc1.weight", "fc2.weight"}
    for name, mask in made.masks.items():
        rows, columns = mask.shape[:2]
        cut = mask.reshape(rows // 2, 2, columns // 5, 5, -1)
        assert (cut == cut[:, :1, :, :1]).all(), name
    kept, size = sum(int(m.sum()) for m in made.masks.values()), sum(m.size for m in made.masks.values())
    assert kept / size == pytest.approx(0.5, abs=0.01)
    assert made.masks["fc1.weight"].mean() < made.masks["fc2.weight"].mean()


def squares(weight, gradient):
    return weight**2


@pytest.mark.parametrize("criterion", [Taylor(batches=2), Fisher(batches=1), Random(), Magnitude(p=1), UserCriterion(squares)])
def test_criteria_give_masks_of_exactly_the_sparsity(criterion) -> None:
    model = small()
    made = whet.prune(model, Prune(0.5, criterion=criterion), train=list(batches()))
    assert all((mask == 0).mean() == 0.5 for mask in made.masks.values())
    plain = whet.prune(model, Prune(0.5)).masks
    same = all(np.array_equal(plain[name], made.masks[name]) for name in plain)
    assert same == isinstance(criterion, Magnitude | UserCriterion)


def test_taylor_masks_are_those_of_the_gradient() -> None:
    model = small()
    x, y = (torch.from_numpy(np.asarray(a)) for a in next(iter(batches())))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    scores = (model.head.weight * model.head.weight.grad).abs().detach().numpy()
    model.zero_grad()
    made = whet.prune(model, Prune(0.5, criterion=Taylor(batches=1), include="head"), train=list(batches()))
    assert scores[made.masks["head.weight"] == 0].max() <= scores[made.masks["head.weight"] == 1].min()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(SpecError, match="Taylor needs data for its gradients: pass train="):
        whet.prune(small(), Prune(0.5, criterion=Taylor()))


@pytest.mark.parametrize(
    "spec", [Prune(granularity=NM(1, 4), schedule=Cosine(frequency=2)), Prune(0.75, schedule=Iterative(rounds=3))]
)
def test_patterns_and_schedules_in_the_users_own_loop(spec) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruner(model, spec, steps=12)
    data = [(torch.from_numpy(np.asarray(x)), torch.from_numpy(np.asarray(y))) for x, y in batches()]
    seen = []
    for step in range(12):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        seen.append(pruner.sparsity)
        for name, mask in pruner.masks.items():
            assert not model.get_parameter(name).detach().numpy()[mask == 0].any()
    assert seen == sorted(seen) and len(set(seen)) > 2 and pruner.is_done
    if isinstance(spec.granularity, NM):
        assert set(pruner.masks) == {"head.weight"} and (pruner.masks["head.weight"].reshape(3, 16, 4).sum(2) == 1).all()
    else:
        assert seen[-1] == 0.75


def test_nothing_that_fits_the_pattern_is_an_error() -> None:
    with pytest.raises(ModelError, match="are no multiple of 7"):
        whet.prune(small(), Prune(granularity=NM(2, 7)))
