"""The coupling groups of a PyTorch model, read from the graph that torch.export draws of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from whet.errors import ExportError, ModelError
from whet.graph.groups import Groups
from whet.graph.structure import Structure
from whet.torch.calls import Call, flat, shapes
from whet.torch.dimensions import read
from whet.torch.model import device_of, dtype_of, evaluating, to_tensors
from whet.torch.program import at_least_two, first_line, row_count, take_rows, trace_program

OUTPUT = "an output of the model"
INPUT = "an input of the model"
_ROWS = 2  # read with two examples: of one, every batch axis would look like a constant


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Groups, the program they were read from, and the inputs it was traced with."""

    groups: Groups
    program: Any
    inputs: Any


def groups(model: Any, example: Any) -> Groups:
    """The coupling groups of `model`, traced in inference mode on `example`, a batch of inputs.

    Raises:
        ModelError: torch.export cannot draw the model's graph.
        DataError: the model cannot run on `example`.
    """
    return read_model(model, example).groups


def read_model(model: Any, example: Any, *, dynamic: bool = False) -> Reading:
    """The groups of `model` and the program they were read from, with a dynamic batch axis if that is asked for.

    Raises:
        ModelError: torch.export cannot draw the model's graph.
    """
    if example is None:
        raise ModelError("Following channels needs example=, a batch of inputs to run the model on.")
    inputs = at_least_two(to_tensors(example, device_of(model), dtype_of(model)))
    rows = row_count(inputs)
    if rows > _ROWS:
        inputs, rows = take_rows(inputs, rows, list(range(_ROWS))), _ROWS
    try:
        with evaluating(model):
            program = trace_program(model, inputs, None if dynamic else False)
    except ExportError as cause:
        raise ModelError(
            f"The channels of {type(model).__name__} cannot be followed: {first_line(cause)} Masks (granularity=Weight()) "
            "need no graph."
        ) from cause
    return Reading(Groups(_structure(model, program, balanced=not dynamic), rows), program, inputs)


def _structure(model: Any, program: Any, *, balanced: bool) -> Structure:
    structure, values, constants = Structure(balanced=balanced), {}, set()
    named, saved = _held_by_placeholder(model, program), set(model.state_dict())
    read_names = {named[n.name][0] for n in program.graph.nodes if n.op == "placeholder" and n.users and n.name in named}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            held = named.get(node.name)
            if held is None:
                values[node] = structure.fresh(shapes(node)[0], INPUT)
            else:
                name, tensor, is_parameter = held
                values[node] = structure.hold(name, tensor.shape, itemsize=tensor.element_size(), is_parameter=is_parameter)
                if not is_parameter and name not in saved:
                    structure.fix(values[node], "a buffer that is not saved with the model")
                if name not in read_names:
                    structure.fix(values[node], "never read by the example")
                constants.add(node)
        elif node.op == "call_function":
            values[node] = _result(structure, node, values, constants)
            if node.all_input_nodes and all(source in constants for source in node.all_input_nodes):
                constants.add(node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                for value in flat(values[source]):
                    structure.fix(value, OUTPUT)
    structure.ids.solve()
    return structure


def _result(structure: Structure, node: Any, values: dict[Any, Any], constants: set[Any]) -> Any:
    if getattr(node.target, "__name__", "") == "getitem":
        found = values[node.args[0]]
        return found[node.args[1]] if isinstance(found, list) else found
    layer = layer_of(node)
    if not _has_tensor(node.meta.get("val")):
        return ()  # a number, such as the batch size
    if not isinstance(node.target, torch._ops.OpOverload):
        what = f"{getattr(node.target, '__name__', node.target)} in {layer or 'the model'}"
        for source in node.all_input_nodes:
            for value in flat(values[source]):
                structure.fix(value, f"{what} cannot be followed")
        made = [structure.fresh(shape, f"{what} cannot be followed") for shape in shapes(node)]
        return made if isinstance(node.meta.get("val"), list | tuple) else made[0]
    return read(Call(structure, node, values, constants, layer))


def _has_tensor(value: Any) -> bool:
    return any(isinstance(part, torch.Tensor) for part in (value if isinstance(value, list | tuple) else [value]))


def layer_of(node: Any) -> str:
    """The path of the module whose forward holds this operation."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("", None))[0] if stack else ""
    return str(path).removeprefix("L__self__").lstrip(".")


def _held_by_placeholder(model: Any, program: Any) -> dict[str, tuple[str, Any, bool]]:
    """Placeholders of parameters and buffers: the first name of the tensor (tied ones share it), and the tensor."""
    first: dict[int, str] = {}
    every = [*((n, p, True) for n, p in model.named_parameters(remove_duplicate=False))]
    every += [(n, b, False) for n, b in model.named_buffers(remove_duplicate=False)]
    known = {}
    for name, tensor, is_parameter in every:
        known[name] = (first.setdefault(id(tensor), name), tensor, is_parameter)
    signature = program.graph_signature
    of_model = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {placeholder: known[name] for placeholder, name in of_model.items() if name in known}
