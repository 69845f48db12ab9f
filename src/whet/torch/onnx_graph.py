"""An ONNX graph in the making, from a program of torch.export: its values, constants and shapes.

PyTorch's own exporter takes half a second for a small model, most of it for parsing its library anew. Programs all of whose
operations have a rule in `onnx_rules` are written with this instead, in a tenth of that, and need no optimizer behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from whet.errors import require

Node = Any  # of the program's torch.fx graph
OPSET, IR_VERSION = 20, 10  # what PyTorch's exporter writes, too
_TYPES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}


class NoRule(Exception):
    """The program has an operation, or a form of one, that only PyTorch's own exporter writes."""


class Writer:
    """The nodes and constants of one graph, and the values of the program in them."""

    def __init__(self, program: Any) -> None:
        self.onnx: Any = require("onnx", "onnx", "Exporting to ONNX")
        self.nodes: list[Any] = []
        self.stored = _stored(program)
        self.initializers: dict[str, Any] = {}  # name -> tensor, of those that are read
        self._values: dict[Node, Any] = {}
        self._changed: dict[Any, Any] = {}  # a node that changed a tensor in place -> the node that made the tensor
        self._taken = {node.name for node in program.graph.nodes if node.op == "placeholder"}
        self._taken |= {name for name, _ in self.stored.values()}
        self._constants: dict[tuple[Any, ...], str] = {}
        self._computed: dict[tuple[str, ...], str] = {}
        self.folded: set[Node] = set()  # batch norms that a convolution's weights hold
        self._memory: dict[tuple[Any, ...], str] = {}  # a weight's place -> the name that it was first read by

    def add(self, op: str, inputs: Sequence[str], hint: str, **attributes: Any) -> str:
        """Append an ONNX node with one output, whose name is returned; what constants give is computed once."""
        key = (op, *inputs, str(attributes))
        is_constant = all(name in self.initializers for name in inputs)
        if key not in self._computed or not is_constant:
            self._computed[key] = self.split(op, inputs, hint, 1, **attributes)[0]
        return self._computed[key]

    def split(self, op: str, inputs: Sequence[str], hint: str, outputs: int, **attributes: Any) -> list[str]:
        """Append an ONNX node; the names of its outputs."""
        names = [self._fresh(hint) for _ in range(outputs)]
        given = {name: value for name, value in attributes.items() if value is not None}
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), names, **given))
        return names

    def constant(self, value: Any, dtype: Any) -> str:
        """An initializer that holds `value`; equal ones are stored once."""
        array = np.ascontiguousarray(value, dtype).reshape(np.shape(value))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._fresh("val")
            self.initializers[self._constants[key]] = torch.from_numpy(array)
        return self._constants[key]

    def weight(self, name: str, tensor: Any) -> str:
        """The initializer that holds a tensor of the model; tied weights are stored once, under the name first read."""
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = self._memory.setdefault(place, name) if tensor.numel() else name
        self.initializers.setdefault(first, tensor)
        return first

    def tensor(self, node: Node) -> Any:
        """The tensor of the model that `node` stands for; None for what is computed."""
        return self.stored[node][1].detach() if node in self.stored else None

    def is_alone(self, node: Node) -> bool:
        """Whether `node` stands for a tensor of the model that is read once, under one name."""
        if node not in self.stored or len(node.users) != 1:
            return False
        place = self.stored[node][1].data_ptr()
        return [tensor.data_ptr() for _, tensor in self.stored.values()].count(place) == 1

    def read(self, node: Node) -> str:
        """The name of the value that `node` made, as it is now."""
        if not isinstance(node, torch.fx.Node):
            raise NoRule(f"an operand that is no tensor: {node!r}")
        if node in self.stored:
            return self.weight(*self.stored[node])
        found = self._values.get(self._changed.get(node, node))
        if not isinstance(found, str):
            raise NoRule(f"{node.name} is no single tensor")
        return found

    def parts(self, node: Node) -> list[str]:
        """The names of the several values that `node` made."""
        found = self._values.get(node)
        if not isinstance(found, list):
            raise NoRule(f"{node.name} is a single tensor")
        return found

    def put(self, node: Node, value: str | list[str]) -> None:
        """`node` made `value`."""
        self._values[node] = value

    def put_in_place(self, node: Node, changed: Node, value: str) -> None:
        """`node` changed the tensor of `changed`: all that read either get `value` from now on.

        Raises:
            NoRule: other tensors may share the memory, or it is a weight or an input.
        """
        owner: Any = self._changed.get(changed, changed)
        names = [owner, *(other for other, its in self._changed.items() if its is owner)]
        is_view = owner.op != "call_function" or any(_shares(owner, operand) for operand in owner.all_input_nodes)
        if is_view or any(_shares(user, name) for name in names for user in name.users):
            raise NoRule(f"{node.name} changes a tensor that others may see")
        self._changed[node] = owner
        self._values[owner] = value

    def _fresh(self, hint: str) -> str:
        name, count = hint if hint not in self._taken else f"{hint}_0", 0
        while name in self._taken:
            count += 1
            name = f"{hint}_{count}"
        self._taken.add(name)
        return name

    def model(self, inputs: Sequence[tuple[str, Any]], outputs: Sequence[tuple[str, Any]]) -> Any:
        """The ONNX model. inputs, outputs: names with tensors of their dtype and (symbolic) shape."""
        helper = self.onnx.helper
        graph = helper.make_graph(
            self._needed([name for name, _ in outputs]),
            "main_graph",
            [self._info(*item) for item in inputs],
            [self._info(*item) for item in outputs],
        )
        for name, tensor in self.initializers.items():
            proto = graph.initializer.add()
            proto.name, proto.data_type = name, self.code(tensor.dtype)
            proto.dims.extend(tensor.shape)
            proto.raw_data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = IR_VERSION
        return model

    def _needed(self, outputs: Sequence[str]) -> list[Any]:
        """The nodes that `outputs` depend on."""
        read, kept = set(outputs), []
        for node in reversed(self.nodes):
            if read.intersection(node.output):
                kept.append(node)
                read.update(node.input)
        return kept[::-1]

    def code(self, dtype: Any) -> int:
        """ONNX's number for a dtype."""
        if dtype not in _TYPES:
            raise NoRule(f"the dtype {dtype}")
        return int(getattr(self.onnx.TensorProto, _TYPES[dtype]))

    def _info(self, name: str, tensor: Any) -> Any:
        shape = [size if isinstance(size, int) else str(size) for size in tensor.shape]
        return self.onnx.helper.make_tensor_value_info(name, self.code(tensor.dtype), shape)


def _stored(program: Any) -> dict[Node, tuple[str, Any]]:
    """What the program's placeholders hold: name and tensor."""
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise NoRule("the model changes its own state")
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    found = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            name = names[node.name]
            found[node] = (name, program.state_dict[name] if name in program.state_dict else program.constants[name])
    return found


def _shares(reader: Node, operand: Node) -> bool:
    """Whether what `reader` returns may be a view of `operand`, which it does not change."""
    schema = getattr(reader.target, "_schema", None)
    if schema is None:
        return bool(reader.op == "call_function")
    given = [*zip(schema.arguments, reader.args, strict=False)]
    given += [(argument, reader.kwargs[argument.name]) for argument in schema.arguments if argument.name in reader.kwargs]
    read = [
        argument.alias_info
        for argument, value in given
        if value is operand or operand in (value if type(value) is list else ())
    ]
    return any(alias is not None and alias.is_write is False for alias in read)
