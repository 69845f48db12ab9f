"""How canonical operations are written to ONNX, and which calls have no rule here.

A rule takes (writer, call, weights) and returns the float tensor it made and its form, or None where it does not cover the
call. `MOVES` are rules on any type: they take a tensor and its form, floats or codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from whet.formats.onnx_weights import StoredWeight, check_even, decoded, dynamic_product, lookup, product
from whet.graph import storage
from whet.graph.placement import Plan
from whet.keras.clone import Call, Program, refs
from whet.keras.convert import kernel_codes
from whet.keras.onnx_graph import FIRST, LAST, ROWS, Writer, is_plain, whole
from whet.keras.quantize import bias_codes, quantized_view, rounded_weights
from whet.keras.views import to_numpy

Array = npt.NDArray[Any]
Made = tuple[str, str] | None


@dataclass(slots=True)
class Weights:
    """The weights of a program as a plan stores them."""

    writer: Writer
    program: Program
    plan: Plan | None

    def kernel(self, name: str, order: Sequence[int], axis: int) -> str:
        """A kernel with its axes in ONNX's order, the output channels on `axis`: stored as codes, in 16 bits, or as it is."""
        kernel = self.program.kernels[name]
        if self.plan is not None and name in self.plan.weights:
            params, stored = self.plan.weights[name], self.stored(name).turned(order)
            if not self.plan.values or not storage.is_plain(params):
                return decoded(self.writer, stored)
            return self._dequantized(self.writer.constant(stored.codes.astype(np.int8), name), params.scale, name, axis)
        array = np.transpose(np.asarray(quantized_view(kernel).array, np.float32), order)
        half = self.plan.casts.get(name) if self.plan is not None else None
        if half is None and str(kernel.variable.dtype) in ("float16", "bfloat16"):
            half = str(kernel.variable.dtype)
        return self._cast(array, half, name)

    def stored(self, name: str) -> StoredWeight:
        """A planned weight, in the layout in which it is quantized."""
        plan: Any = self.plan
        stored = StoredWeight(name, kernel_codes(self.program, name, plan), plan.weights[name])
        if plan.target.startswith("openvino"):
            check_even([stored])
        return stored

    def is_alone(self, name: str) -> bool:
        """Whether a weight is stored as codes beside float activations."""
        return self.plan is not None and name in self.plan.weights and not self.plan.values

    def bias(self, call: Call) -> str | None:
        """The bias of a call: int32 at the product of the scales where the plan says so, else float."""
        name = call.node.bias
        if name is None:
            return None
        if self.plan is not None and name in self.plan.biases:
            source, _ = self.plan.biases[name]
            codes, scale = next((c, s) for bias, c, s in bias_codes(self.program, self.plan) if bias == name)
            if self.plan.values[call.node.inputs[0]].scale == self.plan.values[source].scale:
                return self._dequantized(self.writer.constant(codes, name), np.broadcast_to(scale, codes.shape), name, 0)
        return self._cast(to_numpy(self.program.biases[name]).astype(np.float32), None, name)

    def is_stored(self, name: str) -> bool:
        """Whether a weight is stored in fewer bits, as codes or 16-bit floats."""
        return self.plan is not None and (name in self.plan.weights or name in self.plan.casts)

    def is_quantized(self, call: Call) -> bool:
        """Whether the call's weight is stored as codes of an integer kernel."""
        return (
            self.plan is not None
            and call.node.weight in self.plan.weights
            and storage.is_plain(self.plan.weights[call.node.weight])
        )

    def settle(self, call: Call) -> None:
        """Let a layer that another process writes hold what is left of its weights."""
        for name in call.node.weights:
            if self.plan is not None and self.is_stored(name):
                kernel = self.program.kernels[name]
                kernel.variable.assign(rounded_weights(self.program, self.plan, (name,))[name])

    def _dequantized(self, codes: str, scale: Any, name: str, axis: int) -> str:
        scale = np.asarray(scale, np.float32)
        flat = scale.reshape(()) if scale.size == 1 else scale.reshape(-1)
        zero = self.writer.constant(np.zeros(flat.shape, self.writer.constants[codes].dtype), f"{name}_zero_point")
        pair = [codes, self.writer.constant(flat, f"{name}_scale")]
        if self.writer.constants[codes].dtype != np.int32:
            pair.append(zero)
        return self.writer.add("DequantizeLinear", pair, f"{name}_float", **({"axis": axis} if flat.ndim else {}))

    def _cast(self, array: Array, half: str | None, name: str) -> str:
        if half is None:
            return self.writer.constant(array, name)
        if half == "float16":
            stored = array.astype(np.float16)
        else:
            stored = array.astype(self.writer.onnx.helper.tensor_dtype_to_np_dtype(self.writer.onnx.TensorProto.BFLOAT16))
        return self.writer.add("Cast", [self.writer.constant(stored, name)], f"{name}_float", to=1)


