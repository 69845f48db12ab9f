"""Pads as ONNX operators; where channels are added to a shortcut, a convolution that keeps the runtime's channel blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from whet.torch.onnx_graph import Node, Writer
from whet.torch.onnx_rules import Given, given, is_float, need, rule, shape_of

_LARGEST = 2**13  # weights of a shortcut's convolution, 64 to 128 channels: 32 kB; behind that it gains less than 4 %


@rule("constant_pad_nd", "pad")
def _pad(writer: Writer, node: Node, a: Given) -> str:
    need(getattr(a, "mode", "constant") == "constant" and is_float(a.self), "padding by other values")
    need(all(isinstance(size, int) for size in a.pad), "padding by a computed size")
    rank = a.self.meta["val"].ndim
    begin, end = [0] * rank, [0] * rank
    for number in range(len(a.pad) // 2):  # from the last axis on
        begin[rank - 1 - number], end[rank - 1 - number] = a.pad[2 * number : 2 * number + 2]
    if not a.value and _widens(node, a.self, begin, end):
        return _shortcut(writer, node, a.self, (begin[1], end[1]))
    inputs = [writer.read(a.self), writer.constant(begin + end, np.int64)]
    if a.value:
        inputs.append(writer.constant(a.value, np.float32))
    return writer.add("Pad", inputs, node.name)


def _widens(node: Node, source: Node, begin: Sequence[int], end: Sequence[int]) -> bool:
    """Whether `node` adds channels of zeros to images that an addition alone reads, and few enough
    for a convolution."""
    if len(begin) != 4 or any(size for axis, size in enumerate((*begin, *end)) if axis % 4 != 1) or min(begin[1], end[1]) < 0:
        return False
    names = [getattr(getattr(user.target, "_schema", None), "name", "") for user in node.users]
    if len(names) != 1 or names[0] not in ("aten::add", "aten::add_"):
        return False
    if "dequantize" in str(_strided(source)[0].target):
        return False  # slices of codes move them as they are
    before, after = shape_of(source)[1], shape_of(node)[1]
    return isinstance(before, int) and isinstance(after, int) and before < after and before * after <= _LARGEST


def _shortcut(writer: Writer, node: Node, before: Node, added: tuple[int, int]) -> str:
    """`pad(x[:, :, ::s, ::t])`, option A of He et al. 2015, as a 1 x 1 convolution of stride (s, t) with weights 0 and 1.

    Each of its sums has one term that is not 0, so that it is exact (of finite numbers). ONNX Runtime keeps channels in blocks
    of 16 around convolutions; a Slice or Pad takes them apart, and with them every addition and ReLU of the stage, which then
    run alone. ResNet-20 and ResNet-56 take 5 to 11 % less time in this form, at batch 1 and 8.
    """
    source, strides = _strided(before)
    channels = shape_of(before)[1]
    weight = np.zeros((channels + sum(added), channels, 1, 1), np.float32)
    weight[np.arange(channels) + added[0], np.arange(channels)] = 1
    inputs = [writer.read(source), writer.constant(weight, np.float32)]
    return writer.add("Conv", inputs, node.name, kernel_shape=[1, 1], strides=list(strides))


def _strided(node: Node) -> tuple[Node, tuple[int, int]]:
    """The value of which `node` is every s-th row and every t-th column, and (s, t)."""
    strides = {2: 1, 3: 1}
    while isinstance(node, torch.fx.Node) and str(node.target) == "aten.slice.Tensor":
        a = given(node)
        size = shape_of(a.self)[a.dim]
        is_whole = a.start in (None, 0) and (a.end is None or (isinstance(a.end, int) and _reaches(a.end, size)))
        if not is_whole or not isinstance(a.step, int) or (a.step != 1 and (a.dim not in strides or strides[a.dim] != 1)):
            break
        if a.step != 1:
            strides[a.dim] = a.step
        node = a.self
    return node, (strides[2], strides[3])


def _reaches(end: int, size: Any) -> bool:
    """Whether a slice that ends at `end` takes an axis of `size` to its end."""
    return end >= size if isinstance(size, int) else end >= 2**62
