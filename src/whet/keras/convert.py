"""Conversion of a planned model to stored integers: int8 kernels, int32 biases, nothing left of weight quantization.

The layers keep their own computation: their class is exchanged for one whose `kernel` and `bias` are read from the codes.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from whet.graph.placement import Plan
from whet.keras.clone import Layer, Model, Program, Tensor, assemble
from whet.keras.quantize import bias_codes, inserter, planned, quantized_view
from whet.numerics.affine import QParams, spread
from whet.numerics.codebook import Codebook


def convert(model: Model, plan: Plan) -> Model:
    """A copy of the float `model` that stores integer weights (two to eight bits in int8) and int32 biases.

    It computes in float from the stored codes, with the values of the simulation. Weights cast by the plan are stored in
    their 16-bit type.

    Raises:
        ModelError: the plan was made for another model.
    """
    program = planned(model, plan)
    layers = {name: _holder(program, name) for name in (*plan.weights, *plan.casts, *plan.biases)}
    codes = {name: kernel_codes(program, name, plan) for name in plan.weights}
    biases = bias_codes(program, plan)
    for name, params in plan.weights.items():
        shape = program.kernels[name].variable.shape
        stored = codes[name].reshape(shape)
        _exchange(layers[name], "kernel", stored, _layout(params, shape))
    for name, integers, scale in biases:
        _exchange(layers[name], "bias", integers, np.broadcast_to(scale, integers.shape))
    for name, dtype in plan.casts.items():
        _exchange(layers[name], "kernel", ops.cast(program.kernels[name].variable, dtype), None)
    return assemble(program, insert=inserter(program, plan))


def kernel_codes(program: Program, name: str, plan: Plan) -> npt.NDArray[Any]:
    """The codes of a weight in the layout in which it is quantized: int8 up to eight bits, else int16."""
    array = np.asarray(quantized_view(program.kernels[name]).array, np.float32)
    return plan.encode(name, array).astype(np.int8 if plan.weights[name].bits <= 8 else np.int16)


def _layout(params: QParams | Codebook, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The scale in a shape that broadcasts against the kernel."""
    if params.axis is None:
        return params.scale
    if params.scale.size != shape[params.axis]:  # depthwise, a channel for each (in, multiplier)
        return params.scale.reshape(shape[-2:])
    return np.asarray(spread(params.scale, shape, params.axis, params.group))


def _holder(program: Program, name: str) -> Layer:
    """The layer whose kernel or bias bears `name`."""
    variable = program.kernels[name].variable if name in program.kernels else program.biases[name]
    return next(c.operation for c in program.calls if any(v is variable for v in getattr(c.operation, "weights", ())))


def _exchange(layer: Layer, attribute: str, codes: Any, scale: npt.NDArray[np.float32] | None) -> None:
    """Replace a float variable of `layer` by `codes`, times `scale` where one is given; Keras' own private steps."""
    old = getattr(layer, attribute)
    layer._untrack_variable(old)
    for private in (f"_{attribute}", attribute):
        if layer.__dict__.pop(private, None) is not None and hasattr(layer, "_delete_tracking"):
            layer._delete_tracking(private)  # TensorFlow's own record; Keras' delattr would collect garbage each time
    layer._tracker.unlock()
    stored = _variable(layer, f"{attribute}_codes", codes)
    factor = None if scale is None else _variable(layer, f"{attribute}_scale", scale)
    layer._tracker.lock()

    def value(self: Layer) -> Tensor:
        array = ops.cast(stored, self.compute_dtype)
        return array if factor is None else array * ops.cast(factor, self.compute_dtype)

    kind = type(layer)
    layer.__class__ = type(f"Integer{kind.__name__.removeprefix('Integer')}", (kind,), {attribute: property(value)})


def _variable(layer: Layer, name: str, array: Any) -> Any:
    dtype = keras.backend.standardize_dtype(array.dtype)
    made = layer.add_weight(
        name=name, shape=tuple(array.shape), dtype=dtype, initializer="zeros", trainable=False, autocast=False
    )
    made.assign(array)
    return made
