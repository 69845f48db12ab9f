"""The values of a weight before and after a step, as two small histograms over the same bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 32
_CHUNK = 1 << 16  # values at a time: they stay in the cache


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values in equal bins from `low` to `high`."""

    low: float
    high: float
    counts: tuple[int, ...]

    def beside(self, after: npt.NDArray[Any]) -> dict[str, Any]:
        """The record of a change: `{"edges": [low, high], "before": [counts], "after": [counts]}`.

        Both rows have the same sum: values of `after` beyond the edges count to the outermost bins.
        """
        later = _counts(after, self.low, self.high)
        return {"edges": [self.low, self.high], "before": list(self.counts), "after": list(later)}


def histogram(array: npt.NDArray[Any]) -> Histogram | None:
    """The values of `array` (any shape) in 32 bins from their least to their largest.

    A constant array has its value in the middle. None for no values, and where some are not finite.
    """
    if array.size == 0:
        return None
    low, high = float(np.min(array)), float(np.max(array))
    if not np.isfinite(low) or not np.isfinite(high):
        return None
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        margin = abs(high) or 1.0
        low, high = low - margin, high + margin
    low, high = float(f"{low:.6g}"), float(f"{high:.6g}")
    return Histogram(low, high, _counts(array, low, high))


def _counts(array: npt.NDArray[Any], low: float, high: float) -> tuple[int, ...]:
    flat, counts = np.reshape(array, -1), np.zeros(BINS, np.int64)
    for start in range(0, flat.size, _CHUNK):
        values = np.clip(np.nan_to_num(flat[start : start + _CHUNK].astype(np.float64)), low, high)
        bins = ((values - low) / (high - low) * BINS).astype(np.int64)
        counts += np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)
    return tuple(counts.tolist())
