"""How many groups a family may lose, and what that loses."""

import numpy as np
import pytest

from residual_models import data_of, torch_resnet
from whet.numerics.allocation import round_kept
from whet.numerics.criteria import normalised
from whet.specs import Channel, Prune
from whet.torch.removable import removable

X, _ = data_of("torch")


@pytest.fixture(scope="module")
def found():
    return removable(torch_resnet(16), Prune(0.5, granularity=Channel()), example=X, data=None)


def test_options_are_the_widths_that_rounding_allows(found):
    for family in found.families:
        width = len(family)
        for step in (1, 4, 8):
            options = found.options(family, round_to=step, most=100)
            assert options == sorted({0, *(round_kept(width, lost, step=step) for lost in range(1, width))} - {width})
            few = found.options(family, round_to=step, most=3)
            assert len(few) <= 3 and few[0] == 0 and few[-1] == options[-1] and set(few) <= set(options)
        assert max(found.options(family, round_to=1, most=100, least_kept=0.5)) == width // 2


def test_an_option_loses_the_sum_of_the_lowest_scores(found):
    scores = np.sort(normalised(found.scores[0]))
    assert found.losses(0, [0, 1, 3]) == pytest.approx([0.0, scores[0], scores[:3].sum()])


def test_the_same_groups_are_silenced_and_named(found):
    lost = [1] + [0] * (len(found.families) - 1)
    gone, named = found.gone(lost), found.named(lost)
    first = found.families[0].members[0]
    lowest = int(np.argmin(found.scores[0]))
    assert gone.sum() == 1 and gone[found.families[0].roots[lowest]]
    assert named.positions == {first.tensor: {first.axis: tuple(sorted(first.positions[lowest].tolist()))}} and named.coupled
    before = found.predict(X)
    with found.silenced(gone):
        assert not np.allclose(found.predict(X), before)
    assert np.array_equal(found.predict(X), before)
