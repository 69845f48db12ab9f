"""The learning-rate range test: a loss read while the rate rises exponentially (Smith 2017, arXiv:1506.01186, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

WIDTH = 3.0  # steps: the standard deviation of the window that smooths losses
WITHIN = 1e-2  # of the rate of the lowest loss: where the suggestion is looked for
REACH = 4  # steps to both sides over which a slope is measured
_MEMORY = 0.9  # of the mean that says when to stop
_GROWTH = 3.0  # by how many times its size the loss may rise above its lowest


def ramp(low: float, high: float, steps: int) -> Floats:
    """`low · (high / low)^(i / (steps - 1))`: every step multiplies the rate by one factor."""
    found: Floats = np.geomspace(low, high, steps)
    return found


def smooth(losses: Sequence[float]) -> Floats:
    """Means under a Gaussian window centred at each step, cut at the ends: unlike a running mean they do not lag behind."""
    values = np.asarray(losses, np.float64)
    distances = np.subtract.outer(np.arange(len(values)), np.arange(len(values)))
    weights = np.exp(-0.5 * np.square(distances / WIDTH))
    found: Floats = weights @ values / weights.sum(axis=1)
    return found


def diverged(losses: Sequence[float]) -> bool:
    """Whether the last loss is not finite, or the running mean is four times the lowest it had (`best + 3 |best|`)."""
    if losses and not math.isfinite(losses[-1]):
        return True
    mean, best = 0.0, math.inf
    for count, loss in enumerate(losses, 1):
        mean = _MEMORY * mean + (1 - _MEMORY) * loss
        now = mean / (1 - _MEMORY**count)
        best = min(best, now)
    return bool(losses) and now > best + _GROWTH * abs(best)


def greatest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which the smoothed loss is lowest: beyond it the loss rises."""
    return float(rates[int(np.argmin(smooth(losses)))])


def suggestion(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which the smoothed loss falls fastest, over the logarithm of the rate and within two decades of `greatest`:
    at smaller rates the noise of batches is all that falls. Where nothing falls there, a tenth of `greatest`."""
    values = smooth(losses)
    lowest = int(np.argmin(values))
    slopes = {
        i: (values[min(i + REACH, lowest)] - values[max(i - REACH, 0)]) / (min(i + REACH, lowest) - max(i - REACH, 0))
        for i in range(lowest)
        if rates[i] >= rates[lowest] * WITHIN
    }
    steepest = min(slopes, key=lambda i: slopes[i], default=None)
    if steepest is None or slopes[steepest] >= 0:
        return float(rates[lowest]) / 10
    return float(rates[steepest])
