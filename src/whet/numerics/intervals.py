"""The optimal division of sorted points into intervals, by dynamic programming; k-means in one dimension is this problem.

With prefix sums `W` of the weights and `F` of weight times value, the squared error of the interval `[j, i)` about its mean is
`S[i] - S[j] - (F[i] - F[j])² / (W[i] - W[j])`. `S`, the prefix sums of weight times value squared, telescopes: only the gain
`(F[i] - F[j])² / (W[i] - W[j])` is left to maximise. Negative gains are concave Monge, so that the best j never falls as i
rises (Grønlund et al. 2017, arXiv:1701.07204, §2.2), and one interval more costs O(n log n) by dividing at the middle. All
rows, and all i of one depth of the division, are solved in one sweep.

Shapes: R rows, n points in each; prefix sums are (R, n + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Prefix sums of weight, and of weight times value, over the sorted points of each row: (R, n + 1), the first column 0."""

    weight: Floats
    first: Floats

    @staticmethod
    def of(values: Floats, weights: Floats | None) -> Sums:
        """Of sorted `values` (R, n); weights likewise, 1 by default."""
        rows, size = values.shape
        weight, first = np.zeros((rows, size + 1)), np.zeros((rows, size + 1))
        if weights is None:
            weight[:] = np.arange(size + 1)
            np.cumsum(values, axis=1, out=first[:, 1:])
        else:
            np.cumsum(weights, axis=1, out=weight[:, 1:])
            np.cumsum(weights * values, axis=1, out=first[:, 1:])
        return Sums(weight, first)


