"""Observers: what range a tensor takes, seen batch by batch in constant memory.

Three states, each frozen and with `low`, `high`, `count` and `is_finite`: `Range` for the least and greatest value and for
moving averages of these, `HistogramRange` for what `whet.numerics.clipping` searches: percentiles, least error, entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from whet.numerics.namespace import Array, Namespace

BINS = 2048
CHUNK = 1 << 15  # values counted at a time: what is written in between stays in the processor's cache
LEAST_EXPONENT, GREATEST_EXPONENT = -126, 126  # of a bin's width: 1 / width stays a normal float32
PRECISION = 20  # a bin is at least 2⁻²⁰ of the greatest magnitude: indices of bins stay exact in float32 and int32

Counts = npt.NDArray[np.int64]
CountBins = Callable[[Array, float, int, int], Counts]


@dataclass(frozen=True, slots=True)
class Range:
    """The least and greatest value seen, or moving averages of them, and how many values that were."""

    low: float
    high: float
    count: int

    @property
    def is_finite(self) -> bool:
        """Whether neither NaN nor Inf was seen."""
        return self.low - self.low == 0 and self.high - self.high == 0


@dataclass(frozen=True, slots=True, eq=False)
class HistogramRange:
    """The least and greatest value seen, how many values that were, and their histogram.

    counts: (bins,) int64; bin `i` counts the values in `[(start + i) * width, (start + i + 1) * width)`, and `width` is the
    power of two `2 ** exponent`. Edges are multiples of the width, so that a histogram of another width has the same edges
    or splits them: widening the bins merges neighbours and stays exact, and the order of the batches changes nothing (but
    for negative values so small beside the width that their quotient is no float32: they count to the bin above zero).
    Values that are not finite are in no bin; they make `low` and `high` NaN or infinite.
    """

    low: float
    high: float
    count: int
    exponent: int
    start: int
    counts: Counts

    @property
    def is_finite(self) -> bool:
        """Whether neither NaN nor Inf was seen."""
        return self.low - self.low == 0 and self.high - self.high == 0

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """The (bins + 1,) ends of the bins, exact."""
        return np.ldexp(np.arange(self.start, self.start + self.counts.size + 1, dtype=np.float64), self.exponent)

    def range(self) -> Range:
        """The same without the histogram."""
        return Range(self.low, self.high, self.count)


def observe_minmax(state: Range | None, x: Array, *, xp: Namespace) -> Range:
    """The range of everything seen so far and of `x`. NaN and Inf stay visible in the result."""
    count = _size(x)
    if count == 0:
        return state if state is not None else Range(float("inf"), float("-inf"), 0)
    return _joined(state, Range(float(xp.min(x)), float(xp.max(x)), count))


def observe_moving_average(state: Range | None, x: Array, momentum: float = 0.9, *, xp: Namespace) -> Range:
    """Exponential moving averages of the least and of the greatest value of each batch.

    `low ← momentum * low + (1 - momentum) * min(x)`, and `high` likewise; the first batch is taken as it is (Jacob et al.
    2018, arXiv:1712.05877, §3.1). NaN and Inf stay visible; an empty batch changes nothing.
    """
    new = observe_minmax(None, x, xp=xp)
    if new.count == 0:
        return state if state is not None else new
    if state is None or state.count == 0:
        return new
    low = momentum * state.low + (1 - momentum) * new.low
    high = momentum * state.high + (1 - momentum) * new.high
    return Range(low, high, state.count + new.count)


def count_bins(x: Array, inverse_width: float, start: int, bins: int) -> Counts:
    """How many values of `x` lie in each of `bins` bins from `start`: the counts of `floor(x * inverse_width) - start`.

    On NumPy arrays, and whatever `np.asarray` reads without copying. The product is exact, `inverse_width` being a power of
    two, and so is its floor. All values must lie in the bins.
    """
    flat = np.asarray(x).reshape(-1)
    if flat.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        flat = flat.astype(np.float32)
    counts = np.zeros(bins, np.int64)
    scaled = np.empty(min(CHUNK, flat.size), flat.dtype)
    index = np.empty(scaled.size, np.intp)
    for at in range(0, flat.size, CHUNK):
        part = flat[at : at + CHUNK]
        size = part.size
        np.multiply(part, flat.dtype.type(inverse_width), out=scaled[:size])
        np.floor(scaled[:size], out=scaled[:size])
        np.copyto(index[:size], scaled[:size], casting="unsafe")
        index[:size] -= start
        counts += np.bincount(index[:size], minlength=bins)
    return counts


def observe_histogram(
    state: HistogramRange | None, x: Array, *, xp: Namespace, bins: int = BINS, count: CountBins = count_bins
) -> HistogramRange:
    """The range and the histogram of everything seen so far and of `x`, in at most `bins` bins.

    The bins are as narrow as the range allows: between `bins / 2` and `bins` of them cover it. `count` counts the values of
    one batch into bins, as `count_bins` does; a side whose arrays NumPy cannot read hands in its own. `x` must be float32
    or wider, or 16 bits wide: float16 and bfloat16 are read as float32. `bins` is at least 16.
    """
    seen = observe_minmax(None, x, xp=xp)
    before = state.range() if state is not None else None
    joined = _joined(before, seen) if seen.count else before or seen
    nothing = np.zeros(0, np.int64)
    if not joined.is_finite or seen.count == 0:  # with NaN or Inf there is no range to count in: keep what was counted
        exponent, start, counts = (state.exponent, state.start, state.counts) if state is not None else (0, 0, nothing)
        return HistogramRange(joined.low, joined.high, joined.count, exponent, start, counts)
    exponent, start, used = _grid(joined.low, joined.high, bins)
    counts = np.zeros(used, np.int64)
    if state is not None and state.count:
        _merge(state, exponent, start, counts)
    first, last = _bin_of(seen.low, exponent), _bin_of(seen.high, exponent)
    # One bin more on either side takes what a library that flushes subnormals puts there.
    found = count(x, math.ldexp(1.0, -exponent), first - 1, last - first + 3)
    found[1] += found[0]
    found[-2] += found[-1]
    counts[first - start : last - start + 1] += found[1:-1]
    return HistogramRange(joined.low, joined.high, joined.count, exponent, start, counts)


def channel_range(weight: Array, axis: int | None, *, xp: Namespace) -> tuple[Array, Array]:
    """Least and greatest value of `weight` per index of `axis`: shape (channels,), or () when `axis` is None."""
    if axis is None:
        return xp.min(weight), xp.max(weight)
    others = tuple(i for i in range(len(weight.shape)) if i != axis % len(weight.shape))
    return xp.min(weight, axis=others), xp.max(weight, axis=others)


def _size(x: Array) -> int:
    return math.prod(int(size) for size in x.shape)


def _joined(state: Range | None, new: Range) -> Range:
    if state is None or state.count == 0:
        return new
    # min() and max() of Python drop a NaN that stands second; the sum keeps it.
    if new.low != new.low or state.low != state.low:
        low = high = float("nan")
    else:
        low, high = min(new.low, state.low), max(new.high, state.high)
    return Range(low, high, state.count + new.count)


def _bin_of(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _grid(low: float, high: float, bins: int) -> tuple[int, int, int]:
    """The least exponent at which `bins` bins cover `[low, high]`, the first bin and how many there are.

    Each bound on the exponent only grows with the range, so that the result depends on the range alone.
    """
    magnitude = max(abs(low), abs(high))
    exponent = max(LEAST_EXPONENT, math.frexp(magnitude)[1] - PRECISION if magnitude else LEAST_EXPONENT)
    spread = high / bins - low / bins  # cannot overflow
    if spread > 0:
        exponent = max(exponent, math.frexp(spread)[1] - 1)
    while _bin_of(high, exponent) - _bin_of(low, exponent) >= bins and exponent < GREATEST_EXPONENT:
        exponent += 1
    start = _bin_of(low, exponent)
    return exponent, start, _bin_of(high, exponent) - start + 1


def _merge(state: HistogramRange, exponent: int, start: int, counts: Counts) -> None:
    """Add the counts of `state` to bins as wide or wider."""
    places = (np.arange(state.start, state.start + state.counts.size) >> (exponent - state.exponent)) - start
    np.add.at(counts, places, state.counts)
