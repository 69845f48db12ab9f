"""A model as a list of operations in execution order, with canonical names for what they do.

Canonical operations: "conv", "conv_transpose", "linear", "conv3d", "einsum", "embedding", "attention", "lstm",
"gru", "rnn" (these carry weights), "relu", "relu6", "clamp", "add", "mul",
"concat", "max_pool", "avg_pool", "global_avg_pool", "softmax", "sigmoid", "tanh", "reshape", "flatten", "transpose", "slice",
"identity" (dropout in inference), "batch_norm"; anything else bears its own function's name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """One call of one operation.

    name: unique; for torch `module.path/function:index`, for Keras `layer/call:index`. The node's output value has the
    same name (`name#k` for the k-th of several). inputs: the floating-point activation values it reads, in order.
    weight, bias: names of the parameters it reads, None without; more: further weights, of attention and recurrent layers.
    layer: the layer that users name in keep and include; kinds: `module:name` of its class and of those it derives from.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    layer: str
    weight: str | None = None
    bias: str | None = None
    outputs: int = 1
    kinds: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of all its weights."""
        return (() if self.weight is None else (self.weight,)) + self.more

    @property
    def values(self) -> tuple[str, ...]:
        """The names of the values it produces."""
        return (self.name,) if self.outputs == 1 else tuple(f"{self.name}#{i}" for i in range(self.outputs))


def kinds_of(layer: object) -> tuple[str, ...]:
    """`module:name` of the class of `layer` and of its base classes, as users may name them in keep and include."""
    return tuple(kind_name(cls) for cls in type(layer).__mro__[:-1])


def kind_name(cls: type) -> str:
    """`module:name` of a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


@dataclass(frozen=True, slots=True)
class Graph:
    """Operations in execution order. inputs: value names `input:0`, `input:1`, …; outputs: the values returned."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def consumers(self) -> dict[str, list[Node]]:
        """For every value, the nodes that read it."""
        readers: dict[str, list[Node]] = {value: [] for value in self.inputs}
        for node in self.nodes:
            for value in node.values:
                readers.setdefault(value, [])
            for value in node.inputs:
                readers.setdefault(value, []).append(node)
        return readers
