"""One weight rounded by the moments of its inputs, whatever its scheme and layout: the solvers of numerics, wired to a plan.

With `weight_observer=MSE()` integer scales are chosen by the error of the layer's output, not of its weights. Pruned weights
(exact zeros) keep the code of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.graph.matrices import Layout, rounders, steps, zero_codes
from whet.numerics.adaround import adaround
from whet.numerics.affine import QParams, fit_scale_to_bias
from whet.numerics.bias_correction import reestimated_affine
from whet.numerics.codebook import Codebook
from whet.numerics.gptq import gptq, least_squares_target
from whet.numerics.layerwise import round_layer
from whet.numerics.moments import Float64s, Quadratic
from whet.numerics.regression import Regression
from whet.numerics.rounders import Codes, Rounder, with_mask
from whet.numerics.scales import search_scale
from whet.specs.quantization import GPTQ, MSE, AdaRound, Quantize

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Matrices:
    """A weight while it is rounded, in matrices (groups, rows, columns). damping: what GPTQ added, None without."""

    params: QParams | Codebook
    codes: Codes
    weight: Float64s
    damping: float | None = None


def nearest(params: QParams | Codebook, where: Layout, array: Array) -> Matrices:
    """Every weight to its nearest code."""
    codes = params.encode(np.asarray(array, np.float32))
    return Matrices(params, where.matrices(codes), where.matrices(params.decode(codes)).astype(np.float64))


def rounded(
    params: QParams | Codebook, where: Layout, array: Array, quadratics: Sequence[Quadratic], spec: Quantize
) -> Matrices:
    """`array` by `spec.rounding`, with `quadratics` the output error of each group; no row ends worse than to nearest."""
    start = nearest(params, where, array)
    exact = where.matrices(np.asarray(array, np.float64))
    mask = (exact != 0) if not exact.all() else None
    search = isinstance(spec.weight_observer, MSE)
    if isinstance(spec.rounding, GPTQ):
        if search and (size := group_size(params, where)) != 0:
            return _searched(start, where, exact, quadratics, mask, size, spec.rounding)
        return _gptq(start, where, exact, quadratics, mask, spec.rounding)
    if isinstance(spec.rounding, AdaRound) and isinstance(params, QParams):
        if search and (size := group_size(params, where)) != 0:
            params = _with_scales(params, where, [_scales(exact[g], q, params, size) for g, q in enumerate(quadratics)])
            start = nearest(params, where, array)
        return _adaround(start, where, exact, quadratics, mask, spec.rounding)
    return start


def cannot_round(params: QParams | Codebook, spec: Quantize) -> str | None:
    """Why `spec.rounding` leaves a weight of this scheme at the nearest codes; None where it does not."""
    if not isinstance(spec.rounding, AdaRound):
        return None
    if not isinstance(params, QParams):
        return "AdaRound rounds integers up or down, not to levels of a codebook (GPTQ does both)"
    return None if params.spec.symmetric else "AdaRound takes symmetric codes (GPTQ takes both)"


def group_size(params: QParams | Codebook, where: Layout) -> int | None:
    """How many neighbouring columns share a scale of their row: None for all of them; 0 where scales cannot be chosen so.

    They cannot where rows share a scale, groups interleave (a Keras convolution's), or codes are not symmetric integers.
    """
    if not isinstance(params, QParams) or not params.spec.symmetric or params.axis is None:
        return 0
    if params.group is None:
        return None if params.scale.size == where.shape[where.out_axis] and not where.transposed else 0
    along, size = params.group
    behind = [axis for axis in range(len(where.shape)) if axis != where.out_axis % len(where.shape)]
    if behind[0] != along or where.transposed:
        return 0
    return size * int(np.prod([where.shape[axis] for axis in behind[1:]], dtype=int))


def _with_scales(params: QParams, where: Layout, scales: Sequence[Float64s]) -> QParams:
    """`params` with other scales: (rows, 1 or column groups) for each group of a convolution."""
    table = np.concatenate(scales).astype(np.float32)
    if params.group is None:
        return replace(params, scale=table[:, 0])
    out = where.out_axis % len(where.shape)
    order = [out, *(axis for axis in range(len(where.shape)) if axis != out)]
    shape = [params.scale.shape[axis] for axis in order]
    return replace(params, scale=np.ascontiguousarray(np.transpose(table.reshape(shape), np.argsort(order))))


def _scales(exact: Float64s, quadratic: Quadratic, params: QParams, size: int | None) -> Float64s:
    return search_scale(exact, params.spec.qmin, params.spec.qmax, hessian=quadratic.hessian, group_size=size)


def _searched(
    start: Matrices,
    where: Layout,
    exact: Float64s,
    quadratics: Sequence[Quadratic],
    mask: Array | None,
    size: int | None,
    spec: GPTQ,
) -> Matrices:
    """Scales and codes together, by `numerics.layerwise`."""
    params = start.params
    if not isinstance(params, QParams):
        return start
    found = [
        round_layer(
            exact[g],
            quadratic,
            params.spec.qmin,
            params.spec.qmax,
            group_size=size,
            mask=None if mask is None else mask[g],
            damping=spec.damping,
        )
        for g, quadratic in enumerate(quadratics)
    ]
    scaled = _with_scales(params, where, [item.scale for item in found])
    codes, weight = np.stack([item.codes for item in found]), np.stack([item.weight for item in found])
    return Matrices(scaled, codes, weight, spec.damping)


def _gptq(
    start: Matrices, where: Layout, exact: Float64s, quadratics: Sequence[Quadratic], mask: Array | None, spec: GPTQ
) -> Matrices:
    """The least-squares weight for the inputs as they are, its columns rounded one after another at the given scales."""
    codes, weight, used = start.codes.copy(), start.weight.copy(), spec.damping
    for g, rounder in enumerate(_masked(start.params, where, mask)):
        quadratic = quadratics[g]
        damped = quadratic.damped(exact[g], spec.damping)
        target = least_squares_target(damped)
        made = gptq(target, damped.hessian, rounder, damping=0.0, activation_order=spec.order)
        better = quadratic.error(made.weight) <= quadratic.error(weight[g])
        codes[g][better], weight[g][better] = made.codes[better], made.weight[better]
        used = max(used, spec.damping + made.damping)
    return Matrices(start.params, codes, weight, used)


def _adaround(
    start: Matrices, where: Layout, exact: Float64s, quadratics: Sequence[Quadratic], mask: Array | None, spec: AdaRound
) -> Matrices:
    params = start.params
    if not isinstance(params, QParams) or not params.spec.symmetric:
        return start
    scale, _ = steps(params, where)
    made = [
        adaround(
            exact[g],
            scale[g],
            quadratic,
            params.spec.qmin,
            params.spec.qmax,
            group_size=1,
            mask=None if mask is None else mask[g],
            steps=spec.steps,
        )
        for g, quadratic in enumerate(quadratics)
    ]
    return Matrices(params, np.stack([item.codes for item in made]), np.stack([item.weight for item in made]))


def _masked(params: QParams | Codebook, where: Layout, mask: Array | None) -> list[Rounder]:
    plain = rounders(params, where)
    if mask is None:
        return plain
    zeros = zero_codes(params, where)
    return [with_mask(rounder, mask[g], zeros[g]) for g, rounder in enumerate(plain)]


def with_deviation(found: Matrices, where: Layout, seen: Sequence[Regression]) -> Matrices | None:
    """`found`, codes unchanged, with scales at which outputs vary as the float model's do; None where rows share a scale."""
    if found.params.axis is None or found.params.scale.size != where.shape[where.out_axis] or where.transposed:
        return None
    factors = np.stack(
        [
            reestimated_affine(s.target_mean, s.target_variance, w @ s.mean, s.output_variance(w)).scale
            for s, w in zip(seen, found.weight, strict=True)
        ]
    )
    scale = (found.params.scale * factors.reshape(found.params.scale.shape)).astype(np.float32)
    params = replace(found.params, scale=scale)
    weight = where.matrices(params.decode(where.array(found.codes))).astype(np.float64)
    return Matrices(params, found.codes, weight, found.damping)


def with_room(found: Matrices, where: Layout, array: Array, input_scale: float, bias: npt.NDArray[np.float32]) -> Matrices:
    """`found` with scales raised where `bias` would not fit into int32; the weights of such rows to nearest."""
    params = found.params
    if not isinstance(params, QParams):
        return found
    if params.axis is not None and params.scale.shape != bias.shape:
        return found  # scales that rows share were made wide enough when they were solved
    wider = fit_scale_to_bias(np.broadcast_to(params.scale, bias.shape), input_scale, bias)
    scale = np.asarray(wider if params.axis is not None else wider.max(), np.float32)
    if np.array_equal(scale, params.scale):
        return found
    changed = where.rows(np.broadcast_to(scale != params.scale, bias.shape))[..., None]
    again = nearest(replace(params, scale=scale), where, array)
    return replace(
        again, codes=np.where(changed, again.codes, found.codes), weight=np.where(changed, again.weight, found.weight)
    )
