"""From calibrated ranges to a plan: the scale and zero point of every weight and value a target quantizes.

Both sides call this: they trace and calibrate, then apply the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import DataError, ModelError, SpecError
from whet.graph.nodes import Graph, Node
from whet.graph.placement import Placement, Plan, matches, place, unmatched
from whet.graph.views import WeightView
from whet.graph.weights import solve_weight, uniform
from whet.numerics.affine import QParams, fit_scale_to_bias, qparams
from whet.numerics.clipping import range_of
from whet.numerics.codebook import Codebook
from whet.numerics.histograms import histogram
from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.observers import HistogramRange, Range
from whet.numerics.statistics import sqnr_db
from whet.specs.quantization import Adaptive, Quantize
from whet.specs.schemes import Dynamic, Float, Int, PerTensor, Scheme
from whet.specs.target import Target

FIXED = Int(8, symmetric=False, granularity=PerTensor())  # what a target's fixed scales and zero points are given for
PORTABLE_BITS = 7  # twice 255 times 63 fits into 16 bits; 127 does not


@dataclass(frozen=True, slots=True)
class Calibration:
    """A traced model and the range of every value in it, over all calibration batches.

    The graph is that of the folded model: batch norms in `folds` (batch-norm layer -> convolution layer) are gone.
    """

    graph: Graph
    ranges: Mapping[str, Range | HistogramRange]
    folds: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Solved:
    """A plan, and the rows of its report: see `Step` for the meaning of changed, skipped and unmatched."""

    plan: Plan
    placement: Placement
    changed: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...]
    unmatched: tuple[str, ...]


def solve(
    calibration: Calibration,
    weights: Mapping[str, WeightView],
    biases: Mapping[str, npt.NDArray[np.float32]],
    spec: Quantize,
    target: Target,
) -> Solved:
    """Solve `spec` for `target`.

    weights: every weight named in the graph, as NumPy arrays after batch-norm folding. biases: likewise.

    Raises:
        ModelError: nothing would be quantized.
        DataError: a value that needs a range was never seen, or had NaN or Inf in it.
    """
    placement = place(calibration.graph, target, spec)
    if not placement.weights:
        reasons = "; ".join(f"{name}: {why}" for name, why in placement.skipped) or "it has no convolution or linear layer"
        raise ModelError(f"Quantize would change nothing in this model ({reasons}). Loosen keep= or include=.")
    values = _solve_values(calibration, placement, spec, _finer(calibration.graph, placement, spec))
    plan = Plan(spec, target.name, {}, values, {}, calibration.folds, {})
    changed: list[dict[str, Any]] = []
    unstored: dict[str, str] = {}  # layer -> why its weights stay as they are
    partners = _partners(calibration.graph)
    for name, node in placement.weights.items():
        view = weights[name]
        scheme = weight_scheme(spec, node, target)
        stored = bool(values) or node.op in target.weight_only
        if isinstance(scheme, Float) and scheme.bits == 16:
            if not stored:
                unstored[node.layer] = f"files of {target.name} hold weights of {node.op!r} as float32"
                continue
            changed.append({"name": name, "parameters": view.array.size, "scheme": scheme.dtype, "bits": 16})
            plan.casts[name] = scheme.dtype
            continue
        params = solve_weight(view, scheme, spec.weight_observer)
        bias = biases.get(node.bias) if node.bias is not None else None
        source = values.get(node.inputs[0]) if node.inputs else None
        alone = node.bias is not None and len(partners[node.bias]) == 1
        if isinstance(params, QParams) and bias is not None and source is not None and node.bias is not None and alone:
            params = _make_room(view, params, float(source.scale), bias)
            plan.biases[node.bias] = (node.inputs[0], name)
        if stored:
            plan.weights[name] = params
        else:  # the rounded values, as floats
            array = np.asarray(view.array, np.float32)
            plan.tensors[name] = params.decode(params.encode(array))
        row = {"name": name, "parameters": view.array.size, "scheme": described(params), "bits": params.bits}
        changed.append(row | storage(params, node, target, alone=not values) | stored_weight(view, params))
    for node in placement.dynamic:
        if isinstance(spec.activations, Dynamic) and isinstance(plan.weights.get(str(node.weight)), QParams):
            plan.dynamic[node.name] = spec.activations
    layers = {node.layer: node.kinds for node in calibration.graph.nodes}
    patterns = (*spec.keep, *(spec.include or ()), *spec.overrides)
    skipped = tuple({"name": layer, "reason": reason} for layer, reason in (*placement.skipped, *unstored.items()))
    return Solved(plan, placement, tuple(changed), skipped, tuple(unmatched(layers, patterns)))


def _partners(graph: Graph) -> dict[str, set[str | None]]:
    """The weights that each bias is read beside: with several it has no one scale, and stays float."""
    partners: dict[str, set[str | None]] = {}
    for node in graph.nodes:
        if node.bias is not None:
            partners.setdefault(node.bias, set()).add(node.weight)
    return partners


def weight_scheme(spec: Quantize, node: Node, target: Target) -> Scheme:
    """The first override that names the node's layer, or the scheme of all weights; 7 bits of 8 on a portable target."""
    named = (override for pattern, override in spec.overrides.items() if matches(node.layer, pattern, node.kinds))
    chosen = next(named, spec.weights)
    if isinstance(chosen, Adaptive):
        raise SpecError("Adaptive is resolved into overrides before weights are solved.")
    if target.portable and isinstance(chosen, Int) and chosen.bits == 8:
        return replace(chosen, bits=PORTABLE_BITS)
    return chosen


