"""Blocks of a model: the operations between values that alone carry everything, as between two residual additions."""

from __future__ import annotations

from dataclasses import dataclass

from whet.graph.channels import WEIGHTED
from whet.graph.nodes import Graph, Node


@dataclass(frozen=True, slots=True)
class Block:
    """What lies between two values. nodes: the names of its operations; weights: those that it multiplies with."""

    start: str
    end: str
    nodes: frozenset[str]
    weights: tuple[str, ...]


def blocks(graph: Graph) -> list[Block]:
    """The blocks of a graph in order: the finest cut at values that alone are needed later, each with a weight in it.

    A block ends at the last such value before the next operation with a weight, behind activations and pooling. What lies
    before the first value that alone carries everything is in no block; nor is a weight that several blocks use.
    """
    found: list[Block] = []
    start: str | None = graph.inputs[0] if len(graph.inputs) == 1 else None
    since: list[Node] = []
    last = {value: index for index, node in enumerate(graph.nodes) for value in node.inputs}
    last |= dict.fromkeys(graph.outputs, len(graph.nodes))
    live = {value for value in graph.inputs if value in last}
    for index, node in enumerate(graph.nodes):
        since.append(node)
        live = {value for value in (*live, *node.values) if last.get(value, -1) > index}
        if len(live) != 1 or node.outputs != 1:
            continue
        (end,) = live
        following = graph.nodes[index + 1] if index + 1 < len(graph.nodes) else None
        if end != node.name or (following is not None and following.op not in WEIGHTED and len(following.inputs) == 1):
            continue
        own = tuple(dict.fromkeys(str(n.weight) for n in since if n.op in WEIGHTED and n.weight is not None))
        if start is not None and own:
            found.append(Block(start, end, frozenset(n.name for n in since), own))
        if own or start is None:
            start, since = end, []
    uses: dict[str, int] = {}
    for block in found:
        for weight in block.weights:
            uses[weight] = uses.get(weight, 0) + 1
    return [Block(b.start, b.end, b.nodes, kept) for b in found if (kept := tuple(w for w in b.weights if uses[w] == 1))]