def optimal_means(sums: Sums, clusters: int, *, zero: bool) -> Floats:
    """The means of the `clusters` intervals of least squared error, (R, clusters), ascending.

    zero: one of the intervals has 0 in place of its mean. Intervals that are empty or weigh nothing repeat the greatest mean.
    """
    division = _divided_with_zero(sums, clusters) if zero else _divided(sums, clusters)
    means = np.where(np.isnan(division), np.inf, division)
    means.sort(axis=1)
    least = np.where(np.isfinite(means), means, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    return np.where(np.isfinite(means), means, np.where(np.isfinite(least), least, 0.0))


def _divided(sums: Sums, clusters: int) -> Floats:
    """The mean of each interval, NaN where it is empty: (R, clusters)."""
    loss = _single(sums)
    splits = []
    for _ in range(clusters - 1):
        loss, split = _layer(sums, loss)
        splits.append(split)
    rows = np.arange(loss.shape[0])
    end = np.full(rows.size, loss.shape[1] - 1)
    means = np.full((rows.size, clusters), np.nan)
    for place in range(clusters - 1, -1, -1):
        start = splits[place - 1][rows, end] if place else np.zeros_like(end)
        means[:, place] = _mean(sums, rows, start, end)
        end = start
    return means


def _divided_with_zero(sums: Sums, clusters: int) -> Floats:
    """The same with one interval about 0, wherever it is best: it has no gain. (R, clusters)."""
    rows, size = np.arange(sums.weight.shape[0]), sums.weight.shape[1]
    with_zero = np.zeros((rows.size, size))  # after 0 free intervals and the one about zero
    free: Floats | None = None
    frees: list[Ints] = []  # splits of the free intervals before the one about zero; and after it
    afters: list[Ints] = []
    starts: list[Ints] = []  # where the interval about zero starts if it ends here, -1 if a free interval ends here
    for _ in range(clusters - 1):
        free, split = (_single(sums), np.zeros((rows.size, size), np.int32)) if free is None else _layer(sums, free)
        with_zero, after = _layer(sums, with_zero)
        least, start = _running_least(free)
        closes = least < with_zero
        with_zero = np.where(closes, least, with_zero)
        frees.append(split)
        afters.append(after)
        starts.append(np.where(closes, start, -1).astype(np.int32))
    means = np.zeros((rows.size, clusters))
    if clusters == 1:
        return means
    start_of_zero, free_split, after_split = np.stack(starts), np.stack(frees), np.stack(afters)
    end, left, passed = np.full(rows.size, size - 1), np.full(rows.size, clusters - 1), np.zeros(rows.size, bool)
    for place in range(clusters - 1):
        # Every row takes one free interval in each round, having first taken the one about zero if it ends here.
        layer = left - 1
        zero_start = start_of_zero[layer, rows, end]
        takes_zero = ~passed & (zero_start >= 0)
        end = np.where(takes_zero, zero_start, end)
        passed |= takes_zero
        start_free = np.where(passed, free_split[layer, rows, end], after_split[layer, rows, end])
        means[:, place + 1] = _mean(sums, rows, start_free, end)
        end, left = start_free, left - 1
    return means


def _single(sums: Sums) -> Floats:
    """The loss (less S) of one interval over the first i points."""
    return -_gain(sums.first, sums.weight)


def _gain(first: Floats, weight: Floats) -> Floats:
    return np.asarray(np.divide(first * first, weight, out=np.zeros_like(first), where=weight > 0))


def _mean(sums: Sums, rows: npt.NDArray[np.intp], start: npt.NDArray[np.integer], end: npt.NDArray[np.integer]) -> Floats:
    weight = sums.weight[rows, end] - sums.weight[rows, start]
    first = sums.first[rows, end] - sums.first[rows, start]
    return np.asarray(np.divide(first, weight, out=np.full(weight.shape, np.nan), where=weight > 0))


def _running_least(loss: Floats) -> tuple[Floats, Ints]:
    """The least of each row up to every place, and the first place that has it."""
    least = np.minimum.accumulate(loss, axis=1)
    new = np.ones(loss.shape, bool)
    new[:, 1:] = loss[:, 1:] < least[:, :-1]
    places = np.where(new, np.arange(loss.shape[1], dtype=np.int32), 0)
    return least, np.maximum.accumulate(places, axis=1).astype(np.int32)


def _layer(sums: Sums, loss: Floats) -> tuple[Floats, Ints]:
    """One interval more: `least[i] = min over j <= i of loss[j] - gain(j, i)`, and the least j that has it: (R, n + 1)."""
    rows, size = loss.shape
    least, split = np.empty_like(loss), np.zeros((rows, size), np.int32)
    stride = 1 << (size - 1).bit_length()
    ends = np.asarray([size - 1])
    low, high = np.zeros((rows, 1), np.int64), np.full((rows, 1), size - 1)
    while True:
        least[:, ends], split[:, ends] = _best(sums, loss, ends, low, high)
        if stride == 1:
            return least, split
        stride //= 2
        ends = np.arange(stride - 1, size - 1, 2 * stride)  # the places between those that are known
        before, after = ends - stride, np.minimum(ends + stride, size - 1)
        low = np.where(before >= 0, split[:, np.maximum(before, 0)], 0).astype(np.int64)
        high = np.minimum(split[:, after], ends).astype(np.int64)


def _best(
    sums: Sums, loss: Floats, ends: npt.NDArray[np.integer], low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]
) -> tuple[Floats, Ints]:
    """For every row and each of `ends`, the best j in `[low, high]`: all of these ranges one behind the other."""
    rows, size = loss.shape
    base = np.arange(rows)[:, None] * size
    length = (high - low + 1).reshape(-1)
    begin = np.cumsum(length) - length
    at = np.arange(length.sum()) + np.repeat((low + base).reshape(-1) - begin, length)  # flat places of j
    end = (ends + base).reshape(-1)
    first = np.repeat(sums.first.reshape(-1)[end], length) - sums.first.reshape(-1)[at]
    weight = np.repeat(sums.weight.reshape(-1)[end], length) - sums.weight.reshape(-1)[at]
    losses = loss.reshape(-1)[at] - _gain(first, weight)
    least = np.minimum.reduceat(losses, begin)
    hits = np.flatnonzero(losses == np.repeat(least, length))
    split = hits[np.searchsorted(hits, begin)] - begin + low.reshape(-1)  # the first hit of each range
    return least.reshape(rows, -1), split.reshape(rows, -1).astype(np.int32)
