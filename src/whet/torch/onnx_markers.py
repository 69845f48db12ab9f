"""Markers in an exported program where stored weights are read, and what they become in the ONNX file.

While a program is traced for ONNX, a converted model calls these in the place of operators on codes. Both writers, Whet's own
and PyTorch's, pass them on as operators of a domain of their own; `lower` then writes them with `formats.onnx_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from whet.errors import ExportError, require
from whet.formats.onnx_weights import OPSET, StoredWeight, decoded, dynamic_product, lookup, product

Tensor = Any
DOMAIN = "whet"


def weight(name: str, shape: Sequence[int], dtype: Any) -> Tensor:
    """The weight `name` as floats."""
    made = torch.onnx.ops.symbolic(f"{DOMAIN}::Weight", (), {"weight": name}, dtype=torch.float32, shape=tuple(shape))
    return made if dtype == torch.float32 else made.to(dtype)


def linear(x: Tensor, name: str, bias: Tensor | None, columns: int, *, turned: bool, dynamic: bool) -> Tensor:
    """`x @ w + bias`; turned: the weight is stored as (out, in)."""
    inputs = (x,) if bias is None else (x, bias)
    kind = "DynamicProduct" if dynamic else "Product"
    attributes = {"weight": name, "turned": int(turned)}
    shape = (*x.shape[:-1], columns)
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", inputs, attributes, dtype=torch.float32, shape=shape)


def embedding(ids: Tensor, name: str, features: int) -> Tensor:
    """Rows `ids` of the weight `name`."""
    shape = (*ids.shape, features)
    return torch.onnx.ops.symbolic(f"{DOMAIN}::Lookup", (ids,), {"weight": name}, dtype=torch.float32, shape=shape)


def lower(model: Any, weights: Mapping[str, StoredWeight]) -> None:
    """*In place*: every marker of an ONNX model as operators and constants.

    Raises:
        ExportError: a marker lies in the branch of a condition, or in a loop.
    """
    graph = _Graph(model)
    floats: dict[str, str] = {}
    renamed: dict[str, str] = {}
    read = _read(model.graph)
    for node in list(model.graph.node):
        if node.domain != DOMAIN:
            kept = type(node)()
            kept.CopyFrom(node)
            for index, name in enumerate(kept.input):
                kept.input[index] = renamed.get(name, name)
            graph.nodes.append(kept)
            continue
        settings = {item.name: item.s.decode() if item.s else item.i for item in node.attribute}
        stored, made = weights[str(settings["weight"])], node.output[0]
        inputs = [renamed.get(name, name) for name in node.input]
        if node.op_type == "Weight":
            if made not in read:  # a product or look-up reads the codes itself
                continue
            if stored.name not in floats:
                floats[stored.name] = decoded(graph, stored)
            renamed[made] = floats[stored.name]
            continue
        if node.op_type == "Lookup":
            renamed[made] = lookup(graph, inputs[0], stored, made)
            continue
        matrix = stored.turned((1, 0)) if settings.get("turned") else stored
        write = dynamic_product if node.op_type == "DynamicProduct" else product
        renamed[made] = write(graph, inputs[0], matrix, inputs[1] if len(inputs) > 1 else None, made)
    graph.finish(renamed)


class _Graph:
    """What `onnx_weights` writes into: the nodes of a model anew, and its further constants."""

    def __init__(self, model: Any) -> None:
        self.onnx: Any = require("onnx", "onnx", "Writing ONNX files")
        self.model: Any = model
        self.nodes: list[Any] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._arrays: dict[str, Any] = {}
        inner = [g for n in model.graph.node for a in n.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)]
        if any(node.domain == DOMAIN for graph in inner for node in graph.node):
            raise ExportError("A layer inside a condition or loop cannot store integer weights: put it into keep=.")
        values = {name for node in model.graph.node for name in node.output} - {
            name for node in model.graph.node if node.domain == DOMAIN for name in node.output
        }
        self._taken = values | {item.name for item in (*model.graph.input, *model.graph.output, *model.graph.initializer)}

    def add(self, op: str, inputs: Sequence[str], hint: str, **attributes: Any) -> str:
        """Append a node of one output, whose name is returned."""
        return self.split(op, inputs, hint, 1, **attributes)[0]

    def split(self, op: str, inputs: Sequence[str], hint: str, outputs: int, **attributes: Any) -> list[str]:
        """Append a node; the names of its outputs."""
        names = [self._fresh(hint) for _ in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), names, **attributes))
        return names

    def constant(self, array: Any, hint: str) -> str:
        """The name of an initializer that holds `array`; equal ones are stored once."""
        array = np.array(array, order="C")
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = self._fresh(hint)
            self._arrays[name] = array
        return self._constants[key]

    def finish(self, renamed: Mapping[str, str]) -> None:
        """Put nodes and constants into the model; outputs keep their names."""
        graph = self.model.graph
        back = {renamed[item.name]: item.name for item in graph.output if item.name in renamed}
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = back.get(name, name)
            for attribute in node.attribute:
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    _rename(inner, {old: back.get(new, new) for old, new in renamed.items()})
        del graph.node[:]
        graph.node.extend(self.nodes)
        for name, array in self._arrays.items():
            graph.initializer.append(self.onnx.numpy_helper.from_array(array, name))
        for opset in list(self.model.opset_import):
            if opset.domain == DOMAIN:
                self.model.opset_import.remove(opset)
            elif opset.domain in ("", "ai.onnx"):
                opset.version = max(opset.version, OPSET)
        self.model.ir_version = max(self.model.ir_version, 10)

    def _fresh(self, hint: str) -> str:
        name, count = hint, 0
        while name in self._taken:
            count += 1
            name = f"{hint}_{count}"
        self._taken.add(name)
        return name


def _read(graph: Any) -> set[str]:
    """The names of all values that are read, inside subgraphs too."""
    found = {name for node in graph.node for name in node.input} | {item.name for item in graph.output}
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                found |= _read(inner)
    return found


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(inner, names)
