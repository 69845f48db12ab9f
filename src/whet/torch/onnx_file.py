"""Tidying an ONNX model: everything that neither the runtime nor a reader of the file needs is taken out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from whet.errors import require
from whet.torch.onnx_codes import let_codes_flow

OnnxModel = Any
_PAIRS = ("QuantizeLinear", "DequantizeLinear")


def tidy(model: OnnxModel, version: str) -> None:
    """*In place*: drop the exporter's metadata (a third of a small file) and what says nothing; share equal constants.

    Weights keep their names; scales and zero points are named after what they belong to.
    """
    graph = model.graph
    _strip_metadata(model)
    _drop_default_attributes(model)
    _share_constants(graph)
    let_codes_flow(graph)
    _settle_zero_points(graph)
    _share_constants(graph)
    _drop_unused_initializers(graph)
    _name_scales(graph)
    _shorten_names(graph)
    model.producer_name, model.producer_version = "whet", version
    used = {node.domain for node in _nodes(graph)}
    for opset in [opset for opset in model.opset_import if opset.domain not in used and opset.domain]:
        model.opset_import.remove(opset)


def rename_dimensions(model: OnnxModel, names: dict[str, str]) -> None:
    """*In place*: give the symbolic dimensions of inputs and outputs other names."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def rename_values(model: OnnxModel, names: dict[str, str]) -> None:
    """*In place*: give inputs, outputs and initializers other names. What else bears a new name makes way."""
    graph = model.graph
    names = {old: new for old, new in names.items() if old != new}
    taken = {name for node in _nodes(graph) for name in (*node.input, *node.output)} | {i.name for i in graph.initializer}
    names = {old: new for old, new in names.items() if old in taken or any(old == item.name for item in graph.output)}
    full = names | {name: f"{name}_" for name in names.values() if name in taken and name not in names}
    for value in (*graph.input, *graph.output):
        value.name = full.get(value.name, value.name)
    for node in _nodes(graph):
        for index, name in enumerate(node.output):
            node.output[index] = full.get(name, name)
    _rename(graph, full)


def _strip_metadata(model: OnnxModel) -> None:
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    del model.metadata_props[:]
    del graph.metadata_props[:]
    del graph.value_info[:]
    for item in (*graph.input, *graph.output, *graph.initializer, *_nodes(graph)):
        item.doc_string = ""
        del item.metadata_props[:]
    for node in _nodes(graph):
        node.name = ""


def _drop_default_attributes(model: OnnxModel) -> None:
    onnx = require("onnx", "onnx", "Writing ONNX files")
    version = next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx"))
    for node in _nodes(model.graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        defaults = onnx.defs.get_schema(node.op_type, version, "").attributes
        for attribute in list(node.attribute):
            known = defaults.get(attribute.name)
            default = known.default_value if known is not None else None
            given = onnx.helper.get_attribute_value(attribute)
            is_default = default is not None and default.type != 0 and onnx.helper.get_attribute_value(default) == given
            # The schema writes these three defaults in words.
            is_ones = attribute.name in ("dilations", "strides") and node.op_type != "MaxPool" and set(given) == {1}
            is_zeros = attribute.name == "pads" and node.op_type in ("Conv", "ConvTranspose") and set(given) == {0}
            if is_default or is_ones or is_zeros:
                node.attribute.remove(attribute)
        per_tensor = node.op_type in _PAIRS and _is_scalar(model.graph, node.input[1])
        for attribute in [a for a in node.attribute if per_tensor and a.name == "axis"]:
            node.attribute.remove(attribute)


def _is_scalar(graph: Any, name: str) -> bool:
    return any(item.name == name and len(item.dims) == 0 for item in graph.initializer)


def _settle_zero_points(graph: Any) -> None:
    """A missing zero point is 0 of the codes' type; only the integer Gemm and MatMul of ONNX Runtime want to read that 0."""
    onnx = require("onnx", "onnx", "Writing ONNX files")
    arrays = {item.name: item for item in graph.initializer}
    read_by = {name: node.op_type for node in _nodes(graph) for name in node.input}
    for node in _nodes(graph):
        if node.op_type != "DequantizeLinear" or node.input[0] not in arrays:
            continue
        if len(node.input) == 3 and not np.any(onnx.numpy_helper.to_array(arrays[node.input[2]])):
            del node.input[2]
        is_weight = arrays[node.input[0]].data_type == onnx.TensorProto.INT8
        if len(node.input) == 2 and is_weight and read_by.get(node.output[0]) in ("Gemm", "MatMul"):
            shape = tuple(arrays[node.input[1]].dims)
            zeros = onnx.numpy_helper.from_array(np.zeros(shape, np.int8), f"{node.input[0]}_zero_point")
            graph.initializer.append(zeros)
            node.input.append(zeros.name)


def _share_constants(graph: Any) -> None:
    """One initializer for equal small constants (scales, zero points, shapes)."""
    first: dict[tuple[Any, ...], str] = {}
    renamed: dict[str, str] = {}
    outputs = {output.name for output in graph.output}
    for item in list(graph.initializer):
        if item.name in outputs or len(item.raw_data) > 4096:
            continue
        contents = type(item)()
        contents.CopyFrom(item)
        contents.name = ""
        key = contents.SerializeToString(deterministic=True)
        keeper = first.setdefault((key,), item.name)
        if keeper != item.name:
            renamed[item.name] = keeper
            graph.initializer.remove(item)
    _rename(graph, renamed)


def _drop_unused_initializers(graph: Any) -> None:
    used = {name for node in _nodes(graph) for name in node.input} | {output.name for output in graph.output}
    for item in [item for item in graph.initializer if item.name not in used]:
        graph.initializer.remove(item)


def _name_scales(graph: Any) -> None:
    """`conv1.weight` has the scales `conv1.weight_scale`, the value `relu` has `relu_scale` and `relu_zero_point`."""
    taken = {item.name for item in graph.initializer} | {name for node in _nodes(graph) for name in node.output}
    constants = {item.name for item in graph.initializer}
    renamed: dict[str, str] = {}
    for node in _nodes(graph):
        if node.op_type not in _PAIRS:
            continue
        for name, role in zip(node.input[1:], ("scale", "zero_point"), strict=False):
            new = f"{node.input[0]}_{role}"
            if name in constants and name not in renamed and new not in taken and name.startswith("val_"):
                renamed[name] = new
                taken.add(new)
    _rename(graph, renamed)


def _shorten_names(graph: Any) -> None:
    """Numbers for what lies between a quantize and its reader; the values of operations keep their names."""
    kept = {item.name for item in (*graph.input, *graph.output, *graph.initializer)}
    kept |= {name for node in _nodes(graph) if node.op_type not in _PAIRS for name in node.output}
    renamed: dict[str, str] = {}
    for node in _nodes(graph):
        if node.op_type in _PAIRS and node.output[0] not in kept:
            renamed[node.output[0]] = next(str(i) for i in itertools.count(len(renamed)) if str(i) not in kept)
    for node in _nodes(graph):
        for index, name in enumerate(node.output):
            node.output[index] = renamed.get(name, name)
    _rename(graph, renamed)


def _rename(graph: Any, names: dict[str, str]) -> None:
    for item in graph.initializer:
        item.name = names.get(item.name, item.name)
    for node in _nodes(graph):
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)


def _nodes(graph: Any) -> Iterator[Any]:
    """Every node, those of subgraphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inner)
