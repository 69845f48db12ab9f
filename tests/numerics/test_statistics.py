"""Intervals against closed forms, published examples and simulation."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.numerics.statistics import (
    MOST_DRAWN,
    bootstrap,
    bootstrap_limit,
    bootstrap_mean,
    examples_needed,
    normal_quantile,
    paired_drop,
    ratio_of_medians,
    sqnr_db,
    tango,
    top1_agreement,
    wilson,
)

Z = 1.959963984540054


def test_normal_quantile() -> None:
    assert normal_quantile(0.975) == pytest.approx(Z) and normal_quantile(0.5) == pytest.approx(0, abs=1e-12)


def test_wilson_published() -> None:
    """Newcombe 1998, Stat. Med. 17:857, table I, method 3: 81/263, 15/148, 0/20, 1/29."""
    table = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for successes, n, low, high in table:
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(n=st.integers(1, 5000), share=st.floats(0, 1), confidence=st.floats(0.5, 0.999))
def test_wilson_holds_the_estimate_and_mirrors(n, share, confidence) -> None:
    k = round(share * n)
    low, high = wilson(k, n, confidence)
    assert 0 <= low <= k / n <= high <= 1
    assert wilson(n - k, n, confidence) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_tango_without_changes_is_its_closed_form() -> None:
    for n in (1, 20, 360, 10_000):
        wanted = Z * Z / (n + Z * Z)
        assert tango(0, 0, n) == pytest.approx((-wanted, wanted), abs=1e-9)


def test_tango_solves_its_own_equation() -> None:
    """At both ends the score statistic is z, with q from a maximum-likelihood search instead of the quadratic's root."""
    losses, gains, n = 9, 2, 100
    for end in tango(losses, gains, n):
        q = np.linspace(max(1e-9, -end), (1 - end) / 2, 400_001)[1:-1]
        likelihood = losses * np.log(q + end) + gains * np.log(q) + (n - losses - gains) * np.log(1 - 2 * q - end)
        best = q[np.argmax(likelihood)]
        statistic = (losses - gains - n * end) / math.sqrt(n * (2 * best + end * (1 - end)))
        assert abs(statistic) == pytest.approx(Z, rel=1e-3)


@given(n=st.integers(1, 3000), losses=st.floats(0, 0.5), gains=st.floats(0, 0.5))
def test_tango_holds_the_estimate_and_mirrors(n, losses, gains) -> None:
    b, c = int(losses * n), int(gains * n)
    low, high = tango(b, c, n)
    assert -1 <= low <= (b - c) / n + 1e-9 and (b - c) / n - 1e-9 <= high <= 1
    assert tango(c, b, n) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(("n", "losses", "gains"), [(360, 0.005, 0.005), (360, 0.01, 0.0), (360, 0.02, 0.01), (60, 0.1, 0.05)])
def test_paired_interval_covers_the_truth_where_few_examples_change(n, losses, gains) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(n, [losses, gains, 1 - losses - gains], size=1500)
    known = {pair: tango(*pair, n) for pair in {(int(b), int(c)) for b, c, _ in drawn}}
    covered = np.mean([known[b, c][0] <= losses - gains <= known[b, c][1] for b, c, _ in drawn.tolist()])
    assert 0.935 <= covered <= 0.995


def test_paired_drop_of_right_and_wrong_is_tangos() -> None:
    before, after = np.ones(200), np.ones(200)
    after[:5] = 0
    before[5:7] = 0
    assert paired_drop(before, after) == tango(5, 2, 200)
    assert paired_drop(-before, -after) == tango(2, 5, 200)  # where lower is better both are negated


def test_paired_drop_without_a_difference_is_not_certain() -> None:
    low, high = paired_drop(np.ones(360), np.ones(360))
    assert high == pytest.approx(Z * Z / (360 + Z * Z)) and low == -high
    scores = np.linspace(0, 2, 100)
    assert paired_drop(scores, scores) == pytest.approx((-math.log(40) / 100 * 2, math.log(40) / 100 * 2))


