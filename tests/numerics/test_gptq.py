"""GPTQ against an explicit loop over the shrinking inverse, its promises at the edges, and its trade."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.errors import ModelError, SpecError
from whet.numerics.gptq import DAMPING, damped_factor, gptq, least_squares_target
from whet.numerics.moments import Quadratic, reconstruction, update
from whet.numerics.rounders import codebook_rounder, expand_groups, integer_rounder, with_mask
from whet.numerics.scales import absmax_scale


def problem(seed: int, rows: int = 6, columns: int = 20, samples: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, columns)) @ rng.normal(size=(columns, columns)) * np.exp(rng.normal(size=columns))
    return rng.normal(size=(rows, columns)), x.T @ x / samples


def naive(weight, hessian, rounder, order) -> np.ndarray:
    """Optimal brain quantization in a given order: the inverse of what is left shrinks by Gaussian elimination.

    (Frantar & Alistarh 2022, arXiv:2208.11580, eq. 2-4, for every row the same order.)
    """
    current, rounded = weight.copy(), np.zeros_like(weight)
    diagonal = np.diag(hessian)
    inverse = np.linalg.inv(hessian + DAMPING * diagonal.mean() * np.eye(len(hessian)))
    left = list(order)
    for j in order:
        rounded[:, j] = rounder(current[:, [j]], np.array([j]))[1][:, 0]
        error = (current[:, j] - rounded[:, j]) / inverse[j, j]
        for k in left:
            current[:, k] -= error * inverse[j, k]
        inverse = inverse - np.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
        left.remove(j)
    return rounded


@pytest.mark.parametrize("block", [3, 16, 128])
@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("columns", [1, 20, 37])
def test_equals_the_naive_loop(columns, activation_order, block) -> None:
    weight, hessian = problem(columns, columns=columns)
    rounder = integer_rounder(absmax_scale(weight, -8, 7), -8, 7, shape=weight.shape)
    order = np.argsort(-np.diag(hessian), kind="stable") if activation_order else np.arange(columns)
    found = gptq(weight, hessian, rounder, activation_order=activation_order, block=block)
    np.testing.assert_allclose(found.weight, naive(weight, hessian, rounder, order), rtol=0, atol=1e-12)
    assert found.damping == DAMPING


def test_the_trade_weight_error_up_output_error_down() -> None:
    weight, hessian = problem(0, rows=32, columns=64)
    rounder = integer_rounder(absmax_scale(weight, -4, 3), -4, 3, shape=weight.shape)
    nearest = rounder(weight, np.arange(64))[1]
    found = gptq(weight, hessian, rounder).weight

    def output(rounded: np.ndarray) -> float:
        return float(np.einsum("rc,cd,rd->", weight - rounded, hessian, weight - rounded))

    assert np.sum((weight - found) ** 2) > np.sum((weight - nearest) ** 2)
    assert output(found) < 0.5 * output(nearest)


def test_float32_gives_the_codes_of_float64_nearly_everywhere() -> None:
    weight, hessian = problem(1, rows=32, columns=64)
    rounder = integer_rounder(absmax_scale(weight, -8, 7), -8, 7, shape=weight.shape)
    single = gptq(weight.astype(np.float32), hessian, rounder)
    assert single.weight.dtype == np.float32
    assert np.mean(single.codes != gptq(weight, hessian, rounder).codes) < 0.02


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), columns=st.integers(1, 40), rows=st.integers(1, 5))
def test_a_diagonal_hessian_is_rounding_to_nearest_in_any_order(seed, columns, rows) -> None:
    rng = np.random.default_rng(seed)
    weight, hessian = rng.normal(size=(rows, columns)), np.diag(rng.random(columns) + 0.1)
    rounder = integer_rounder(absmax_scale(weight, -8, 7), -8, 7, shape=weight.shape)
    codes, rounded = rounder(weight, np.arange(columns))
    for activation_order in (True, False):
        found = gptq(weight, hessian, rounder, activation_order=activation_order)
        np.testing.assert_array_equal(found.codes, codes)
        np.testing.assert_allclose(found.weight, rounded, atol=1e-15)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), columns=st.integers(2, 30), samples=st.integers(1, 8), dead=st.integers(0, 29))
def test_singular_moments_and_dead_columns(seed, columns, samples, dead) -> None:
    """Fewer samples than columns, and one input that is always zero: finite, in range, the dead column to nearest."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, columns))
    x[:, dead % columns] = 0
    weight = rng.normal(size=(3, columns))
    rounder = integer_rounder(absmax_scale(weight, -8, 7), -8, 7, shape=weight.shape)
    found = gptq(weight, x.T @ x / samples, rounder, damping=0.0)
    assert np.all(np.isfinite(found.weight)) and found.codes.min() >= -8 and found.codes.max() <= 7
    np.testing.assert_array_equal(found.codes[:, dead % columns], rounder(weight, np.arange(columns))[0][:, dead % columns])


def test_a_dead_column_alone_needs_no_damping() -> None:
    weight, hessian = problem(10, columns=6)
    hessian[2] = hessian[:, 2] = 0.0
    rounder = integer_rounder(absmax_scale(weight, -8, 7), -8, 7, shape=weight.shape)
    found = gptq(weight, hessian, rounder, damping=0.0)
    alive = np.array([0, 1, 3, 4, 5])
    assert found.damping == 0.0
    others = gptq(
        weight[:, alive],
        hessian[np.ix_(alive, alive)],
        integer_rounder(absmax_scale(weight, -8, 7), -8, 7, shape=(6, 5)),
        damping=0.0,
    )
    np.testing.assert_array_equal(found.codes[:, alive], others.codes)


