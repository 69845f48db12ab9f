"""Equalization keeps the function and evens the ranges; clipped normals against integration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.errors import SpecError
from whet.numerics.equalization import (
    absorb_bias,
    analytic_bias_correction,
    clipped_normal,
    cross_layer_factors,
    equalize,
    smooth_factors,
)


def test_cross_layer_textbook() -> None:
    factors = cross_layer_factors(np.array([4.0, 1.0, 0.25]), np.array([1.0, 1.0, 4.0]))
    np.testing.assert_allclose(factors, [2.0, 1.0, 0.25])
    np.testing.assert_allclose(np.array([4.0, 1.0, 0.25]) / factors, [2, 1, 1])  # both become √(r₁ r₂)
    np.testing.assert_allclose(np.array([1.0, 1.0, 4.0]) * factors, [2, 1, 1])


@given(seed=st.integers(0, 99), spread=st.floats(0.1, 3))
def test_two_layers_with_relu_compute_the_same(seed, spread) -> None:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(6, 4)) * np.exp(spread * rng.normal(size=(6, 1)))
    second, bias, x = (
        rng.normal(size=(3, 6)) * np.exp(spread * rng.normal(size=6)),
        rng.normal(size=6),
        rng.normal(size=(20, 4)),
    )
    scaled, scaled_bias, behind, factors = equalize(first, bias, second)
    before = np.maximum(x @ first.T + bias, 0) @ second.T
    after = np.maximum(x @ scaled.T + scaled_bias, 0) @ behind.T
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.abs(scaled).max(axis=1), np.abs(behind).max(axis=0))
    assert np.all(factors > 0)


def test_rounding_per_tensor_gains_by_it() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(16, 8)) * np.exp(2 * rng.normal(size=(16, 1))), rng.normal(size=(4, 16))
    x = rng.normal(size=(200, 8))

    def error(a: np.ndarray, b: np.ndarray) -> float:
        def quantized(w: np.ndarray) -> np.ndarray:
            step = np.abs(w).max() / 127
            return np.round(w / step) * step

        wanted = np.maximum(x @ first.T, 0) @ second.T
        return float(np.mean((np.maximum(x @ quantized(a).T, 0) @ quantized(b).T - wanted) ** 2))

    scaled, _, behind, _ = equalize(first, None, second)
    assert error(scaled, behind) < 0.6 * error(first, second)


def test_dead_channels_keep_factor_one() -> None:
    factors = cross_layer_factors(np.array([0.0, 2.0, 3.0]), np.array([5.0, 0.0, 3.0]))
    np.testing.assert_array_equal(factors, [1, 1, 1])
    with pytest.raises(SpecError, match="share their channels"):
        cross_layer_factors(np.ones(3), np.ones(4))


def test_smooth_textbook() -> None:
    """Figure 5 of the paper: activations (2, 16, 2, 9), weights (2, 1, 2, 1): s = (1, 4, 1, 3)."""
    np.testing.assert_allclose(smooth_factors(np.array([2.0, 16, 2, 9]), np.array([2.0, 1, 2, 1])), [1, 4, 1, 3])
    np.testing.assert_allclose(smooth_factors(np.array([4.0]), np.array([2.0]), 1.0), [4])
    np.testing.assert_allclose(smooth_factors(np.array([4.0]), np.array([2.0]), 0.0), [0.5])
    np.testing.assert_array_equal(smooth_factors(np.array([0.0, 3.0]), np.array([3.0, 0.0])), [1, 1])
    with pytest.raises(SpecError, match=r"\[0, 1\]"):
        smooth_factors(np.ones(1), np.ones(1), 1.5)


@pytest.mark.parametrize("low", [0.0, -1.0, -math.inf])
@pytest.mark.parametrize("high", [6.0, 0.7, math.inf])
def test_clipped_normals_against_integration(low, high) -> None:
    mean, deviation = np.array([-3.0, -0.5, 0.0, 0.4, 7.0]), np.array([0.5, 1.0, 2.0, 0.1, 3.0])
    z = np.linspace(-10, 10, 200_001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    clipped = np.clip(mean[:, None] + deviation[:, None] * z, low, high)
    first = clipped @ density
    found = clipped_normal(mean, deviation, low, high)
    np.testing.assert_allclose(found.mean, first, atol=1e-6)
    np.testing.assert_allclose(found.variance, (clipped**2) @ density - first**2, atol=1e-5)


def test_relu_of_a_standard_normal_textbook() -> None:
    found = clipped_normal(np.zeros(1), np.ones(1))
    assert found.mean[0] == pytest.approx(1 / math.sqrt(2 * math.pi))
    assert found.variance[0] == pytest.approx(0.5 - 1 / (2 * math.pi))
    assert clipped_normal(np.array([2.0]), np.zeros(1)).mean[0] == pytest.approx(2.0)  # a constant channel


def test_analytic_correction_meets_the_measured_one() -> None:
    rng = np.random.default_rng(1)
    mean, deviation = rng.normal(size=8), np.abs(rng.normal(size=8)) + 0.2
    x = np.maximum(rng.normal(mean, deviation, size=(100_000, 8)), 0)
    weight = rng.normal(size=(5, 8))
    rounded = np.round(weight)
    found = analytic_bias_correction(weight, rounded, clipped_normal(mean, deviation).mean)
    np.testing.assert_allclose(found, (x @ (weight - rounded).T).mean(axis=0), atol=0.02)


def test_absorbed_bias_textbook() -> None:
    np.testing.assert_allclose(absorb_bias(np.array([5.0, 1.0]), np.array([-1.0, 1.0])), [2.0, 0.0])
