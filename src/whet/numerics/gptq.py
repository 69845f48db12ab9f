"""GPTQ: rounding a weight column by column, each column taking up the error of those before it.

Frantar et al. 2022, arXiv:2210.17323. With `H = R Rᵀ`, R upper triangular, the error of a row is `|(w − ŵ) R|²`, whose k-th
term holds `ŵ` of columns up to k alone. Column k is therefore rounded from

    w'_k = w_k + Σ_{i<k} (w_i − ŵ_i) R_ik / R_kk,

which is their update with the Cholesky factor of `H⁻¹` (the two are one: `R⁻¹` is that factor; Chen et al. 2025,
arXiv:2507.18553), but needs no inverse and sums the errors of whole blocks by one product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whet.errors import ModelError
from whet.numerics.moments import Float64s, Quadratic, mean_diagonal
from whet.numerics.rounders import Codes, Columns, Floats, Rounder

BLOCK = 128  # columns whose errors are passed on by one product
INNER = 16  # columns within a block that pass errors on one by one
DAMPING = 0.01  # of the mean diagonal of H, as in the paper
MOST_DAMPING = 1e3


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """A rounded weight. codes, weight: (rows, columns). damping: what was added to H, as a fraction of its mean diagonal."""

    codes: Codes
    weight: Floats
    damping: float


def gptq(
    weight: Floats,
    hessian: Floats,
    rounder: Rounder,
    *,
    damping: float = DAMPING,
    activation_order: bool = True,
    block: int = BLOCK,
) -> Rounded:
    """The codes of `weight` (rows, columns) that keep `tr((W − Ŵ) H (W − Ŵ)ᵀ)` low.

    hessian: `E[x xᵀ]` (columns, columns). rounder: see `numerics.rounders`; with groups, their scales are fixed before.
    activation_order: columns of large `H_jj` first. Columns whose input is always zero are rounded to nearest and pass
    nothing on. Products are computed in the dtype of `weight`, the factor in float64.

    Raises:
        ModelError: no damping makes H positive definite (it holds NaN, or is no matrix of moments).
    """
    order = np.argsort(-np.einsum("ii->i", hessian), kind="stable") if activation_order else np.arange(weight.shape[1])
    factor, used = damped_factor(hessian, damping, order)
    ratio = np.empty(factor.shape, weight.dtype)
    np.divide(factor, np.einsum("ii->i", factor), out=ratio, casting="same_kind")  # R_ik / R_kk
    codes, rounded = _sweep(weight, ratio, rounder, order, block)
    return Rounded(codes.T, rounded.T, used)


def least_squares_target(quadratic: Quadratic) -> Float64s:
    """The real weight with the least error, `b H⁻¹` (rows, columns): what to round when inputs are quantized already.

    Hand in `quadratic.damped(weight, …)`, so that directions which the data does not know stay as they are in the weight.
    """
    order = np.arange(quadratic.hessian.shape[0])
    factor, _ = damped_factor(quadratic.hessian, 0.0, order)
    solved: Float64s = np.linalg.solve(factor.T, np.linalg.solve(factor, quadratic.linear.T)).T
    return solved


def damped_factor(hessian: Floats, damping: float, order: Columns) -> tuple[Float64s, float]:
    """Upper triangular `R` with `R Rᵀ = H + λ·mean(diag H)·I` of the columns in `order`, and the λ it took.

    λ begins at `damping` and grows tenfold until the factor exists. Columns of zero diagonal get the mean diagonal and no
    neighbours.

    Raises:
        ModelError: H holds NaN or Inf, or λ = 1000 does not do.
    """
    if not np.isfinite(np.sum(hessian)):
        raise ModelError("The moments of a layer's inputs hold NaN or Inf. Check the calibration data and earlier weights.")
    backwards = order[::-1]
    exact: Float64s = np.take(np.take(np.asarray(hessian, np.float64), backwards, axis=0), backwards, axis=1)
    diagonal = np.einsum("ii->i", exact)
    mean, dead = mean_diagonal(exact), np.flatnonzero(diagonal <= 0)
    if dead.size:
        exact[dead, :] = exact[:, dead] = 0.0
        diagonal[dead] = mean
    undamped, used = diagonal.copy(), damping
    while used <= MOST_DAMPING:
        diagonal[:] = undamped + used * mean
        try:
            return np.asarray(np.linalg.cholesky(exact), np.float64)[::-1, ::-1], used
        except np.linalg.LinAlgError:
            used = max(used * 10, 1e-6)
    raise ModelError(f"No damping up to {MOST_DAMPING:g} makes the moments of a layer's inputs positive definite.")


def _sweep(weight: Floats, ratio: Floats, rounder: Rounder, order: Columns, block: int) -> tuple[Codes, Floats]:
    """Codes and rounded values, both (columns, rows), of `weight` (rows, columns); ratio: `R_ik / R_kk`, i and k in `order`."""
    rows, columns = weight.shape
    codes = np.empty((columns, rows), np.int32)
    rounded = np.empty((columns, rows), weight.dtype)
    missed = np.empty((columns, rows), weight.dtype)  # w − ŵ, in `order`
    for start in range(0, columns, block):
        end = min(start + block, columns)
        values = np.ascontiguousarray(weight[:, order[start:end]].T)
        wanted = values + ratio[:start, start:end].T @ missed[:start]
        for inner in range(start, end, INNER):
            stop = min(inner + INNER, end)
            if inner > start:
                wanted[inner - start : stop - start] += ratio[start:inner, inner:stop].T @ missed[start:inner]
            for k in range(inner, stop):
                now = wanted[k - start]
                if k > inner:
                    now = now + ratio[inner:k, k] @ missed[inner:k]
                code, value = rounder(now[:, None], order[k : k + 1])
                codes[order[k]], rounded[order[k]] = code[:, 0], value[:, 0]
                np.subtract(values[k - start], value[:, 0], out=missed[k])
    return codes, rounded
