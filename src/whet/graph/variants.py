"""Parts of a plan: what is quantized when one layer alone is, and the running model that computes any such part."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from whet.graph.nodes import Graph
from whet.graph.placement import Plan


@dataclass(frozen=True, slots=True)
class Part:
    """One layer of a plan. weights: the names of its weights that change; values: what its calls read in integers; calls:
    those that round what they read at run time. kinds: the layer's classes."""

    layer: str
    weights: tuple[str, ...]
    values: tuple[str, ...]
    calls: tuple[str, ...]
    kinds: tuple[str, ...] = ()


class Variants(Protocol):
    """A copy of a model, batch norms folded, that computes what any part of one plan says, without being built again."""

    graph: Graph

    def use(self, plan: Plan) -> None:
        """Compute as `plan` says from now on: a part of the one that this was made for, see `restricted`."""

    def predict(self, inputs: Any) -> Any:
        """Outputs as NumPy arrays, as the side's own `predict`."""


def parts_of(graph: Graph, plan: Plan, changed: Iterable[str]) -> list[Part]:
    """The layers of `plan` in the order in which they run. `changed`: the names of all weights that it changes.

    A weight of several layers belongs to the first that reads it, with the values that all of them read.
    """
    wanted, owner = set(changed), dict[str, str]()
    rows: dict[str, dict[str, dict[str, None]]] = {}
    kinds: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        own = [name for name in node.weights if name in wanted]
        for name in own:
            layer = owner.setdefault(name, node.layer)
            kinds.setdefault(layer, node.kinds)
            row = rows.setdefault(layer, {"weights": {}, "values": {}, "calls": {}})
            row["weights"][name] = None
            row["values"] |= {value: None for value in node.inputs if value in plan.values}
            row["calls"] |= {node.name: None} if node.name in plan.dynamic else {}
    return [
        Part(layer, tuple(row["weights"]), tuple(row["values"]), tuple(row["calls"]), kinds[layer])
        for layer, row in rows.items()
    ]


def restricted(plan: Plan, parts: Iterable[Part], changed: Collection[str]) -> Plan:
    """What `plan` says of `parts` alone; the rest is float. A bias is an integer where its weight and its input are.

    changed: the names of all weights that the plan changes; tensors of other names (equalized ones) stay as they are. Rounded
    values that stand among the tensors of an equalized plan stay too: their float values are not known.
    """
    taken = list(parts)
    weights = {name for part in taken for name in part.weights}
    values = {name for part in taken for name in part.values}
    calls = {name for part in taken for name in part.calls}
    rounded = {name for name in changed if name not in plan.weights and plan.spec.equalize is None}
    return replace(
        plan,
        weights={name: params for name, params in plan.weights.items() if name in weights},
        values={name: params for name, params in plan.values.items() if name in values},
        biases={name: pair for name, pair in plan.biases.items() if pair[0] in values and pair[1] in weights},
        casts={name: dtype for name, dtype in plan.casts.items() if name in weights},
        dynamic={name: spec for name, spec in plan.dynamic.items() if name in calls},
        tensors={name: array for name, array in plan.tensors.items() if name not in rounded or name in weights},
    )
