"""What range every value of a program takes on calibration data, as an observer needs it, in constant memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from whet.data import Batches, rows
from whet.keras.clone import Program, Tensor, assemble
from whet.keras.model import predict
from whet.numerics.clipping import needs_histogram
from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.observers import HistogramRange, Range, observe_histogram, observe_moving_average
from whet.progress import task
from whet.specs.quantization import MinMax, MovingAverage, Observer


def calibrate(
    program: Program, calibration: Batches, progress: bool, observer: Observer | None = None
) -> dict[str, Range | HistogramRange]:
    """The state of `observer` (None: least and greatest values) for every floating-point value over all batches.

    NaN where a value was not finite.
    """
    observer = MinMax() if observer is None else observer
    whole = needs_histogram(observer)
    watched = [ref.name for ref in program.values()]

    def seen(tensors: dict[str, Tensor], _: Any) -> list[Tensor]:
        return [ops.cast(tensors[name], "float32") if whole else _extremes(tensors[name]) for name in watched]

    observed = assemble(program, outputs=seen)
    ranges: dict[str, Range | HistogramRange] = {}
    with task("Calibrating", None, enabled=progress) as shown:
        for inputs, _ in calibration:
            count = rows(inputs)
            for name, found in zip(watched, predict(observed, inputs), strict=True):
                ranges[name] = _observed(ranges.get(name), found, observer, count)
            shown.advance()
    return ranges


def _extremes(tensor: Tensor) -> Tensor:
    """(2,): least and greatest value; NaN where any is not finite."""
    tensor = ops.cast(tensor, "float32")
    pair = ops.stack([ops.min(tensor), ops.max(tensor)])
    return ops.where(ops.all(ops.isfinite(tensor)), pair, float("nan"))


def _observed(state: Any, found: np.ndarray[Any, Any], observer: Observer, count: int) -> Range | HistogramRange:
    """`found`: the values themselves where the observer needs a histogram, else their extremes."""
    if needs_histogram(observer):
        return observe_histogram(state, found, xp=xp)
    if isinstance(observer, MovingAverage):
        return observe_moving_average(state, found, observer.momentum, xp=xp)
    new = Range(float(found[0]), float(found[1]), count)
    if state is None:
        return new
    low, high = np.minimum(state.low, new.low), np.maximum(state.high, new.high)  # both keep a NaN
    return Range(float(low), float(high), state.count + new.count)
