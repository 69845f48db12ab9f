"""Ranges seen batch by batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.observers import (
    HistogramRange,
    Range,
    channel_range,
    observe_histogram,
    observe_minmax,
    observe_moving_average,
)


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


def averaged(*batches: list[float], momentum: float = 0.9) -> Range:
    state = None
    for batch in batches:
        state = observe_moving_average(state, np.asarray(batch, np.float32), momentum, xp=xp)
    return state


def test_moving_average_by_hand() -> None:
    assert averaged([-1, 2]) == Range(-1, 2, 2)
    found = averaged([-1, 2], [], [-3, 4, 0], momentum=0.75)
    assert found == Range(-1.5, 2.5, 5)
    assert averaged([]).count == 0 and averaged([], [1]) == Range(1, 1, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_moving_average_never_forgets_a_bad_value(bad) -> None:
    assert not averaged([1, bad], [2], [3]).is_finite and not averaged([1], [bad, 2], [3]).is_finite


def gathered(*batches: np.ndarray, bins: int = 2048) -> HistogramRange:
    state = None
    for batch in batches:
        state = observe_histogram(state, np.asarray(batch, np.float32), xp=xp, bins=bins)
    return state


any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
size = st.floats(2.0**-30, 2.0**60, width=32)  # see HistogramRange on negative specks
no_speck = st.one_of(st.just(0.0), size, size.map(lambda value: -value))


def batches_of(elements):
    return st.lists(arrays(np.float32, st.integers(0, 40), elements=elements), max_size=5, min_size=1)


@given(batches=batches_of(no_speck), bins=st.sampled_from([16, 64, 2048]))
@settings(deadline=None)
def test_a_histogram_grown_batch_by_batch_is_that_of_all_values_at_once(batches, bins) -> None:
    together, grown = gathered(np.concatenate(batches), bins=bins), gathered(*batches, bins=bins)
    assert (grown.low, grown.high, grown.count) == (together.low, together.high, together.count)
    assert (grown.exponent, grown.start) == (together.exponent, together.start)
    np.testing.assert_array_equal(grown.counts, together.counts)
    assert grown.counts.sum() == grown.count and grown.counts.size <= bins


@given(batches=batches_of(any_float))
@settings(deadline=None)
def test_every_finite_value_is_counted(batches) -> None:
    state = gathered(*batches)
    assert state.counts.sum() == state.count == sum(batch.size for batch in batches)


@given(batches=batches_of(no_speck))
@settings(deadline=None)
def test_every_value_lies_in_the_bin_that_counts_it(batches) -> None:
    x = np.concatenate(batches).astype(np.float64)
    state = gathered(*batches)
    if not x.size:
        return
    wanted, _ = np.histogram(
        np.floor(x / state.width), bins=np.arange(state.start, state.start + state.counts.size + 1.0) - 0.5
    )
    np.testing.assert_array_equal(state.counts, wanted)
    assert state.edges[0] <= x.min() and x.max() < state.edges[-1]


def test_the_bins_are_as_narrow_as_the_range_allows() -> None:
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    for scale in (1.0, 3.3, 1e-6, 1e20):
        assert 1024 <= gathered(x * scale).counts.size <= 2048


def test_a_bad_batch_leaves_the_counts_and_marks_the_range() -> None:
    for bad in (float("nan"), float("inf")):
        state = gathered([1.0, 2.0], [bad, 3.0], [4.0])
        assert not state.is_finite and state.count == 5 and state.counts.sum() == 2
        assert not gathered([bad], [1.0]).is_finite
    assert gathered([]).count == 0 and gathered([], [2.0], []).range() == Range(2, 2, 1)


def test_torch_keras_and_a_counter_handed_in_give_the_same_histogram() -> None:
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("keras").ops
    from whet.keras.namespace import xp as keras_xp
    from whet.torch.namespace import xp as torch_xp

    x = np.random.default_rng(2).normal(size=(3, 40_000)).astype(np.float32)  # more than one chunk
    wanted = gathered(*x)

    def torch_counts(t, inverse_width, start, bins):
        return torch.bincount((t * inverse_width).floor().to(torch.int64) - start, minlength=bins).numpy()

    for make, space, more in (
        (torch.from_numpy, torch_xp, {}),
        (torch.from_numpy, torch_xp, {"count": torch_counts}),
        (ops.convert_to_tensor, keras_xp, {}),
    ):
        state, averages, expected = None, None, None
        for batch in x:
            state = observe_histogram(state, make(batch), xp=space, **more)
            averages = observe_moving_average(averages, make(batch), xp=space)
            expected = observe_moving_average(expected, batch, xp=xp)
        np.testing.assert_array_equal(state.counts, wanted.counts)
        assert state.range() == wanted.range() and averages == expected
