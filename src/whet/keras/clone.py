"""A Keras model as a flat list of calls, and back: the one file that knows Keras' private graph names.

`record` copies a model and lists its calls in execution order, nested models opened up. Nothing of the user's model is
called or changed. `assemble` makes a Functional model of such a list, with what the caller inserts behind any value.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import keras

from whet.errors import ModelError
from whet.graph.nodes import Graph, Node, kinds_of
from whet.keras.model import copy, short
from whet.keras.views import Kernel, further_weights, kernels, unique, walk

Layer = Any
Model = Any
Tensor = Any


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of the graph, in the place of a tensor. shape holds None where it is dynamic."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        """Whether it is one of the values that the graph follows."""
        return "float" in self.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call: `operation(*args, **kwargs)`, with a `Ref` for every tensor; `outputs` likewise in their structure."""

    node: Node
    operation: Layer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any

    @property
    def inputs(self) -> list[Ref]:
        """All tensors that it reads, in order."""
        return refs((self.args, self.kwargs))


@dataclass(slots=True, eq=False)
class Program:
    """A model as calls. inputs and outputs are in the model's own structure. kernels: of the copied layers, by name;
    biases: bias name -> variable. folds: (batch norm, convolution) pairs that were folded. inner: nested models
    where they are called: path, model, inputs."""

    name: str
    calls: list[Call]
    inputs: Any
    outputs: Any
    input_names: list[str]
    kernels: dict[str, Kernel] = field(default_factory=dict)
    biases: dict[str, Any] = field(default_factory=dict)
    folds: list[tuple[str, str]] = field(default_factory=list)
    inner: list[tuple[str, Model, list[Ref]]] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        """Its operations for placement."""
        nodes = tuple(call.node for call in self.calls)
        return Graph(nodes, names(self.inputs), tuple(ref.name for ref in refs(self.outputs)))

    def values(self) -> list[Ref]:
        """Every floating-point value, in the order in which they appear."""
        found = refs(self.inputs) + [ref for call in self.calls for ref in refs(call.outputs)]
        return [ref for ref in found if ref.is_float]


class _Wide(keras.DTypePolicy):  # type: ignore[misc]
    """Compute in float32 on variables of `name`, which a layer casts when it reads them."""

    @property
    def compute_dtype(self) -> str:
        """What layers compute in."""
        return "float32"


# What a call does in the graph's terms: its calls in the place of the one that was recorded.
Lower = Callable[[Call, str, "Program"], list[Call]]


def refs(structure: Any) -> list[Ref]:
    """The values in a structure, in order."""
    return [leaf for leaf in keras.tree.flatten(structure) if isinstance(leaf, Ref)]


def names(structure: Any) -> tuple[str, ...]:
    """The names of the floating-point values in a structure."""
    return tuple(ref.name for ref in refs(structure) if ref.is_float)


def record(model: Model, lower: Lower, example: Any = None, *, copied: Model | None = None) -> Program:
    """The calls of a copy of `model`, each rewritten by `lower(call, layer path, program)`.

    copied: a copy that is there already; the operations of the calls are its own, and compute in their own dtypes. A subclassed
    model is traced by calling a copy of it once on symbolic inputs shaped like `example`.

    Raises:
        ModelError: the model cannot be copied, or a subclassed one cannot be traced.
    """
    own = copied is None
    copied = copy(model) if own else copied
    function = _function(copied)
    if function is None:
        function = _traced(copied, example)
    paths = {id(layer): path for path, layer in walk(copied)}
    for _, layer in walk(copied):
        if own and layer.compute_dtype != "float32" and "float" in layer.compute_dtype:
            stored = layer.variable_dtype
            layer.dtype_policy = keras.DTypePolicy("float32") if stored == "float32" else _Wide(stored)
    inputs = [Ref(f"input:{i}", tuple(t.shape), str(t.dtype)) for i, t in enumerate(function.inputs)]
    input_names = [str(t.name) for t in (function if _function(model) is None else _function(model)).inputs]
    program = Program(model.name, [], keras.tree.pack_sequence_as(function._inputs_struct, inputs), None, input_names)
    program.kernels = {kernel.name: kernel for kernel in (*kernels(copied), *further_weights(copied))}
    program.outputs = _visit(function, inputs, "", paths, lower, program)
    return program


