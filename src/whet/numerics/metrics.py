"""The metrics used when none is given: one score per example, on NumPy arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from whet.errors import MetricError
from whet.specs.recipe import Metric

Floats = npt.NDArray[np.floating]


def accuracy(outputs: Floats, targets: npt.NDArray[np.integer]) -> Floats:
    """1.0 where the highest of `outputs` (n, classes) is the class in `targets` (n,), else 0.0."""
    targets = np.asarray(targets)
    outputs = np.asarray(outputs)
    if outputs.ndim < 2 or outputs.shape[:-1] != targets.reshape(targets.shape).shape[: outputs.ndim - 1]:
        raise MetricError(
            f"accuracy needs outputs of shape (n, classes) and integer targets (n,), got {outputs.shape} and {targets.shape}."
        )
    hits: Floats = (np.argmax(outputs, axis=-1) == targets).astype(np.float64)
    return hits.reshape(len(hits), -1).mean(axis=1)


def mean_squared_error(outputs: Floats, targets: Floats) -> Floats:
    """The squared error of every example, averaged over its other axes."""
    outputs, targets = np.asarray(outputs, np.float64), np.asarray(targets, np.float64)
    if outputs.size != targets.size:
        raise MetricError(f"mean_squared_error needs outputs and targets of one size, got {outputs.shape} and {targets.shape}.")
    error: Floats = (outputs.reshape(len(outputs), -1) - targets.reshape(len(targets), -1)) ** 2
    return error.mean(axis=1)


ACCURACY = Metric(accuracy, name="accuracy")
MEAN_SQUARED_ERROR = Metric(mean_squared_error, higher_is_better=False, name="mean_squared_error")


def default_metric(targets: npt.NDArray[np.generic]) -> Metric:
    """Accuracy for integer targets, the mean squared error for others."""
    return ACCURACY if np.issubdtype(np.asarray(targets).dtype, np.integer) else MEAN_SQUARED_ERROR
