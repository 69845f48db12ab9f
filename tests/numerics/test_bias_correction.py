"""Corrections from measured moments."""

from __future__ import annotations

import numpy as np

from whet.numerics.bias_correction import bias_correction, reestimated_affine
from whet.numerics.moments import update


def test_output_means_become_those_of_the_float_layer() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)) + 2
    seen, weight = np.round(x) + 0.25, rng.normal(size=(4, 6))
    rounded = np.round(weight * 2) / 2
    with_both = bias_correction(weight, rounded, update(None, x, seen))
    np.testing.assert_allclose((seen @ rounded.T + with_both).mean(axis=0), (x @ weight.T).mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(bias_correction(weight, rounded, update(None, x)), (weight - rounded) @ x.mean(axis=0))
    assert np.all(bias_correction(weight, weight, update(None, x)) == 0)


def test_reestimation_restores_mean_and_variance() -> None:
    rng = np.random.default_rng(1)
    y = rng.normal(size=(5000, 3)) * [1.0, 5.0, 0.1] + [0.0, 3.0, -2.0]
    quantized = y * [0.5, 1.2, 1.0] + [0.3, 0.0, 0.05]
    found = reestimated_affine(y.mean(0), y.var(0), quantized.mean(0), quantized.var(0), epsilon=0.0)
    fixed = quantized * found.scale + found.shift
    np.testing.assert_allclose(fixed, y, atol=1e-9)


def test_constant_channels_keep_their_scale() -> None:
    found = reestimated_affine(np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([3.0, 0.0]), np.array([0.0, 1.0]))
    np.testing.assert_allclose(found.scale, [1, 1])
    np.testing.assert_allclose(found.shift, [-2, 0])