def _function(model: Model) -> Any:
    """The layer graph of a Functional or Sequential model or keras.Function, None where there is none."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if hasattr(model, "_nodes_by_depth") and _calls_graph(model) else None


def operations(model: Model) -> dict[str, Any]:
    """Layers and `keras.ops` operations of the model's own layer graph by path; of a model without one, its layers."""
    found = dict(walk(model))
    if has_graph(model):
        program = record(model, lambda call, path, program: [call], copied=model)
        found |= {call.node.layer: call.operation for call in program.calls}
        found |= {path: inner for path, inner, _ in program.inner}
    return found


def has_graph(model: Model) -> bool:
    """Whether its layer graph is its own; a subclassed model's is drawn by calling it."""
    return _function(model) is not None


def _calls_graph(model: Model) -> bool:
    """Whether calling it runs the layer graph, not a `call` of the user's own."""
    return str(getattr(type(model).call, "__module__", "")).startswith("keras.")


def _traced(model: Model, example: Any) -> Any:
    """A subclassed model as a layer graph, by calling it on symbolic inputs."""
    sentence = (
        f"The model {model.name!r} is a subclassed model ({type(model).__name__}), and Whet needs its layer graph. Write it as "
        "a keras.Sequential or functional keras.Model, or let its call() use only Keras layers and keras.ops, without "
        "conditions on values."
    )
    if example is None:
        raise ModelError(f"{sentence} Pass example= to have it traced.")
    shaped = keras.tree.map_structure(lambda a: keras.Input(tuple(a.shape[1:]), dtype=str(a.dtype)), example)
    arguments = {"training": False} if "training" in inspect.signature(model.call).parameters else {}
    try:
        return keras.Model(shaped, model.call(shaped, **arguments))
    except Exception as cause:
        raise ModelError(f"{sentence} Tracing it failed: {short(cause)}") from cause


def opened(layer: Layer, path: str, args: Any, kwargs: Mapping[str, Any], model: Model) -> Program:
    """What the code of a layer inside `model` does, traced on symbolic tensors: its inner layers' calls and its `keras.ops`.

    args, kwargs: of the call, with a KerasTensor for every tensor.

    Raises:
        ModelError: the layer's code does more than that.
    """
    given = keras.tree.map_structure(_entered, (args, dict(kwargs)))
    entries = [leaf for leaf in keras.tree.flatten(given) if isinstance(leaf, keras.KerasTensor)]
    known = inspect.signature(layer.call).parameters
    training = {"training": False} if "training" in known else {}
    try:
        function = keras.Function(entries, layer.call(*given[0], **{**given[1], **training}))
    except Exception as cause:
        raise ModelError(f"The code of {path!r} ({type(layer).__name__}) cannot be traced: {short(cause)}") from cause
    inputs = [Ref(f"input:{i}", tuple(t.shape), str(t.dtype)) for i, t in enumerate(entries)]
    program = Program(path, [], inputs, None, [])
    paths = {id(inner): name for name, inner in walk(model)}
    program.outputs = _visit(function, inputs, f"{path}/", paths, lambda call, path, program: [call], program)
    return program


def _entered(leaf: Any) -> Any:
    is_tensor = isinstance(leaf, keras.KerasTensor)
    return keras.KerasTensor(leaf.shape, leaf.dtype) if is_tensor else leaf


def _visit(function: Any, inputs: list[Ref], prefix: str, paths: dict[int, str], lower: Lower, program: Program) -> Any:
    """Record the calls of one layer graph on `inputs`; nested graphs are visited where they are called."""
    known: dict[int, Ref] = {id(tensor): ref for tensor, ref in zip(function.inputs, inputs, strict=True)}
    for depth in sorted(function._nodes_by_depth, reverse=True):
        for node in function._nodes_by_depth[depth]:
            operation = node.operation
            if not operation or node.is_input or any(id(t) not in known for t in node.input_tensors):
                continue
            args, kwargs = node.arguments.fill_in(known)
            path = paths.get(id(operation))
            if path is None:  # a keras.ops call, whose own name counts all calls that this process has seen
                kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(operation).__name__).lower()
                path = paths[id(operation)] = unique(f"{prefix}{kind}", set(paths.values()))
            inner = _function(operation)
            if inner is not None:
                program.inner.append((path, operation, refs((args, kwargs))))
                outputs = _visit(inner, refs((args, kwargs)), f"{path}/", paths, lower, program)
            else:
                outputs = _append(node, operation, args, kwargs, path, lower, program)
            for tensor, ref in zip(node.outputs, keras.tree.flatten(outputs), strict=True):
                known[id(tensor)] = ref
    found = [known[id(tensor)] for tensor in function.outputs]
    return keras.tree.pack_sequence_as(function._outputs_struct, found)


