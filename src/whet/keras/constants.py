"""Channels that leave but were not zero: what they always were is added to the layers that read them.

A channel whose weights are zero, or whose batch norm scales it to nothing, is a constant c behind its bias and activation
(`σ(0) = 1/2`). A layer that reads it adds `c · kernel[channel]` to its outputs, and this goes into its bias, or into the moving
mean of the batch norm behind it. A convolution's kernel is summed; where it reads padding the original adds less, and this is
told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from whet.graph.cutting import CONSTANT, Constants, kinds_of
from whet.graph.groups import Gone
from whet.graph.ids import IntArray
from whet.keras import clone
from whet.keras.groups import Reading
from whet.keras.views import to_numpy

L = keras.layers
Floats = npt.NDArray[np.float64]
UNSEEN = -1
_LINEAR = (L.Dense, L.Conv1D, L.Conv2D, L.Conv3D)


@dataclass(slots=True)
class Seen:
    """A layer that reads channels which leave, at positions `at`, and their least and greatest values so far."""

    path: str
    layer: Any
    at: IntArray
    low: Floats = field(default_factory=lambda: np.zeros(0))
    high: Floats = field(default_factory=lambda: np.zeros(0))

    def see(self, x: Any) -> None:
        """Note the values of an input of the layer."""
        values = to_numpy(keras.ops.stop_gradient(x)).astype(np.float64)
        first = getattr(self.layer, "data_format", "channels_last") == "channels_first"
        rows = np.moveaxis(values, 1 if first else -1, 0)[self.at].reshape(len(self.at), -1)
        low, high = rows.min(1), rows.max(1)
        self.low = np.minimum(self.low, low) if len(self.low) else low
        self.high = np.maximum(self.high, high) if len(self.high) else high


def fold_constants(model: Any, reading: Reading, gone: Gone, run: Any, example: Any) -> Constants:
    """*In place*: biases take over what channels that are `gone` always were; what cannot be taken over is told.

    Whether a channel is constant is seen on the example that the model was read with and on other numbers in its place.
    run: `run(model, example)` computes the model's outputs.
    """
    found, kinds = Constants(), dict.fromkeys(np.flatnonzero(gone).tolist(), UNSEEN)
    held = reading.groups.held_roots()
    names = reading.reader.names
    readers = []
    for path, layer in reading.reader.operations.items():
        if isinstance(layer, _LINEAR) and getattr(layer, "groups", 1) == 1 and id(layer.kernel) in names:
            at = np.flatnonzero(gone[held[names[id(layer.kernel)]][len(layer.kernel.shape) - 2]])
            if len(at):
                readers.append(Seen(path, layer, at))
    if readers:
        with _watched(readers):
            for inputs in (example, keras.tree.map_structure(_others, example)):
                run(model, inputs)
    for reader in readers:
        roots = held[names[id(reader.layer.kernel)]][len(reader.layer.kernel.shape) - 2][reader.at]
        if not len(reader.low):  # it is called in training alone
            continue
        kind = kinds_of(reader.low, reader.high)
        for root, one in zip(roots.tolist(), kind.tolist(), strict=True):
            kinds[root] = max(kinds[root], one)
        if (kind == CONSTANT).any():
            _fold(reading, reader, kind == CONSTANT, found)
    found.count(kinds.values())
    return found


@contextmanager
def _watched(readers: list[Seen]) -> Iterator[None]:
    """Show every input of these layers to their readers."""

    def shown(reader: Seen, call: Any) -> Any:
        def seeing(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            reader.see(inputs)
            return call(inputs, *args, **kwargs)

        return seeing

    for reader in readers:
        reader.layer.call = shown(reader, reader.layer.call)
    try:
        yield
    finally:
        for reader in readers:
            del reader.layer.call


def _others(array: Any) -> Any:
    """Other inputs of the same kind: what varies with the inputs varies between the two."""
    given = np.asarray(array)
    turned = np.flip(given, -1) if given.ndim else given
    if given.dtype.kind != "f":
        return np.ascontiguousarray(turned)
    waves = np.sin(np.arange(given.size) * 1.7).reshape(given.shape)
    return (turned * -1.5 + waves).astype(given.dtype)


def _fold(reading: Reading, reader: Seen, chosen: npt.NDArray[np.bool_], found: Constants) -> None:
    """Add what the chosen channels always were to what the layer makes."""
    values, at, layer = ((reader.low + reader.high) / 2)[chosen], reader.at[chosen], reader.layer
    row: dict[str, Any] = {"layer": reader.path, "channels": len(at), "largest": float(np.abs(values).max())}
    norm = None if layer.use_bias else _norm_behind(reading, layer)
    if not layer.use_bias and norm is None:
        found.left.append({**row, "reason": "it has no bias, and no batch norm reads it alone"})
        return
    into, sign = (layer.bias, 1) if norm is None else (norm.moving_mean, -1)
    kernel = np.moveaxis(to_numpy(layer.kernel).astype(np.float64), -2, 0)[at]
    columns = kernel.reshape(len(at), -1, kernel.shape[-1]).sum(1)  # of a convolution: over its kernel
    into.assign(to_numpy(into) + (sign * (values @ columns)).astype(np.float32))
    name = reading.reader.names[id(into)]
    found.folded.append({**row, "into": name, "borders": "differ" if _pads(layer) else "exact"})


def _norm_behind(reading: Reading, layer: Any) -> Any:
    """The batch norm with statistics of its own that alone reads what `layer` makes, and reads nothing else."""
    calls = reading.reader.calls
    made = {ref.name for call in calls if call.operation is layer for ref in clone.refs(call.outputs)}
    norms = {id(call.operation): call.operation for call in calls if made & {ref.name for ref in call.inputs}}
    norm = next(iter(norms.values())) if len(norms) == 1 else None
    if not isinstance(norm, L.BatchNormalization) or made & reading.reader.leaving:
        return None
    read = {ref.name for call in calls if call.operation is norm for ref in call.inputs}
    return norm if read <= made else None


def _pads(layer: Any) -> bool:
    """Whether a convolution reads zeros around its input."""
    return getattr(layer, "padding", "valid") != "valid" and any(n > 1 for n in layer.kernel_size)
