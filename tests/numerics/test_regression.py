"""Moments of inputs and wanted outputs, against sums written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.errors import DataError
from whet.numerics.regression import merged, reconstructed, regression

RNG = np.random.default_rng(0)
X = RNG.normal(0.5, 1.0, (200, 6))
WEIGHT = RNG.normal(size=(4, 6))
T = X @ WEIGHT.T + RNG.normal(0, 0.1, (200, 4)) + np.asarray([3.0, -1.0, 0.0, 2.0])


def test_the_error_with_a_given_bias_is_the_mean_squared_error():
    bias, rounded = RNG.normal(size=4), np.round(WEIGHT)
    error = regression(X, T).quadratic(bias).error(rounded)
    np.testing.assert_allclose(error, np.mean((T - X @ rounded.T - bias) ** 2, axis=0), rtol=1e-9)


def test_the_error_with_a_free_bias_is_the_least_over_all_biases():
    state, rounded = regression(X, T), np.round(WEIGHT)
    bias = state.free_bias(rounded)
    best = np.mean((T - X @ rounded.T - bias) ** 2, axis=0)
    np.testing.assert_allclose(state.quadratic(None).error(rounded), best, rtol=1e-9)
    np.testing.assert_allclose(np.mean(T - X @ rounded.T - bias, axis=0), 0, atol=1e-12)
    for shift in (-0.1, 0.1):
        assert np.all(np.mean((T - X @ rounded.T - bias - shift) ** 2, axis=0) > best)


def test_variances_are_those_of_the_outputs():
    state = regression(X, T)
    np.testing.assert_allclose(state.target_variance, T.var(axis=0), rtol=1e-9)
    np.testing.assert_allclose(state.output_variance(WEIGHT), (X @ WEIGHT.T).var(axis=0), rtol=1e-9)


def test_blocks_merge_to_the_whole():
    state = None
    for rows in (slice(0, 30), slice(30, 31), slice(31, 200)):
        state = merged(state, regression(X[rows], T[rows]))
    whole = regression(X, T)
    assert state.count == whole.count == 200
    for name in ("second", "mean", "absmax", "cross", "target_mean", "target_second"):
        np.testing.assert_allclose(getattr(state, name), getattr(whole, name), rtol=1e-10)


def test_what_does_not_pair_up_or_is_not_finite_is_refused():
    with pytest.raises(DataError, match="pair up"):
        regression(X, T[:-1])
    with pytest.raises(DataError, match="pair up"):
        regression(X[:0], T[:0])
    broken = X.copy()
    broken[3, 2] = np.inf
    with pytest.raises(DataError, match="NaN or Inf"):
        regression(broken, T)


def test_a_reconstructed_weight_is_the_ridge_regression_on_what_is_left():
    near, rows = RNG.normal(size=(4, 6)), np.asarray([True, False, True, True])
    columns = np.asarray([True, True, False, True, False, True])
    found = reconstructed(regression(X, T).part(rows, columns), near[np.ix_(rows, columns)], None, 0.3)
    x, t = (X - X.mean(0))[:, columns], T - T.mean(0)
    ridge = (0.3 + 4 / 200) * np.mean(np.mean(x**2, axis=0))  # of the mean square, as the errors are means
    wanted = np.linalg.solve(x.T @ x / 200 + ridge * np.eye(4), x.T @ t / 200 + ridge * near[:, columns].T).T
    np.testing.assert_allclose(found, wanted[rows], rtol=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.0, 1.0))
def test_a_reconstructed_weight_is_never_worse_than_the_silenced_one(seed, left, damping):
    rng = np.random.default_rng(seed)
    x, near, bias = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(3, 6)), rng.normal(size=3)
    state = regression(x, x @ near.T + bias).part(np.ones(3, bool), np.arange(6) < left)
    silenced = near[:, :left]
    for fixed in (None, bias):
        error = state.quadratic(fixed)
        found = reconstructed(state, silenced, fixed, damping)
        assert np.all(error.error(found) <= error.error(silenced) * (1 + 1e-9) + 1e-9)


def test_a_part_is_the_moments_of_some_inputs_and_outputs():
    rows, columns = np.asarray([True, False, True, True]), np.arange(6) % 2 == 0
    part, alone = regression(X, T).part(rows, columns), regression(X[:, columns], T[:, rows])
    for name in ("second", "mean", "absmax", "cross", "target_mean", "target_second"):
        np.testing.assert_allclose(getattr(part, name), getattr(alone, name), rtol=1e-12)
    assert part.count == alone.count
