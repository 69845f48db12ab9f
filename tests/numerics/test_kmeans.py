"""One-dimensional k-means against every division there is, and against scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from whet.errors import DataError, SpecError
from whet.numerics.kmeans import EXACT, kmeans_levels, squared_error


def least_error(x: np.ndarray, clusters: int, weights: np.ndarray | None = None, *, zero: bool = False) -> float:
    """The least error of all divisions of the sorted values into intervals, one of them about zero if asked."""
    order = np.argsort(x, kind="stable")
    x, h = x[order], (np.ones_like(x) if weights is None else weights)[order]
    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(x.size + 1), clusters - 1):
        ends = [0, *cuts, x.size]
        parts = [(x[a:b], h[a:b]) for a, b in itertools.pairwise(ends)]
        own = [float(np.sum(w * (v - np.average(v, weights=w)) ** 2)) if w.sum() > 0 else 0.0 for v, w in parts]
        about_zero = [float(np.sum(w * v**2)) for v, w in parts]
        total = sum(own)
        best = min([best, *(total - a + b for a, b in zip(own, about_zero, strict=True))] if zero else [best, total])
    return best


values = arrays(np.float64, st.integers(1, 9), elements=st.floats(-8, 8, width=16).map(lambda v: round(v, 3)))


@given(x=values, clusters=st.integers(1, 4), zero=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=150)
def test_no_division_has_less_error(x, clusters, zero, data) -> None:
    weights = data.draw(st.none() | arrays(np.float64, x.size, elements=st.sampled_from([0.0, 0.5, 1.0, 3.0])))
    importance = None if weights is None else weights[None]
    levels = kmeans_levels(x[None], clusters, importance=importance, keep_zero=zero)
    assert levels.shape == (1, clusters) and levels.dtype == np.float32 and np.all(np.diff(levels) >= 0)
    assert not zero or 0 in levels
    found = squared_error(x[None], levels, importance=importance)[0]
    assert found <= least_error(x, clusters, weights, zero=zero) * (1 + 1e-5) + 1e-10


def test_by_hand() -> None:
    """Three pairs far apart; with a level at zero the pair about it gives way."""
    x = np.asarray([[1.0, 2.0, 11.0, 12.0, -7.0, -8.0]])
    np.testing.assert_array_equal(kmeans_levels(x, 3), [[-7.5, 1.5, 11.5]])
    np.testing.assert_array_equal(kmeans_levels(x, 3, keep_zero=True), [[-7.5, 0.0, 11.5]])
    np.testing.assert_array_equal(kmeans_levels(x, 1), np.asarray([[11 / 6]], np.float32))
    np.testing.assert_array_equal(kmeans_levels(x, 1, keep_zero=True), [[0.0]])
    weighed = kmeans_levels(x, 3, importance=np.asarray([1.0, 3.0, 1.0, 1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(weighed, [[-7.5, 1.75, 11.5]])
    np.testing.assert_allclose(squared_error(x, np.asarray([[-7.5, 1.5, 11.5]])), [1.5])


def test_few_distinct_values_are_exact_and_the_greatest_level_repeats() -> None:
    x = np.asarray([[0.5, -1.0, 0.5, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]], np.float32)
    levels = kmeans_levels(x, 4)
    np.testing.assert_array_equal(np.unique(levels[0]), [-1, 0.5, 3])
    np.testing.assert_array_equal(levels[1], [2, 2, 2, 2])
    np.testing.assert_array_equal(squared_error(x, levels), [0, 0])
    np.testing.assert_array_equal(kmeans_levels(np.zeros((2, 0)), 3), np.zeros((2, 3)))


def test_rows_are_solved_each_for_itself() -> None:
    x = np.random.default_rng(0).normal(size=(7, 50)) * np.logspace(-12, 12, 7)[:, None]
    together = kmeans_levels(x, 5)
    np.testing.assert_array_equal(together, np.concatenate([kmeans_levels(row[None], 5) for row in x]))


def test_values_far_from_zero_keep_their_digits() -> None:
    x = 1e4 + np.asarray([[0.0, 0.125, 1.0, 1.125]])
    np.testing.assert_allclose(kmeans_levels(x.astype(np.float32), 2), [[1e4 + 0.0625, 1e4 + 1.0625]], rtol=1e-7)


def pruned(size: int) -> np.ndarray:
    rng = np.random.default_rng(4)
    return np.where(rng.random((1, size)) < 0.8, 0.0, rng.normal(size=(1, size))).astype(np.float32)


def test_a_pruned_weight_keeps_its_zeros_exactly() -> None:
    for size in (EXACT, 40_000):
        levels = kmeans_levels(pruned(size), 8, keep_zero=True)
        assert np.count_nonzero(levels == 0) == 1
        free = squared_error(pruned(size), kmeans_levels(pruned(size), 8))[0]
        assert squared_error(pruned(size), levels)[0] <= free * 1.02


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_a_row_too_long_for_the_exact_solution_is_as_good(monkeypatch, zero, weighed) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_t(3, size=(2, 3 * EXACT)).astype(np.float32)
    importance = rng.random(x.shape) if weighed else None
    near = squared_error(x, kmeans_levels(x, 12, importance=importance, keep_zero=zero), importance=importance)
    monkeypatch.setattr("whet.numerics.kmeans.EXACT", 10**9)
    exact = squared_error(x, kmeans_levels(x, 12, importance=importance, keep_zero=zero), importance=importance)
    assert np.all(exact <= near * (1 + 1e-6)) and np.all(near <= exact * 1.001)


def test_blocks_change_nothing(monkeypatch) -> None:
    x = np.random.default_rng(1).normal(size=(1, 10_000)).astype(np.float32)
    importance = np.random.default_rng(2).random(x.shape)
    whole = [kmeans_levels(x, 8), kmeans_levels(x, 8, importance=importance)]
    monkeypatch.setattr("whet.numerics.kmeans.UNBLOCKED", 0)
    np.testing.assert_allclose([kmeans_levels(x, 8), kmeans_levels(x, 8, importance=importance)], whole, rtol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "laplace", "bimodal"])
def test_the_error_is_not_worse_than_scikit_learns(kind) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(7)
    draw = {
        "normal": lambda: rng.normal(size=50_000),
        "laplace": lambda: rng.laplace(size=50_000),
        "bimodal": lambda: rng.normal(size=50_000) + rng.choice([-4.0, 3.0], 50_000),
    }
    x = draw[kind]().astype(np.float32)[None]
    peer = cluster.KMeans(16, n_init=1, random_state=0, tol=0, max_iter=1000).fit(x.T.astype(np.float64))
    assert squared_error(x, kmeans_levels(x, 16))[0] <= squared_error(x, peer.cluster_centers_.T)[0] * (1 + 1e-6)


def test_what_cannot_be_clustered_is_named() -> None:
    with pytest.raises(SpecError, match="at least 1 cluster, got 0"):
        kmeans_levels(np.zeros((1, 3)), 0)
    with pytest.raises(DataError, match="NaN or Inf"):
        kmeans_levels(np.asarray([[0.0, np.nan]]), 2)
    with pytest.raises(DataError, match=r"got the shape \(3,\)"):
        kmeans_levels(np.zeros(3), 2)
    with pytest.raises(DataError, match="not negative"):
        kmeans_levels(np.zeros((1, 3)), 2, importance=np.asarray([[1.0, -1.0, 1.0]]))
