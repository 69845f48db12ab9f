"""Residual blocks in a graph: what a shortcut leads around, and can therefore leave.

`y = x + f(x)` without its block is `y = x`. A shortcut is a path from `x` to `y` of additions, and of operations on one value
that keep its shape (activations, norms, dropout); at every addition the other operand must be worked out of `x`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from whet.graph.groups import Size
from whet.graph.views import Masks

ADD, PASS, OTHER = "add", "pass", "other"


@dataclass(frozen=True, slots=True)
class Flow:
    """One operation. name: of the value it makes; reads: the values it reads, without constants and weights.

    role: `ADD` for an addition of values of its own shape, `PASS` for an operation that keeps a value's shape and
    mixes nothing into it, else `OTHER`. shape: of what it makes.
    """

    name: str
    reads: tuple[str, ...]
    role: str
    shape: tuple[int | None, ...]


def shortcut(flows: Sequence[Flow], source: str, target: str) -> tuple[str, ...]:
    """The additions on the shortcut from `source` to `target` in execution order; empty where none leads there."""
    depends, parents = {source}, {source: ""}  # worked out of the source; on a shortcut, and what comes before
    added: set[str] = set()
    for flow in flows:
        if not depends.isdisjoint(flow.reads):
            depends.add(flow.name)
        if flow.role == OTHER:
            continue
        on = [read for read in flow.reads if read in parents]
        if len(flow.reads) == 1 and on:
            parents[flow.name] = on[0]
        elif flow.role == ADD and len(flow.reads) == 2 and len(on) == 1 and depends.issuperset(flow.reads):
            parents[flow.name] = on[0]
            added.add(flow.name)
    if target not in parents:
        return ()
    path = [target]
    while parents[path[-1]]:
        path.append(parents[path[-1]])
    return tuple(name for name in reversed(path) if name in added)


@dataclass(frozen=True, slots=True)
class Branch:
    """What one addition adds to its shortcut. end: the addition; start: the value that it would be without the branch.

    flows: the names of the branch's operations, which nothing else reads, in execution order.
    """

    end: str
    start: str
    flows: tuple[str, ...]


def branches(flows: Sequence[Flow], outputs: Sequence[str]) -> tuple[list[Branch], list[tuple[str, str]]]:
    """The branches of a graph's additions that can leave, in order, and (addition, reason) of the others."""
    made = {flow.name: flow for flow in flows}
    readers: dict[str, set[str]] = {}
    for flow in flows:
        for read in flow.reads:
            readers.setdefault(read, set()).add(flow.name)
    for name in outputs:
        readers.setdefault(name, set()).add("")
    found, refused = [], []
    for flow in flows:
        if flow.role != ADD or len(flow.reads) != 2:
            continue
        above = [_ancestors(made, read) for read in flow.reads]
        reason = None
        for start, end, inside in ((0, 1, above[1] - above[0]), (1, 0, above[0] - above[1])):
            if flow.reads[start] in above[end] and flow.reads[end] in inside:
                region = tuple(other.name for other in flows if other.name in inside - {flow.reads[start]})
                used = next((n for n in region if not readers.get(n, set()) <= {*region, flow.name}), None)
                if used is None:
                    found.append(Branch(flow.name, flow.reads[start], region))
                else:
                    reason = f"{used} in its branch is read elsewhere too"
                break
        else:
            reason = "its shortcut computes (neither operand is worked out of the other)"
        if reason is not None:
            refused.append((flow.name, reason))
    return found, refused


def _ancestors(made: Mapping[str, Flow], name: str) -> set[str]:
    """Everything that a value is worked out of, and itself."""
    seen, pending = {name}, [name]
    while pending:
        flow = made.get(pending.pop())
        for read in flow.reads if flow is not None else ():
            if read not in seen:
                seen.add(read)
                pending.append(read)
    return seen


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a model that can leave.

    layers: the layers in it, by which keep and include name it too. macs: of one example; parameters and bytes: of what no
    other part holds.
    """

    name: str
    layers: tuple[str, ...]
    macs: int
    parameters: int
    bytes: int


class Blocks(Protocol):
    """The blocks of a model that Whet owns, in the order in which they run. skipped: (name, reason) of what looks like one."""

    blocks: tuple[Block, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a pattern may mean."""

    def size(self) -> Size:
        """What the whole model costs."""

    def without(self, names: Sequence[str], inputs: Any) -> Any:
        """The model's outputs on a batch, each of these blocks replaced by its shortcut, as NumPy arrays in their structure."""

    def influence(self, inputs: Any) -> dict[str, tuple[float, int]]:
        """For every block `numerics.layers.influence` on a batch."""

    def remove(self, names: Sequence[str], masks: Masks, optimizer: Any = None) -> tuple[Any, Masks]:
        """*In place* where it can be: the model without these blocks, checked, and the masks of what is left."""
