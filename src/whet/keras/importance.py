"""What criteria ask of a Keras model and data: gradients of its weights, and the inputs that these multiply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from whet.data import Batches, primary
from whet.graph.groups import Family
from whet.graph.importance import family_scores
from whet.graph.inputs import statistic
from whet.keras.distill import ends_in_softmax
from whet.keras.gradients import gradients
from whet.keras.inputs import InputReader
from whet.keras.model import arrange
from whet.keras.objective import default_loss
from whet.keras.sizes import named_weights
from whet.keras.views import kernels, own_weights, to_numpy, walk
from whet.specs import OBS, Fisher, Movement, UserCriterion
from whet.specs.criteria import FROM_GRADIENTS, FROM_INPUTS

Floats = npt.NDArray[np.float64]
Loss = Callable[[Any, Any], Any]
USER_BATCHES = 8  # that a user's criterion gets gradients of


def scores_of(model: Any, families: Sequence[Family], criterion: Any, data: Batches | None) -> list[Floats]:
    """One score for each group of each family; the lowest leave first.

    Raises:
        SpecError: the criterion needs data and there is none, or batch norms and a family has none.
    """
    weights = {name: to_numpy(variable) for name, variable in named_weights(model).items()}
    scales = {
        f"{path}/{variable.name}"
        for path, layer in walk(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        for variable in own_weights(layer)
        if variable is layer.gamma
    }
    return family_scores(families, criterion, weights.__getitem__, statistics_for(model, criterion, data), scales)


def statistics_for(model: Any, criterion: Any, data: Batches | None, loss: Loss | None = None) -> dict[str, Any]:
    """By weight name what `weight_importance` needs beside the weight; the model is unchanged.

    Empty without data, and for criteria that need none. loss: of (outputs, targets); None: the default one.
    """
    if data is None:
        return {}
    if isinstance(criterion, FROM_INPUTS):
        reader = InputReader(model, data, criterion.batches)
        sums = reader.sums([kernel.name for kernel in kernels(model)], isinstance(criterion, OBS))
        return {name: statistic(found, criterion) for name, found in sums.items()}
    if not isinstance(criterion, (*FROM_GRADIENTS, UserCriterion)):
        return {}
    found = gradients_for(model, data, getattr(criterion, "batches", USER_BATCHES), isinstance(criterion, Fisher), loss)
    if isinstance(criterion, Movement):  # one step of SGD
        weights = named_weights(model)
        return {name: -to_numpy(weights[name]) * gradient for name, gradient in found.items()}
    return found


def gradients_for(
    model: Any, data: Batches, batches: int, squared: bool = False, loss: Loss | None = None, seed: int = 0
) -> dict[str, Any]:
    """By weight name the mean of ∂L/∂w over some batches, or of its square; the model is unchanged."""
    named = {name: variable for name, variable in named_weights(model).items() if "float" in str(variable.dtype)}
    sums: dict[str, Any] = {}
    is_normalized, chosen = ends_in_softmax(model), data.some(batches, seed)

    def default(outputs: Any, targets: Any) -> Any:
        return default_loss(primary(outputs), targets, is_normalized=is_normalized)

    for inputs, targets in chosen:
        given = keras.tree.map_structure(keras.ops.convert_to_tensor, arrange(model, inputs))
        wanted = keras.tree.map_structure(keras.ops.convert_to_tensor, targets)

        def value(given: Any = given, wanted: Any = wanted) -> Any:
            return (loss or default)(model(given, training=False), wanted)

        for name, gradient in zip(named, gradients(value, list(named.values())), strict=True):
            if gradient is not None:
                found = gradient.astype(np.float64)
                sums[name] = sums.get(name, 0) + (found**2 if squared else found)
    return {name: (total / len(chosen)).astype(np.float32) for name, total in sums.items()}
