"""One weight's quantizer: scales (and levels) for a weight, from its own values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from whet.errors import SpecError
from whet.graph.views import WeightView
from whet.numerics.affine import QParams, qparams
from whet.numerics.codebook import Codebook
from whet.numerics.namespace import numpy_namespace as xp
from whet.specs.schemes import Granularity, Int, PerChannel, PerGroup, Scheme

Layout = tuple[int | None, tuple[int, int] | None]  # the axis and group of a QParams


def layout_of(view: WeightView, granularity: Granularity) -> Layout:
    """Where scales lie: per tensor, along the output channels, or along these and groups of input features.

    A weight without an input axis (a depthwise kernel) has one feature for each channel: groups are its channels.
    """
    ndim = len(view.array.shape)
    if isinstance(granularity, PerGroup) and view.in_axis is not None:
        return view.out_axis % ndim, (view.in_axis % ndim, granularity.size)
    return (view.out_axis if isinstance(granularity, PerChannel | PerGroup) else None), None


def reduced(array: npt.NDArray[np.float32], layout: Layout, ufunc: np.ufunc) -> npt.NDArray[np.float32]:
    """`ufunc` over the values of each scale, in the shape of the scales: `np.minimum` for the least, `np.add` for sums."""
    axis, group = layout
    if group is not None:
        along, size = group
        array = ufunc.reduceat(array, np.arange(0, array.shape[along], size), axis=along)
        others = tuple(index for index in range(array.ndim) if index not in (axis, along))
        return np.asarray(ufunc.reduce(array, axis=others, keepdims=True))
    others = tuple(index for index in range(array.ndim) if axis is None or index != axis % array.ndim)
    return np.asarray(ufunc.reduce(array, axis=others))


def solve_weight(view: WeightView, spec: Scheme) -> QParams | Codebook:
    """The quantizer of one weight, by its scheme."""
    if not isinstance(spec, Int):
        raise SpecError(f"The weight {view.name!r} cannot be stored as {spec!r}.")
    return uniform(view, spec)


def uniform(view: WeightView, spec: Int) -> QParams:
    """Min-max scales of one weight."""
    array = np.asarray(view.array, np.float32)
    axis, group = layout_of(view, spec.granularity)
    low, high = reduced(array, (axis, group), np.minimum), reduced(array, (axis, group), np.maximum)
    scale, zero_point = qparams(low, high, spec, xp=xp)
    return QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), spec, axis, group)
