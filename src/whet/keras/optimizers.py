"""An optimizer of a model, made one of the smaller model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from whet.errors import ModelError
from whet.graph.ids import IntArray
from whet.keras.sizes import named_weights
from whet.keras.views import to_numpy


def slice_optimizer(optimizer: Any, model: Any, smaller: Any, kept: Mapping[str, Mapping[int, IntArray]]) -> None:
    """*In place*: an optimizer that trained `model` trains `smaller`, its state without the positions that left.

    kept: by weight and axis, the positions that remain. Step count and learning rate stay as they are.

    Raises:
        ModelError: it trained other variables, or keeps state of another shape than its variables'.
    """
    if not getattr(optimizer, "built", False):
        return  # it has no state yet, and takes the variables of the model that it is compiled with
    names = {id(variable): name for name, variable in named_weights(model).items()}
    trained = [names.get(id(variable)) for variable in optimizer._trainable_variables]
    after = named_weights(smaller)
    if any(name not in after for name in trained):
        raise ModelError(
            f"optimizer= ({type(optimizer).__name__}) was built for variables that are not the model's. Pass the one that "
            "trained this model, or leave it out and start with a new one."
        )
    new = type(optimizer).from_config(optimizer.get_config())
    new.build([after[str(name)] for name in trained])
    state = _by_variable(optimizer, len(trained))
    for attribute, slots in _by_variable(new, len(trained)).items():
        for name, old, slot in zip(trained, state.get(attribute, ()), slots, strict=True):
            if slot is not None:
                slot.assign(_left(old, slot, kept.get(str(name), {}), type(optimizer).__name__))
    listed = {id(slot) for slots in state.values() for slot in slots}
    for old, variable in zip(optimizer.variables, new.variables, strict=True):
        if id(old) not in listed:  # the step count, the learning rate
            variable.assign(_left(old, variable, {}, type(optimizer).__name__))
    vars(optimizer).update(vars(new))


def forget(optimizer: Any, variable: Any, where: Any) -> None:
    """*In place*: the moments that `optimizer` keeps of `variable` become zero at the positions `where`."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    trained = inner._trainable_variables if getattr(inner, "built", False) else []
    for slots in _by_variable(inner, len(trained)).values():
        for one, slot in zip(trained, slots, strict=True):
            if one is variable and slot is not None and tuple(slot.shape) == tuple(variable.shape):
                slot.assign(keras.ops.where(keras.ops.convert_to_tensor(where), keras.ops.zeros_like(slot.value), slot.value))


def _by_variable(optimizer: Any, count: int) -> dict[str, list[Any]]:
    """The lists that hold one state variable for each trained one."""
    found = {}
    for attribute, value in vars(optimizer).items():
        if isinstance(value, list) and len(value) == count and attribute not in ("_trainable_variables", "_variables"):
            if count and all(slot is None or isinstance(slot, keras.Variable) for slot in value):
                found[attribute] = list(value)
    return found


def _left(old: Any, slot: Any, axes: Mapping[int, IntArray], kind: str) -> Any:
    value = np.array(to_numpy(old))
    if tuple(old.shape) != tuple(slot.shape):
        for axis, positions in axes.items():
            if axis < value.ndim:
                value = np.take(value, positions, axis)
    if value.shape != tuple(slot.shape):
        raise ModelError(
            f"The state of {kind} has shape {tuple(old.shape)}, and channels that left cannot be taken from it. Leave "
            "optimizer= out and start with a new one."
        )
    return value
