"""Batch norm folded into the convolution or dense layer that it alone reads.

`y = gamma · (W x + b - mean) / sqrt(variance + epsilon) + beta` is a layer with `W · f` and `(b - mean) · f + beta`, where
`f = gamma / sqrt(variance + epsilon)` (Jacob et al. 2018, arXiv:1712.05877, eq. 14).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from whet.keras.clone import Call, Layer, Program, Ref, refs, renamed, substituted
from whet.keras.views import assign_copy, to_numpy


def folded(program: Program) -> Program:
    """`program` with every batch norm folded that can be. Changes the program's own layers, which are copies."""
    uses: dict[int, int] = {}
    for call in program.calls:
        uses[id(call.operation)] = uses.get(id(call.operation), 0) + 1
    while (pair := _next(program, uses)) is not None:
        before, norm = pair
        _fold(program, before, norm)
    return program


def _next(program: Program, uses: dict[int, int]) -> tuple[Call, Call] | None:
    """A convolution or dense call, called once, and the batch norm that alone reads it."""
    produced = {call.node.name: call for call in program.calls}
    outputs = {ref.name for ref in refs(program.outputs)}
    readers: dict[str, int] = {}
    for call in program.calls:
        for ref in call.inputs:
            readers[ref.name] = readers.get(ref.name, 0) + 1
    for norm in program.calls:
        if norm.node.op != "batch_norm" or len(norm.inputs) != 1 or uses[id(norm.operation)] != 1:
            continue
        source = norm.inputs[0]
        before = produced.get(source.name)
        if before is None or before.node.op not in ("conv", "conv_transpose", "linear"):
            continue
        alone = readers[source.name] == 1 and source.name not in outputs and uses[id(before.operation)] == 1
        last = norm.operation.axis in (-1, len(source.shape) - 1)
        if alone and last:
            return before, norm
    return None


def _fold(program: Program, before: Call, norm: Call) -> None:
    factor, offset, mean = _factors(norm.operation)
    layer, path = before.operation, before.node.layer
    if not layer.use_bias:
        layer = _with_bias(layer, before.inputs[0])
    weight = str(before.node.weight)
    kernel = program.kernels[weight]
    shape = tuple(layer.kernel.shape)
    if kernel.in_axis is None:  # depthwise: (…, in, multiplier), the multiplier running fastest
        scale = factor.reshape(shape[-2], shape[-1])
    else:
        scale = factor.reshape([-1 if axis == kernel.out_axis else 1 for axis in range(len(shape))])
    layer.kernel.assign((to_numpy(layer.kernel).astype(np.float64) * scale).astype(np.float32))
    layer.bias.assign(((to_numpy(layer.bias).astype(np.float64) - mean) * factor + offset).astype(np.float32))
    program.kernels[weight] = replace(kernel, variable=layer.kernel)
    program.biases[f"{path}/bias"] = layer.bias
    program.folds.append((norm.node.layer, path))

    value = refs(before.outputs)[0]
    made = replace(before, operation=layer, node=replace(before.node, bias=f"{path}/bias"))
    mapping: dict[str, Ref] = {norm.node.name: value}
    program.calls = [made if call is before else renamed(call, mapping) for call in program.calls if call is not norm]
    program.outputs = substituted(program.outputs, mapping)


def _factors(norm: Layer) -> tuple[Any, Any, Any]:
    """(factor, offset, mean) of a batch norm in inference, float64."""
    mean = to_numpy(norm.moving_mean).astype(np.float64)
    variance = to_numpy(norm.moving_variance).astype(np.float64)
    factor = 1.0 / np.sqrt(variance + norm.epsilon)
    if norm.scale:
        factor = factor * to_numpy(norm.gamma).astype(np.float64)
    offset = to_numpy(norm.beta).astype(np.float64) if norm.center else np.zeros_like(mean)
    return factor, offset, mean


def _with_bias(layer: Layer, source: Ref) -> Layer:
    """`layer` made again with a bias of zeros."""
    config = {**layer.get_config(), "use_bias": True, "bias_initializer": "zeros", "activation": "linear"}
    new = type(layer).from_config(config)
    new.build(source.shape)
    assign_copy(new.kernel, layer.kernel)
    return new
