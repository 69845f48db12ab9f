"""Stored weights in the layers that another process writes: attention, recurrent layers, convolutions of three dimensions.

PyTorch's exporter turns and reshapes their kernels as it likes. Its constants are matched with the planned weights by their
values, and those that are found are made of codes.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import ExportError
from whet.keras.onnx_graph import Late, Writer
from whet.keras.onnx_operations import Weights
from whet.keras.quantize import quantized_view

Array = npt.NDArray[Any]
FIRST_VALUES = 256  # which are compared before all are


def written_constants(writer: Writer, weights: Weights, late: Late, graph: Any) -> dict[str, str]:
    """Constants of `graph`, by name, and the tensors that take their place, whose nodes are appended to the writer's.

    Raises:
        ExportError: a weight that the plan stores is no constant there, in any order of its axes.
    """
    wanted = [name for name in late.call.node.weights if weights.is_stored(name)]
    constants = {t.name: writer.onnx.numpy_helper.to_array(t) for t in graph.initializer} if wanted else {}
    found: dict[str, str] = {}
    for name in wanted:
        view = quantized_view(weights.program.kernels[name])
        array = np.asarray(view.array, np.float32)
        places = {key: order for key, constant in constants.items() if (order := turned(array, constant)) is not None}
        if not places:
            raise ExportError(
                f"The weight {name!r} is to be stored in fewer bits, and PyTorch's exporter, which writes this layer "
                f"({type(late.call.operation).__name__}), has merged it with something else. Leave the layer in float: "
                f"Quantize(…, keep=[{late.call.node.layer!r}])."
            )
        for key, order in places.items():
            tensor = weights.kernel(name, order, order.index(view.out_axis % array.ndim))
            same = tuple(array.shape[axis] for axis in order) == constants[key].shape
            found[key] = tensor if same else writer.reshape(tensor, constants[key].shape, f"{name}_shaped")
    return found


def turned(array: Array, constant: Array) -> tuple[int, ...] | None:
    """The order of axes in which `array`, reshaped, is `constant`; its own shape is tried first."""
    if constant.dtype != array.dtype or constant.size != array.size:
        return None
    flat = constant.reshape(-1)
    orders = sorted(permutations(range(array.ndim)), key=lambda order: [array.shape[a] for a in order] != [*constant.shape])
    for order in orders:
        made = np.transpose(array, order)
        few = np.unravel_index(np.arange(min(FIRST_VALUES, made.size)), made.shape)
        if np.array_equal(made[few], flat[:FIRST_VALUES]) and np.array_equal(made.reshape(-1), flat):
            return order
    return None
