"""Ranges from histograms, against errors and divergences computed value by value."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.errors import SpecError
from whet.numerics.affine import dequantize, qparams, quantize
from whet.numerics.clipping import (
    _divergence,
    _squared_error,
    entropy_range,
    mse_range,
    needs_histogram,
    percentile_range,
    range_of,
)
from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.observers import HistogramRange, Range, observe_histogram
from whet.specs import MSE, Entropy, Int, MinMax, MovingAverage, Percentile

SPECS = [Int(bits, symmetric=symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]


def seen(values: np.ndarray) -> HistogramRange:
    return observe_histogram(None, np.asarray(values, np.float32), xp=xp)


def samples(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    x = rng.laplace(size=40_000)
    swish = 3 * rng.normal(size=40_000)
    return {"laplace": x, "relu": np.maximum(x, 0), "negative": -np.abs(x), "swish": swish / (1 + np.exp(-swish))}[kind]


def true_error(x: np.ndarray, ends: tuple[float, float], spec: Int) -> float:
    """In float64, value by value, as the quantizer itself rounds."""
    scale, zero = qparams(np.float64(ends[0]), np.float64(ends[1]), spec, xp=xp)
    return float(np.mean((dequantize(quantize(x, scale, zero, spec, xp=xp), scale, zero) - x) ** 2))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("ends", [(-1.0, 3.0), (-9.0, 8.0), (-0.4, 0.3)])
def test_the_expected_error_is_the_error_of_values_lying_evenly_in_their_bins(spec, ends) -> None:
    state = seen(samples("laplace"))
    inside = (np.arange(400) + 0.5) / 400
    points = (state.edges[:-1, None] + inside * state.width).reshape(-1)
    scale, zero = qparams(np.float64(ends[0]), np.float64(ends[1]), spec, xp=xp)
    missed = (dequantize(quantize(points, scale, zero, spec, xp=xp), scale, zero) - points) ** 2
    wanted = np.sum(missed.reshape(-1, 400).mean(1) * state.counts) / state.count
    found = _squared_error(state, spec, np.asarray([ends[0]]), np.asarray([ends[1]]))
    np.testing.assert_allclose(found, [wanted], rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["laplace", "relu", "negative", "swish"])
def test_no_range_of_a_fine_grid_has_less_error_than_mse_range(kind, spec) -> None:
    x = samples(kind).astype(np.float32).astype(np.float64)
    low, high = mse_range(seen(x), spec)
    assert min(x.min(), 0) <= low <= 0 <= high <= max(x.max(), 0)
    found = true_error(x, (low, high), spec)
    shares = np.linspace(0.05, 1.0, 20)
    least = min(
        true_error(x, (min(x.min(), 0) * a, max(x.max(), 0) * b), spec)
        for a in (shares if x.min() < 0 else [1.0])
        for b in (shares if x.max() > 0 else [1.0])
    )
    assert found <= least * 1.01
    assert found < 0.99 * true_error(x, (x.min(), x.max()), spec)


def test_the_optimal_clipping_of_a_laplace_distribution_is_the_published_one() -> None:
    """Banner et al. 2019: α* = 2.83 b, 5.03 b for 2, 4 bits with 2**bits even steps; ours has one level fewer, on zero."""
    x = np.random.default_rng(5).laplace(size=1_000_000)
    _, high = mse_range(seen(x), Int(4, symmetric=False))
    assert 4.7 < high < 6.2


def naive_divergence(state: HistogramRange, low: float, high: float, spec: Int) -> float:
    """The definition, in loops."""
    scale, zero = qparams(np.float64(low), np.float64(high), spec, xp=xp)
    counts = [float(c) for c in state.counts]
    if 0 <= -state.start < len(counts) - 1:
        counts[-state.start] = counts[-state.start + 1]
    code = [round(((state.start + i + 0.5) * state.width) / float(scale)) + int(zero) for i in range(len(counts))]
    inside = [i for i in range(len(counts)) if spec.qmin <= code[i] <= spec.qmax]
    p = {i: counts[i] for i in inside}
    p[inside[0]] += sum(counts[: inside[0]])
    p[inside[-1]] += sum(counts[inside[-1] + 1 :])
    q = {}
    for i in inside:
        mates = [j for j in inside if code[j] == code[i]]
        q[i] = max(sum(counts[j] for j in mates) / max(1, sum(p[j] > 0 for j in mates)), 1e-4) if p[i] > 0 else 0.0
    total_p, total_q = sum(p.values()), sum(q.values())
    return sum(p[i] / total_p * math.log((p[i] / total_p) / (q[i] / total_q)) for i in inside if p[i] > 0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("ends", [(-4.0, 5.0), (-7.0, 6.0)])
def test_the_divergence_is_the_published_one(spec, ends) -> None:
    x = np.random.default_rng(3).laplace(size=3000)
    state = observe_histogram(None, x.astype(np.float32), xp=xp, bins=1024)
    found = _divergence(state, spec, np.asarray([ends[0]]), np.asarray([ends[1]]))
    np.testing.assert_allclose(found, [naive_divergence(state, *ends, spec)], rtol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["laplace", "relu"])
def test_entropy_clips_a_long_tail_and_keeps_an_even_spread(kind, symmetric) -> None:
    x = np.append(samples(kind), [60.0]).astype(np.float32)  # an outlier, five times farther than the rest
    low, high = entropy_range(seen(x), Int(8, symmetric=symmetric))
    assert 4 < high < 25 and (low < -4 if kind == "laplace" else low == 0)
    even = np.random.default_rng(1).random(40_000).astype(np.float32)
    assert entropy_range(seen(even), Int(8, symmetric=symmetric))[1] > 0.97


def test_codes_of_16_bits_are_not_clipped_by_a_histogram_coarser_than_they_are() -> None:
    x = samples("laplace").astype(np.float32)
    for search in (mse_range, entropy_range):
        low, high = search(seen(x), Int(16))
        assert low <= x.min() * 0.999 and high >= x.max() * 0.94


@given(percentile=st.floats(51, 100), seed=st.integers(0, 10))
@settings(max_examples=40, deadline=None)
def test_percentiles_are_numpys_within_a_bin(percentile, seed) -> None:
    x = (np.random.default_rng(seed).normal(size=5000) * 3 + 1).astype(np.float32)
    state = seen(x)
    low, high = percentile_range(state, percentile)
    wanted = np.percentile(x.astype(np.float64), [100 - percentile, percentile], method="linear")
    around = np.percentile(x.astype(np.float64), np.clip([100 - percentile - 0.03, percentile + 0.03], 0, 100))
    slack = state.width + np.abs(around - wanted)
    assert abs(low - wanted[0]) <= slack[0] and abs(high - wanted[1]) <= slack[1]
    assert x.min() <= low <= high <= x.max()


def test_percentiles_by_hand() -> None:
    """1,000 values: 500 in each of two far bins; the 100th percentile is what was seen."""
    state = seen(np.repeat([0.0, 1000.0], 500))
    assert percentile_range(state, 100) == (0, 1000)
    low, high = percentile_range(state, 75)
    assert low == pytest.approx(state.width / 2) and high == pytest.approx(1000, abs=1)
    zeros_and_outlier = seen(np.append(np.zeros(99_999), 50.0))
    assert percentile_range(zeros_and_outlier, 99.9)[1] < 0.05


def test_one_door_for_every_observer() -> None:
    state, spec = seen(samples("laplace")), Int(8, symmetric=False)
    assert range_of(Range(-1, 2, 3), MinMax(), spec) == (-1, 2) == range_of(Range(-1, 2, 3), MovingAverage(), spec)
    assert range_of(state, MinMax(), spec) == (state.low, state.high)
    assert range_of(state, Percentile(99), spec) == percentile_range(state, 99)
    assert range_of(state, MSE(), spec) == mse_range(state, spec)
    assert range_of(state, Entropy(), spec) == entropy_range(state, spec)
    assert [needs_histogram(o) for o in (MinMax(), MovingAverage(), Percentile(), MSE(), Entropy())] == [0, 0, 1, 1, 1]
    with pytest.raises(SpecError, match=r"MSE.* needs a histogram"):
        range_of(Range(0, 1, 2), MSE(), spec)


@pytest.mark.parametrize(
    "values", [[], [0.0], [5.0, 5.0], [0.0, float("nan")], [1.0, float("inf")], [0.0, 1e-42], [-3e38, 3e38]]
)
@pytest.mark.parametrize("observer", [Percentile(99.9), MSE(), Entropy()], ids=str)
def test_strange_values_give_what_was_seen(values, observer) -> None:
    state = seen(np.asarray(values))
    low, high = range_of(state, observer, Int(8, symmetric=False))
    if state.is_finite and state.count:
        assert state.low - 1e-30 <= low <= max(high, 0) and high <= state.high
    else:
        np.testing.assert_array_equal([low, high], [state.low, state.high])
