"""Letting integers flow between integer operators in an ONNX graph of quantize-dequantize pairs.

Operators that only move values (reshape, transpose, slice, max pool) work on codes as well as on floats, so a dequantize
before one may stand behind it, a quantize behind one before it, and a dequantize that meets its own quantize is nothing.
"""

from __future__ import annotations

from typing import Any

Graph = Any
_SHAPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})
_MOVES = _SHAPING | {"Slice", "MaxPool"}


def let_codes_flow(graph: Graph) -> None:
    """*In place*: dequantizes sink below moves, quantizes rise above them, and pairs that meet are removed."""
    scalars = {item.name for item in graph.initializer if len(item.dims) == 0}
    _sink_dequantizes(graph, scalars)
    _raise_quantizes(graph, scalars)
    _drop_pairs(graph)
    _drop_unread(graph)
    _guard_float_layers(graph)


def _guard_float_layers(graph: Graph) -> None:
    """Keep ONNX Runtime from quantizing layers that are to stay float.

    It rounds the float weights of a Conv, ConvTranspose or Gemm between a dequantize and a quantize to int8, per tensor, on
    its own (seen in 1.32: 37 dB where nothing was to be rounded). A Sum of one operand, the identity, stands between.
    """
    outputs = {item.name for item in graph.output}
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def is_rounded(value: str) -> bool:
        """Whether a quantize alone reads `value`, perhaps behind activations that ONNX Runtime folds into it."""
        (reader, *others) = readers.get(value) or [None]
        if reader is None or others or value in outputs:
            return False
        return reader.op_type == "QuantizeLinear" or (reader.op_type in ("Relu", "Clip") and is_rounded(reader.output[0]))

    ordered: list[Any] = []
    for node in graph.node:
        ordered.append(node)
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or not is_rounded(node.output[0]):
            continue
        weight = producers.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            guard = type(node)(op_type="Sum", input=[f"{node.output[0]}_float"], output=[node.output[0]])
            node.output[0] = guard.input[0]
            ordered.append(guard)
    _put(graph, ordered)


def _is_pair_of(node: Any, op: str, scalars: set[str]) -> bool:
    """Whether `node` is a per-tensor quantize or dequantize of an activation."""
    return node.op_type == op and len(node.input) > 1 and node.input[1] in scalars


def _sink_dequantizes(graph: Graph, scalars: set[str]) -> None:
    constants = {item.name for item in graph.initializer}
    producers: dict[str, Any] = {}
    ordered: list[Any] = []
    for node in graph.node:
        ordered.append(node)
        producers.update((name, node) for name in node.output)
        before = producers.get(node.input[0]) if node.input else None
        is_move = node.op_type in _MOVES and len(node.output) == 1
        if before is None or not is_move or not _is_pair_of(before, "DequantizeLinear", scalars):
            continue
        if before.input[0] not in constants:
            behind = type(node)()
            behind.CopyFrom(before)
            behind.input[0], behind.output[0] = f"{node.output[0]}_codes", node.output[0]
            node.input[0], node.output[0] = before.input[0], behind.input[0]
            ordered.append(behind)
            producers[behind.output[0]] = behind
    _put(graph, ordered)


def _raise_quantizes(graph: Graph, scalars: set[str]) -> None:
    outputs = {item.name for item in graph.output}
    producers = {name: node for node in graph.node for name in node.output}
    reads = _reads(graph)
    order = list(graph.node)
    for node in reversed(order):
        while _is_pair_of(node, "QuantizeLinear", scalars):
            move = producers.get(node.input[0])
            if move is None or move.op_type not in _SHAPING or reads[move.output[0]] != 1 or move.output[0] in outputs:
                break
            moved, codes = move.output[0], node.output[0]
            node.input[0], node.output[0] = move.input[0], moved
            move.input[0], move.output[0] = moved, codes
            producers[moved], producers[codes] = node, move
            at = next(index for index, item in enumerate(order) if item is move)
            here = next(index for index, item in enumerate(order) if item is node)
            order.insert(at, order.pop(here))
    _put(graph, order)


def _drop_pairs(graph: Graph) -> None:
    producers = {name: node for node in graph.node for name in node.output}
    same: dict[str, str] = {}
    for node in graph.node:
        before = producers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if before is not None and before.op_type == "DequantizeLinear" and list(before.input[1:]) == list(node.input[1:]):
            same[node.output[0]] = same.get(before.input[0], before.input[0])
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)


def _drop_unread(graph: Graph) -> None:
    outputs = {item.name for item in graph.output}
    reads = _reads(graph)
    kept = []
    for node in reversed(graph.node):
        is_pair = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        if is_pair and node.output[0] not in outputs and not reads.get(node.output[0]):
            for name in node.input:
                reads[name] -= 1
        else:
            kept.append(node)
    _put(graph, kept[::-1])


def _reads(graph: Graph) -> dict[str, int]:
    """How often each value is read, inside subgraphs too."""
    counts: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            counts[name] = counts.get(name, 0) + 1
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                for name, count in _reads(inner).items():
                    counts[name] = counts.get(name, 0) + count
    return counts


def _put(graph: Graph, ordered: list[Any]) -> None:
    """Make `ordered` the nodes of `graph`."""
    nodes = []
    for node in ordered:
        kept = type(node)()
        kept.CopyFrom(node)
        nodes.append(kept)
    del graph.node[:]
    graph.node.extend(nodes)
