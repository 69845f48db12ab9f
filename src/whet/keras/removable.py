"""What may leave a Keras model, and its layers alone at any width: for choices that are measured."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from whet.data import Batches
from whet.graph.removable import Removable, may_leave
from whet.graph.selection import eligible
from whet.keras import surgery
from whet.keras.clone import record
from whet.keras.groups import read_model
from whet.keras.importance import scores_of
from whet.keras.model import arrange, copy, predict
from whet.keras.sizes import named_weights
from whet.keras.views import to_numpy
from whet.specs import Prune

_LAYERS = {  # kind: the attribute of its width, the weight's axes of output and input channels from the end
    "Conv1D": ("filters", -1, -2),
    "Conv2D": ("filters", -1, -2),
    "Conv3D": ("filters", -1, -2),
    "Dense": ("units", -1, -2),
    "DepthwiseConv1D": (None, -2, None),
    "DepthwiseConv2D": (None, -2, None),
}


def removable(model: Any, spec: Prune, *, example: Any, data: Batches | None) -> Removable:
    """The families of `model` that may lose groups, and their scores by the criterion of `spec`; `model` is unchanged.

    Raises:
        ModelError: the model's graph cannot be drawn, or nothing may leave. SpecError: the criterion needs data.
    """
    work = copy(model)
    reading = read_model(work, example)
    found = eligible(reading.groups, spec)
    families, _ = may_leave(found, surgery.refused(reading, found.families))
    scores = tuple(scores_of(work, list(families), spec.criterion, data))
    groups = reading.groups
    return Removable(
        groups, families, scores, lambda gone: surgery.silenced(work, reading, gone), lambda inputs: predict(work, inputs)
    )


@dataclass(frozen=True, slots=True, eq=False)
class KerasLayer:
    """See `whet.graph.removable.TimedLayer`."""

    name: str
    tensor: str
    made: int
    read: int | None
    signature: Hashable
    calls: int
    config: dict[str, Any]
    shape: tuple[int, ...]

    def build(self, made: int, read: int) -> tuple[Any, Any]:
        """A model of this layer alone at these widths, and an example of its input, one row."""
        kind, config = getattr(keras.layers, str(self.signature[0])), dict(self.config)  # type: ignore[index]
        attribute = _LAYERS[kind.__name__][0]
        if attribute is not None:
            config[attribute] = made
        first = config.get("data_format") == "channels_first"
        width = read if self.read is not None else made
        shape = (width, *self.shape[1:]) if first else (*self.shape[:-1], width)
        entry = keras.Input(shape)
        return keras.Model(entry, kind.from_config(config)(entry)), np.zeros((1, *shape), np.float32)


def timed_layers(model: Any, example: Any) -> list[KerasLayer]:
    """The convolutions and dense layers of `model`'s graph, each with the shape of its input, without the batch axis."""
    work = copy(model)
    program = record(work, lambda call, path, program: [call], arrange(work, example), copied=work)
    names = {id(variable): name for name, variable in named_weights(work).items()}
    found: dict[Any, list[KerasLayer]] = {}
    for call in program.calls:
        kind = type(call.operation).__name__
        shape = tuple(n or 0 for n in call.inputs[0].shape[1:]) if call.inputs else ()
        if kind not in _LAYERS or 0 in shape or getattr(call.operation, "groups", 1) != 1:
            continue
        if getattr(call.operation, "depth_multiplier", 1) != 1:
            continue
        attribute, made, read = _LAYERS[kind]
        rank = len(call.operation.kernel.shape)
        config = {key: value for key, value in call.operation.get_config().items() if key not in ("name", "dtype")}
        kept = {key: str(value) for key, value in config.items() if key != attribute}
        inner = shape[1:] if config.get("data_format") == "channels_first" else shape[:-1]
        signature = (kind, inner, tuple(sorted(kept.items())))
        layer = KerasLayer(
            call.node.layer,
            names[id(call.operation.kernel)],
            rank + made,
            None if read is None else rank + read,
            signature,
            1,
            config,
            shape,
        )
        found.setdefault((call.node.layer, shape), []).append(layer)
    return [replace(rows[0], calls=len(rows)) for rows in found.values()]


@contextmanager
def kept(model: Any) -> Iterator[None]:
    """*In place*: all weights have the same values after the block as before it."""
    before = [to_numpy(variable).copy() for variable in model.weights]
    try:
        yield
    finally:
        for variable, value in zip(model.weights, before, strict=True):
            variable.assign(value)
