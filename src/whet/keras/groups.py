"""The coupling groups of a Keras model, read from its layer graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from whet.data import rows
from whet.errors import ModelError
from whet.graph.groups import Groups
from whet.graph.ids import Value
from whet.keras import clone, dimensions, operations, recurrent_dimensions, wrapped_dimensions
from whet.keras.calls import SHAPE, Call, Count, Edit, Own, Reader, reader_of
from whet.keras.clone import Program, record, refs, substituted
from whet.keras.model import arrange, copy, short
from whet.keras.views import own_weights

INPUT, OUTPUT = "an input of the model", "an output of the model"
_ROWS = 2  # a batch of one would look like a constant


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Groups, and what was read beside them."""

    groups: Groups
    reader: Reader


def groups(model: Any, example: Any) -> Groups:
    """The coupling groups of `model`, whose layer graph is read with the sizes of `example`, a batch of inputs.

    Raises:
        ModelError: the model has no layer graph and cannot be traced.
        DataError: the example does not fit the model's inputs.
    """
    return read_model(copy(model), example).groups


def read_model(model: Any, example: Any) -> Reading:
    """The groups of `model`, a private copy: calls are read from its own layers.

    Raises:
        ModelError: the model has no layer graph and cannot be traced.
    """
    if example is None:
        raise ModelError("Following channels needs example=, a batch of inputs of the model.")
    given = arrange(model, example)
    program = record(model, lambda call, path, program: [call], given, copied=model)
    reader = reader_of(model)
    _read(program, reader, keras.tree.flatten(given), model)
    for variable in model.weights:
        known = reader.names.get(id(variable))
        if known is not None and known not in reader.structure.held:
            reader.structure.fix(reader.hold(variable), "never read by a call")
    reader.structure.ids.solve()
    return Reading(Groups(reader.structure, _ROWS if rows(example) else 1), reader)


def _read(program: Program, reader: Reader, example: list[Any], model: Any) -> None:
    structure = reader.structure
    values: dict[str, Value] = {}
    specs: dict[str, Any] = {}
    for ref, array in zip(refs(program.inputs), example, strict=True):
        shape = (_ROWS, *(int(n) if n is not None else int(m) for n, m in zip(ref.shape[1:], array.shape[1:], strict=True)))
        specs[ref.name] = keras.KerasTensor(shape, ref.dtype)
        values[ref.name] = structure.fresh(shape, INPUT)
    _follow(program, reader, values, specs, model)
    for ref in refs(program.outputs):
        structure.fix(values[ref.name], OUTPUT)


def _follow(program: Program, reader: Reader, values: dict[str, Value], specs: dict[str, Any], model: Any) -> None:
    """Read the calls of `program`, in order; `values` and `specs` hold its inputs, and get all that it makes."""
    for call in program.calls:
        given = substituted((call.args, call.kwargs), specs)
        made = keras.tree.flatten(_spec(call, *given))
        shapes = [tuple(int(n) for n in tensor.shape) for tensor in made]
        reader.operations[call.node.layer] = call.operation
        reader.calls.append(call)
        one = Call(reader, call, values, shapes)
        outputs = _opened(one, given, model) if _is_own(one) else read(one)
        for ref, spec, value in zip(refs(call.outputs), made, outputs, strict=True):
            specs[ref.name], values[ref.name] = spec, value
    reader.leaving |= {ref.name for ref in refs(program.outputs)}
    for path, inner, entered in program.inner:
        reader.operations[path] = inner
        reader.note(_input_shapes(path, inner, [values[ref.name] for ref in entered]))


def _is_own(call: Call) -> bool:
    """Whether it is a layer of the user's own class, to be read by what its code does."""
    layer = call.op
    if not isinstance(layer, keras.Layer) or isinstance(layer, keras.layers.Wrapper | keras.layers.Lambda):
        return False
    return _rule(call) is None and not type(layer).__module__.startswith("keras.src.layers.")


def _opened(call: Call, given: Any, model: Any) -> list[Value]:
    """The ids of what a layer of the user's makes, read from the calls inside it; all is fixed where it cannot be traced."""
    reader, outer = call.reader, call.reader.opened
    try:
        program = clone.opened(call.op, call.path, given[0], given[1], model)
    except ModelError as cause:
        return call.unknown(f"{type(call.op).__name__} in {call.path} cannot be followed: {short(cause)}")
    entries, tensors = refs(program.inputs), [leaf for leaf in keras.tree.flatten(given) if isinstance(leaf, keras.KerasTensor)]
    own = reader.opened = Own(call.path, call.op, given[0], given[1], call.inputs)
    values = {ref.name: value for ref, value in zip(entries, call.inputs, strict=True)}
    _follow(program, reader, values, {ref.name: spec for ref, spec in zip(entries, tensors, strict=True)}, model)
    for variable in own_weights(call.op):
        reader.note(_shape_of(call.path, variable, reader.hold(variable)))
    reader.own.append(own)
    reader.opened = outer
    return [values[ref.name] for ref in refs(program.outputs)]


def _shape_of(path: str, variable: Any, held: Value) -> Edit:
    return Edit(path, f"{variable.name}{SHAPE}", lambda count: tuple(count(axis) for axis in held))


def _spec(call: clone.Call, args: Any, kwargs: Any) -> Any:
    """The shapes of what a call makes of arguments of known shapes, in their structure.

    Raises:
        ModelError: they are not known.
    """
    operation = call.operation
    if type(operation).__name__ == "Reshape" and None in getattr(operation, "newshape", ()):  # traced with a batch of any size
        operation = type(operation)(tuple(_ROWS if n is None else n for n in operation.newshape))
    try:
        found = operation.compute_output_spec(*args, **kwargs)
        if any(None in tensor.shape for tensor in keras.tree.flatten(found)):  # some layers forget what they were built with
            found = operation(*keras.tree.map_structure(_zeros, args), **keras.tree.map_structure(_zeros, kwargs))
    except Exception as cause:
        raise ModelError(f"The shape of what {call.node.layer!r} makes is not known: {short(cause)}") from cause
    if any(None in tensor.shape for tensor in keras.tree.flatten(found)):
        raise ModelError(f"The shape of what {call.node.layer!r} makes is not known: it depends on the values of its inputs.")
    return found


def _zeros(leaf: Any) -> Any:
    return keras.ops.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, keras.KerasTensor) else leaf


def _input_shapes(path: str, inner: Any, given: list[Value]) -> Edit:
    """The sizes that a nested model declares of its inputs."""
    declared = [tuple(tensor.shape) for tensor in inner.inputs]

    def shapes(count: Count) -> tuple[tuple[int | None, ...], ...]:
        rows = zip(declared, given, strict=True)
        return tuple(tuple(n if n is None else count(axis) for n, axis in zip(*row, strict=True)) for row in rows)

    return Edit(path, "input_shapes", shapes)


def _rule(call: Call) -> Any:
    if isinstance(call.op, keras.Layer):
        layer = call.op
        return dimensions.rule_of(layer) or recurrent_dimensions.rule_of(layer) or wrapped_dimensions.rule_of(layer)
    return operations.rule_of(call.op)


def read(call: Call) -> list[Value]:
    """The ids of what `call` makes: by its rule, where that gives what the call does."""
    rule = _rule(call)
    if rule is None or call.kwargs.get("training"):
        return call.unknown()
    try:
        made = rule(call)
    except (KeyError, TypeError, ValueError, IndexError):
        return call.unknown()  # a form of the call that the rule does not know
    listed = made if isinstance(made, list) else [made]
    return listed if [tuple(map(len, value)) for value in listed] == call.shapes else call.unknown()
