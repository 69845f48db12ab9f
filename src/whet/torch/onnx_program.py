"""ONNX models from programs of torch.export, by Whet's own rules."""

from __future__ import annotations

import operator
from typing import Any

import torch

from whet.torch import onnx_layers, onnx_pads  # noqa: F401  # their import registers rules
from whet.torch.onnx_graph import Node, NoRule, Writer
from whet.torch.onnx_rules import RULES, given

_ASSERTIONS = ("aten::_assert", "aten::sym_constrain_range", "aten::_assert_tensor_metadata")


def write_program(program: Any) -> Any:
    """The ONNX model of `program`; None where one of its operations has no rule."""
    try:
        writer = Writer(program)
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node not in writer.stored]
        for node in placeholders:
            writer.put(node, node.name)
        for node in program.graph.nodes:
            if node.op == "call_function":
                _write(writer, node)
            elif node.op not in ("placeholder", "output"):
                raise NoRule(f"a node of kind {node.op}")
        outputs = _outputs(writer, program)
        return writer.model([(node.name, node.meta["val"]) for node in placeholders], outputs)
    except NoRule:
        return None


def _write(writer: Writer, node: Node) -> None:
    if isinstance(node.meta.get("val"), torch.SymInt | int | float | bool):
        return  # a size: rules read it from the shapes where they can, and refuse it where they cannot
    if node.target is operator.getitem:
        writer.put(node, writer.parts(node.args[0])[node.args[1]])
        return
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        raise NoRule(str(node.target))
    if schema.name.startswith(_ASSERTIONS):
        return
    rule = RULES.get(f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name)
    if rule is None and schema.name.startswith("quantized_decomposed"):
        rule = RULES.get(schema.name)
    if rule is None:
        raise NoRule(f"{schema.name}.{schema.overload_name}")
    made = rule(writer, node, given(node))
    if schema.is_mutable and isinstance(made, str):
        writer.put_in_place(node, node.args[0], made)
    else:
        writer.put(node, made)


def _outputs(writer: Writer, program: Any) -> list[tuple[str, Any]]:
    """Names and tensors of what is returned: each under a name of its own, which no input or weight bears."""
    (output,) = program.graph.output_node().args
    found: list[tuple[str, Any]] = []
    taken = {node.name for node in program.graph.nodes if node.op == "placeholder"} | set(writer.initializers)
    for node in output:
        name = writer.read(node)
        if name in taken or node in writer.stored:
            name = writer.add("Identity", [name], f"{node.name}_out")
        taken.add(name)
        found.append((name, node.meta["val"]))
    return found
