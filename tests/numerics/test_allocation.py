"""How much each layer loses."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.numerics.allocation import (
    erk_densities,
    ranked_counts,
    ranked_within,
    round_kept,
    rounded_counts,
    uniform_counts,
)

SHAPES = [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 64)]


def test_erk_by_hand() -> None:
    """ResNet-like shapes at 80 %: the first layer and the classifier stay whole, the rest follow (n_in + n_out + k + k) / size."""
    found = erk_densities(SHAPES, 0.2)
    sizes = [math.prod(shape) for shape in SHAPES]
    assert sum(d * n for d, n in zip(found, sizes, strict=True)) == pytest.approx(0.2 * sum(sizes))
    raw = [sum(shape) / math.prod(shape) for shape in SHAPES]
    assert found[1] / found[2] == pytest.approx(raw[1] / raw[2]) and found[0] == found[3] == 1.0


@given(st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=6), st.floats(0.01, 1))
def test_erk_keeps_the_density_and_never_more_than_all(shapes, density) -> None:
    found = erk_densities(shapes, density)
    sizes = [math.prod(shape) for shape in shapes]
    assert all(-1e-9 <= d <= 1 + 1e-9 for d in found)
    assert sum(d * n for d, n in zip(found, sizes, strict=True)) == pytest.approx(density * sum(sizes), rel=1e-6)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.floats(0, 1))
def test_rounded_counts_sum_to_the_total_where_that_can_be(sizes, share) -> None:
    total = round(share * sum(sizes))
    counts = rounded_counts(sizes, [share] * len(sizes), total)
    assert sum(counts) >= min(total, sum(n - 1 for n in sizes)) - 0 and all(
        0 <= c < n for c, n in zip(counts, sizes, strict=True)
    )
    assert sum(counts) <= max(total, sum(math.floor(min(share * n, n - 1)) for n in sizes))


def test_uniform_is_half_to_even_and_leaves_one() -> None:
    assert uniform_counts([5, 7, 1, 2], 0.5) == [2, 4, 0, 1] and uniform_counts([3], 0.99) == [2]


def test_global_ranking_by_hand() -> None:
    scores = [np.asarray([1.0, 5.0, 6.0, 7.0]), np.asarray([2.0, 3.0, 4.0, 8.0])]
    assert ranked_counts(scores, 0.5) == [1, 3]
    assert ranked_counts(scores, 0.5, most=0.5) == [2, 2]
    assert ranked_counts([np.zeros(4), np.zeros(4)], 0.5) == [3, 1]  # ties by position, never all of a layer


def test_isomorphic_ranking_stays_within_a_kind() -> None:
    scores = [np.asarray([1.0, 2, 3, 4]), np.asarray([5.0, 6, 7, 8]), np.asarray([0.1, 0.2, 0.3, 9])]
    assert ranked_within(scores, ["a", "b", "a"], 0.5) == [1, 2, 3]


@given(st.integers(1, 200), st.floats(0, 1), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 3))
def test_what_is_left_is_a_multiple_or_nothing_leaves(size, share, step, width) -> None:
    lost = min(round(share * size), size - 1)
    found = round_kept(size, lost, step=step, width=width)
    assert 0 <= found < size
    assert found == 0 or (size - found) * width % step == 0
    best = [n for n in range(1, size) if (size - n) * width % step == 0]
    assert all(abs(found - lost) <= abs(n - lost) for n in best) or lost == 0


def test_rounding_sees_the_rest_of_the_axis() -> None:
    assert (
        round_kept(16, 5, step=8, others=16) == 8
        and round_kept(20, 5, step=8) == 4
        and round_kept(20, 5, step=8, others=4) == 8
    )
    assert round_kept(6, 3, step=8) == 0
