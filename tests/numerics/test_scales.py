"""Scale searches against brute force, least-squares scales against their definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.numerics.moments import Quadratic
from whet.numerics.scales import absmax_scale, lsq_group_scales, lsq_scale, search_scale


def hessian_of(seed: int, columns: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(100, columns)) @ np.random.default_rng(seed + 1).normal(
        size=(columns, columns)
    )
    return x.T @ x / 100


def rounded(weight: np.ndarray, scale: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.clip(np.round(weight / scale), low, high) * scale


def test_absmax_textbook() -> None:
    weight = np.array([[0.7, -1.6], [0.0, 0.0], [1.4, -0.1]])
    np.testing.assert_allclose(absmax_scale(weight, -8, 7)[[0, 2], 0], [0.2, 0.2])
    assert absmax_scale(weight, -8, 7)[1, 0] == 2.0**-60
    np.testing.assert_allclose(absmax_scale(weight[:, :], -8, 7, group_size=1)[0], [0.1, 0.2])


@pytest.mark.parametrize("kind", ["plain", "diagonal", "full"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_is_as_good_as_a_fine_grid(kind, bits) -> None:
    weight = np.random.default_rng(bits).standard_t(4, size=(6, 30))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    hessian = {"plain": None, "diagonal": np.diag(hessian_of(1, 30)), "full": hessian_of(1, 30)}[kind]
    square = {"plain": np.eye(30), "diagonal": np.diag(np.diag(hessian_of(1, 30))), "full": hessian_of(1, 30)}[kind]

    def error(scale: np.ndarray) -> np.ndarray:
        missed = weight - rounded(weight, scale, low, high)
        return np.einsum("rc,cd,rd->r", missed, square, missed)

    found = error(search_scale(weight, low, high, hessian=hessian))
    top = np.abs(weight).max(axis=1, keepdims=True) / high
    brute = np.min([error(top * f) for f in np.linspace(0.15, 1.0, 1500)], axis=0)
    assert np.all(found <= 1.05 * brute)
    assert np.all(found <= error(absmax_scale(weight, low, high)) + 1e-12)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4), columns=st.integers(1, 20), group=st.integers(1, 24), kind=st.integers(0, 2), constant=st.booleans()
)
def test_groups_of_any_size(rows, columns, group, kind, constant) -> None:
    """A group's scale is the one it would have alone, also the last group, which may be smaller."""
    weight = np.full((rows, columns), 0.3) if constant else np.random.default_rng(columns).normal(size=(rows, columns))
    full = hessian_of(columns, columns)
    hessian = [None, np.diag(full), full][kind]
    found = search_scale(weight, -8, 7, hessian=hessian, group_size=group)
    assert found.shape == (rows, -(-columns // group)) and np.all(np.isfinite(found)) and np.all(found > 0)
    for index in range(found.shape[1]):
        part = slice(index * group, (index + 1) * group)
        own = None if hessian is None else hessian[part] if kind == 1 else hessian[part, part]
        np.testing.assert_allclose(found[:, [index]], search_scale(weight[:, part], -8, 7, hessian=own), rtol=1e-9)


def test_a_zero_row_has_the_floor_and_a_constant_row_is_exact() -> None:
    scale = search_scale(np.array([[0.0] * 5, [0.6] * 5, [-0.6] * 5]), -2, 1)
    assert scale[0, 0] == 2.0**-60
    np.testing.assert_allclose(rounded(np.array([[0.6] * 5]), scale[1:2], -2, 1), 0.6, rtol=0.02)
    np.testing.assert_allclose(rounded(np.array([[-0.6] * 5]), scale[2:3], -2, 1), -0.6, rtol=0.02)


def quadratic_of(seed: int, rows: int, columns: int) -> tuple[np.ndarray, Quadratic]:
    weight, hessian = np.random.default_rng(seed).normal(size=(rows, columns)), hessian_of(seed, columns)
    return weight, Quadratic(hessian, weight @ hessian, np.einsum("rc,cd,rd->r", weight, hessian, weight))


def test_the_least_squares_scale_is_the_bottom_of_the_parabola() -> None:
    weight, quadratic = quadratic_of(3, 5, 8)
    codes = np.round(weight / 0.4).astype(np.int32)
    scale = lsq_scale(codes, quadratic)
    best = quadratic.error(codes * scale)
    for factor in (0.99, 1.01):
        assert np.all(quadratic.error(codes * scale * factor) > best)
    shifted = codes + 3
    np.testing.assert_allclose(lsq_scale(shifted, quadratic, zero_point=3), scale)


def test_rows_without_a_positive_scale_are_nan() -> None:
    _, quadratic = quadratic_of(4, 2, 3)
    assert np.all(np.isnan(lsq_scale(np.zeros((2, 3), np.int32), quadratic)))
    flipped = -np.sign(quadratic.linear).astype(np.int32)
    assert np.all(np.isnan(lsq_scale(flipped, quadratic)))


@pytest.mark.parametrize("group", [3, 4, 10])
def test_group_scales_solve_their_system_together(group) -> None:
    weight, quadratic = quadratic_of(5, 4, 10)
    old = absmax_scale(weight, -8, 7, group_size=group)
    spread = np.repeat(old, group, axis=1)[:, :10]
    codes = np.clip(np.round(weight / spread), -8, 7).astype(np.int32)
    found = lsq_group_scales(codes, old, quadratic, group, damping=0.0)
    for row in range(4):
        columns = [np.where(np.arange(10) // group == g, codes[row], 0) for g in range(old.shape[1])]
        design = np.linalg.cholesky(quadratic.hessian).T @ np.stack(columns, axis=1)
        target = np.linalg.solve(np.linalg.cholesky(quadratic.hessian), quadratic.linear[row])
        np.testing.assert_allclose(found[row], np.linalg.lstsq(design, target, rcond=None)[0], rtol=1e-8)
    codes[:, :group] = 0
    assert np.array_equal(lsq_group_scales(codes, old, quadratic, group)[:, 0], old[:, 0])  # nothing to go by: as it was
