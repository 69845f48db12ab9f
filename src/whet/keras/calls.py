"""One call of a Keras layer or operation, as the rules of `whet.keras.dimensions` and `whet.keras.operations` read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import ml_dtypes  # noqa: F401 - gives NumPy the names of the 8- and 16-bit floats
import numpy as np

from whet.graph.ids import IntArray, Value
from whet.graph.structure import Structure
from whet.keras import clone
from whet.keras.sizes import named_weights
from whet.keras.views import kernels, walk

Layer = Any
Count = Callable[[IntArray], int]  # how many of these positions are left
SHAPE = ".shape"  # behind a weight's name: an `Edit` of the shape that a layer's own code gives it


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """An attribute of a layer or operation that holds sizes: what it is worth when `count(ids)` positions are left."""

    path: str
    attribute: str
    value: Callable[[Count], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """A layer of the user's class, called as `layer(*args, **kwargs)` with a KerasTensor for every tensor of `inputs`.

    edits: the sizes that its code gives to its weights and to the layers inside it.
    """

    path: str
    layer: Layer
    args: Any
    kwargs: Any
    inputs: list[Value]
    edits: list[Edit] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Reader:
    """What reading a model gathers: the structure, attributes that hold sizes, and sites whose sizes can be written.

    names: of every weight, by the variable's id. outs: the axis of what a kernel produces, likewise. operations: by path.
    is_traced: the operations outside layers are the code of a subclassed model, in which no size can be written.
    own: the user's layers that were read by what their code does. opened: the one whose code is being read. calls: all of them;
    leaving: the values that a layer graph returns.
    """

    names: dict[int, str]
    outs: dict[int, int]
    is_traced: bool
    structure: Structure = field(default_factory=Structure)
    edits: list[Edit] = field(default_factory=list)
    writable: set[str] = field(default_factory=set)
    operations: dict[str, Any] = field(default_factory=dict)
    own: list[Own] = field(default_factory=list)
    opened: Own | None = None
    calls: list[clone.Call] = field(default_factory=list)
    leaving: set[str] = field(default_factory=set)

    def note(self, edit: Edit) -> None:
        """An attribute holds sizes."""
        if self.opened is None or self.is_traced:
            self.edits.append(edit)
        elif edit.attribute != "input_spec":  # which the layer infers when it is built
            self.opened.edits.append(edit)

    def hold(self, variable: Any) -> Value:
        """The ids of a weight."""
        size = np.dtype(keras.backend.standardize_dtype(variable.dtype)).itemsize
        shape = tuple(int(n) for n in variable.shape)
        name, out = self.names[id(variable)], self.outs.get(id(variable), 0)
        return self.structure.hold(name, shape, itemsize=size, is_parameter=True, out=out % max(len(shape), 1))


def reader_of(model: Any) -> Reader:
    """A reader that knows the weights of `model`."""
    variables = named_weights(model)
    outs = {id(kernel.variable): kernel.out_axis for kernel in kernels(model)}
    outs |= {id(layer.embeddings): 1 for _, layer in walk(model) if isinstance(layer, keras.layers.Embedding)}
    return Reader({id(variable): name for name, variable in variables.items()}, outs, not clone.has_graph(model))


class Call:
    """One call: the operation, the ids of the tensors it reads, the shapes of what it makes."""

    def __init__(self, reader: Reader, call: clone.Call, values: Mapping[str, Value], shapes: list[tuple[int, ...]]) -> None:
        self.reader, self.s = reader, reader.structure
        self.op, self.name, self.path = call.operation, call.node.name, call.node.layer
        self.args, self.kwargs = call.args, call.kwargs
        self.shapes, self._values, self._call = shapes, values, call

    @property
    def inputs(self) -> list[Value]:
        """The ids of every tensor it reads, in order."""
        return [self._values[ref.name] for ref in self._call.inputs]

    @property
    def x(self) -> Value:
        """The ids of the first tensor."""
        return self.inputs[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the (first) result."""
        return self.shapes[0]

    def value(self, leaf: Any) -> Value | None:
        """The ids of an argument: a tensor, a weight, an array; None for plain numbers."""
        if isinstance(leaf, clone.Ref):
            return self._values[leaf.name]
        if isinstance(leaf, keras.Variable):
            return self.reader.hold(leaf) if id(leaf) in self.reader.names else self.s.fresh(leaf.shape, "a constant")
        return self.s.fresh(tuple(leaf.shape), "a constant") if hasattr(leaf, "shape") else None

    def operands(self) -> list[Value]:
        """The ids of every argument that has any."""
        found = (self.value(leaf) for leaf in keras.tree.flatten((self.args, self.kwargs)))
        return [value for value in found if value is not None]

    def weight(self, attribute: str, layer: Layer = None) -> Value | None:
        """The ids of a weight of the layer (or one inside it), None where there is none."""
        variable = getattr(self.op if layer is None else layer, attribute, None)
        return None if variable is None else self.reader.hold(variable)

    def axis(self, given: Any, ndim: int | None = None) -> int:
        """An axis counted from the front."""
        return int(given) % (len(self.x) if ndim is None else ndim)

    def axes(self, given: Any) -> list[int]:
        """Axes counted from the front; all where none are named."""
        if given is None:
            return list(range(len(self.x)))
        return [self.axis(a) for a in (given if isinstance(given, tuple | list) else [given])]

    def edit(self, attribute: str, value: Callable[[Count], Any], path: str | None = None) -> None:
        """An attribute of the operation holds sizes."""
        self.reader.note(Edit(self.path if path is None else path, attribute, value))

    def site(self, attribute: str, value: Callable[[Count], Any]) -> None:
        """The sizes that this call's site speaks of are in an attribute, which can be written unless it is a model's code."""
        own = self.reader.is_traced or self.reader.opened is not None  # the code of a model or layer of the user's
        if isinstance(self.op, keras.Layer) or (not own and self.op._auto_config is not None):
            self.edit(attribute, value)
            self.reader.writable.add(self.name)

    def unknown(self, why: str = "") -> list[Value]:
        """All that it reads, and its own weights, are fixed."""
        what = why or f"{type(self.op).__name__} in {self.path} cannot be followed"
        own = [self.reader.hold(v) for v in getattr(self.op, "weights", ()) if id(v) in self.reader.names]
        for value in [*self.operands(), *own]:
            self.s.fix(value, what)
        return [self.s.fresh(shape, what) for shape in self.shapes]
