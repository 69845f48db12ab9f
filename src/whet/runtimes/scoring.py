"""A metric called on outputs and targets, and how sure its value is."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.data import Batches, concatenate, leaves, rows
from whet.errors import DataError, MetricError
from whet.numerics.scoring import Floats, scores_of
from whet.numerics.statistics import bootstrap_mean, wilson
from whet.records import Estimate
from whet.specs import Metric

MAX_RESAMPLES, MIN_RESAMPLES = 1000, 100
RESAMPLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """What a metric said.

    record: the `metric` of an `Evidence`. scores: (n,) one per example, None for a metric of the whole. resampled: for
    such a metric its values on resamples of the examples, NaN where it has none; the same seed draws the same examples.
    """

    record: dict[str, Any]
    scores: Floats | None
    resampled: Floats | None = None

    @property
    def value(self) -> float:
        """The metric's value."""
        return float(self.record["value"])


def score(outputs: Any, data: Batches, metric: Metric, *, seed: int = 0) -> Score:
    """`metric` on the `outputs` for all examples of `data`, with a 95 % interval.

    One score per example: the mean, with Wilson's interval where all scores are 0 or 1, else a bootstrap's. A metric of
    the whole: a bootstrap over examples, where that takes no more than seconds.

    Raises:
        DataError: `data` has no targets.
        MetricError: the metric fails, or returns NaN, no number, or not one score per example; it is named.
    """
    targets = _targets(data)
    n = rows(targets)
    if not metric.per_example:
        return _score_whole(outputs, targets, metric, n, seed)
    scores = scores_of(metric, outputs, targets)
    if np.isin(scores, (0.0, 1.0)).all():
        estimate = Estimate(float(scores.mean()), wilson(int(scores.sum()), n))
    elif n < 2:
        estimate = Estimate(float(scores.mean()), None, "one example has no interval")
    else:
        estimate = Estimate(float(scores.mean()), bootstrap_mean(scores, seed=seed))
    return Score(_record(metric, estimate, n), scores)


def _score_whole(outputs: Any, targets: Any, metric: Metric, n: int, seed: int) -> Score:
    start = time.perf_counter()
    value = float(scores_of(metric, outputs, targets))
    resamples = int(min(MAX_RESAMPLES, RESAMPLE_SECONDS / max(time.perf_counter() - start, 1e-9)))
    reason = None
    if n < 2:
        reason = "one example has no interval"
    elif resamples < MIN_RESAMPLES:
        reason = f"a bootstrap would call {metric.name!r} {MIN_RESAMPLES} times, which takes too long"
    elif any(leaf.shape[:1] != (n,) for leaf in (*leaves(outputs), *leaves(targets))):
        reason = "outputs and targets do not have one row per example, so examples cannot be drawn again"
    if reason is not None:
        return Score(_record(metric, Estimate(value, None, reason), n), None)
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, n, n) for _ in range(MAX_RESAMPLES))
    deadline = time.perf_counter() + 2 * RESAMPLE_SECONDS
    values = np.full(MAX_RESAMPLES, np.nan)
    for index in range(resamples):
        chosen = next(drawn)
        values[index] = _one_or_nan(metric, take(outputs, chosen), take(targets, chosen))
        if time.perf_counter() > deadline:
            break
    interval = quantiles(values)
    reason = None if interval else f"{metric.name!r} has no value on most resamples of these examples"
    return Score(_record(metric, Estimate(value, interval, reason), n), None, values)


def quantiles(resampled: Floats, confidence: float = 0.95) -> tuple[float, float] | None:
    """The percentile interval of `resampled` values without NaN; None where fewer than 100 are left."""
    kept = resampled[np.isfinite(resampled)]
    if len(kept) < MIN_RESAMPLES:
        return None
    low, high = np.quantile(kept, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def take(value: Any, chosen: npt.NDArray[np.int64]) -> Any:
    """The rows `chosen` of every array in a structure."""
    if isinstance(value, Mapping):
        return {key: take(item, chosen) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(take(item, chosen) for item in value)
    return np.asarray(value)[chosen]


def _targets(data: Batches) -> Any:
    parts = []
    for index, (_, targets) in enumerate(data):
        if targets is None:
            raise DataError(
                f"A metric needs labelled data, and {data.what} has no targets (batch {index}). Give (inputs, targets) batches."
            )
        parts.append(targets)
    return concatenate(parts)


def _one_or_nan(metric: Metric, outputs: Any, targets: Any) -> float:
    """The metric's number; NaN where a resample gives the metric nothing to work with (one class only, say)."""
    try:
        return float(scores_of(metric, outputs, targets))
    except MetricError:
        return math.nan


def _record(metric: Metric, estimate: Estimate, n: int) -> dict[str, Any]:
    return {"name": metric.name, **estimate.to_dict(), "n": n, "higher_is_better": metric.higher_is_better}
