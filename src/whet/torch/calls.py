"""One operation of a torch.export graph, as the rules of `whet.torch.dimensions` read it."""

from __future__ import annotations

from typing import Any

import torch

from whet.graph.ids import Value
from whet.graph.structure import Structure


class Call:
    """One operation being read: its arguments by name, the ids of its tensors, the shape of its result."""

    def __init__(self, structure: Structure, node: Any, values: dict[Any, Any], constants: set[Any], layer: str) -> None:
        self.s, self.node, self.layer = structure, node, layer
        self._values, self._constants = values, constants
        schema = node.target._schema
        self.op = schema.name.split("::")[-1]
        self.arguments: dict[str, Any] = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        self.arguments.update({a.name: value for a, value in zip(schema.arguments, node.args, strict=False)})
        self.arguments.update(node.kwargs)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def value(self, name: str) -> Value:
        """The ids of a tensor argument.

        Raises:
            KeyError: there is no such tensor.
        """
        found: Value = self._values[self.arguments[name]]
        return found

    def maybe(self, name: str) -> Value | None:
        """The ids of an optional tensor argument."""
        node = self.arguments.get(name)
        return None if node is None else self._values[node]

    def is_weight(self, name: str) -> bool:
        """Whether this argument is worked out of parameters alone."""
        return self.arguments.get(name) in self._constants

    def tensors(self) -> list[Value]:
        """The ids of every tensor it reads."""
        return [v for node in self.node.all_input_nodes for v in flat(self._values[node])]

    def listed(self, name: str) -> list[Value]:
        """The ids of a list of tensors."""
        return [self._values[node] for node in self.arguments[name]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the (first) result."""
        return shapes(self.node)[0]

    def dim(self, name: str = "dim", ndim: int | None = None) -> int:
        """An axis argument, counted from the front."""
        n = len(self.value("self")) if ndim is None else ndim
        return int(self.arguments[name]) % max(n, 1)

    def dims(self, name: str = "dim") -> list[int]:
        """Axes, all of them where none are named."""
        n = len(self.value("self"))
        given = self.arguments.get(name)
        listed = [given] if isinstance(given, int) else given
        return [int(d) % max(n, 1) for d in listed] if listed else list(range(n))


def flat(value: Any) -> list[Value]:
    """A value, or the values in a list of lists, in order."""
    return [v for part in value for v in flat(part)] if isinstance(value, list) else [value]


def shapes(node: Any) -> list[tuple[int, ...]]:
    """The sizes of every tensor that `node` results in; () for what is no tensor."""
    found = node.meta.get("val")
    parts = found if isinstance(found, list | tuple) else [found]
    return [tuple(_size(n) for n in p.shape) if isinstance(p, torch.Tensor) else () for p in parts]


def _size(n: Any) -> int:
    """A size; of a dynamic one, that of the example."""
    return int(n.node.hint) if isinstance(n, torch.SymInt) else int(n)
