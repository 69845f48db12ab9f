"""Scales of symmetric or affine weight codes that lose least: by weight error, or by the error of the layer's output."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from whet.numerics.affine import SCALE_FLOOR
from whet.numerics.moments import Float64s, Floats, Quadratic
from whet.numerics.rounders import Codes

SHRINKS = 64  # candidates of the first, coarse search
REFINED = 16  # candidates around the best one
LEAST_SHRINK = 0.2


def absmax_scale(weight: Floats, qmin: int, qmax: int, *, group_size: int | None = None) -> Float64s:
    """The least scale at which no weight is clipped, (rows, groups): `max(max(w) / qmax, max(−w) / −qmin)`."""
    groups = _groups(np.asarray(weight, np.float64), group_size)
    reach = np.max(groups, axis=2, initial=0.0) / qmax
    if qmin < 0:
        reach = np.maximum(reach, np.max(-groups, axis=2, initial=0.0) / -qmin)
    return np.asarray(np.maximum(reach, SCALE_FLOOR), np.float64)


def search_scale(
    weight: Floats,
    qmin: int,
    qmax: int,
    *,
    hessian: Floats | None = None,
    group_size: int | None = None,
    candidates: int = SHRINKS,
    least: float = LEAST_SHRINK,
) -> Float64s:
    """Scales (rows, groups), zero point 0, of least error when `weight` (rows, columns) is rounded to nearest.

    The error is `Σ (w − ŵ)²` without `hessian`; `Σ h_j (w_j − ŵ_j)²` with (columns,), the diagonal or any importance; and
    `(w − ŵ)ᵀ H (w − ŵ)` with (columns, columns), where a group sees its own block of H. Fractions from `least` to 1 of the
    scale that clips nothing are tried (negative ends are as far as the code range has them), then finer ones around the best.
    """
    values = _groups(np.asarray(weight, np.float64), group_size)  # (rows, groups, size)
    top = np.max(np.abs(values), axis=2) / max(qmax, -qmin)
    top = np.maximum(np.maximum(top, absmax_scale(weight, qmin, qmax, group_size=group_size)), SCALE_FLOOR)
    importance = _importance(hessian, values.shape[1], values.shape[2])

    def losses(shrink: Float64s) -> Float64s:
        scale = np.maximum(top * shrink, SCALE_FLOOR)[..., None]
        missed = values - np.clip(np.round(values / scale), qmin, qmax) * scale
        return _weighted(missed, importance)

    best, loss = _least(losses, np.ones_like(top), np.linspace(least, 1.0, candidates))
    width = (1.0 - least) / max(candidates - 1, 1)
    best, _ = _least(losses, best, np.linspace(-width, width, REFINED), base=best, loss=loss)
    return np.asarray(np.maximum(top * best, SCALE_FLOOR), np.float64)


def lsq_scale(codes: Codes, quadratic: Quadratic, *, zero_point: npt.ArrayLike = 0.0) -> Float64s:
    """The scale of each row with the least output error for given codes: `s = bᵀq / qᵀHq`, (rows, 1).

    codes: (rows, columns); zero_point broadcasts against them. Rows whose codes are all zero, or whose best scale is not
    positive, get NaN: keep theirs.
    """
    steps = np.asarray(codes, np.float64) - np.asarray(zero_point, np.float64)
    curvature = np.einsum("rc,rc->r", steps @ quadratic.hessian, steps)
    fit = np.einsum("rc,rc->r", quadratic.linear, steps)
    good = (curvature > 0) & (fit > 0)
    scale = np.where(good, fit / np.where(good, curvature, 1.0), np.nan)
    return scale[:, None]


def lsq_group_scales(
    codes: Codes,
    scale: Floats,
    quadratic: Quadratic,
    group_size: int,
    *,
    zero_point: npt.ArrayLike = 0.0,
    damping: float = 1e-8,
) -> Float64s:
    """All scales of a row together, (rows, groups): the least squares `A s = a` with `A_gh = q_gᵀ H_gh q_h`, `a_g = b_gᵀ q_g`.

    scale: (rows, groups), kept where a group's codes are all zero or the solution is not positive. One system per row.
    """
    steps = _groups(np.asarray(codes, np.float64) - np.asarray(zero_point, np.float64), group_size)
    _, groups, size = steps.shape
    columns = quadratic.hessian.shape[0]
    padded = np.zeros((groups * size, groups * size))
    padded[:columns, :columns] = quadratic.hessian
    blocks = padded.reshape(groups, size, groups, size)
    system = np.einsum("rgi,gihj,rhj->rgh", steps, blocks, steps, optimize=True)
    fit = np.einsum("rgi,rgi->rg", _groups(quadratic.linear, group_size), steps)
    diagonal = np.einsum("rgg->rg", system)
    diagonal += damping * np.maximum(diagonal.mean(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    used = np.any(steps != 0, axis=2)
    diagonal[~used] = 1.0
    solved: Float64s = np.linalg.solve(system, fit[..., None])[..., 0]
    return np.where(used & (solved > 0), solved, np.asarray(scale, np.float64))


def _groups(values: Float64s, group_size: int | None) -> Float64s:
    """(rows, columns) → (rows, groups, size), the last group filled with zeros, which lose nothing at any scale."""
    rows, columns = values.shape
    size = columns if group_size is None else group_size
    groups = -(-columns // size) if size else 1
    if groups * size != columns:
        values = np.concatenate([values, np.zeros((rows, groups * size - columns))], axis=1)
    return values.reshape(rows, groups, size)


def _importance(hessian: Floats | None, groups: int, size: int) -> Float64s | None:
    """The diagonal as (groups, size), or the diagonal blocks as (groups, size, size)."""
    if hessian is None:
        return None
    exact = np.asarray(hessian, np.float64)
    columns = exact.shape[0]
    if exact.ndim == 1:
        padded = np.zeros(groups * size)
        padded[:columns] = exact
        return padded.reshape(groups, size)
    square = np.zeros((groups * size, groups * size))
    square[:columns, :columns] = exact
    index = np.arange(groups)
    return np.ascontiguousarray(square.reshape(groups, size, groups, size)[index, :, index, :])


def _weighted(missed: Float64s, importance: Float64s | None) -> Float64s:
    if importance is None:
        return np.asarray(np.einsum("rgi,rgi->rg", missed, missed), np.float64)
    if importance.ndim == 2:
        return np.asarray(np.einsum("rgi,gi,rgi->rg", missed, importance, missed, optimize=True), np.float64)
    passed = np.matmul(missed.transpose(1, 0, 2), importance).transpose(1, 0, 2)
    return np.asarray(np.einsum("rgi,rgi->rg", passed, missed), np.float64)


def _least(
    losses: Callable[[Float64s], Float64s],
    best: Float64s,
    tries: Float64s,
    *,
    base: Float64s | None = None,
    loss: Float64s | None = None,
) -> tuple[Float64s, Float64s]:
    """The factor of least loss among `tries` (added to `base`, where given), elementwise; the first of equals."""
    lowest = np.full(best.shape, np.inf) if loss is None else loss
    for factor in tries:
        at = np.full(best.shape, factor) if base is None else np.maximum(base + factor, 1e-3)
        found = losses(at)
        better = found < lowest
        best, lowest = np.where(better, at, best), np.where(better, found, lowest)
    return best, lowest
