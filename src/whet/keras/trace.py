"""The layer graph in canonical operations: fused activations, separable convolutions and long sums are taken apart.

One Keras layer may be several operations: `Conv2D(activation="relu")` is a convolution and a relu. In the program each is
a call of its own, on private copies of the layers, so that a quantizer can stand between them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras

from whet.keras import fold
from whet.keras.clone import Call, Layer, Model, Program, Ref, free, names, record, refs
from whet.keras.views import assign_copy, own_weights

L = keras.layers
_WEIGHTED: tuple[tuple[type, str], ...] = (
    (L.DepthwiseConv1D, "conv"),
    (L.DepthwiseConv2D, "conv"),
    (L.Conv1DTranspose, "conv_transpose"),
    (L.Conv2DTranspose, "conv_transpose"),
    (L.Conv1D, "conv"),
    (L.Conv2D, "conv"),
    (L.Dense, "linear"),
)
_WEIGHTS_ALONE: tuple[tuple[Any, str], ...] = (
    (L.Embedding, "embedding"),
    (L.EinsumDense, "einsum"),
    ((L.Conv3D, L.Conv3DTranspose), "conv3d"),
    ((L.MultiHeadAttention, L.GroupQueryAttention), "attention"),
    (L.LSTM, "lstm"),
    (L.GRU, "gru"),
    ((L.RNN, L.Bidirectional), "rnn"),
)
_SEPARABLE = ((L.SeparableConv1D, L.DepthwiseConv1D, L.Conv1D), (L.SeparableConv2D, L.DepthwiseConv2D, L.Conv2D))
_PLAIN: dict[type, str] = {
    L.Flatten: "flatten",
    L.Reshape: "reshape",
    L.Permute: "transpose",
    L.Add: "add",
    L.Multiply: "mul",
    L.Concatenate: "concat",
    L.MaxPooling1D: "max_pool",
    L.MaxPooling2D: "max_pool",
    L.GlobalMaxPooling1D: "max_pool",
    L.GlobalMaxPooling2D: "max_pool",
    L.AveragePooling1D: "avg_pool",
    L.AveragePooling2D: "avg_pool",
    L.GlobalAveragePooling1D: "global_avg_pool",
    L.GlobalAveragePooling2D: "global_avg_pool",
    L.ZeroPadding1D: "pad",
    L.ZeroPadding2D: "pad",
    L.BatchNormalization: "batch_norm",
    L.Identity: "identity",
    L.Dropout: "identity",
    L.SpatialDropout1D: "identity",
    L.SpatialDropout2D: "identity",
    L.GaussianDropout: "identity",
    L.GaussianNoise: "identity",
    L.ActivityRegularization: "identity",
}
_ACTIVATIONS = {"relu", "relu6", "softmax", "sigmoid", "tanh"}
_OPERATIONS = {
    "Add": "add",
    "Multiply": "mul",
    "Concatenate": "concat",
    "Relu": "relu",
    "Relu6": "relu6",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Reshape": "reshape",
    "Transpose": "transpose",
    "Squeeze": "reshape",
    "ExpandDims": "reshape",
}
_HOLDS_SEVERAL = {"attention", "lstm", "gru", "rnn"}
_NEEDS_TWO = {"add", "mul"}  # tensors; one beside a constant is an operation of its own
_OVERRIDES = {"call", "__call__", "build", "kernel", "bias", "activation", "convolution_op"}


def lowered(model: Model, example: Any = None) -> Program:
    """A copy of `model` as canonical calls, batch norm folded.

    Raises:
        ModelError: it cannot be copied or traced.
    """
    made: dict[int, list[tuple[str, str | None, Layer]]] = {}

    def lower(call: Call, path: str, program: Program) -> list[Call]:
        layer = call.operation
        if id(layer) not in made:
            made[id(layer)] = _stages(layer, path, call, program)
        if canonical(layer, call) in ("add", "mul") and isinstance(layer, keras.Layer) and len(call.inputs) > 2:
            return _chained(call, path, program, made[id(layer)][0][2])
        return _laid(call, path, program, made[id(layer)])

    return fold.folded(record(model, lower, example))


def _stages(layer: Layer, path: str, call: Call, program: Program) -> list[tuple[str, str | None, Layer]]:
    """(operation, weight name, layer) of what one layer does, in order."""
    op = canonical(layer, call)
    separable = _separable(layer)
    if separable is None and op not in ("conv", "conv_transpose", "linear"):
        return [(op, _any_weight(layer, path, program), layer)]
    activation, layer.activation = layer.activation, keras.activations.linear
    if separable is not None:
        stages = _separated(layer, path, call.inputs[0], separable, program)
    else:
        stages = [(op, f"{path}/kernel", layer)]
        if layer.use_bias:
            program.biases[f"{path}/bias"] = layer.bias
    if activation is keras.activations.linear:
        return stages
    behind = activation if isinstance(activation, keras.Layer) else L.Activation(activation)
    behind.name = f"{layer.name}_{activation_name(activation)}"
    return [*stages, (canonical(behind, call), None, behind)]


def canonical(layer: Layer, call: Call) -> str:
    """The canonical operation of a layer or `keras.ops` call; its own name where it has none."""
    kind = type(layer)
    if call.kwargs.get("training"):  # dropout or batch statistics at inference too: not what its name says
        return kind.__name__
    if not isinstance(layer, keras.Layer):
        return _canonical_operation(layer, call)
    for cls, op in _WEIGHTED:
        if isinstance(layer, cls):
            return op if _is_standard(layer) else kind.__name__
    for cls, op in _WEIGHTS_ALONE:
        if isinstance(layer, cls) and type(layer).__module__.startswith("keras."):
            return op if not getattr(layer, "lora_enabled", False) else kind.__name__
    if kind in _PLAIN:
        name = _PLAIN[kind]
        return name if _channels_last(layer) else kind.__name__
    if kind is L.ReLU:
        plain = not layer.negative_slope and not layer.threshold
        return "relu" if plain and layer.max_value is None else "relu6" if plain and layer.max_value == 6 else "ReLU"
    if kind is L.Softmax:
        return "softmax" if layer.axis == -1 and len(call.inputs) == 1 else "Softmax"
    return activation_name(layer.activation) if kind is L.Activation else kind.__name__


def _canonical_operation(operation: Any, call: Call) -> str:
    kind = type(operation).__name__
    if not type(operation).__module__.startswith("keras.src.ops."):
        return kind
    if kind == "Softmax":
        return "softmax" if operation.axis == -1 else kind
    if kind == "Mean" and len(call.inputs) == 1 and len(call.inputs[0].shape) == 4:
        axes = operation.axis if isinstance(operation.axis, list | tuple) else (operation.axis,)
        return "global_avg_pool" if sorted(axes) == [1, 2] else kind
    name = _OPERATIONS.get(kind, kind)
    tensors = call.inputs
    if name in _NEEDS_TWO and (len(tensors) != 2 or not all(ref.is_float for ref in tensors)):
        return f"{name}_constant"
    return name


def activation_name(activation: Any) -> str:
    """The canonical name of an activation function, its own where it has none."""
    if isinstance(activation, keras.Layer):
        return type(activation).__name__
    name = str(getattr(activation, "__name__", type(activation).__name__))
    if activation is keras.activations.linear:
        return "identity"
    known = name in _ACTIVATIONS and activation is getattr(keras.activations, name)
    return name if known or name not in _ACTIVATIONS else f"custom_{name}"


def _is_standard(layer: Layer) -> bool:
    """Whether it computes what the Keras layer does: LoRA off, channels last, nothing of importance overridden."""
    for cls in type(layer).__mro__:
        if cls.__module__.startswith("keras."):
            break
        if _OVERRIDES & set(vars(cls)):
            return False
    return _channels_last(layer) and not getattr(layer, "lora_enabled", False)


def _channels_last(layer: Layer) -> bool:
    return getattr(layer, "data_format", "channels_last") == "channels_last"


def _separable(layer: Layer) -> tuple[Any, Any] | None:
    """The depthwise and the pointwise class of a separable convolution, None for other layers."""
    found = next(((depth, point) for cls, depth, point in _SEPARABLE if isinstance(layer, cls)), None)
    return found if found is not None and _is_standard(layer) else None


def _separated(
    layer: Layer, path: str, source: Ref, classes: tuple[Any, Any], program: Program
) -> list[tuple[str, str | None, Layer]]:
    """A separable convolution as a depthwise and a 1x1 convolution with its weights."""
    shared = {"strides": layer.strides, "padding": layer.padding, "dilation_rate": layer.dilation_rate}
    depthwise = classes[0](
        layer.kernel_size, depth_multiplier=layer.depth_multiplier, use_bias=False, name=f"{layer.name}_depthwise", **shared
    )
    pointwise = classes[1](layer.filters, 1, use_bias=layer.use_bias, name=f"{layer.name}_pointwise")
    depthwise.build(source.shape)
    pointwise.build(depthwise.compute_output_shape(source.shape))
    assign_copy(depthwise.kernel, layer.depthwise_kernel)
    assign_copy(pointwise.kernel, layer.pointwise_kernel)
    for attribute, new in (("depthwise_kernel", depthwise), ("pointwise_kernel", pointwise)):
        old = program.kernels[f"{path}/{attribute}"]
        program.kernels[old.name] = replace(old, variable=_kernel(new))
    if layer.use_bias:
        assign_copy(pointwise.bias, layer.bias)
        program.biases[f"{path}/bias"] = pointwise.bias
    return [("conv", f"{path}/depthwise_kernel", depthwise), ("conv", f"{path}/pointwise_kernel", pointwise)]


def _kernel(layer: Layer) -> Any:
    return layer.kernel


def _any_weight(layer: Layer, path: str, program: Program) -> str | None:
    """The name of one weight of a layer that is not taken apart, None if it has none: it is listed as skipped."""
    if not isinstance(layer, keras.Layer) or not layer.weights:
        return None
    inside = next((name for name in program.kernels if name.startswith(f"{path}/")), None)
    own = own_weights(layer) or layer.weights
    return inside if inside is not None else f"{path}/{own[0].name}"


def _laid(call: Call, path: str, program: Program, stages: list[tuple[str, str | None, Layer]]) -> list[Call]:
    """The calls of `stages`, one behind the other."""
    calls: list[Call] = []
    args, kwargs = call.args, call.kwargs
    for position, (op, weight, layer) in enumerate(stages):
        name = free(program, path, op, tuple(made.node.name for made in calls))
        bias = f"{path}/bias" if op in ("conv", "conv_transpose", "linear") and f"{path}/bias" in program.biases else None
        if bias is not None and not layer.use_bias:
            bias = None
        inside = tuple(n for n in program.kernels if n.startswith(f"{path}/") and n != weight) if op in _HOLDS_SEVERAL else ()
        node = replace(call.node, name=name, op=op, inputs=names((args, kwargs)), weight=weight, bias=bias, more=inside)
        made_refs = [replace(ref, name=value) for ref, value in zip(refs(call.outputs), node.values, strict=True)]
        if position < len(stages) - 1:
            made_refs[0] = replace(made_refs[0], shape=tuple(layer.compute_output_shape(refs((args, kwargs))[0].shape)))
        outputs: Any = made_refs[0] if isinstance(call.outputs, Ref) else made_refs
        calls.append(Call(node, layer, args, kwargs, outputs))
        args, kwargs = (outputs,), {}
    return calls


def _chained(call: Call, path: str, program: Program, layer: Layer) -> list[Call]:
    """A sum or product of many as one of two after the other, as the runtimes compute it."""
    op = _PLAIN[type(layer)]
    calls: list[Call] = []
    first, *others = call.inputs
    for position, other in enumerate(others):
        operation = type(layer)(name=f"{layer.name}_{position}")
        name = free(program, path, op, tuple(made.node.name for made in calls))
        args = ([first, other],)
        node = replace(call.node, name=name, op=op, inputs=names(args))
        first = replace(refs(call.outputs)[0], name=name)
        calls.append(Call(node, operation, args, {}, first))
    return calls
