"""Ranges seen batch by batch."""

from __future__ import annotations

import numpy as np
import pytest

from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.observers import Range, channel_range, observe_minmax


def seen(*batches: list[float]) -> Range:
    state = None
    for batch in batches:
        state = observe_minmax(state, np.asarray(batch, np.float32), xp=xp)
    return state


def test_min_max_over_batches() -> None:
    assert seen([1, 2], [-3], [0.5]) == Range(-3, 2, 4)
    assert seen([], [1], []) == Range(1, 1, 1)
    assert seen([]).count == 0


@pytest.mark.parametrize("batches", [([float("nan")], [1]), ([1], [float("nan")]), ([1], [2, float("nan")], [3])])
def test_a_nan_stays_visible_wherever_it_came(batches) -> None:
    assert not seen(*batches).is_finite


def test_infinity_stays_visible() -> None:
    assert (
        not seen([1], [float("inf")], [2]).is_finite and not seen([-float("inf")], [2]).is_finite and seen([1], [2]).is_finite
    )


def test_channel_range() -> None:
    weight = np.asarray([[1.0, -2.0], [3.0, 4.0]])
    low, high = channel_range(weight, 0, xp=xp)
    np.testing.assert_array_equal([low, high], [[-2, 3], [1, 4]])
    low, high = channel_range(weight, -1, xp=xp)
    np.testing.assert_array_equal([low, high], [[1, -2], [3, 4]])
    assert channel_range(weight, None, xp=xp) == (-2, 4)
    low, high = channel_range(np.asarray([1.0, -2.0]), 0, xp=xp)
    np.testing.assert_array_equal([low, high], [[1, -2], [1, -2]])
