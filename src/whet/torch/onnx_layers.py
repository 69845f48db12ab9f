"""The rules of layers that have weights, and of attention, as ONNX operators; batch norms become part of what they follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from whet.torch.onnx_graph import Node, Writer
from whet.torch.onnx_rules import Given, given, is_float, many, need, rule, shape_of


@rule("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding")
def _conv(writer: Writer, node: Node, a: Given) -> str:
    axes = a.weight.meta["val"].ndim - 2
    need(a.input.meta["val"].ndim == axes + 2 and is_float(a.input, a.weight), "a convolution of one example")
    kernel, strides, dilations = list(shape_of(a.weight)[2:]), many(a.stride, axes), many(a.dilation, axes)
    if isinstance(a.padding, str):
        total = [d * (k - 1) if a.padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        pads = [size // 2 for size in total] + [size - size // 2 for size in total]
    else:
        pads = many(a.padding, axes) * 2
    return writer.add(
        "Conv",
        [writer.read(a.input), *_weights(writer, node, a)],
        node.name,
        group=a.groups,
        kernel_shape=kernel,
        pads=pads,
        strides=strides,
        dilations=dilations,
    )


def _weights(writer: Writer, node: Node, a: Given) -> list[str]:
    """The names of a layer's weight and bias, with the batch norm in them that alone reads what the layer returns."""
    plain = [item for item in (a.weight, a.bias) if item is not None]
    norm: Any = next(iter(node.users), None)
    if len(node.users) != 1 or str(norm.target) != "aten.batch_norm.default" or not writer.is_alone(a.weight):
        return [writer.read(item) for item in plain]
    b = given(norm)
    tensors = [writer.tensor(item) for item in (b.running_mean, b.running_var, b.weight, b.bias, a.bias) if item is not None]
    if b.training or b.running_mean is None or any(tensor is None for tensor in tensors):
        return [writer.read(item) for item in plain]
    weight, mean, variance = (writer.tensor(item).double() for item in (a.weight, b.running_mean, b.running_var))
    factor = torch.rsqrt(variance + b.eps) * (1 if b.weight is None else writer.tensor(b.weight).double())
    bias = ((0 if a.bias is None else writer.tensor(a.bias).double()) - mean) * factor
    bias = bias + (0 if b.bias is None else writer.tensor(b.bias).double())
    writer.folded.add(norm)
    name = writer.stored[a.weight][0]
    scaled = (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).float()
    return [writer.weight(name, scaled), writer.weight(f"{name}_bias", bias.float())]


