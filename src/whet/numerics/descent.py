"""Coordinate descent over codes: the rounding is changed one column at a time to whatever lowers the output error most.

With all other columns held, the error `ŵᵀ H ŵ − 2 bᵀ ŵ` is a parabola in `ŵ_j`; the code nearest to its vertex is the best
(QuantEase, Behdin et al. 2023, arXiv:2309.01885, eq. 5-7). Codes may move by more than one step, which below 4 bits they do.
"""

from __future__ import annotations

import numpy as np

from whet.numerics.moments import Float64s, Floats, Quadratic
from whet.numerics.rounders import Codes, Columns, Rounder

BLOCK = 128
SWEEPS = 20
LEAST_GAIN = 1e-12  # of H_jj times the value squared: what is less is rounding of the sums


def coordinate_descent(
    codes: Codes, weight: Floats, quadratic: Quadratic, rounder: Rounder, *, sweeps: int = SWEEPS, block: int = BLOCK
) -> tuple[Codes, Floats]:
    """Codes and rounded weight, (rows, columns), from which no change of one code lowers the error further.

    codes, weight: where to begin, for instance GPTQ's. Ends after `sweeps` rounds over all columns, or when a round changes
    nothing. The error of no row rises. Columns whose input is always zero stay as they are.
    """
    alive = np.flatnonzero(np.einsum("ii->i", quadratic.hessian) > 0)
    found = np.array(np.asarray(codes).T, np.int32)
    current = np.array(np.asarray(weight).T, np.float64)
    linear = np.ascontiguousarray(quadratic.linear.T)
    for _ in range(sweeps):
        slope = quadratic.hessian @ current - linear  # half the gradient, (columns, rows)
        moved = False
        for start in range(0, alive.size, block):
            columns = alive[start : start + block]
            steps = _descend(found, current, slope[columns], quadratic.hessian[np.ix_(columns, columns)], columns, rounder)
            if np.any(steps):
                moved = True
                later = alive[start + block :]
                slope[later] += quadratic.hessian[np.ix_(later, columns)] @ steps
        if not moved:
            break
    return np.ascontiguousarray(found.T), np.ascontiguousarray(current.T).astype(weight.dtype)


def _descend(
    codes: Codes, current: Float64s, slope: Float64s, hessian: Float64s, columns: Columns, rounder: Rounder
) -> Float64s:
    """One round over a block of `columns`, in place; how far each weight moved, (columns, rows)."""
    steps = np.zeros_like(slope)
    for k, column in enumerate(columns):
        curvature = hessian[k, k]
        here = slope[k] + hessian[k, :k] @ steps[:k]
        code, value = rounder((current[column] - here / curvature)[:, None], columns[k : k + 1])
        step = value[:, 0] - current[column]
        gain = -step * (2 * here + curvature * step)
        better = gain > LEAST_GAIN * curvature * (current[column] ** 2 + value[:, 0] ** 2)
        steps[k] = np.where(better, step, 0.0)
        codes[column] = np.where(better, code[:, 0], codes[column])
        current[column] = np.where(better, value[:, 0], current[column])
    return steps
