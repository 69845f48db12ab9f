"""How the operations of a torch.export program are written as ONNX operators, one function for each family.

A rule gets the writer, the node and the node's arguments by name, defaults among them, and returns the name of what it
wrote. What a rule does not know it refuses with `NoRule`, and PyTorch's own exporter writes the whole program.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from whet.torch.onnx_graph import Node, NoRule, Writer

Given = Any  # the arguments of a node, by name
Rule = Callable[[Writer, Node, Given], "str | list[str]"]
RULES: dict[str, Rule] = {}
_EVERYTHING = 2**62  # an end of a slice behind every axis


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for `aten` overloads, or for full names with a namespace."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name if "::" in name else f"aten::{name}"] = function
        return function

    return register


def given(node: Node) -> Given:
    """The arguments of `node` by the names of its schema."""
    found = {}
    for index, argument in enumerate(node.target._schema.arguments):
        name = argument.name
        if index < len(node.args):
            found[name] = node.args[index]
        else:
            found[name] = node.kwargs[name] if name in node.kwargs else argument.default_value
    return SimpleNamespace(**found)


def shape_of(node: Node) -> tuple[Any, ...]:
    """Its sizes: numbers and symbols."""
    return tuple(node.meta["val"].shape)


def need(condition: bool, what: str) -> None:
    """Refuse what a rule does not know."""
    if not condition:
        raise NoRule(what)


def is_float(*nodes: Node) -> bool:
    """Whether all of them are float32 tensors."""
    return all(isinstance(node, torch.fx.Node) and node.meta["val"].dtype == torch.float32 for node in nodes)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or symbol."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)


def many(value: Any, count: int) -> list[int]:
    """A setting for `count` axes, given once or for each."""
    values = [value] * count if isinstance(value, int) else list(value) * (count if len(value) == 1 else 1)
    need(len(values) == count and all(isinstance(item, int) for item in values), f"the setting {value!r}")
    return values


# Activations and arithmetic

_UNARY = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "erf": "Erf",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "abs": "Abs",
    "neg": "Neg",
    "sin": "Sin",
    "cos": "Cos",
    "reciprocal": "Reciprocal",
    "hardswish": "HardSwish",
    "mish": "Mish",
}


@rule(*_UNARY, *(f"{name}_" for name in _UNARY))
def _unary(writer: Writer, node: Node, a: Given) -> str:
    need(is_float(a.self), "an activation of another type")
    name = node.target._schema.name.removeprefix("aten::").removesuffix("_")
    return writer.add(_UNARY[name], [writer.read(a.self)], node.name)


@rule("silu", "silu_")
def _silu(writer: Writer, node: Node, a: Given) -> str:
    need(is_float(a.self), "an activation of another type")
    x = writer.read(a.self)
    return writer.add("Mul", [x, writer.add("Sigmoid", [x], f"{node.name}_sigmoid")], node.name)


@rule("gelu")
def _gelu(writer: Writer, node: Node, a: Given) -> str:
    need(is_float(a.self), "an activation of another type")
    return writer.add("Gelu", [writer.read(a.self)], node.name, approximate=a.approximate)


@rule("hardsigmoid", "hardsigmoid_")
def _hardsigmoid(writer: Writer, node: Node, a: Given) -> str:
    need(is_float(a.self), "an activation of another type")
    return writer.add("HardSigmoid", [writer.read(a.self)], node.name, alpha=1 / 6, beta=0.5)


@rule("leaky_relu", "leaky_relu_")
def _leaky_relu(writer: Writer, node: Node, a: Given) -> str:
    need(is_float(a.self), "an activation of another type")
    return writer.add("LeakyRelu", [writer.read(a.self)], node.name, alpha=float(a.negative_slope))


@rule("elu", "elu_")
def _elu(writer: Writer, node: Node, a: Given) -> str:
    need(is_float(a.self) and a.scale == 1 and a.input_scale == 1, "this ELU")
    return writer.add("Elu", [writer.read(a.self)], node.name, alpha=float(a.alpha))


@rule("softmax.int", "log_softmax.int")
def _softmax(writer: Writer, node: Node, a: Given) -> str:
    need(is_float(a.self) and a.dtype in (None, torch.float32), "a softmax in another type")
    op = "Softmax" if node.target._schema.name == "aten::softmax" else "LogSoftmax"
    return writer.add(op, [writer.read(a.self)], node.name, axis=a.dim)


@rule("relu6", "relu6_", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_")
def _clamp(writer: Writer, node: Node, a: Given) -> str:
    name = node.target._schema.name
    low, high = getattr(a, "min", None), getattr(a, "max", None)
    if "relu6" in name:
        low, high = 0.0, 6.0
    elif "hardtanh" in name:
        low, high = a.min_val, a.max_val
    need(is_float(a.self) and all(bound is None or isinstance(bound, int | float) for bound in (low, high)), "this clamp")
    bounds = ["" if bound is None else writer.constant(bound, np.float32) for bound in (low, high)]
    return writer.add("Clip", [writer.read(a.self), *(bounds if bounds[1] else bounds[:1])], node.name)


_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min", "rsub": "Sub"}


@rule(
    *(f"{name}{end}" for name in ("add", "sub", "mul", "div") for end in (".Tensor", "_.Tensor")),
    "maximum",
    "minimum",
    "rsub.Scalar",
)
def _binary(writer: Writer, node: Node, a: Given) -> str:
    need(getattr(a, "alpha", 1) == 1 and is_float(node), "sums with a factor, or of other types")
    inputs = []
    name = node.target._schema.name.removeprefix("aten::").removesuffix("_")
    for operand in (a.other, a.self) if name == "rsub" else (a.self, a.other):
        if isinstance(operand, int | float) and not isinstance(operand, bool):
            inputs.append(writer.constant(operand, np.float32))
        else:
            need(is_float(operand), "operands of different types")
            inputs.append(writer.read(operand))
    return writer.add(_BINARY[name], inputs, node.name)


@rule("pow.Tensor_Scalar")
def _pow(writer: Writer, node: Node, a: Given) -> str:
    need(is_float(a.self) and isinstance(a.exponent, int | float), "this power")
    return writer.add("Pow", [writer.read(a.self), writer.constant(a.exponent, np.float32)], node.name)


# Pooling and reduction


@rule("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(writer: Writer, node: Node, a: Given) -> str:
    axes = int(node.target._schema.name[-2])
    need(is_float(a.self) and a.self.meta["val"].ndim == axes + 2 and not a.ceil_mode, "this pooling")
    kernel = many(a.kernel_size, axes)
    return writer.add(
        "MaxPool",
        [writer.read(a.self)],
        node.name,
        kernel_shape=kernel,
        strides=many(a.stride, axes) if a.stride else kernel,
        pads=many(a.padding, axes) * 2,
        dilations=many(a.dilation, axes),
    )


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(writer: Writer, node: Node, a: Given) -> str:
    axes = int(node.target._schema.name[-2])
    need(is_float(a.self) and a.self.meta["val"].ndim == axes + 2 and not a.ceil_mode, "this pooling")
    need(getattr(a, "divisor_override", None) is None, "a mean by another divisor")
    kernel = many(a.kernel_size, axes)
    return writer.add(
        "AveragePool",
        [writer.read(a.self)],
        node.name,
        kernel_shape=kernel,
        strides=many(a.stride, axes) if a.stride else kernel,
        pads=many(a.padding, axes) * 2,
        count_include_pad=int(a.count_include_pad),
    )


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def _adaptive_pool(writer: Writer, node: Node, a: Given) -> str:
    axes = int(node.target._schema.name[-2])
    need(is_float(a.self) and a.self.meta["val"].ndim == axes + 2, "this pooling")
    need(many(a.output_size, axes) == [1] * axes, "pooling to more than one pixel")
    return writer.add("GlobalAveragePool", [writer.read(a.self)], node.name)


@rule("mean.dim", "sum.dim_IntList")
def _reduce(writer: Writer, node: Node, a: Given) -> str:
    need(is_float(a.self) and a.dtype in (None, torch.float32) and bool(a.dim), "this reduction")
    op = "ReduceMean" if node.target._schema.name == "aten::mean" else "ReduceSum"
    return writer.add(op, [writer.read(a.self), writer.constant(list(a.dim), np.int64)], node.name, keepdims=int(a.keepdim))


# Shapes


@rule("view", "reshape", "flatten.using_ints", "unflatten.int", "unsqueeze", "squeeze.dim", "squeeze.dims", "squeeze")
def _reshape(writer: Writer, node: Node, a: Given) -> str:
    """To a shape of constants: 0 copies a size of the input, and one -1 is what remains."""
    old, new = shape_of(a.self), shape_of(node)
    need(0 not in old, "an empty tensor")
    if len(old) == len(new) and all(same(x, y) for x, y in zip(old, new, strict=True)):
        return writer.read(a.self)
    free = [axis for axis, size in enumerate(new) if not isinstance(size, int)]
    shape: list[int] = [size if isinstance(size, int) else -1 for size in new]
    if len(free) > 1:
        for axis in free:
            if axis < len(old) and same(old[axis], new[axis]):
                shape[axis] = 0
    need(shape.count(-1) <= 1, "a shape of several computed sizes")
    return writer.add("Reshape", [writer.read(a.self), writer.constant(shape, np.int64)], node.name)


@rule("permute", "transpose.int", "swapaxes", "swapdims", "movedim.int", "movedim.intlist", "t", "mT", "numpy_T")
def _transpose(writer: Writer, node: Node, a: Given) -> str:
    order = list(range(a.self.meta["val"].ndim))
    if hasattr(a, "dims"):
        order = [order[dim] for dim in a.dims]
    elif hasattr(a, "source"):
        order = list(np.moveaxis(np.empty(order), a.source, a.destination).shape)  # sizes that say where an axis was
    elif node.target._schema.name in ("aten::t", "aten::numpy_T"):
        order.reverse()
    else:
        named = (getattr(a, "dim0", getattr(a, "axis0", -2)), getattr(a, "dim1", getattr(a, "axis1", -1)))
        order[named[0]], order[named[1]] = order[named[1]], order[named[0]]
    return writer.add("Transpose", [writer.read(a.self)], node.name, perm=order)


@rule("cat")
def _cat(writer: Writer, node: Node, a: Given) -> str:
    kinds = {item.meta["val"].dtype for item in a.tensors}
    need(len(kinds) == 1 and all(item.meta["val"].ndim == node.meta["val"].ndim for item in a.tensors), "this concatenation")
    return writer.add("Concat", [writer.read(item) for item in a.tensors], node.name, axis=a.dim)


@rule("slice.Tensor")
def _slice(writer: Writer, node: Node, a: Given) -> str:
    start, end = 0 if a.start is None else a.start, _EVERYTHING if a.end is None else a.end
    need(all(isinstance(item, int) for item in (start, end, a.step)), "a slice with computed ends")
    if start == 0 and end >= _EVERYTHING and a.step == 1:
        return writer.read(a.self)
    ends = [writer.constant([item], np.int64) for item in (start, end, a.dim, a.step)]
    return writer.add("Slice", [writer.read(a.self), *ends], node.name)


@rule("select.int")
def _select(writer: Writer, node: Node, a: Given) -> str:
    need(isinstance(a.index, int), "a computed index")
    return writer.add("Gather", [writer.read(a.self), writer.constant(a.index, np.int64)], node.name, axis=a.dim)


@rule("chunk", "split.Tensor", "split_with_sizes", "unbind.int")
def _split(writer: Writer, node: Node, a: Given) -> list[str]:
    is_unbind = node.target._schema.name == "aten::unbind"
    sizes = [1 if is_unbind else part.shape[a.dim] for part in node.meta["val"]]
    need(all(isinstance(size, int) for size in sizes), "parts of computed size")
    parts = writer.split(
        "Split", [writer.read(a.self), writer.constant(sizes, np.int64)], f"{node.name}_part", len(sizes), axis=a.dim
    )
    if is_unbind:
        axis = writer.constant([a.dim], np.int64)
        parts = [writer.add("Squeeze", [part, axis], f"{node.name}_item") for part in parts]
    return parts


@rule("pixel_shuffle")
def _pixel_shuffle(writer: Writer, node: Node, a: Given) -> str:
    need(a.self.meta["val"].ndim == 4, "a shuffle of one example")
    return writer.add("DepthToSpace", [writer.read(a.self)], node.name, blocksize=a.upscale_factor, mode="CRD")


@rule("clone", "contiguous", "detach", "detach_", "alias", "dropout", "dropout_", "feature_dropout", "lift_fresh_copy")
def _identity(writer: Writer, node: Node, a: Given) -> str:
    need(not getattr(a, "train", False), "dropout while training")
    return writer.read(a.self if hasattr(a, "self") else a.input)


@rule("to.dtype", "to.dtype_layout", "to.device", "_to_copy")
def _to(writer: Writer, node: Node, a: Given) -> str:
    before, after = a.self.meta["val"].dtype, node.meta["val"].dtype
    if before == after:
        return writer.read(a.self)
    return writer.add("Cast", [writer.read(a.self)], node.name, to=writer.code(after))


# Quantization


@rule("quantized_decomposed::quantize_per_tensor")
def _quantize(writer: Writer, node: Node, a: Given) -> str:
    _need_whole_range(a)
    return writer.add("QuantizeLinear", [writer.read(a.input), *_scalars(writer, a)], node.name)


@rule("quantized_decomposed::dequantize_per_tensor")
def _dequantize(writer: Writer, node: Node, a: Given) -> str:
    _need_whole_range(a)
    need(is_float(node), "codes of another type")
    scale, zero_point = _scalars(writer, a)
    is_plain = writer.tensor(a.input) is not None and a.zero_point == 0
    return writer.add("DequantizeLinear", [writer.read(a.input), scale, *([] if is_plain else [zero_point])], node.name)


@rule("quantized_decomposed::dequantize_per_channel")
def _dequantize_channels(writer: Writer, node: Node, a: Given) -> str:
    _need_whole_range(a)
    need(a.zero_points is None and is_float(node, a.scales), "zero points per channel")
    return writer.add("DequantizeLinear", [writer.read(a.input), writer.read(a.scales)], node.name, axis=a.axis)


def _scalars(writer: Writer, a: Given) -> tuple[str, str]:
    kind = np.dtype(str(a.dtype).removeprefix("torch."))
    need(isinstance(a.scale, float) and isinstance(a.zero_point, int), "a computed scale")
    return writer.constant(a.scale, np.float32), writer.constant(a.zero_point, kind)


def _need_whole_range(a: Given) -> None:
    ends = torch.iinfo(a.dtype)
    need((a.quant_min, a.quant_max) == (ends.min, ends.max), "codes that end before their type does")
