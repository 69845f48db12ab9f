"""AWQ: weight columns whose inputs are large are scaled up before rounding (Lin et al. 2023, arXiv:2306.00978)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from whet.errors import SpecError
from whet.numerics.moments import Float64s, Floats

GRID = 20


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """factors: (columns,): multiply weight columns by them, divide inputs. exponent: the best α.

    errors: `tr(ΔW H ΔWᵀ)` for each of `exponents`, of which the first is 0, no scaling.
    """

    factors: Float64s
    exponent: float
    exponents: tuple[float, ...]
    errors: tuple[float, ...]


def activation_aware(
    weight: Floats,
    hessian: Floats,
    magnitude: Floats,
    quantize: Callable[[Float64s], Floats],
    *,
    grid: int = GRID,
) -> Scaled:
    """Per-column factors `s = m^α`, α of least output error over `grid` + 1 values from 0 to 1 (eq. 4-5).

    weight: (rows, columns); stack all layers that read the same input. hessian: `E[x xᵀ]`. magnitude m: `E|x_j|` or
    √H_jj, (columns,). quantize: rounds a (rows, columns) weight and returns its values, with scales found anew. Factors are
    normalised to `s / √(max s · min s)`; columns that are never used get 1.
    """
    exact, moment = np.asarray(weight, np.float64), np.asarray(hessian, np.float64)
    size = np.asarray(magnitude, np.float64)
    if size.shape != (exact.shape[1],) or np.any(size < 0):
        raise SpecError(f"magnitude must be ({exact.shape[1]},) without negative values, got shape {size.shape}.")
    exponents = tuple(index / grid for index in range(grid + 1))
    tried = [_factors(size, exponent) for exponent in exponents]
    errors = []
    for factors in tried:
        missed = np.asarray(quantize(exact * factors), np.float64) / factors - exact
        errors.append(float(np.einsum("rc,rc->", missed @ moment, missed)))
    best = int(np.argmin(errors))
    return Scaled(tried[best], exponents[best], exponents, tuple(errors))


def _factors(magnitude: Float64s, exponent: float) -> Float64s:
    alive = magnitude > 0
    factors = np.where(alive, magnitude, 1.0) ** exponent
    if not np.any(alive):
        return np.ones_like(factors)
    span = np.sqrt(np.max(factors[alive]) * np.min(factors[alive]))
    return np.where(alive, np.clip(factors / span, 1e-4, 1e4), 1.0)
