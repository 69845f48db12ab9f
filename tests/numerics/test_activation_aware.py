"""AWQ helps where a few inputs are large, and never hurts."""

from __future__ import annotations

import numpy as np
import pytest

from whet.errors import SpecError
from whet.numerics.activation_aware import activation_aware
from whet.numerics.scales import absmax_scale


def nearest(weight: np.ndarray, group: int = 16) -> np.ndarray:
    scale = np.repeat(absmax_scale(weight, -8, 7, group_size=group), group, axis=1)[:, : weight.shape[1]]
    return np.clip(np.round(weight / scale), -8, 7) * scale


def problem(outliers: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 64))
    x[:, ::16] *= outliers
    return rng.normal(size=(32, 64)), x, x.T @ x / 500


def test_outliers_gain_and_the_curve_is_the_error_on_the_data() -> None:
    weight, x, hessian = problem(30.0)
    found = activation_aware(weight, hessian, np.abs(x).mean(axis=0), nearest)
    assert found.errors[0] == pytest.approx(np.sum(np.mean((x @ (nearest(weight) - weight).T) ** 2, axis=0)))
    assert 0 < found.exponent < 1 and min(found.errors) < 0.5 * found.errors[0]
    scaled = nearest(weight * found.factors)
    assert np.sum(np.mean(((x / found.factors) @ scaled.T - x @ weight.T) ** 2, axis=0)) == pytest.approx(min(found.errors))
    assert np.sum((scaled / found.factors - weight) ** 2) > np.sum((nearest(weight) - weight) ** 2)  # the trade
    assert len(found.errors) == len(found.exponents) == 21 and found.exponents[-1] == 1.0


def test_without_outliers_it_is_never_worse() -> None:
    weight, x, hessian = problem(1.0)
    found = activation_aware(weight, hessian, np.abs(x).mean(axis=0), nearest)
    assert min(found.errors) <= found.errors[0]


def test_dead_inputs_keep_factor_one_and_factors_are_centred() -> None:
    weight, x, _ = problem(30.0)
    x[:, 5] = 0
    found = activation_aware(weight, x.T @ x, np.abs(x).mean(axis=0), nearest)
    assert found.factors[5] == 1.0
    alive = np.delete(found.factors, 5)
    assert alive.max() * alive.min() == pytest.approx(1.0)
    zeros = activation_aware(weight, np.zeros((64, 64)), np.zeros(64), nearest)
    np.testing.assert_array_equal(zeros.factors, 1)
    with pytest.raises(SpecError, match="magnitude"):
        activation_aware(weight, x.T @ x, np.ones(3), nearest)
