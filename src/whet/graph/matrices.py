"""Weights as matrices: rows are outputs, columns the inputs that they are multiplied with, one matrix for each group.

Rows follow the output channels, columns the framework's own order of the other axes: (in, kernel…) for torch, (kernel…, in)
for Keras. Solvers work on these matrices; codes and scales go back into the weight's own layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from whet.errors import ModelError
from whet.graph.views import WeightView
from whet.numerics.affine import QParams
from whet.numerics.codebook import Codebook
from whet.numerics.rounders import Codes, Columns, Floats, Rounder
from whet.specs.schemes import Int

Array = npt.NDArray[Any]
_ANY = Int(16)  # a spec for numbering scales, never encoded with


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight of `shape` becomes `groups` matrices.

    Groups lie along the output axis, (groups × rows), but in a transposed convolution along the input axis: (in, out / groups).
    """

    shape: tuple[int, ...]
    out_axis: int
    in_axis: int | None
    groups: int = 1
    transposed: bool = False

    def matrices(self, array: Array) -> Array:
        """`array`, of the weight's shape, as (groups, rows, columns)."""
        if self.transposed and self.groups > 1:
            at = self._in_axis()
            parts = np.moveaxis(array, (at, self.out_axis), (0, 1))  # (in, out / groups, kernel…)
            parts = parts.reshape(self.groups, -1, *parts.shape[1:])  # (groups, in / groups, out / groups, kernel…)
            return np.ascontiguousarray(np.moveaxis(parts, 2, 1)).reshape(self.groups, array.shape[self.out_axis], -1)
        front = np.moveaxis(array, self.out_axis, 0)
        return np.ascontiguousarray(front).reshape(self.groups, front.shape[0] // self.groups, -1)

    def array(self, matrices: Array) -> Array:
        """The inverse of `matrices`."""
        out = self.out_axis % len(self.shape)
        if self.transposed and self.groups > 1:
            at = self._in_axis()
            rest = [size for axis, size in enumerate(self.shape) if axis not in (at, out)]
            parts = matrices.reshape(self.groups, self.shape[out], self.shape[at] // self.groups, *rest)
            parts = np.moveaxis(parts, 1, 2).reshape(self.shape[at], self.shape[out], *rest)
            return np.ascontiguousarray(np.moveaxis(parts, (0, 1), (at, out)))
        rest = [size for axis, size in enumerate(self.shape) if axis != out]
        return np.ascontiguousarray(np.moveaxis(matrices.reshape(self.shape[out], *rest), 0, out))

    @property
    def outputs(self) -> int:
        """How many outputs the layer has."""
        return self.shape[self.out_axis] * (self.groups if self.transposed else 1)

    def rows(self, per_output: Array) -> Array:
        """Values for each output of the layer, (outputs,), as (groups, rows)."""
        return per_output.reshape(self.groups, -1)

    def _in_axis(self) -> int:
        if self.in_axis is None:
            raise ModelError(f"A transposed convolution's weight of shape {self.shape} needs an input axis.")
        return self.in_axis % len(self.shape)


def layout(view: WeightView, op: str, groups: int) -> Layout:
    """The layout of a weight that an operation `op` reads in `groups` groups."""
    return Layout(tuple(view.array.shape), view.out_axis, view.in_axis, groups, op == "conv_transpose")


def rounders(params: QParams | Codebook, where: Layout) -> list[Rounder]:
    """For each group, the rounder (`numerics.rounders`) of the columns of its matrix, by a solved quantizer of any scheme."""
    places = _tables(params, where)
    make = _integers if isinstance(params, QParams) else _levels
    return [make(params, place) for place in places]  # type: ignore[arg-type]


def steps(params: QParams, where: Layout) -> tuple[Array, Array]:
    """Scale and zero point of every weight, (groups, rows, columns), float64."""
    scale, zero_point = params.broadcast(where.shape)
    full = np.broadcast_to(scale, where.shape), np.broadcast_to(zero_point, where.shape)
    return where.matrices(full[0]).astype(np.float64), where.matrices(full[1]).astype(np.float64)


def _tables(params: QParams | Codebook, where: Layout) -> Array:
    """Which entry of the flat scales each weight uses, (groups, rows, columns)."""
    index = np.arange(params.scale.size, dtype=np.int64).reshape(params.scale.shape)
    numbered = QParams(index.astype(np.float32), index.astype(np.int32), _ANY, params.axis, params.group)
    return where.matrices(np.broadcast_to(numbered.broadcast(where.shape)[1], where.shape))


def _integers(params: QParams, place: Array) -> Rounder:
    scales, zeros = params.scale.ravel().astype(np.float64), params.zero_point.ravel().astype(np.float64)
    spec = params.spec

    def round_columns(values: Floats, columns: Columns) -> tuple[Codes, Floats]:
        at = place[:, columns]
        step, zero = scales[at].astype(values.dtype), zeros[at].astype(values.dtype)
        codes = np.clip(np.round(values / step) + zero, spec.qmin, spec.qmax)
        return codes.astype(np.int32), (codes - zero) * step

    return round_columns


def _levels(params: Codebook, place: Array) -> Rounder:
    scales = params.scale.ravel()
    table = params.levels.reshape(-1, params.levels.shape[-1])
    middles = table[:, 1:] / 2 + table[:, :-1] / 2

    def round_columns(values: Floats, columns: Columns) -> tuple[Codes, Floats]:
        at = place[:, columns]
        own = at if table.shape[0] > 1 else np.zeros_like(at)
        step = scales[at].astype(values.dtype)
        unit = values / step
        below, not_above = np.zeros(values.shape, np.int32), np.zeros(values.shape, np.int32)
        for index in range(middles.shape[1]):
            below += middles[own, index] < unit
            not_above += middles[own, index] <= unit
        codes = np.where(below % 2 == 0, below, not_above)  # half-way the even code wins, as in Codebook.encode
        return codes, (table[own, codes] * step).astype(values.dtype)

    return round_columns


def zero_codes(params: QParams | Codebook, where: Layout) -> Array:
    """The code of 0 for every weight, (groups, rows, columns)."""
    return where.matrices(params.encode(np.zeros(where.shape, np.float32)))
