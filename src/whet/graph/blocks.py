"""Blocks of a model: the operations between values that alone carry everything, as between two residual additions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from whet.graph.channels import WEIGHTED
from whet.graph.nodes import Graph, Node
from whet.graph.placement import Plan
from whet.numerics.affine import QParams
from whet.progress import task

BATCH = 32  # examples of a step of learning
CACHE_BYTES = 1 << 28  # of a block's inputs and outputs, each: fewer examples where they are larger


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


Learn = Callable[[Plan, Block, list[str]], tuple[Plan, float, float] | None]


def learn_blocks(plan: Plan, graph: Graph, learn: Learn, *, progress: bool) -> tuple[Plan, dict[str, dict[str, Any]]]:
    """`plan` with the codes of every block learned, where that lowers the block's error, and what the report's rows get.

    learn: of a plan, a block and its weights whose codes can be learned, the plan with these learned, and the block's output
    ratio of signal to error before and after, in dB; None where the block has no data to learn from. Rows get "block_db":
    (before, after). Weights that are no symmetric integers keep their codes.
    """
    rows: dict[str, dict[str, Any]] = {}
    every = blocks(graph)
    with task("Reconstructing", len(every), enabled=progress) as bar:
        for block in every:
            names = [name for name in block.weights if _has_codes_to_learn(plan, name)]
            learned = learn(plan, block, names) if names else None
            if learned is not None:
                plan, before, after = learned
                rows |= {name: {"block_db": (before, after)} for name in names}
            bar.advance(note=block.end)
    return plan, rows


def _has_codes_to_learn(plan: Plan, name: str) -> bool:
    params = plan.weights.get(name)
    return isinstance(params, QParams) and params.spec.symmetric
