"""Smaller tensors and the attributes that say so, given to the layers of a Keras model, and what was given remembered."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from whet.errors import ModelError
from whet.keras.views import own_weights, unique, walk

_KERAS_LISTS = ("_layers", "_tracked", "_metrics")  # in which Keras itself keeps layers
_noted: weakref.WeakKeyDictionary[Any, Sizes] = weakref.WeakKeyDictionary()


BUILT = "built"  # an attribute of `Sizes`: the shape that the configuration of a layer inside another says it was built with


@dataclass(frozen=True, slots=True)
class Sizes:
    """What removal has made of a model: {layer or operation path: {attribute: value}}, and the shape of each smaller weight.

    dropped: the places of the blocks that left among all that could, one tuple for each time that some did; of a subclassed
    model their places among all its layers.
    """

    attributes: Mapping[str, Mapping[str, Any]]
    shapes: Mapping[str, tuple[int, ...]]
    dropped: tuple[tuple[int, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        attributes = {path: {key: _plain(value) for key, value in row.items()} for path, row in self.attributes.items()}
        plain = {"attributes": attributes, "shapes": {name: list(shape) for name, shape in self.shapes.items()}}
        return plain | {"dropped": [list(places) for places in self.dropped]} if self.dropped else plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Sizes:
        """What `to_dict` gave."""
        attributes = {path: {key: _tuples(value) for key, value in row.items()} for path, row in plain["attributes"].items()}
        dropped = tuple(tuple(places) for places in plain.get("dropped", ()))
        return cls(attributes, {name: tuple(shape) for name, shape in plain["shapes"].items()}, dropped)

    def then(self, later: Sizes) -> Sizes:
        """Both, one after the other."""
        paths = dict.fromkeys((*self.attributes, *later.attributes))
        rows = {path: {**self.attributes.get(path, {}), **later.attributes.get(path, {})} for path in paths}
        return Sizes(rows, {**self.shapes, **later.shapes}, (*self.dropped, *later.dropped))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def noted(model: Any) -> Sizes | None:
    """What was removed from `model`; None where nothing was."""
    return _noted.get(model)


def note(model: Any, sizes: Sizes | None) -> None:
    """Remember what was removed from `model`, and from what it was copied of."""
    if sizes is not None:
        _noted[model] = sizes


def named_weights(model: Any) -> dict[str, Any]:
    """Every weight once: `layer path/variable name`, and the model's own by their names."""
    taken: set[str] = set()
    found: dict[int, tuple[str, Any]] = {}
    for path, layer in [*walk(model), ("", model)]:
        for variable in own_weights(layer):
            if id(variable) not in found:
                found[id(variable)] = unique(f"{path}/{variable.name}".lstrip("/"), taken), variable
    return dict(found.values())


def put(variable: Any, array: Any) -> None:
    """*In place*: another value of another shape. Whoever holds the variable holds the smaller one."""
    variable._shape = tuple(int(n) for n in array.shape)
    variable._initialize(keras.ops.cast(keras.ops.convert_to_tensor(array), variable.dtype))


def resize(model: Any, sizes: Sizes, operations: Mapping[str, Any]) -> None:
    """*In place*: give a model of the original's sizes those of `sizes`; values of smaller weights are lost.

    `operations` are its layers, and its operations where they have sizes, by path.

    Raises:
        ModelError: the model has no such layer or weight.
    """
    weights = named_weights(model)
    for name, shape in sizes.shapes.items():
        if name not in weights:
            raise ModelError(f"The model given has no weight {name!r}, of which channels were removed before it was saved.")
        if tuple(weights[name].shape) != shape:
            put(weights[name], np.zeros(shape, np.float32))
    write(operations, sizes.attributes)


def holder(model: Any, layer: Any) -> tuple[list[Any], int] | None:
    """The list among the model's attributes that holds this layer, and where; None where none does."""
    for name, value in vars(model).items():
        if isinstance(value, list) and name not in _KERAS_LISTS:
            for index, item in enumerate(value):
                if item is layer:
                    return value, index
    return None


def drop(model: Any, dropped: Sequence[Sequence[int]]) -> None:
    """*In place*: layers leave the lists in which a subclassed model holds them.

    dropped: for each time that some left, their places among all layers that there were then.

    Raises:
        ModelError: the model holds no such layer in a list.
    """
    for places in dropped:
        layers = [layer for _, layer in walk(model)]
        for place in places:
            found = holder(model, layers[place]) if place < len(layers) else None
            if found is None:
                raise ModelError(f"The model given holds no layer number {place} in a list, and what was saved had lost it.")
            del found[0][found[1]]


def write(operations: Mapping[str, Any], attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """*In place*: set attributes of layers and operations, where their configurations read them.

    Raises:
        ModelError: there is no such layer or operation.
    """
    for path, row in attributes.items():
        if path not in operations:
            raise ModelError(f"The model given has no layer {path!r}, of which channels were removed before it was saved.")
        for name, value in row.items():
            _set(operations[path], name, value)
    for operation in {id(operations[path]): operations[path] for path in attributes}.values():
        track = getattr(operation, "_track_variables", None)  # Keras' torch backend keeps its own list of parameters
        if track is not None and getattr(operation, "built", False):
            track()


def _set(operation: Any, name: str, value: Any) -> None:
    if name == "input_spec":
        spec = operation.input_spec
        if isinstance(spec, keras.layers.InputSpec) and spec.axes:
            axes = {axis: value.get(str(axis), n) for axis, n in spec.axes.items()}
            operation.input_spec = keras.layers.InputSpec(ndim=spec.ndim, min_ndim=spec.min_ndim, axes=axes)
        return
    if name == BUILT:
        operation._build_shapes_dict = {"input_shape": value}
        return
    if name == "input_shapes":  # of a nested model
        for tensor, shape in zip(operation.inputs, value, strict=True):
            tensor._shape = tensor._keras_history.operation._batch_shape = shape
        return
    *inside, name = name.split(".")  # the cell of a recurrent layer holds its sizes
    for part in inside:
        operation = getattr(operation, part)
    setattr(operation, name, list(value) if isinstance(getattr(operation, name), list) else value)
    if not isinstance(operation, keras.Layer):  # the configuration of an operation is what it was made with
        config = {key: item for key, item in operation.get_config().items() if key != "name"} | {name: value}
        operation._auto_config = type(operation._auto_config)(**config)