def _append(node: Any, operation: Layer, args: Any, kwargs: Any, path: str, lower: Lower, program: Program) -> Any:
    """Add one call, lowered; the refs of its outputs."""
    kind = type(operation).__name__
    shapes = [(tuple(t.shape), str(t.dtype)) for t in node.outputs]
    made = Node(free(program, path, kind), kind, names((args, kwargs)), path, outputs=len(shapes), kinds=kinds_of(operation))
    outputs = [Ref(value, *shape) for value, shape in zip(made.values, shapes, strict=True)]
    structure = outputs[0] if len(outputs) == 1 else outputs
    lowered = lower(Call(made, operation, args, dict(kwargs), structure), path, program)
    program.calls.extend(lowered)
    return lowered[-1].outputs


def last_operation(model: Model, chosen: Callable[[Any], Any]) -> tuple[Any, int] | None:
    """What makes the output that `chosen` takes from the model's outputs, and its rank; None where the graph does not say."""
    function = _function(model)
    if function is None:
        return None
    tensor = chosen(function._outputs_struct)
    operation = tensor._keras_history.operation
    if _function(operation) is not None and len(operation.outputs) == 1:
        return last_operation(operation, chosen)
    return operation, len(tensor.shape)


def free(program: Program, path: str, kind: str, pending: tuple[str, ...] = ()) -> str:
    """The next free node name `path/kind:index`."""
    used = {call.node.name for call in program.calls} | set(pending)
    index = 0
    while f"{path}/{kind}:{index}" in used:
        index += 1
    return f"{path}/{kind}:{index}"


def renamed(call: Call, mapping: Mapping[str, Ref]) -> Call:
    """`call` reading other values."""
    args, kwargs = substituted((call.args, call.kwargs), mapping)
    return replace(call, args=args, kwargs=kwargs, node=replace(call.node, inputs=names((args, kwargs))))


def substituted(structure: Any, mapping: Mapping[str, Any]) -> Any:
    """`structure` with the values that `mapping` names exchanged."""

    def put(leaf: Any) -> Any:
        return mapping.get(leaf.name, leaf) if isinstance(leaf, Ref) else leaf

    return keras.tree.map_structure(put, structure)


def assemble(
    program: Program,
    insert: Callable[[Ref, Tensor], Tensor] | None = None,
    outputs: Callable[[dict[str, Tensor], Any], Any] | None = None,
    more: list[Tensor] | None = None,
) -> Model:
    """A Functional model that runs `program`, with `insert(value, tensor)` in the place of each floating-point value.

    outputs: makes the model's outputs from all tensors by value name and the program's own outputs. more: further inputs,
    that `insert` has made and put there; the model's inputs are then one list.
    """
    given = refs(program.inputs)
    taken: set[str] = set()
    layers = {id(call.operation): call for call in reversed(program.calls)}
    for call in reversed(layers.values()):  # names must be unique in one model; nested models may repeat them
        call.operation.name = unique(safe(call.operation.name), taken)
    entry = [
        keras.Input(batch_shape=ref.shape, dtype=ref.dtype, name=unique(name, taken))
        for ref, name in zip(given, program.input_names, strict=True)
    ]
    tensors: dict[str, Tensor] = {}

    def keep(ref: Ref, tensor: Tensor) -> None:
        tensors[ref.name] = insert(ref, tensor) if insert is not None and ref.is_float else tensor

    for ref, tensor in zip(given, entry, strict=True):
        keep(ref, tensor)
    for call in program.calls:
        args, kwargs = substituted((call.args, call.kwargs), tensors)
        for ref, tensor in zip(refs(call.outputs), keras.tree.flatten(call.operation(*args, **kwargs)), strict=True):
            keep(ref, tensor)
    found = substituted(program.outputs, tensors)
    structure = [*entry, *more] if more else keras.tree.pack_sequence_as(program.inputs, entry)
    return keras.Model(structure, found if outputs is None else outputs(tensors, found), name=program.name)


def safe(name: str) -> str:
    """`name` without the characters that Keras and TensorFlow do not take in names."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)
