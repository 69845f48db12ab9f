"""Rounding one layer to integers as well as its inputs' moments allow: scales, GPTQ and coordinate descent together.

Each row's scale is chosen by its error after GPTQ, not after rounding to nearest, and codes and scale then take turns.

Layers are rounded in order, each on the inputs that the layers rounded before it make (`x̂`, activations in 8 bits), on centered
moments, and the bias follows by `bias_correction`.
`benchmarks/quantization.py` measures it on a ResNet-20.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whet.numerics.affine import SCALE_FLOOR
from whet.numerics.descent import coordinate_descent
from whet.numerics.gptq import DAMPING, gptq, least_squares_target
from whet.numerics.moments import Float64s, Floats, Quadratic
from whet.numerics.rounders import Codes, Rounder, expand_groups, integer_rounder, with_mask
from whet.numerics.scales import lsq_group_scales, lsq_scale, search_scale

FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # of the scale that is best for rounding to nearest
ROUNDS = 4
LEAST_GAIN = 1e-4  # of the error: a round that gains less is the last


@dataclass(frozen=True, slots=True, eq=False)
class LayerRounding:
    """codes, weight: (rows, columns); weight is `scale · codes` with each group's scale. scale: (rows, groups), float32 values.

    nearest_error, error: mean squared error of each output row, rounded to nearest and as returned.
    """

    codes: Codes
    scale: Float64s
    weight: Float64s
    nearest_error: Float64s
    error: Float64s


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
    """Symmetric codes and scales of `weight` (rows, columns) with a low output error.

    0. The error is damped: `λ |ŵ − w|²` is added, λ being `damping` times the mean diagonal of H. 1. The target is the
    least-squares weight for the inputs as they now are. 2. For each of `factors` times the scale that is best for rounding to
    nearest, GPTQ; each row keeps the best, or nearest if that is better. 3. `rounds` times: coordinate descent, then the
    least-squares scale of the codes. The damped error of a row never rises. mask: 0 where the weight is pruned.
    """
    exact = np.asarray(weight, np.float64)
    damped = quadratic.damped(exact, damping)
    solver = _Solver(damped, (qmin, qmax), group_size, None if mask is None else np.asarray(mask))
    base = _single(search_scale(exact, qmin, qmax, hessian=damped.hessian, group_size=group_size))
    nearest = solver.nearest(exact, base)
    best = solver.best_of_scales(base, factors, nearest)
    for _ in range(rounds):
        found = solver.polished(best)
        gain = np.sum(best.error) - np.sum(found.error)
        best = found
        if gain <= LEAST_GAIN * np.sum(best.error):
            break
    return LayerRounding(best.codes, best.scale, best.weight, quadratic.error(nearest.weight), quadratic.error(best.weight))


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    codes: Codes
    scale: Float64s
    weight: Float64s
    error: Float64s  # (rows,), damped


@dataclass(frozen=True, slots=True, eq=False)
class _Solver:
    quadratic: Quadratic
    limits: tuple[int, int]
    group_size: int | None
    mask: Floats | None

    def nearest(self, weight: Float64s, scale: Float64s) -> _State:
        codes, rounded = self._rounder(scale, weight.shape[1])(weight, np.arange(weight.shape[1]))
        return _State(codes, scale, np.asarray(rounded, np.float64), self.quadratic.error(rounded))

    def best_of_scales(self, base: Float64s, factors: tuple[float, ...], nearest: _State) -> _State:
        """Each row with the factor that GPTQ does best with; all factors are solved at once, as rows of one weight."""
        target = least_squares_target(self.quadratic)
        rows, many = target.shape[0], len(factors)
        scales = _single(np.concatenate([base * factor for factor in factors]))
        rounder = self._rounder(scales, target.shape[1], many)
        rounded = gptq(np.tile(target, (many, 1)), self.quadratic.hessian, rounder, damping=0.0)
        errors = [self.quadratic.error(part) for part in np.split(rounded.weight, many)]
        chosen = np.argmin(errors, axis=0) * rows + np.arange(rows)
        found = _State(
            rounded.codes[chosen], scales[chosen], np.asarray(rounded.weight[chosen], np.float64), np.min(errors, axis=0)
        )
        return _better(found, nearest)

    def polished(self, state: _State) -> _State:
        """Coordinate descent, then the codes' own scale where that helps."""
        columns = state.codes.shape[1]
        rounder = self._rounder(state.scale, columns)
        codes, found = coordinate_descent(state.codes, state.weight, self.quadratic, rounder)
        weight = np.asarray(found, np.float64)
        if self.group_size is None:
            scale = lsq_scale(codes, self.quadratic)
            scale = np.where(np.isnan(scale), state.scale, scale)
        else:
            scale = lsq_group_scales(codes, state.scale, self.quadratic, self.group_size)
        scale = _single(np.maximum(scale, SCALE_FLOOR))
        rescaled = codes * (scale if self.group_size is None else expand_groups(scale, self.group_size, columns))
        held = _State(codes, state.scale, weight, self.quadratic.error(weight))
        return _better(_State(codes, scale, rescaled, self.quadratic.error(rescaled)), held)

    def _rounder(self, scale: Float64s, columns: int, copies: int = 1) -> Rounder:
        """The rounder of `copies` weights below each other."""
        rounder = integer_rounder(scale, *self.limits, shape=(scale.shape[0], columns), group_size=self.group_size)
        return rounder if self.mask is None else with_mask(rounder, np.tile(self.mask, (copies, 1)))


def _better(a: _State, b: _State) -> _State:
    """Row by row the one of less error; `a` of equals."""
    rows = (a.error <= b.error)[:, None]
    return _State(
        np.where(rows, a.codes, b.codes),
        np.where(rows, a.scale, b.scale),
        np.where(rows, a.weight, b.weight),
        np.minimum(a.error, b.error),
    )


def _single(scale: Float64s) -> Float64s:
    """The values that float32 scales have: what is measured here is what is stored."""
    return scale.astype(np.float32).astype(np.float64)
