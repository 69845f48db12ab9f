"""One weight's quantizer: scales (and levels) for a weight, from its own values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import SpecError
from whet.graph.views import WeightView
from whet.numerics.affine import SCALE_FLOOR, QParams, qparams
from whet.numerics.codebook import Codebook
from whet.numerics.half_quadratic import half_quadratic
from whet.numerics.kmeans import kmeans_levels
from whet.numerics.levels import (
    absmax_scale,
    float8_e4m3_levels,
    nf4_levels,
    piecewise_levels,
    power_of_two_levels,
    search_breakpoints,
)
from whet.numerics.levels import search_scale as search_levels
from whet.numerics.namespace import numpy_namespace as xp
from whet.numerics.scales import search_scale
from whet.specs.quantization import HQQ, MSE, MinMax
from whet.specs.schemes import NF4, Float, Granularity, Int, KMeans, PerChannel, PerGroup, Piecewise, PowerOfTwo, Scheme

Floats = npt.NDArray[np.float32]
Layout = tuple[int | None, tuple[int, int] | None]  # the axis and group of a QParams
CANDIDATES = 64  # ranges that an asymmetric search tries
LEAST = 0.2  # of the full range


def layout_of(view: WeightView, granularity: Granularity) -> Layout:
    """Where scales lie: per tensor, along the output channels, or along these and groups of input features.

    A weight without an input axis (a depthwise kernel) has one feature for each channel: groups are its channels. One of
    fewer features than a group has is one group.
    """
    ndim = len(view.array.shape)
    if isinstance(granularity, PerGroup) and view.in_axis is not None:
        along = view.in_axis % ndim
        return view.out_axis % ndim, (along, min(granularity.size, view.array.shape[along]))
    return (view.out_axis % ndim if isinstance(granularity, PerChannel | PerGroup) else None), None


def reduced(array: Floats, layout: Layout, ufunc: np.ufunc) -> Floats:
    """`ufunc` over the values of each scale, in the shape of the scales: `np.minimum` for the least, `np.add` for sums."""
    axis, group = layout
    if group is not None:
        along, size = group
        array = ufunc.reduceat(array, np.arange(0, array.shape[along], size), axis=along)
        others = tuple(index for index in range(array.ndim) if index not in (axis, along))
        return np.asarray(ufunc.reduce(array, axis=others, keepdims=True))
    others = tuple(index for index in range(array.ndim) if axis is None or index != axis % array.ndim)
    return np.asarray(ufunc.reduce(array, axis=others))


def by_scale(array: Floats, layout: Layout, solve: Callable[[Floats], tuple[npt.NDArray[Any], ...]]) -> list[npt.NDArray[Any]]:
    """`solve` on the values of each scale; what it returns, in the shape of the scales.

    solve: rows (R, n), all that share a scale in one row, to arrays of (R,) or (R, k); the latter keep k as a last axis. Rows
    of the last, shorter groups are solved apart.
    """
    axis, group = layout
    if axis is None:
        return [part[0] for part in solve(array.reshape(1, -1))]
    channels = array.shape[axis]
    if group is None:
        return [np.asarray(part) for part in solve(np.moveaxis(array, axis, 0).reshape(channels, -1))]
    along, size = group
    moved = np.moveaxis(array, (axis, along), (0, 1))
    whole = moved.shape[1] // size * size
    parts = []
    for some, width in ((moved[:, :whole], size), (moved[:, whole:], moved.shape[1] - whole)):
        if some.size:
            solved = solve(some.reshape(-1, width * (some[0, 0].size)))
            parts.append([np.asarray(item).reshape(channels, -1, *np.shape(item)[1:]) for item in solved])
    joined = [np.concatenate(items, axis=1) for items in zip(*parts, strict=True)]
    return [_placed(item, array.ndim, axis, along) for item in joined]


def _placed(item: npt.NDArray[Any], ndim: int, axis: int, along: int) -> npt.NDArray[Any]:
    """(channels, groups, …) with these two on their axes of the weight, and 1 on its others."""
    item = item if axis < along else np.swapaxes(item, 0, 1)
    shape = [1] * ndim
    shape[min(axis, along)], shape[max(axis, along)] = item.shape[:2]
    return np.array(item.reshape(*shape, *item.shape[2:]), order="C")


def solve_weight(view: WeightView, spec: Scheme, observer: MinMax | MSE | HQQ | None = None) -> QParams | Codebook:
    """The quantizer of one weight, by its scheme. `observer` ranges uniform codes; min-max by default.

    Raises:
        SpecError: HQQ on symmetric codes, whose zero point it cannot choose; a 16-bit float, which is a cast.
    """
    if isinstance(spec, Int):
        return uniform(view, spec, observer)
    return _codebook(view, spec, observer)


def uniform(view: WeightView, spec: Int, observer: MinMax | MSE | HQQ | None = None) -> QParams:
    """Scales and zero points of one weight: min-max, or of least error."""
    array = np.asarray(view.array, np.float32)
    axis, group = layout = layout_of(view, spec.granularity)
    low, high = reduced(array, layout, np.minimum), reduced(array, layout, np.maximum)
    scale, zero_point = qparams(low, high, spec, xp=xp)
    if isinstance(observer, HQQ):
        scale, zero_point = _half_quadratic(view, array, layout, spec, observer, (scale, zero_point))
    elif isinstance(observer, MSE):
        scale, zero_point = by_scale(array, layout, lambda rows: _least_squares(rows, spec))
    return QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), spec, axis, group)


def _least_squares(rows: Floats, spec: Int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Scale and zero point of each row with the least squared error, among ranges from `LEAST` to all of it."""
    if spec.symmetric:
        scale = search_scale(rows, spec.qmin, spec.qmax)[:, 0]
        return scale, np.zeros(len(rows))
    low, high = rows.min(axis=1), rows.max(axis=1)
    best, found = np.full(len(rows), np.inf), qparams(low, high, spec, xp=xp)
    for fraction in np.linspace(LEAST, 1.0, CANDIDATES):
        scale, zero = qparams(low * np.float32(fraction), high * np.float32(fraction), spec, xp=xp)
        codes = np.clip(np.round(rows / scale[:, None]) + zero[:, None], spec.qmin, spec.qmax)
        error = np.sum(np.square((codes - zero[:, None]) * scale[:, None] - rows, dtype=np.float64), axis=1)
        found = np.where(error < best, scale, found[0]), np.where(error < best, zero, found[1])
        best = np.minimum(error, best)
    return found


