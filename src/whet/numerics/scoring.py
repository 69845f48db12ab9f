"""What a metric says about outputs: the checks that every caller of a user's metric needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.data import concatenate, rows
from whet.errors import MetricError
from whet.specs.recipe import Metric


def scores_of(metric: Metric, outputs: Any, targets: Any) -> npt.NDArray[np.float64]:
    """The scores of `metric`: shape (rows,), or () where it is not per example.

    Raises:
        MetricError: it returned something else than finite numbers of that shape.
    """
    result = metric.fn(outputs, targets)
    try:
        scores = np.asarray(result, np.float64)
    except (TypeError, ValueError) as cause:
        raise MetricError(f"The metric {metric.name!r} must return numbers, got {type(result).__name__}.") from cause
    n = rows(outputs)
    if metric.per_example and scores.shape != (n,):
        if scores.size != n:
            raise MetricError(
                f"The metric {metric.name!r} must return one score for each of {n} examples, got shape {scores.shape}. "
                "If it returns one number for all, pass Metric(fn, per_example=False)."
            )
        scores = scores.reshape(n)
    elif not metric.per_example and scores.size != 1:
        raise MetricError(
            f"The metric {metric.name!r} with per_example=False must return one number, got shape {scores.shape}."
        )
    if not np.isfinite(scores).all():
        raise MetricError(f"The metric {metric.name!r} returned {scores[~np.isfinite(scores)].flat[0]}; scores must be finite.")
    return scores if metric.per_example else scores.reshape(())


def mean_score(metric: Metric, batches: Iterable[tuple[Any, Any]]) -> float:
    """The mean score over `(outputs, targets)` batches; a metric that is not per example is called once on everything."""
    if metric.per_example:
        parts = [scores_of(metric, outputs, targets) for outputs, targets in batches]
        return float(np.mean(np.concatenate(parts)))
    pairs = list(batches)
    return float(scores_of(metric, concatenate([o for o, _ in pairs]), concatenate([t for _, t in pairs])))
