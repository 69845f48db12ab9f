"""Which input and output channels the values of a weight belong to, in any layout: for factors and means per channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.graph.nodes import Graph, Node
from whet.graph.views import WeightView

Array = npt.NDArray[Any]
Float64s = npt.NDArray[np.float64]
WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})  # what is a matrix product over im2col'ed rows
PASSING = frozenset({"identity", "flatten", "reshape"})  # values as they are
HOMOGENEOUS = PASSING | {"relu", "leaky_relu", "max_pool", "avg_pool", "global_avg_pool"}  # f(s x) = s f(x) for s > 0


def input_owner(view: WeightView, channels: int) -> npt.NDArray[np.intp] | None:
    """The input channel that each value of a weight is multiplied with, broadcastable against the weight; None if unclear.

    channels: of the layer's input. A weight with fewer of them on its input axis belongs to a grouped convolution.
    """
    shape, out = view.array.shape, view.out_axis % len(view.array.shape)
    place = np.arange(channels)
    if view.in_axis is None:  # depthwise: outputs are (channel, multiplier)
        if shape[out] % channels:
            return None
        return np.repeat(place, shape[out] // channels).reshape([-1 if axis == out else 1 for axis in range(len(shape))])
    at = view.in_axis % len(shape)
    if shape[at] == channels:
        return place.reshape([-1 if axis == at else 1 for axis in range(len(shape))])
    groups = channels // shape[at]
    if channels % shape[at] or shape[out] % groups:
        return None
    table = np.repeat(place.reshape(groups, shape[at]), shape[out] // groups, axis=0)  # (out, in / groups)
    table = table if out < at else table.T
    return table.reshape([shape[axis] if axis in (out, at) else 1 for axis in range(len(shape))])


def input_absmax(array: Array, owner: npt.NDArray[np.intp], channels: int) -> Float64s:
    """The greatest magnitude that reads each input channel, (channels,)."""
    others = tuple(axis for axis, size in enumerate(owner.shape) if size == 1 and array.shape[axis] != 1)
    found = np.zeros(channels)
    np.maximum.at(found, owner, np.max(np.abs(array), axis=others, keepdims=True))
    return found


def output_absmax(view: WeightView, array: Array) -> Float64s:
    """The greatest magnitude that makes each output channel, (channels,)."""
    others = tuple(axis for axis in range(array.ndim) if axis != view.out_axis % array.ndim)
    return np.asarray(np.max(np.abs(array), axis=others), np.float64)


def along_outputs(view: WeightView, factors: Array) -> Array:
    """Values for each output channel, broadcastable against the weight."""
    ndim = len(view.array.shape)
    return factors.reshape([-1 if axis == view.out_axis % ndim else 1 for axis in range(ndim)])


def alone(graph: Graph) -> set[str]:
    """The weighted nodes whose weight and bias nothing else reads."""
    uses: dict[str, int] = {}
    for node in graph.nodes:
        for name in {*node.weights, *((node.bias,) if node.bias is not None else ())}:
            uses[name] = uses.get(name, 0) + 1
    own = (node for node in graph.nodes if node.op in WEIGHTED and node.weight is not None)
    return {n.name for n in own if uses[str(n.weight)] == 1 and (n.bias is None or uses[n.bias] == 1)}


def has_own_outputs(node: Node, view: WeightView, bias: Array | None) -> bool:
    """Whether the weight's output axis is all of the layer's outputs, which a grouped transposed convolution's is not."""
    return node.op != "conv_transpose" or (bias is not None and bias.size == view.array.shape[view.out_axis])


def source(graph: Graph, value: str, through: frozenset[str], readers: Mapping[str, list[Node]]) -> Node | None:
    """The node that makes `value`, behind operations of `through` that alone read one another; None for an input."""
    producer = {made: node for node in graph.nodes for made in node.values}
    node = producer.get(value)
    while node is not None and node.op in through and len(node.inputs) == 1:
        before = node.inputs[0]
        if len(readers[before]) != 1 or before in graph.outputs:
            return node
        node = producer.get(before)
    return node