@rule("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def _conv_transpose(writer: Writer, node: Node, a: Given) -> str:
    axes = a.weight.meta["val"].ndim - 2
    need(a.input.meta["val"].ndim == axes + 2 and is_float(a.input, a.weight), "a convolution of one example")
    inputs = [writer.read(item) for item in (a.input, a.weight, a.bias) if item is not None]
    extra = many(a.output_padding, axes)
    return writer.add(
        "ConvTranspose",
        inputs,
        node.name,
        group=a.groups,
        kernel_shape=list(shape_of(a.weight)[2:]),
        pads=many(a.padding, axes) * 2,
        strides=many(a.stride, axes),
        dilations=many(a.dilation, axes),
        output_padding=extra if any(extra) else None,
    )


@rule("linear")
def _linear(writer: Writer, node: Node, a: Given) -> str:
    need(is_float(a.input, a.weight) and a.weight.meta["val"].ndim == 2, "this linear layer")
    if a.input.meta["val"].ndim == 2:
        return writer.add("Gemm", [writer.read(a.input), *_weights(writer, node, a)], node.name, transB=1)
    stored = writer.tensor(a.weight)
    if stored is None:
        turned = writer.add("Transpose", [writer.read(a.weight)], f"{node.name}_weight", perm=[1, 0])
    else:
        turned = writer.weight(f"{writer.stored[a.weight][0]}_T", stored.t())
    if a.bias is None:
        return writer.add("MatMul", [writer.read(a.input), turned], node.name)
    product = writer.add("MatMul", [writer.read(a.input), turned], f"{node.name}_product")
    return writer.add("Add", [product, writer.read(a.bias)], node.name)


@rule("addmm")
def _addmm(writer: Writer, node: Node, a: Given) -> str:
    need(is_float(a.self, a.mat1, a.mat2) and a.alpha == 1 and a.beta == 1, "this addmm")
    return writer.add("Gemm", [writer.read(item) for item in (a.mat1, a.mat2, a.self)], node.name)


@rule("mm", "bmm", "matmul")
def _matmul(writer: Writer, node: Node, a: Given) -> str:
    other = a.mat2 if hasattr(a, "mat2") else a.other
    need(is_float(a.self, other), "a product of other types")
    return writer.add("MatMul", [writer.read(a.self), writer.read(other)], node.name)


@rule("scaled_dot_product_attention")
def _attention(writer: Writer, node: Node, a: Given) -> str:
    plain = a.dropout_p == 0 and not a.is_causal and not a.enable_gqa and (a.attn_mask is None or is_float(a.attn_mask))
    need(plain and is_float(a.query, a.key, a.value), "attention with a causal or boolean mask")
    rank, width = a.key.meta["val"].ndim, shape_of(a.query)[-1]
    need(isinstance(width, int), "attention of computed width")
    scale = writer.constant(width**-0.5 if a.scale is None else a.scale, np.float32)
    query = writer.add("Mul", [writer.read(a.query), scale], f"{node.name}_query")
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = [query, writer.add("Transpose", [writer.read(a.key)], f"{node.name}_key", perm=order)]
    logits = writer.add("MatMul", scores, f"{node.name}_scores")
    if a.attn_mask is not None:
        logits = writer.add("Add", [logits, writer.read(a.attn_mask)], f"{node.name}_masked")
    weights = writer.add("Softmax", [logits], f"{node.name}_weights", axis=-1)
    return writer.add("MatMul", [weights, writer.read(a.value)], node.name)


@rule("embedding")
def _embedding(writer: Writer, node: Node, a: Given) -> str:
    return writer.add("Gather", [writer.read(a.weight), writer.read(a.indices)], node.name, axis=0)


# Normalization


@rule("batch_norm")
def _batch_norm(writer: Writer, node: Node, a: Given) -> str:
    if node in writer.folded:
        return writer.read(a.input)
    need(not a.training and a.running_mean is not None and is_float(a.input), "a batch norm of the batch's statistics")
    count = shape_of(a.running_mean)[0]
    ones, zeros = np.ones(count, np.float32), np.zeros(count, np.float32)
    scale = writer.read(a.weight) if a.weight is not None else writer.constant(ones, np.float32)
    shift = writer.read(a.bias) if a.bias is not None else writer.constant(zeros, np.float32)
    inputs = [writer.read(a.input), scale, shift, writer.read(a.running_mean), writer.read(a.running_var)]
    return writer.add("BatchNormalization", inputs, node.name, epsilon=a.eps)


@rule("layer_norm")
def _layer_norm(writer: Writer, node: Node, a: Given) -> str:
    sizes = list(a.normalized_shape)
    need(is_float(a.input) and all(isinstance(size, int) for size in sizes), "this layer norm")
    scale = writer.read(a.weight) if a.weight is not None else writer.constant(np.ones(sizes), np.float32)
    inputs = [writer.read(a.input), scale, *([writer.read(a.bias)] if a.bias is not None else [])]
    return writer.add("LayerNormalization", inputs, node.name, axis=-len(sizes), epsilon=a.eps)


@rule("onnx_symbolic::_symbolic")
def _operator(writer: Writer, node: Node, a: Given) -> str:
    """An ONNX operator that the model called by name, with integers and texts as attributes: a marker of Whet's."""
    op, integers, texts = a.op_type.rpartition("::")[2], list(a.attr_ints), list(a.attr_strs)
    need(not a.attr_floats and all(kind in ("i", "s") for kind in a.attr_types), "an operator with other attributes")
    attributes = {}
    for key, kind, (start, end) in zip(a.attr_keys, a.attr_types, a.attr_pos, strict=True):
        attributes[key] = integers[start] if kind == "i" else texts[start]
        need(end == start + 1, "an operator with lists as attributes")
    inputs = [writer.read(item) for item in a.inputs]
    domain = a.domain or a.op_type.rpartition("::")[0]
    return writer.split(op, inputs, node.name, 1, domain=domain, **attributes)[0]
