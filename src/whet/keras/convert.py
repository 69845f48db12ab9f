"""Conversion of a planned model to stored integers: int8 kernels, int32 biases, nothing left of weight quantization.

The layers keep their own computation: their class is exchanged for one whose `kernel` and `bias` are read from the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from whet.graph.placement import Plan
from whet.graph.storage import is_plain
from whet.keras.clone import Layer, Model, Program, Tensor, assemble
from whet.keras.qat import finish
from whet.keras.quantize import bias_codes, inserter, planned, quantized_view, round_at_run_time
from whet.keras.variables import attribute, holder
from whet.numerics.affine import QParams, spread
from whet.numerics.codebook import Codebook
from whet.specs.schemes import Float


def convert(model: Model, plan: Plan | None = None) -> Model:
    """A copy of the float `model` that stores integer weights (two to eight bits in int8) and int32 biases, levels as uint8
    codes beside their tables, 8-bit floats as such.

    It computes in float from the stored codes, with the values of the simulation. Weights cast by the plan are stored in
    their 16-bit type. Without `plan`, `model` is one that `prepare` made.

    Raises:
        ModelError: the plan was made for another model.
    """
    if plan is None:
        model, plan = finish(model)
    program = planned(model, plan)
    places = {name: _place(program, name) for name in (*plan.weights, *plan.casts, *plan.biases)}
    codes = {name: kernel_codes(program, name, plan) for name in plan.weights}
    biases = bias_codes(program, plan)
    for name, params in plan.weights.items():
        shape = program.kernels[name].variable.shape
        if is_plain(params):
            stored = codes[name].astype(np.int8).reshape(shape)
            _exchange(*places[name], stored, _layout(params, shape))
        else:
            _exchange_scheme(*places[name], codes[name], params, shape)
    for name, integers, scale in biases:
        _exchange(*places[name], integers, np.broadcast_to(scale, integers.shape))
    for name, dtype in plan.casts.items():
        cast = ops.cast(program.kernels[name].variable, dtype)
        _exchange(*places[name], cast, None)
    round_at_run_time(program, plan)
    return assemble(program, insert=inserter(program, plan))


def kernel_codes(program: Program, name: str, plan: Plan) -> npt.NDArray[np.int32]:
    """The codes of a weight in the layout in which it is quantized."""
    array = np.asarray(quantized_view(program.kernels[name]).array, np.float32)
    return plan.encode(name, array)


def _place(program: Program, name: str) -> tuple[Layer, str]:
    """The layer that holds a kernel or bias, and under which attribute."""
    layer = holder(program, name)
    return layer, attribute(layer, program.kernels[name].variable if name in program.kernels else program.biases[name])


def _layout(params: QParams | Codebook, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The scale in a shape that broadcasts against the kernel."""
    if params.axis is None:
        return params.scale
    if params.scale.size != shape[params.axis]:  # depthwise, a channel for each (in, multiplier)
        return params.scale.reshape(shape[-2:])
    return np.asarray(spread(params.scale, shape, params.axis, params.group))


def _exchange(layer: Layer, attribute: str, codes: Any, scale: npt.NDArray[np.float32] | None) -> None:
    """Replace a float variable of `layer` by `codes`, times `scale` where one is given."""
    arrays = {"codes": codes} if scale is None else {"codes": codes, "scale": scale}

    def value(stored: dict[str, Any], dtype: str) -> Tensor:
        array = ops.cast(stored["codes"], dtype)
        return array if scale is None else array * ops.cast(stored["scale"], dtype)

    _replace(layer, attribute, arrays, value)


def _exchange_scheme(layer: Layer, attribute: str, codes: Any, params: QParams | Codebook, shape: tuple[int, ...]) -> None:
    """Replace a float variable by codes with zero points, groups, levels or of an 8-bit float. shape: of the variable."""
    arrays: dict[str, Any] = {"scale": params.scale}
    if isinstance(params, QParams):
        kind = f"{'' if params.spec.symmetric else 'u'}int{8 if params.bits <= 8 else 16}"
        arrays["codes"] = codes.astype(kind)
        if not params.spec.symmetric:
            arrays["zero_point"] = params.zero_point.astype(kind)
    elif isinstance(params.spec, Float):
        arrays["codes"] = ops.cast(ops.convert_to_tensor(params.levels[codes]), "float8_e4m3fn")
    else:
        arrays["codes"], arrays["levels"] = codes.astype(np.uint8), params.levels

    def spread_out(array: Tensor) -> Tensor:
        """As `affine.spread`, with the backend's own operations."""
        if params.group is not None:
            along, size = params.group
            return ops.take(array, np.arange(codes.shape[along]) // size, axis=along)
        if params.axis is None:
            return array
        return ops.reshape(array, [-1 if index == params.axis % codes.ndim else 1 for index in range(codes.ndim)])

    def value(stored: dict[str, Any], dtype: str) -> Tensor:
        if isinstance(params, QParams) or isinstance(params.spec, Float):
            array = ops.cast(stored["codes"], "float32")
            if "zero_point" in stored:
                array = array - spread_out(ops.cast(stored["zero_point"], "float32"))
        else:
            index = ops.cast(stored["codes"], "int32")
            if params.levels.ndim > 1:
                starts = np.arange(params.scale.size, dtype="int32").reshape(params.scale.shape) * params.levels.shape[-1]
                index = index + spread_out(ops.convert_to_tensor(starts))
            array = ops.take(ops.reshape(stored["levels"], (-1,)), index)
        return ops.cast(ops.reshape(array * spread_out(ops.convert_to_tensor(stored["scale"])), shape), dtype)

    _replace(layer, attribute, arrays, value)


def _replace(layer: Layer, attribute: str, arrays: dict[str, Any], value: Callable[[dict[str, Any], str], Tensor]) -> None:
    """Replace a variable of `layer` by others, and what the layer reads by `value` of these; Keras' own private steps."""
    old = getattr(layer, attribute)
    layer._untrack_variable(old)
    for private in (f"_{attribute}", attribute):
        if layer.__dict__.pop(private, None) is not None and hasattr(layer, "_delete_tracking"):
            layer._delete_tracking(private)  # TensorFlow's own record; Keras' delattr would collect garbage each time
    layer._tracker.unlock()
    stored = {kind: _variable(layer, f"{attribute}_{kind}", array) for kind, array in arrays.items()}
    layer._tracker.lock()

    def read(self: Layer) -> Tensor:
        return value(stored, self.compute_dtype)

    kind = type(layer)
    layer.__class__ = type(f"Integer{kind.__name__.removeprefix('Integer')}", (kind,), {attribute: property(read)})


def _variable(layer: Layer, name: str, array: Any) -> Any:
    dtype = keras.backend.standardize_dtype(array.dtype)
    if not dtype.startswith("float8"):
        array = ops.convert_to_tensor(array)

    def itself(shape: Any, dtype: Any) -> Tensor:
        return array

    return layer.add_weight(
        name=name, shape=tuple(array.shape), dtype=dtype, initializer=itself, trainable=False, autocast=False
    )
