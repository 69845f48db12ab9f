"""Rounding one layer to integers as well as its inputs' moments allow: scales, GPTQ and coordinate descent together.

Each row's scale is chosen by its error after GPTQ, not after rounding to nearest, and codes and scale then take turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whet.numerics.affine import SCALE_FLOOR
from whet.numerics.descent import coordinate_descent
from whet.numerics.gptq import DAMPING, gptq, least_squares_target
from whet.numerics.moments import Float64s, Floats, Quadratic
from whet.numerics.rounders import Codes, Rounder, integer_rounder, with_mask
from whet.numerics.scales import lsq_group_scales, lsq_scale, search_scale

FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # of the scale that is best for rounding to nearest
ROUNDS = 4


@dataclass(frozen=True, slots=True, eq=False)
class LayerRounding:
    """codes, weight: (rows, columns); weight is `scale · codes` with each group's scale. scale: (rows, groups), float32 values.

    nearest_error, error: mean squared error of each output row, rounded to nearest and as returned. damping: see `gptq`.
    """

    codes: Codes
    scale: Float64s
    weight: Float64s
    nearest_error: Float64s
    error: Float64s
    damping: float


def round_layer(
    weight: Floats,
    quadratic: Quadratic,
    qmin: int,
    qmax: int,
    *,
    group_size: int | None = None,
    mask: Floats | None = None,
    damping: float = DAMPING,
    rounds: int = ROUNDS,
    factors: tuple[float, ...] = FACTORS,
) -> LayerRounding:
    """Symmetric codes and scales of `weight` (rows, columns) with a low output error, per row or group of columns.

    1. The target is the least-squares weight for the inputs as they now are. 2. For each of `factors` times the scale that is
    best for rounding to nearest, GPTQ; each row keeps the best. 3. `rounds` times: coordinate descent, then the
    least-squares scale of the codes. A row never ends worse than it was after any step. mask: 0 where the weight is pruned.
    """
    exact = np.asarray(weight, np.float64)
    base = search_scale(exact, qmin, qmax, hessian=quadratic.hessian, group_size=group_size)
    nearest = _quantizer(base, qmin, qmax, exact.shape, group_size, mask)(exact, np.arange(exact.shape[1]))[1]
    target = least_squares_target(quadratic, damping, near=exact)
    best, used = _best_of_scales(exact, target, quadratic, base, (qmin, qmax), group_size, mask, damping, factors)
    for _ in range(rounds):
        found = _polish(best, quadratic, (qmin, qmax), group_size, mask)
        gain = np.sum(best.error) - np.sum(found.error)
        best = found
        if gain <= 1e-4 * np.sum(best.error):
            break
    return LayerRounding(best.codes, best.scale, best.weight, quadratic.error(nearest), best.error, used)


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    codes: Codes
    scale: Float64s
    weight: Float64s
    error: Float64s


def _best_of_scales(
    exact: Float64s,
    target: Float64s,
    quadratic: Quadratic,
    base: Float64s,
    limits: tuple[int, int],
    group_size: int | None,
    mask: Floats | None,
    damping: float,
    factors: tuple[float, ...],
) -> tuple[_State, float]:
    """Each row with the factor that GPTQ does best with."""
    rows = exact.shape[0]
    many = len(factors)
    scales = _single(np.concatenate([base * factor for factor in factors]))
    masks = None if mask is None else np.tile(np.asarray(mask), (many, 1))
    shape = (rows * many, exact.shape[1])
    rounder = _quantizer(scales, *limits, shape, group_size, masks)
    rounded = gptq(np.tile(target, (many, 1)), quadratic.hessian, rounder, damping=damping)
    errors = np.stack([quadratic.error(rounded.weight[i * rows : (i + 1) * rows]) for i in range(many)])
    chosen = np.argmin(errors, axis=0) * rows + np.arange(rows)
    return _State(rounded.codes[chosen], scales[chosen], rounded.weight[chosen], errors.min(axis=0)), rounded.damping


def _polish(
    state: _State, quadratic: Quadratic, limits: tuple[int, int], group_size: int | None, mask: Floats | None
) -> _State:
    """Coordinate descent, then the codes' own scale where that helps."""
    shape = (state.codes.shape[0], state.codes.shape[1])
    rounder = _quantizer(state.scale, *limits, shape, group_size, mask)
    codes, weight = coordinate_descent(state.codes, state.weight, quadratic, rounder)
    if group_size is None:
        scale = lsq_scale(codes, quadratic)
        scale = np.where(np.isnan(scale), state.scale, scale)
    else:
        scale = lsq_group_scales(codes, state.scale, quadratic, group_size)
    scale = _single(np.maximum(scale, SCALE_FLOOR))
    rescaled = codes * _spread(scale, group_size, shape[1])
    before, after = quadratic.error(weight), quadratic.error(rescaled)
    better = (after < before)[:, None]
    return _State(codes, np.where(better, scale, state.scale), np.where(better, rescaled, weight), np.minimum(before, after))


def _quantizer(
    scale: Float64s, qmin: int, qmax: int, shape: tuple[int, ...], group_size: int | None, mask: Floats | None
) -> Rounder:
    rounder = integer_rounder(scale, qmin, qmax, shape=(shape[0], shape[1]), group_size=group_size)
    return rounder if mask is None else with_mask(rounder, mask)


def _spread(scale: Float64s, group_size: int | None, columns: int) -> Float64s:
    return scale if group_size is None else np.repeat(scale, group_size, axis=1)[:, :columns]


def _single(scale: Float64s) -> Float64s:
    """The values that float32 scales have: what is measured here is what is stored."""
    return scale.astype(np.float32).astype(np.float64)
