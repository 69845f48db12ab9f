"""Moments: a stream gives what all rows give at once, and the quadratic is the mean squared error it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.errors import DataError
from whet.numerics.moments import Quadratic, merge, reconstruction, update


def rows(seed: int, n: int = 300, columns: int = 5, offset: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, columns)) @ rng.normal(size=(columns, columns)) + offset


def test_textbook() -> None:
    found = update(None, np.array([[1.0, 2.0], [3.0, -4.0]]), np.array([[1.0, 1.0], [2.0, 0.0]]))
    np.testing.assert_array_equal(found.second, [[5, -5], [-5, 10]])
    np.testing.assert_array_equal(found.cross, [[3.5, 0.5], [-3, 1]])  # row: x, column: x̂
    np.testing.assert_array_equal(found.second_quantized, [[2.5, 0.5], [0.5, 0.5]])
    np.testing.assert_array_equal(found.mean, [2, -1])
    np.testing.assert_array_equal(found.absmax, [3, 4])
    assert found.count == 2 and found.inputs is found.second_quantized


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), cut=st.lists(st.integers(1, 299), max_size=4, unique=True))
def test_a_stream_equals_all_at_once(seed, cut) -> None:
    x = rows(seed)
    state = None
    for part in np.split(x, sorted(cut)):
        state = update(state, part, np.round(part))
    whole = update(None, x, np.round(x))
    for name in ("second", "cross", "second_quantized", "mean", "mean_quantized"):
        np.testing.assert_allclose(getattr(state, name), getattr(whole, name), rtol=1e-10, atol=1e-10)
    assert state.count == 300


def test_blocks_of_float32_sum_in_float64() -> None:
    x = np.full((200_000, 1), 0.1, np.float32)
    found = update(None, x)
    assert found.second.dtype == np.float64
    assert found.second[0, 0] == pytest.approx(float(np.float32(0.1)) ** 2, rel=1e-6)
    assert found.mean[0] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_merging_is_weighted_by_rows() -> None:
    a, b = rows(1, 10), rows(2, 200)
    np.testing.assert_allclose(merge(update(None, a), update(None, b)).second, update(None, np.vstack([a, b])).second)


@pytest.mark.parametrize("with_quantized", [False, True])
def test_the_quadratic_is_the_mean_squared_error(with_quantized) -> None:
    x, weight = rows(3), np.random.default_rng(4).normal(size=(4, 5))
    seen = np.round(x * 2) / 2 if with_quantized else x
    moments = update(None, x, seen if with_quantized else None)
    rounded = np.round(weight)
    wanted = np.mean((x @ weight.T - seen @ rounded.T) ** 2, axis=0)
    np.testing.assert_allclose(reconstruction(weight, moments).error(rounded), wanted, rtol=1e-9)
    difference = x @ weight.T - seen @ rounded.T
    np.testing.assert_allclose(reconstruction(weight, moments.centered()).error(rounded), difference.var(axis=0), rtol=1e-9)


def test_the_quadratic_of_other_targets() -> None:
    x, rng = rows(5), np.random.default_rng(6)
    target, rounded = rng.normal(size=(300, 3)), rng.normal(size=(3, 5))
    quadratic = Quadratic(x.T @ x / 300, target.T @ x / 300, np.mean(target**2, axis=0))
    np.testing.assert_allclose(quadratic.error(rounded), np.mean((target - x @ rounded.T) ** 2, axis=0), rtol=1e-9)


def test_a_constant_column_is_dead_once_centered() -> None:
    x = rows(7)
    x[:, 2] = 1e3
    centered = update(None, x).centered()
    assert np.all(centered.second[2] == 0) and np.all(centered.second[:, 2] == 0) and centered.second[0, 0] > 0


def test_bad_inputs_are_named() -> None:
    with pytest.raises(DataError, match="at least one row"):
        update(None, np.zeros((0, 3)))
    with pytest.raises(DataError, match=r"\(rows, columns\)"):
        update(None, np.zeros((2, 3, 4)))
    with pytest.raises(DataError, match="NaN or Inf"):
        update(None, np.array([[1.0, np.nan]]))
    with pytest.raises(DataError, match="5 columns before"):
        update(update(None, rows(1)), np.zeros((2, 3)))
    with pytest.raises(DataError, match="every batch or for none"):
        update(update(None, rows(1)), rows(2), rows(2))
    with pytest.raises(DataError, match="pair up"):
        update(None, rows(1), rows(2)[:5])
    with pytest.raises(DataError, match=r"\(rows, 5\)"):
        reconstruction(np.zeros((2, 4)), update(None, rows(1)))
