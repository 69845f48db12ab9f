"""The variables of a program that a plan may replace, by name."""

from __future__ import annotations

from typing import Any

import keras

from whet.keras.clone import Program
from whet.keras.views import own_weights

NORMS = (keras.layers.LayerNormalization, keras.layers.RMSNormalization)


def named_variables(program: Program) -> dict[str, Any]:
    """Kernels, biases, and what norms multiply by and add: `layer path/gamma`."""
    found: dict[str, Any] = {name: kernel.variable for name, kernel in program.kernels.items()}
    found |= program.biases
    for call in program.calls:
        if isinstance(call.operation, NORMS):
            found |= {f"{call.node.layer}/{variable.name}": variable for variable in own_weights(call.operation)}
    return found
