"""Placement: which values a target quantizes, and which of them share one scale.

A quantizer sits where a value is produced, so that every reader sees the same codes, as the runtimes store them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from whet.graph.nodes import Graph, Node
from whet.numerics.affine import QParams
from whet.specs.quantization import Quantize
from whet.specs.target import Target


@dataclass(frozen=True, slots=True)
class Placement:
    """values: value name -> group; the values of one group share one scale and zero point. fixed: group -> (scale, zero
    point) given by the target. weights: weight name -> the node whose weight is quantized (its first reader). nodes: the
    names of the nodes that compute in integers. skipped: (layer, reason) for what stays float."""

    values: dict[str, str]
    fixed: dict[str, tuple[float, int]]
    weights: dict[str, Node]
    nodes: frozenset[str]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A solved quantization: the quantizer of every weight (by parameter name) and of every value (by value name).

    biases: bias name -> (value name of the node's input, weight name): stored as int32 at the product of their scales.
    folds: (batch-norm layer, convolution layer) pairs folded before the weights were solved.
    """

    spec: Quantize
    target: str
    weights: dict[str, QParams]
    values: dict[str, QParams]
    biases: dict[str, tuple[str, str]]
    folds: tuple[tuple[str, str], ...] = ()


def selected(layer: str, keep: tuple[str, ...], include: tuple[str, ...] | None) -> str | None:
    """None if `layer` is chosen, else the reason why not. Patterns are `fnmatch` patterns; a name also covers its children."""
    if include is not None and not any(matches(layer, pattern) for pattern in include):
        return "not in include"
    return "in keep" if any(matches(layer, pattern) for pattern in keep) else None


def matches(layer: str, pattern: str) -> bool:
    """Whether `pattern` names `layer` or one of the modules around it."""
    return fnmatchcase(layer, pattern) or layer.startswith((pattern + ".", pattern + "/"))


def unmatched(layers: list[str], patterns: tuple[str, ...]) -> list[str]:
    """The patterns that match none of `layers`."""
    return [pattern for pattern in patterns if not any(matches(layer, pattern) for layer in layers)]


def place(graph: Graph, target: Target, spec: Quantize) -> Placement:
    """Where quantizers go.

    1. Operations with weights in `target.compute` are chosen unless kept by name. Their weights are quantized.
    2. Without activations in the spec, that is all.
    3. The inputs of the chosen operations, and the end of the chain of fused activations behind them, are quantized.
    4. An operation in `target.quantized` whose inputs all are quantized (or can be) is chosen too.
    5. An operation in `target.shared` passes its input's group on to its output; `target.joined` unites all.
    """
    readers = graph.consumers()
    producer = {value: node for node in graph.nodes for value in node.values}
    skipped: list[tuple[str, str]] = []
    weights: dict[str, Node] = {}
    chosen: set[str] = set()
    for node in graph.nodes:
        reason = selected(node.layer, spec.keep, spec.include)
        if node.op in target.compute and node.weight is not None:
            if reason is None:
                chosen.add(node.name)
                weights.setdefault(node.weight, node)
            else:
                skipped.append((node.layer, reason))
        elif node.op in target.quantized and reason is None:
            chosen.add(node.name)
        elif node.weight is not None:
            skipped.append((node.layer, f"operation {node.op!r} is not quantized on {target.name}"))
    if spec.activations is None:
        return Placement({}, {}, weights, frozenset(), tuple(skipped))

    chosen = _reachable(graph, target, chosen, producer, weights)
    ends = {node.name: _end(node, target, readers, graph) for node in graph.nodes if node.name in chosen}
    wanted = {value for node in graph.nodes if node.name in chosen for value in node.inputs}
    wanted |= {value for values in ends.values() for value in values}
    moves = [n for n in graph.nodes if n.op in target.shared and len(n.inputs) == 1 and n.outputs == 1]
    while True:  # values move through integers when either side is quantized: then both are
        grown = wanted | {v for n in moves if n.name in wanted or n.inputs[0] in wanted for v in (n.name, n.inputs[0])}
        if grown == wanted:
            break
        wanted = grown

    parent = {value: value for value in wanted}

    def find(value: str) -> str:
        while parent[value] != value:
            value = parent[value]
        return value

    for node in moves:
        if node.name in wanted:
            parent[find(node.name)] = find(node.inputs[0])
    for node in graph.nodes:
        if node.op in target.joined and node.name in chosen:
            for value in (*node.inputs, *ends[node.name]):
                parent[find(value)] = find(node.inputs[0])
    fixed: dict[str, tuple[float, int]] = {}
    for node in graph.nodes:
        if node.op in target.fixed and node.name in chosen:
            for value in ends[node.name]:
                fixed[find(value)] = target.fixed[node.op]
    values = {value: find(value) for value in sorted(wanted)}
    return Placement(values, fixed, weights, frozenset(chosen), tuple(skipped))


def _reachable(graph: Graph, target: Target, chosen: set[str], producer: dict[str, Node], weights: dict[str, Node]) -> set[str]:
    """`chosen` without the weightless operations none of whose inputs comes, through moves, from an integer operation."""

    def integer(value: str) -> bool:
        node = producer.get(value)
        while node is not None and node.op in (target.shared | target.fused) and node.inputs:
            value = node.inputs[0]
            node = producer.get(value)
        return node is not None and node.name in kept

    kept: set[str] = set()
    for node in graph.nodes:
        if node.name in chosen and (node.weight in weights or any(integer(value) for value in node.inputs)):
            kept.add(node.name)
    return kept


def _end(node: Node, target: Target, readers: dict[str, list[Node]], graph: Graph) -> tuple[str, ...]:
    """The values where `node`'s integer output appears: behind the fused activation, if that alone reads it."""
    if node.outputs != 1:
        return node.values
    value = node.name
    while value not in graph.outputs:
        following = readers[value]
        if len(following) != 1 or following[0].op not in target.fused:
            break
        value = following[0].name
    return (value,)
