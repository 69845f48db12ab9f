"""Groups named by positions, in both frameworks."""

import numpy as np
import pytest
import torch

import whet
from residual_models import data_of, keras_resnet, torch_resnet
from whet.errors import ModelError, SpecError
from whet.specs import Group, Prune

X, _ = data_of("torch")
ONE = {"first.0.conv1.weight": {0: (1, 5)}}
WHOLE = {
    "first.0.conv1.weight": {0: (1, 5)},
    "first.0.norm1.weight": {0: (1, 5)},
    "first.0.norm1.bias": {0: (1, 5)},
    "first.0.conv2.weight": {1: (1, 5)},
}


def prune(positions, **options):
    return whet.prune(torch_resnet(), Prune(granularity=Group(positions, **options)), example=X, progress=False)


def test_a_complete_group_leaves_and_nothing_else():
    made = prune(WHOLE)
    assert {row["name"] for row in made.steps[0].changed} == set(WHOLE)
    original, block = torch_resnet().first[0], made.model.first[0]
    kept = [0, 2, 3, 4, 6, 7]
    assert torch.equal(block.conv1.weight, original.conv1.weight[kept])
    assert torch.equal(block.conv2.weight, original.conv2.weight[:, kept])
    assert torch.equal(block.norm1.running_var, original.norm1.running_var[kept]) and block.conv1.out_channels == 6


def test_what_is_coupled_is_named_or_taken_along():
    with pytest.raises(
        ModelError, match=r"coupled with first\.0\.norm1\.weight\[0\] \(1, 5\), .*first\.0\.conv2\.weight\[1\] \(1, 5\)"
    ):
        prune(ONE)
    one, two = prune(ONE, coupled=True), prune(WHOLE)
    assert np.array_equal(one.side.predict(one.model, X), two.side.predict(two.model, X))


@pytest.mark.parametrize(
    ("positions", "kind", "message"),
    [
        ({"conv": {0: (1,)}}, SpecError, "no such parameter. Its parameters: stem.weight"),
        ({"stem.weight": {4: (1,)}}, SpecError, r"axis 4 of 'stem.weight', whose shape is \(8, 3, 3, 3\)"),
        ({"stem.weight": {0: (8,)}}, SpecError, "position 8 of axis 0 of 'stem.weight', which has 8"),
        ({"head.weight": {0: (1,)}}, SpecError, "stays: an output of the model"),
        ({"first.0.conv1.weight": {0: tuple(range(8))}}, ModelError, "would leave nothing of 'first.0.conv1.weight'"),
    ],
)
def test_what_cannot_leave_is_said(positions, kind, message):
    with pytest.raises(kind, match=message):
        prune(positions, coupled=True)


def test_the_same_in_keras():
    model, (x, _) = keras_resnet(), data_of("keras")
    found = whet.groups(model, x)
    family = next(f for f in found.families if len(f.members) == 6 or "conv" in f.name)
    first = family.members[0]
    named = {first.tensor: {first.axis: tuple(first.positions[:2].ravel().tolist())}}
    with pytest.raises(ModelError, match="is coupled with"):
        whet.prune(model, Prune(granularity=Group(named)), example=x, progress=False)
    made = whet.prune(model, Prune(granularity=Group(named, coupled=True)), example=x, progress=False)
    row = next(row for row in made.steps[0].changed if row["name"] == first.tensor)
    assert row["shape"][first.axis] - row["left"][first.axis] == first.positions[:2].size