def _half_quadratic(
    view: WeightView, array: Floats, layout: Layout, spec: Int, observer: HQQ, start: tuple[Any, Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """HQQ's scales and zero points; min-max where its zero point is no code, so that zero stays exact."""
    if spec.symmetric:
        raise SpecError(
            f"The weight {view.name!r}: HQQ chooses zero points, and symmetric codes have none. Write Int({spec.bits}, "
            "symmetric=False, …), or weight_observer=MSE() for symmetric scales."
        )

    def solve(rows: Floats) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        found = half_quadratic(rows, spec.bits, power=observer.p, iterations=observer.steps, integer_zero_point=True)
        return found.scale[:, 0], found.zero_point[:, 0]

    scale, zero = by_scale(array, layout, solve)
    usable = (zero >= spec.qmin) & (zero <= spec.qmax) & np.isfinite(scale) & (scale >= SCALE_FLOOR)
    return np.where(usable, scale, start[0]), np.where(usable, zero, start[1])


def _codebook(view: WeightView, spec: Float | KMeans | NF4 | PowerOfTwo | Piecewise, observer: object) -> Codebook:
    """Levels of one weight. Every table holds zero, for pruned weights; k-means' does where the weight has zeros."""
    array = np.asarray(view.array, np.float32)
    if isinstance(observer, HQQ):
        raise SpecError(f"The weight {view.name!r}: HQQ ranges Int weights, and this one is stored as {spec!r}.")
    if isinstance(spec, Float) and spec.bits == 16:
        raise SpecError(f"The weight {view.name!r} is cast to {spec.dtype}, it has no levels.")
    axis, group = layout = layout_of(view, PerChannel() if isinstance(spec, Float) else spec.granularity)
    if isinstance(spec, KMeans | Piecewise):
        solve = _clustered(spec, keep_zero=bool(np.any(array == 0))) if isinstance(spec, KMeans) else _pieces(spec.bits)
        table, scale = by_scale(array, layout, solve)
        return Codebook(table.astype(np.float32), scale.astype(np.float32), spec, axis, group)
    levels = _levels(spec)
    find = search_levels if isinstance(observer, MSE) else absmax_scale
    (scale,) = by_scale(array, layout, lambda rows: (find(rows, levels),))
    return Codebook(levels, np.asarray(scale, np.float32), spec, axis, group)


Solve = Callable[[Floats], tuple[npt.NDArray[Any], ...]]


def _clustered(spec: KMeans, *, keep_zero: bool) -> Solve:
    """Levels as they are: the scale is 1."""
    return lambda rows: (kmeans_levels(rows, 1 << spec.bits, keep_zero=keep_zero), np.ones(len(rows), np.float32))


def _pieces(bits: int) -> Solve:
    """Each row with a breakpoint of its own."""

    def solve(rows: Floats) -> tuple[npt.NDArray[Any], ...]:
        table = piecewise_levels(bits, search_breakpoints(rows, bits))
        return table, absmax_scale(rows, table)

    return solve


def _levels(spec: NF4 | PowerOfTwo | Float) -> Floats:
    if isinstance(spec, PowerOfTwo):
        return power_of_two_levels(spec.bits, spec.terms)
    return nf4_levels() if isinstance(spec, NF4) else float8_e4m3_levels()
