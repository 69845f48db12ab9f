"""Coordinate descent ends where no single code can be improved, and never goes uphill."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.numerics.descent import coordinate_descent
from whet.numerics.gptq import gptq
from whet.numerics.moments import Quadratic, reconstruction, update
from whet.numerics.rounders import integer_rounder, with_mask
from whet.numerics.scales import absmax_scale


def problem(seed: int, rows: int = 4, columns: int = 12) -> tuple[np.ndarray, Quadratic]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, columns)) @ rng.normal(size=(columns, columns))
    weight = rng.normal(size=(rows, columns))
    return weight, reconstruction(weight, update(None, x, x + 0.1 * rng.normal(size=x.shape)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), columns=st.integers(1, 14), block=st.integers(1, 16), low=st.sampled_from([-8, -4, -2]))
def test_no_single_change_is_better_and_no_row_is_worse(seed, columns, block, low) -> None:
    weight, quadratic = problem(seed, columns=columns)
    scale = absmax_scale(weight, low, -low - 1)
    rounder = integer_rounder(scale, low, -low - 1, shape=weight.shape)
    codes, rounded = rounder(weight, np.arange(columns))
    found, value = coordinate_descent(codes, rounded, quadratic, rounder, sweeps=200, block=block)
    np.testing.assert_allclose(value, found * scale)
    error = quadratic.error(value)
    assert np.all(error <= quadratic.error(rounded) + 1e-9)
    for column, code in itertools.product(range(columns), range(low, -low)):
        changed = value.copy()
        changed[:, column] = code * scale[:, 0]
        assert np.all(quadratic.error(changed) >= error - 1e-9 * (1 + error))


def test_two_columns_that_only_move_together_textbook() -> None:
    """H = [[1, .9], [.9, 1]], w = (0.4, 0.4): (0, 0) costs 0.608, (1, 0) only 0.088; from (0, 0) one flip finds it."""
    hessian = np.array([[1.0, 0.9], [0.9, 1.0]])
    weight = np.array([[0.4, 0.4]])
    quadratic = Quadratic(hessian, weight @ hessian, np.einsum("rc,rc->r", weight @ hessian, weight))
    assert quadratic.error(np.zeros((1, 2)))[0] == pytest.approx(0.608)
    rounder = integer_rounder(1.0, -2, 1, shape=(1, 2))
    codes, value = coordinate_descent(np.zeros((1, 2), np.int32), np.zeros((1, 2)), quadratic, rounder)
    assert codes.tolist() == [[1, 0]] and quadratic.error(value)[0] == pytest.approx(0.088)


def test_codes_move_by_more_than_one_step() -> None:
    weight, quadratic = problem(5)
    rounder = integer_rounder(absmax_scale(weight, -8, 7), -8, 7, shape=weight.shape)
    start = np.full(weight.shape, 7, np.int32)
    codes, value = coordinate_descent(start, rounder(np.full(weight.shape, 1e9), np.arange(12))[1], quadratic, rounder)
    assert np.max(start - codes) > 3
    assert np.all(quadratic.error(value) < np.sum(weight**2, axis=1))


def test_it_improves_on_gptq() -> None:
    weight, quadratic = problem(6, rows=32, columns=48)
    rounder = integer_rounder(absmax_scale(weight, -4, 3), -4, 3, shape=weight.shape)
    first = gptq(weight, quadratic.hessian, rounder)
    _, value = coordinate_descent(first.codes, first.weight, quadratic, rounder)
    assert quadratic.error(value).sum() < 0.97 * quadratic.error(first.weight).sum()


def test_masks_dead_columns_and_inputs_are_left_alone() -> None:
    weight, quadratic = problem(7)
    hessian, linear = quadratic.hessian.copy(), quadratic.linear.copy()
    hessian[3] = hessian[:, 3] = 0.0
    linear[:, 3] = 0.0
    mask = np.random.default_rng(8).random(weight.shape) < 0.5
    rounder = with_mask(integer_rounder(absmax_scale(weight, -8, 7), -8, 7, shape=weight.shape), mask)
    codes, rounded = rounder(weight, np.arange(12))
    before = codes.copy(), rounded.copy()
    found, _ = coordinate_descent(codes, rounded, Quadratic(hessian, linear, quadratic.constant), rounder)
    assert np.all(found[~mask] == 0) and np.any(found != codes)
    np.testing.assert_array_equal(found[:, 3], codes[:, 3])
    np.testing.assert_array_equal(codes, before[0])
    np.testing.assert_array_equal(rounded, before[1])
