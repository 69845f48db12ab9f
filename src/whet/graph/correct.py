"""Bias correction without data: what rounding shifts the outputs by, from the batch norms that make the inputs.

A folded batch norm says that a channel has mean β and deviation |γ|. Taken for normal, this gives the mean behind an
activation, and so `Δb = (W − Ŵ) E[x]` for the next layer (Nagel et al. 2019, arXiv:1906.04721, §4.2 and appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.graph.channels import PASSING, WEIGHTED, alone, has_own_outputs, input_owner
from whet.graph.nodes import Graph, Node
from whet.graph.refine import Runner
from whet.graph.solve import Solved
from whet.graph.views import WeightView
from whet.numerics.affine import QParams, fit_scale_to_bias
from whet.numerics.equalization import clipped_normal

Float64s = npt.NDArray[np.float64]
Normal = tuple[Float64s, Float64s]  # mean and variance, (channels,)
_CLIPPED = {"relu": math.inf, "relu6": 6.0}


def correct_analytically(
    solved: Solved,
    graph: Graph,
    weights: Mapping[str, WeightView],
    biases: Mapping[str, npt.NDArray[np.float32]],
    runner: Runner,
) -> Solved:
    """`solved` with biases that take back what rounding shifts each channel by; where input means are unknown is listed."""
    plan, lonely, known = solved.plan, alone(graph), normals(graph, runner)
    tensors, rows = dict(plan.tensors), {}
    solvers = dict(plan.weights)
    skipped: list[dict[str, str]] = []
    for node in graph.nodes:
        name = str(node.weight)
        if node.op not in WEIGHTED or name not in plan.weights:
            continue
        reason = _reason(node, known, lonely, weights, biases)
        if reason is not None:
            skipped.append({"name": node.layer, "reason": f"no bias correction: {reason}"})
            continue
        view, bias = weights[name], str(node.bias)
        array = np.asarray(view.array, np.float32)
        shift = _shift(view, array - plan.rounded(name, array), known[node.inputs[0]][0])
        tensors[bias] = (tensors.get(bias, biases[bias]) + shift).astype(np.float32)
        rows[name] = {"bias": "analytic"}
        params = solvers[name]
        if (
            bias in plan.biases
            and isinstance(params, QParams)
            and params.axis is not None
            and params.scale.shape == shift.shape
        ):
            source = float(plan.values[plan.biases[bias][0]].scale)
            solvers[name] = replace(params, scale=fit_scale_to_bias(params.scale, source, tensors[bias]))
    changed = tuple({**row, **rows.get(row["name"], {})} for row in solved.changed)
    plan = replace(plan, weights=solvers, tensors=tensors)
    return replace(solved, plan=plan, changed=changed, skipped=(*solved.skipped, *skipped))


def normals(graph: Graph, runner: Runner) -> dict[str, Normal]:
    """Mean and variance of every value that batch norms tell, by channel; sums take their terms as independent."""
    known: dict[str, Normal] = {}
    for node in graph.nodes:
        before = [known.get(value) for value in node.inputs]
        found: Normal | None = None
        if node.op in WEIGHTED and node.weight is not None:
            told = runner.normal(node.weight)
            found = None if told is None else (told[0], told[1] ** 2)
        elif len(before) == 1 and before[0] is not None:
            found = _behind(node.op, before[0])
        elif node.op == "add" and len(before) == 2 and before[0] is not None and before[1] is not None:
            if before[0][0].shape == before[1][0].shape:
                found = before[0][0] + before[1][0], before[0][1] + before[1][1]
        if found is not None and node.outputs == 1:
            known[node.name] = found
    return known


def _behind(op: str, before: Normal) -> Normal | None:
    if op in _CLIPPED:
        clipped = clipped_normal(before[0], np.sqrt(before[1]), 0.0, _CLIPPED[op])
        return clipped.mean, clipped.variance
    return before if op in PASSING | {"avg_pool", "global_avg_pool"} else None


def _reason(
    node: Node, known: Mapping[str, Any], lonely: set[str], weights: Mapping[str, WeightView], biases: Mapping[str, Any]
) -> str | None:
    """Why a layer's bias is not corrected; None where it is."""
    if node.bias is None:
        return "it has no bias"
    if node.name not in lonely:
        return "its weight or bias is shared"
    if not has_own_outputs(node, weights[str(node.weight)], biases.get(node.bias)):
        return "it is a grouped transposed convolution"
    if node.inputs[0] not in known:
        return "no batch norm tells the means of its inputs"
    if input_owner(weights[str(node.weight)], known[node.inputs[0]][0].size) is None:
        return "its inputs are not the channels of the batch norm before"
    return None


def _shift(view: WeightView, lost: npt.NDArray[np.float32], means: Float64s) -> Float64s:
    """`(W − Ŵ) E[x]`, (outputs,); borders are taken to be like the inside."""
    owner = input_owner(view, means.size)
    product = lost.astype(np.float64) * (means if owner is None else means[owner])
    others = tuple(axis for axis in range(product.ndim) if axis != view.out_axis % product.ndim)
    return np.asarray(np.sum(product, axis=others), np.float64)