def test_damping_is_raised_until_the_factor_exists_and_reported() -> None:
    weight, _ = problem(2, columns=6)
    x = np.ones((4, 6))
    rounder = integer_rounder(1.0, -8, 7, shape=weight.shape)
    assert gptq(weight, x.T @ x, rounder, damping=0.0).damping > 0
    indefinite = np.eye(6)
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    factor, used = damped_factor(indefinite, 0.01, np.arange(6))
    assert used == pytest.approx(1.0)  # 1.5 below zero at 1 + λ: 0.01 and 0.1 do not do
    np.testing.assert_allclose(factor @ factor.T, indefinite + used * np.eye(6), atol=1e-12)
    assert np.all(np.tril(factor, -1) == 0)


def test_bad_moments_are_errors() -> None:
    weight, hessian = problem(3)
    rounder = integer_rounder(1.0, -8, 7, shape=weight.shape)
    with pytest.raises(ModelError, match="NaN or Inf"):
        gptq(weight, hessian * np.nan, rounder)
    with pytest.raises(ModelError, match="No damping"):
        gptq(weight, np.ones((20, 20)) * -1e9 + np.eye(20) * 1e9 * 1.00001, rounder)


def test_pruned_weights_stay_exactly_zero_and_others_make_up_for_them() -> None:
    weight, hessian = problem(4, rows=16, columns=32)
    mask = np.random.default_rng(5).random(weight.shape) < 0.6
    pruned = weight * mask
    plain = integer_rounder(absmax_scale(weight, -8, 7), -8, 7, shape=weight.shape)
    found = gptq(pruned, hessian, with_mask(plain, mask))
    assert np.all(found.codes[~mask] == 0) and np.all(found.weight[~mask] == 0)
    nearest = plain(pruned, np.arange(32))[1]

    def output(rounded: np.ndarray) -> float:
        return float(np.einsum("rc,cd,rd->", pruned - rounded, hessian, pruned - rounded))

    assert output(found.weight) < output(nearest)


def test_groups_and_zero_points() -> None:
    weight, hessian = problem(6, rows=4, columns=10)
    scale, zero = np.abs(np.random.default_rng(7).normal(size=(4, 3))) + 0.1, np.array([[3.0, 8.0, 5.0]] * 4)
    rounder = integer_rounder(scale, 0, 15, shape=weight.shape, zero_point=zero, group_size=4)
    found = gptq(weight, hessian, rounder)
    np.testing.assert_allclose(found.weight, (found.codes - expand_groups(zero, 4, 10)) * expand_groups(scale, 4, 10))
    assert found.codes.min() >= 0 and found.codes.max() <= 15
    with pytest.raises(SpecError, match="2 groups for 3 groups"):
        integer_rounder(scale[:, :2], 0, 15, shape=weight.shape, group_size=4)


@pytest.mark.parametrize("per_row", [False, True])
def test_codebooks(per_row) -> None:
    weight, hessian = problem(8, rows=8, columns=24)
    levels = np.array([-1.0, -0.4, -0.1, 0.0, 0.2, 0.5, 1.0])
    scale = np.abs(weight).max(axis=1, keepdims=True)
    rounder = codebook_rounder(np.tile(levels, (8, 1)) if per_row else levels, scale, shape=weight.shape)
    codes, nearest = rounder(weight, np.arange(24))
    wanted = np.abs(weight[..., None] - levels * scale[..., None]).argmin(axis=2)
    np.testing.assert_array_equal(codes, wanted)
    found = gptq(weight, hessian, rounder)
    np.testing.assert_allclose(found.weight, levels[found.codes] * scale)
    error = [np.einsum("rc,cd,rd->", weight - w, hessian, weight - w) for w in (nearest, found.weight)]
    assert error[1] < error[0]


def test_codebooks_must_ascend() -> None:
    with pytest.raises(SpecError, match="ascend"):
        codebook_rounder([0.0, 1.0, 0.5], shape=(1, 1))


def test_the_target_for_quantized_inputs_is_the_least_squares_weight() -> None:
    rng = np.random.default_rng(9)
    x = rng.normal(size=(500, 8)) @ rng.normal(size=(8, 8))
    seen = np.round(x)
    weight = rng.normal(size=(3, 8))
    quadratic = reconstruction(weight, update(None, x, seen))
    wanted = np.linalg.lstsq(seen, x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(least_squares_target(quadratic), wanted, atol=1e-9)
    strongly = least_squares_target(quadratic.damped(weight, 100.0))
    assert np.max(np.abs(strongly - weight)) < 0.1 * np.max(np.abs(wanted - weight))  # damping pulls towards the weight
    assert np.all(quadratic.error(wanted) <= quadratic.error(weight))


def test_a_dead_columns_target_is_the_weight_itself() -> None:
    hessian = np.diag([1.0, 0.0, 2.0])
    weight = np.array([[1.0, 5.0, -2.0]])
    quadratic = Quadratic(hessian, weight @ hessian, np.array([1.0]))
    np.testing.assert_allclose(least_squares_target(quadratic.damped(weight, 0.1)), weight)