def convolution(writer: Writer, call: Call, weights: Weights) -> Made:
    """Conv1D, Conv2D and their depthwise forms, channels first."""
    layer, (source,) = call.operation, call.inputs
    name = str(call.node.weight)
    depthwise = weights.program.kernels[name].in_axis is None
    spatial = len(source.shape) - 2
    order = (spatial + 1, spatial, *range(spatial))
    groups = int(source.shape[-1] or 0) if depthwise else int(layer.groups)
    kernel = weights.kernel(name, order, 0)
    bias = weights.bias(call)
    inputs = [writer.float(source.name, FIRST), kernel, *([] if bias is None else [bias])]
    sizes, strides, dilations = (_tuple(value, spatial) for value in (layer.kernel_size, layer.strides, layer.dilation_rate))
    attributes: dict[str, Any] = _padding(layer.padding, source.shape[1:-1], sizes, strides, dilations)
    attributes |= {"strides": list(strides), "dilations": list(dilations)}
    if groups > 1:
        attributes["group"] = groups
    return writer.add("Conv", inputs, call.node.name, **attributes), FIRST


def transposed_convolution(writer: Writer, call: Call, weights: Weights) -> Made:
    """Conv1DTranspose and Conv2DTranspose, channels first."""
    layer, (source,) = call.operation, call.inputs
    spatial = len(source.shape) - 2
    if getattr(layer, "output_padding", None) is not None or layer.padding not in ("same", "valid"):
        return None
    kernel = weights.kernel(str(call.node.weight), (spatial + 1, spatial, *range(spatial)), 1)
    bias = weights.bias(call)
    sizes, strides, dilations = (_tuple(value, spatial) for value in (layer.kernel_size, layer.strides, layer.dilation_rate))
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(sizes, dilations, strict=True)]
    over = [max(r - stride, 0) if layer.padding == "same" else 0 for r, stride in zip(reach, strides, strict=True)]
    attributes = {
        "strides": list(strides),
        "dilations": list(dilations),
        "pads": [o // 2 for o in over] + [o - o // 2 for o in over],
        "output_padding": [max(stride - r, 0) for r, stride in zip(reach, strides, strict=True)],
    }
    inputs = [writer.float(source.name, FIRST), kernel, *([] if bias is None else [bias])]
    return writer.add("ConvTranspose", inputs, call.node.name, **attributes), FIRST


def linear(writer: Writer, call: Call, weights: Weights) -> Made:
    """Dense, over rows; over the last of many open axes as a plain product. Codes beside floats are a product of codes."""
    (source,) = call.inputs
    name, bias = str(call.node.weight), weights.bias(call)
    if weights.is_alone(name):
        write = dynamic_product if weights.plan is not None and call.node.name in weights.plan.dynamic else product
        return write(writer, writer.float(source.name, LAST), weights.stored(name), bias, call.node.name), LAST
    if len(source.shape) > 2 and not is_plain(source.shape):
        made = writer.add("MatMul", [writer.float(source.name, LAST), weights.kernel(name, (0, 1), 1)], call.node.name)
        return (made if bias is None else writer.add("Add", [made, bias], call.node.name)), LAST
    kernel = weights.kernel(name, (1, 0), 0)
    inputs = [writer.float(source.name, ROWS), kernel, *([] if bias is None else [bias])]
    made = writer.add("Gemm", inputs, call.node.name, transB=1)
    return made, ROWS if len(source.shape) > 2 else LAST


def embedding(writer: Writer, call: Call, weights: Weights) -> Made:
    """Rows of a table of codes or of 16-bit floats; a float table has no rule here."""
    (source,) = call.inputs
    name = str(call.node.weight)
    if weights.plan is not None and name in weights.plan.casts and not call.operation.mask_zero:
        table = weights.kernel(name, (0, 1), 0)
        return writer.add("Gather", [table, writer.values[source.name].floats[LAST]], call.node.name, axis=0), LAST
    if not weights.is_alone(name) or call.operation.mask_zero:
        return None
    return lookup(writer, writer.values[source.name].floats[LAST], weights.stored(name), call.node.name), LAST


def einsum(writer: Writer, call: Call, weights: Weights) -> Made:
    """EinsumDense with codes as its kernel, where it is a product over the last axis; others have no rule here."""
    (source,) = call.inputs
    layer, name = call.operation, str(call.node.weight)
    left, right, made = re.split(r",|->", layer.equation.replace(" ", "").replace("...", ""))
    is_product = len(right) == 2 and left[-1:] == right[0] and made == left[:-1] + right[1]
    cast = weights.plan is not None and name in weights.plan.casts
    if not (weights.is_alone(name) or cast) or not is_product or layer.activation is not keras.activations.linear:
        return None
    bias = None
    if layer.bias is not None:
        if len(layer.bias.shape) != 1:
            return None
        bias = writer.constant(to_numpy(layer.bias).astype(np.float32), f"{call.node.layer}/bias")
    x = writer.float(source.name, LAST)
    if not cast:
        return product(writer, x, weights.stored(name), bias, call.node.name), LAST
    result = writer.add("MatMul", [x, weights.kernel(name, (0, 1), 1)], call.node.name)
    return (result if bias is None else writer.add("Add", [result, bias], call.node.name)), LAST


def elementwise(op: str) -> Callable[..., Made]:
    """A rule for an operation on values of one shape, or of shapes that broadcast."""

    def rule(writer: Writer, call: Call, weights: Weights) -> Made:
        form = common_form(writer, call)
        return writer.add(op, [writer.float(ref.name, form) for ref in call.inputs], call.node.name), form

    return rule


def common_form(writer: Writer, call: Call) -> str:
    """The form in which most is at hand already."""
    shapes = {ref.shape for ref in call.inputs}
    homes = [writer.values[ref.name].home for ref in call.inputs]
    if len({len(shape) for shape in shapes}) > 1 or len(next(iter(shapes))) < 3:
        return LAST
    if FIRST in homes:
        return FIRST
    return ROWS if ROWS in homes and len(shapes) == 1 and is_plain(next(iter(shapes))) else LAST


def relu6(writer: Writer, call: Call, weights: Weights) -> Made:
    """`min(max(x, 0), 6)`."""
    form = common_form(writer, call)
    limits = [writer.constant(np.float32(limit), "limit") for limit in (0, 6)]
    return writer.add("Clip", [writer.float(call.inputs[0].name, form), *limits], call.node.name), form


def softmax(writer: Writer, call: Call, weights: Weights) -> Made:
    """Over the channels."""
    form = common_form(writer, call)
    return writer.add(
        "Softmax", [writer.float(call.inputs[0].name, form)], call.node.name, axis=1 if form == FIRST else -1
    ), form


def average_pool(writer: Writer, call: Call, weights: Weights) -> Made:
    """Padding does not count."""
    tensor = writer.float(call.inputs[0].name, FIRST)
    return writer.add("AveragePool", [tensor], call.node.name, **_window(call)), FIRST


def batch_norm(writer: Writer, call: Call, weights: Weights) -> Made:
    """One that was not folded, over the last axis."""
    layer, source = call.operation, call.inputs[0]
    if layer.axis not in (-1, len(source.shape) - 1) or len(call.inputs) != 1 or len(source.shape) < 2:
        return None
    count = int(source.shape[-1] or 0)
    ones, zeros = np.ones(count, np.float32), np.zeros(count, np.float32)
    parts = {
        "gamma": layer.gamma if layer.scale else ones,
        "beta": layer.beta if layer.center else zeros,
        "mean": layer.moving_mean,
        "variance": layer.moving_variance,
    }
    arrays = [
        writer.constant(np.asarray(v if isinstance(v, np.ndarray) else to_numpy(v), np.float32), f"{call.node.layer}/{k}")
        for k, v in parts.items()
    ]
    inputs = [writer.float(source.name, FIRST), *arrays]
    return writer.add("BatchNormalization", inputs, call.node.name, epsilon=float(layer.epsilon)), FIRST


def concat(writer: Writer, call: Call, tensors: list[str], form: str) -> Made:
    """Along the axis, wherever it lies in this form."""
    rank = len(call.inputs[0].shape)
    axis = int(call.operation.axis) % rank
    if form == ROWS and axis != rank - 1:
        return None
    place = axis if form == LAST else 1 if axis == rank - 1 else axis + 1 if axis else 0
    return writer.add("Concat", tensors, call.node.name, axis=place), form


def global_average(writer: Writer, call: Call) -> tuple[str, list[int] | None] | None:
    """The pooled tensor, channels first and axes kept; and the shape that it takes then, None if it has it."""
    if len(call.inputs) != 1 or len(call.inputs[0].shape) < 3:
        return None
    pooled = writer.add("GlobalAveragePool", [writer.float(call.inputs[0].name, FIRST)], call.node.name)
    shape = refs(call.outputs)[0].shape
    return pooled, None if len(shape) == len(call.inputs[0].shape) else whole(shape)


def max_pool(writer: Writer, call: Call, tensor: str) -> Made:
    """Of a window, or of all positions; channels first."""
    if hasattr(call.operation, "pool_size"):
        return writer.add("MaxPool", [tensor], call.node.name, **_window(call)), FIRST
    rank, keep = len(call.inputs[0].shape), bool(call.operation.keepdims)
    axes = writer.constant(np.arange(2, rank, dtype=np.int64), "axes")
    return writer.add("ReduceMax", [tensor, axes], call.node.name, keepdims=int(keep)), FIRST


def reshaped(writer: Writer, call: Call, tensor: str) -> Made:
    """Into the shape of the output, from Keras' own form."""
    shape, before = refs(call.outputs)[0].shape, call.inputs[0].shape
    if not is_plain(shape):
        same_batch = shape[0] is None and before[0] is None
        if not same_batch or not is_plain(shape[1:]):
            return None
        return writer.reshape(tensor, [0, *whole(shape[1:])], call.node.name), LAST
    return writer.reshape(tensor, whole(shape), call.node.name), LAST


def transposed(writer: Writer, call: Call, tensor: str) -> Made:
    """Permute, or keras.ops.transpose."""
    dims = getattr(call.operation, "dims", None)
    axes = (0, *dims) if dims is not None else call.operation.axes
    rank = len(call.inputs[0].shape)
    perm = [int(axis) % rank for axis in axes] if axes is not None else list(range(rank))[::-1]
    return writer.add("Transpose", [tensor], call.node.name, perm=perm), LAST


def padded(writer: Writer, call: Call, tensor: str) -> Made:
    """Zeros around the positions; channels first."""
    given = call.operation.padding
    pairs = [given] if isinstance(call.operation, keras.layers.ZeroPadding1D) else given
    low, high = zip(*pairs, strict=True)
    pads = writer.constant(np.asarray([0, 0, *low, 0, 0, *high], np.int64), "pads")
    return writer.add("Pad", [tensor, pads], call.node.name), FIRST


# Rules on floats, and moves (with the form they work on) on floats or codes.
RULES: dict[str, Callable[..., Made]] = {
    "conv": convolution,
    "conv_transpose": transposed_convolution,
    "linear": linear,
    "embedding": embedding,
    "einsum": einsum,
    "relu": elementwise("Relu"),
    "relu6": relu6,
    "sigmoid": elementwise("Sigmoid"),
    "tanh": elementwise("Tanh"),
    "softmax": softmax,
    "add": elementwise("Add"),
    "mul": elementwise("Mul"),
    "avg_pool": average_pool,
    "batch_norm": batch_norm,
}
MOVES: dict[str, tuple[Callable[..., Made], str]] = {
    "max_pool": (max_pool, FIRST),
    "reshape": (reshaped, LAST),
    "flatten": (reshaped, LAST),
    "transpose": (transposed, LAST),
    "pad": (padded, FIRST),
}


def _window(call: Call) -> dict[str, Any]:
    layer, shape = call.operation, call.inputs[0].shape
    spatial = len(shape) - 2
    sizes, strides = _tuple(layer.pool_size, spatial), _tuple(layer.strides, spatial)
    padding = _padding(layer.padding, shape[1:-1], sizes, strides, (1,) * spatial)
    return {"kernel_shape": list(sizes), "strides": list(strides), **padding}


def _tuple(value: Any, count: int) -> tuple[int, ...]:
    return (int(value),) * count if isinstance(value, int) else tuple(int(item) for item in value)


def _padding(
    kind: str, shape: tuple[int | None, ...], sizes: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> dict[str, Any]:
    """The attribute that pads as Keras does: in numbers where the sizes are known, since "same" depends on them."""
    if kind == "valid":
        return {}
    if kind == "causal":
        return {"pads": [(sizes[0] - 1) * dilations[0], 0]}
    if any(size is None for size in shape):
        return {"auto_pad": "SAME_UPPER"}
    totals = [
        max((-(-int(size or 0) // stride) - 1) * stride + (kernel - 1) * dilation + 1 - int(size or 0), 0)
        for size, stride, kernel, dilation in zip(shape, strides, sizes, dilations, strict=True)
    ]
    return {"pads": [total // 2 for total in totals] + [total - total // 2 for total in totals]}
