"""Placement: which values a target quantizes, and which of them share one scale.

A quantizer sits where a value is produced, so that every reader sees the same codes, as the runtimes store them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from whet.errors import TargetError
from whet.graph.nodes import Graph, Node, kind_name
from whet.numerics.affine import QParams
from whet.numerics.codebook import Codebook
from whet.specs.quantization import Quantize
from whet.specs.schemes import Dynamic, Int
from whet.specs.target import WEIGHTED, Target

_OWN_DYNAMIC = {"openvino": " on request of a file: it does so itself where weights are stored in integers"}
SEVERAL = frozenset({"add", "mul", "concat"})  # with one activation among their operands, the others are constants


@dataclass(frozen=True, slots=True)
class Placement:
    """values: value name -> group; the values of one group share one scale and zero point. fixed: group -> (scale, zero
    point) given by the target. weights: weight name -> the node whose weight is quantized (its first reader). nodes: the
    names of the nodes that compute in integers. skipped: (layer, reason) for what stays float. clipped: values whose own
    range does not count, since an activation behind them cuts it. dynamic: the nodes that quantize what they read at run
    time."""

    values: dict[str, str]
    fixed: dict[str, tuple[float, int]]
    weights: dict[str, Node]
    nodes: frozenset[str]
    skipped: tuple[tuple[str, str], ...]
    clipped: frozenset[str] = frozenset()
    dynamic: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A solved quantization: the quantizer of every weight (by parameter name) and of every value (by value name).

    biases: bias name -> (value name of the node's input, weight name): stored as int32 at the product of their scales.
    folds: (batch-norm layer, convolution layer) pairs folded before the weights were solved. casts: weight name -> the
    16-bit float dtype it is stored in. dynamic: node name -> how its input is quantized at run time. tensors: parameter name ->
    float32 values that take the place of the (folded) model's own: equalized weights, corrected biases. codes: weight name
    -> its codes, where they are not the nearest.
    """

    spec: Quantize
    target: str
    weights: dict[str, QParams | Codebook]
    values: dict[str, QParams]
    biases: dict[str, tuple[str, str]]
    folds: tuple[tuple[str, str], ...] = ()
    casts: dict[str, str] = field(default_factory=dict)
    dynamic: dict[str, Dynamic] = field(default_factory=dict)
    tensors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    codes: dict[str, npt.NDArray[np.int32]] = field(default_factory=dict)

    def encode(self, name: str, array: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """The codes of the weight `name`, whose float values are `array`."""
        return self.codes[name] if name in self.codes else self.weights[name].encode(array)

    def rounded(self, name: str, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """What is left of the weight `name` when it is stored."""
        return self.weights[name].decode(self.encode(name, array))


Pattern = str | type


def selected(
    layer: str, keep: Sequence[Pattern], include: Sequence[Pattern] | None, *more: str, kinds: Sequence[str] = ()
) -> str | None:
    """None if `layer` is chosen, else the reason why not; `more` are further names that it has, `kinds` its classes.

    Patterns are `fnmatch` patterns, where a name also covers its children, or classes of layers.
    """
    names = (layer, *more)
    if include is not None and not any(matches(name, pattern, kinds) for name in names for pattern in include):
        return "not in include"
    return "in keep" if any(matches(name, pattern, kinds) for name in names for pattern in keep) else None


def matches(layer: str, pattern: Pattern, kinds: Sequence[str] = ()) -> bool:
    """Whether `pattern` names `layer`, one of the modules around it, or one of its classes."""
    if isinstance(pattern, type):
        return kind_name(pattern) in kinds
    return fnmatchcase(layer, pattern) or layer.startswith((pattern + ".", pattern + "/"))


def unmatched(layers: Mapping[str, Sequence[str]], patterns: Sequence[Pattern]) -> list[str]:
    """The patterns that match none of `layers` (name -> classes), as text."""
    missed = [p for p in patterns if not any(matches(layer, p, kinds) for layer, kinds in layers.items())]
    return [pattern if isinstance(pattern, str) else pattern.__qualname__ for pattern in missed]


def rules_for(target: Target, spec: Quantize) -> Target:
    """With symmetric activations a ReLU is no part of the rounding (half of the codes lie below zero): it stands alone."""
    symmetric = isinstance(spec.activations, Int) and spec.activations.symmetric
    return replace(target, fused=frozenset()) if symmetric and not target.signed_activations else target


def place(graph: Graph, target: Target, spec: Quantize) -> Placement:
    """Where quantizers go.

    1. Operations with weights in `target.compute` are chosen unless kept by name. Their weights are quantized.
    2. Without calibrated activations in the spec, all weights in `WEIGHTED` operations are quantized, and that is all. With
       `Dynamic`, operations in `target.dynamic` quantize what they read.
    3. The inputs of the chosen operations, and the end of the chain of fused activations behind them, are quantized.
    4. An operation in `target.quantized` is chosen too if an integer operation feeds it; of its operands none is a constant,
       and none is a value that a layer which stays float reads or gives.
    5. An operation in `target.shared` passes its input's group on to its output; `target.joined` unites all. The calls of
       one layer share the range of their inputs if it has a bias, which is stored once, at the input's scale.
    6. An activation behind such moves (convolution, max pooling, relu) belongs to their group, which has its range.
    7. Where a fixed scale would be forced on other values (a softmax joined with logits), that operation stays float.
    """
    refused: dict[str, str] = {}  # node name -> reason
    while True:
        placement, conflicts = _attempt(graph, target, spec, refused)
        if not conflicts:
            return placement
        refused |= conflicts


def _attempt(graph: Graph, target: Target, spec: Quantize, refused: dict[str, str]) -> tuple[Placement, dict[str, str]]:
    """A placement without the `refused` nodes, and the nodes in it (with the reason) that cannot be placed so."""
    chosen, weights, skipped = _choose(graph, target, spec, refused)
    if not isinstance(spec.activations, Int):
        return Placement({}, {}, weights, frozenset(), skipped, dynamic=_dynamic(graph, target, spec, chosen)), {}
    readers = graph.consumers()
    ends = {node.name: _end(node, target, readers, graph) for node in graph.nodes if node.name in chosen}
    moves = [n for n in graph.nodes if n.op in target.shared and len(n.inputs) == 1 and n.outputs == 1]
    behind = _behind_moves(graph, target, readers, [n for n in graph.nodes if n.name in chosen], ends)
    wanted = {value for node in graph.nodes if node.name in chosen for value in (*node.inputs, *ends[node.name])} | set(behind)
    while True:  # values move through integers when either side is quantized: then both are
        grown = wanted | {v for n in moves if n.name in wanted or n.inputs[0] in wanted for v in (n.name, n.inputs[0])}
        if grown == wanted:
            break
        wanted = grown

    groups = _Groups(wanted)
    for node in moves:
        if node.name in wanted:
            groups.unite([node.inputs[0], node.name])
    for value, chain in behind.items():
        groups.unite([*chain, value])
    for node in graph.nodes:
        if node.op in target.fixed and node.name in chosen:
            for value in ends[node.name]:
                groups.fixed[groups.find(value)] = target.fixed[node.op]
    conflicts: dict[str, str] = {}
    for node, values, results in _joined(graph, target, chosen, ends):
        if not groups.unite(values, results):
            conflicts[node.name] = f"on {target.name} it would force a fixed scale on other values"
    clipped = frozenset(value for chain in behind.values() for value in chain)
    names = {value: groups.find(value) for value in sorted(wanted)}
    return Placement(names, groups.fixed, weights, frozenset(chosen), skipped, clipped), conflicts


class _Groups:
    """Values that share one scale: a union-find that keeps fixed scales from spreading."""

    def __init__(self, values: set[str]) -> None:
        self._parent = {value: value for value in values}
        self.fixed: dict[str, tuple[float, int]] = {}  # group -> (scale, zero point)

    def find(self, value: str) -> str:
        """The group of `value`."""
        while self._parent[value] != value:
            value = self._parent[value]
        return value

    def unite(self, values: Sequence[str], results: Sequence[str] = ()) -> bool:
        """Put `values`, and the `results` made of them, into one group.

        False, and nothing is done, if some have a fixed scale that others do not; results have what their values have.
        """
        roots = list(dict.fromkeys(self.find(value) for value in (*values, *results)))
        rules = {self.fixed.get(self.find(value)) for value in values}
        if len(rules | {self.fixed[self.find(r)] for r in results if self.find(r) in self.fixed}) > 1:
            return False
        for root in roots[1:]:  # roots[0] is of a value, so that it bears the rule if there is one
            self._parent[root] = roots[0]
            self.fixed.pop(root, None)
        return True


def _choose(
    graph: Graph, target: Target, spec: Quantize, refused: dict[str, str]
) -> tuple[set[str], dict[str, Node], tuple[tuple[str, str], ...]]:
    """The names of the nodes that compute in integers, the weights they store, and what stays float and why."""
    skipped: dict[tuple[str, str], None] = {}  # a layer that is called twice is listed once
    weights: dict[str, Node] = {}
    chosen: set[str] = set()
    weighted = target.compute if isinstance(spec.activations, Int) or not target.compute else WEIGHTED
    for node in graph.nodes:
        reason = selected(node.layer, spec.keep, spec.include, kinds=node.kinds)
        reason = refused.get(node.name) if reason is None else reason
        if node.op in weighted:
            if reason is None and node.weight is None:
                reason = "its weight is computed, not stored"
            if reason is None and node.weight is not None:
                chosen.add(node.name)
                weights.update((name, node) for name in node.weights if name not in weights)
            elif reason is not None:
                skipped[node.layer, reason] = None
        elif node.op in target.quantized and reason is None:
            if node.op not in SEVERAL or len(node.inputs) > 1:
                chosen.add(node.name)
        elif node.weight is not None:
            skipped[node.layer, reason or f"operation {node.op!r} is not quantized on {target.name}"] = None
        elif node.name in refused:
            skipped[node.layer, refused[node.name]] = None
    producer = {value: node for node in graph.nodes for value in node.values}
    return _reachable(graph, target, chosen, producer, weights), weights, tuple(skipped)


def _dynamic(graph: Graph, target: Target, spec: Quantize, chosen: set[str]) -> tuple[Node, ...]:
    """The chosen nodes whose input is quantized at run time.

    Raises:
        TargetError: the target has no such kernels.
    """
    if not isinstance(spec.activations, Dynamic):
        return ()
    if not target.dynamic:
        raise TargetError(
            f"{target.name} has no kernels that quantize activations at run time{_OWN_DYNAMIC.get(target.runtime, '')}. "
            "Quantize(…, activations=None) stores weights alone, Int(8, …) activations need calibration data; "
            "onnxruntime has such kernels."
        )
    return tuple(node for node in graph.nodes if node.name in chosen and node.op in target.dynamic)


def _joined(
    graph: Graph, target: Target, chosen: set[str], ends: dict[str, tuple[str, ...]]
) -> list[tuple[Node, tuple[str, ...], tuple[str, ...]]]:
    """The chosen nodes that tie values together, the values they tie, and their own results tied to these."""
    tied: list[tuple[Node, tuple[str, ...], tuple[str, ...]]] = []
    first: dict[str, str] = {}
    for node in graph.nodes:
        if node.name not in chosen:
            continue
        if node.op in target.joined:
            tied.append((node, node.inputs, ends[node.name]))
        if node.bias is not None and node.inputs:
            tied.append((node, (first.setdefault(node.bias, node.inputs[0]), node.inputs[0]), ()))
    return tied


def _reachable(graph: Graph, target: Target, chosen: set[str], producer: dict[str, Node], weights: dict[str, Node]) -> set[str]:
    """`chosen` without the weightless operations none of whose inputs comes, through moves, from an integer operation, and
    without those that give to, read from or read beside a layer that stays float: codes there would round what it reads."""

    def origin(value: str) -> str:
        node = producer.get(value)
        while node is not None and node.op in (target.shared | target.fused) and node.inputs:
            value = node.inputs[0]
            node = producer.get(value)
        return value

    def integer(value: str) -> bool:
        node = producer.get(origin(value))
        return node is not None and node.name in kept

    floats = [node for node in graph.nodes if node.op in target.compute and node.name not in chosen]
    untouched = {origin(value) for node in floats for value in (*node.inputs[:1], *node.values)}
    kept: set[str] = set()
    for node in graph.nodes:
        beside = any(origin(value) in untouched for value in (*node.inputs, *node.values))
        fed = any(integer(value) for value in node.inputs) and not beside
        if node.name in chosen and (node.weight in weights or fed):
            kept.add(node.name)
    return kept


def _end(node: Node, target: Target, readers: dict[str, list[Node]], graph: Graph) -> tuple[str, ...]:
    """The values where `node`'s integer output appears: behind the fused activation, if that alone reads it."""
    if node.outputs != 1 or node.op in target.fixed:
        return node.values
    value = node.name
    while (reader := _only_reader(value, readers, graph)) is not None and reader.op in target.fused:
        value = reader.name
    return (value,)


def _behind_moves(
    graph: Graph, target: Target, readers: dict[str, list[Node]], nodes: list[Node], ends: dict[str, tuple[str, ...]]
) -> dict[str, list[str]]:
    """Activations behind moves that alone read each other, and the values between: `relu(max_pool(conv(x)))`.

    Clamping commutes with moves and with max pooling, so the values between may be cut to the activation's range, which
    then costs no operation and no resolution.
    """
    found: dict[str, list[str]] = {}
    for node in nodes:
        if len(ends[node.name]) != 1 or node.op in target.fixed:
            continue
        chain = [ends[node.name][0]]
        while (reader := _only_reader(chain[-1], readers, graph)) is not None:
            if reader.op in target.fused and len(chain) > 1:
                found[reader.name] = chain
                break
            if reader.op not in target.shared or len(reader.inputs) != 1 or reader.outputs != 1:
                break
            chain.append(reader.name)
    return found


def _only_reader(value: str, readers: dict[str, list[Node]], graph: Graph) -> Node | None:
    """The node that alone reads `value`; None if several do or the caller sees it."""
    following = readers.get(value, [])
    return following[0] if len(following) == 1 and value not in graph.outputs else None
