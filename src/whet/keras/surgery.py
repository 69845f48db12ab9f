"""Real removal: smaller weights and attributes that say so, checked against the original with the same channels silenced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from whet.data import leaves
from whet.errors import DataError, ModelError
from whet.graph.cutting import difference
from whet.graph.groups import Family, Gone
from whet.graph.ids import Ids, IntArray
from whet.keras.calls import SHAPE, Count, Edit, Own, Reader
from whet.keras.clone import has_graph
from whet.keras.groups import Reading
from whet.keras.model import arrange, copy, short
from whet.keras.sizes import Sizes, named_weights, note, noted, put, write
from whet.keras.views import own_weights, to_numpy, walk

TOLERANCE = 1e-4  # of the largest output; float arithmetic in another order
_HALF_TOLERANCE = 3e-2  # of 16-bit models
_ROWS = 8  # of the example, that the outputs are compared on


def refused(reading: Reading, families: tuple[Family, ...]) -> dict[str, str]:
    """Families whose sizes are written where Whet cannot change them: by name the reason."""
    found, ids = {}, reading.groups.structure.ids
    for family in families:
        fixed = [name for name in family.sites if name not in reading.reader.writable]
        count = _counter(ids, reading.groups.gone([family.roots[:1]]))
        for own in reading.reader.own:
            changed = [edit for edit in own.edits if edit.value(len) != edit.value(count)]
            if changed and not _fits_again(own, changed, reading.reader, count):
                fixed += [f"{edit.path}.{edit.attribute}" for edit in changed]
        if fixed:
            found[family.name] = f"the model's own code fixes its size ({', '.join(fixed)})"
    return found


def _fits_again(own: Own, changed: list[Edit], reader: Reader, count: Count) -> bool:
    """Whether a layer of the user's, made again from its configuration and called on smaller inputs, takes the new sizes."""
    smaller = iter([tuple(map(count, value)) for value in own.inputs])

    def less(leaf: Any) -> Any:
        return keras.KerasTensor(next(smaller), leaf.dtype) if isinstance(leaf, keras.KerasTensor) else leaf

    args, kwargs = keras.tree.map_structure(less, (own.args, own.kwargs))
    try:
        draft = type(own.layer).from_config(own.layer.get_config())
        twins = _twins(own.layer, draft)
        for edit in changed:
            if not edit.attribute.endswith(SHAPE):
                write({edit.path: twins[id(reader.operations[edit.path])]}, {edit.path: {edit.attribute: edit.value(count)}})
        again = type(own.layer).from_config(draft.get_config())
        again(*args, **kwargs)
        twins = _twins(own.layer, again)
    except Exception:  # its code does not take smaller inputs: what is read there stays, and is named
        return False
    return all(_size(twins[id(reader.operations[edit.path])], edit.attribute) == edit.value(count) for edit in changed)


def _twins(layer: Any, again: Any) -> dict[int, Any]:
    """For the layer and each layer inside it, by id, the one in its place in `again`."""
    both = ([one, *(inner for _, inner in walk(one))] for one in (layer, again))
    return {id(old): new for old, new in zip(*both, strict=True)}


def _size(layer: Any, attribute: str) -> Any:
    """An attribute, or `<name>.shape` of a weight."""
    if attribute.endswith(SHAPE):
        name = attribute.removesuffix(SHAPE)
        return next((tuple(weight.shape) for weight in own_weights(layer) if weight.name == name), None)
    for part in attribute.split("."):
        layer = getattr(layer, part, None)
    return layer


def _counter(ids: Ids, gone: Gone) -> Count:
    """How many positions of an axis are left."""

    def left(axis: IntArray) -> int:
        return int((~gone[ids.find(axis)]).sum())

    return left


def sizes_without(reading: Reading, gone: Gone) -> Sizes:
    """The attributes and shapes that change when these groups leave."""
    held, left = reading.groups.structure.held, _counter(reading.groups.structure.ids, gone)
    attributes: dict[str, dict[str, Any]] = {}
    inside = (edit for own in reading.reader.own for edit in own.edits if not edit.attribute.endswith(SHAPE))
    for edit in (*reading.reader.edits, *inside):
        old, new = edit.value(len), edit.value(left)
        if old != new:
            row = attributes.setdefault(edit.path, {})
            row[edit.attribute] = row.get(edit.attribute, {}) | new if isinstance(new, dict) else new
    shapes = {}
    for name, axes in reading.groups.kept(gone).items():
        shapes[name] = tuple(len(axes[d]) if d in axes else n for d, n in enumerate(held[name].shape))
    return Sizes(attributes, shapes)


def removed(model: Any, reading: Reading, gone: Gone, example: Any) -> tuple[Any, float]:
    """`model`, which is changed, without these groups: itself or, with a layer graph of its own, a new one.

    And how far its outputs are from the original's with these groups silenced, of the largest.

    Raises:
        ModelError: the result is not the original with these groups silenced.
    """
    with silenced(model, reading, gone):
        expected = outputs(model, example)
    sizes = sizes_without(reading, gone)
    before, weights = noted(model), named_weights(model)
    for name, axes in reading.groups.kept(gone).items():
        value = to_numpy(weights[name])
        for axis, positions in axes.items():
            value = np.take(value, positions, axis)
        put(weights[name], value)
    write(reading.reader.operations, sizes.attributes)
    # The graph of a Functional model holds shapes: it is drawn again from the layers' configurations.
    made = copy(model) if has_graph(model) else model
    note(made, sizes if before is None else before.then(sizes))
    try:
        found = outputs(made, example)
    except DataError as cause:
        raise ModelError(
            f"The model does not run without these channels: {short(cause)} Name their layers in keep=."
        ) from cause
    worst = difference(found, expected)
    if not worst <= tolerance_of(model):
        raise ModelError(
            f"Removing these channels does not give the original with them silenced (outputs differ by {worst:.3g} of the "
            "largest): an operation is followed wrongly (please report it). Name layers in keep= to find out which."
        )
    return made, worst


def tolerance_of(model: Any) -> float:
    """How far its outputs may be from what is expected, of the largest output."""
    half = keras.backend.standardize_dtype(model.compute_dtype) in ("float16", "bfloat16")
    return _HALF_TOLERANCE if half else TOLERANCE


@contextmanager
def silenced(model: Any, reading: Reading, gone: Gone) -> Iterator[None]:
    """The original with the weights that read these groups at zero."""
    weights = named_weights(model)
    kept: dict[str, Any] = {}
    for name, axes in reading.groups.read(gone).items():
        kept[name] = to_numpy(weights[name]).copy()
        value = kept[name].copy()
        for d, at in axes.items():
            value[(slice(None),) * d + (at,)] = 0
        weights[name].assign(value)
    try:
        yield
    finally:
        for name, value in kept.items():
            weights[name].assign(value)


def outputs(model: Any, example: Any) -> list[Any]:
    """The outputs on the first rows of `example` in inference mode, not compiled: the model's layers may just have changed.

    Raises:
        DataError: the model cannot run on it.
    """
    given = arrange(model, keras.tree.map_structure(lambda array: array[:_ROWS], example))
    try:
        made = model(keras.tree.map_structure(keras.ops.convert_to_tensor, given), training=False)
    except Exception as cause:
        raise DataError(f"The model {model.name!r} cannot run on the example: {short(cause)}") from cause
    return leaves(keras.tree.map_structure(lambda tensor: to_numpy(keras.ops.stop_gradient(tensor)), made))
