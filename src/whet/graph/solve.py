"""From calibrated ranges to a plan: the scale and zero point of every weight and value a target quantizes.

Both sides call this: they trace and calibrate, then apply the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import DataError, ModelError
from whet.graph.nodes import Graph
from whet.graph.placement import Placement, Plan, matches, place, unmatched
from whet.graph.views import WeightView
from whet.numerics.affine import QParams, dequantize, fit_scale_to_bias, qparams, quantize
from whet.numerics.histograms import histogram
from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.observers import Range, channel_range
from whet.numerics.statistics import sqnr_db
from whet.specs.quantization import Float, Int, PerChannel, PerTensor, Quantize
from whet.specs.target import Target

FIXED = Int(8, symmetric=False, granularity=PerTensor())  # what a target's fixed scales and zero points are given for
PORTABLE_BITS = 7  # twice 255 times 63 fits into 16 bits; 127 does not


@dataclass(frozen=True, slots=True)
class Calibration:
    """A traced model and the range of every value in it, over all calibration batches.

    The graph is that of the folded model: batch norms in `folds` (batch-norm layer -> convolution layer) are gone.
    """

    graph: Graph
    ranges: Mapping[str, Range]
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
    values = _solve_values(calibration, placement, spec)
    plan = Plan(spec, target.name, {}, values, {}, calibration.folds, {})
    changed: list[dict[str, Any]] = []
    partners = _partners(calibration.graph)
    for name, node in placement.weights.items():
        view = weights[name]
        if isinstance(spec.weights, Float):
            changed.append({"name": name, "parameters": view.array.size, "scheme": spec.weights.dtype, "bits": 16})
            plan.casts[name] = spec.weights.dtype
            continue
        params = solve_weight(view, _weight_spec(spec.weights, spec, node.layer, target))
        bias = biases.get(node.bias) if node.bias is not None else None
        source = values.get(node.inputs[0]) if node.inputs else None
        if bias is not None and source is not None and node.bias is not None and len(partners[node.bias]) == 1:
            params = _make_room(view, params, float(source.scale), bias)
            plan.biases[node.bias] = (node.inputs[0], name)
        plan.weights[name] = params
        row = {"name": name, "parameters": view.array.size, "scheme": _scheme(params), "bits": params.spec.bits}
        changed.append(row | stored_weight(view, params))
    layers = sorted({node.layer for node in calibration.graph.nodes})
    patterns = (*spec.keep, *(spec.include or ()), *spec.overrides)
    skipped = tuple({"name": layer, "reason": reason} for layer, reason in placement.skipped)
    return Solved(plan, placement, tuple(changed), skipped, tuple(unmatched(layers, patterns)))


def _partners(graph: Graph) -> dict[str, set[str | None]]:
    """The weights that each bias is read beside: with several it has no one scale, and stays float."""
    partners: dict[str, set[str | None]] = {}
    for node in graph.nodes:
        if node.bias is not None:
            partners.setdefault(node.bias, set()).add(node.weight)
    return partners


def _weight_spec(default: Int, spec: Quantize, layer: str, target: Target) -> Int:
    """The first override that names `layer`, or the spec of all weights; 7 bits of 8 on a portable target."""
    chosen = next((override for pattern, override in spec.overrides.items() if matches(layer, pattern)), default)
    return replace(chosen, bits=PORTABLE_BITS) if target.portable and chosen.bits == 8 else chosen


def solve_weight(view: WeightView, spec: Int) -> QParams:
    """Min-max scales of one weight."""
    axis = view.out_axis if isinstance(spec.granularity, PerChannel) else None
    low, high = channel_range(np.asarray(view.array, np.float32), axis, xp=xp)
    scale, zero_point = qparams(np.asarray(low, np.float32), np.asarray(high, np.float32), spec, xp=xp)
    return QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), spec, axis)


def _make_room(view: WeightView, params: QParams, input_scale: float, bias: npt.NDArray[np.float32]) -> QParams:
    """`params` with scales at which `bias` fits into int32.

    Where the weight's channels are not the bias's (a depthwise multiplier, a grouped transposed convolution), one scale
    serves all, so that the integer bias has one in every runtime's layout.
    """
    if params.axis is not None and params.scale.shape != bias.shape:
        params = solve_weight(view, replace(params.spec, granularity=PerTensor()))
    wider = fit_scale_to_bias(np.broadcast_to(params.scale, bias.shape), input_scale, bias)
    scale = wider if params.axis is not None else wider.max()
    return QParams(np.asarray(scale, np.float32), params.zero_point, params.spec, params.axis)


def weight_codes(array: npt.NDArray[np.float32], params: QParams) -> npt.NDArray[np.int32]:
    """The integer codes of a weight."""
    scale, zero_point = params.broadcast(array.ndim)
    codes: npt.NDArray[np.int32] = quantize(array, scale, zero_point, params.spec, xp=xp).astype(np.int32)
    return codes


def stored_weight(view: WeightView, params: QParams) -> dict[str, Any]:
    """What rounding did to one weight: `error_db`, its signal-to-quantization-noise in dB (None when it is exact), and the
    `histogram` of its values before and after."""
    array = np.asarray(view.array, np.float32)
    scale, zero_point = params.broadcast(array.ndim)
    stored = dequantize(weight_codes(array, params), scale, zero_point)
    drawn = histogram(array)
    return {"error_db": sqnr_db(array, stored)} | ({} if drawn is None else {"histogram": drawn.beside(stored)})


def _solve_values(calibration: Calibration, placement: Placement, spec: Quantize) -> dict[str, QParams]:
    """One quantizer per group, over the union of its values' ranges."""
    if spec.activations is None:
        return {}
    # A narrow range is for weights: the runtimes' activation codes saturate at the ends of their storage type.
    activations = replace(spec.activations, narrow=False) if spec.activations.symmetric else spec.activations
    groups: dict[str, QParams] = {}
    for group in sorted(set(placement.values.values())):
        members = [value for value, owner in placement.values.items() if owner == group]
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
        low = np.float32(min(item.low for item in seen.values()))
        high = np.float32(max(item.high for item in seen.values()))
        scale, zero = qparams(np.asarray(low), np.asarray(high), activations, xp=xp)
        groups[group] = QParams(np.asarray(scale, np.float32), np.asarray(zero, np.int32), activations)
    return {value: groups[group] for value, group in placement.values.items()}


def _scheme(params: QParams) -> str:
    return f"int{params.spec.bits} {'per tensor' if params.axis is None else 'per channel'}"
