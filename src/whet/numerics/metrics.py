"""The metrics used when none is given: one score per example, on NumPy arrays.

Of a model with several outputs they read the one named `logits`, else the first, as the default losses do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from whet.data import primary
from whet.errors import MetricError
from whet.specs.recipe import Metric

Floats = npt.NDArray[np.floating]


def accuracy(outputs: Any, targets: Any) -> Floats:
    """1.0 where the highest of `outputs` (n, classes) is the class in `targets` (n,), else 0.0."""
    outputs, targets = _array("accuracy", outputs), _array("accuracy", targets)
    if targets.ndim == outputs.ndim and targets.ndim > 1 and targets.shape[-1] == 1:
        targets = targets[..., 0]
    if outputs.ndim < 2 or outputs.shape[-1] < 2 or outputs.shape[:-1] != targets.shape:
        raise MetricError(
            "accuracy needs outputs of shape (n, classes) with at least 2 classes and integer targets of shape (n,), "
            f"got {outputs.shape} and {targets.shape}. Pass a metric of your own for other shapes."
        )
    hits: Floats = (np.argmax(outputs, axis=-1) == targets).astype(np.float64)
    means: Floats = hits.reshape(len(hits), -1).mean(axis=1)
    return means


def mean_squared_error(outputs: Any, targets: Any) -> Floats:
    """The squared error of every example, averaged over its other axes."""
    outputs, targets = _array("mean_squared_error", outputs), _array("mean_squared_error", targets)
    if outputs.size != targets.size or outputs.ndim == 0 or outputs.shape[:1] != targets.shape[:1]:
        raise MetricError(f"mean_squared_error needs outputs and targets of one size, got {outputs.shape} and {targets.shape}.")
    n = len(outputs)
    error: Floats = (outputs.reshape(n, -1).astype(np.float64) - targets.reshape(n, -1).astype(np.float64)) ** 2
    means: Floats = error.mean(axis=1)
    return means


def _array(name: str, value: Any) -> npt.NDArray[Any]:
    value = primary(value)
    if value is None:
        raise MetricError(f"{name} needs an array of outputs and one of targets, got None. Give (inputs, targets) batches.")
    return np.asarray(value)


ACCURACY = Metric(accuracy, name="accuracy")
MEAN_SQUARED_ERROR = Metric(mean_squared_error, higher_is_better=False, name="mean_squared_error")


def default_metric(targets: npt.NDArray[np.generic]) -> Metric:
    """Accuracy for integer targets, the mean squared error for others."""
    return ACCURACY if np.issubdtype(np.asarray(targets).dtype, np.integer) else MEAN_SQUARED_ERROR
