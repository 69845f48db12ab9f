"""HQQ: zero points, and scales if asked, without data.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".

The weight error is measured by `|·|_p^p`, p < 1, which forgives a few outliers. Half-quadratic splitting takes turns between an
auxiliary error `W_e` (a generalised shrinkage) and the parameters (means).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from whet.numerics.affine import SCALE_FLOOR
from whet.numerics.moments import Float64s, Floats
from whet.numerics.rounders import Codes

Booleans = npt.NDArray[np.bool_]
POWER = 0.7
BETA, GROWTH = 10.0, 1.01
ITERATIONS = 20


@dataclass(frozen=True, slots=True, eq=False)
class HalfQuadratic:
    """codes: (rows, columns), unsigned. scale, zero_point: (rows, groups); `w ≈ scale (code − zero_point)`.

    The zero point is real-valued unless rounded. before, after: mean `|w − ŵ|^p` of the min-max start and of the result,
    (rows, groups).
    """

    codes: Codes
    scale: Float64s
    zero_point: Float64s
    before: Float64s
    after: Float64s


def shrink(x: Floats, beta: float, power: float = POWER) -> Float64s:
    """`sign(x) · max(|x| − |x|^(p−1) / β, 0)`: the proximal step of `|·|_p^p`."""
    size = np.abs(np.asarray(x, np.float64))
    least = np.maximum(size, 1e-12)
    return np.sign(x) * np.maximum(size - least ** (power - 1.0) / beta, 0.0)


def half_quadratic(
    weight: Floats,
    bits: int,
    *,
    group_size: int | None = None,
    power: float = POWER,
    beta: float = BETA,
    growth: float = GROWTH,
    iterations: int = ITERATIONS,
    fit_scale: bool = False,
    integer_zero_point: bool = False,
) -> HalfQuadratic:
    """Unsigned affine codes of `weight` (rows, columns), each group of columns on its own.

    Begins at min-max, and repeats `W_e = shrink(W − Ŵ)`, `z = mean(q − (W − W_e) / s)` with β growing; a group stops
    where its error no longer falls, and keeps its best. Weights are measured in steps of the min-max scale, so that
    β means the same at every size of weights (the original's β suits the weights of language models). fit_scale: the scale
    follows by least squares too. integer_zero_point: rounded at the end, with whatever error that has.
    """
    values, counted = _grouped(np.asarray(weight, np.float64), group_size)
    levels = float((1 << bits) - 1)
    low = np.min(np.where(counted, values, np.inf), axis=2)
    high = np.max(np.where(counted, values, -np.inf), axis=2)
    unit = _unit(low, high, levels)
    x = values / unit[..., None]
    scale, zero = np.ones_like(unit), -low / unit
    best_scale, best_zero = scale, zero
    before = least = _loss(x, scale, zero, counted, levels, power)
    for _ in range(iterations):
        codes = np.clip(np.round(x / scale[..., None] + zero[..., None]), 0.0, levels)
        rounded = (codes - zero[..., None]) * scale[..., None]
        target = x - shrink(x - rounded, beta, power)
        if fit_scale:
            scale = _slope(codes, target, counted, scale)
        zero = _mean(codes - target / scale[..., None], counted)
        loss = _loss(x, scale, zero, counted, levels, power)
        better = loss < least
        best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
        least = np.minimum(loss, least)
        beta *= growth
    if integer_zero_point:
        best_zero = np.round(best_zero)
        least = _loss(x, best_scale, best_zero, counted, levels, power)
    codes = np.clip(np.round(x / best_scale[..., None] + best_zero[..., None]), 0.0, levels)
    flat = codes.reshape(codes.shape[0], -1)[:, : weight.shape[1]].astype(np.int32)
    return HalfQuadratic(flat, best_scale * unit, best_zero, before * unit**power, least * unit**power)


def _unit(low: Float64s, high: Float64s, levels: float) -> Float64s:
    """The min-max scale; a constant group's value is its own step."""
    largest = np.maximum(np.abs(low), np.abs(high))
    flat = high - low <= 1e-6 * largest
    return np.maximum(np.where(flat, np.where(largest > 0, largest, 1.0), (high - low) / levels), SCALE_FLOOR)


def _loss(x: Float64s, scale: Float64s, zero: Float64s, counted: Booleans, levels: float, power: float) -> Float64s:
    codes = np.clip(np.round(x / scale[..., None] + zero[..., None]), 0.0, levels)
    return _mean(np.abs(x - (codes - zero[..., None]) * scale[..., None]) ** power, counted)


def _slope(codes: Float64s, target: Float64s, counted: Booleans, scale: Float64s) -> Float64s:
    """The scale of the straight line through `(codes, target)`; the old one where codes are all the same."""
    apart = np.where(counted, codes - _mean(codes, counted)[..., None], 0.0)
    spread = np.sum(apart**2, axis=2)
    slope = np.sum(apart * target, axis=2) / np.where(spread > 0, spread, 1.0)
    return np.where((spread > 0) & (slope > 0.1), slope, scale)


def _mean(values: Float64s, counted: Booleans) -> Float64s:
    return np.asarray(np.sum(np.where(counted, values, 0.0), axis=2) / np.sum(counted, axis=2), np.float64)


def _grouped(weight: Float64s, group_size: int | None) -> tuple[Float64s, Booleans]:
    """(rows, groups, size) and which of its places are weights."""
    rows, columns = weight.shape
    size = columns if group_size is None else group_size
    groups = -(-columns // size)
    padded = np.zeros((rows, groups * size))
    padded[:, :columns] = weight
    counted = np.broadcast_to(np.arange(groups * size) < columns, (rows, groups * size))
    return padded.reshape(rows, groups, size), counted.reshape(rows, groups, size)
