"""An ONNX graph in the making: values in both channel orders, codes beside floats, constants stored once.

Keras puts channels last, ONNX's convolutions first. A value stays in the form it was made in, and is turned when something
reads it in another: quantized values as codes, which ONNX Runtime and OpenVINO then move further. Forms: "last" is Keras'
own; "first" has the channels behind the batch; "rows" is (n, channels) with all axes but the last in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import require
from whet.keras.clone import Call, Ref
from whet.numerics.affine import QParams

Array = npt.NDArray[Any]
LAST, FIRST, ROWS = "last", "first", "rows"


@dataclass(slots=True)
class Value:
    """One value. floats, codes: its tensors by form; a quantized value has codes alone."""

    ref: Ref
    home: str
    floats: dict[str, str] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    params: QParams | None = None


class Writer:
    """Nodes and constants under unique names, and the values of the program in them."""

    def __init__(self, taken: Sequence[str] = ()) -> None:
        self.onnx: Any = require("onnx", "onnx", "Writing ONNX files")
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {}
        self.values: dict[str, Value] = {}
        self._names: set[str] = set(taken)
        self._same: dict[tuple[Any, ...], str] = {}

    def name(self, wanted: str) -> str:
        """`wanted`, with a number where it is taken."""
        wanted = wanted.replace(":", ".")  # a colon would be read as a port by some runtimes
        found, count = wanted, 1
        while found in self._names:
            count += 1
            found = f"{wanted}_{count}"
        self._names.add(found)
        return found

    def add(self, op: str, inputs: Sequence[str], hint: str, **attributes: Any) -> str:
        """Append a node of one output, whose name is returned."""
        output = self.name(hint)
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def split(self, op: str, inputs: Sequence[str], hint: str, outputs: int, **attributes: Any) -> list[str]:
        """Append a node; the names of its outputs."""
        names = [self.name(f"{hint}_{index}") for index in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), names, **attributes))
        return names

    def constant(self, array: Any, hint: str) -> str:
        """An initializer; equal ones are stored once."""
        array = np.array(array, order="C")
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._same:
            self._same[key] = self.name(hint)
            self.constants[self._same[key]] = array
        return self._same[key]

    def scales(self, params: QParams, hint: str) -> tuple[str, str]:
        """The constants that hold a value's scale and zero point, the latter of the type of its codes."""
        dtype = code_type(params)
        scale = self.constant(np.asarray(params.scale, np.float32).reshape(()), f"{hint}_scale")
        return scale, self.constant(np.asarray(params.zero_point).reshape(()).astype(dtype), f"{hint}_zero_point")

    def put(self, ref: Ref, tensor: str, form: str, params: QParams | None = None) -> None:
        """`ref` is the float `tensor` in `form`, quantized where it has `params`."""
        value = self.values[ref.name] = Value(ref, form, params=params)
        if params is None:
            value.floats[form] = tensor
        else:
            if params.spec.bits not in (8, 16):
                ends = [(code - int(params.zero_point)) * float(params.scale) for code in (params.spec.qmin, params.spec.qmax)]
                limits = [self.constant(np.float32(end), f"{ref.name}_limit") for end in ends]
                tensor = self.add("Clip", (tensor, *limits), f"{ref.name}_clipped")
            value.codes[form] = self.add("QuantizeLinear", (tensor, *self.scales(params, ref.name)), f"{ref.name}_codes")

    def put_codes(self, ref: Ref, codes: str, form: str, params: QParams) -> None:
        """`ref` is what `codes` stand for."""
        self.values[ref.name] = Value(ref, form, codes={form: codes}, params=params)

    def float(self, name: str, form: str) -> str:
        """The tensor of a value in `form`."""
        value = self.values[name]
        if value.params is not None:  # one for every reader: ONNX Runtime fuses those that it need not share
            return self.add("DequantizeLinear", (self.codes(name, form), *self.scales(value.params, name)), name)
        if form not in value.floats:
            value.floats[form] = self._turned(value.floats[value.home], value, form)
        return value.floats[form]

    def codes(self, name: str, form: str) -> str:
        """The codes of a quantized value in `form`."""
        value = self.values[name]
        if form not in value.codes:
            value.codes[form] = self._turned(value.codes[value.home], value, form)
        return value.codes[form]

    def _turned(self, tensor: str, value: Value, form: str) -> str:
        hint, shape, home = f"{value.ref.name}_{form}", value.ref.shape, value.home
        if len(shape) < 3 or home == form:
            return tensor
        if home == ROWS:
            tensor = self.reshape(tensor, whole(shape), hint)
            home = LAST
        rank = len(shape)
        if form == ROWS:
            tensor = tensor if home == LAST else self.add("Transpose", [tensor], hint, perm=[0, *range(2, rank), 1])
            return self.reshape(tensor, [-1, int(shape[-1] or 0)], hint)
        if home == form:
            return tensor
        perm = [0, rank - 1, *range(1, rank - 1)] if form == FIRST else [0, *range(2, rank), 1]
        return self.add("Transpose", [tensor], hint, perm=perm)

    def reshape(self, tensor: str, shape: Sequence[int], hint: str) -> str:
        """`tensor` in another shape."""
        return self.add("Reshape", [tensor, self.constant(np.asarray(shape, np.int64), "shape")], hint)

    def inline(self, model: Any, late: Late, stored: Mapping[str, str]) -> list[Any]:
        """The nodes of another model under names of their own, in the place of `late`; its constants are kept.

        stored: tensors that take the place of some constants.
        """
        graph = model.graph
        names = {value.name: tensor for value, tensor in zip(graph.input, late.inputs, strict=True)}
        for tensor in graph.initializer:
            if tensor.name in stored:
                names[tensor.name] = stored[tensor.name]
            else:
                names[tensor.name] = self.constant(self.onnx.numpy_helper.to_array(tensor), f"{late.hint}/{tensor.name}")
        _rename(graph, names, lambda old: self.name(f"{late.hint}/{old}"))
        ends = [
            self.onnx.helper.make_node("Identity", [names[v.name]], [made])
            for v, made in zip(graph.output, late.outputs, strict=True)
        ]
        return [*graph.node, *ends]


@dataclass(frozen=True, slots=True)
class Late:
    """The place of nodes that another process writes: a call, the tensors that it reads, and those that it makes."""

    call: Call
    hint: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def _rename(graph: Any, names: dict[str, str], fresh: Callable[[str], str]) -> None:
    """*In place*: every value of a graph under its new name; those of inner graphs too."""
    for node in graph.node:
        for noted in ("name", "doc_string", "metadata_props"):  # where the exporter saw it: a third of a small file
            node.ClearField(noted)
        for index, old in enumerate(node.input):
            node.input[index] = names.get(old, old)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                known = dict(names)
                for item in (*inner.input, *inner.initializer):
                    known[item.name] = item.name = fresh(item.name)
                _rename(inner, known, fresh)
                for item in inner.output:
                    item.name = known[item.name]
        for index, old in enumerate(node.output):
            if old:
                names[old] = node.output[index] = fresh(old)


def code_type(params: QParams) -> str:
    """The type that holds the codes of a value: unsigned where they have a zero point."""
    bits = 8 if params.spec.bits <= 8 else 16
    return f"int{bits}" if params.spec.symmetric else f"uint{bits}"


def whole(shape: Sequence[int | None]) -> list[int]:
    """A shape with at most one open axis, for Reshape."""
    return [-1 if size is None else size for size in shape]


def is_plain(shape: Sequence[int | None]) -> bool:
    """Whether `whole` can say it: at most one axis is open."""
    return sum(size is None for size in shape) <= 1
