"""Intervals and agreement: how sure a measured number is."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
RESAMPLES = 2000


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927); `n` >= 1."""
    z = normal_quantile(0.5 + confidence / 2)
    p = successes / n
    centre, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)


def bootstrap_mean(values: Floats, confidence: float = 0.95, *, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (n,) (Efron & Tibshirani 1993, ch. 13); n >= 2."""
    return bootstrap(values, lambda sample: float(np.mean(sample)), confidence, seed=seed)


def bootstrap(
    values: npt.NDArray[np.generic], statistic: object, confidence: float = 0.95, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(sample)` over the first axis of `values`."""
    if not callable(statistic):
        raise TypeError("statistic must be a function of one sample")
    rng = np.random.default_rng(seed)
    n = len(values)
    drawn = [statistic(values[rng.integers(0, n, n)]) for _ in range(resamples)]
    low, high = np.quantile(np.asarray(drawn, np.float64), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def paired_drop(before: Floats, after: Floats, confidence: float = 0.95, *, seed: int = 0) -> tuple[float, float]:
    """Interval of `mean(before - after)` over the same examples, both (n,).

    The same examples are drawn for both (Koehn 2004), which is narrower than two separate intervals. Where nothing
    differs the bootstrap would claim certainty: there the rule of three bounds the unseen differences by 3/n (Hanley
    & Lippman-Hand 1983) times the range of one score.
    """
    difference = np.asarray(before, np.float64) - np.asarray(after, np.float64)
    if np.all(difference == 0):
        spread = float(np.ptp(np.asarray(before, np.float64))) or 1.0
        bound = -math.log((1 - confidence) / 2) / len(difference) * spread
        return -bound, bound
    return bootstrap_mean(difference, confidence, seed=seed)


def examples_needed(difference: Floats, max_drop: float, confidence: float) -> int | None:
    """How many examples would put the interval's upper end at `max_drop`, if mean and spread stay; None if none would."""
    mean, deviation = float(np.mean(difference)), float(np.std(difference))
    if mean >= max_drop:
        return None
    z = normal_quantile(0.5 + confidence / 2)
    return math.ceil((z * max(deviation, 1e-12) / (max_drop - mean)) ** 2)


def ratio_of_medians(after: Floats, before: Floats, confidence: float = 0.95, *, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of `median(after) / median(before)` of timings taken in alternation, both (runs,)."""
    pairs = np.stack([np.asarray(after, np.float64), np.asarray(before, np.float64)], axis=1)
    return bootstrap(pairs, lambda sample: np.median(sample[:, 0]) / np.median(sample[:, 1]), confidence, seed=seed)


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
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)
