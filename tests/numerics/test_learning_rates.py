"""The learning-rate range test on curves whose answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.numerics.learning_rates import diverged, greatest, ramp, smooth, suggestion

RATES = ramp(1e-6, 1.0, 121)  # 20 steps a decade


def curve(fall, width, rise, noise=0.0, seed=0):
    """2.3, falling by 2 around the rate `fall` over `width` decades, rising steeply from `rise` on."""
    at = np.log10(RATES)
    losses = 2.3 - 2 / (1 + np.exp(-(at - math.log10(fall)) * 4 / width)) + np.exp(np.minimum((at - math.log10(rise)) * 20, 3))
    return losses + np.random.default_rng(seed).normal(0, noise, len(at)) if noise else losses


def test_the_ramp_multiplies_by_one_factor():
    assert RATES[0] == pytest.approx(1e-6) and RATES[-1] == pytest.approx(1.0)
    np.testing.assert_allclose(RATES[1:] / RATES[:-1], 10 ** (1 / 20))


def test_smoothing_is_a_gaussian_mean_that_does_not_lag():
    losses = np.zeros(41)
    losses[20] = 1.0
    found = smooth(losses)
    assert int(found.argmax()) == 20 and found[17] == pytest.approx(found[23])
    weights = np.exp(-0.5 * (np.arange(-20, 21) / 3.0) ** 2)
    assert found[20] == pytest.approx(1 / weights.sum(), rel=1e-9)
    np.testing.assert_allclose(smooth([2.5] * 7), 2.5)


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("fall", [1e-4, 1e-3, 1e-2])
def test_the_suggestion_is_where_the_loss_falls_fastest(fall, noise):
    losses = curve(fall, 0.5, 30 * fall, noise)
    assert abs(math.log10(suggestion(RATES, losses) / fall)) < 0.25
    lowest = greatest(RATES, losses)
    assert fall < lowest < 30 * fall and suggestion(RATES, losses) < lowest


def test_noise_at_tiny_rates_is_no_descent():
    losses = curve(3e-3, 0.5, 1e-1)
    losses[:40] += np.linspace(8.0, 0.0, 40)  # two decades of batches that became easier
    assert greatest(RATES, losses) / 100 <= suggestion(RATES, losses) < 1e-2


def test_where_no_loss_falls_it_is_a_tenth_of_the_greatest():
    rising = np.linspace(1.0, 2.0, len(RATES))
    assert greatest(RATES, rising) == RATES[0] and suggestion(RATES, rising) == pytest.approx(RATES[0] / 10)


def test_gradient_descent_on_a_parabola_diverges_beyond_two_over_its_curvature():
    """`w ← w - η · λ · w` shrinks w while η < 2/λ, and multiplies it by more than 1 from there on."""
    curvature, w, losses = 50.0, 1.0, []
    for rate in RATES:
        losses.append(0.5 * curvature * w**2)
        if diverged(losses):
            break
        w -= rate * curvature * w
    used = RATES[: len(losses)]
    assert 2 / curvature < used[-1] < 1 and suggestion(used, losses) < 2 / curvature
    assert greatest(used, losses) < 2.5 / curvature


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([1.0], False),
        ([1.0, math.nan], True),
        ([1.0, math.inf], True),
        ([1.0] * 10 + [20.0], False),  # one bad batch
        ([1.0] * 10 + [20.0] * 3, True),
        ([-2.0] * 5, False),
        ([-2.0] * 5 + [60.0, 60.0], True),
        ([], False),
    ],
)
def test_when_a_search_ends(losses, ends):
    assert diverged(losses) is ends


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=60), st.floats(0.1, 10), st.floats(-5, 5))
def test_scale_and_offset_of_the_loss_do_not_matter(losses, scale, offset):
    rates = ramp(1e-5, 1.0, len(losses))
    losses = [round(value, 3) for value in losses]
    moved = [round(scale, 3) * value + round(offset, 3) for value in losses]
    smoothed = smooth(losses)
    assert rates[0] / 10 <= suggestion(rates, losses) <= greatest(rates, losses)
    assert smooth(moved)[list(rates).index(greatest(rates, losses))] == pytest.approx(min(smooth(moved)), abs=1e-9)
    assert min(losses) - 1e-9 <= smoothed.min() and smoothed.max() <= max(losses) + 1e-9