def test_paired_drop_of_other_scores_is_the_bootstrap_of_the_difference() -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(size=400) * 10
    after = before - 0.5 + rng.normal(size=400) * 0.1
    low, high = paired_drop(before, after)
    middle, half = np.mean(before - after), Z * 0.1 / math.sqrt(400)
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=0.002)
    assert paired_drop(before, after) == (low, high)  # the seed is fixed
    assert paired_drop(before, after, seed=1) != (low, high)


def mean_of_each(samples):
    return samples.mean(1)


def test_samples_drawn_at_once_are_those_drawn_one_by_one() -> None:
    values = np.random.default_rng(8).normal(size=(301, 2))
    rng = np.random.default_rng(5)
    drawn = [values[rng.integers(0, 301, 301)] for _ in range(2000)]
    one_by_one = [np.median(sample[:, 0]) / np.median(sample[:, 1]) for sample in drawn]
    assert ratio_of_medians(*values.T, seed=5) == tuple(np.quantile(one_by_one, [0.5 - 0.95 / 2, 0.5 + 0.95 / 2]))


def test_bootstrap_mean_nears_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(3.0, 2.0, 2000)
    half = Z * values.std() / math.sqrt(2000)
    assert bootstrap_mean(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=half * 0.12)
    wide, narrow = bootstrap_mean(values, 0.99), bootstrap_mean(values, 0.8)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize("draw", ["normal", "exponential", "lognormal"])
def test_the_limit_of_the_bootstrap_is_the_bootstrap_of_many(draw) -> None:
    values = getattr(np.random.default_rng(6), draw)(size=4000)
    half = Z * values.std() / math.sqrt(4000)
    drawn = bootstrap(values, mean_of_each, resamples=20_000)
    assert bootstrap_limit(values) == pytest.approx(drawn, abs=0.04 * half)
    if draw == "lognormal":  # the skewness counts: a plain normal interval is off by more
        low, high = bootstrap_limit(values)
        assert high - values.mean() > 1.02 * (values.mean() - low)


def test_a_million_scores_are_quick() -> None:
    values = np.random.default_rng(7).exponential(size=1_000_000)
    start = time.perf_counter()
    low, high = bootstrap_mean(values)
    assert time.perf_counter() - start < 2
    assert low < values.mean() < high and high - low == pytest.approx(2 * Z * values.std() / 1000, rel=1e-3)
    assert bootstrap_mean(np.full(MOST_DRAWN + 1, 0.3)) == pytest.approx((0.3, 0.3))


def test_bootstrap_covers_at_its_confidence() -> None:
    rng = np.random.default_rng(3)
    hits = [
        low <= 1.0 <= high
        for low, high in (bootstrap(rng.exponential(1.0, 80), mean_of_each, resamples=300, seed=i) for i in range(300))
    ]
    assert 0.88 <= np.mean(hits) <= 0.98


def test_ratio_of_medians() -> None:
    rng = np.random.default_rng(4)
    before = 10 + rng.normal(size=200)
    low, high = ratio_of_medians(before / 2, before)
    assert low <= 0.5 <= high and high - low < 0.05


def test_sqnr_and_agreement() -> None:
    assert sqnr_db(np.asarray([10.0, 0.0]), np.asarray([9.0, 0.0])) == pytest.approx(20.0)
    assert sqnr_db(np.ones(3), np.ones(3)) is None
    a, b = np.asarray([[0, 1], [1, 0], [3, 2]]), np.asarray([[0, 5], [1, 2], [9, 2]])
    assert top1_agreement(a, b) == pytest.approx(2 / 3)


def test_examples_needed() -> None:
    difference = np.asarray([0.0] * 95 + [1.0] * 3 + [-1.0] * 2)
    mean, deviation = 0.01, np.std(difference)
    assert examples_needed(difference, 0.03, 0.95) == math.ceil((Z * deviation / (0.03 - mean)) ** 2)
    assert examples_needed(difference, 0.01, 0.95) is None
    assert examples_needed(np.zeros(50), 0.01, 0.95) == math.ceil(math.log(40) / 0.01)
    assert examples_needed(np.full(50, -0.5), 0.0, 0.95) is not None
