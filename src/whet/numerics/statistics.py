"""Intervals and agreement: how sure a measured number is."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
RESAMPLES = 2000
_AT_ONCE = 200_000  # values drawn at once: they stay in the cache
MOST_DRAWN = 20_000  # 0.4 s of resampling; from here on the mean of skewed scores is close to its limit


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927); `n` >= 1."""
    z = normal_quantile(0.5 + confidence / 2)
    p = successes / n
    centre, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else max(0.0, (centre - width) / scale)
    return low, 1.0 if successes == n else min(1.0, (centre + width) / scale)


def bootstrap_mean(values: Floats, confidence: float = 0.95, *, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (n,) (Efron & Tibshirani 1993, ch. 13); n >= 2.

    Above `MOST_DRAWN` values its limit is computed instead of drawn, see `bootstrap_limit`: a million take milliseconds.
    """
    if len(values) > MOST_DRAWN:
        return bootstrap_limit(values, confidence)
    return bootstrap(values, lambda samples: np.mean(samples, axis=1), confidence, seed=seed)


def bootstrap_limit(values: Floats, confidence: float = 0.95) -> tuple[float, float]:
    """What `bootstrap_mean` tends to: `m + s/√n · (z + γ (z² - 1) / (6 √n))` at the two quantiles z of the normal.

    m, s, γ: mean, deviation and skewness of `values` (n,). The first-order Cornish-Fisher expansion of the resampled
    mean's distribution (Hall 1992, The Bootstrap and Edgeworth Expansion, section 2.5).
    """
    values = np.asarray(values, np.float64)
    mean, deviation = float(np.mean(values)), float(np.std(values))
    if deviation == 0:
        return mean, mean
    skewness = float(np.mean(((values - mean) / deviation) ** 3))
    root = math.sqrt(len(values))
    low, high = (normal_quantile(0.5 + side * confidence / 2) for side in (-1, 1))
    low, high = (mean + deviation / root * (z + skewness * (z * z - 1) / (6 * root)) for z in (low, high))
    return low, high


def bootstrap(
    values: npt.NDArray[Any],
    statistic: Callable[[npt.NDArray[Any]], Floats],
    confidence: float = 0.95,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over the first axis of `values` (n, …).

    statistic: of many samples at once, (draws, n, …) to (draws,).
    """
    rng = np.random.default_rng(seed)
    n = len(values)
    step = max(1, _AT_ONCE // n)
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    drawn = np.concatenate([statistic(values[rng.integers(0, n, (size, n))]) for size in sizes])
    low, high = np.quantile(drawn.astype(np.float64), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def paired_drop(before: Floats, after: Floats, confidence: float = 0.95, *, seed: int = 0) -> tuple[float, float]:
    """Interval of `mean(before - after)` over the same examples, both (n,).

    Scores of 0 and 1 have Tango's score interval, which holds where few or no examples changed; the bootstrap does not: of
    one change it would say that the rest is certain. Other scores are resampled together (Koehn 2004). Where none of these
    differs, the unseen differences are bounded as by the rule of three (Hanley & Lippman-Hand 1983), for both sides:
    `-ln((1 - confidence) / 2) / n` (3.7/n at 95 %) times the range of one score.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    difference = before - after
    if _is_binary(before) and _is_binary(after) and np.max(np.abs(difference)) <= 1:
        return tango(int(np.sum(difference > 0)), int(np.sum(difference < 0)), len(difference), confidence)
    if np.all(difference == 0):
        bound = _unseen(len(difference), confidence) * (float(np.ptp(before)) or 1.0)
        return -bound, bound
    return bootstrap_mean(difference, confidence, seed=seed)


def tango(losses: int, gains: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of `(losses - gains) / n`, the difference of two paired proportions (Tango 1998, Stat. Med. 17:891).

    losses: examples right before and wrong after; gains: the reverse; n: all examples. The interval holds every difference
    `d` with `|losses - gains - n d| <= z sqrt(n (2 q + d (1 - d)))`, `q` being the most likely rate of gains if `d` is true
    (the positive root of `2n q² + (-losses - gains + (2n - losses + gains) d) q - gains d (1 - d)`). Without losses and
    gains it is `± z² / (n + z²)`.
    """
    z = normal_quantile(0.5 + confidence / 2)

    def excess(d: float) -> float:
        """The score statistic of `d`, which falls as `d` rises."""
        linear = -losses - gains + (2 * n - losses + gains) * d
        root = math.sqrt(max(0.0, linear * linear + 8 * n * gains * d * (1 - d)))
        q = (root - linear) / (4 * n)
        variance = n * max(0.0, 2 * q + d * (1 - d))
        distance = losses - gains - n * d
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def solve(level: float, low: float, high: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > level else (low, middle)
        return (low + high) / 2

    estimate = (losses - gains) / n
    return solve(z, -1.0, estimate), solve(-z, estimate, 1.0)


def examples_needed(difference: Floats, max_drop: float, confidence: float) -> int | None:
    """How many examples would put the interval's upper end at `max_drop`, if mean and spread stay; None if none would.

    difference: `before - after` per example, (n,). At least as many as would show it if no example differed.
    """
    mean, deviation = float(np.mean(difference)), float(np.std(difference))
    if mean >= max_drop:
        return None
    z = normal_quantile(0.5 + confidence / 2)
    return math.ceil(max((z * deviation / (max_drop - mean)) ** 2, _unseen(1, confidence) / (max_drop - mean)))


def _unseen(n: int, confidence: float) -> float:
    return -math.log((1 - confidence) / 2) / n


def _is_binary(scores: Floats) -> bool:
    """Whether all are 0 or 1, or 0 or -1 (where lower was better)."""
    return bool(np.all((scores == 0) | (np.abs(scores) == 1)))


def ratio_of_medians(after: Floats, before: Floats, confidence: float = 0.95, *, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of `median(after) / median(before)` of timings taken in alternation, both (runs,)."""
    pairs = np.stack([np.asarray(after, np.float64), np.asarray(before, np.float64)], axis=1)
    return bootstrap(pairs, _ratios, confidence, seed=seed)


def _ratios(samples: Floats) -> Floats:
    """Of pairs (draws, n, 2): the ratio of both medians."""
    return np.asarray(np.median(samples[..., 0], axis=1) / np.median(samples[..., 1], axis=1))


def sqnr_db(reference: Floats, approximation: Floats) -> float | None:
    """Signal-to-quantization-noise ratio, `10·log10(Σ r² / Σ (r - a)²)`, in dB; None (infinite) when both are equal."""
    reference = np.asarray(reference, np.float64)
    noise = float(np.sum((reference - np.asarray(approximation, np.float64)) ** 2))
    signal = float(np.sum(reference**2))
    if noise == 0:
        return None
    return 10 * math.log10(max(signal, 1e-300) / noise)


def top1_agreement(a: Floats, b: Floats) -> float:
    """The fraction of rows of two (…, classes) outputs whose highest entry is at the same place."""
    return float(np.mean(np.argmax(a, axis=-1) == np.argmax(b, axis=-1)))


def normal_quantile(p: float) -> float:
    """The standard normal quantile."""
    return NormalDist().inv_cdf(p)
