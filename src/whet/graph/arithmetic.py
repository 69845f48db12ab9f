"""Which arithmetic of the target's integer kernels makes a value; both sides simulate by it.

What an operation with weights, or a product of two, makes is an accumulator times its step; a sum of two is what the target's
`sum_bits` say. Everything else is computed in float, and rounded by its quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from whet.graph.nodes import Graph, Node
from whet.graph.placement import Plan
from whet.numerics.affine import QParams
from whet.numerics.integers import SumMultipliers, requantization_factor, sum_multipliers
from whet.specs.target import TARGETS

MOST = 8  # bits of activations whose sums are exact in float32


@dataclass(frozen=True, slots=True, eq=False)
class Accumulator:
    """A value that is a whole number of `step`s, of which `factor` makes codes: float32, () or (channels,)."""

    node: Node
    step: npt.NDArray[np.float32]
    factor: npt.NDArray[np.float32]
    scale: float


@dataclass(frozen=True, slots=True)
class Sum:
    """A value that is the sum of two quantized ones, of scales `left` and `right`."""

    node: Node
    left: float
    right: float
    multipliers: SumMultipliers
    scale: float


def arithmetic(graph: Graph, plan: Plan) -> Mapping[str, Accumulator | Sum]:
    """The rule of every operation that has one, by the name of its value.

    Its codes are those of the quantizer behind it, activations between the two passed over: these clip, and codes stay codes.
    """
    target = TARGETS.get(plan.target)
    if target is None or not plan.values:
        return {}
    producer = {value: node for node in graph.nodes for value in node.values}
    found: dict[str, Accumulator | Sum] = {}
    for value, params in plan.values.items():
        node = producer.get(value)
        while node is not None and node.op in target.fused and len(node.inputs) == 1 and node.inputs[0] not in plan.values:
            node = producer.get(node.inputs[0])
        if node is None or node.outputs != 1:
            continue
        if node.op == "add":
            rule: Accumulator | Sum | None = _sum(node, plan, params, target.sum_bits)
        else:
            rule = _accumulator(node, plan, params) if target.requantizes else None
        if rule is not None:
            found[node.name] = rule
    return found


def _accumulator(node: Node, plan: Plan, params: QParams) -> Accumulator | None:
    """The rule behind an operation with integer weights (and bias, if it has one), or a product of two."""
    sources = [plan.values[name] for name in node.inputs if name in plan.values]
    if node.op == "mul" and len(sources) == len(node.inputs) == 2:
        step = np.asarray(sources[0].scale * sources[1].scale, np.float32)
    elif node.weight in plan.weights and sources and (node.bias is None or node.bias in plan.biases):
        weight = plan.weights[str(node.weight)]
        if not isinstance(weight, QParams) or weight.group is not None or not weight.spec.symmetric:
            return None
        step = np.asarray(sources[0].scale * weight.scale, np.float32)
    else:
        return None
    factor = requantization_factor(step, params.scale)
    return None if factor is None else Accumulator(node, step, factor, float(params.scale))


def _sum(node: Node, plan: Plan, params: QParams, bits: int | None) -> Sum | None:
    """The rule of a sum of two values with quantizers."""
    inputs = [plan.values.get(name) for name in node.inputs]
    if bits is None or len(inputs) != 2:
        return None
    left, right = inputs
    if left is None or right is None or max(left.spec.bits, right.spec.bits) > MOST:
        return None
    multipliers = sum_multipliers(float(left.scale), float(right.scale), float(params.scale), bits)
    if multipliers is None:
        return None
    return Sum(node, float(left.scale), float(right.scale), multipliers, float(params.scale))
