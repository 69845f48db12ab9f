"""The whole recipe for one layer."""

from __future__ import annotations

import numpy as np
import pytest

from whet.numerics.descent import coordinate_descent
from whet.numerics.gptq import gptq
from whet.numerics.layerwise import round_layer
from whet.numerics.moments import reconstruction, update
from whet.numerics.rounders import integer_rounder
from whet.numerics.scales import absmax_scale


def layer(seed: int = 0, rows: int = 16, columns: int = 36) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(800, columns)) @ rng.normal(size=(columns, columns)) * 0.4, 0)
    return rng.normal(size=(rows, columns)), x, np.round(x * 4) / 4


@pytest.mark.parametrize(("bits", "factor"), [(2, 0.8), (3, 0.8), (4, 0.9)])
@pytest.mark.parametrize("group", [None, 8])
def test_it_beats_nearest_and_gptq_with_descent(bits, factor, group) -> None:
    weight, x, seen = layer()
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    quadratic = reconstruction(weight, update(None, x, seen).centered())
    found = round_layer(weight, quadratic, low, high, group_size=group)
    assert np.all(found.error <= 1.02 * found.nearest_error)  # the damped error never rises
    assert found.error.sum() < factor * found.nearest_error.sum()
    rounder = integer_rounder(
        absmax_scale(weight, low, high, group_size=group), low, high, shape=weight.shape, group_size=group
    )
    first = gptq(weight, quadratic.hessian, rounder)
    plain = quadratic.error(coordinate_descent(first.codes, first.weight, quadratic, rounder)[1])
    assert found.error.sum() < plain.sum()


@pytest.mark.parametrize("group", [None, 8])
def test_what_is_returned_is_what_is_stored(group) -> None:
    """weight = scale · codes to the bit, scales are float32 values, the errors are those of this weight on the data."""
    weight, x, seen = layer(1)
    found = round_layer(weight, reconstruction(weight, update(None, x, seen)), -4, 3, group_size=group)
    assert found.codes.min() >= -4 and found.codes.max() <= 3
    np.testing.assert_array_equal(found.scale, found.scale.astype(np.float32))
    spread = found.scale if group is None else np.repeat(found.scale, 8, axis=1)[:, :36]
    np.testing.assert_array_equal(found.weight, found.codes * spread)
    np.testing.assert_allclose(found.error, np.mean((x @ weight.T - seen @ found.weight.T) ** 2, axis=0), rtol=1e-6)


def test_masked_weights_stay_zero() -> None:
    weight, x, seen = layer(2)
    mask = np.random.default_rng(3).random(weight.shape) < 0.5
    found = round_layer(weight * mask, reconstruction(weight * mask, update(None, x, seen)), -8, 7, mask=mask)
    assert np.all(found.codes[~mask] == 0) and np.all(found.weight[~mask] == 0) and np.any(found.codes[mask] != 0)


@pytest.mark.parametrize("kind", ["zero", "constant", "one sample", "dead inputs"])
def test_degenerate_layers_stay_finite(kind) -> None:
    weight, x, _ = layer(4)
    if kind == "zero":
        weight = np.zeros_like(weight)
    if kind == "constant":
        weight = np.full_like(weight, 0.25)
    if kind == "one sample":
        x = x[:1]
    if kind == "dead inputs":
        x = np.zeros_like(x)
    found = round_layer(weight, reconstruction(weight, update(None, x)), -8, 7)
    assert all(np.all(np.isfinite(a)) for a in (found.weight, found.scale, found.error))
    if kind == "zero":
        assert np.all(found.codes == 0)
    if kind == "dead inputs":
        assert np.mean((found.weight - weight) ** 2) < 0.03  # nothing is known: to nearest, whose error is s²/12


def test_the_same_input_gives_the_same_codes() -> None:
    weight, x, seen = layer(5)
    quadratic = reconstruction(weight, update(None, x, seen))
    a, b = (round_layer(weight, quadratic, -2, 1) for _ in range(2))
    np.testing.assert_array_equal(a.codes, b.codes)
