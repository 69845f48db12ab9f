"""What a metric says about outputs: the checks that every caller of a user's metric needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.data import concatenate, leaves, rows
from whet.errors import MetricError
from whet.specs.recipe import Metric

Floats = npt.NDArray[np.float64]


def scores_of(metric: Metric, outputs: Any, targets: Any) -> Floats:
    """The scores of `metric`: shape (rows,), or () where it is not per example.

    Raises:
        MetricError: it failed, or returned something else than finite numbers of that shape; the metric is named.
    """
    scores = _call(metric, outputs, targets)
    if not metric.per_example:
        return _whole(metric, scores)
    n = rows(outputs if targets is None else targets)
    if scores.shape not in ((n,), (n, 1)):
        hint = " For one number of all examples write Metric(fn, per_example=False)." if scores.size == 1 else ""
        raise MetricError(
            f"The metric {metric.name!r} must return one score per example, shape ({n},); got shape {scores.shape}.{hint}"
        )
    scores = scores.reshape(n)
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise MetricError(
            f"The metric {metric.name!r} returned {scores[bad[0]]} for example {bad[0]} ({bad.size} of {n} such)."
        )
    return scores


def mean_score(metric: Metric, batches: Iterable[tuple[Any, Any]]) -> float:
    """The mean score over `(outputs, targets)` batches; a metric that is not per example is called once on everything."""
    if metric.per_example:
        parts = [scores_of(metric, outputs, targets) for outputs, targets in batches]
        return float(np.mean(np.concatenate(parts)))
    pairs = list(batches)
    return float(scores_of(metric, concatenate([o for o, _ in pairs]), concatenate([t for _, t in pairs])))


def _call(metric: Metric, outputs: Any, targets: Any) -> Floats:
    try:
        result = metric.fn(outputs, targets)
    except MetricError:
        raise
    except Exception as cause:
        raise MetricError(
            f"The metric {metric.name!r} failed on outputs {_shapes(outputs)} and targets {_shapes(targets)}: "
            f"{type(cause).__name__}: {cause}"
        ) from cause
    if hasattr(result, "detach"):
        result = result.detach().cpu()
    array = np.asarray(result)
    if array.dtype.kind not in "biuf":
        raise MetricError(f"The metric {metric.name!r} must return numbers, got {type(result).__name__}: {str(result)[:80]!r}.")
    return array.astype(np.float64)


def _whole(metric: Metric, score: Floats) -> Floats:
    if score.size != 1:
        raise MetricError(
            f"The metric {metric.name!r} has per_example=False and must return one number, got shape {score.shape}. "
            "For one score per example leave per_example out."
        )
    if not np.isfinite(score).all():
        raise MetricError(f"The metric {metric.name!r} returned {float(score.flat[0])}; it must return a finite number.")
    return score.reshape(())


def _shapes(value: Any) -> str:
    return ", ".join(str(np.shape(leaf)) for leaf in leaves(value))
