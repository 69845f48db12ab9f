"""The variables of a program that a plan may replace, by name."""

from __future__ import annotations

from typing import Any

import keras

from whet.errors import ModelError
from whet.keras.clone import Layer, Program
from whet.keras.views import own_weights, walk

NORMS = (keras.layers.LayerNormalization, keras.layers.RMSNormalization)


def named_variables(program: Program) -> dict[str, Any]:
    """Kernels, biases, and what norms multiply by and add: `layer path/gamma`."""
    found: dict[str, Any] = {name: kernel.variable for name, kernel in program.kernels.items()}
    found |= program.biases
    for call in program.calls:
        if isinstance(call.operation, NORMS):
            found |= {f"{call.node.layer}/{variable.name}": variable for variable in own_weights(call.operation)}
    return found


def holder(program: Program, name: str) -> Layer:
    """The layer, perhaps inside another, that holds a kernel or bias itself.

    Raises:
        ModelError: there is none.
    """
    variable = program.kernels[name].variable if name in program.kernels else program.biases[name]
    for call in program.calls:
        if isinstance(call.operation, keras.Layer):
            for layer in (call.operation, *(inside for _, inside in walk(call.operation))):
                if any(own is variable for own in own_weights(layer)):
                    return layer
    raise ModelError(f"No layer of this model holds {name!r}.")


def attribute(layer: Layer, variable: Any) -> str:
    """The public name under which `layer` holds `variable`; Keras may keep it behind an underscore."""
    return next(name.removeprefix("_") for name, held in vars(layer).items() if held is variable)