def _make_room(view: WeightView, params: QParams, input_scale: float, bias: npt.NDArray[np.float32]) -> QParams:
    """`params` with scales at which `bias` fits into int32.

    Where the weight's channels are not the bias's (a depthwise multiplier, a grouped transposed convolution), one scale
    serves all, so that the integer bias has one in every runtime's layout.
    """
    if params.axis is not None and params.scale.shape != bias.shape:
        params = uniform(view, replace(params.spec, granularity=PerTensor()))
    wider = fit_scale_to_bias(np.broadcast_to(params.scale, bias.shape), input_scale, bias)
    scale = wider if params.axis is not None else wider.max()
    return QParams(np.asarray(scale, np.float32), params.zero_point, params.spec, params.axis)


def stored_weight(view: WeightView, params: QParams | Codebook) -> dict[str, Any]:
    """What rounding did to one weight: `error_db`, its signal-to-quantization-noise in dB (None when it is exact), and the
    `histogram` of its values before and after."""
    array = np.asarray(view.array, np.float32)
    stored = params.decode(params.encode(array))
    drawn = histogram(array)
    return {"error_db": sqnr_db(array, stored)} | ({} if drawn is None else {"histogram": drawn.beside(stored)})


def _finer(graph: Graph, placement: Placement, spec: Quantize) -> dict[str, int]:
    """The groups that get more bits than `spec.activations`: what layers read that an override gives more, and the outputs of
    the model that they make."""
    bits: dict[str, int] = {}
    for node in graph.nodes:
        named = (scheme for pattern, scheme in spec.overrides.items() if matches(node.layer, pattern, node.kinds))
        own = next(named, None) if node.weight in placement.weights else None
        if isinstance(own, Int):
            for value in (*node.inputs, *(value for value in node.values if value in graph.outputs)):
                group = placement.values.get(value, "")
                bits[group] = max(bits.get(group, 0), own.bits)
    return bits


def _solve_values(
    calibration: Calibration, placement: Placement, spec: Quantize, finer: Mapping[str, int]
) -> dict[str, QParams]:
    """One quantizer per group, over the union of its values' ranges. finer: the bits of groups that may have more."""
    if not isinstance(spec.activations, Int):
        return {}
    groups: dict[str, QParams] = {}
    for group in sorted(set(placement.values.values())):
        members = [value for value, owner in placement.values.items() if owner == group]
        # A narrow range is for weights: the runtimes' activation codes saturate at the ends of their storage type.
        narrow = False if spec.activations.symmetric else spec.activations.narrow
        activations = replace(spec.activations, narrow=narrow, bits=max(spec.activations.bits, finer.get(group, 0)))
        if group in placement.fixed:
            scale, zero_point = placement.fixed[group]
            groups[group] = QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), FIXED)
            continue
        seen = {v: calibration.ranges[v] for v in members if v not in placement.clipped and v in calibration.ranges}
        seen = {value: item for value, item in seen.items() if item.count}
        if not seen:
            raise DataError(f"No calibration data reached {members[0]!r}: its range is unknown. Calibrate with data that does.")
        for value, item in seen.items():
            if not item.is_finite:
                raise DataError(
                    f"Calibration saw {item.low} to {item.high} at {value!r}: the model's own activations are not finite."
                )
        ends = [range_of(item, spec.observer, activations) for item in seen.values()]
        low = np.float32(min(end[0] for end in ends))
        high = np.float32(max(end[1] for end in ends))
        if low == high:  # zeros alone, which any scale holds; kernels refuse the ratios of the least one (XNNPACK from 256 on)
            high = np.float32(1)
        scale, zero = qparams(np.asarray(low), np.asarray(high), activations, xp=xp)
        groups[group] = QParams(np.asarray(scale, np.float32), np.asarray(zero, np.int32), activations)
    return {value: groups[group] for value, group in placement.values.items()}


def described(params: QParams | Codebook) -> str:
    """The scheme of a weight as people read it."""
    kind = f"{type(params.spec).__name__} {params.bits} bit"
    if isinstance(params.spec, Int):
        kind = f"{'' if params.spec.symmetric else 'u'}int{params.bits}"
    elif isinstance(params.spec, Float):
        kind = params.spec.dtype
    fine = f"groups of {params.group[1]}" if params.group else "per tensor" if params.axis is None else "per channel"
    return f"{kind} {fine}"


def storage(params: QParams | Codebook, node: Node, target: Target, *, alone: bool) -> dict[str, str]:
    """`{"stored": type}` where a weight's codes lie in a type of other bits: half bytes hold two, where the target has them
    and weights are quantized `alone`; floats hold the rounded values where its files have no integers for this operation."""
    if alone and node.op not in target.weight_only:
        return {"stored": "float32"}
    if params.bits > 8:
        return {"stored": "int16"}
    small = alone or isinstance(params, Codebook)
    if params.bits <= 4 and small and "int4" in target.stores:
        return {} if params.bits == 4 else {"stored": "int4"}
    return {} if params.bits == 8 else {"stored": "int8"}
